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

// By all of the 256 threads of a block, each its byte; visible after the next barrier.
PEFT_FAST_DEVICE void fill(PairTable& table, const float* code) {
  const int byte = threadIdx.x;
  const float2 pair{code[byte >> 4], code[byte & 15]};
  // Neighbours write to different copies, that is, to different banks.
#pragma unroll
  for (int i = 0; i < kCopies; ++i) table.entries[byte][(byte + i) % kCopies] = pair;
}

// The codes of the eight weights in four bytes, in the order of memory. A byte lies 128 times its value from
// the start of a lane's copy: a shift and a logical operation with three operands.
PEFT_FAST_DEVICE void look_up(const PairTable& table, int lane, uint32_t word, float (&codes)[8]) {
  static_assert(sizeof(table.entries[0]) == 128);
  const char* const start = reinterpret_cast<const char*>(table.entries);
  const uint32_t copy = lane % kCopies * sizeof(float2);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t at = ((j == 0 ? word << 7 : word >> (8 * j - 7)) & 0x7F80u) | copy;
    const float2 pair = *reinterpret_cast<const float2*>(start + at);
    codes[2 * j] = pair.x;
    codes[2 * j + 1] = pair.y;
  }
}

}  // namespace peft_fast::cuda
