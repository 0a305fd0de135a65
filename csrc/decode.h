// The decode of a packed base weight, for host and device: the arithmetic of peft_fast/formats.py, bit for
// bit.
//
// 4 bits: flat row-major [N, K]; byte = even element << 4 | odd element; block b holds elements [b <<
// block_shift, (b + 1) << block_shift). Element i is code[nibble_i] * scale(block), in fp32. With nested
// quantization scale(b) = nested_code[absmax_u8[b]] * nested_absmax[b >> nested_shift] + offset: multiply,
// round, add, round. A fused multiply-add would change bits, so host code is built with -ffp-contract=off.
//
// 8 bits: row-major [N, K]; element (n, k) is the value of its byte times the scale of row n, in fp32.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PEFT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the kernels are compiled for other instruction sets than a function of this header alone.
#define PEFT_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace peft_fast {

// A packed 4-bit weight; the table `code` makes it nf4, fp4 or any other sixteen values.
struct FourBit {
  const uint8_t* packed;       // [ceil(N*K / 2)]
  const float* code;           // [16]
  const float* absmax;         // [blocks], null when nested
  const uint8_t* absmax_u8;    // [blocks], null unless nested
  const float* nested_code;    // [256], null unless nested
  const float* nested_absmax;  // [ceil(blocks / nested_blocksize)], null unless nested
  const float* nested_offset;  // [1], null unless nested
  int block_shift;             // log2(blocksize)
  int nested_shift;            // log2(nested_blocksize)
};

// The fp32 scale of one block.
PEFT_FAST_HOST_DEVICE float block_scale(const FourBit& w, int64_t block) {
  if (w.absmax_u8 == nullptr) return w.absmax[block];
  const float code = w.nested_code[w.absmax_u8[block]];
  const float absmax = w.nested_absmax[block >> w.nested_shift];
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(code, absmax), *w.nested_offset);
#else
  return code * absmax + *w.nested_offset;
#endif
}

// The nibble of flat element i: the high one of its byte when i is even.
PEFT_FAST_HOST_DEVICE int nibble(const FourBit& w, int64_t i) {
  const int byte = w.packed[i >> 1];
  return i & 1 ? byte & 0xF : byte >> 4;
}

// The fp32 value of flat element i.
PEFT_FAST_HOST_DEVICE float decode_element(const FourBit& w, int64_t i) {
  return w.code[nibble(w, i)] * block_scale(w, i >> w.block_shift);
}

// A packed 8-bit weight: int8 or e4m3.
struct EightBit {
  const uint8_t* bytes;  // [N, K]
  const float* absmax;   // [N]
  bool integers;         // int8, whose scale is absmax / 127
};

PEFT_FAST_HOST_DEVICE float row_scale(const EightBit& w, int64_t n) {
  return w.integers ? w.absmax[n] * (1.0f / 127.0f) : w.absmax[n];
}

// The value of an OCP e4m3 byte: 1 sign, 4 exponent and 3 mantissa bits, no infinity, NaN where all of them
// are set.
PEFT_FAST_HOST_DEVICE float e4m3_value(uint8_t byte) {
  const uint32_t magnitude = byte & 127;
  uint32_t bits = (magnitude << 20) + (120u << 23);
  if (magnitude == 127) bits = 0x7FC00000;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-9f;
  return byte & 128 ? -value : value;
}

// The fp32 value of flat element i, of row n.
PEFT_FAST_HOST_DEVICE float decode_element(const EightBit& w, int64_t i, int64_t n) {
  const float value =
      w.integers ? static_cast<float>(static_cast<int8_t>(w.bytes[i])) : e4m3_value(w.bytes[i]);
  return value * row_scale(w, n);
}

}  // namespace peft_fast
