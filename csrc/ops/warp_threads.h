// SPDX-License-Identifier: MIT
// Planes of a warp over threads.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/torch_utils.h"

namespace protokernels {
namespace {

constexpr int64_t SERIAL_PIXELS = 12000;  // about 60 microseconds: below it a second thread costs more than it brings

// Runs function(first, last, scratch) over the planes, a few at a time as threads get free; scratch is the thread's.
template <class Function>
void for_planes(int64_t planes, int64_t pixels, int64_t scratch_bytes, const Tensor& like, const Function& function) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = planes * pixels < SERIAL_PIXELS ? 1 : std::clamp<int64_t>(threads, 1, planes);
  const Tensor scratch = empty_beside(like, {workers * scratch_bytes}, ScalarType::Byte);
  char* const memory = static_cast<char*>(scratch.data_ptr());
  if (workers == 1) return function(int64_t{0}, planes, static_cast<void*>(memory));
  const int64_t grain = std::max<int64_t>(1, std::min(planes / (4 * workers), 8 * SERIAL_PIXELS / pixels));
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t first = next.fetch_add(grain); first < planes; first = next.fetch_add(grain))
        function(first, std::min(planes, first + grain), static_cast<void*>(memory + worker * scratch_bytes));
  });
}

}  // namespace
}  // namespace protokernels
