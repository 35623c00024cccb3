// SPDX-License-Identifier: MIT
// What the backward kernels of contrastive share: the parameters, a block's part of the problem, and the range of 16-bit weights.
#pragma once

#include "ops/cuda/contrastive_factors.cuh"

namespace {

struct Backward {
  int R, G, shares, slices;
  Side rows, columns;
  const ContrastiveGroup* groups;  // [G]
  const ContrastiveRange* ranges;  // [R]
  float scale;                     // log2(e) / temperature
  float inverse_temperature;
  bool rows_have_losses, columns_have_losses;
  Factors of_rows, of_columns;
  const float* largest;  // [largest_count]: the largest sums of derivatives
  int largest_count, Cp;
  float* gradient;  // [shares, R, Cp]
};

// H is at most twice the largest sum of a vector's derivatives: times 2^lift it fits 16-bit floats, and what it loses is 2^-37 of that sum at most.
template <int threads>
__device__ __forceinline__ int find_lift(const Backward& p) {
  PK_SHARED(float, of_warp, threads / 32);
  float size = 0;
  for (int i = threadIdx.x; i < p.largest_count; i += threads) size = fmaxf(size, p.largest[i]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) size = fmaxf(size, __shfl_xor_sync(ALL, size, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = size;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < threads / 32; ++w) size = fmaxf(size, of_warp[w]);
  const int exponent = static_cast<int>(__float_as_uint(size) >> 23) - 126;
  return size == 0 || size == INFINITY ? 0 : min(13 - exponent, 60);
}
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Columns that rows [first, behind) need begin with the group's and end here: all for rows with losses, the anchors for others.
__device__ __forceinline__ int columns_end(const Backward& p, const Rows& rows, int first, int behind) {
  const ContrastiveGroup& group = rows.group;
  first = max(first, group.row_begin), behind = min(behind, rows.end);
  if (first >= min(behind, group.row_end)) return group.column_begin;
  if (p.rows_have_losses && first < group.row_anchor_end) return group.column_end;
  return p.columns_have_losses ? group.column_anchor_end : group.column_begin;
}

// What a block does: a tile of rows, a share of the columns of their group, a slice of channels.
struct Portion {
  Rows rows;
  int slice, share;
  int begin, end;  // columns
};

template <int threads>
__device__ __forceinline__ Portion find_portion(const Backward& p, int tile_rows, int step) {
  Portion out;
  const int block = static_cast<int>(blockIdx.x);
  out.slice = block % p.slices, out.share = block / p.slices % p.shares;
  const Rows rows = out.rows = find_rows<threads>(p.groups, p.G, p.R, tile_rows, block / p.slices / p.shares);
  const int first = rows.group.column_begin, count = columns_end(p, rows, rows.first, rows.end) - first;
  const int of_share = ((count + p.shares - 1) / p.shares + step - 1) / step * step;
  out.begin = first + out.share * of_share, out.end = min(out.begin + of_share, first + count);
  return out;
}

}  // namespace
