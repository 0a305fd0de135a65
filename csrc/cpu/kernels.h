// The kernels of every level, and what they share.
#pragma once

#include <string>

#include "lora_linear.h"
#include "loreft.h"

namespace peft_fast {

// One instruction-set level. The same bits come out for any number of threads.
struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*dequantize)(const Weight&, Result out);  // out [N, K], each value rounded once
  void (*loreft)(const Loreft&);
  void (*loreft_backward)(const LoreftBackward&);
};

namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace scalar {
extern const Kernels kernels;
}

bool level_available(const std::string& level);
// The kernels of a level; "" is the best one of this CPU.
const Kernels& kernels(const std::string& level);

// Scratch of the calling thread, 64-byte aligned, reused from call to call and grown as needed; its contents
// are lost at the next request. `shared_scratch` is for what the caller prepares for all workers,
// `local_scratch` for one work item.
float* shared_scratch(int64_t floats);
float* local_scratch(int64_t floats);

// Packs keep [M, K] (nonzero keeps) into mask [M, ceil(K / 8)], least significant bit first.
void pack_bits(const uint8_t* keep, int64_t M, int64_t K, uint8_t* mask);

}  // namespace peft_fast
