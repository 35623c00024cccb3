// SPDX-License-Identifier: MIT
// Gradient of the rows on the GPU for K <= 256 and D <= 128; a warp's arithmetic stands in prototypes_backward.cuh. Each type of rows is compiled in a
// file of its own, side by side: together they take the compiler two minutes for every kind of GPU.
//
// A block splits the prototypes into fp16 parts once, transposed, and keeps them. A warp has sixteen rows of the assignment and of its gradient in
// registers, 32 loads on their way at a time, turns them into gradients of scores, multiplies, and goes on from the sums in registers to the gradient
// of its rows. On compute capability 9.0 four warps multiply together (common/hopper.cuh); elsewhere each for itself.
// Limit at B = 65536, D = 128, K = 256 on an H200: memory, 48 us; 64 us with the score gradients that the prototypes' gradient needs.
// Measured: 128 us, 143 us with those; a warp waits for memory ten cycles for each instruction.

#pragma once

#include "common/simt.cuh"
#include "ops/cuda/prototypes_backward.cuh"
#include "ops/cuda/prototypes_gradient.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int GROUP_ROWS = PROTOTYPES_BACKWARD_GROUP;
constexpr int PANEL = 64;  // prototypes

// Splits the prototypes, transposed, into fragments [PANELS * 4, F, 32] of (high, high, low, low) or, for four warps together, into panels
// [2 parts, PANELS, F * 8 dimensions, 128 bytes]; and for each a factor that undoes the scale (and normalises).
template <int PANELS, int F, bool together, class Z>
__device__ __forceinline__ void prepare_transposed(const Backward<Z>& p, unsigned char* parts, float* factor) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = lane * 4;
  const bool aligned = p.D % 4 == 0 && reinterpret_cast<uintptr_t>(p.prototypes) % 16 == 0;
  for (int k = warp * 2; k < PANELS * PANEL; k += WARPS * 2) {
    float x[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const q = p.prototypes + static_cast<int64_t>(k + r) * p.D;
      if (aligned && k + r < p.K && d < p.D) {
        load_four(q + d, x[r]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[r][i] = k + r < p.K && d + i < p.D ? q[d + i] : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned largest = 0;
      float squared = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(x[r][i]));
      const Scale scale = scale_of(__reduce_max_sync(ALL, largest));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[r][i] *= scale.up, squared += x[r][i] * x[r][i];
      squared = warp_sum(squared);
      if (lane == 0) factor[k + r] = p.cosine ? inverse_norm(squared, scale) : scale.down;
    }
    if (d >= F * 8) continue;
    const int step = k / 16, member = k % 16 / 4, half = k % 4 / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int f = lane / 4 * 2 + i / 2, column = lane % 4 * 2 + i % 2;
      unsigned high, low;
      split(x[0][i], x[1][i], high, low);
      if constexpr (together) {
#if defined(PK_HOPPER)
        unsigned char* const to =
            parts + (step / 4 * F * 8 + f * 8 + column) * 128 + pk::swizzled_piece(column, step % 4 * 2 + half) * 16 + member * 4;
        pk::store_vector(to, high);
        pk::store_vector(to + PANELS * F * 8 * 128, low);
#endif
      } else {
        unsigned* const to = reinterpret_cast<unsigned*>(parts) + ((step * F + f) * 32 + column * 4 + member) * 4 + half;
        to[0] = high, to[2] = low;
      }
    }
  }
}

// s = the rows' left factor times all prototypes.
template <int PANELS, int F, bool together>
__device__ __forceinline__ void multiply_rows(const unsigned char* parts, const unsigned (&high)[PANELS * 4][4],
                                              const unsigned (&low)[PANELS * 4][4], float (&s)[F][4]) {
  if constexpr (together) {
#if defined(PK_HOPPER)
    constexpr int PANEL_BYTES = F * 8 * 128;
    const uint64_t descriptor = pk::matrix_descriptor(parts);
    pk::begin_products();
#pragma unroll
    for (int step = 0; step < PANELS * 4; ++step) {
      const uint64_t q_high = descriptor + (step / 4 * PANEL_BYTES + step % 4 * 32) / 16, q_low = q_high + PANELS * PANEL_BYTES / 16;
      pk::warpgroup_multiply(s, low[step], q_high, step > 0);
      pk::warpgroup_multiply(s, high[step], q_low, true);
      pk::warpgroup_multiply(s, high[step], q_high, true);
    }
    pk::end_products(s);
#endif
  } else {
    constexpr int GROUP = 4;
    const uint4* const fragments = reinterpret_cast<const uint4*>(parts) + threadIdx.x % 32;
#pragma unroll
    for (int f = 0; f < F; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[f][i] = 0;
#pragma unroll
    for (int step = 0; step < PANELS * 4; ++step)
#pragma unroll
      for (int f = 0; f < F; f += GROUP) {
        unsigned q_high[GROUP][2], q_low[GROUP][2];
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
          const uint4 of = pk::load_vector<uint4>(fragments + (step * F + f + g) * 32);
          q_high[g][0] = of.x, q_high[g][1] = of.y, q_low[g][0] = of.z, q_low[g][1] = of.w;
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(s[f + g], low[step], q_high[g]);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(s[f + g], high[step], q_low[g]);
#pragma unroll
        for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(s[f + g], high[step], q_high[g]);
      }
  }
}

#if defined(PK_HOPPER)
constexpr bool TOGETHER_COMPILED = true;
#else
constexpr bool TOGETHER_COMPILED = false;
#endif

// The fragments of sixteen rows are 128 registers where K > 128, the values they come from 128 more.
// resources: spills at most 432 bytes (sm_90 and sm_100)
// resources: dynamic shared 132096 bytes
template <class Z, int PANELS, int F, bool together, bool plain>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Backward<Z> p) {
  if constexpr (together ? TOGETHER_COMPILED : !TOGETHER_COMPILED || F < 16) {  // the other is never launched
    constexpr int STEPS = PANELS * 4;
    PK_SHARED(float, factor, PANELS* PANEL);
    PK_SHARED(double, warp_along, WARPS);
    PK_DYNAMIC_SHARED(unsigned char, memory);
    unsigned char* parts = memory;
    if constexpr (together) parts += (1024 - reinterpret_cast<uintptr_t>(memory) % 1024) % 1024;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    prepare_transposed<PANELS, F, together>(p, parts, factor);
    const float inverse_t = static_cast<float>(1.0 / (p.temperature_pointer ? static_cast<double>(*p.temperature_pointer) : p.temperature));
#if defined(PK_HOPPER)
    if constexpr (together) pk::publish_to_tensor_cores();
#endif
    __syncthreads();

    double sum = 0;
    for (int64_t t = static_cast<int64_t>(warp / 4) * gridDim.x + blockIdx.x; t < p.tiles;
         t += static_cast<int64_t>(gridDim.x) * (WARPS / 4)) {
      const int64_t first = t * GROUP_ROWS + warp % 4 * TILE + lane / 4, second = first + 8;
      unsigned high[STEPS][4], low[STEPS][4];
      Scale scale[2];
      float ds[STEPS][4];
      const Length first_length = length_of<F>(p, p.z + first * p.z_stride, first < p.B);
      score_gradients<STEPS, plain>(p, first, first_length.scale.up * first_length.factor, ds);
      scale[0] = split_gradients<STEPS, 0>(ds, factor, high, low);
      __syncwarp();  // the loads of the second row begin here: registers do not do for both
      const Length second_length = length_of<F>(p, p.z + second * p.z_stride, second < p.B);
      score_gradients<STEPS, plain>(p, second, second_length.scale.up * second_length.factor, ds);
      scale[1] = split_gradients<STEPS, 1>(ds, factor, high, low);
      float s[F][4];
      multiply_rows<PANELS, F, together>(parts, high, low, s);
      const bool has_first = first < p.B, has_second = second < p.B;
      const float first_along = finish_row<F, 0>(p, first, has_first, first_length, scale[0].down * inverse_t, s);
      const float second_along = finish_row<F, 1>(p, second, has_second, second_length, scale[1].down * inverse_t, s);
      if (lane % 4 == 0)
        sum += (has_first ? static_cast<double>(first_along) : 0.0) + (has_second ? static_cast<double>(second_along) : 0.0);
    }
    sum = warp_sum(sum);
    if (lane == 0) warp_along[warp] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < WARPS; ++w) sum += warp_along[w];
    p.temperature_parts[blockIdx.x] = sum;
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class Z, int PANELS, int F, bool plain>
int launch_kernel(const Backward<Z>& backward, void* stream) {
  const dim3 blocks(static_cast<unsigned>(prototypes_backward_blocks(backward.B)));
  constexpr std::size_t bytes = PANELS * F * 2048;
  if constexpr (F == 16)
    if (pk::warpgroup_products(backward_kernel<Z, 4, 16, true, true>))
      return PK_LAUNCH((backward_kernel<Z, PANELS, F, true, plain>), blocks, dim3(THREADS), bytes + 1024, stream, backward);
  return PK_LAUNCH((backward_kernel<Z, PANELS, F, false, plain>), blocks, dim3(THREADS), bytes, stream, backward);
}

template <class Z, int PANELS, int F>
int launch_rows(const Backward<Z>& backward, void* stream) {
  return backward.k_aligned && !backward.grad_entropy ? launch_kernel<Z, PANELS, F, true>(backward, stream)
                                                      : launch_kernel<Z, PANELS, F, false>(backward, stream);
}

template <class Z>
int backward_rows(const PrototypesBackward& p, const PrototypesBackwardRows& rows, void* stream) {
  const Backward<Z> backward{p.B,
                             (p.B + GROUP_ROWS - 1) / GROUP_ROWS,
                             static_cast<int>(p.K),
                             static_cast<int>(p.D),
                             static_cast<int>(rows.weights_stride),
                             p.z_stride,
                             static_cast<const Z*>(p.z),
                             static_cast<const float*>(p.prototypes),
                             static_cast<const float*>(p.temperature_pointer),
                             p.temperature,
                             p.cosine,
                             aligned_rows(p.assignment, p.K, p.K, 4, 16) && aligned_rows(p.grad_assignment, p.K, p.K, 4, 16),
                             aligned_rows(p.z, p.z_stride, p.D, sizeof(Z), sizeof(Z) == 2 ? 8 : 16),
                             static_cast<const float*>(p.assignment),
                             static_cast<const float*>(p.grad_assignment),
                             static_cast<const float*>(p.grad_entropy),
                             static_cast<Z*>(p.grad_z),
                             p.grad_prototypes ? rows.weights : nullptr,
                             rows.temperatures};
  return rows.weights_stride == PANEL       ? p.D <= 64 ? launch_rows<Z, 1, 8>(backward, stream) : launch_rows<Z, 1, 16>(backward, stream)
         : rows.weights_stride == 2 * PANEL ? launch_rows<Z, 2, 16>(backward, stream)
                                            : launch_rows<Z, 4, 16>(backward, stream);
}

}  // namespace
