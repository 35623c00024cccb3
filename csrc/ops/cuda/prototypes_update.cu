// SPDX-License-Identifier: MIT
// Prototypes on the GPU from given labels: sums and counts of the clusters, and the blend alone. The equations stand in ops/prototypes.h.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_sums.cuh"

namespace {

template <class Z>
struct Accumulate {
  int64_t B;
  int K, D, tiles_per_block;
  int64_t z_stride;
  const Z* z;             // [B, D]
  const int64_t* labels;  // [B]
  bool skip_nonfinite;
  double* partial_sums;     // [blocks, K, D]
  int64_t* partial_counts;  // [blocks, K]
};

template <class Z>
__global__ void __launch_bounds__(THREADS) accumulate_kernel(const Accumulate<Z> p) {
  PK_SHARED(int, label, ROWS);
  PK_SHARED(int, order, ROWS);
  double* const sums = p.partial_sums + static_cast<int64_t>(blockIdx.x) * p.K * p.D;
  int64_t* const counts = p.partial_counts + static_cast<int64_t>(blockIdx.x) * p.K;
  clear_partial(sums, counts, p.K, p.D);
  for (int t = 0; t < p.tiles_per_block; ++t) {
    const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * p.tiles_per_block + t) * ROWS;
    if (row0 >= p.B) break;
    const Z* const z = p.z + row0 * p.z_stride;
    for (int r = threadIdx.x / 32; r < ROWS; r += WARPS) {
      int64_t chosen = row0 + r < p.B ? p.labels[row0 + r] : -1;
      if (chosen >= p.K) __trap();  // as torch's own device-side assertions
      if (chosen >= 0 && p.skip_nonfinite && !is_finite_row(z + r * p.z_stride, p.D)) chosen = -1;
      if (threadIdx.x % 32 == 0) label[r] = chosen < 0 ? -1 : static_cast<int>(chosen);
    }
    sort_rows(label, order);
    add_members(z, p.z_stride, p.K, p.D, label, order, sums, counts);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(THREADS) blend_kernel(PrototypesBlend p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < p.K * p.D) blend_element(p, i, p.sums[i], p.counts[i / p.D]);
}

template <class Z>
int launch_accumulate(const PrototypesAccumulate& p, void* workspace, void* stream) {
  const Grid grid = grid_of(p.B);
  int64_t* const counts = static_cast<int64_t*>(workspace);
  double* const sums = reinterpret_cast<double*>(counts + grid.blocks * p.K);
  if (grid.blocks > 0) {
    const Accumulate<Z> accumulate{p.B,
                                      static_cast<int>(p.K),
                                      static_cast<int>(p.D),
                                      grid.tiles_per_block,
                                      p.z_stride,
                                      static_cast<const Z*>(p.z),
                                      p.labels,
                                      p.skip_nonfinite,
                                      sums,
                                      counts};
    const int status = PK_LAUNCH((accumulate_kernel<Z>), dim3(grid.blocks), dim3(THREADS), 0, stream, accumulate);
    if (status != 0) return status;
  }
  const PrototypesBlend none{p.K, p.D, nullptr, Kind::f32, nullptr, nullptr, 0.0, nullptr};
  return launch_finish(none, grid.blocks, workspace, p.sums, p.counts, stream);
}

}  // namespace

namespace protokernels {

int64_t prototypes_accumulate_workspace(const PrototypesAccumulate& p) {
  return partial_bytes(p.B, p.K, p.D);
}

int launch_prototypes_accumulate(const PrototypesAccumulate& p, void* workspace, void* stream) {
  switch (p.z_kind) {
    case Kind::f32: return launch_accumulate<float>(p, workspace, stream);
    case Kind::f64: return launch_accumulate<double>(p, workspace, stream);
    case Kind::bf16: return launch_accumulate<__nv_bfloat16>(p, workspace, stream);
    default: return launch_accumulate<__half>(p, workspace, stream);
  }
}

int launch_prototypes_blend(const PrototypesBlend& p, void* stream) {
  return PK_LAUNCH(blend_kernel, dim3(static_cast<unsigned>((p.K * p.D + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream, p);
}

}  // namespace protokernels
