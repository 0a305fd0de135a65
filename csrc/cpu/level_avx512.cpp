// The kernels for AVX-512. The target is set after the shared headers, so that no function
// that other files may link against is compiled for it.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define PEFT_FAST_LEVEL avx512
#define PEFT_FAST_LEVEL_ID Level::kAvx512
#include "simd_avx512.h"
#include "backward.h"
#include "loreft_kernels.h"

namespace peft_fast::avx512 {
const Kernels kernels{forward, backward, dequantize, loreft, loreft_backward};
}
#endif
