// What the kernels use of a device: loads, stores, conversions and what a warp does together. One source is
// compiled by nvcc and, for the tests, by a C++ compiler with tests/emulated/cuda.h, which runs the threads
// of a block in turns.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define PEFT_FAST_DEVICE __device__ __forceinline__
// The shared memory of a kernel, which declares it once.
#define PEFT_FAST_SHARED(Type, name) __shared__ Type name
#else
#include "emulated/cuda.h"
#define PEFT_FAST_DEVICE inline
#define PEFT_FAST_SHARED(Type, name) Type& name = emulated::shared<Type>()
#endif

#include "launchers.h"

namespace peft_fast::cuda {

constexpr int kLanes = 32;

PEFT_FAST_DEVICE float bits_to_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

PEFT_FAST_DEVICE uint32_t float_to_bits(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

PEFT_FAST_DEVICE float half_to_float(uint16_t h) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
  return value;
#else
  return emulated::half_to_float(h);
#endif
}

// Two values in one register, each rounded to nearest even; `low` comes first in memory.
template <DType D>
PEFT_FAST_DEVICE uint32_t pack(float low, float high) {
  static_assert(D != DType::kFloat32);
#ifdef __CUDACC__
  uint32_t packed;
  if constexpr (D == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#else
  constexpr bool bf16 = D == DType::kBFloat16;
  const uint16_t first = bf16 ? emulated::float_to_bfloat16(low) : emulated::float_to_half(low);
  const uint16_t second = bf16 ? emulated::float_to_bfloat16(high) : emulated::float_to_half(high);
  return first | static_cast<uint32_t>(second) << 16;
#endif
}

// Element i of an array of dtype D.
template <DType D>
PEFT_FAST_DEVICE float load(const void* data, int64_t i) {
  if constexpr (D == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  if constexpr (D == DType::kFloat16) return half_to_float(h);
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}

PEFT_FAST_DEVICE float load(const Operand& t, int64_t i) {
  if (t.dtype == DType::kFloat32) return load<DType::kFloat32>(t.data, i);
  if (t.dtype == DType::kFloat16) return load<DType::kFloat16>(t.data, i);
  return load<DType::kBFloat16>(t.data, i);
}

template <DType D, int Count>
PEFT_FAST_DEVICE void load_strided(const void* data, int64_t i, int64_t stride, int64_t count,
                                   float (&value)[Count]) {
#pragma unroll
  for (int j = 0; j < Count; ++j) value[j] = j < count ? load<D>(data, i + j * stride) : 0.0f;
}

// Elements i, i + stride, .. of t, `count` of them and then zeros. All loads are under way at once, as they
// are not where each asks for the dtype anew.
template <int Count>
PEFT_FAST_DEVICE void load_strided(const Operand& t, int64_t i, int64_t stride, int64_t count,
                                   float (&value)[Count]) {
  if (t.dtype == DType::kFloat32) return load_strided<DType::kFloat32>(t.data, i, stride, count, value);
  if (t.dtype == DType::kFloat16) return load_strided<DType::kFloat16>(t.data, i, stride, count, value);
  load_strided<DType::kBFloat16>(t.data, i, stride, count, value);
}

// Elements i .. i + 7 of an array of dtype D, at a multiple of 16 bytes.
template <DType D>
PEFT_FAST_DEVICE void load8(const void* data, int64_t i, float (&value)[8]) {
  if constexpr (D == DType::kFloat32) {
    const float4* const at = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
    const float4 a = at[0], b = at[1];
    value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
    value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (D == DType::kFloat16) {
        value[2 * j] = half_to_float(static_cast<uint16_t>(words[j]));
        value[2 * j + 1] = half_to_float(static_cast<uint16_t>(words[j] >> 16));
      } else {
        value[2 * j] = bits_to_float(words[j] << 16);
        value[2 * j + 1] = bits_to_float(words[j] & 0xFFFF0000u);
      }
    }
  }
}

PEFT_FAST_DEVICE void load8(const Operand& t, int64_t i, float (&value)[8]) {
  if (t.dtype == DType::kFloat32) return load8<DType::kFloat32>(t.data, i, value);
  if (t.dtype == DType::kFloat16) return load8<DType::kFloat16>(t.data, i, value);
  load8<DType::kBFloat16>(t.data, i, value);
}

template <DType D>
PEFT_FAST_DEVICE void store(void* data, int64_t i, float value) {
  if constexpr (D == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(pack<D>(value, 0.0f));
  }
}

PEFT_FAST_DEVICE void store(const Result& t, int64_t i, float value) {
  if (t.dtype == DType::kFloat32) return store<DType::kFloat32>(t.data, i, value);
  if (t.dtype == DType::kFloat16) return store<DType::kFloat16>(t.data, i, value);
  store<DType::kBFloat16>(t.data, i, value);
}

// Four registers to a multiple of 16 bytes.
PEFT_FAST_DEVICE void store16(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __CUDACC__
  // Written out: the compiler takes some of these stores apart.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#else
  *static_cast<uint4*>(at) = uint4{a, b, c, d};
#endif
}

// Eight values to a multiple of 16 bytes.
template <DType D>
PEFT_FAST_DEVICE void store8(void* data, int64_t i, const float (&value)[8]) {
  if constexpr (D == DType::kFloat32) {
    float* const at = static_cast<float*>(data) + i;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      store16(at + j, float_to_bits(value[j]), float_to_bits(value[j + 1]), float_to_bits(value[j + 2]),
              float_to_bits(value[j + 3]));
    }
  } else {
    store16(static_cast<uint16_t*>(data) + i, pack<D>(value[0], value[1]), pack<D>(value[2], value[3]),
            pack<D>(value[4], value[5]), pack<D>(value[6], value[7]));
  }
}

// The four bytes of weights i .. i + 7, a multiple of eight.
PEFT_FAST_DEVICE uint32_t word_at(const FourBit& w, int64_t i) {
  return reinterpret_cast<const uint32_t*>(w.packed)[i / 8];
}

// Whether element (m, k) of a matrix [M, K] is kept.
PEFT_FAST_DEVICE bool kept(const Dropout& dropout, int64_t m, int64_t k, int64_t K) {
  return dropout.mask == nullptr || (dropout.mask[m * ((K + 7) / 8) + k / 8] >> (k % 8) & 1) != 0;
}

// ---------------------------------------------------------------------------------------------------- warps

PEFT_FAST_DEVICE float shuffle(float value, int lane) {
#ifdef __CUDACC__
  return __shfl_sync(0xFFFFFFFFu, value, lane);
#else
  return emulated::exchange(value, lane);
#endif
}

PEFT_FAST_DEVICE float shuffle_xor(float value, int mask) {
#ifdef __CUDACC__
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
#else
  return emulated::exchange(value, static_cast<int>(threadIdx.x % kLanes) ^ mask);
#endif
}

template <int Left, int Mask, int Count>
PEFT_FAST_DEVICE void halve_over_lanes(float (&value)[Count], int lane) {
  if constexpr (Mask > 0) {
    if constexpr (Left > 1) {
      const bool upper = (lane & Mask) != 0;
#pragma unroll
      for (int i = 0; i < Left / 2; ++i) {
        const float sent = upper ? value[i] : value[i + Left / 2];
        value[i] = (upper ? value[i + Left / 2] : value[i]) + shuffle_xor(sent, Mask);
      }
    } else {
      value[0] += shuffle_xor(value[0], Mask);
    }
    halve_over_lanes<(Left > 1 ? Left / 2 : 1), Mask / 2>(value, lane);
  }
}

// Sums of Count values over the lanes, in a fixed order: lane l returns that of value l * Count / 32. Each
// exchange halves what is left to add, so 32 sums take 31 of them.
template <int Count>
PEFT_FAST_DEVICE float sum_over_lanes(float (&value)[Count], int lane) {
  static_assert(Count <= kLanes && (Count & (Count - 1)) == 0);
  halve_over_lanes<Count, kLanes / 2>(value, lane);
  return value[0];
}

// -------------------------------------------------------------------------------------------- tensor cores

// `value` with 11 bits, rounded to nearest, ties away from zero.
PEFT_FAST_DEVICE float round_to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
#else
  return emulated::round_to_tf32(value);
#endif
}

// c [16, 8] += a [16, 8] · b [8, 8] of a warp, TF32 operands. With g = lane / 4 and t = lane % 4 a lane holds
// a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4);  b(t, g), b(t + 4, g);
// c(g, 2t), c(g, 2t + 1), c(g + 8, 2t), c(g + 8, 2t + 1).
PEFT_FAST_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#elif !defined(__CUDACC__)
  emulated::multiply_tf32(c, a, b);
#endif
}

}  // namespace peft_fast::cuda
