// The base weight as fp32, a stretch at a time. Compiled once per level.
#pragma once

#include "gemm.h"

namespace peft_fast::PEFT_FAST_LEVEL {

inline bool is_dense(const Weight& w) {
  return w.dense.data != nullptr;
}

// Decodes aligned units of kTileCols elements: a unit lies in one block and starts at a byte.
class UnitDecoder {
 public:
  // A dense weight has no table, and is never decoded.
  explicit UnitDecoder(const FourBit& w) : w_(w), table_(w.code != nullptr ? load_table(w.code) : Table{}) {}

  // The code values of the unit at flat element i; returns the scale they are to be multiplied by.
  float codes(int64_t i, V& first, V& second) const {
    lookup(w_.packed + i / 2, table_, first, second);
    return block_scale(w_, i >> w_.block_shift);
  }

  void decode(int64_t i, float* out) const {
    V first, second;
    const float scale = codes(i, first, second);
    store(out, first * scale);
    store(out + kLanes, second * scale);
  }

 private:
  const FourBit& w_;
  Table table_;
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

// out[0:n] = the exact fp32 values of flat elements [begin, begin + n) of the weight.
inline void decode(const Weight& w, int64_t begin, int64_t n, float* out) {
  if (is_dense(w)) return to_float(w.dense, begin, n, out);
  int64_t i = 0;
  if (begin % kTileCols == 0) {
    const UnitDecoder unit(w.four_bit);
    for (; i + kTileCols <= n; i += kTileCols) unit.decode(begin + i, out + i);
  }
  for (; i < n; ++i) out[i] = decode_element(w.four_bit, begin + i);
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
