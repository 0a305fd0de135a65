// How the launchers start a kernel.
#pragma once

#include <type_traits>

#include "device.h"
#include "launchers.h"

namespace peft_fast::cuda {

// Starts a kernel on the current device; null, or what went wrong. No blocks are no launch.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more blocks than a grid holds";
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static_cast<void>(stream);
  emulated::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
  return nullptr;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Calls f with D as a compile-time constant.
template <class F>
const char* with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(std::integral_constant<DType, DType::kFloat32>());
  if (dtype == DType::kFloat16) return f(std::integral_constant<DType, DType::kFloat16>());
  return f(std::integral_constant<DType, DType::kBFloat16>());
}

// Calls f with 1 or kMostRows as a compile-time constant: one token needs fewer registers, and further ones
// are skipped at run time.
template <class F>
const char* with_rows(int64_t M, F f) {
  if (M == 1) return f(std::integral_constant<int, 1>());
  return f(std::integral_constant<int, kMostRows>());
}

}  // namespace peft_fast::cuda
