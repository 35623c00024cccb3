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
  bool ordinary = true;  // then these four do not count

  void merge(const Report& other) {
    error += other.error, transport += other.transport, value += other.value, mass += other.mass;
    smallest_sum = std::min(smallest_sum, other.smallest_sum), largest_sum = std::max(largest_sum, other.largest_sum);
    smallest_scale = std::min(smallest_scale, other.smallest_scale), largest_scale = std::max(largest_scale, other.largest_scale);
    ordinary &= other.ordinary;
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

// Of sums and scales that have mass.
template <class T>
Report<T> extremes_of(const T* sums, const T* scales, const T* active, int64_t count) {
  const Vec<T> none{};
  Extremes<T> of_sums, of_scales;
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const Index<T> counts = load(active + i) != none;
    of_sums.meet(load(sums + i), counts), of_scales.meet(load(scales + i), counts);
  }
  Report<T> report;
  report.ordinary = false;
  report.smallest_sum = reduce_min(of_sums.least), report.largest_sum = reduce_max(of_sums.largest);
  report.smallest_scale = reduce_min(of_scales.least), report.largest_scale = reduce_max(of_scales.largest);
  return report;
}

template <class T>
PK_INLINE Vec<T> lesser(Vec<T> x, Vec<T> least) {  // least where x is NaN, as a comparison has it
  if constexpr (sizeof(T) == 4) return at_most(least, x);
  return x < least ? x : least;
}
template <class T>
PK_INLINE Vec<T> greater(Vec<T> x, Vec<T> largest) {
  if constexpr (sizeof(T) == 4) return at_least(largest, x);
  return x > largest ? x : largest;
}

// Whether a half-step is ordinary, as nearly all are: scales in range, and sums to be trusted whatever factors in range they were made of. That takes
// no sums over lanes, which cost as much as four rows.
template <class T>
class Ordinary {
 public:
  PK_MEMBER void meet(Vec<T> sum, Vec<T> scale, Index<T> counts) {
    const Vec<T> one = broadcast(T(1)), x = counts ? sum : one, y = counts ? scale : one;
    least_sum_ = lesser<T>(x, least_sum_), largest_sum_ = greater<T>(x, largest_sum_);
    least_scale_ = lesser<T>(y, least_scale_), largest_scale_ = greater<T>(y, largest_scale_);
  }
  PK_MEMBER bool is_so() const {
    const Index<T> sums = (least_sum_ < TRUSTED_SUM<T> * LARGE_SCALE<T>) | (largest_sum_ > LARGEST_SUM<T>);
    const Index<T> scales = (least_scale_ < 1 / LARGE_SCALE<T>) | (largest_scale_ > LARGE_SCALE<T>);
    return !any_lane(sums | scales);
  }

 private:
  Vec<T> least_sum_ = broadcast(T(1)), largest_sum_ = least_sum_, least_scale_ = least_sum_, largest_scale_ = least_sum_;
};

}  // namespace
