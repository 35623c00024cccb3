// SPDX-License-Identifier: MIT
// What the kernels of contrastive do with rows: which rows and which group a block has, the loss from the statistics of a row, the total.
#pragma once

#include "common/arithmetic.cuh"
#include "common/pieces.h"
#include "common/simt.cuh"
#include "ops/cuda/contrastive_launch.h"

namespace {

using namespace protokernels;

__device__ __forceinline__ float log_of_one_and(float x) { return log1pf(x); }
__device__ __forceinline__ double log_of_one_and(double x) { return log1p(x); }

// The sum over the block in every thread, warps in their order.
template <int threads>
__device__ __forceinline__ double block_sum(double value) {
  PK_SHARED(double, of_warp, threads / 32);
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < threads / 32; ++w) sum += of_warp[w];
  return sum;
}

// True in all threads of the block that is the last of so many to come here; what the others wrote before is visible then. Counts from 0.
__device__ __forceinline__ bool arrives_last(unsigned* count, int blocks) {
  PK_SHARED(int, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(count, 1u) + 1 == static_cast<unsigned>(blocks);
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ------------------------------------------------------------------------------------------------------------- tiles and groups

// The rows of a block: those from first on, at most so many, before end; all of them belong to one group or to none. A group's tiles also
// cover the rows behind it that are in no group, and those of the first group the rows before it: every row has one block.
struct Rows {
  int first, end;
  ContrastiveGroup group;

  __device__ __forceinline__ bool in_group(int row) const { return row >= group.row_begin && row < group.row_end && row < end; }
  __device__ __forceinline__ bool is_anchor(int row) const { return row >= group.row_begin && row < group.row_anchor_end && row < end; }
};

__device__ __forceinline__ int group_rows_begin(const ContrastiveGroup* groups, int g) { return g == 0 ? 0 : groups[g].row_begin; }

// All threads of the block search together: so many probes at a time.
template <int threads>
__device__ __forceinline__ Rows find_rows(const ContrastiveGroup* groups, int G, int R, int rows, int tile) {
  if (G == 0) return {tile * rows, min(R, (tile + 1) * rows), {}};
  int first = 0, count = G;  // the group lies among these, and the first tile of the first one is not behind this tile
  while (count > 1) {
    const int step = (count + threads - 1) / threads, probe = threadIdx.x * step;
    const int g = first + (probe < count ? probe : 0);
    const int before = __syncthreads_count(probe < count && group_rows_begin(groups, g) / rows + g <= tile) - 1;
    first += before * step;
    count = min(step, count - before * step);
  }
  const int begin = group_rows_begin(groups, first), limit = first + 1 < G ? groups[first + 1].row_begin : R;
  const int row = begin + (tile - begin / rows - first) * rows;
  return {row, min(row + rows, limit), groups[first]};
}

// Number by number: such a struct is aligned to 4 bytes.
__device__ __forceinline__ ContrastiveRange range_at(const ContrastiveRange* ranges, int row) {
  return {ranges[row].class_begin, ranges[row].class_end, ranges[row].self};
}
__device__ __forceinline__ bool in_class(const ContrastiveRange& range, int column) {
  return column >= range.class_begin && column < range.class_end;
}
__device__ __forceinline__ int positives_of(const ContrastiveRange& range) {
  return range.class_end - range.class_begin - in_class(range, range.self);
}
// Whether a row among the anchors meets other classes. n says so, unless the scores of all of them are -infinity: the group of the row, the
// last that does not begin behind it, is looked for only then, so that nothing of it is kept in registers until then.
template <class T>
__device__ __forceinline__ bool meets_others(const ContrastiveGroup* groups, int G, int row, const ContrastiveRange& range, T n) {
  if (n != -T(INFINITY)) return true;
  for (int count = G; count > 1;) {
    const int half = count / 2;
    const bool behind = groups[half].row_begin > row;
    groups += behind ? 0 : half, count = behind ? half : count - half;
  }
  const bool met = range.self >= groups->column_begin && range.self < groups->column_end;
  return groups->column_end - groups->column_begin > range.class_end - range.class_begin + (met && !in_class(range, range.self));
}

// ------------------------------------------------------------------------------------------------------------------------ losses

// Counts decide, not p and n: these are -infinity also where scores of raw vectors are beyond the type's range.
__device__ __forceinline__ bool has_loss(ContrastiveForm form, int positives, bool others) {
  const bool needs_negatives = form == ContrastiveForm::paper || form == ContrastiveForm::negout;
  return positives > 0 && !(needs_negatives && !others);
}

// One positive and nothing to tell it from: the loss is 0, not its rounding, and so is the gradient.
__device__ __forceinline__ bool is_certain(int positives, bool others) { return positives == 1 && !others; }

template <class T>
__device__ __forceinline__ T row_loss(ContrastiveForm form, T p, T n, T l, int positives, bool others) {
  if (!has_loss(form, positives, others)) return 0;
  if (is_certain(positives, others)) return p - p;  // a NaN stays
  const T count = static_cast<T>(positives), of_all = larger(p, n) + log_of_one_and(exponential(-fabs(p - n)));
  const T everyone = p != p || n != n ? p + n : of_all;  // larger() would lose a NaN
  switch (form) {
    case ContrastiveForm::supcon: return everyone - l / count;
    case ContrastiveForm::in: return everyone - p + logarithm(count);
    case ContrastiveForm::paper: return (n - p) / count;
    default: return n - l / count;
  }
}

// Where rows go to.
template <class T>
struct Results {
  int R, G, tiles;
  ContrastiveForm form;
  const ContrastiveGroup* groups;  // [G]
  const ContrastiveRange* ranges;  // [R]
  const double* weights;           // [R] or null
  T* losses;                       // [R]
  T* statistics;                   // [3, R]
  T* total;                        // [1]
  double* tile_totals;             // [tiles]
  unsigned* arrivals;              // [1], 0 before the launch

  // By one thread; returns what the row adds to the total.
  __device__ __forceinline__ double write(int row, bool anchor, T p, T n, T l) const {
    T loss = 0;
    if (anchor) {
      const ContrastiveRange range = range_at(ranges, row);
      loss = row_loss(form, p, n, l, positives_of(range), meets_others(groups, G, row, range, n));
    }
    statistics[row] = anchor ? p : -T(INFINITY);
    statistics[static_cast<int64_t>(R) + row] = anchor ? n : -T(INFINITY);
    statistics[static_cast<int64_t>(R) * 2 + row] = anchor ? l : T(0);
    losses[row] = loss;
    return anchor && weights ? weights[row] * static_cast<double>(loss) : 0.0;
  }
  // By the block that has finished a tile, once: every thread what its rows add. The last tile to come adds up all of them in their order.
  template <int threads>
  __device__ __forceinline__ void add(int tile, double value) const {
    if (!weights) return;
    const double sum = block_sum<threads>(value);
    if (threadIdx.x == 0) tile_totals[tile] = sum;
    if (!arrives_last(arrivals, tiles)) return;
    double mine = 0;
    for (int t = threadIdx.x; t < tiles; t += threads) mine += __ldcg(tile_totals + t);
    mine = block_sum<threads>(mine);
    if (threadIdx.x == 0) *total = static_cast<T>(mine);
  }
};

}  // namespace
