// The arguments of the ops as the kernels take them, checked before memory is touched. Errors name the
// argument, what was expected and what came.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"
#include "text.h"

// The weight arguments are the fields of QuantizedWeight (peft_fast/formats.py), in that order.
#define WEIGHT_SCHEMA                                                                         \
  "Tensor weight, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, " \
  "Tensor? nested_offset, str format, int out_features, int in_features, int blocksize, "     \
  "int nested_blocksize"
#define WEIGHT_PARAMETERS                                                                          \
  Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> code,                         \
      std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,                      \
      std::optional<Tensor> nested_offset, Text format, int64_t out_features, int64_t in_features, \
      int64_t blocksize, int64_t nested_blocksize
#define WEIGHT_ARGUMENTS                                                                              \
  weight, absmax, code, nested_absmax, nested_code, nested_offset, format, out_features, in_features, \
      blocksize, nested_blocksize

namespace peft_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
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

// What the tensors of one call have to be: all on the CPU, or all on one GPU.
class Arguments {
 public:
  static Arguments on_cpu() { return Arguments(true, -1); }
  static Arguments on_gpu_of(const Tensor& t) { return Arguments(false, t.get_device_index()); }

  int32_t device() const { return device_; }

  // `t` is a contiguous tensor of this dtype with `numel` elements.
  void check(const char* name, const Tensor& t, ScalarType dtype, int64_t numel) const {
    check_device(name, t);
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
    STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides otherwise");
    STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got shape ", shape(t));
  }

  // The data of `t`, which is as check wants it.
  template <class T>
  const T* data(const char* name, const Tensor& t, ScalarType dtype, int64_t numel) const {
    check(name, t, dtype, numel);
    return static_cast<const T*>(t.const_data_ptr());
  }

  // The same of an optional `t`, which is present.
  template <class T>
  const T* required(const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t numel) const {
    STD_TORCH_CHECK(t.has_value(), name, ": expected a tensor, got None");
    return data<T>(name, *t, dtype, numel);
  }

  // The `numel` elements of `t`, of any of the three floating dtypes.
  Operand operand(const char* name, const Tensor& t, int64_t numel) const {
    const DType dtype = float_dtype(name, t.scalar_type());
    return {data<void>(name, t, t.scalar_type(), numel), dtype};
  }

  // The matrix `t` [rows, cols], of any of the three floating dtypes.
  Operand matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    check_shape(name, t, rows, cols);
    return operand(name, t, rows * cols);
  }

  // The same, stored as [cols, rows].
  Operand transposed_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    check_device(name, t);
    check_shape(name, t, rows, cols);
    STD_TORCH_CHECK(t.stride(0) == 1 && t.stride(1) == rows, name,
                    ": expected a contiguous matrix or the transpose of one, got strides [", t.stride(0),
                    ", ", t.stride(1), "]");
    return {t.const_data_ptr(), float_dtype(name, t.scalar_type())};
  }

  // The matrix `t` [rows, cols] of this dtype.
  Operand matrix_of(const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
    return matrix(name, t, rows, cols);
  }

  // The fp32 matrix `t` [rows, cols].
  const float* float_matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
    return static_cast<const float*>(matrix_of(name, t, ScalarType::Float, rows, cols).data);
  }

  Dropout dropout(const std::optional<Tensor>& mask, int64_t M, int64_t K, double p) const {
    STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout_p: expected a probability in [0, 1], got ", p);
    if (!mask.has_value()) return {nullptr, 1.0f};
    return {data<uint8_t>("dropout_mask", *mask, ScalarType::Byte, M * ((K + 7) / 8)),
            p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
  }

  // A weight of any format, with every size checked against what it says of itself.
  Weight weight(WEIGHT_PARAMETERS) const {
    int64_t numel = 0;
    STD_TORCH_CHECK(out_features >= 1 && in_features >= 1 &&
                        !__builtin_mul_overflow(out_features, in_features, &numel) && numel < INT64_MAX / 8,
                    "out_features, in_features: expected positive sizes, got ", out_features, ", ",
                    in_features);
    Weight w{};
    w.N = out_features;
    w.K = in_features;
    if (format == "dense") {
      w.transposed = weight.dim() == 2 && !weight.is_contiguous();
      w.dense = w.transposed ? transposed_matrix("weight", weight, out_features, in_features)
                             : matrix("weight", weight, out_features, in_features);
      return w;
    }
    if (format == "int8" || format == "fp8") {
      EightBit& q = w.eight_bit;
      q.integers = format == "int8";
      q.bytes = data<uint8_t>("weight", weight, q.integers ? ScalarType::Char : ScalarType::Byte, numel);
      q.absmax = required<float>("absmax", absmax, ScalarType::Float, out_features);
      STD_TORCH_CHECK(blocksize == in_features, "blocksize: expected the length of a row, ", in_features,
                      ", got ", blocksize);
      return w;
    }
    STD_TORCH_CHECK(format == "nf4" || format == "fp4" || format == "mxfp4",
                    "format: expected dense, nf4, fp4, mxfp4, int8 or fp8, got ", format);
    FourBit& q = w.four_bit;
    q.block_shift = log2_blocksize("blocksize", blocksize);
    const int64_t blocks = (numel + blocksize - 1) / blocksize;
    q.packed = data<uint8_t>("weight", weight, ScalarType::Byte, (numel + 1) / 2);
    q.code = required<float>("code", code, ScalarType::Float, 16);
    if (!nested_absmax.has_value()) {
      q.absmax = required<float>("absmax", absmax, ScalarType::Float, blocks);
      return w;
    }
    q.nested_shift = log2_blocksize("nested_blocksize", nested_blocksize);
    q.absmax_u8 = required<uint8_t>("absmax", absmax, ScalarType::Byte, blocks);
    q.nested_absmax = data<float>("nested_absmax", *nested_absmax, ScalarType::Float,
                                  (blocks + nested_blocksize - 1) / nested_blocksize);
    q.nested_code = required<float>("nested_code", nested_code, ScalarType::Float, 256);
    q.nested_offset = required<float>("nested_offset", nested_offset, ScalarType::Float, 1);
    return w;
  }

 private:
  Arguments(bool cpu, int32_t device) : cpu_(cpu), device_(device) {}

  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(cpu_ ? t.is_cpu() : t.is_cuda(), name, ": expected a ", cpu_ ? "cpu" : "cuda",
                    " tensor, got another device");
    STD_TORCH_CHECK(cpu_ || t.get_device_index() == device_, name, ": expected device ", device_, ", got ",
                    t.get_device_index());
  }

  static void check_shape(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape [", rows,
                    ", ", cols, "], got ", shape(t));
  }

  static int log2_blocksize(const char* name, int64_t blocksize) {
    STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, name,
                    ": expected a power of two in [32, 4096], got ", blocksize);
    return __builtin_ctzll(static_cast<unsigned long long>(blocksize));
  }

  bool cpu_;
  int32_t device_;
};

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
