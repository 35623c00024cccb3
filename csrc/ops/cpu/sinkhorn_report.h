// SPDX-License-Identifier: MIT
// What a half-step of Sinkhorn tells about its sums and scales: whether they can be trusted, and whether they are to be absorbed.
#pragma once

#include "ops/cpu/sinkhorn_dense.h"

namespace {

// What one chunk of rows, or the columns, report of a half-step or of the result.
template <class T>
struct Report {
  double error = 0, transport = 0, value = 0, mass = 0;
  T smallest_sum = INFINITE<T>, largest_sum = 0, smallest_scale = INFINITE<T>, largest_scale = 0;

  void merge(const Report& other) {
    error += other.error, transport += other.transport, value += other.value, mass += other.mass;
    smallest_sum = std::min(smallest_sum, other.smallest_sum), largest_sum = std::max(largest_sum, other.largest_sum);
    smallest_scale = std::min(smallest_scale, other.smallest_scale), largest_scale = std::max(largest_scale, other.largest_scale);
  }
  // No sum so small that what was flushed to zero could have mattered, be it an element of K (1 stands for its factor) or a product; no sum
  // or scale near the ends of the type's range. A sum of nothing is none: there may be no factors at all.
  bool trusted(T largest_factor) const {
    const bool sums = !(smallest_sum < TRUSTED_SUM<T> * std::max(largest_factor, T(1))) && !(largest_sum > LARGEST_SUM<T>);
    return smallest_sum != T(0) && sums && !(smallest_scale < 1 / LARGEST_SUM<T>) && !(largest_scale > LARGEST_SUM<T>);
  }
  bool in_range() const { return !(largest_scale > LARGE_SCALE<T>) && !(smallest_scale < 1 / LARGE_SCALE<T>); }
};

// The least and the largest of many vectors, lane by lane.
template <class T>
struct Extremes {
  Vec<T> least = broadcast(INFINITE<T>), largest{};

  PK_MEMBER void meet(Vec<T> x, Index<T> counts) {
    least = counts & (x < least) ? x : least;
    largest = counts & (x > largest) ? x : largest;
  }
};

template <class T>
PK_INLINE Report<T> report_of(const Extremes<T>& sums, const Extremes<T>& scales) {
  return {0, 0, 0, 0, reduce_min(sums.least), reduce_max(sums.largest), reduce_min(scales.least), reduce_max(scales.largest)};
}

}  // namespace
