// lora_linear, its backward and dequantize: schemas, and every check before memory is touched.
//
// The weight arguments are the fields of QuantizedWeight (peft_fast/formats.py), in that order.
#include <tuple>

#include "arguments.h"

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
  Weight w{out_features, in_features, {}, false, {}};
  if (format == "dense") {
    w.transposed = weight.dim() == 2 && !weight.is_contiguous();
    w.dense = w.transposed ? transposed_matrix("weight", weight, out_features, in_features)
                           : matrix("weight", weight, out_features, in_features);
    return w;
  }
  STD_TORCH_CHECK(format == "nf4" || format == "fp4", "format: expected dense, nf4 or fp4, got ", format);
  FourBit& q = w.four_bit;
  q.block_shift = log2_blocksize("blocksize", blocksize);
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  check_numel("weight", weight, ScalarType::Byte, (numel + 1) / 2);
  q.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  q.code = required<float>("code", code, ScalarType::Float, 16);
  if (!nested_absmax.has_value()) {
    q.absmax = required<float>("absmax", absmax, ScalarType::Float, blocks);
    return w;
  }
  q.nested_shift = log2_blocksize("nested_blocksize", nested_blocksize);
  q.absmax_u8 = required<uint8_t>("absmax", absmax, ScalarType::Byte, blocks);
  q.nested_absmax = required<float>("nested_absmax", nested_absmax, ScalarType::Float,
                                    (blocks + nested_blocksize - 1) / nested_blocksize);
  q.nested_code = required<float>("nested_code", nested_code, ScalarType::Float, 256);
  q.nested_offset = required<float>("nested_offset", nested_offset, ScalarType::Float, 1);
  return w;
}

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
  if (out_scale.has_value()) f.out_scale = required<float>("out_scale", out_scale, ScalarType::Float, N);
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
  b.z = float_matrix("z", z, b.M, b.R);
  if (out_scale.has_value()) b.out_scale = required<float>("out_scale", out_scale, ScalarType::Float, N);
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

STABLE_TORCH_LIBRARY_FRAGMENT(peft_fast_cpu, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace
}  // namespace peft_fast
