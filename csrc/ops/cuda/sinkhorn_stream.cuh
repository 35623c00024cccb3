// SPDX-License-Identifier: MIT
// Sums along the rows and the columns of matrices that do not fit one multiprocessor. What is summed is an Op; the walk is the same for all:
//
//   row_kernel      a warp per row, 8 entries per lane at a time
//   column_kernel   a thread per column and chunk of rows, 8 rows at a time; partial sums to the workspace
//   combine_kernel  a thread per column adds the chunks in their order
//
// The number of chunks depends on the shape alone, so results do not depend on the GPU. An Op has
//
//   bool skip(b)                      the problem is done
//   Sum                               LogSum or Sums<T, n>
//   add(sum, b, i, j, di, dj, n, c)   entries (i + k di, j + k dj), k < n <= 8, costs c[k]
//   row(b, i, sum), column(b, j, sum) what becomes of a sum, by one thread
#pragma once

#include "ops/cuda/sinkhorn_launch.h"
#include "ops/cuda/sinkhorn_math.cuh"

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
  const T* cost;  // [B, N, M]
  T* partial;     // [B, chunks, parts, M]
};

template <class T, class Op>
__global__ void __launch_bounds__(STREAM_THREADS, 2) row_kernel(const Matrix<T> matrix, const Op op) {
  const int64_t b = blockIdx.x / matrix.blocks_per_problem;
  const int i = static_cast<int>(blockIdx.x % matrix.blocks_per_problem) * STREAM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (i >= matrix.N || op.skip(b)) return;
  const T* const cost = matrix.cost + (b * matrix.N + i) * matrix.M;
  typename Op::Sum sum;
  for (int64_t j = lane; j < matrix.M; j += 32 * STEP) {
    const int64_t left = (matrix.M - j + 31) / 32;
    const int n = left < STEP ? static_cast<int>(left) : STEP;
    T c[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) c[k] = k < n ? cost[j + 32 * k] : T(0);
    op.add(sum, b, i, static_cast<int>(j), 0, 32, n, c);
  }
  sum.reduce();
  if (lane == 0) op.row(b, i, sum);
}

template <class T, class Op>
__global__ void __launch_bounds__(STREAM_COLUMNS) column_kernel(const Matrix<T> matrix, const Op op) {
  const int panels = (matrix.M + STREAM_COLUMNS - 1) / STREAM_COLUMNS, chunks = (matrix.N + matrix.chunk - 1) / matrix.chunk;
  const int64_t b = blockIdx.x / matrix.blocks_per_problem;
  const int place = static_cast<int>(blockIdx.x % matrix.blocks_per_problem), chunk = place / panels;
  const int j = place % panels * STREAM_COLUMNS + static_cast<int>(threadIdx.x);
  if (j >= matrix.M || op.skip(b)) return;
  const int first = chunk * matrix.chunk, last = matrix.N - first < matrix.chunk ? matrix.N : first + matrix.chunk;
  const T* const cost = matrix.cost + b * matrix.N * matrix.M + j;
  typename Op::Sum sum;
  for (int i = first; i < last; i += STEP) {
    const int n = last - i < STEP ? last - i : STEP;
    T c[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) c[k] = k < n ? cost[static_cast<int64_t>(i + k) * matrix.M] : T(0);
    op.add(sum, b, i, j, 1, 0, n, c);
  }
  T* const out = matrix.partial + (b * chunks + chunk) * Op::Sum::PARTS * matrix.M + j;
#pragma unroll
  for (int k = 0; k < Op::Sum::PARTS; ++k) out[static_cast<int64_t>(k) * matrix.M] = sum.part[k];
}

template <class T, class Op>
__global__ void __launch_bounds__(STREAM_COLUMNS, 4) combine_kernel(const Matrix<T> matrix, const Op op) {
  const int chunks = (matrix.N + matrix.chunk - 1) / matrix.chunk;
  const int64_t b = blockIdx.x / matrix.blocks_per_problem;
  const int j = static_cast<int>(blockIdx.x % matrix.blocks_per_problem) * STREAM_COLUMNS + static_cast<int>(threadIdx.x);
  if (j >= matrix.M || op.skip(b)) return;
  typename Op::Sum sum;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    T part[Op::Sum::PARTS];
    const T* const in = matrix.partial + (b * chunks + chunk) * Op::Sum::PARTS * matrix.M + j;
#pragma unroll
    for (int k = 0; k < Op::Sum::PARTS; ++k) part[k] = in[static_cast<int64_t>(k) * matrix.M];
    merge_parts(sum, part);
  }
  op.column(b, j, sum);
}

// One block per problem; op(b, thread) with shared sums is written out in the Op.
template <class T, class Op>
__global__ void __launch_bounds__(STREAM_THREADS) problem_kernel(const Op op) {
  PK_SHARED(T, shared, STREAM_WARPS);
  if (!op.skip(blockIdx.x)) op.run(blockIdx.x, shared);
}

// The block's sum, warps in their order, in every thread.
template <class T>
__device__ __forceinline__ T problem_sum(T value, T* shared) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < STREAM_WARPS; ++w) total += shared[w];
  return total;
}

// The launches of one operator on one stream; the first error stays.
template <class T>
struct Streamer {
  int64_t B, N, M;
  const T* cost;
  T* partial;
  void* stream;
  int status = 0;

  Matrix<T> matrix(int64_t blocks) const {
    return {blocks, static_cast<int>(N), static_cast<int>(M), static_cast<int>(chunk_rows(N)), cost, partial};
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
      status = PK_LAUNCH((column_kernel<T, Op>), dim3(static_cast<unsigned>(B * blocks)), dim3(STREAM_COLUMNS), 0, stream, matrix(blocks), op);
    if (status == 0)
      status = PK_LAUNCH((combine_kernel<T, Op>), dim3(static_cast<unsigned>(B * panels())), dim3(STREAM_COLUMNS), 0, stream,
                         matrix(panels()), op);
  }
  template <class Op>
  void problems(const Op& op) {
    if (status == 0) status = PK_LAUNCH((problem_kernel<T, Op>), dim3(static_cast<unsigned>(B)), dim3(STREAM_THREADS), 0, stream, op);
  }
};

// Pieces of a workspace, each on a 256-byte boundary. With no memory behind it, it counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class U>
  U* take(int64_t count) {
    U* const piece = memory_ ? reinterpret_cast<U*>(memory_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(U)) + 255) / 256 * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace
