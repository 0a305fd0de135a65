// The CPU kernels of lora_linear as the bindings see them: plain pointers, already checked.
//
// Shapes: M tokens, K in-features, N out-features, R rank. Every matrix is row-major and contiguous, except a
// transposed weight.
#pragma once

#include "../decode.h"
#include "operands.h"

namespace peft_fast {

// The frozen base weight [N, K]: dense, or `eight_bit` where that has bytes, else `four_bit`.
struct Weight {
  int64_t N, K;
  Operand dense;
  bool transposed;  // dense is stored as [K, N]
  FourBit four_bit;
  EightBit eight_bit;
};

// y = out_scale ⊙ (x · Ŵᵀ + scaling · z · lora_Bᵀ) + bias  with  z = drop(x) · lora_Aᵀ.
struct Forward {
  int64_t M, R;
  Weight weight;
  Operand x;               // [M, K]
  Operand bias;            // [N], null data without bias
  const float* out_scale;  // [N], or null for ones
  Operand lora_A;          // [R, K]
  Operand lora_B;          // [N, R]
  Dropout dropout;
  float scaling;
  bool batch_invariant;  // the bits of a row of y and z do not depend on the number of rows
  Result y;              // [M, N]
  float* z;              // [M, R]
};

// With dY' = dY ⊙ out_scale:  dZ = scaling · dY' · lora_B,  dX = dY' · Ŵ + drop(dZ · lora_A),
// dA = dZᵀ · drop(x),  dB = scaling · dY'ᵀ · z,  dbias = Σ_m dY,  d_out_scale = Σ_m dY ⊙ (y − bias) /
// out_scale.
struct Backward {
  int64_t M, R;
  Weight weight;
  Operand grad;            // [M, N]
  Operand x;               // [M, K]
  Operand lora_A;          // [R, K]
  Operand lora_B;          // [N, R]
  const float* z;          // [M, R]
  const float* out_scale;  // [N], or null for ones
  Operand y;               // [M, N], read for d_out_scale alone
  Operand bias;            // [N], null data without bias, read for d_out_scale alone
  Dropout dropout;
  float scaling;
  Result dx;           // [M, K]
  Result d_A;          // [R, K]
  Result d_B;          // [N, R]
  float* dbias;        // [N], or null
  float* d_out_scale;  // [N], or null
};

}  // namespace peft_fast
