// SPDX-License-Identifier: MIT
// Costs between features, a tile at a time: 64 vectors of one side against panels of the other, products by tensor cores (three tf32
// products: float32 accuracy; float64: plain), handed to a Pass in groups of 8 entries of a row. Nothing of size N M is stored.
//
// Rows and columns are roles: the half-step of the columns is the same kernel with x and y exchanged. A Pass has
//
//   bool skip(b)
//   Sum
//   row_factor(b, i), column_factor(b, j)    one number per vector; outside of the problem the columns' is -infinity
//   add(sum, b, row factor, v, c)            8 entries of a row: column factors v[k], costs c[k]
#pragma once

#include "ops/cuda/sinkhorn_stream.cuh"
#include "ops/sinkhorn.h"

namespace {

constexpr int FEATURE_ROWS = 64;
constexpr int FEATURE_THREADS = 256;
constexpr int DEPTH = 32;          // dimensions in shared memory at a time
constexpr int STRIDE = DEPTH + 4;  // 4 group + member: the fragments of a warp touch 32 different banks
constexpr int GROUP = STEP;        // entries handed over together

// One side: vectors and, per vector, its square norm, or for the cosine its inverse norm (0 for one that counts as zero).
template <class T>
struct Vectors {
  int count;
  const T* vectors;  // [B, count, D]
  const T* norms;    // [B, count]
};

template <class T>
struct Pair {
  int D;
  bool cosine;
  Vectors<T> rows, columns;

  __device__ __forceinline__ T cost(T product, T row_norm, T column_norm) const {
    if (cosine) return 1 - product * row_norm * column_norm;
    const T squares = row_norm + column_norm - 2 * product;
    return squares < 0 ? T(0) : squares;  // a NaN stays
  }
};

// A float as the sum of two tf32 numbers.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = pk::to_tf32(x);
  low = pk::to_tf32(x - __uint_as_float(high));
}

// d += a b by three tf32 products.
template <int fragments>
__device__ __forceinline__ void multiply_fragment(float (&d)[fragments][4], int f, const unsigned (&high)[4], const unsigned (&low)[4],
                                                  float b0, float b1) {
  unsigned b_high[2], b_low[2];
  split(b0, b_high[0], b_low[0]);
  split(b1, b_high[1], b_low[1]);
  pk::mma_m16n8k8_tf32(d[f], low, b_high);
  pk::mma_m16n8k8_tf32(d[f], high, b_low);
  pk::mma_m16n8k8_tf32(d[f], high, b_high);
}

// Products of a tile of rows with a panel of columns: what a thread holds of them.
template <class T>
struct Products;

template <>
struct Products<float> {                                                  // warps 4 x 2, each 16 rows x 64 columns: 8 fragments of 16 x 8
  static constexpr int COLUMNS = 128, ROWS = 2, GROUPS = 2, SHARERS = 8;  // of a thread: rows, groups of 8 in one; threads of a row
  float sum[8][4] = {};

  static __device__ __forceinline__ int row(int r) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + r * 8; }
  static __device__ __forceinline__ int column(int h, int k) {
    return threadIdx.x / 128 * 64 + (h * 4 + k / 2) * 8 + threadIdx.x % 4 * 2 + k % 2;
  }
  static __device__ __forceinline__ int sharer() { return threadIdx.x / 128 * 4 + threadIdx.x % 4; }
  __device__ __forceinline__ float& at(int r, int h, int k) { return sum[h * 4 + k / 2][r * 2 + k % 2]; }

  __device__ __forceinline__ void add(const float (&x)[FEATURE_ROWS][STRIDE], const float (&y)[COLUMNS][STRIDE]) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4, first = row(0), column0 = threadIdx.x / 128 * 64;
    for (int k = 0; k < DEPTH; k += 8) {
      unsigned high[4], low[4];
      split(x[first][k + member], high[0], low[0]);
      split(x[first + 8][k + member], high[1], low[1]);
      split(x[first][k + member + 4], high[2], low[2]);
      split(x[first + 8][k + member + 4], high[3], low[3]);
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const float (&vector)[STRIDE] = y[column0 + f * 8 + group];
        multiply_fragment(sum, f, high, low, vector[k + member], vector[k + member + 4]);
      }
    }
  }
};

template <>
struct Products<double> {  // a thread has 8 columns of a row; double is for checking gradients
  static constexpr int COLUMNS = 32, ROWS = 1, GROUPS = 1, SHARERS = 4;
  double sum[8] = {};

  static __device__ __forceinline__ int row(int) { return threadIdx.x % FEATURE_ROWS; }
  static __device__ __forceinline__ int column(int, int k) { return threadIdx.x / FEATURE_ROWS * 8 + k; }
  static __device__ __forceinline__ int sharer() { return threadIdx.x / FEATURE_ROWS; }
  __device__ __forceinline__ double& at(int, int, int k) { return sum[k]; }

  __device__ __forceinline__ void add(const double (&x)[FEATURE_ROWS][STRIDE], const double (&y)[COLUMNS][STRIDE]) {
    for (int k = 0; k < DEPTH; ++k)
#pragma unroll
      for (int f = 0; f < 8; ++f) sum[f] += x[row(0)][k] * y[column(0, f)][k];
  }
};

template <class T>
struct FeatureTiles {  // in shared memory
  T x[FEATURE_ROWS][STRIDE];
  T y[Products<T>::COLUMNS][STRIDE];
  T norm[Products<T>::COLUMNS];
  T factor[Products<T>::COLUMNS];
};

// Vectors first, first + 1, ... at dimensions d0 to d0 + 31; zeros where there are none. A warp reads one vector.
template <class T, int count>
__device__ __forceinline__ void load_vectors(T (&tile)[count][STRIDE], const Vectors<T>& side, int64_t b, int first, int D, int d0) {
  const int lane = threadIdx.x % 32, d = d0 + lane;
  for (int r = threadIdx.x / 32; r < count; r += FEATURE_THREADS / 32)
    tile[r][lane] = first + r < side.count && d < D ? side.vectors[(b * side.count + first + r) * D + d] : T(0);
}

// What goes with the columns of a panel. Begins with a barrier; another must follow.
template <class T, class Pass>
__device__ __forceinline__ void load_columns(FeatureTiles<T>& tiles, const Pair<T>& pair, const Pass& pass, int64_t b, int column0,
                                             int last) {
  __syncthreads();
  const int k = threadIdx.x, j = column0 + k;
  if (k >= Products<T>::COLUMNS) return;
  tiles.norm[k] = j < last ? pair.columns.norms[b * pair.columns.count + j] : T(0);
  tiles.factor[k] = j < last ? pass.column_factor(b, j) : -T(INFINITY);
}

template <class T>
__device__ __forceinline__ Products<T> tile_products(FeatureTiles<T>& tiles, const Pair<T>& pair, int64_t b, int row0, int column0) {
  Products<T> products;
  for (int d0 = 0; d0 < pair.D; d0 += DEPTH) {
    __syncthreads();
    load_vectors(tiles.x, pair.rows, b, row0, pair.D, d0);
    load_vectors(tiles.y, pair.columns, b, column0, pair.D, d0);
    __syncthreads();
    products.add(tiles.x, tiles.y);
  }
  return products;
}

// 1 / |x| or |x|^2 of every vector, by warps.
template <class T>
__global__ void __launch_bounds__(STREAM_THREADS) norms_kernel(int64_t count, int D, bool cosine, const T* vectors, T* norms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * STREAM_WARPS + threadIdx.x / 32;
  if (i >= count) return;
  T squares = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) squares += vectors[i * D + d] * vectors[i * D + d];
  squares = warp_sum(squares);
  constexpr T floor = T(SINKHORN_NORM_FLOOR * SINKHORN_NORM_FLOOR);
  if (threadIdx.x % 32 == 0) norms[i] = !cosine ? squares : squares <= floor ? T(0) : rsqrt(squares);
}

template <class T>
int launch_norms(int64_t count, int D, bool cosine, const T* vectors, T* norms, void* stream) {
  const int64_t blocks = (count + STREAM_WARPS - 1) / STREAM_WARPS;
  return PK_LAUNCH((norms_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(STREAM_THREADS), 0, stream, count, D, cosine, vectors,
                   norms);
}

}  // namespace
