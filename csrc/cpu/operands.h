// Typed arrays as the kernels take them: plain pointers, already checked. Matrices are row-major and
// contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Keep-mask of a dropout on a matrix [M, K]: bit j of byte i of a row keeps element 8i + j.
struct Dropout {
  const uint8_t* mask;  // [M, ceil(K / 8)], null without dropout
  float scale;          // 1 / (1 - p), 0 at p = 1
};

}  // namespace peft_fast
