// The ops of the CUDA kernels: lora_linear and its backward for few tokens, and dequantize. Every check
// before memory is touched, the device guard, the stream, and what a launch reports.
#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"

#ifdef PEFT_FAST_EMULATED
using cudaStream_t = void*;
#else
#include <dlfcn.h>

using cudaStream_t = struct CUstream_st*;  // as cuda_runtime.h has it
// Of the runtime that is linked in, which is not torch's.
extern "C" int cudaDriverGetVersion(int* version);
extern "C" int cudaRuntimeGetVersion(int* version);
#endif

#include "launchers.h"

namespace peft_fast::cuda {
namespace {

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "a CUDA kernel did not start: ", error);
}

#ifdef PEFT_FAST_EMULATED
std::string missing() {
  return "";
}

cudaStream_t current_stream(int32_t) {
  return nullptr;
}
#else
// torch's function for the current stream of a device; null beside a torch without CUDA. It is looked up in
// the library that has it: this one is loaded beside either torch, so it depends on the CPU's alone, and the
// dynamic linker searches no other for it.
auto stream_function() {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto found = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  return found;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why no kernel of this library can start here, apart from the GPU itself; empty when one can.
std::string missing() {
  if (stream_function() == nullptr) return "needs a torch with CUDA, which this one is not";
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 >= runtime / 1000) return "";
  return "was built with CUDA " + version_text(runtime) + ", the driver runs " +
         (driver > 0 ? "up to " + version_text(driver) : "none");
}

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(stream_function() != nullptr, missing());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(stream_function()(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// The device of a call is the current one for as long as this lives.
class Guard {
 public:
#ifdef PEFT_FAST_EMULATED
  explicit Guard(const Arguments&) {}
#else
  explicit Guard(const Arguments& on) : guard_(on.device()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

int64_t few_rows(const Tensor& x) {
  const int64_t M = rows_of("x", x);
  STD_TORCH_CHECK(M <= kMostRows, "x: expected up to ", kMostRows, " rows, got ", M);
  return M;
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, WEIGHT_PARAMETERS, std::optional<Tensor> bias, Tensor lora_A,
                                       Tensor lora_B, std::optional<Tensor> dropout_mask,
                                       std::optional<Tensor> out_scale, double scaling, double dropout_p) {
  const Arguments on = arguments_beside("x", x);
  const Guard guard(on);
  Forward f{};
  f.weight = packed_weight(on, WEIGHT_ARGUMENTS);
  const int64_t N = f.weight.N, K = f.weight.K;
  f.M = few_rows(x);
  f.R = rows_of("lora_A", lora_A);
  f.x = on.matrix("x", x, f.M, K);
  f.lora_A = on.matrix("lora_A", lora_A, f.R, K);
  f.lora_B = on.matrix("lora_B", lora_B, N, f.R);
  if (bias.has_value()) f.bias = on.operand("bias", *bias, N);
  if (out_scale.has_value()) f.out_scale = on.data<float>("out_scale", *out_scale, ScalarType::Float, N);
  f.dropout = on.dropout(dropout_mask, f.M, K, dropout_p);
  f.scaling = static_cast<float>(scaling);
  Tensor y = torch::stable::new_empty(x, {f.M, N});
  Tensor z = torch::stable::new_empty(x, {f.M, f.R}, ScalarType::Float);
  f.y = {y.mutable_data_ptr(), f.x.dtype};
  f.z = static_cast<float*>(z.mutable_data_ptr());
  check_launch(forward(f, current_stream(on.device())));
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor grad, Tensor x, WEIGHT_PARAMETERS, Tensor lora_A, Tensor lora_B, Tensor z,
    std::optional<Tensor> dropout_mask, std::optional<Tensor> out_scale, std::optional<Tensor> bias,
    std::optional<Tensor> y, double scaling, double dropout_p, bool needs_x, bool needs_A, bool needs_B,
    bool needs_bias, bool needs_out_scale) {
  const Arguments on = arguments_beside("x", x);
  const Guard guard(on);
  Backward b{};
  b.weight = packed_weight(on, WEIGHT_ARGUMENTS);
  const int64_t N = b.weight.N, K = b.weight.K;
  b.M = few_rows(x);
  b.R = rows_of("lora_A", lora_A);
  b.x = on.matrix("x", x, b.M, K);
  b.grad = on.matrix_of("grad", grad, x.scalar_type(), b.M, N);
  b.lora_A = on.matrix("lora_A", lora_A, b.R, K);
  b.lora_B = on.matrix("lora_B", lora_B, N, b.R);
  b.z = static_cast<const float*>(on.matrix_of("z", z, ScalarType::Float, b.M, b.R).data);
  if (out_scale.has_value()) b.out_scale = on.data<float>("out_scale", *out_scale, ScalarType::Float, N);
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
  Partials sums = partials(b);
  Tensor dx_sums = torch::stable::new_empty(z, {sums.splits, b.M, K});
  Tensor dz_sums = torch::stable::new_empty(z, {sums.chunks, b.M, b.R});
  sums.dx = static_cast<float*>(dx_sums.mutable_data_ptr());
  if (needs_dz(b)) sums.d_z = static_cast<float*>(dz_sums.mutable_data_ptr());
  check_launch(backward(b, sums, current_stream(on.device())));
  return {dx, d_A, d_B, dbias, d_out_scale};
}

Tensor write_weight(WEIGHT_PARAMETERS, std::optional<Tensor> lora_A, std::optional<Tensor> lora_B,
                    std::optional<Tensor> out_scale, double scaling, Tensor out) {
  const Arguments on = arguments_beside("weight", weight);
  const Guard guard(on);
  Write w{};
  w.weight = packed_weight(on, WEIGHT_ARGUMENTS);
  const int64_t N = w.weight.N, K = w.weight.K;
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(),
                  "lora_A, lora_B: expected both or neither, got one of them");
  if (lora_A.has_value()) {
    w.R = rows_of("lora_A", *lora_A);
    w.lora_A = on.matrix("lora_A", *lora_A, w.R, K);
    w.lora_B = on.matrix("lora_B", *lora_B, N, w.R);
  }
  if (out_scale.has_value()) w.out_scale = on.data<float>("out_scale", *out_scale, ScalarType::Float, N);
  w.scaling = static_cast<float>(scaling);
  w.out.dtype = on.matrix("out", out, N, K).dtype;
  w.out.data = out.mutable_data_ptr();
  check_launch(write(w, current_stream(on.device())));
  return out;
}

// The architectures that were compiled for, such as "80 90a 120".
std::string architectures() {
  return PEFT_FAST_CUDA_ARCHITECTURES;
}

STABLE_TORCH_LIBRARY(PEFT_FAST_CUDA_NAMESPACE, m) {
  m.def(
      "lora_linear(Tensor x, " WEIGHT_SCHEMA
      ", Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? dropout_mask, Tensor? out_scale, float scaling, "
      "float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor grad, Tensor x, " WEIGHT_SCHEMA
      ", Tensor lora_A, Tensor lora_B, Tensor z, Tensor? dropout_mask, Tensor? out_scale, Tensor? bias, "
      "Tensor? y, float scaling, float dropout_p, bool needs_x, bool needs_A, bool needs_B, bool needs_bias, "
      "bool needs_out_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("write(" WEIGHT_SCHEMA
        ", Tensor? lora_A, Tensor? lora_B, Tensor? out_scale, float scaling, Tensor(a!) out) -> Tensor(a!)");
  m.def("architectures() -> str");
  m.def("missing() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(PEFT_FAST_CUDA_NAMESPACE, PEFT_FAST_CUDA_KEY, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("write", TORCH_BOX(&write_weight));
}

STABLE_TORCH_LIBRARY_IMPL(PEFT_FAST_CUDA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("missing", TORCH_BOX(&missing));
}

}  // namespace
}  // namespace peft_fast::cuda
