// The decode of the kernels for few tokens: from a byte to the codes of both its weights in one load.
//
// Each of sixteen lanes has a table of its own, in its own two banks of the shared memory, so that lanes
// never wait for each other; half a warp is what a load of eight bytes a lane serves at a time.
#pragma once

#include "device.h"

namespace peft_fast::cuda {

constexpr int kCopies = 16;

// Whether the offsets of 64 rows, and the numbers of blocks, which have 32 weights or more, are 32-bit
// integers.
inline bool is_small(const Weight& w) {
  return w.K < int64_t{1} << 24 && w.N < (int64_t{1} << 36) / w.K;
}

// The scale of the block of weight i of such a weight.
PEFT_FAST_DEVICE float scale_at(const FourBit& w, int64_t i) {
  return block_scale(w, static_cast<uint32_t>(i >> w.block_shift));
}

struct PairTable {
  float2 entries[256][kCopies];
};

// The entry that this one of the 256 threads of a block fills in.
PEFT_FAST_DEVICE float2 entry_of(const float* code) {
  return {code[threadIdx.x >> 4], code[threadIdx.x & 15]};
}

// By all threads of a block, each its entry; visible after the next barrier.
PEFT_FAST_DEVICE void fill(PairTable& table, float2 pair) {
  const int byte = threadIdx.x;
  // Neighbours write to different copies, that is, to different banks.
#pragma unroll
  for (int i = 0; i < kCopies; ++i) table.entries[byte][(byte + i) % kCopies] = pair;
}

// Where the copy of a lane begins.
#ifdef __CUDACC__
using Copy = uint32_t;  // an address of shared memory
#else
using Copy = const char*;
#endif

PEFT_FAST_DEVICE Copy copy_of(const PairTable& table, int lane) {
  const float2* const start = &table.entries[0][lane % kCopies];
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(start));
#else
  return reinterpret_cast<Copy>(start);
#endif
}

PEFT_FAST_DEVICE float2 pair_at(Copy at) {
#ifdef __CUDACC__
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(at));
  return pair;
#else
  return *reinterpret_cast<const float2*>(at);
#endif
}

// The codes of the eight weights in four bytes, in the order of memory. A byte lies 128 times its value from
// the start of a copy: masked where it stands, it takes one more instruction to shift and add it.
PEFT_FAST_DEVICE void look_up(Copy copy, uint32_t word, float (&codes)[8]) {
  static_assert(sizeof(PairTable::entries[0]) == 128);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t byte = word & 0xFFu << 8 * j;
#ifdef __CUDACC__
    asm("and.b32 %0, %1, %2;" : "=r"(byte) : "r"(word), "r"(0xFFu << 8 * j));  // else shifted first
#endif
    const float2 pair = pair_at(copy + (j == 0 ? byte << 7 : byte >> (8 * j - 7)));
    codes[2 * j] = pair.x;
    codes[2 * j + 1] = pair.y;
  }
}

}  // namespace peft_fast::cuda
