// SPDX-License-Identifier: MIT
// The kernels around FusedBlock: an iteration as two launches, all iterations as one, and the values of the result.
#pragma once

#include "ops/cuda/sinkhorn_stream_fused.cuh"

namespace {

template <class S>
__global__ void __launch_bounds__(FUSED_THREADS, 1) fused_kernel(const FusedStep step) {
  PK_SHARED(FusedShared, shared);
  FusedBlock<S> block(step, shared, nullptr, 0);
  if (step.p.done[block.b] != 0) return;
  block.load_rows(step.p.t);
  __syncthreads();
  block.run_rows(step.p.t);
}

__global__ void __launch_bounds__(FUSED_THREADS, 1) fused_columns_kernel(const FusedStep step, int panels) {
  PK_SHARED(FusedShared, shared);
  const int64_t b = blockIdx.x / panels;
  const int panel = static_cast<int>(blockIdx.x % panels);
  if (!fused_stops(step, step.p.t, b, panel == 0)) run_columns(step, step.p.t, shared, b, panel);
}

#if defined(PK_BLOCKS_WAIT)
// All iterations in one launch: the blocks of a problem wait for each other twice in an iteration. The first rows of a chunk stay in shared
// memory, as many as a block may have there (212992 bytes on sm_90); the rest comes through the L2 cache.
// resources: dynamic shared 147456 bytes
template <class S>
__global__ void __launch_bounds__(FUSED_THREADS, 1)
    resident_kernel(const FusedStep step, unsigned* arrivals, int resident_rows, int panels) {
  PK_SHARED(FusedShared, shared);
  PK_DYNAMIC_SHARED(float, kept);
  FusedBlock<S> block(step, shared, kept, 0);
  const int M = step.p.M, filled = (resident_rows < block.rows ? resident_rows : block.rows) * M;
  if (step.aligned) {
    for (int k = threadIdx.x * 4; k < filled; k += FUSED_THREADS * 4) pk::store_vector(kept + k, pk::load_vector<float4>(block.costs + k));
  } else {
    for (int k = threadIdx.x; k < filled; k += FUSED_THREADS) kept[k] = block.costs[k];
  }
  block.resident_rows = resident_rows;
  block.load_rows(0);
  __syncthreads();
  unsigned* const count = arrivals + block.b;
  unsigned target = 0;
  const auto meet = [&] {
    target += step.chunks;
    __syncthreads();
    if (threadIdx.x == 0) {
      pk::arrive(count);
      pk::wait_for(count, target);
    }
    __syncthreads();
  };
#pragma unroll 1
  for (int t = 0; t < step.p.num_iters; ++t) {
    block.run_rows(t);
    meet();
    if (fused_stops(step, t, block.b, block.chunk == 0)) break;
    for (int panel = block.chunk; panel < panels; panel += step.chunks) run_columns(step, t, shared, block.b, panel);
    if (threadIdx.x < MOST_CHUNK_ROWS) shared.u[threadIdx.x] = shared.u_next[threadIdx.x];
    meet();
  }
}
#endif

// Sums along the rows of P, P C, P (u + v - 1); a warp takes two rows.
constexpr int VALUE_ROWS = 2;
__global__ void __launch_bounds__(STREAM_THREADS, 4) fused_values_kernel(const FusedStep step, int64_t blocks) {
  const Solve<float>& p = step.p;
  const int64_t b = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, N = p.N, M = p.M;
  const int first = (static_cast<int>(blockIdx.x % blocks) * STREAM_WARPS + static_cast<int>(threadIdx.x) / 32) * VALUE_ROWS;
  if (first >= N) return;
  const float scale = LOG2_E * p.inverse_epsilon(b);
  const float* const cost = step.cost + (b * N + first) * M;
  const float* const v = p.v + b * M;
  const bool both = first + 1 < N;
  const float u[2] = {p.result(b)[first], both ? p.result(b)[first + 1] : -INFINITY};
  float sum[2][3] = {};
  const auto add = [&](int r, float c, float potential) {
    const float plan = pk::exp2_fast((u[r] + potential) * LOG2_E - c * scale);
    if (plan == 0) return;
    sum[r][0] += plan;
    sum[r][1] += plan * c;
    sum[r][2] += plan * potential;
  };
  if (step.aligned) {
#pragma unroll 4
    for (int j = lane * 4; j < M; j += 128) {
      const float4 potential = pk::load_vector<float4>(v + j), c = pk::load_vector<float4>(cost + j);
      const float4 d = pk::load_vector<float4>(cost + (both ? M : 0) + j);
      add(0, c.x, potential.x), add(0, c.y, potential.y), add(0, c.z, potential.z), add(0, c.w, potential.w);
      add(1, d.x, potential.x), add(1, d.y, potential.y), add(1, d.z, potential.z), add(1, d.w, potential.w);
    }
  } else {
#pragma unroll 4
    for (int j = lane; j < M; j += 32) add(0, cost[j], v[j]), add(1, cost[(both ? M : 0) + j], v[j]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float plan = warp_sum(sum[r][0]), transported = warp_sum(sum[r][1]), potentials = warp_sum(sum[r][2]);
    if (lane != 0 || first + r >= N) continue;
    p.values[b * 3 * N + first + r] = plan;
    p.values[(b * 3 + 1) * N + first + r] = transported;
    p.values[(b * 3 + 2) * N + first + r] = plan == 0 ? 0.0f : plan * (u[r] - 1) + potentials;
  }
}

}  // namespace
