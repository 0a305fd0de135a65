// The base weight as panels of cells, a stretch at a time. Compiled once per level.
#pragma once

#include "decoders.h"
#include "gemm.h"

namespace peft_fast::PEFT_FAST_LEVEL {

// Asks for elements [begin, begin + n) of an array to be brought near, as far as they lie before `end`.
// Blocks are read down columns of a matrix, which the hardware does not foresee. Always inlined: GCC takes a
// function that only prefetches for one without effect, and drops the call. Locality 2 is the second cache:
// lines that lie a page apart share few sets of the first one.
template <int Locality = 3>
PEFT_FAST_INLINE void prefetch(const void* data, int64_t bits, int64_t begin, int64_t n, int64_t end) {
  const int64_t stop = min(begin + n, end) * bits / 8;
  for (int64_t byte = begin * bits / 8; byte < stop; byte += 64)
    __builtin_prefetch(static_cast<const char*>(data) + byte, 0, Locality);
}
template <int Locality = 3>
PEFT_FAST_INLINE void prefetch(Operand src, int64_t begin, int64_t n, int64_t end) {
  prefetch<Locality>(src.data, src.dtype == DType::kFloat32 ? 32 : 16, begin, n, end);
}
PEFT_FAST_INLINE void prefetch(const Weight& w, int64_t begin, int64_t n) {
  if (is_dense(w)) return prefetch(w.dense, begin, n, w.N * w.K);
  if (is_eight_bit(w)) return prefetch(w.eight_bit.bytes, 8, begin, n, w.N * w.K);
  prefetch(w.four_bit.packed, 4, begin, n, w.N * w.K);
}

// The exact fp32 values of `count` groups, in one row if of 8 bits, from flat element i on, to out, out +
// stride, ...
template <class Decoder>
PEFT_FAST_INLINE void decode_groups(const Decoder& decoder, int64_t i, int64_t count, float* out,
                                    int64_t stride) {
  typename Decoder::Block block{};
  for (int64_t g = 0; g < count; ++g, i += kTileCols, out += stride) {
    if (g == 0 || decoder.starts_block(i)) block = decoder.block(i);
    V first, second;
    decoder.values(i, block, first, second);
    store(out, first);
    store(out + kLanes, second);
  }
}

// The exact fp32 values of flat elements [begin, begin + n), which lie in one group of a 4-bit weight.
inline void decode_part(const Weight& w, int64_t begin, int64_t n, float* out) {
  const int64_t group = begin / kTileCols * kTileCols;
  if (group + kTileCols <= w.N * w.K) {
    float values[kTileCols];
    decode_groups(FourBitDecoder(w), group, 1, values, kTileCols);
    std::memcpy(out, values + (begin - group), n * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = decode_element(w.four_bit, begin + i);
  }
}
inline void decode_4bit(const Weight& w, int64_t begin, int64_t n, float* out) {
  const int64_t head = min(n, round_up(begin, kTileCols) - begin), groups = (n - head) / kTileCols;
  const int64_t tail = n - head - groups * kTileCols;
  if (head > 0) decode_part(w, begin, head, out);
  decode_groups(FourBitDecoder(w), begin + head, groups, out + head, kTileCols);
  if (tail > 0) decode_part(w, begin + n - tail, tail, out + n - tail);
}

// The same for n elements of one row.
inline void decode_8bit(const Weight& w, int64_t begin, int64_t n, float* out) {
  const int64_t groups = n / kTileCols;
  with_decoder(w, [&](const auto& decoder) { decode_groups(decoder, begin, groups, out, kTileCols); });
  for (int64_t i = groups * kTileCols; i < n; ++i)
    out[i] = decode_element(w.eight_bit, begin + i, begin / w.K);
}

// out[0:n] = flat elements [begin, begin + n), of one row, of a weight that is stored as [K, N]. Rows that
// follow each other find the lines of the first one in the cache.
inline void gather(const Weight& w, int64_t begin, int64_t n, float* out) {
  visit(w.dense.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* p = static_cast<const E*>(w.dense.data) + begin % w.K * w.N + begin / w.K;
    for (int64_t i = 0; i < n; i += kTileCols) {
      const int64_t count = min(kTileCols, n - i);
      E values[kTileCols];
      for (int64_t j = 0; j < count; ++j) values[j] = p[(i + j) * w.N];
      to_float({values, w.dense.dtype}, 0, count, out + i);
    }
  });
}

// out[0:n] = the exact fp32 values of flat elements [begin, begin + n) of the weight.
inline void decode(const Weight& w, int64_t begin, int64_t n, float* out) {
  if (w.transposed || is_eight_bit(w)) {
    for (int64_t i = 0, count; i < n; i += count) {
      count = min(w.K - (begin + i) % w.K, n - i);
      (w.transposed ? gather : decode_8bit)(w, begin + i, count, out + i);
    }
    return;
  }
  if (is_dense(w)) return to_float(w.dense, begin, n, out);
  decode_4bit(w, begin, n, out);
}

// The elements (row, k) with row0 <= row < row0 + rows and k0 <= k < k0 + cols of the weight, and the flat
// elements from `next` on, as many to a row, which will be wanted soon.
struct Stretch {
  int64_t row0, rows, k0, cols, next;
};

// Whether the rows of a stretch are whole groups.
inline bool in_groups(const Weight& w, const Stretch& at) {
  return !is_dense(w) && (is_eight_bit(w) || w.K % kTileCols == 0) && at.cols % kTileCols == 0;
}

// out[i * row + c] = cell c of row i, for i < rows and c < cells: read(c, i, n, column) writes the cells c of
// rows i.., at most kRun, which follow each other where the weight is stored as [K, N].
constexpr int64_t kRun = 64;
template <class Read>
inline void transpose_runs(int64_t rows, int64_t cells, float* out, int64_t row, Read read) {
  float columns[kTileCols * kRun];
  for (int64_t i = 0; i < rows; i += kRun)
    for (int64_t c = 0; c < cells; c += kTileCols) {
      const int64_t n = min(kRun, rows - i), count = min(kTileCols, cells - c);
      for (int64_t j = 0; j < count; ++j) read(c + j, i, n, columns + j * kRun);
      transpose(columns, kRun, count, n, out + i * row + c, row);
    }
}

// A stretch of a weight that is stored as [K, N].
class Columns {
 public:
  Columns(const Weight& w, const Stretch& at)
      : w_(w), at_(at), ahead_((at.next % w.K - at.k0) * w.N + at.next / w.K - at.row0) {}

  // out[0:n] = rows i.. of column c, which is zero past the last one.
  void read(int64_t c, int64_t i, int64_t n, float* out) const {
    if (c >= at_.cols) {
      std::memset(out, 0, n * sizeof(float));
      return;
    }
    const int64_t begin = (at_.k0 + c) * w_.N + at_.row0 + i;
    prefetch(w_.dense, begin + ahead_, n, w_.N * w_.K);
    to_float(w_.dense, begin, n, out);
  }
  // Cell c, and cell p of column c, of rows i..: one and the same where a cell holds one value.
  void along(Single, int64_t c, int64_t i, int64_t n, float* cells) const { read(c, i, n, cells); }
  void across(Single, int64_t c, int64_t p, int64_t n, float* cells) const { read(c, p, n, cells); }
#ifdef PEFT_FAST_PAIRS
  void along(Pair, int64_t c, int64_t i, int64_t n, float* cells) const;
  void across(Pair, int64_t c, int64_t p, int64_t n, float* cells) const;
#endif

 private:
  const Weight& w_;
  const Stretch& at_;
  const int64_t ahead_;
};

// decode_along and pack_across of a weight that is stored as [K, N].
template <class Cell>
inline void transpose_along(const Weight& w, const Stretch& at, float* out) {
  const Columns columns(w, at);
  transpose_runs(
      at.rows, blocks(at.cols, Cell::kValues), out, kPanelRow,
      [&](int64_t c, int64_t i, int64_t n, float* cells) { columns.along(Cell(), c, i, n, cells); });
}
template <class Cell>
inline void transpose_across(const Weight& w, const Stretch& at, PackedB panel) {
  const Columns columns(w, at);
  for (int64_t k = 0; k < at.cols; k += kTileCols)
    transpose_runs(
        panel.depth, panel.width(k), panel.row(k, 0), panel.width(k),
        [&](int64_t c, int64_t p, int64_t n, float* cells) { columns.across(Cell(), k + c, p, n, cells); });
}

// src[begin:begin+n] as cells, the last one padded with zero.
inline void to_cells(Single, Operand src, int64_t begin, int64_t n, float* cells) {
  to_float(src, begin, n, cells);
}

// Calls f(i, begin) for rows i, i + step, ... of the stretch, where they begin, and has them brought near.
template <class F>
PEFT_FAST_INLINE void each_row(const Weight& w, const Stretch& at, int64_t rows, int64_t step, F f) {
  for (int64_t i = 0; i < rows; i += step) {
    for (int64_t j = i; j < i + step; ++j) prefetch(w, at.next + j * w.K, at.cols);
    f(i, (at.row0 + i) * w.K + at.k0);
  }
}

// Each row of the stretch as cells along it, to out, out + kPanelRow, ...
inline void decode_along(Single, const Weight& w, const Stretch& at, float* out) {
  if (w.transposed) return transpose_along<Single>(w, at, out);
  if (!in_groups(w, at))
    return each_row(w, at, at.rows, 1,
                    [&](int64_t i, int64_t begin) { decode(w, begin, at.cols, out + i * kPanelRow); });
  with_decoder(w, [&](const auto& decoder) {
    each_row(w, at, at.rows, 1, [&](int64_t i, int64_t begin) {
      decode_groups(decoder, begin, at.cols / kTileCols, out + i * kPanelRow, kTileCols);
    });
  });
}

// Row p of `panel` = row p of the stretch.
inline void pack_across(Single, const Weight& w, const Stretch& at, PackedB panel) {
  if (w.transposed) return transpose_across<Single>(w, at, panel);
  if (!in_groups(w, at))
    return each_row(w, at, at.rows, 1, [&](int64_t p, int64_t begin) {
      float values[kSteps];
      decode(w, begin, at.cols, values);
      pack_values(panel, p, values);
    });
  with_decoder(w, [&](const auto& decoder) {
    each_row(w, at, at.rows, 1, [&](int64_t p, int64_t begin) {
      decode_groups(decoder, begin, at.cols / kTileCols, panel.row(0, p), kTileCols * panel.depth);
    });
  });
}

#ifdef PEFT_FAST_PAIRS

// `src` is bf16, or fp32 that is rounded to it.
inline void to_cells(Pair, Operand src, int64_t begin, int64_t n, float* cells) {
  if (n % 2 != 0) cells[n / 2] = 0.0f;
  if (src.dtype == DType::kBFloat16)
    std::memcpy(cells, static_cast<const BF16*>(src.data) + begin, n * sizeof(BF16));
  else
    from_float(static_cast<const float*>(src.data) + begin, n, {cells, DType::kBFloat16}, 0);
}

// cells[0:n] = values of two rows or columns, rounded to bf16.
inline void pair_up(const float* low, const float* high, int64_t n, float* cells) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const Bits first = bfloat16_bits(load(low + k)), second = bfloat16_bits(load(high + k));
    store(cells + k, (V)(first | second << 16));
  }
}

inline void Columns::along(Pair, int64_t c, int64_t i, int64_t n, float* cells) const {
  float values[2][kRun] = {};
  read(2 * c, i, n, values[0]);
  read(2 * c + 1, i, n, values[1]);
  pair_up(values[0], values[1], n, cells);
}
inline void Columns::across(Pair, int64_t c, int64_t p, int64_t n, float* cells) const {
  float values[2 * kRun];
  const int64_t count = min(2 * n, at_.rows - 2 * p);
  read(c, 2 * p, count, values);
  to_cells(Pair(), {values, DType::kFloat32}, 0, count, cells);
}

inline void decode_along(Pair, const Weight& w, const Stretch& at, float* out) {
  if (w.transposed) return transpose_along<Pair>(w, at, out);
  if (!in_groups(w, at))
    return each_row(w, at, at.rows, 1, [&](int64_t i, int64_t begin) {
      float values[2 * kSteps];
      decode(w, begin, at.cols, values);
      to_cells(Pair(), {values, DType::kFloat32}, 0, at.cols, out + i * kPanelRow);
    });
  with_decoder(w, [&](const auto& decoder) {
    each_row(w, at, at.rows, 1, [&](int64_t i, int64_t begin) {
      auto block = decoder.pair_block(begin);
      for (int64_t k = 0; k < at.cols; k += kTileCols) {
        if (k > 0 && decoder.starts_block(begin + k)) block = decoder.pair_block(begin + k);
        store(out + i * kPanelRow + k / 2, decoder.along(begin + k, block));
      }
    });
  });
}

// Rows 2p and 2p + 1 of the stretch, of which the second may be past the last one, as cells of row p.
inline void pack_pair(const Weight& w, const Stretch& at, int64_t p, int64_t upper, PackedB panel) {
  float values[2][kSteps] = {}, cells[kSteps];
  decode(w, upper, at.cols, values[0]);
  if (2 * p + 1 < at.rows) decode(w, upper + w.K, at.cols, values[1]);
  pair_up(values[0], values[1], at.cols, cells);
  pack_values(panel, p, cells);
}

// Row p of `panel` = cells of rows 2p and 2p + 1 of the stretch; past its last row there is zero.
inline void pack_across(Pair, const Weight& w, const Stretch& at, PackedB panel) {
  if (w.transposed) return transpose_across<Pair>(w, at, panel);
  if (!in_groups(w, at))
    return each_row(w, at, 2 * panel.depth, 2,
                    [&](int64_t i, int64_t begin) { pack_pair(w, at, i / 2, begin, panel); });
  with_decoder(w, [&](const auto& decoder) {
    each_row(w, at, 2 * panel.depth, 2, [&](int64_t i, int64_t upper) {
      const int64_t lower = upper + w.K;
      if (i + 1 >= at.rows) return pack_pair(w, at, i / 2, upper, panel);
      auto block = decoder.pair_block(upper, lower);
      float* out = panel.row(0, i / 2);
      for (int64_t k = 0; k < at.cols; k += kTileCols, out += kTileCols * panel.depth) {
        if (k > 0 && (decoder.starts_block(upper + k) || decoder.starts_block(lower + k)))
          block = decoder.pair_block(upper + k, lower + k);
        V first, second;
        decoder.across(upper + k, lower + k, block, first, second);
        store(out, first);
        store(out + kLanes, second);
      }
    });
  });
}

#endif

}  // namespace peft_fast::PEFT_FAST_LEVEL
