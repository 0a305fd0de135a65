// The decode of a 4-bit base weight, for host and device: the arithmetic of peft_fast/formats.py, bit for
// bit.
//
// Flat row-major [N, K]; byte = even element << 4 | odd element; block b holds elements [b << block_shift,
// (b + 1) << block_shift). Element i is code[nibble_i] * scale(block), in fp32. With nested quantization
// scale(b) = nested_code[absmax_u8[b]] * nested_absmax[b >> nested_shift] + offset: multiply, round, add,
// round. A fused multiply-add would change bits, so host code is built with -ffp-contract=off.
#pragma once

#include <cstdint>

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

}  // namespace peft_fast
