// SPDX-License-Identifier: MIT
// One Sinkhorn problem in one block: where every entry, row and column lives.
//
// The rows of a problem go round the warps: slot s of batch b of warp w is row (8 b + s) W + w. Lane l has the columns l, l + 32, ... (E of
// them) of its warp's rows, and looks after the row in slot l % 8. The scaled kernel K = exp(alpha_i + beta_j - C_ij / eps) therefore
// belongs to one thread per entry: it stays in registers, or in shared memory that nobody else reads. Every warp keeps all column weights.
// An iteration reads K once: the warp reduces its rows, turns them into row weights, and adds weight times row to its partial column sums;
// one exchange between the warps follows.
#pragma once

#include "common/arithmetic.cuh"
#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_launch.h"

namespace {

constexpr int SLOTS = 8;  // rows of a warp that are reduced together

// E columns per lane, W warps, BATCHES of 8 rows per warp; REGISTERS: K in registers, else in dynamic shared memory.
template <class Scalar, int E_, int W_, int BATCHES_, bool REGISTERS_>
struct Shape {
  using T = Scalar;
  static constexpr int E = E_, W = W_, BATCHES = BATCHES_, THREADS = 32 * W_;
  static constexpr bool REGISTERS = REGISTERS_;
  static constexpr bool REDUNDANT = E_ <= 2;  // every warp adds up all partial column sums itself: one barrier instead of two
  static std::size_t dynamic_bytes(int64_t N, int64_t M) { return REGISTERS_ ? 0 : static_cast<std::size_t>(N * M) * sizeof(T); }
  static constexpr int ROWS = SLOTS * W_ * BATCHES_, COLUMNS = 32 * E_, BUFFERS = REDUNDANT ? 2 : 1;
};

// Calls action with the shape of a tier: action(shape) for a problem on chip, action() for one that streams.
template <class Action>
int with_shape(protokernels::SinkhornTier tier, protokernels::Kind kind, const Action& action) {
  using protokernels::SinkhornTier;
  const bool wide = kind == protokernels::Kind::f64;
  switch (tier) {
    case SinkhornTier::side_32: return action(Shape<float, 1, 4, 1, true>());
    case SinkhornTier::side_64: return wide ? action(Shape<double, 2, 8, 1, true>()) : action(Shape<float, 2, 8, 1, true>());
    case SinkhornTier::side_128: return action(Shape<float, 4, 16, 1, true>());
    case SinkhornTier::shared: return action(Shape<float, 8, 8, 4, false>());
    default: return action();
  }
}

// Sums of 8 values over the warp at once: every lane returns the sum of values[lane % 8].
template <class T>
__device__ __forceinline__ T reduce_slots(const T (&values)[SLOTS]) {
  const int lane = threadIdx.x % 32;
  T four[4], two[2];
#pragma unroll
  for (int k = 0; k < 4; ++k)
    four[k] = (lane & 4 ? values[k + 4] : values[k]) + __shfl_xor_sync(ALL, lane & 4 ? values[k] : values[k + 4], 4);
#pragma unroll
  for (int k = 0; k < 2; ++k) two[k] = (lane & 2 ? four[k + 2] : four[k]) + __shfl_xor_sync(ALL, lane & 2 ? four[k] : four[k + 2], 2);
  T one = (lane & 1 ? two[1] : two[0]) + __shfl_xor_sync(ALL, lane & 1 ? two[0] : two[1], 1);
  one += __shfl_xor_sync(ALL, one, 8);
  return one + __shfl_xor_sync(ALL, one, 16);
}

// In shared memory. Row: what is kept of a row, three numbers.
template <class S, class Row>
struct Exchange {
  typename S::T columns[S::BUFFERS][S::W][S::COLUMNS];
  typename S::T total[S::COLUMNS];
  typename S::T scalar[S::BUFFERS][S::W];
  typename S::T rows[2][3][S::BATCHES > 1 ? S::ROWS : 1];  // the fields of a row; second: before the half-step
};

// The rows a lane looks after, one per batch: in registers where there is one batch, else in shared memory, written by the first 8 lanes.
// The state before the half-step is kept, for a problem that stops there.
template <class S, class Row>
struct Rows {
  static constexpr bool SHARED = S::BATCHES > 1;
  Exchange<S, Row>& exchange;
  Row now, before;

  __device__ __forceinline__ explicit Rows(Exchange<S, Row>& shared) : exchange(shared), now{}, before{} {}
  static __device__ __forceinline__ int place(int batch) { return (batch * S::W + threadIdx.x / 32) * SLOTS + threadIdx.x % SLOTS; }
  __device__ __forceinline__ Row get(int batch) const {
    if constexpr (!SHARED) return now;
    const int i = place(batch);
    return {exchange.rows[0][0][i], exchange.rows[0][1][i], exchange.rows[0][2][i]};
  }
  __device__ __forceinline__ void set(int batch, const Row& row) {
    if constexpr (SHARED) {
      __syncwarp();
      write(0, batch, row);
      __syncwarp();
    } else {
      now = row;
    }
  }
  __device__ __forceinline__ void keep(int batch, const Row& row) {
    if constexpr (SHARED)
      write(1, batch, row);
    else
      before = row;
  }
  __device__ __forceinline__ void restore() {
    if constexpr (SHARED) {
      __syncwarp();
      if (threadIdx.x % 32 < SLOTS)
        for (int batch = 0; batch < S::BATCHES; ++batch)
          for (int field = 0; field < 3; ++field) exchange.rows[0][field][place(batch)] = exchange.rows[1][field][place(batch)];
      __syncwarp();
    } else {
      now = before;
    }
  }

 private:
  __device__ __forceinline__ void write(int version, int batch, const Row& row) {
    const auto& [x, y, z] = row;
    const int i = place(batch);
    if (threadIdx.x % 32 < SLOTS) exchange.rows[version][0][i] = x, exchange.rows[version][1][i] = y, exchange.rows[version][2][i] = z;
  }
};

template <class S, class Row>
struct Tile {
  using T = typename S::T;
  int N, M, lane, warp, buffer;
  T inverse_epsilon;
  const T* cost;  // [N, M]
  T* shared;      // [N, M], unless in registers
  Exchange<S, Row>* exchange;
  T k[SLOTS][S::E];

  __device__ __forceinline__ Tile(int rows, int columns, const T* problem_cost, T epsilon, T* dynamic_shared, Exchange<S, Row>* partial)
      : N(rows),
        M(columns),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        buffer(0),
        inverse_epsilon(T(1) / epsilon),
        cost(problem_cost),
        shared(dynamic_shared),
        exchange(partial) {}

  __device__ __forceinline__ int row(int batch, int slot) const { return (batch * SLOTS + slot) * S::W + warp; }
  __device__ __forceinline__ int own_row(int batch) const { return row(batch, lane % SLOTS); }
  __device__ __forceinline__ int column(int e) const { return e * 32 + lane; }
  // C_ij, +infinity outside of the problem.
  __device__ __forceinline__ T cost_at(int i, int e) const {
    return i < N && column(e) < M ? cost[static_cast<int64_t>(i) * M + column(e)] : T(INFINITY);
  }

  // K of a batch from alpha (of the lane's row) and beta; entries without mass are 0.
  __device__ __forceinline__ void build(int batch, T alpha, const T (&beta)[S::E]) {
    if constexpr (S::REGISTERS) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const T of_row = __shfl_sync(ALL, alpha, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e) k[s][e] = exponential(of_row + beta[e] - cost_at(row(batch, s), e) * inverse_epsilon);
      }
    } else {
#pragma unroll 1
      for (int s = 0; s < SLOTS; ++s) {
        const int i = row(batch, s);
        const T of_row = __shfl_sync(ALL, alpha, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e)
          if (i < N && column(e) < M) shared[i * M + column(e)] = exponential(of_row + beta[e] - cost_at(i, e) * inverse_epsilon);
      }
      fetch(batch);
    }
  }
  __device__ __forceinline__ void fetch(int batch) {
    if constexpr (!S::REGISTERS) {
#pragma unroll
      for (int s = 0; s < SLOTS; ++s)
#pragma unroll
        for (int e = 0; e < S::E; ++e) k[s][e] = row(batch, s) < N && column(e) < M ? shared[row(batch, s) * M + column(e)] : T(0);
    }
  }
  // sum_j K_ij x_j, of the lane's row.
  __device__ __forceinline__ T times_columns(const T (&x)[S::E]) const {
    T sum[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      sum[s] = k[s][0] * x[0];
#pragma unroll
      for (int e = 1; e < S::E; ++e) sum[s] += k[s][e] * x[e];
    }
    return reduce_slots(sum);
  }
  // sums_j += sum_i x_i K_ij over the rows of the batch.
  __device__ __forceinline__ void add_rows(T x, T (&sums)[S::E]) const {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const T of_row = __shfl_sync(ALL, x, s);
#pragma unroll
      for (int e = 0; e < S::E; ++e) sums[e] += of_row * k[s][e];
    }
  }

  // LSE_j(v_j - C_ij / eps) of the lane's row.
  __device__ __forceinline__ T log_row_sum(int batch, const T (&v)[S::E]) const {
    T mine = -INFINITY;
#pragma unroll 1
    for (int s = 0; s < SLOTS; ++s) {
      const int i = row(batch, s);
      if (i >= N) break;
      T top = -INFINITY, sum = 0;
#pragma unroll
      for (int e = 0; e < S::E; ++e) top = larger(top, v[e] - cost_at(i, e) * inverse_epsilon);
      top = warp_larger(top);
      const T shift = top == -T(INFINITY) ? T(0) : top;
#pragma unroll
      for (int e = 0; e < S::E; ++e) sum += exponential(v[e] - cost_at(i, e) * inverse_epsilon - shift);
      sum = shift + logarithm(warp_sum(sum));
      if (lane % SLOTS == s) mine = sum;
    }
    return mine;
  }

  // Combines the warps' values per column, and one scalar per warp; the same bits in every warp, warps in their order.
  template <bool maximum>
  __device__ __forceinline__ void combine(T (&columns)[S::E], T& scalar, bool with_scalar) {
    auto& mine = exchange->columns[buffer];
#pragma unroll
    for (int e = 0; e < S::E; ++e) mine[warp][column(e)] = columns[e];
    if (with_scalar && lane == 0) exchange->scalar[buffer][warp] = scalar;
    __syncthreads();
    if (with_scalar) {
      scalar = 0;
      for (int w = 0; w < S::W; ++w) scalar += exchange->scalar[buffer][w];
    }
    if constexpr (S::REDUNDANT) {
#pragma unroll
      for (int e = 0; e < S::E; ++e) {
        T part[S::W];  // a tree: three additions after each other, not seven
#pragma unroll
        for (int w = 0; w < S::W; ++w) part[w] = mine[w][column(e)];
#pragma unroll
        for (int half = S::W / 2; half > 0; half /= 2)
#pragma unroll
          for (int w = 0; w < half; ++w) part[w] = maximum ? larger(part[w], part[w + half]) : part[w] + part[w + half];
        columns[e] = part[0];
      }
      buffer ^= 1;
    } else {
      for (int j = threadIdx.x; j < S::COLUMNS; j += S::THREADS) {
        T total = mine[0][j];
#pragma unroll
        for (int w = 1; w < S::W; ++w) total = maximum ? larger(total, mine[w][j]) : total + mine[w][j];
        exchange->total[j] = total;
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < S::E; ++e) columns[e] = exchange->total[column(e)];
    }
  }

  // LSE_i(u_i - C_ij / eps) of the lane's columns.
  __device__ __forceinline__ void log_column_sums(const Rows<S, Row>& rows, T (&result)[S::E]) {
    T top[S::E], nothing = 0;
#pragma unroll
    for (int e = 0; e < S::E; ++e) top[e] = -INFINITY, result[e] = 0;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T u = rows.get(batch).potential();
#pragma unroll 1
      for (int s = 0; s < SLOTS; ++s) {
        const T of_row = __shfl_sync(ALL, u, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e) top[e] = larger(top[e], of_row - cost_at(row(batch, s), e) * inverse_epsilon);
      }
    }
    combine<true>(top, nothing, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) top[e] = top[e] == -T(INFINITY) ? T(0) : top[e];
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T u = rows.get(batch).potential();
#pragma unroll 1
      for (int s = 0; s < SLOTS; ++s) {
        const T of_row = __shfl_sync(ALL, u, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e) result[e] += exponential(of_row - cost_at(row(batch, s), e) * inverse_epsilon - top[e]);
      }
    }
    combine<false>(result, nothing, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) result[e] = top[e] + logarithm(result[e]);
  }
};

}  // namespace
