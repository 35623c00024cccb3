// SPDX-License-Identifier: MIT
// Work on torch's threads: parallel_for(begin, end, grain, body) runs body(first, last) over parts of [begin, end) of at least grain.
//
// ThreadSanitizer cannot see how torch's threads wait for each other and would take every result for a race. Under it there are threads of
// our own, made and joined in every call.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__SANITIZE_THREAD__)
#include <algorithm>
#include <thread>
#include <vector>
#endif

namespace protokernels {

#if defined(__SANITIZE_THREAD__)
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t parts = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, torch::stable::get_num_threads());
  const int64_t step = (end - begin + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t first = begin + step; first < end; first += step)
    threads.emplace_back([&body, first, last = std::min(end, first + step)] { body(first, last); });
  if (begin < end) body(begin, std::min(end, begin + step));
  for (std::thread& thread : threads) thread.join();
}
#else
using torch::stable::parallel_for;
#endif

}  // namespace protokernels
