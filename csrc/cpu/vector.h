// Typed rows as fp32 vectors: conversions, dropout, transposes. Compiled once per level (PEFT_FAST_LEVEL),
// on top of its simd_<level>.h.
#pragma once

#include <cstring>

#include "kernels.h"

namespace peft_fast::PEFT_FAST_LEVEL {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Bits16 __attribute__((vector_size(kLanes * 2)));

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

inline int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t blocks(int64_t n, int64_t block) {
  return (n + block - 1) / block;
}

template <class T>
inline T load_bits(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

inline V splat(float value) {
  return value - V{};
}
inline float sum(V v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline V load(const float* p) {
  return load_bits<V>(p);
}
inline V load(const F16* p) {
  return half_to_float(load_bits<decltype(float_to_half(V{}))>(p));
}
inline V load(const BF16* p) {
  return (V)(__builtin_convertvector(load_bits<Bits16>(p), Bits) << 16);
}

inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}
inline void store(F16* p, V v) {
  const auto bits = float_to_half(v);
  std::memcpy(p, &bits, sizeof(bits));
}
// The bits of v as bf16: to nearest, ties to even.
inline Bits bfloat16_bits(V v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16;
  return v == v ? rounded : Bits{} + 0x7FC0;
}
inline void store(BF16* p, V v) {
  const Bits16 result = __builtin_convertvector(bfloat16_bits(v), Bits16);
  std::memcpy(p, &result, sizeof(result));
}

// Calls f with a null pointer of the element type of `dtype`.
template <class F>
inline void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<F16*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BF16*>(nullptr));
  }
}

// dst[0:n] = src[begin:begin+n] in fp32, times `factor`.
inline void to_float(Operand src, int64_t begin, int64_t n, float* dst, float factor = 1.0f) {
  visit(src.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const E* p = static_cast<const E*>(src.data) + begin;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(p + i) * factor);
    if (i < n) {
      E tail[kLanes] = {};
      std::memcpy(tail, p + i, (n - i) * sizeof(E));
      const V v = load(tail) * factor;
      std::memcpy(dst + i, &v, (n - i) * sizeof(float));
    }
  });
}

// dst[begin:begin+n] = src[0:n] rounded once to the dtype of dst.
inline void from_float(const float* src, int64_t n, Result dst, int64_t begin) {
  visit(dst.dtype, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    E* p = static_cast<E*>(dst.data) + begin;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(p + i, load(src + i));
    if (i < n) {
      V v = {};
      std::memcpy(&v, src + i, (n - i) * sizeof(float));
      E tail[kLanes];
      store(tail, v);
      std::memcpy(p + i, tail, (n - i) * sizeof(E));
    }
  });
}

// Sixteen mask bits or fewer, one for each lane of the vector at column i of a row of the mask.
inline uint32_t lane_bits(const uint8_t* mask, int64_t i) {
  if constexpr (kLanes == 16) return load_bits<uint16_t>(mask + i / 8);
  return mask[i / 8] >> (i & 7);
}

// row[0:n] = what dropout leaves of it: columns begin.. of token m. `begin` is a multiple of 8.
inline void drop(const Dropout& dropout, int64_t K, int64_t m, int64_t begin, int64_t n, float* row) {
  const uint8_t* mask = dropout.mask + m * ((K + 7) / 8) + begin / 8;
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1u << i;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Bits keep = (Bits)((lane_bits(mask, i) & lane) != 0);
    store(row + i, (V)((Bits)(load(row + i) * dropout.scale) & keep));
  }
  for (; i < n; ++i) row[i] = mask[i >> 3] >> (i & 7) & 1 ? row[i] * dropout.scale : 0.0f;
}

// dst[c][r] = src[r][c] for r < rows, c < cols.
inline void transpose(const float* src, int64_t src_row, int64_t rows, int64_t cols, float* dst,
                      int64_t dst_row) {
  typedef float V4 __attribute__((vector_size(16)));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= cols; c += 4) {
      const float* s = src + r * src_row + c;
      float* d = dst + c * dst_row + r;
      const V4 a = load_bits<V4>(s), b = load_bits<V4>(s + src_row);
      const V4 e = load_bits<V4>(s + 2 * src_row), f = load_bits<V4>(s + 3 * src_row);
      const V4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const V4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const V4 ef_low = __builtin_shufflevector(e, f, 0, 4, 1, 5);
      const V4 ef_high = __builtin_shufflevector(e, f, 2, 6, 3, 7);
      const V4 columns[4] = {__builtin_shufflevector(ab_low, ef_low, 0, 1, 4, 5),
                             __builtin_shufflevector(ab_low, ef_low, 2, 3, 6, 7),
                             __builtin_shufflevector(ab_high, ef_high, 0, 1, 4, 5),
                             __builtin_shufflevector(ab_high, ef_high, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) std::memcpy(d + i * dst_row, &columns[i], sizeof(V4));
    }
    for (; c < cols; ++c)
      for (int64_t i = r; i < r + 4; ++i) dst[c * dst_row + i] = src[i * src_row + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[c * dst_row + r] = src[r * src_row + c];
}

}  // namespace peft_fast::PEFT_FAST_LEVEL
