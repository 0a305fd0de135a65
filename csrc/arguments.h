// The arguments of the ops as the kernels take them, checked before memory is touched. Errors name the
// argument, what was expected and what came.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"

namespace peft_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// `t` is a contiguous CPU tensor of this dtype with `numel` elements.
inline void check_numel(const char* name, const Tensor& t, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a cpu tensor, got another device");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides otherwise");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got shape ", shape(t));
}

// The data of the optional `t`, present and as check_numel wants it.
template <class T>
const T* required(const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.has_value(), name, ": expected a tensor, got None");
  check_numel(name, *t, dtype, numel);
  return static_cast<const T*>(t->const_data_ptr());
}

inline DType float_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected Float, Half or BFloat16, got ", dtype);
  }
}

// The matrix `t` [rows, cols], of any of the three floating dtypes.
inline Operand matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  const DType dtype = float_dtype(name, t.scalar_type());
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape [", rows,
                  ", ", cols, "], got ", shape(t));
  check_numel(name, t, t.scalar_type(), rows * cols);
  return {t.const_data_ptr(), dtype};
}

// The matrix `t` [rows, cols], of any of the three floating dtypes, stored as [cols, rows].
inline Operand transposed_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a cpu tensor, got another device");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape [", rows,
                  ", ", cols, "], got ", shape(t));
  STD_TORCH_CHECK(t.stride(0) == 1 && t.stride(1) == rows, name,
                  ": expected a contiguous matrix or the transpose of one, got strides [", t.stride(0), ", ",
                  t.stride(1), "]");
  return {t.const_data_ptr(), float_dtype(name, t.scalar_type())};
}

// The matrix `t` [rows, cols] of this dtype.
inline Operand matrix_of(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  return matrix(name, t, rows, cols);
}

// The fp32 matrix `t` [rows, cols].
inline const float* float_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  return static_cast<const float*>(matrix_of(name, t, ScalarType::Float, rows, cols).data);
}

// The vector `t` [n], of any of the three floating dtypes.
inline Operand row_of(const char* name, const Tensor& t, int64_t n) {
  const DType dtype = float_dtype(name, t.scalar_type());
  check_numel(name, t, t.scalar_type(), n);
  return {t.const_data_ptr(), dtype};
}

inline Dropout make_dropout(const std::optional<Tensor>& mask, int64_t M, int64_t K, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout_p: expected a probability in [0, 1], got ", p);
  if (!mask.has_value()) return {nullptr, 1.0f};
  check_numel("dropout_mask", *mask, ScalarType::Byte, M * ((K + 7) / 8));
  return {static_cast<const uint8_t*>(mask->const_data_ptr()),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

inline int64_t rows_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got shape ", shape(t));
  return t.size(0);
}

// A gradient of the shape of `like` if wanted, else an empty tensor; `result` points to it.
inline Tensor gradient(bool wanted, const Tensor& like, Result& result) {
  if (!wanted) return torch::stable::new_empty(like, {0});
  Tensor grad = torch::stable::new_empty(like, like.sizes());
  result = {grad.mutable_data_ptr(), float_dtype("gradient", like.scalar_type())};
  return grad;
}

}  // namespace peft_fast
