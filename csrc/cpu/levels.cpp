// Which levels this CPU has.
#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace peft_fast {

bool level_available(const std::string& level) {
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

}  // namespace peft_fast
