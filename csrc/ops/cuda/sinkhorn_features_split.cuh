// SPDX-License-Identifier: MIT
// Vectors of up to 128 dimensions as pairs of half-precision numbers, and their products by tensor cores.
//
// A vector is multiplied by a power of two that brings its largest element to 2^14 (cosine: its length) and written as high + low, 11 bits
// each; three products, high high + high low + low high, leave out 2^-22 of a term, as three tf32 products do, at twice their speed. What
// is too small for half precision is below 2^-38 of the largest element. split_kernel does this once per call.
//
// In memory 16 dimensions of a vector are 64 bytes: for each of the 4 threads that share a row of a fragment, high (2m, 2m + 1),
// high (2m + 8, 2m + 9), low the same. Odd vectors have these units exchanged in pairs, so that a warp's 16-byte reads touch all banks.
#pragma once

#include "ops/cuda/sinkhorn_features.cuh"

namespace {

constexpr int PAD = 64;  // vectors per side are filled up to a multiple

// One side. Padding: vectors of zeros whose bias is -infinity.
struct SplitSide {
  int count, padded;
  const float* vectors;  // [B, count, D]
  const float* norms;    // [B, count], as Vectors
  uint4* split;          // [B, padded, STEPS, 4]
  float2* terms;         // [B, padded]: bias (log2 e times potential over epsilon, less the square norm's share), scale of the products
};

__device__ __forceinline__ unsigned pack_halves(float low, float high) {
  return __half_as_ushort(__float2half_rn(low)) | static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
}
__device__ __forceinline__ float rest_of_half(float x) { return x - __half2float(__float2half_rn(x)); }

__host__ __device__ constexpr int unit_place(int vector, int step, int steps) { return steps > 1 ? step ^ (vector & 1) : step; }

// What a vector is multiplied by, found by its warp.
struct Scaling {
  float norm;           // as Vectors
  float power, factor;  // factor: power, for the cosine over the length

  __device__ __forceinline__ Scaling(const float* x, int D, bool cosine) {
    float squares = 0, largest = 0;
    for (int d = threadIdx.x % 32; d < D; d += 32) squares += x[d] * x[d], largest = larger(largest, magnitude(x[d]));
    squares = warp_sum(squares);
    largest = warp_larger(largest);
    constexpr float floor = static_cast<float>(SINKHORN_NORM_FLOOR * SINKHORN_NORM_FLOOR);
    norm = !cosine ? squares : squares <= floor ? 0.0f : rsqrt(squares);
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127, bounded = exponent < -112 ? -112 : exponent;
    power = __uint_as_float(static_cast<unsigned>(cosine ? 14 + 127 : 14 - bounded + 127) << 23);
    factor = cosine ? norm * power : power;
  }
};

// A warp per vector.
template <int STEPS>
__global__ void __launch_bounds__(STREAM_THREADS) split_kernel(int64_t total, int D, bool cosine, const SplitSide side, float* norms) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * STREAM_WARPS + threadIdx.x / 32;
  if (at >= total) return;
  const int64_t b = at / side.padded, i = at % side.padded;
  const int lane = threadIdx.x % 32;
  const bool there = i < side.count;
  const float* const x = side.vectors + (b * side.count + (there ? i : 0)) * D;
  const Scaling scaling(x, there ? D : 0, cosine);
  if (lane < STEPS * 4) {
    const int step = lane / 4, d = step * 16 + lane % 4 * 2;
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int place = d + k / 2 * 8 + k % 2;
      v[k] = there && place < D ? x[place] * scaling.factor : 0.0f;
    }
    const uint4 unit{pack_halves(v[0], v[1]), pack_halves(v[2], v[3]), pack_halves(rest_of_half(v[0]), rest_of_half(v[1])),
                     pack_halves(rest_of_half(v[2]), rest_of_half(v[3]))};
    pk::store_vector(side.split + (at * STEPS + unit_place(static_cast<int>(i), step, STEPS)) * 4 + lane % 4, unit);
  }
  if (lane != 0) return;
  side.terms[at] = float2{-INFINITY, 1.0f / scaling.power};
  if (there) norms[b * side.count + i] = scaling.norm;
}

// A warp's rows: FRAGMENTS times 16, in registers.
template <int STEPS, int FRAGMENTS>
struct RowFragments {
  unsigned high[FRAGMENTS][STEPS][4], low[FRAGMENTS][STEPS][4];

  // From row `first` of a problem on; what lies beyond it repeats its last vector.
  __device__ __forceinline__ void load(const SplitSide& side, int64_t b, int first) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + m * 16 + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4, i = row < side.padded ? row : side.padded - 1;
        const uint4* const units = side.split + (b * side.padded + i) * STEPS * 4 + threadIdx.x % 4;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
          const uint4 unit = pk::load_vector<uint4>(units + unit_place(i, s, STEPS) * 4);
          high[m][s][h] = unit.x, high[m][s][h + 2] = unit.y, low[m][s][h] = unit.z, low[m][s][h + 2] = unit.w;
        }
      }
  }
};

// Products with COLUMNS times 8 vectors in shared memory; d[c][m] as a fragment of mma.
template <int STEPS, int FRAGMENTS, int COLUMNS>
__device__ __forceinline__ void multiply_columns(const RowFragments<STEPS, FRAGMENTS>& rows, const uint4* columns,
                                                 float (&d)[COLUMNS][FRAGMENTS][4]) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
      for (int k = 0; k < 4; ++k) d[c][m][k] = 0;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    unsigned high[COLUMNS][2], low[COLUMNS][2];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const uint4 unit = pk::load_vector<uint4>(columns + ((c * 8 + group) * STEPS + unit_place(group, s, STEPS)) * 4 + member);
      high[c][0] = unit.x, high[c][1] = unit.y, low[c][0] = unit.z, low[c][1] = unit.w;
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) pk::mma_m16n8k16_f16(d[c][m], rows.low[m][s], high[c]);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) pk::mma_m16n8k16_f16(d[c][m], rows.high[m][s], low[c]);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) pk::mma_m16n8k16_f16(d[c][m], rows.high[m][s], high[c]);
  }
}

}  // namespace
