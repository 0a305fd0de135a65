// CUDA on a CPU, for the tests: runs the kernels of csrc/cuda as they are, a block at a time and its threads
// in turns, each on a stack of its own.
//
// A thread runs until it meets a barrier or exchanges with its warp, so what needs no barrier needs none in
// any order: PEFT_FAST_EMULATED_ORDER=descending runs threads and blocks from the last to the first, and
// results that differ are a race. Shared memory is filled with NaN before each block. A thread that ends
// while others wait at a barrier, a warp that meets in different places and a misaligned load or store are
// errors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __launch_bounds__(...)

using std::fmaf;

using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};

inline Index threadIdx, blockIdx;

namespace emulated {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 64 << 10, kSharedBytes = 48 << 10;

// Saves the registers of the caller on its stack, whose end goes to *from, and goes on where `to` was saved.
extern "C" void peft_fast_emulated_switch(void** from, void* to);
asm(R"(
.text
.weak peft_fast_emulated_switch
.type peft_fast_emulated_switch, @function
peft_fast_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

enum class State { kReady, kAtBarrier, kInExchange, kEnded };

struct Thread {
  void* stack_pointer = nullptr;
  State state = State::kEnded;
  int meetings = 0;  // exchanges so far; those of a warp must agree
  std::vector<char> stack;
};

struct Machine {
  std::mutex one_launch;
  std::vector<Thread> threads{kMostThreads};
  void* scheduler = nullptr;
  unsigned current = 0;
  const std::function<void()>* kernel = nullptr;
  float slots[2][kMostThreads][6];  // what the lanes of a warp give each other, by turns
  alignas(1024) unsigned char shared[kSharedBytes];
};

inline Machine machine;

inline void leave(State state) {
  Thread& thread = machine.threads[machine.current];
  thread.state = state;
  peft_fast_emulated_switch(&thread.stack_pointer, machine.scheduler);
}

inline void begin() {
  (*machine.kernel)();
  leave(State::kEnded);
}

inline void prepare(Thread& thread) {
  thread.stack.resize(kStack);
  const auto end = reinterpret_cast<uintptr_t>(thread.stack.data() + kStack) & ~uintptr_t{15};
  void** const top = reinterpret_cast<void**>(end) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(&begin);  // where the first switch returns to, above six registers
  thread.stack_pointer = top;
  thread.state = State::kReady;
  thread.meetings = 0;
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated CUDA: block " + std::to_string(blockIdx.x) + ": " + what);
}

// Lets the warp or, with all of the threads at a barrier, the block go on; whether anything could.
inline bool release(unsigned threads) {
  bool any = false;
  unsigned at_barrier = 0, ended = 0;
  for (unsigned first = 0; first < threads; first += kWarp) {
    unsigned meeting = 0;
    for (unsigned i = first; i < first + kWarp; ++i) {
      const Thread& t = machine.threads[i];
      meeting += t.state == State::kInExchange;
      at_barrier += t.state == State::kAtBarrier;
      ended += t.state == State::kEnded;
      if (t.state == State::kInExchange && t.meetings != machine.threads[first].meetings) {
        fail("lanes of a warp exchange in different places");
      }
    }
    if (meeting == 0) continue;
    if (meeting < kWarp) fail("lanes of a warp are missing in an exchange");
    for (unsigned i = first; i < first + kWarp; ++i) machine.threads[i].state = State::kReady;
    any = true;
  }
  if (at_barrier == 0 || any) return any;
  if (ended > 0) fail("threads ended while others wait at a barrier");
  for (unsigned i = 0; i < threads; ++i) machine.threads[i].state = State::kReady;
  return true;
}

inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  if (threads == 0 || threads > kMostThreads || threads % kWarp != 0) fail("such a block is not emulated");
  const char* const order = std::getenv("PEFT_FAST_EMULATED_ORDER");
  const bool descending = order != nullptr && std::strcmp(order, "descending") == 0;
  machine.kernel = &kernel;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = descending ? blocks - 1 - b : b;
    std::memset(machine.shared, 0xFF, kSharedBytes);
    for (unsigned i = 0; i < threads; ++i) prepare(machine.threads[i]);
    do {
      for (unsigned i = 0; i < threads; ++i) {
        machine.current = descending ? threads - 1 - i : i;
        threadIdx.x = machine.current;
        Thread& thread = machine.threads[machine.current];
        if (thread.state == State::kReady)
          peft_fast_emulated_switch(&machine.scheduler, thread.stack_pointer);
      }
    } while (release(threads));
  }
}

// The shared memory of a kernel, which asks for it once.
template <class T>
T& shared() {
  static_assert(sizeof(T) <= kSharedBytes, "more shared memory than a block may have without asking");
  return *reinterpret_cast<T*>(machine.shared);
}

// Gives `count` values to the other lanes and waits for theirs: [lane][6]. They stand until the next but one.
inline const float (*meet(const float* values, int count))[6] {
  Thread& thread = machine.threads[machine.current];
  const int turn = thread.meetings++ % 2;
  for (int i = 0; i < count; ++i) machine.slots[turn][machine.current][i] = values[i];
  const unsigned first = machine.current / kWarp * kWarp;
  leave(State::kInExchange);
  return machine.slots[turn] + first;
}

inline float exchange(float value, int lane) {
  return meet(&value, 1)[lane % kWarp][0];
}

inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const float mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const float (*const lanes)[6] = meet(mine, 6);
  const int g = machine.current % kWarp / 4, t = machine.current % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 8; ++k) {
      const float left = lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
      const float right = lanes[column * 4 + k % 4][4 + k / 4];
      c[i] += left * right;
    }
  }
}

inline float round_to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, value) + 0x1000u) & 0xFFFFE000u);
}

inline float half_to_float(uint16_t h) {
  return static_cast<float>(__builtin_bit_cast(_Float16, h));
}

inline uint16_t float_to_half(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated

inline void __syncthreads() {
  emulated::leave(emulated::State::kAtBarrier);
}
