// The base weight as fp32, a stretch at a time. Compiled once per level.
#pragma once

#include "gemm.h"

namespace peft_fast::PEFT_FAST_LEVEL {

inline bool is_dense(const Weight& w) {
  return w.dense.data != nullptr;
}

// Decodes aligned units of kTileCols elements: a unit lies in one block and starts at a byte. Made of a dense
// weight, it decodes nothing.
class UnitDecoder {
 public:
  // A dense weight has no table; its decoder is never asked for values.
  explicit UnitDecoder(const FourBit& w) : w_(w), table_(w.code != nullptr ? load_table(w.code) : Table{}) {}

  // The code values of the unit at flat element i.
  void codes(int64_t i, V& first, V& second) const { lookup(w_.packed + i / 2, table_, first, second); }

  // Updates `scale`, that of the unit before i in the same row, to that of the unit at i.
  void next_scale(int64_t i, float& scale) const {
    if ((i & ((int64_t{1} << w_.block_shift) - 1)) == 0) scale = first_scale(i);
  }
  float first_scale(int64_t i) const { return block_scale(w_, i >> w_.block_shift); }

 private:
  const FourBit w_;
  const Table table_;
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

// The exact fp32 values of flat elements [begin, begin + n) of the weight: each kTileCols of them to
// out, out + stride, out + 2 * stride, ...
inline void decode(const Weight& w, int64_t begin, int64_t n, float* out, int64_t stride = kTileCols) {
  int64_t i = 0;
  if (is_dense(w)) {
    for (; i < n; i += kTileCols, out += stride) to_float(w.dense, begin + i, min(kTileCols, n - i), out);
    return;
  }
  if (begin % kTileCols == 0 && n >= kTileCols) {
    const UnitDecoder unit(w.four_bit);
    float scale = unit.first_scale(begin);
    for (; i + kTileCols <= n; i += kTileCols, out += stride) {
      V first, second;
      unit.codes(begin + i, first, second);
      unit.next_scale(begin + i, scale);
      store(out, first * scale);
      store(out + kLanes, second * scale);
    }
  }
  for (; i < n; i += kTileCols, out += stride)
    for (int64_t j = 0; j < min(kTileCols, n - i); ++j) out[j] = decode_element(w.four_bit, begin + i + j);
}

// Row p of `panel` = the weight's flat elements from `begin` on.
inline void pack_decoded(const Weight& w, int64_t begin, PackedB panel, int64_t p) {
  const int64_t whole = panel.cols / kTileCols * kTileCols, rest = panel.cols - whole;
  decode(w, begin, whole, panel.row(0, p), kTileCols * panel.depth);
  if (rest == 0) return;
  float* const out = panel.row(whole, p);
  decode(w, begin + whole, rest, out);
  for (int64_t j = rest; j < panel.width(whole); ++j) out[j] = 0.0f;
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
