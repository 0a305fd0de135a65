// The kernels for AVX2, FMA and F16C. The target is set after the shared headers, so that no function
// that other files may link against is compiled for it.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

#define PEFT_FAST_LEVEL avx2
#define PEFT_FAST_LEVEL_ID Level::kAvx2
#include "simd_avx2.h"
#include "backward.h"
#include "loreft_kernels.h"

namespace peft_fast::avx2 {
const Kernels kernels{forward, backward, dequantize, loreft, loreft_backward};
}
#endif
