// loreft and its backward: schemas, and every check before memory is touched.
#include <tuple>

#include "arguments.h"

#define EDIT_PARAMETERS \
  std::optional<Tensor> rows, Tensor projection, std::optional<Tensor> bias, Tensor basis
#define EDIT_SCHEMA "Tensor? rows, Tensor projection, Tensor? bias, Tensor basis"
#define DROPOUT_PARAMETERS std::optional<Tensor> dropout_mask, double dropout_p, bool drop_state, Text act
#define DROPOUT_SCHEMA "Tensor? dropout_mask, float dropout_p, bool drop_state, str act"

namespace peft_fast {
namespace {

const Arguments on = Arguments::on_cpu();

Activation activation(const std::string& name) {
  if (name == "linear") return Activation::kLinear;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "silu") return Activation::kSilu;
  if (name == "sigmoid") return Activation::kSigmoid;
  STD_TORCH_CHECK(false, "act: expected linear, relu, gelu, tanh, silu or sigmoid, got ", name);
}

// The edit of a matrix [M, d] of this shape.
Edit make_edit(int64_t M, int64_t d, EDIT_PARAMETERS, DROPOUT_PARAMETERS) {
  Edit e{};
  e.M = e.m = M;
  e.d = d;
  e.q = rows_of("projection", projection);
  e.r = rows_of("basis", basis);
  STD_TORCH_CHECK(e.q == 0 || e.q == e.r || e.q == 2 * e.r, "projection: expected 0, ", e.r, " or ", 2 * e.r,
                  " rows, got ", e.q);
  e.projection = on.float_matrix("projection", projection, e.q, d);
  e.basis = on.float_matrix("basis", basis, e.r, d);
  if (bias.has_value() || (e.q == 0 && e.r > 0))
    e.bias = on.required<float>("bias", bias, ScalarType::Float, e.r);
  e.whole = !rows.has_value();
  if (!e.whole) {
    e.m = rows->numel();
    e.rows = on.required<int64_t>("rows", rows, ScalarType::Long, e.m);
    for (int64_t i = 0; i < e.m; ++i)
      STD_TORCH_CHECK(e.rows[i] < M, "rows: expected indices below ", M, ", got ", e.rows[i]);
  }
  e.dropout = on.dropout(dropout_mask, e.m, d, dropout_p);
  e.drop_state = drop_state;
  e.act = activation(act);
  return e;
}

std::tuple<Tensor, Tensor, Tensor> loreft(Tensor h, std::optional<Tensor> residual, EDIT_PARAMETERS,
                                          DROPOUT_PARAMETERS, Text level) {
  Loreft f{};
  const int64_t M = rows_of("h", h), d = h.size(1);
  f.h = on.matrix("h", h, M, d);
  if (residual.has_value()) f.residual = on.matrix_of("residual", *residual, h.scalar_type(), M, d);
  f.edit = make_edit(M, d, rows, projection, bias, basis, dropout_mask, dropout_p, drop_state, act);
  const bool keeps = rows.has_value() || residual.has_value();
  Tensor out = torch::stable::new_empty(h, {M, d});
  Tensor z = torch::stable::new_empty(h, {f.edit.m, f.edit.q}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(h, {keeps ? f.edit.m : 0, d});
  f.out = {out.mutable_data_ptr(), f.h.dtype};
  f.z = static_cast<float*>(z.mutable_data_ptr());
  if (keeps) f.kept = {kept.mutable_data_ptr(), f.h.dtype};
  kernels(level).loreft(f);
  return {out, z, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loreft_backward(Tensor grad, Tensor kept, EDIT_PARAMETERS,
                                                           Tensor z, DROPOUT_PARAMETERS, bool needs_h,
                                                           bool needs_projection, bool needs_bias,
                                                           bool needs_basis, Text level) {
  LoreftBackward b{};
  const int64_t M = rows_of("grad", grad), d = grad.size(1);
  b.grad = on.matrix("grad", grad, M, d);
  b.edit = make_edit(M, d, rows, projection, bias, basis, dropout_mask, dropout_p, drop_state, act);
  const Edit& e = b.edit;
  b.kept = on.matrix_of("kept", kept, grad.scalar_type(), e.m, d);
  b.z = on.float_matrix("z", z, e.m, e.q);
  Result d_projection{}, d_bias{}, d_basis{};
  Tensor dh = gradient(needs_h, grad, b.dh);
  Tensor projection_grad = gradient(needs_projection, projection, d_projection);
  Tensor basis_grad = gradient(needs_basis, basis, d_basis);
  Tensor bias_grad = torch::stable::new_empty(basis, {needs_bias ? e.r : 0});
  if (needs_bias) d_bias.data = bias_grad.mutable_data_ptr();
  b.d_projection = static_cast<float*>(d_projection.data);
  b.d_bias = static_cast<float*>(d_bias.data);
  b.d_basis = static_cast<float*>(d_basis.data);
  kernels(level).loreft_backward(b);
  return {dh, projection_grad, bias_grad, basis_grad};
}

STABLE_TORCH_LIBRARY_FRAGMENT(peft_fast_cpu, m) {
  m.def("loreft(Tensor h, Tensor? residual, " EDIT_SCHEMA ", " DROPOUT_SCHEMA
        ", str level) -> (Tensor, Tensor, Tensor)");
  m.def("loreft_backward(Tensor grad, Tensor kept, " EDIT_SCHEMA ", Tensor z, " DROPOUT_SCHEMA
        ", bool needs_h, bool needs_projection, bool needs_bias, bool needs_basis, str level) -> (Tensor, "
        "Tensor, "
        "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CPU, m) {
  m.impl("loreft", TORCH_BOX(&loreft));
  m.impl("loreft_backward", TORCH_BOX(&loreft_backward));
}

}  // namespace
}  // namespace peft_fast
