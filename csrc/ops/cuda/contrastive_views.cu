// SPDX-License-Identifier: MIT
// Which vectors meet which where two views are stacked: the plans that need no sorting. What is written stands in ops/contrastive.h.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) views_kernel(const ContrastiveViews p) {
  const int row = static_cast<int>(blockIdx.x) * THREADS + threadIdx.x, count = static_cast<int>(p.count);
  if (row == 0) {
    for (int g = 0; g < (p.crossing ? 2 : 1); ++g) {
      const auto side = [&](int* numbers, int view) {
        const int first = p.crossing ? view * count : 0, end = p.crossing ? first + count : 2 * count;
        numbers[0] = first, numbers[1] = view == 0 || p.symmetric ? end : first, numbers[2] = end;
      };
      side(&p.groups[g].row_begin, g);
      side(&p.groups[g].column_begin, p.crossing ? 1 - g : 0);
    }
  }
  if (row >= 2 * count) return;
  p.order[row] = p.crossing ? row : row % 2 * static_cast<int64_t>(count) + row / 2;
  const int begin = p.crossing ? (row < count ? row + count : row - count) : row / 2 * 2;
  ContrastiveRange& range = p.ranges[row];
  range.class_begin = begin, range.class_end = begin + (p.crossing ? 1 : 2), range.self = row;
  const int anchors = p.crossing && !p.symmetric ? count : 2 * count;
  p.weights[row] = row < anchors ? 1.0 / anchors : 0.0;
}

}  // namespace

namespace protokernels {

int launch_contrastive_views(const ContrastiveViews& p, void* stream) {
  return PK_LAUNCH(views_kernel, dim3(static_cast<unsigned>(2 * p.count / THREADS + 1)), dim3(THREADS), 0, stream, p);
}

}  // namespace protokernels
