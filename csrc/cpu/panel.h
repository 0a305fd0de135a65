// The base weight as panels of cells, a stretch at a time. Compiled once per level.
#pragma once

#include "gemm.h"

namespace peft_fast::PEFT_FAST_LEVEL {

inline bool is_dense(const Weight& w) {
  return w.dense.data != nullptr;
}

// Small functions of inner loops, which GCC would rather call, saving every vector register around the call.
#define PEFT_FAST_INLINE __attribute__((always_inline)) inline

// Decodes groups: kTileCols elements from a multiple of kTileCols on, which lie in one block and start at a
// byte. Made of a dense weight, it decodes nothing.
class GroupDecoder {
 public:
  // A dense weight has no table; its decoder is never asked for values.
  explicit GroupDecoder(const FourBit& w) : w_(w), code_(w.code != nullptr ? load_table(w.code) : Table{}) {}

  PEFT_FAST_INLINE const uint8_t* bytes(int64_t i) const { return w_.packed + (i >> 1); }
  PEFT_FAST_INLINE float scale(int64_t i) const { return block_scale(w_, i >> w_.block_shift); }
  PEFT_FAST_INLINE bool starts_block(int64_t i) const {
    return (i & ((int64_t{1} << w_.block_shift) - 1)) == 0;
  }
  // The exact values that the nibbles of the group at i stand for.
  PEFT_FAST_INLINE Table table(int64_t i) const { return scale_table(code_, scale(i)); }

 private:
  const FourBit w_;
  const Table code_;
};

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
  prefetch(w.four_bit.packed, 4, begin, n, w.N * w.K);
}

// The exact fp32 values of `count` whole groups from flat element i on, to out, out + stride, ...
PEFT_FAST_INLINE void decode_groups(const GroupDecoder& group, int64_t i, int64_t count, float* out,
                                    int64_t stride) {
  Table table{};
  for (int64_t g = 0; g < count; ++g, i += kTileCols, out += stride) {
    if (g == 0 || group.starts_block(i)) table = group.table(i);
    V first, second;
    lookup(group.bytes(i), table, first, second);
    store(out, first);
    store(out + kLanes, second);
  }
}

// The exact fp32 values of flat elements [begin, begin + n), which lie in one group of a 4-bit weight.
inline void decode_part(const Weight& w, int64_t begin, int64_t n, float* out) {
  const int64_t group = begin / kTileCols * kTileCols;
  if (group + kTileCols <= w.N * w.K) {
    float values[kTileCols];
    decode_groups(GroupDecoder(w.four_bit), group, 1, values, kTileCols);
    std::memcpy(out, values + (begin - group), n * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = decode_element(w.four_bit, begin + i);
  }
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
  if (w.transposed) {
    for (int64_t i = 0, count; i < n; i += count) {
      count = min(w.K - (begin + i) % w.K, n - i);
      gather(w, begin + i, count, out + i);
    }
    return;
  }
  if (is_dense(w)) return to_float(w.dense, begin, n, out);
  const int64_t head = min(n, round_up(begin, kTileCols) - begin), groups = (n - head) / kTileCols;
  const int64_t tail = n - head - groups * kTileCols;
  if (head > 0) decode_part(w, begin, head, out);
  decode_groups(GroupDecoder(w.four_bit), begin + head, groups, out + head, kTileCols);
  if (tail > 0) decode_part(w, begin + n - tail, tail, out + n - tail);
}

// The elements (row, k) with row0 <= row < row0 + rows and k0 <= k < k0 + cols of the weight, and the flat
// elements from `next` on, as many to a row, which will be wanted soon.
struct Stretch {
  int64_t row0, rows, k0, cols, next;
};

// Whether the rows of a stretch are whole groups.
inline bool in_groups(const Weight& w, const Stretch& at) {
  return !is_dense(w) && w.K % kTileCols == 0 && at.cols % kTileCols == 0;
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

// Each row of the stretch as cells along it, to out, out + kPanelRow, ...
inline void decode_along(Single, const Weight& w, const Stretch& at, float* out) {
  if (w.transposed) return transpose_along<Single>(w, at, out);
  const GroupDecoder group(w.four_bit);
  const bool whole = in_groups(w, at);
  for (int64_t i = 0; i < at.rows; ++i, out += kPanelRow) {
    const int64_t begin = (at.row0 + i) * w.K + at.k0;
    prefetch(w, at.next + i * w.K, at.cols);
    if (whole)
      decode_groups(group, begin, at.cols / kTileCols, out, kTileCols);
    else
      decode(w, begin, at.cols, out);
  }
}

// Row p of `panel` = row p of the stretch.
inline void pack_across(Single, const Weight& w, const Stretch& at, PackedB panel) {
  if (w.transposed) return transpose_across<Single>(w, at, panel);
  const GroupDecoder group(w.four_bit);
  const bool whole = in_groups(w, at);
  for (int64_t p = 0; p < at.rows; ++p) {
    const int64_t begin = (at.row0 + p) * w.K + at.k0;
    prefetch(w, at.next + p * w.K, at.cols);
    if (whole) {
      decode_groups(group, begin, at.cols / kTileCols, panel.row(0, p), kTileCols * panel.depth);
      continue;
    }
    float values[kSteps];
    decode(w, begin, at.cols, values);
    pack_values(panel, p, values);
  }
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
  const GroupDecoder group(w.four_bit);
  const bool whole = in_groups(w, at);
  for (int64_t i = 0; i < at.rows; ++i, out += kPanelRow) {
    const int64_t begin = (at.row0 + i) * w.K + at.k0;
    prefetch(w, at.next + i * w.K, at.cols);
    if (!whole) {
      float values[2 * kSteps];
      decode(w, begin, at.cols, values);
      to_cells(Pair(), {values, DType::kFloat32}, 0, at.cols, out);
      continue;
    }
    PairTable table{};
    for (int64_t k = 0; k < at.cols; k += kTileCols) {
      if (k == 0 || group.starts_block(begin + k)) {
        const Table values = group.table(begin + k);
        table = load_pair_table(values, values);
      }
      store(out + k / 2, lookup_along(group.bytes(begin + k), table));
    }
  }
}

// Row p of `panel` = cells of rows 2p and 2p + 1 of the stretch; past its last row there is zero.
inline void pack_across(Pair, const Weight& w, const Stretch& at, PackedB panel) {
  if (w.transposed) return transpose_across<Pair>(w, at, panel);
  const GroupDecoder group(w.four_bit);
  const bool whole = in_groups(w, at);
  for (int64_t p = 0; p < panel.depth; ++p) {
    const int64_t upper = (at.row0 + 2 * p) * w.K + at.k0, lower = upper + w.K;
    const bool has_lower = 2 * p + 1 < at.rows;
    prefetch(w, at.next + 2 * p * w.K, at.cols);
    prefetch(w, at.next + (2 * p + 1) * w.K, at.cols);
    if (!whole || !has_lower) {
      float values[2][kSteps] = {}, cells[kSteps];
      decode(w, upper, at.cols, values[0]);
      if (has_lower) decode(w, lower, at.cols, values[1]);
      pair_up(values[0], values[1], at.cols, cells);
      pack_values(panel, p, cells);
      continue;
    }
    PairTable table{};
    float* out = panel.row(0, p);
    for (int64_t k = 0; k < at.cols; k += kTileCols, out += kTileCols * panel.depth) {
      if (k == 0 || group.starts_block(upper + k) || group.starts_block(lower + k))
        table = load_pair_table(group.table(upper + k), group.table(lower + k));
      V first, second;
      lookup_across(group.bytes(upper + k), group.bytes(lower + k), table, first, second);
      store(out, first);
      store(out + kLanes, second);
    }
  }
}

#endif

}  // namespace peft_fast::PEFT_FAST_LEVEL
