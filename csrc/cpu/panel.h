// The base weight as panels of cells, a stretch at a time. Compiled once per level.
#pragma once

#include "gemm.h"

namespace peft_fast::PEFT_FAST_LEVEL {

inline bool is_dense(const Weight& w) {
  return w.dense.data != nullptr;
}

// Decodes groups: kTileCols elements from a multiple of kTileCols on, which lie in one block and start at a
// byte. Made of a dense weight, it decodes nothing.
class GroupDecoder {
 public:
  // A dense weight has no table; its decoder is never asked for values.
  explicit GroupDecoder(const FourBit& w) : w_(w), code_(w.code != nullptr ? load_table(w.code) : Table{}) {}

  // The code values of the group at flat element i, not yet scaled.
  void codes(int64_t i, V& first, V& second) const { lookup(bytes(i), code_, first, second); }

  const uint8_t* bytes(int64_t i) const { return w_.packed + (i >> 1); }
  float scale(int64_t i) const { return block_scale(w_, i >> w_.block_shift); }
  bool starts_block(int64_t i) const { return (i & ((int64_t{1} << w_.block_shift) - 1)) == 0; }
  // The exact values that the nibbles of the group at i stand for.
  Table table(int64_t i) const { return scale_table(code_, scale(i)); }

 private:
  const FourBit w_;
  const Table code_;
};

// Asks for flat elements [begin, begin + n) to be brought near, as far as they exist. Panels walk down
// columns of the packed matrix, which the hardware does not foresee. Always inlined: GCC takes a function
// that only prefetches for one without effect, and drops the call.
__attribute__((always_inline)) inline void prefetch(const Weight& w, int64_t begin, int64_t n) {
  const int64_t end = min(begin + n, w.N * w.K);
  const char* data = static_cast<const char*>(is_dense(w) ? w.dense.data : w.four_bit.packed);
  const int64_t bits = !is_dense(w) ? 4 : w.dense.dtype == DType::kFloat32 ? 32 : 16;
  for (int64_t byte = begin * bits / 8; byte < end * bits / 8; byte += 64) __builtin_prefetch(data + byte);
}

// The exact fp32 values of `count` whole groups from flat element i on, to out, out + stride, ...
inline void decode_groups(const Weight& w, int64_t i, int64_t count, float* out, int64_t stride) {
  if (count == 0) return;
  const GroupDecoder group(w.four_bit);
  Table table = group.table(i);
  for (int64_t g = 0; g < count; ++g, i += kTileCols, out += stride) {
    if (g > 0 && group.starts_block(i)) table = group.table(i);
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
    decode_groups(w, group, 1, values, kTileCols);
    std::memcpy(out, values + (begin - group), n * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = decode_element(w.four_bit, begin + i);
  }
}

// out[0:n] = the exact fp32 values of flat elements [begin, begin + n) of the weight.
inline void decode(const Weight& w, int64_t begin, int64_t n, float* out) {
  if (is_dense(w)) return to_float(w.dense, begin, n, out);
  const int64_t head = min(n, round_up(begin, kTileCols) - begin), groups = (n - head) / kTileCols;
  const int64_t tail = n - head - groups * kTileCols;
  if (head > 0) decode_part(w, begin, head, out);
  decode_groups(w, begin + head, groups, out + head, kTileCols);
  if (tail > 0) decode_part(w, begin + n - tail, tail, out + n - tail);
}

// src[begin:begin+n] as cells, the last one padded with zero.
inline void to_cells(Single, Operand src, int64_t begin, int64_t n, float* cells) {
  to_float(src, begin, n, cells);
}

// cells[0:] = flat elements [begin, begin + n) of the weight, n at most kSteps cells.
inline void decode_along(Single, const Weight& w, int64_t begin, int64_t n, float* cells) {
  decode(w, begin, n, cells);
}

// Row p of `panel` = the weight's elements (row, k0 .. k0 + panel.cols).
inline void pack_across(Single, const Weight& w, int64_t row, int64_t k0, PackedB panel, int64_t p) {
  const int64_t begin = row * w.K + k0, whole = panel.cols / kTileCols;
  if (!is_dense(w) && begin % kTileCols == 0 && whole * kTileCols == panel.cols) {
    decode_groups(w, begin, whole, panel.row(0, p), kTileCols * panel.depth);
    return;
  }
  float values[kSteps];
  decode(w, begin, panel.cols, values);
  pack_row(panel, p,
           [&](int64_t j, int64_t n, float* out) { std::memcpy(out, values + j, n * sizeof(float)); });
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

inline void decode_along(Pair, const Weight& w, int64_t begin, int64_t n, float* cells) {
  int64_t done = 0;
  if (!is_dense(w) && begin % kTileCols == 0) {
    const GroupDecoder group(w.four_bit);
    PairTable table{};
    for (; done + kTileCols <= n; done += kTileCols) {
      const int64_t i = begin + done;
      if (done == 0 || group.starts_block(i)) table = load_pair_table(group.table(i));
      store(cells + (done >> 1), lookup_along(group.bytes(i), table));
    }
  }
  if (done == n) return;
  float values[2 * kSteps];
  decode(w, begin + done, n - done, values);
  if (n % 2 != 0) cells[n / 2] = 0.0f;
  from_float(values, n - done, {cells + done / 2, DType::kBFloat16}, 0);
}

// Row p of `panel` = cells of the weight's elements (row, k) and (row + 1, k), k from k0 on; past the last
// row there is zero.
inline void pack_across(Pair, const Weight& w, int64_t row, int64_t k0, PackedB panel, int64_t p) {
  const int64_t upper = row * w.K + k0, lower = upper + w.K;
  const bool has_lower = row + 1 < w.N;
  if (!is_dense(w) && w.K % kTileCols == 0 && has_lower) {
    const GroupDecoder group(w.four_bit);
    PairTable upper_table{}, lower_table{};
    for (int64_t k = 0; k < panel.cols; k += kTileCols) {
      if (k == 0 || group.starts_block(upper + k)) upper_table = load_pair_table(group.table(upper + k));
      if (k == 0 || group.starts_block(lower + k)) lower_table = load_pair_table(group.table(lower + k));
      V first, second;
      lookup_across(group.bytes(upper + k), upper_table, group.bytes(lower + k), lower_table, first, second);
      float* const out = panel.row(k, p);
      store(out, first);
      store(out + kLanes, second);
    }
    return;
  }
  float upper_values[kSteps] = {}, lower_values[kSteps] = {}, cells[kSteps];
  decode(w, upper, panel.cols, upper_values);
  if (has_lower) decode(w, lower, panel.cols, lower_values);
  for (int64_t k = 0; k < panel.cols; k += kLanes) {
    const Bits low = bfloat16_bits(load(upper_values + k)), high = bfloat16_bits(load(lower_values + k));
    store(cells + k, (V)(low | high << 16));
  }
  pack_row(panel, p,
           [&](int64_t j, int64_t n, float* out) { std::memcpy(out, cells + j, n * sizeof(float)); });
}

#endif

}  // namespace peft_fast::PEFT_FAST_LEVEL
