// SPDX-License-Identifier: MIT
// A scaled kernel held once in the registers of a block; what its functions do stands in sinkhorn_scaled.cuh.
#pragma once

#include "ops/cuda/sinkhorn_scaled.cuh"

namespace {

// Up to 16 R x 16 C. 16 x 16 threads with R x C entries each, held once: rows g R + r and columns 16 c + q. A warp has two groups g, whose
// row sums meet in shared memory that nobody else uses; column sums meet over all groups.
template <int R, int C>
struct Grid {
  static constexpr int THREADS = 256, GROUPS = 16, ROWS = GROUPS * R, COLUMNS = 16 * C, SIDE = ROWS > COLUMNS ? ROWS : COLUMNS;
  static constexpr int LINE = 20, GROUP = 16 * LINE + 16;  // floats of a line of up to 16, of a group: vectors without bank conflicts
  static_assert(R <= 16 && C <= 16);
  struct Shared {
    float exchange[GROUPS * GROUP];  // [R, LINE] by row and lane, then [16, LINE] by lane and column, for every group
    float row_weight[GROUPS * 16], column_weight[16 * LINE];
    float row_base[ROWS], column_base[COLUMNS];
  };
  Shared& shared;
  const int N, M, q, g, place;  // place: of the own column in a line of columns
  const float inverse_epsilon;
  const float* const cost;  // [N, M]
  int own_row, own_column;
  float k[R][C];

  __device__ __forceinline__ Grid(Shared& memory, int rows, int columns, const float* costs, float epsilon)
      : shared(memory),
        N(rows),
        M(columns),
        q(threadIdx.x % 16),
        g(threadIdx.x / 16),
        place(place_of(threadIdx.x)),
        inverse_epsilon(1.0f / epsilon),
        cost(costs + static_cast<int64_t>(blockIdx.x) * rows * columns),
        own_row(q < R ? g * R + q : ROWS),
        own_column(place % LINE < C ? place % LINE * 16 + place / LINE : COLUMNS) {
    for (int x = threadIdx.x; x < 16 * LINE; x += THREADS) shared.column_weight[x] = 0;
  }
  __device__ __forceinline__ bool speaks_for_row() const { return own_row < N; }
  __device__ __forceinline__ bool speaks_for_column() const { return own_column < M; }
  __device__ __forceinline__ float cost_at(int i, int j) const { return i < N && j < M ? cost[i * M + j] : INFINITY; }

  __device__ __forceinline__ void fill() {
#pragma unroll  // all of them in flight
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) k[r][c] = cost_at(g * R + r, 16 * c + q);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float base = shared.column_base[16 * c + q];
#pragma unroll
      for (int r = 0; r < R; ++r) k[r][c] = scaled(base, k[r][c], inverse_epsilon);
    }
  }
  __device__ __forceinline__ float row_top() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float top = k[r][0];
#pragma unroll
      for (int c = 1; c < C; ++c) top = fmaxf(top, k[r][c]);
      put_part(r, top);
    }
    return over_lanes<true>();
  }
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float base = shared.row_base[g * R + r];
#pragma unroll
      for (int c = 0; c < C; ++c) k[r][c] = expf(k[r][c] + base);
    }
  }
  __device__ __forceinline__ float row_product() {
    float z[(C + 3) / 4 * 4];
#pragma unroll
    for (int c = 0; c < C; c += 4) {
      const float4 x = pk::load_vector<float4>(shared.column_weight + q * LINE + c);
      z[c] = x.x, z[c + 1] = x.y, z[c + 2] = x.z, z[c + 3] = x.w;
    }
#pragma unroll
    for (int r = 0; r < R; r += 4) {  // four sums at a time hide each other's latency
      float sum[4] = {};
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int d = 0; d < 4; ++d)
          if (r + d < R) sum[d] += k[r + d][c] * z[c];
#pragma unroll
      for (int d = 0; d < 4; ++d)
        if (r + d < R) put_part(r + d, sum[d]);
    }
    return over_lanes<false>();
  }
  __device__ __forceinline__ void put_row(float weight) {
    shared.row_weight[g * 16 + q] = weight;
    __syncwarp();
  }
  __device__ __forceinline__ float column_product() {
    float sum[C] = {};
#pragma unroll
    for (int r = 0; r < R; r += 4) {
      const float4 x = pk::load_vector<float4>(shared.row_weight + g * 16 + r);
      const float w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int d = 0; d < 4; ++d)
        if (r + d < R)
#pragma unroll
          for (int c = 0; c < C; ++c) sum[c] += w[d] * k[r + d][c];
    }
    float* const line = shared.exchange + g * GROUP + q * LINE;
#pragma unroll
    for (int c = 0; c < C; c += 4) {
      if (c + 4 <= C)
        pk::store_vector(line + c, make_float4(sum[c], sum[c + 1], sum[c + 2], sum[c + 3]));
      else
#pragma unroll
        for (int d = c; d < C; ++d) line[d] = sum[d];
    }
    return over_groups<false>();
  }
  __device__ __forceinline__ void put_column(float weight) {
    if (own_column < COLUMNS) shared.column_weight[place] = weight;
    __syncthreads();
  }
  __device__ __forceinline__ void put_row_base(float base) {
    if (q < R) shared.row_base[own_row] = base;
    __syncthreads();
  }
  __device__ __forceinline__ void put_column_base(float base) {
    if (own_column < COLUMNS) shared.column_base[own_column] = base;
    __syncthreads();
  }
  __device__ __forceinline__ float row_log_sum() {
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int c = 0; c < C; ++c) top = fmaxf(top, exponent(shared.column_base[16 * c + q], r, c));
      put_part(r, top);
    }
    const float most = over_lanes<true>(), shift = most == -INFINITY ? 0.0f : most;
    put_row(shift);
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
      const float of_row = shared.row_weight[g * 16 + r];
      float sum = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) sum += expf(exponent(shared.column_base[16 * c + q], r, c) - of_row);
      put_part(r, sum);
    }
    return shift + logf(over_lanes<false>());
  }
  __device__ __forceinline__ float column_log_sum() {
    float* const line = shared.exchange + g * GROUP + q * LINE;
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      float top = -INFINITY;
#pragma unroll
      for (int r = 0; r < R; ++r) top = fmaxf(top, exponent(shared.row_base[g * R + r], r, c));
      line[c] = top;
    }
    const float most = over_groups<true>(), shift = most == -INFINITY ? 0.0f : most;
    put_column(shift);
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      const float of_column = shared.column_weight[q * LINE + c];
      float sum = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) sum += expf(exponent(shared.row_base[g * R + r], r, c) - of_column);
      line[c] = sum;
    }
    return shift + logf(over_groups<false>());
  }
  template <class Action>
  __device__ __forceinline__ void each(const Action& action) const {
    float z[C], v[C];
#pragma unroll
    for (int c = 0; c < C; ++c) z[c] = shared.column_weight[q * LINE + c], v[c] = shared.column_base[16 * c + q];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float w = shared.row_weight[g * 16 + r], u = shared.row_base[g * R + r];
#pragma unroll
      for (int c = 0; c < C; ++c) action(w * k[r][c] * z[c], u, v[c], cost_at(g * R + r, 16 * c + q));
    }
  }

 private:
  // 16 threads per line of columns; the two lines of a warp lie 4 apart, in other banks.
  static __device__ __forceinline__ int place_of(int thread) {
    const int warp = thread / 32;
    return (warp / 4 * 8 + warp % 4 + thread / 16 % 2 * 4) * LINE + thread % 16;
  }
  __device__ __forceinline__ float exponent(float base, int r, int c) const {
    return scaled(base, cost_at(g * R + r, 16 * c + q), inverse_epsilon);
  }
  __device__ __forceinline__ void put_part(int r, float part) { shared.exchange[g * GROUP + r * LINE + q] = part; }
  // What the 16 lanes have put for the own row.
  template <bool maximum>
  __device__ __forceinline__ float over_lanes() const {
    __syncwarp();
    float total[4];
#pragma unroll
    for (int lane = 0; lane < 16; lane += 4) {
      const float4 x = pk::load_vector<float4>(shared.exchange + g * GROUP + (q < R ? q : R - 1) * LINE + lane);
      const float part[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int d = 0; d < 4; ++d) total[d] = lane == 0 ? part[d] : maximum ? fmaxf(total[d], part[d]) : total[d] + part[d];
    }
    if (maximum) return fmaxf(fmaxf(total[0], total[1]), fmaxf(total[2], total[3]));
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
  // What the groups have put for the own column.
  template <bool maximum>
  __device__ __forceinline__ float over_groups() const {
    __syncthreads();
    float total[4] = {};
    if (own_column < COLUMNS)
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        const float part = shared.exchange[group * GROUP + place];
        total[group % 4] = group < 4 ? part : maximum ? fmaxf(total[group % 4], part) : total[group % 4] + part;
      }
    if (maximum) return fmaxf(fmaxf(total[0], total[1]), fmaxf(total[2], total[3]));
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
};

}  // namespace
