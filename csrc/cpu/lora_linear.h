// The CPU kernels of lora_linear as the bindings see them: plain pointers, already checked.
//
// Shapes: M tokens, K in-features, N out-features, R rank. Every matrix is row-major and contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../decode.h"

namespace peft_fast {

enum class DType { kFloat32, kFloat16, kBFloat16 };

// A read-only operand of one of the three floating dtypes.
struct Operand {
  const void* data;
  DType dtype;
};

// A result of one of the three floating dtypes; null data when it is not wanted.
struct Result {
  void* data;
  DType dtype;
};

// The frozen base weight [N, K]: `four_bit` when dense.data is null.
struct Weight {
  int64_t N, K;
  Operand dense;
  FourBit four_bit;
};

// Keep-mask of the dropout on the low-rank branch: bit j of byte i of a row keeps element 8i + j.
struct Dropout {
  const uint8_t* mask;  // [M, ceil(K / 8)], null without dropout
  float scale;          // 1 / (1 - p), 0 at p = 1
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

// One instruction-set level. The same bits come out for any number of threads.
struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*dequantize)(const Weight&, Result out);  // out [N, K], each value rounded once
};

namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace scalar {
extern const Kernels kernels;
}

// Scratch of the calling thread, 64-byte aligned, reused from call to call and grown as needed; its contents
// are lost at the next request. `shared_scratch` is for what the caller prepares for all workers,
// `local_scratch` for one work item.
float* shared_scratch(int64_t floats);
float* local_scratch(int64_t floats);

// Packs keep [M, K] (nonzero keeps) into mask [M, ceil(K / 8)], least significant bit first.
void pack_bits(const uint8_t* keep, int64_t M, int64_t K, uint8_t* mask);

}  // namespace peft_fast
