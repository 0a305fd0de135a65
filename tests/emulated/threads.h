// torch's parallel_for on threads that the thread sanitizer sees: it knows nothing of OpenMP's, and would
// report whatever one worker leaves to another. Included before everything else by `make tsan`.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace torch::stable {

// Every call takes four threads where there are as many items, whatever the grain: races need company.
template <class F>
void emulated_parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t count = std::min<int64_t>(4, end - begin);
  std::vector<std::thread> workers;
  for (int64_t i = 0; i < count; ++i)
    workers.emplace_back(
        [=, &f] { f(begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count); });
  for (std::thread& worker : workers) worker.join();
}

}  // namespace torch::stable

#define parallel_for emulated_parallel_for
