// SPDX-License-Identifier: MIT
// Sums of clusters and the blend on the GPU, shared by the kernels of prototypes: rows of a tile in the order of their labels, every thread its own
// dimensions, partial sums of a block in global memory, then the blocks in order. No atomics.
#pragma once

#include "common/simt.cuh"
#include "ops/prototypes.h"

namespace {

using namespace protokernels;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 64;         // rows of z in a tile
constexpr int MAX_BLOCKS = 256;  // a constant, so that the order of summation does not depend on the GPU
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

template <class Z>
__device__ __forceinline__ bool is_finite_row(const Z* row, int D) {
  bool finite = true;
  for (int d = threadIdx.x % 32; d < D; d += 32) finite &= widen(row[d]) * 0 == 0;
  return __all_sync(ALL, finite);
}

// ---------------------------------------------------------------------------------------------------------- sums of a tile

// order[i]: the rows of a tile sorted by label, rows of one label in their own order; label -1 comes first. Ends with a barrier.
__device__ __forceinline__ void sort_rows(const int (&label)[ROWS], int (&order)[ROWS]) {
  __syncthreads();
  const int row = threadIdx.x;
  if (row < ROWS) {
    int rank = 0;
    for (int other = 0; other < ROWS; ++other) rank += label[other] < label[row] || (label[other] == label[row] && other < row);
    order[rank] = row;
  }
  __syncthreads();
}

// Adds the members of each cluster to the block's partial sums. A cluster belongs to one group of threads, a dimension to one thread of it.
template <class Z>
__device__ __forceinline__ void add_members(const Z* z, int64_t z_stride, int K, int D, const int (&label)[ROWS], const int (&order)[ROWS],
                                            double* sums, int64_t* counts) {
  const int width = D >= THREADS ? THREADS : (D + 31) / 32 * 32, groups = THREADS / width;
  const int group = threadIdx.x / width;
  if (group >= groups) return;
  for (int d = threadIdx.x % width; d < D; d += width) {
    for (int i = 0; i < ROWS;) {
      const int cluster = label[order[i]];
      if (cluster < 0 || cluster % groups != group) {
        ++i;
        continue;
      }
      double sum = 0;
      const int begin = i;
      for (; i < ROWS && label[order[i]] == cluster; ++i) sum += static_cast<double>(widen(z[order[i] * z_stride + d]));
      sums[static_cast<int64_t>(cluster) * D + d] += sum;
      if (d == 0) counts[cluster] += i - begin;
    }
  }
}

__device__ __forceinline__ void clear_partial(double* sums, int64_t* counts, int K, int D) {
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(K) * D; i += THREADS) sums[i] = 0;
  for (int k = threadIdx.x; k < K; k += THREADS) counts[k] = 0;
  __syncthreads();
}

// --------------------------------------------------------------------------------------------------------- the second launch

__device__ __forceinline__ double read_kind(const void* base, Kind kind, int64_t i) {
  switch (kind) {
    case Kind::f32: return static_cast<const float*>(base)[i];
    case Kind::f64: return static_cast<const double*>(base)[i];
    case Kind::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
    default: return __half2float(static_cast<const __half*>(base)[i]);
  }
}

__device__ __forceinline__ void write_kind(void* base, Kind kind, int64_t i, double value) {
  switch (kind) {
    case Kind::f32: static_cast<float*>(base)[i] = static_cast<float>(value); break;
    case Kind::f64: static_cast<double*>(base)[i] = value; break;
    case Kind::bf16: static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(static_cast<float>(value)); break;
    default: static_cast<__half*>(base)[i] = __float2half_rn(static_cast<float>(value));
  }
}

__device__ __forceinline__ void blend_element(const PrototypesBlend& p, int64_t i, double sum, int64_t count) {
  const double old = read_kind(p.prototypes, p.kind, i);
  write_kind(p.updated, p.kind, i, count > 0 ? p.new_weight / static_cast<double>(count) * sum + (1.0 - p.new_weight) * old : old);
}

// One thread per element of [K, D]: the partial sums of the blocks in order, then the blend (if there is somewhere to put it).
__global__ void __launch_bounds__(THREADS)
    finish_kernel(const double* partial_sums, const int64_t* partial_counts, int blocks, PrototypesBlend p, double* sums, int64_t* counts) {
  const int64_t size = p.K * p.D, i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  const int64_t k = i / p.D;
  double sum = 0;
  int64_t count = 0;
  for (int b = 0; b < blocks; ++b) {
    sum += partial_sums[b * size + i];
    count += partial_counts[b * p.K + k];
  }
  sums[i] = sum;
  if (i % p.D == 0) counts[k] = count;
  if (p.updated) blend_element(p, i, sum, count);
}

struct Grid {
  int blocks, tiles_per_block;
};

Grid grid_of(int64_t B) {
  const int64_t tiles = (B + ROWS - 1) / ROWS, blocks = tiles < MAX_BLOCKS ? tiles : MAX_BLOCKS;
  if (blocks == 0) return {0, 0};
  const int64_t per_block = (tiles + blocks - 1) / blocks;
  return {static_cast<int>((tiles + per_block - 1) / per_block), static_cast<int>(per_block)};
}

int64_t partial_bytes(int64_t B, int64_t K, int64_t D) {
  return grid_of(B).blocks * (K * D * static_cast<int64_t>(sizeof(double)) + K * static_cast<int64_t>(sizeof(int64_t))) + 16;
}

// The workspace: counts first, for their alignment.
int launch_finish(const PrototypesBlend& p, int blocks, void* workspace, double* sums, int64_t* counts, void* stream) {
  const int64_t* const partial_counts = static_cast<const int64_t*>(workspace);
  const double* const partial_sums = reinterpret_cast<const double*>(partial_counts + blocks * p.K);
  return PK_LAUNCH(finish_kernel, dim3(static_cast<unsigned>((p.K * p.D + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream,
                   partial_sums, partial_counts, blocks, p, sums, counts);
}

}  // namespace
