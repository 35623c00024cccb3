// SPDX-License-Identifier: MIT
// Soft assignment on the GPU where all prototypes fit into shared memory (K <= 256, about K D <= 40,000): the usual case. The equations stand in
// ops/prototypes.h, the arithmetic in prototypes_resident.cuh and prototypes_softmax.cuh; prototypes_kernel.cu does the rest.
//
// A block splits the prototypes into fp16 parts once and keeps them. From then on its warps go their own ways, without a barrier: a warp takes 16
// rows of z, has their scores with all prototypes in registers, turns them into softmax, label and entropy, writes, and takes the next 16; the copy
// of these runs meanwhile. A small K D is summed up on the way, float64, a warp into its own part of shared memory and the warps, then the blocks,
// in order. A larger one would need K D float64 numbers per block: its sums come from the labels (prototypes_update.cu), which reads z again.
// Limit at B = 65536, D = 128, K = 256 on an H200: memory, 23 us; fp16 products at the rate of mma.sync, about 20 us; the prototypes' fragments
// from shared memory, 16 us; 3 us to fill it. Measured: 83 us, and
// prototypes_warpgroup.cu does it on compute capability 9.0. A scheduler has two warps, and one of them can issue in 26 % of the cycles; a tile is
// about 4,500 instructions of a warp.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_softmax.cuh"

namespace {

constexpr int MAX_K = 256;
constexpr int MAX_SUMMED = 1024;    // K D up to which sums are made on the way
constexpr int MAX_SUMMED_D = 128;   // a warp then has two tiles in shared memory
constexpr int SUMMED_BLOCKS = 256;  // at most: a constant, so that the order of summation does not depend on the GPU

// The tile's rows, added to the warp's sums [K, D] in their order.
template <class Z>
__device__ __forceinline__ void add_rows(const Resident<Z>& p, const Z* tile, const int (&label)[2], double* sums, int* counts) {
  const int lane = threadIdx.x % 32;
  int labels[TILE];
#pragma unroll
  for (int r = 0; r < TILE; ++r) labels[r] = __shfl_sync(ALL, label[r / 8], r % 8 * 4);
  const int first = __shfl_sync(ALL, label[0], lane % 8 * 4), second = __shfl_sync(ALL, label[1], lane % 8 * 4);
  const int own = lane < 8 ? first : lane < 16 ? second : -1;  // of row `lane`
  const unsigned same = __match_any_sync(ALL, own);
  if (own >= 0 && (same & ((1u << lane) - 1)) == 0) counts[own] += __popc(same);
  for (int d = lane; d < p.D; d += 32) {
    float x[TILE];
#pragma unroll
    for (int r = 0; r < TILE; ++r) x[r] = widen(tile[r * p.stride + d]);
#pragma unroll
    for (int r = 0; r < TILE; ++r)
      if (labels[r] >= 0) sums[labels[r] * p.D + d] += static_cast<double>(x[r]);
  }
}

// None on sm_80 and sm_90; on sm_90 another kernel serves K > 64 (prototypes_warpgroup.cu).
// resources: spills at most 152 bytes (sm_100)
// resources: dynamic shared 160768 bytes
template <class Z, int F>
__global__ void __launch_bounds__(MAX_WARPS * 32, F > 8 ? 1 : 2) resident_kernel(const Resident<Z> p) {
  PK_DYNAMIC_SHARED(uint4, fragments);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* const factor = reinterpret_cast<float*>(fragments + p.steps * F * 32);
  float* const bias = factor + F * 8;
  Z* const tiles = reinterpret_cast<Z*>(bias + F * 8);
  const int tile_size = TILE * p.stride, sizes = p.K * p.D;
  double* const sums = reinterpret_cast<double*>(tiles + warps * p.buffers * tile_size);
  int* const counts = reinterpret_cast<int*>(sums + warps * sizes);
  Z* const mine = tiles + warp * p.buffers * tile_size;
  const bool summed = p.partial_sums != nullptr;

  int64_t t = static_cast<int64_t>(warp) * gridDim.x + blockIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  if (t < p.tiles) copy_tile(p, t * TILE, mine);
  if (summed) {
    for (int i = threadIdx.x; i < warps * sizes; i += blockDim.x) sums[i] = 0;
    for (int i = threadIdx.x; i < warps * p.K; i += blockDim.x) counts[i] = 0;
  }
  pk::let_next_begin();
  prepare_prototypes<F>(p, fragments, factor, bias);
  const float to_log2 =
      static_cast<float>(1.4426950408889634 / (p.temperature_pointer ? static_cast<double>(*p.temperature_pointer) : p.temperature));
  __syncthreads();

  for (int buffer = 0; t < p.tiles; t += stride, buffer ^= p.buffers - 1) {
    const int64_t row0 = t * TILE, next = t + stride;
    if (p.buffers == 2 && next < p.tiles) {
      copy_tile(p, next * TILE, mine + (buffer ^ 1) * tile_size);
      pk::copy_async_wait<1>();
    } else {
      pk::copy_async_wait<0>();
    }
    __syncwarp();
    const Z* const tile = mine + buffer * tile_size;
    const RowPair rows = measure_rows(p, tile);
    float s[F][4] = {};
    multiply<Z, F>(p, tile, rows, fragments, s);
    if (p.buffers == 1 && next < p.tiles) {
      __syncwarp();
      copy_tile(p, next * TILE, mine);
    }
    int label[2];
    finish_rows<Z, F, false>(p, row0, rows, factor, bias, to_log2, s, label);
    if (summed) add_rows(p, tile, label, sums + warp * sizes, counts + warp * p.K);
    __syncwarp();
  }
  if (!summed) return;
  __syncthreads();
  for (int i = threadIdx.x; i < sizes; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[w * sizes + i];
    p.partial_sums[static_cast<int64_t>(blockIdx.x) * sizes + i] = sum;
  }
  for (int k = threadIdx.x; k < p.K; k += blockDim.x) {
    int count = 0;
    for (int w = 0; w < warps; ++w) count += counts[w * p.K + k];
    p.partial_counts[static_cast<int64_t>(blockIdx.x) * p.K + k] = count;
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

struct Plan {
  bool fits, summed;
  int fragments, steps, stride, buffers, warps, blocks;
  std::size_t bytes;
};

// Where sums are made on the way, warps and blocks depend on the shape only.
Plan plan_of(const PrototypesForward& p) {
  Plan plan{};
  if (p.double_compute || p.K > MAX_K || p.D > 16384) return plan;
  const int64_t tiles = (p.B + TILE - 1) / TILE, element = p.z_kind == Kind::f32 ? 4 : 2;
  plan.summed = p.sums && p.K * p.D <= MAX_SUMMED && p.D <= MAX_SUMMED_D;
  for (const int fragments : {32, 24, 16, 8, 4, 2})
    if (p.K <= fragments * 8) plan.fragments = fragments;
  plan.steps = static_cast<int>((p.D + 15) / 16);
  plan.stride = plan.steps * 16 + (plan.steps % 2 == 0 ? 16 : 0);  // a lane's four neighbours: all banks once
  plan.buffers = plan.summed ? 2 : 1;
  const int64_t fixed = static_cast<int64_t>(plan.fragments) * (plan.steps * 512 + 64);
  const int64_t per_warp = plan.buffers * TILE * plan.stride * element + (plan.summed ? p.K * p.D * 8 + p.K * 4 : 0);
  const int64_t limit = static_cast<int64_t>(pk::shared_memory_limit());
  if (plan.summed) {
    plan.warps = tiles > 4 * SUMMED_BLOCKS && p.D <= 64 ? MAX_WARPS : 4;
    const int64_t blocks = (tiles + plan.warps - 1) / plan.warps;
    plan.blocks = static_cast<int>(blocks < SUMMED_BLOCKS ? blocks : SUMMED_BLOCKS);
  } else {
    const int64_t room = (limit - fixed) / per_warp;
    if (limit < fixed || room < 2) return plan;
    plan.warps = room < MAX_WARPS ? static_cast<int>(room) : MAX_WARPS;
    const int together = fixed + plan.warps * per_warp <= limit / 2 && plan.fragments <= 8 ? 2 : 1;
    const int64_t blocks = (tiles + 1) / 2, most = static_cast<int64_t>(together) * pk::multiprocessor_count();
    plan.blocks = static_cast<int>(blocks < most ? blocks : most);
  }
  plan.bytes = static_cast<std::size_t>(fixed + plan.warps * per_warp);
  plan.fits = plan.bytes <= static_cast<std::size_t>(limit);
  return plan;
}

template <class Z, int F>
int launch_kernel(const Plan& plan, const Resident<Z>& resident, void* stream) {
  return PK_LAUNCH((resident_kernel<Z, F>), dim3(plan.blocks), dim3(plan.warps * 32), plan.bytes, stream, resident);
}

template <class Z>
int launch_resident(const Plan& plan, const PrototypesForward& p, double* partial_sums, int* partial_counts, void* stream) {
  const Resident<Z> resident =
      resident_of<Z>(p, (p.B + TILE - 1) / TILE, plan.steps, plan.stride, plan.buffers, partial_sums, partial_counts);
  switch (plan.fragments) {
    case 2: return launch_kernel<Z, 2>(plan, resident, stream);
    case 4: return launch_kernel<Z, 4>(plan, resident, stream);
    case 8: return launch_kernel<Z, 8>(plan, resident, stream);
    case 16: return launch_kernel<Z, 16>(plan, resident, stream);
    case 24: return launch_kernel<Z, 24>(plan, resident, stream);
    default: return launch_kernel<Z, 32>(plan, resident, stream);
  }
}

}  // namespace

namespace protokernels {

bool prototypes_resident(const PrototypesForward& p) { return plan_of(p).fits; }

int64_t prototypes_resident_workspace(const PrototypesForward& p) {
  const Plan plan = plan_of(p);
  if (!plan.summed) return p.sums ? prototypes_sums_workspace(p.B, p.K, p.D) : 0;
  return plan.blocks * p.K * (p.D * static_cast<int64_t>(sizeof(double)) + static_cast<int64_t>(sizeof(int)));
}

int launch_prototypes_resident(const PrototypesForward& p, const PrototypesBlend& blend, void* workspace, void* stream) {
  const Plan plan = plan_of(p);
  double* const partial_sums = plan.summed ? static_cast<double*>(workspace) : nullptr;
  int* const partial_counts = plan.summed ? reinterpret_cast<int*>(partial_sums + plan.blocks * p.K * p.D) : nullptr;
  if (plan.blocks > 0) {
    int status = 0;
    if (!plan.summed && prototypes_warpgroup(p))
      status = launch_prototypes_warpgroup(p, stream);
    else
      switch (p.z_kind) {
        case Kind::f32: status = launch_resident<float>(plan, p, partial_sums, partial_counts, stream); break;
        case Kind::bf16: status = launch_resident<__nv_bfloat16>(plan, p, partial_sums, partial_counts, stream); break;
        default: status = launch_resident<__half>(plan, p, partial_sums, partial_counts, stream);
      }
    if (status != 0) return status;
  }
  if (!p.sums) return 0;
  if (plan.summed) return launch_prototypes_finish({plan.blocks, partial_sums, partial_counts}, blend, p.sums, p.counts, stream);
  return launch_prototypes_sums({p.B, p.K, p.D, p.z, p.z_kind, p.z_stride, p.labels, false, p.sums, p.counts}, blend, workspace, stream);
}

}  // namespace protokernels
