// SPDX-License-Identifier: MIT
// Soft assignment for 64 < K <= 256 and D <= 128 on compute capability 9.0, where four warps multiply together (common/hopper.cuh). The equations
// stand in ops/prototypes.h, the arithmetic in prototypes_resident.cuh, whose other user, prototypes_resident.cu, has all that is not here.
//
// A block of two warpgroups splits the prototypes into fp16 parts once, in the order the tensor cores read: they take them from shared memory by
// themselves. A warpgroup then takes tiles of 64 rows of z: each warp splits its sixteen rows in registers, all four multiply, and each warp turns its
// scores into softmax, label and entropy. One group's softmax runs under the other's products.
// Limit at B = 65536, D = 128, K = 256 on an H200: memory, 23 us; three products of 64 x 256 x 128 are 3,072 cycles, eight tiles of them 13 us.
// Measured: 50 us (65 us while every call carried the code for entropy and drawing), 11 us at B = 2048. Warps wait for memory and, on average 8 us, at
// the one barrier, perhaps because all blocks read the same prototypes in the same order at the same time (not tried otherwise).

#include "common/simt.cuh"

#include "common/hopper.cuh"
#include "ops/cuda/prototypes_softmax.cuh"

namespace {

constexpr int GROUPS = 2;  // warpgroups of a block
constexpr int THREADS = GROUPS * 128;
constexpr int GROUP_ROWS = 64;  // rows of z in a tile
constexpr int PANEL = 64;       // dimensions: 128 bytes of fp16
constexpr int PANEL_STEPS = PANEL / 16;
constexpr int ALIGNMENT = 1024;  // of a panel

#if defined(PK_HOPPER)

// Splits the prototypes into panels [2 parts, PANELS, F * 8 rows, 128 bytes]; factor and bias as prepare_prototypes has them, dimensions and columns
// renamed as there.
template <int F, int PANELS, class Z>
__device__ __forceinline__ void prepare_panels(const Resident<Z>& p, unsigned char* panels, float* factor, float* bias) {
  constexpr int STEPS = PANELS * PANEL_STEPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = lane % 4, column = lane / 4;
  for (int f = warp; f < F; f += THREADS / 32) {
    const int k = f / 2 * 16 + column / 2 * 4 + f % 2 * 2 + column % 2;
    const float* const q = p.prototypes + static_cast<int64_t>(k) * p.D;
    float x[STEPS][4];
    unsigned largest = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int d = step * 16 + member * 4;
      if (p.q_aligned && k < p.K && d < p.D) {
        load_four(q + d, x[step]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[step][i] = k < p.K && d + i < p.D ? q[d + i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(x[step][i]));
    }
    const Scale scale = scale_of(quad_max(largest));
    float squared = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[step][i] *= scale.up, squared += x[step][i] * x[step][i];
      unsigned high[2], low[2];
      split(x[step][0], x[step][1], high[0], low[0]);
      split(x[step][2], x[step][3], high[1], low[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned char* const to = panels + (step / PANEL_STEPS * F * 8 + f * 8 + column) * 128 +
                                  pk::swizzled_piece(column, step % PANEL_STEPS * 2 + half) * 16 + member * 4;
        pk::store_vector(to, high[half]);
        pk::store_vector(to + PANELS * F * 8 * 128, low[half]);
      }
    }
    squared = quad_sum(squared);
    if (member == 0) {
      factor[k] = p.cosine ? inverse_norm(squared, scale) : scale.down;
      bias[k] = k < p.K ? 0.0f : -INFINITY;
    }
  }
}

// Starts the copy of a warp's rows; with constants this is sixteen instructions or so where copy_tile is eight hundred.
template <int PANELS, class Z>
__device__ __forceinline__ void copy_rows(const Resident<Z>& p, int64_t row0, Z* tile) {
  constexpr int PIECE = 16 / static_cast<int>(sizeof(Z)), PIECES = PANELS * PANEL / PIECE, AT_ONCE = 32 / PIECES;  // rows at once
  if (!p.z_aligned) return copy_tile(p, row0, tile);
  const int lane = threadIdx.x % 32, first = lane / PIECES, d = lane % PIECES * PIECE;
  const Z* const from = p.z + row0 * p.z_stride + d;
#pragma unroll
  for (int r = first; r < TILE; r += AT_ONCE) {
    const bool valid = row0 + r < p.B && d < p.D;
    pk::copy_async_16(tile + r * p.stride + d, valid ? from + r * p.z_stride : p.z, valid);
  }
  pk::copy_async_commit();
}

// A warp's rows as the fragments of the left factor, in scaled units.
template <int STEPS, class Z>
__device__ __forceinline__ RowPair split_rows(const Resident<Z>& p, const Z* tile, unsigned (&high)[STEPS][4], unsigned (&low)[STEPS][4]) {
  const int lane = threadIdx.x % 32;
  const Z* const row = tile + lane / 4 * p.stride + lane % 4 * 4;
  RowPair rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[STEPS][4];
    unsigned largest = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      load_four(row + r * 8 * p.stride + step * 16, x[step]);
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(x[step][i]));
    }
    largest = quad_max(largest);
    rows.scale[r] = scale_of(largest);
    rows.finite[r] = largest < INFINITE_BITS;
    float squared = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[step][i] *= rows.scale[r].up, squared += x[step][i] * x[step][i];
      split(x[step][0], x[step][1], high[step][r], low[step][r]);
      split(x[step][2], x[step][3], high[step][r + 2], low[step][r + 2]);
    }
    rows.factor[r] = p.cosine ? inverse_norm(quad_sum(squared), rows.scale[r]) : rows.scale[r].down;
  }
  return rows;
}

#endif

// resources: dynamic shared 205824 bytes
template <class Z, int F, int PANELS, bool plain>
__global__ void __launch_bounds__(THREADS, 1) warpgroup_kernel(const Resident<Z> p) {
#if defined(PK_HOPPER)
  constexpr int STEPS = PANELS * PANEL_STEPS, PANEL_BYTES = F * 8 * 128;
  PK_SHARED(float, factor, F * 8);
  PK_SHARED(float, bias, F * 8);
  PK_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* const panels = memory + (ALIGNMENT - static_cast<unsigned>(__cvta_generic_to_shared(memory)) % ALIGNMENT) % ALIGNMENT;
  const int warp = threadIdx.x / 32;
  Z* const tile = reinterpret_cast<Z*>(panels + 2 * PANELS * PANEL_BYTES) + warp * TILE * p.stride;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * GROUPS;
  const int first_row = warp % 4 * TILE;

  int64_t t = static_cast<int64_t>(warp / 4) * gridDim.x + blockIdx.x;
  if (t < p.tiles) copy_rows<PANELS>(p, t * GROUP_ROWS + first_row, tile);
  pk::let_next_begin();
  prepare_panels<F, PANELS>(p, panels, factor, bias);
  const float to_log2 =
      static_cast<float>(1.4426950408889634 / (p.temperature_pointer ? static_cast<double>(*p.temperature_pointer) : p.temperature));
  pk::publish_to_tensor_cores();
  __syncthreads();

  const uint64_t descriptor = pk::matrix_descriptor(panels);
  for (; t < p.tiles; t += stride) {
    const int64_t row0 = t * GROUP_ROWS + first_row;
    unsigned high[STEPS][4], low[STEPS][4];
    pk::copy_async_wait<0>();
    __syncwarp();
    const RowPair rows = split_rows<STEPS>(p, tile, high, low);
    __syncwarp();
    if (t + stride < p.tiles) copy_rows<PANELS>(p, row0 + stride * GROUP_ROWS, tile);
    float s[F][4];
    pk::begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const uint64_t q_high = descriptor + (step / PANEL_STEPS * PANEL_BYTES + step % PANEL_STEPS * 32) / 16;
      const uint64_t q_low = q_high + PANELS * PANEL_BYTES / 16;
      pk::warpgroup_multiply(s, low[step], q_high, step > 0);
      pk::warpgroup_multiply(s, high[step], q_low, true);
      pk::warpgroup_multiply(s, high[step], q_high, true);
    }
    pk::end_products(s);
    int label[2];
    finish_rows<Z, F, plain>(p, row0, rows, factor, bias, to_log2, s, label);
  }
#endif
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class Z, int F, int PANELS>
int launch_kernel(const PrototypesForward& p, void* stream) {
  constexpr int steps = PANELS * PANEL_STEPS, stride = steps * 16 + 16;  // a lane's four neighbours: all banks once
  const int64_t tiles = (p.B + GROUP_ROWS - 1) / GROUP_ROWS, most = pk::multiprocessor_count();
  const std::size_t bytes = ALIGNMENT + 2 * PANELS * F * 8 * 128 + THREADS / 32 * TILE * stride * sizeof(Z);
  const dim3 blocks(static_cast<unsigned>(tiles < most ? tiles : most));
  const Resident<Z> resident = resident_of<Z>(p, tiles, steps, stride, 1, nullptr, nullptr);
  if (p.entropy || p.uniform || p.K % 4 != 0)
    return PK_LAUNCH((warpgroup_kernel<Z, F, PANELS, false>), blocks, dim3(THREADS), bytes, stream, resident);
  return PK_LAUNCH((warpgroup_kernel<Z, F, PANELS, true>), blocks, dim3(THREADS), bytes, stream, resident);
}

template <class Z>
int launch_sizes(const PrototypesForward& p, void* stream) {
  if (p.K <= 128) return p.D <= PANEL ? launch_kernel<Z, 16, 1>(p, stream) : launch_kernel<Z, 16, 2>(p, stream);
  return p.D <= PANEL ? launch_kernel<Z, 32, 1>(p, stream) : launch_kernel<Z, 32, 2>(p, stream);
}

}  // namespace

namespace protokernels {

bool prototypes_warpgroup(const PrototypesForward& p) {
  return !p.double_compute && p.K > 64 && p.K <= 256 && p.D <= 2 * PANEL && pk::warpgroup_products(warpgroup_kernel<float, 32, 2, true>);
}

int launch_prototypes_warpgroup(const PrototypesForward& p, void* stream) {
  switch (p.z_kind) {
    case Kind::f32: return launch_sizes<float>(p, stream);
    case Kind::bf16: return launch_sizes<__nv_bfloat16>(p, stream);
    default: return launch_sizes<__half>(p, stream);
  }
}

}  // namespace protokernels
