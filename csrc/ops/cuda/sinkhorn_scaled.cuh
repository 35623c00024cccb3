// SPDX-License-Identifier: MIT
// Two ways to lay a scaled kernel K over the registers of a block: Twice, and Grid (sinkhorn_grid.cuh). Both give a thread at most one row
// and one column to look after (own_row, own_column; speaks_for_*: nobody else has it), whose weights, potentials and masses it keeps.
//
//   fill()               k = column_base_j - C_ij / eps, -infinity outside of the problem
//   row_top()            max_j k_ij of the own row
//   exponentiate()       k = exp(k + row_base_i)
//   row_product()        (K z)_i of the own row; put_row(w): the weight that the columns will see
//   column_product()     (K^T w)_j of the own column; put_column(z)
//   row_log_sum(), column_log_sum()     log sum exp(base of the other side - C / eps)
//   each(action)         action(w_i K_ij z_j, base of row, base of column, C_ij) for the entries of a thread
//
// A barrier stands before whatever reads what another thread has put; the bases are the caller's to guard.
#pragma once

#include "ops/cuda/sinkhorn_forward.cuh"

namespace {

__device__ __forceinline__ float scaled(float base, float cost, float inverse_epsilon) { return base - cost * inverse_epsilon; }

// Up to SIDE x SIDE. Groups of P lanes with R rows and R columns each, LINES in all; K is held twice, by rows and by columns, so that a
// product needs the weights from shared memory and log2 P shuffles. Lane part of a group has the entries 4 (P t + part) + c, c < 4, of its
// rows (columns).
template <int LINES_, int SIDE_, int R, int P>
struct Twice {
  static constexpr int LINES = LINES_, SIDE = SIDE_, THREADS = LINES / R * P, CHUNKS = SIDE / (4 * P), STRIDE = LINES + 1;
  static_assert(SIDE <= LINES && SIDE % (4 * P) == 0 && R <= P && THREADS % 32 == 0);
  struct Shared {
    float cost[LINES * STRIDE];
    float row_weight[LINES], column_weight[LINES], row_base[LINES], column_base[LINES];
  };
  Shared& shared;
  const int N, M, part, first;
  const float inverse_epsilon;
  int own_row, own_column;
  float by_rows[R][4 * CHUNKS], by_columns[R][4 * CHUNKS];

  __device__ __forceinline__ Twice(Shared& memory, int rows, int columns, const float* costs, float epsilon)
      : shared(memory), N(rows), M(columns), part(threadIdx.x % P), first(threadIdx.x / P * R), inverse_epsilon(1.0f / epsilon) {
    int own = 0;
#pragma unroll
    for (int step = 1, half = R / 2; half > 0; step *= 2, half /= 2) own += part & step ? half : 0;
    own_row = own_column = first + own;
    const float* const cost = costs + static_cast<int64_t>(blockIdx.x) * N * M;
    constexpr int WIDTH = THREADS < LINES ? THREADS : LINES;
#pragma unroll  // all of them in flight
    for (int x = 0; x < LINES * LINES / THREADS; ++x) {
      const int i = threadIdx.x / WIDTH + x / (LINES / WIDTH) * (THREADS / WIDTH), j = threadIdx.x % WIDTH + x % (LINES / WIDTH) * WIDTH;
      shared.cost[i * STRIDE + j] = i < N && j < M ? cost[i * M + j] : INFINITY;
    }
  }
  __device__ __forceinline__ bool speaks_for_row() const { return part < R && own_row < N; }
  __device__ __forceinline__ bool speaks_for_column() const { return part < R && own_column < M; }
  __device__ __forceinline__ int across(int t) const { return (t * P + part) * 4; }

  __device__ __forceinline__ void fill() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int t = 0; t < CHUNKS; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int own = first + r, other = across(t) + c;
          by_rows[r][4 * t + c] = scaled(shared.column_base[other], shared.cost[own * STRIDE + other], inverse_epsilon);
          by_columns[r][4 * t + c] = scaled(shared.column_base[own], shared.cost[other * STRIDE + own], inverse_epsilon);
        }
  }
  __device__ __forceinline__ float row_top() const {
    float top[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      top[r] = by_rows[r][0];
#pragma unroll
      for (int x = 1; x < 4 * CHUNKS; ++x) top[r] = fmaxf(top[r], by_rows[r][x]);
    }
    return reduce(top, [](float x, float y) { return fmaxf(x, y); });
  }
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int t = 0; t < CHUNKS; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          by_rows[r][4 * t + c] = expf(by_rows[r][4 * t + c] + shared.row_base[first + r]);
          by_columns[r][4 * t + c] = expf(by_columns[r][4 * t + c] + shared.row_base[across(t) + c]);
        }
  }
  __device__ __forceinline__ float row_product() const { return product(by_rows, shared.column_weight); }
  __device__ __forceinline__ float column_product() const { return product(by_columns, shared.row_weight); }
  __device__ __forceinline__ void put_row(float weight) {
    if (part < R) shared.row_weight[own_row] = weight;
    __syncthreads();
  }
  __device__ __forceinline__ void put_column(float weight) {
    if (part < R) shared.column_weight[own_column] = weight;
    __syncthreads();
  }
  __device__ __forceinline__ void put_row_base(float base) {
    if (part < R) shared.row_base[own_row] = base;
    __syncthreads();
  }
  __device__ __forceinline__ void put_column_base(float base) {
    if (part < R) shared.column_base[own_column] = base;
    __syncthreads();
  }
  __device__ __forceinline__ float row_log_sum() const {
    return log_sum(shared.column_base, [this](int own, int other) { return shared.cost[own * STRIDE + other]; });
  }
  __device__ __forceinline__ float column_log_sum() const {
    return log_sum(shared.row_base, [this](int own, int other) { return shared.cost[other * STRIDE + own]; });
  }
  template <class Action>
  __device__ __forceinline__ void each(const Action& action) const {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int x = 0; x < 4 * CHUNKS; ++x) {
        const int i = first + r, j = across(x / 4) + x % 4;
        action(shared.row_weight[i] * by_rows[r][x] * shared.column_weight[j], shared.row_base[i], shared.column_base[j],
               shared.cost[i * STRIDE + j]);
      }
  }

 private:
  // Of R values over the lanes of a group: the one of the own row.
  template <class Combine>
  __device__ __forceinline__ float reduce(float (&value)[R], const Combine& combine) const {
    int step = 1;
#pragma unroll
    for (int half = R / 2; half > 0; half /= 2, step *= 2)
#pragma unroll
      for (int r = 0; r < half; ++r) {
        const bool upper = part & step;
        value[r] = combine(upper ? value[r + half] : value[r], __shfl_xor_sync(ALL, upper ? value[r] : value[r + half], step));
      }
#pragma unroll
    for (; step < P; step *= 2) value[0] = combine(value[0], __shfl_xor_sync(ALL, value[0], step));
    return value[0];
  }
  __device__ __forceinline__ float product(const float (&k)[R][4 * CHUNKS], const float* weights) const {
    float sum[R][4] = {}, total[R];
#pragma unroll
    for (int t = 0; t < CHUNKS; ++t) {
      const float4 x = pk::load_vector<float4>(weights + across(t));
#pragma unroll
      for (int r = 0; r < R; ++r) {
        sum[r][0] += k[r][4 * t] * x.x;
        sum[r][1] += k[r][4 * t + 1] * x.y;
        sum[r][2] += k[r][4 * t + 2] * x.z;
        sum[r][3] += k[r][4 * t + 3] * x.w;
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) total[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
    return reduce(total, [](float x, float y) { return x + y; });
  }
  template <class Cost>
  __device__ __forceinline__ float log_sum(const float* base, const Cost& cost) const {
    float top[R], sum[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      top[r] = -INFINITY, sum[r] = 0;
#pragma unroll 4
      for (int x = 0; x < 4 * CHUNKS; ++x) {
        const int other = across(x / 4) + x % 4;
        top[r] = fmaxf(top[r], scaled(base[other], cost(first + r, other), inverse_epsilon));
      }
#pragma unroll
      for (int step = 1; step < P; step *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(ALL, top[r], step));
      top[r] = top[r] == -INFINITY ? 0.0f : top[r];
#pragma unroll 4
      for (int x = 0; x < 4 * CHUNKS; ++x) {
        const int other = across(x / 4) + x % 4;
        sum[r] += expf(scaled(base[other], cost(first + r, other), inverse_epsilon) - top[r]);
      }
    }
    const float of_own = reduce(sum, [](float x, float y) { return x + y; });
    float shift = top[0];
#pragma unroll
    for (int r = 1; r < R; ++r) shift = own_row - first == r ? top[r] : shift;
    return shift + logf(of_own);
  }
};

}  // namespace
