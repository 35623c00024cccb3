// SPDX-License-Identifier: MIT
// How a plan cuts the axes of a map; the same on both devices.
#pragma once

#include <cstdint>

#include "ops/contrastive.h"

namespace protokernels {

struct ContrastiveAxis {
  int64_t kept, edge, blocks;  // places on the grid that take part, places in a block, blocks
};

inline ContrastiveAxis contrastive_axis(const ContrastivePlan& p, int axis) {
  const int64_t grid = (p.size[axis] + p.stride[axis] - 1) / p.stride[axis];
  if (p.block[axis] == 0) return {grid, grid > 1 ? grid : 1, grid > 0 ? 1 : 0};
  const int64_t places = p.block[axis] / p.stride[axis], edge = places > 1 ? places : 1;
  if (p.drop_remainder) return {grid / edge * edge, edge, grid / edge};
  return {grid, edge, (grid + edge - 1) / edge};
}

inline void contrastive_plan_sizes(ContrastivePlan& p) {
  p.R = p.N, p.G = p.per_image ? p.N : 1;
  for (int a = 0; a < 3; ++a) {
    const ContrastiveAxis axis = contrastive_axis(p, a);
    p.R *= axis.kept, p.G *= axis.blocks;
  }
}

}  // namespace protokernels
