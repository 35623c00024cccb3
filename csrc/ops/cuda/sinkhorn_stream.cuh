// SPDX-License-Identifier: MIT
// Sums along the rows and the columns of matrices that do not fit one multiprocessor. What is summed is an Op; the walk is the same for
// all:
//
//   row_kernel       a warp per row, 8 entries per lane at a time
//   column_kernel    a thread per column and chunk of rows, 8 rows at a time; the last chunk to arrive adds up all of them in their order
//
// The number of chunks depends on the shape alone, so results do not depend on the GPU. An Op has
//
//   bool skip(b)                        the problem is done
//   Sum                                 LogSum or Sums<T, n>
//   add(sum, b, i, j, di, dj, n, c)     entries (i + k di, j + k dj), k < n <= 8, costs c[k]
//   row(b, i, sum), column(b, j, sum)   what becomes of a sum, by one thread
//   after_rows(b, shared)               if it is there: by one block, when the rows of a problem are done
#pragma once

#include "common/arithmetic.cuh"
#include "common/pieces.h"
#include "ops/cuda/sinkhorn_launch.h"

namespace {

using namespace protokernels;

constexpr int STREAM_THREADS = 256;
constexpr int STREAM_WARPS = STREAM_THREADS / 32;
constexpr int STREAM_COLUMNS = 128;  // threads of a column block
constexpr int STEP = 8;              // entries a thread has in flight
constexpr int MOST_CHUNKS = 64;

inline int64_t chunk_rows(int64_t N) {
  const int64_t rows = (N + MOST_CHUNKS - 1) / MOST_CHUNKS;
  return rows < 32 ? 32 : (rows + STEP - 1) / STEP * STEP;
}
inline int64_t chunk_count(int64_t N) { return (N + chunk_rows(N) - 1) / chunk_rows(N); }

template <class T>
struct LogSum {  // log sum exp
  static constexpr int PARTS = 2;
  T part[2] = {-T(INFINITY), T(0)};  // largest exponent; sum relative to it

  __device__ __forceinline__ void merge(T top, T sum) {
    const T largest = larger(part[0], top);
    if (largest == -T(INFINITY)) {  // nothing yet; a NaN may be among the sums
      part[1] += sum;
      return;
    }
    part[1] = part[1] * exponential(part[0] - largest) + sum * exponential(top - largest);
    part[0] = largest;
  }
  __device__ __forceinline__ void add(const T (&x)[STEP], int n) {
    T top = part[0];
#pragma unroll
    for (int k = 0; k < STEP; ++k)
      if (k < n) top = larger(top, x[k]);
    const T shift = top == -T(INFINITY) ? T(0) : top;
    part[1] *= exponential(part[0] - shift);
#pragma unroll
    for (int k = 0; k < STEP; ++k)
      if (k < n) part[1] += exponential(x[k] - shift);
    part[0] = top;
  }
  __device__ __forceinline__ void reduce() {
    const T top = warp_larger(part[0]), shift = top == -T(INFINITY) ? T(0) : top;
    part[1] = warp_sum(part[1] * exponential(part[0] - shift));
    part[0] = top;
  }
  __device__ __forceinline__ T value() const { return (part[0] == -T(INFINITY) ? T(0) : part[0]) + logarithm(part[1]); }
};

template <class T, int count>
struct Sums {
  static constexpr int PARTS = count;
  T part[count] = {};

  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int k = 0; k < count; ++k) part[k] = warp_sum(part[k]);
  }
};

template <class T>
__device__ __forceinline__ void merge_parts(LogSum<T>& sum, const T (&part)[2]) {
  sum.merge(part[0], part[1]);
}
template <class T, int count>
__device__ __forceinline__ void merge_parts(Sums<T, count>& sum, const T (&part)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) sum.part[k] += part[k];
}

template <class T>
struct Matrix {
  int64_t blocks_per_problem;
  int N, M, chunk;
  const T* cost;       // [B, N, M]
  T* partial;          // [B, chunks, parts, M]
  unsigned* arrivals;  // [B] for rows or [B, panels] for columns; 0 between launches
};

// True in all threads of the block that is the last of so many to come here; what the others wrote before is visible then. Counts from 0
// and leaves 0.
__device__ __forceinline__ bool arrives_last(unsigned* count, int64_t blocks) {
  PK_SHARED(int, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(count, 1u) + 1 == blocks;
    if (last) *count = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// The block's sum, warps in their order, in every thread.
template <class T>
__device__ __forceinline__ T problem_sum(T value, T* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += shared[w];
  return total;
}

template <class T, class Op>
__global__ void __launch_bounds__(STREAM_THREADS, sizeof(T) == 4 ? 4 : 2) row_kernel(const Matrix<T> matrix, const Op op) {
  const int64_t b = blockIdx.x / matrix.blocks_per_problem;
  const int i = static_cast<int>(blockIdx.x % matrix.blocks_per_problem) * STREAM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (op.skip(b)) return;
  if (i < matrix.N) {
    const T* const cost = matrix.cost + (b * matrix.N + i) * matrix.M;
    typename Op::Sum sum;
    T c[STEP], next[STEP];  // the next entries are on their way while these are added
    const auto load = [&](int64_t j, T(&values)[STEP]) {
#pragma unroll
      for (int k = 0; k < STEP; ++k) values[k] = j + 32 * k < matrix.M ? cost[j + 32 * k] : T(0);
    };
    load(lane, c);
    for (int64_t j = lane; j < matrix.M; j += 32 * STEP) {
      const int64_t left = (matrix.M - j + 31) / 32;
      const int n = left < STEP ? static_cast<int>(left) : STEP;
      load(j + 32 * STEP, next);
      op.add(sum, b, i, static_cast<int>(j), 0, 32, n, c);
#pragma unroll
      for (int k = 0; k < STEP; ++k) c[k] = next[k];
    }
    sum.reduce();
    if (lane == 0) op.row(b, i, sum);
  }
  if constexpr (requires(T* memory) { op.after_rows(b, memory); }) {
    PK_SHARED(T, shared, STREAM_WARPS);
    if (arrives_last(matrix.arrivals + b, matrix.blocks_per_problem)) op.after_rows(b, &shared[0]);
  }
}

template <class T, class Op>
__global__ void __launch_bounds__(STREAM_COLUMNS, sizeof(T) == 4 ? 6 : 4) column_kernel(const Matrix<T> matrix, const Op op) {
  constexpr int parts = Op::Sum::PARTS;
  const int panels = (matrix.M + STREAM_COLUMNS - 1) / STREAM_COLUMNS, chunks = (matrix.N + matrix.chunk - 1) / matrix.chunk;
  const int64_t b = blockIdx.x / matrix.blocks_per_problem;
  const int place = static_cast<int>(blockIdx.x % matrix.blocks_per_problem), chunk = place / panels, panel = place % panels;
  const int j = panel * STREAM_COLUMNS + static_cast<int>(threadIdx.x);
  if (op.skip(b)) return;
  T* const partial = matrix.partial + b * chunks * parts * matrix.M + j;
  if (j < matrix.M) {
    const int first = chunk * matrix.chunk, last = matrix.N - first < matrix.chunk ? matrix.N : first + matrix.chunk;
    const T* const cost = matrix.cost + b * matrix.N * matrix.M + j;
    typename Op::Sum sum;
    T c[STEP], next[STEP];
    const auto load = [&](int i, T(&values)[STEP]) {
#pragma unroll
      for (int k = 0; k < STEP; ++k) values[k] = i < last - k ? cost[static_cast<int64_t>(i + k) * matrix.M] : T(0);
    };
    load(first, c);
    for (int i = first; i < last; i += STEP) {
      const int n = last - i < STEP ? last - i : STEP;
      load(i + STEP, next);
      op.add(sum, b, i, j, 1, 0, n, c);
#pragma unroll
      for (int k = 0; k < STEP; ++k) c[k] = next[k];
    }
#pragma unroll
    for (int k = 0; k < parts; ++k) partial[(static_cast<int64_t>(chunk) * parts + k) * matrix.M] = sum.part[k];
  }
  if (!arrives_last(matrix.arrivals + b * panels + panel, chunks) || j >= matrix.M) return;
  typename Op::Sum total;
  for (int other = 0; other < chunks; ++other) {
    T part[parts];
#pragma unroll
    for (int k = 0; k < parts; ++k) part[k] = partial[(static_cast<int64_t>(other) * parts + k) * matrix.M];
    merge_parts(total, part);
  }
  op.column(b, j, total);
}

// One block per problem.
template <class T, class Op>
__global__ void __launch_bounds__(STREAM_THREADS) problem_kernel(const Op op) {
  PK_SHARED(T, shared, STREAM_WARPS);
  if (!op.skip(blockIdx.x)) op.run(blockIdx.x, shared);
}

// The same with more threads, for an Op that goes by blockDim.
constexpr int WIDE_THREADS = 1024;
template <class T, class Op>
__global__ void __launch_bounds__(WIDE_THREADS) wide_kernel(const Op op) {
  PK_SHARED(T, shared, WIDE_THREADS / 32);
  if (!op.skip(blockIdx.x)) op.run(blockIdx.x, shared);
}

// The launches of one operator on one stream; the first error stays.
template <class T>
struct Streamer {
  int64_t B, N, M;
  const T* cost;
  T* partial;          // as Matrix
  unsigned* arrivals;  // [panels B]; cleared here
  void* stream;
  int status;

  // parts: of the sums over columns, 0 if there are none
  Streamer(int64_t B_, int64_t N_, int64_t M_, const void* costs, int parts, Pieces& pieces, void* on)
      : B(B_),
        N(N_),
        M(M_),
        cost(static_cast<const T*>(costs)),
        partial(pieces.take<T>(B * chunk_count(N) * parts * M)),
        arrivals(pieces.take<unsigned>(B * panels())),
        stream(on),
        status(0) {}
  void clear() { status = pk::memset_async(arrivals, 0, sizeof(unsigned) * static_cast<std::size_t>(B * panels()), stream); }

  Matrix<T> matrix(int64_t blocks) const {
    return {blocks, static_cast<int>(N), static_cast<int>(M), static_cast<int>(chunk_rows(N)), cost, partial, arrivals};
  }
  int64_t panels() const { return (M + STREAM_COLUMNS - 1) / STREAM_COLUMNS; }
  template <class Op>
  void rows(const Op& op) {
    const int64_t blocks = (N + STREAM_WARPS - 1) / STREAM_WARPS;
    if (status == 0)
      status = PK_LAUNCH((row_kernel<T, Op>), dim3(static_cast<unsigned>(B * blocks)), dim3(STREAM_THREADS), 0, stream, matrix(blocks), op);
  }
  template <class Op>
  void columns(const Op& op) {
    const int64_t blocks = panels() * chunk_count(N);
    if (status == 0)
      status =
          PK_LAUNCH((column_kernel<T, Op>), dim3(static_cast<unsigned>(B * blocks)), dim3(STREAM_COLUMNS), 0, stream, matrix(blocks), op);
  }
  template <class Op>
  void problems(const Op& op) {
    if (status == 0) status = PK_LAUNCH((problem_kernel<T, Op>), dim3(static_cast<unsigned>(B)), dim3(STREAM_THREADS), 0, stream, op);
  }
};

}  // namespace
