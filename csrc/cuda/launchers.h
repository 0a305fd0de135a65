// The launchers as the ops see them: plain pointers, already checked. The device is the current one.
#pragma once

#include "../cpu/lora_linear.h"

namespace peft_fast::cuda {

constexpr int kMostRows = 8;  // M of the kernels for few tokens

// The partial sums of a backward pass, fp32, added in a fixed order.
struct Partials {
  int splits;  // of dX over N
  int chunks;  // of the thin results over N
  float* dx;   // [splits, M, K]
  float* d_z;  // [chunks, M, R], null where nothing needs dZ
};

// out_scale ⊙ (Ŵ + scaling · B · A) [N, K], each value rounded once to the dtype of `out`.
struct Write {
  Weight weight;
  int64_t R;               // 0 where nothing is merged
  Operand lora_A;          // [R, K]
  Operand lora_B;          // [N, R]
  const float* out_scale;  // [N], or null for ones
  float scaling;
  Result out;  // [N, K]
};

// Each returns null, or what went wrong. `forward` and `backward` take up to kMostRows tokens of one dtype.
const char* forward(const Forward& f, cudaStream_t stream);
const char* backward(const Backward& b, const Partials& sums, cudaStream_t stream);
const char* write(const Write& w, cudaStream_t stream);

// How many partial sums `backward` makes, and whether it makes any of dZ.
Partials partials(const Backward& b);
bool needs_dz(const Backward& b);

}  // namespace peft_fast::cuda
