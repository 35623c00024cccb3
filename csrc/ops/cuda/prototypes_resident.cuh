// SPDX-License-Identifier: MIT
// A warp's share of prototypes_resident.cu: rows, prototypes, and products of float accuracy from the fp16 tensor cores.
//
// A float is scaled by a power of two and split into two fp16 numbers, x 2^s = high + low; high high + high low + low high is the product to 2^-22.
// The scale takes the largest value of a row to [2^14, 2^15): values down to 2^-17 of it keep all their bits, smaller ones are exact to 2^-39 of it.
// fp16 runs at twice the rate of tf32 for the same 11 bits.
//
// Fragments (common/simt.cuh) fix which lane holds which element, but not what an index means. The sixteen k of a step are renamed so that a lane
// reads four neighbours: k = 2 m, 2 m + 1, 2 m + 8, 2 m + 9 are dimensions 4 m ... 4 m + 3. The columns of two fragments are renamed so that a lane
// ends with four neighbouring prototypes, 16 bytes of the assignment: fragment 2 p + h, column 2 m + i is prototype 16 p + 4 m + 2 h + i.
#pragma once

#include "ops/cuda/prototypes_sums.cuh"

namespace {

constexpr int TILE = 16;      // rows of z a warp has at a time
constexpr int MAX_WARPS = 8;  // of a block

__device__ __forceinline__ unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
constexpr unsigned INFINITE_BITS = 0x7f800000u;

// Powers of two that take a row to [2^14, 2^15) and back, from the bits of its largest magnitude. Rows below 2^-112 stay below 2^14, which loses
// nothing: their last bit is 2^-149.
struct Scale {
  float up, down;
};
__device__ __forceinline__ Scale scale_of(unsigned largest) {
  const unsigned exponent = min(max(largest >> 23, 15u), 254u);
  return {__uint_as_float((268u - exponent) << 23), __uint_as_float((exponent - 14u) << 23)};
}

// 1 / |x| for a row of scaled values x = row * scale.up; 0 for a row that counts as zero.
__device__ __forceinline__ float inverse_norm(float squared, Scale scale) {
  const float norm = sqrtf(squared);
  return norm * scale.down <= static_cast<float>(PROTOTYPE_NORM_FLOOR) ? 0.0f : 1.0f / norm;
}

// Two values as pairs of fp16 numbers, high + low.
__device__ __forceinline__ void split(float x, float y, unsigned& high, unsigned& low) {
  high = pk::pack_f16(x, y);
  low = pk::pack_f16(x - half_at(high, 0), y - half_at(high, 16));
}

template <class V>
__device__ __forceinline__ V quad_sum(V x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ unsigned quad_max(unsigned x) {
  x = max(x, __shfl_xor_sync(ALL, x, 1));
  return max(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ __forceinline__ int quad_min(int x) {
  x = min(x, __shfl_xor_sync(ALL, x, 1));
  return min(x, __shfl_xor_sync(ALL, x, 2));
}

template <class Z>
struct Resident {
  int64_t B, tiles;
  int K, D;
  int steps;    // of 16 dimensions
  int stride;   // elements of Z between rows of a tile in shared memory
  int buffers;  // tiles of a warp in shared memory: 2 where sums are made on the way
  int64_t z_stride;
  const Z* z;               // [B, D]
  const float* prototypes;  // [K, D]
  const float* temperature_pointer;
  double temperature;
  bool cosine, skip_nonfinite, z_aligned, q_aligned;
  const float* uniform;  // [B] or null
  float* assignment;     // [B, K]
  int64_t* labels;       // [B] or null
  float* entropy;        // [B] or null
  double* partial_sums;  // [blocks, K, D] or null: sums are made elsewhere
  int* partial_counts;   // [blocks, K]
};

template <class Z>
Resident<Z> resident_of(const PrototypesForward& p, int64_t tiles, int steps, int stride, int buffers, double* partial_sums,
                        int* partial_counts) {
  return {p.B,
          tiles,
          static_cast<int>(p.K),
          static_cast<int>(p.D),
          steps,
          stride,
          buffers,
          p.z_stride,
          static_cast<const Z*>(p.z),
          static_cast<const float*>(p.prototypes),
          static_cast<const float*>(p.temperature_pointer),
          p.temperature,
          p.cosine,
          p.skip_nonfinite,
          aligned_rows(p.z, p.z_stride, p.D, sizeof(Z), 16),
          aligned_rows(p.prototypes, p.D, p.D, sizeof(float), 16),
          p.uniform,
          static_cast<float*>(p.assignment),
          p.labels,
          static_cast<float*>(p.entropy),
          partial_sums,
          partial_counts};
}

// ----------------------------------------------------------------------------------------------------------------- prototypes

// Splits the prototypes into fragments [steps, F, 32] of (high, high, low, low) and, for each column, a factor that undoes the scale (and
// normalises) and a bias: 0, or -infinity where there is no prototype.
template <int F, class Z>
__device__ __forceinline__ void prepare_prototypes(const Resident<Z>& p, uint4* fragments, float* factor, float* bias) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = lane % 4, column = lane / 4;
  for (int f = warp; f < F; f += blockDim.x / 32) {
    const int k = f / 2 * 16 + column / 2 * 4 + f % 2 * 2 + column % 2;
    const float* const q = p.prototypes + static_cast<int64_t>(k) * p.D;
    const auto read = [&](int step, float (&x)[4]) {
      const int d = step * 16 + member * 4;
      if (p.q_aligned && k < p.K && d < p.D) return load_four(q + d, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = k < p.K && d + i < p.D ? q[d + i] : 0.0f;
    };
    unsigned largest = 0;
#pragma unroll 8
    for (int step = 0; step < p.steps; ++step) {
      float x[4];
      read(step, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(x[i]));
    }
    const Scale scale = scale_of(quad_max(largest));
    float squared = 0;
#pragma unroll 4
    for (int step = 0; step < p.steps; ++step) {
      float x[4];
      read(step, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= scale.up, squared += x[i] * x[i];
      uint4 parts;
      split(x[0], x[1], parts.x, parts.z);
      split(x[2], x[3], parts.y, parts.w);
      pk::store_vector(fragments + (step * F + f) * 32 + lane, parts);
    }
    squared = quad_sum(squared);
    if (member == 0) {
      factor[k] = p.cosine ? inverse_norm(squared, scale) : scale.down;
      bias[k] = k < p.K ? 0.0f : -INFINITY;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------ rows

// Starts the copy of a tile into shared memory: zeros behind the last dimension and the last row.
template <class Z>
__device__ __forceinline__ void copy_tile(const Resident<Z>& p, int64_t row0, Z* tile) {
  const int lane = threadIdx.x % 32, width = p.steps * 16;
  const int rows = p.B - row0 < TILE ? static_cast<int>(p.B - row0) : TILE;
  const Z* const z = p.z + row0 * p.z_stride;
  const int piece = p.z_aligned ? 16 / static_cast<int>(sizeof(Z)) : 1, pieces = width / piece;  // of a row
  const int row_step = 32 / pieces, column_step = 32 % pieces;
  int row = lane / pieces, column = lane % pieces;
  while (row < TILE) {
    const int d = column * piece;
    const bool valid = row < rows && d < p.D;
    const Z* const from = valid ? z + row * p.z_stride + d : p.z;
    Z* const to = tile + row * p.stride + d;
    if (p.z_aligned)
      pk::copy_async_16(to, from, valid);
    else
      *to = valid ? *from : Z(0.0f);
    column += column_step;
    row += row_step + (column >= pieces);
    if (column >= pieces) column -= pieces;
  }
  pk::copy_async_commit();
}

struct RowPair {  // rows lane / 4 and lane / 4 + 8 of a tile
  Scale scale[2];
  float factor[2];
  bool finite[2];
};

template <class Z>
__device__ __forceinline__ RowPair measure_rows(const Resident<Z>& p, const Z* tile) {
  const int lane = threadIdx.x % 32;
  const Z* const row = tile + lane / 4 * p.stride + lane % 4 * 4;
  unsigned largest[2] = {};
  float squared[2] = {};
#pragma unroll 4
  for (int step = 0; step < p.steps; ++step)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[4];
      load_four(row + r * 8 * p.stride + step * 16, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[r] = max(largest[r], magnitude_bits(x[i]));
    }
  RowPair rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = quad_max(largest[r]);
    rows.scale[r] = scale_of(largest[r]);
    rows.finite[r] = largest[r] < INFINITE_BITS;
    rows.factor[r] = rows.scale[r].down;
  }
  if (!p.cosine) return rows;
#pragma unroll 4
  for (int step = 0; step < p.steps; ++step)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[4];
      load_four(row + r * 8 * p.stride + step * 16, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) squared[r] += x[i] * rows.scale[r].up * (x[i] * rows.scale[r].up);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.factor[r] = inverse_norm(quad_sum(squared[r]), rows.scale[r]);
  return rows;
}

// ------------------------------------------------------------------------------------------------------------------- products

// sum [F][4] += the tile times all prototypes, in scaled units.
template <class Z, int F>
__device__ __forceinline__ void multiply(const Resident<Z>& p, const Z* tile, const RowPair& rows, const uint4* fragments,
                                         float (&sum)[F][4]) {
  constexpr int GROUP = F == 2 || F == 16 ? 2 : 4;  // at 16 the registers of two blocks would not do for more
  const int lane = threadIdx.x % 32;
  const Z* const row = tile + lane / 4 * p.stride + lane % 4 * 4;
  for (int step = 0; step < p.steps; ++step) {
    unsigned high[4], low[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[4];
      load_four(row + r * 8 * p.stride + step * 16, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= rows.scale[r].up;
      split(x[0], x[1], high[r], low[r]);
      split(x[2], x[3], high[r + 2], low[r + 2]);
    }
    const uint4* const q = fragments + step * F * 32 + lane;
#pragma unroll
    for (int f = 0; f < F; f += GROUP) {
      unsigned q_high[GROUP][2], q_low[GROUP][2];
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        const uint4 parts = pk::load_vector<uint4>(q + (f + g) * 32);
        q_high[g][0] = parts.x, q_high[g][1] = parts.y, q_low[g][0] = parts.z, q_low[g][1] = parts.w;
      }
#pragma unroll
      for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(sum[f + g], low, q_high[g]);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(sum[f + g], high, q_low[g]);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) pk::mma_m16n8k16_f16(sum[f + g], high, q_high[g]);
    }
  }
}

}  // namespace
