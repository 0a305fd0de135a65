// lora_linear, its backward and dequantize: schemas, and every check before memory is touched.
#include <tuple>

#include "arguments.h"

namespace peft_fast {
namespace {

const Arguments on = Arguments::on_cpu();

std::tuple<Tensor, Tensor> lora_linear(Tensor x, WEIGHT_PARAMETERS, std::optional<Tensor> bias, Tensor lora_A,
                                       Tensor lora_B, std::optional<Tensor> dropout_mask,
                                       std::optional<Tensor> out_scale, double scaling, double dropout_p,
                                       Text level, bool batch_invariant) {
  Forward f{};
  f.weight = on.weight(WEIGHT_ARGUMENTS);
  const int64_t N = f.weight.N, K = f.weight.K;
  f.M = rows_of("x", x);
  f.R = rows_of("lora_A", lora_A);
  f.x = on.matrix("x", x, f.M, K);
  f.lora_A = on.matrix("lora_A", lora_A, f.R, K);
  f.lora_B = on.matrix("lora_B", lora_B, N, f.R);
  if (bias.has_value()) f.bias = on.operand("bias", *bias, N);
  if (out_scale.has_value()) f.out_scale = on.required<float>("out_scale", out_scale, ScalarType::Float, N);
  f.dropout = on.dropout(dropout_mask, f.M, K, dropout_p);
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
    bool needs_bias, bool needs_out_scale, Text level) {
  Backward b{};
  b.weight = on.weight(WEIGHT_ARGUMENTS);
  const int64_t N = b.weight.N, K = b.weight.K;
  b.M = rows_of("x", x);
  b.R = rows_of("lora_A", lora_A);
  b.grad = on.matrix("grad", grad, b.M, N);
  b.x = on.matrix("x", x, b.M, K);
  b.lora_A = on.matrix("lora_A", lora_A, b.R, K);
  b.lora_B = on.matrix("lora_B", lora_B, N, b.R);
  b.z = on.float_matrix("z", z, b.M, b.R);
  if (out_scale.has_value()) b.out_scale = on.required<float>("out_scale", out_scale, ScalarType::Float, N);
  if (needs_out_scale) {
    STD_TORCH_CHECK(out_scale.has_value(), "out_scale: expected a tensor, got None");
    STD_TORCH_CHECK(y.has_value(), "y: expected a tensor, got None");
    b.y = on.matrix("y", *y, b.M, N);
    if (bias.has_value()) b.bias = on.operand("bias", *bias, N);
  }
  b.dropout = on.dropout(dropout_mask, b.M, K, dropout_p);
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

Tensor dequantize(WEIGHT_PARAMETERS, ScalarType dtype, Text level) {
  const Weight w = on.weight(WEIGHT_ARGUMENTS);
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
