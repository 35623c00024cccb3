// SPDX-License-Identifier: MIT
// The end of the moving average on the GPU: parts of the sums added up in order, and the blend. The equations stand in ops/prototypes.h.
//
// finish_kernel: threads of a block share the parts of 32 elements, each adds up its own in order, and a tree adds up theirs.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_sums.cuh"

namespace {

constexpr int ELEMENTS = 32;    // of [K, D] in a block
constexpr int MAX_GROUPS = 32;  // of threads, each with a share of the parts

__global__ void __launch_bounds__(ELEMENTS* MAX_GROUPS)
    finish_kernel(const PrototypesParts parts, const PrototypesBlend p, double* sums, int64_t* counts) {
  PK_SHARED(double, group_sum, MAX_GROUPS, ELEMENTS);
  PK_SHARED(int64_t, group_count, MAX_GROUPS, ELEMENTS);
  const int element = threadIdx.x % ELEMENTS, group = threadIdx.x / ELEMENTS, groups = blockDim.x / ELEMENTS;
  const int64_t size = p.K * p.D, i = static_cast<int64_t>(blockIdx.x) * ELEMENTS + element, k = i / p.D;
  const int64_t share = (parts.parts + groups - 1) / groups, begin = group * share;
  const int64_t end = begin + share < parts.parts ? begin + share : parts.parts;
  double sum = 0;
  int64_t count = 0;
  pk::wait_for_previous();
  const double old = group == 0 && i < size && p.updated ? read_kind(p.prototypes, p.kind, i) : 0.0;
  if (i < size) {
#pragma unroll 8
    for (int64_t b = begin; b < end; ++b) {
      sum += parts.sums[b * size + i];
      count += parts.counts[b * p.K + k];
    }
  }
  group_sum[group][element] = sum;
  group_count[group][element] = count;
  for (int step = groups / 2; step > 0; step /= 2) {
    __syncthreads();
    if (group < step) {
      group_sum[group][element] = sum += group_sum[group + step][element];
      group_count[group][element] = count += group_count[group + step][element];
    }
  }
  if (group > 0 || i >= size) return;
  sums[i] = sum;
  if (i % p.D == 0) counts[k] = count;
  if (p.updated) blend_element(p, i, old, sum, count);
}

constexpr int BLEND_THREADS = 256;

__global__ void __launch_bounds__(BLEND_THREADS) blend_kernel(PrototypesBlend p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BLEND_THREADS + threadIdx.x;
  if (i < p.K * p.D) blend_element(p, i, read_kind(p.prototypes, p.kind, i), p.sums[i], p.counts[i / p.D]);
}

}  // namespace

namespace protokernels {

int launch_prototypes_finish(const PrototypesParts& parts, const PrototypesBlend& blend, double* sums, int64_t* counts, void* stream) {
  int groups = 8;
  while (groups < MAX_GROUPS && groups * 8 < parts.parts) groups *= 2;
  const dim3 blocks(static_cast<unsigned>((blend.K * blend.D + ELEMENTS - 1) / ELEMENTS));
  return PK_LAUNCH_BEHIND(finish_kernel, blocks, dim3(ELEMENTS * groups), 0, stream, parts, blend, sums, counts);
}

int launch_prototypes_blend(const PrototypesBlend& p, void* stream) {
  const dim3 blocks(static_cast<unsigned>((p.K * p.D + BLEND_THREADS - 1) / BLEND_THREADS));
  return PK_LAUNCH(blend_kernel, blocks, dim3(BLEND_THREADS), 0, stream, p);
}

}  // namespace protokernels
