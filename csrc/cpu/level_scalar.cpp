// The kernels for the baseline instruction set.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

#define PEFT_FAST_LEVEL scalar
#define PEFT_FAST_LEVEL_ID Level::kScalar
#include "simd_scalar.h"
#include "backward.h"
#include "loreft_kernels.h"

namespace peft_fast::scalar {
const Kernels kernels{forward, backward, dequantize, loreft, loreft_backward};
}
