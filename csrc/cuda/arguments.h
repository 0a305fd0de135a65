// The ops on a GPU take arguments as those on the CPU do, see ../arguments.h. The tests compile their source
// for the CPU, as ops of another namespace.
#pragma once

#include "../arguments.h"

#ifdef PEFT_FAST_EMULATED
#define PEFT_FAST_CUDA_NAMESPACE peft_fast_cuda_emulated
#define PEFT_FAST_CUDA_KEY CPU
#else
#define PEFT_FAST_CUDA_NAMESPACE peft_fast_cuda
#define PEFT_FAST_CUDA_KEY CUDA
#endif

namespace peft_fast::cuda {

inline Arguments arguments_beside([[maybe_unused]] const char* name, [[maybe_unused]] const Tensor& first) {
#ifdef PEFT_FAST_EMULATED
  return Arguments::on_cpu();
#else
  STD_TORCH_CHECK(first.is_cuda(), name, ": expected a cuda tensor, got another device");
  return Arguments::on_gpu_of(first);
#endif
}

// A weight that is packed in 4 bits.
inline Weight packed_weight(const Arguments& on, WEIGHT_PARAMETERS) {
  STD_TORCH_CHECK(format == "nf4" || format == "fp4", "format: expected nf4 or fp4, got ", format);
  return on.weight(WEIGHT_ARGUMENTS);
}

}  // namespace peft_fast::cuda
