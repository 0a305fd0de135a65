// What needs no instruction set of its own: thread-local scratch and the dropout mask packer.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace peft_fast {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Scratch shared;
thread_local Scratch local;

// Bit j of the result is set when byte j of the 8 bytes is nonzero.
uint8_t pack_byte(const uint8_t* keep) {
  constexpr uint64_t kLow7 = 0x7F7F7F7F7F7F7F7F, kOnes = 0x0101010101010101, kGather = 0x0102040810204080;
  uint64_t bytes;
  std::memcpy(&bytes, keep, sizeof(bytes));
  bytes = (((bytes & kLow7) + kLow7) | bytes) >> 7 & kOnes;
  return static_cast<uint8_t>(bytes * kGather >> 56);
}

}  // namespace

float* shared_scratch(int64_t floats) {
  return shared.reserve(floats);
}
float* local_scratch(int64_t floats) {
  return local.reserve(floats);
}

void pack_bits(const uint8_t* keep, int64_t M, int64_t K, uint8_t* mask) {
  const int64_t width = (K + 7) / 8;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(K, 1));
  torch::stable::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const uint8_t* row = keep + m * K;
      for (int64_t i = 0; i < K / 8; ++i) mask[m * width + i] = pack_byte(row + 8 * i);
      if (K % 8 != 0) {
        uint8_t tail[8] = {};
        std::memcpy(tail, row + K / 8 * 8, K % 8);
        mask[m * width + width - 1] = pack_byte(tail);
      }
    }
  });
}

}  // namespace peft_fast
