// The ops of namespace peft_fast_cpu: schemas, and every check before memory is touched.
//
// The weight arguments are the fields of QuantizedWeight (peft_fast/formats.py), in that order.
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/lora_linear.h"

#define WEIGHT_SCHEMA                                                                         \
  "Tensor weight, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, " \
  "Tensor? nested_offset, str format, int out_features, int in_features, int blocksize, "     \
  "int nested_blocksize"
#define WEIGHT_PARAMETERS                                                                                 \
  Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> code,                                \
      std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,                             \
      std::optional<Tensor> nested_offset, std::string format, int64_t out_features, int64_t in_features, \
      int64_t blocksize, int64_t nested_blocksize
#define WEIGHT_ARGUMENTS                                                                              \
  weight, absmax, code, nested_absmax, nested_code, nested_offset, format, out_features, in_features, \
      blocksize, nested_blocksize

namespace peft_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------- checks

std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// `t` is a contiguous CPU tensor of this dtype with `numel` elements.
void check_numel(const char* name, const Tensor& t, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a cpu tensor, got another device");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides otherwise");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got shape ", shape(t));
}

// The optional field `t` of the weight, present and as check_numel wants it.
template <class T>
const T* field(const char* name, const std::optional<Tensor>& t, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(t.has_value(), name, ": expected a tensor, got None");
  check_numel(name, *t, dtype, numel);
  return static_cast<const T*>(t->const_data_ptr());
}

DType float_dtype(const char* name, ScalarType dtype) {
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
Operand matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  const DType dtype = float_dtype(name, t.scalar_type());
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape [", rows,
                  ", ", cols, "], got ", shape(t));
  check_numel(name, t, t.scalar_type(), rows * cols);
  return {t.const_data_ptr(), dtype};
}

// The vector `t` [n], of any of the three floating dtypes.
Operand row_of(const char* name, const Tensor& t, int64_t n) {
  const DType dtype = float_dtype(name, t.scalar_type());
  check_numel(name, t, t.scalar_type(), n);
  return {t.const_data_ptr(), dtype};
}

int log2_blocksize(const char* name, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, name,
                  ": expected a power of two in [32, 4096], got ", blocksize);
  return __builtin_ctzll(static_cast<unsigned long long>(blocksize));
}

Weight make_weight(WEIGHT_PARAMETERS) {
  int64_t numel = 0;
  STD_TORCH_CHECK(out_features >= 1 && in_features >= 1 &&
                      !__builtin_mul_overflow(out_features, in_features, &numel) && numel < INT64_MAX / 8,
                  "out_features, in_features: expected positive sizes, got ", out_features, ", ",
                  in_features);
  Weight w{out_features, in_features, {}, {}};
  if (format == "dense") {
    w.dense = matrix("weight", weight, out_features, in_features);
    return w;
  }
  STD_TORCH_CHECK(format == "nf4" || format == "fp4", "format: expected dense, nf4 or fp4, got ", format);
  FourBit& q = w.four_bit;
  q.block_shift = log2_blocksize("blocksize", blocksize);
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  check_numel("weight", weight, ScalarType::Byte, (numel + 1) / 2);
  q.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  q.code = field<float>("code", code, ScalarType::Float, 16);
  if (!nested_absmax.has_value()) {
    q.absmax = field<float>("absmax", absmax, ScalarType::Float, blocks);
    return w;
  }
  q.nested_shift = log2_blocksize("nested_blocksize", nested_blocksize);
  q.absmax_u8 = field<uint8_t>("absmax", absmax, ScalarType::Byte, blocks);
  q.nested_absmax = field<float>("nested_absmax", nested_absmax, ScalarType::Float,
                                 (blocks + nested_blocksize - 1) / nested_blocksize);
  q.nested_code = field<float>("nested_code", nested_code, ScalarType::Float, 256);
  q.nested_offset = field<float>("nested_offset", nested_offset, ScalarType::Float, 1);
  return w;
}

Dropout make_dropout(const std::optional<Tensor>& mask, int64_t M, int64_t K, double p) {
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "dropout_p: expected a probability in [0, 1], got ", p);
  if (!mask.has_value()) return {nullptr, 1.0f};
  check_numel("dropout_mask", *mask, ScalarType::Byte, M * ((K + 7) / 8));
  return {static_cast<const uint8_t*>(mask->const_data_ptr()),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

int64_t rows_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got shape ", shape(t));
  return t.size(0);
}

// ---------------------------------------------------------------------------------------------- levels

bool level_available(std::string level) {
#ifdef __x86_64__
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (level == "avx2") return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == "avx512") return avx512;
  if (level == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return level == "scalar";
}

// The kernels of a level; "" is the best one of this CPU.
const Kernels& kernels(const std::string& level) {
  STD_TORCH_CHECK(level.empty() || level_available(level), "level: expected one that this CPU has, got ",
                  level);
#ifdef __x86_64__
  if (level == "avx512bf16" || (level.empty() && level_available("avx512bf16"))) return avx512bf16::kernels;
  if (level == "avx512" || (level.empty() && level_available("avx512"))) return avx512::kernels;
  if (level == "avx2" || (level.empty() && level_available("avx2"))) return avx2::kernels;
#endif
  return scalar::kernels;
}

// ------------------------------------------------------------------------------------------------- ops

std::tuple<Tensor, Tensor> lora_linear(Tensor x, WEIGHT_PARAMETERS, std::optional<Tensor> bias, Tensor lora_A,
                                       Tensor lora_B, std::optional<Tensor> dropout_mask,
                                       std::optional<Tensor> out_scale, double scaling, double dropout_p,
                                       std::string level, bool batch_invariant) {
  Forward f{};
  f.weight = make_weight(WEIGHT_ARGUMENTS);
  const int64_t N = f.weight.N, K = f.weight.K;
  f.M = rows_of("x", x);
  f.R = rows_of("lora_A", lora_A);
  f.x = matrix("x", x, f.M, K);
  f.lora_A = matrix("lora_A", lora_A, f.R, K);
  f.lora_B = matrix("lora_B", lora_B, N, f.R);
  if (bias.has_value()) f.bias = row_of("bias", *bias, N);
  if (out_scale.has_value()) f.out_scale = field<float>("out_scale", out_scale, ScalarType::Float, N);
  f.dropout = make_dropout(dropout_mask, f.M, K, dropout_p);
  f.scaling = static_cast<float>(scaling);
  f.batch_invariant = batch_invariant;
  Tensor y = torch::stable::new_empty(x, {f.M, N});
  Tensor z = torch::stable::new_empty(x, {f.M, f.R}, ScalarType::Float);
  f.y = {y.mutable_data_ptr(), f.x.dtype};
  f.z = static_cast<float*>(z.mutable_data_ptr());
  kernels(level).forward(f);
  return {y, z};
}

// A gradient of the shape of `like` if wanted, else an empty tensor; `result` points to it.
Tensor gradient(bool wanted, const Tensor& like, Result& result) {
  if (!wanted) return torch::stable::new_empty(like, {0});
  Tensor grad = torch::stable::new_empty(like, like.sizes());
  result = {grad.mutable_data_ptr(), float_dtype("gradient", like.scalar_type())};
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor grad, Tensor x, WEIGHT_PARAMETERS, Tensor lora_A, Tensor lora_B, Tensor z,
    std::optional<Tensor> dropout_mask, std::optional<Tensor> out_scale, std::optional<Tensor> bias,
    std::optional<Tensor> y, double scaling, double dropout_p, bool needs_x, bool needs_A, bool needs_B,
    bool needs_bias, bool needs_out_scale, std::string level) {
  Backward b{};
  b.weight = make_weight(WEIGHT_ARGUMENTS);
  const int64_t N = b.weight.N, K = b.weight.K;
  b.M = rows_of("x", x);
  b.R = rows_of("lora_A", lora_A);
  b.grad = matrix("grad", grad, b.M, N);
  b.x = matrix("x", x, b.M, K);
  b.lora_A = matrix("lora_A", lora_A, b.R, K);
  b.lora_B = matrix("lora_B", lora_B, N, b.R);
  b.z = static_cast<const float*>(matrix("z", z, b.M, b.R).data);
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Float, "z: expected Float, got ", z.scalar_type());
  if (out_scale.has_value()) b.out_scale = field<float>("out_scale", out_scale, ScalarType::Float, N);
  if (needs_out_scale) {
    STD_TORCH_CHECK(out_scale.has_value(), "out_scale: expected a tensor, got None");
    STD_TORCH_CHECK(y.has_value(), "y: expected a tensor, got None");
    b.y = matrix("y", *y, b.M, N);
    if (bias.has_value()) b.bias = row_of("bias", *bias, N);
  }
  b.dropout = make_dropout(dropout_mask, b.M, K, dropout_p);
  b.scaling = static_cast<float>(scaling);
  Tensor dx = gradient(needs_x, x, b.dx);
  Tensor d_A = gradient(needs_A, lora_A, b.d_A);
  Tensor d_B = gradient(needs_B, lora_B, b.d_B);
  Tensor dbias = torch::stable::new_empty(z, {needs_bias ? N : 0});
  if (needs_bias) b.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  Tensor d_out_scale = torch::stable::new_empty(z, {needs_out_scale ? N : 0});
  if (needs_out_scale) b.d_out_scale = static_cast<float*>(d_out_scale.mutable_data_ptr());
  kernels(level).backward(b);
  return {dx, d_A, d_B, dbias, d_out_scale};
}

Tensor dequantize(WEIGHT_PARAMETERS, ScalarType dtype, std::string level) {
  const Weight w = make_weight(WEIGHT_ARGUMENTS);
  const DType out_dtype = float_dtype("dtype", dtype);
  Tensor out = torch::stable::new_empty(weight, {w.N, w.K}, dtype);
  kernels(level).dequantize(w, {out.mutable_data_ptr(), out_dtype});
  return out;
}

Tensor pack_mask(Tensor keep) {
  const ScalarType dtype = keep.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte, "keep: expected Bool or Byte, got ",
                  dtype);
  const int64_t M = rows_of("keep", keep), K = keep.size(1);
  check_numel("keep", keep, dtype, M * K);
  Tensor mask = torch::stable::new_empty(keep, {M, (K + 7) / 8}, ScalarType::Byte);
  pack_bits(static_cast<const uint8_t*>(keep.const_data_ptr()), M, K,
            static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

STABLE_TORCH_LIBRARY(peft_fast_cpu, m) {
  m.def(
      "lora_linear(Tensor x, " WEIGHT_SCHEMA
      ", Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? dropout_mask, Tensor? out_scale, float scaling, "
      "float dropout_p, str level, bool batch_invariant) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, " WEIGHT_SCHEMA
      ", Tensor lora_A, Tensor lora_B, Tensor z, Tensor? dropout_mask, Tensor? out_scale, Tensor? bias, "
      "Tensor? y, float scaling, float dropout_p, bool needs_x, bool needs_A, bool needs_B, bool needs_bias, "
      "bool needs_out_scale, str level) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dequantize(" WEIGHT_SCHEMA ", ScalarType dtype, str level) -> Tensor");
  m.def("pack_mask(Tensor keep) -> Tensor");
  m.def("level_available(str level) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("level_available", TORCH_BOX(&level_available));
}

}  // namespace
}  // namespace peft_fast
