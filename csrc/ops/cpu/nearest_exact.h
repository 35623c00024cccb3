// SPDX-License-Identifier: MIT
// Nearest on the CPU: distances as ops/nearest.h defines them, and ranking by them. Compiled without contraction to fused multiply-adds.
#pragma once

#include "common/cpu_level.h"
#include "ops/nearest.h"

namespace {

// The order of neighbours: by distance, NaN last, equal ones by index. A type of this file, so that what the library makes of it stays here.
struct Nearer {
  bool operator()(const protokernels::NearestCandidate& x, const protokernels::NearestCandidate& y) const {
    const bool x_nan = x.distance != x.distance, y_nan = y.distance != y.distance;
    if (x_nan || y_nan) return x_nan == y_nan ? x.index < y.index : y_nan;
    return x.distance != y.distance ? x.distance < y.distance : x.index < y.index;
  }
};

constexpr protokernels::NearestCandidate NO_CANDIDATE = {__builtin_nan(""), INT64_MAX};  // behind every row

}  // namespace

namespace protokernels {

struct NearestExact {
  int64_t (*workspace_bytes)(const NearestProblem&);
  // Fills in the distances of found[count], each from its own query, by their indices.
  void (*measure)(const NearestProblem&, const int64_t* queries, NearestCandidate* found, int64_t count, void* workspace);
  // The same for one query, and sorts the nearest k to the front.
  void (*rank)(const NearestProblem&, int64_t query, NearestCandidate* found, int64_t count, void* workspace);
  // The nearest k of rows [first, last), in order; NO_CANDIDATE where there are fewer.
  void (*rank_all)(const NearestProblem&, int64_t query, int64_t first, int64_t last, NearestCandidate* nearest, void* workspace);
};
extern const NearestExact PK_LEVEL_TABLE(nearest_exact);

}  // namespace protokernels
