// The library peft_fast_cpu, and its ops that are no kernels; the others are in the file of their name.
#include "arguments.h"

namespace peft_fast {
namespace {

Tensor pack_mask(Tensor keep) {
  const ScalarType dtype = keep.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte, "keep: expected Bool or Byte, got ",
                  dtype);
  const int64_t M = rows_of("keep", keep), K = keep.size(1);
  Arguments::on_cpu().check("keep", keep, dtype, M * K);
  Tensor mask = torch::stable::new_empty(keep, {M, (K + 7) / 8}, ScalarType::Byte);
  pack_bits(static_cast<const uint8_t*>(keep.const_data_ptr()), M, K,
            static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return mask;
}

bool has_level(Text level) {
  return level_available(level);
}

STABLE_TORCH_LIBRARY(peft_fast_cpu, m) {
  m.def("pack_mask(Tensor keep) -> Tensor");
  m.def("level_available(str level) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("level_available", TORCH_BOX(&has_level));
}

}  // namespace
}  // namespace peft_fast
