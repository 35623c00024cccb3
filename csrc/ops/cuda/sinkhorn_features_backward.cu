// SPDX-License-Identifier: MIT
// The envelope gradient of Sinkhorn between features on the GPU. The equations stand in ops/sinkhorn.h.
//
// gradient_kernel: like attention with weights that need no normalisation. A block takes 64 rows and 64 dimensions of the result: a panel
// of 128 columns gives a tile of P in registers, which is at once the left factor of P Y: the accumulator of one product is the operand of
// the next when k is numbered 2 member, 2 member + 1 instead of member, member + 4. Row sums of P and P (log P - 1) come along. The
// gradient of y is the same with roles exchanged. finish_kernel turns P Y into the gradient of a squared distance or of a cosine.
// Limit at 4096 x 4096, D = 64 on an H200: twice 27 us of tf32 products. Tested on an H200 and in the emulator.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_features.cuh"

namespace {

template <class T>
struct Plan {                 // the parts of a problem a block needs, in its roles
  const T* row_potential;     // [B, rows], units of cost
  const T* column_potential;  // [B, columns]
  const T* epsilon;           // [B]

  __device__ __forceinline__ T column_factor(int64_t b, int j) const { return column_potential[j] / epsilon[b]; }
};

// P Y for a block: what a thread holds of it.
template <class T>
struct PlanProduct;

template <>
struct PlanProduct<float> {  // a warp: 16 rows x 64 dimensions over its own 64 columns; two warps share the rows
  static constexpr int DIMENSIONS = 64;
  float sum[8][4] = {};

  __device__ __forceinline__ void add(Products<float>& plan, FeatureTiles<float>& tiles, const Pair<float>& pair, int64_t b, int column0,
                                      int d0) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4, half = threadIdx.x / 128 * 64;
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      __syncthreads();
      load_vectors(tiles.y, pair.columns, b, column0, pair.D, d0 + stage * DEPTH);
      __syncthreads();
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        unsigned high[4], low[4];
        split(plan.sum[f][0], high[0], low[0]);
        split(plan.sum[f][2], high[1], low[1]);
        split(plan.sum[f][1], high[2], low[2]);
        split(plan.sum[f][3], high[3], low[3]);
        const float (&even)[STRIDE] = tiles.y[half + f * 8 + member * 2];
        const float (&odd)[STRIDE] = tiles.y[half + f * 8 + member * 2 + 1];
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_fragment(sum, stage * 4 + n, high, low, even[n * 8 + group], odd[n * 8 + group]);
      }
    }
  }
  // The second half of the columns goes through shared memory to the first.
  __device__ __forceinline__ void write(FeatureTiles<float>& tiles, float* out, int D, int rows, int d0) {
    const int row = Products<float>::row(0), member = threadIdx.x % 4;
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = row + i / 2 * 8, d = n * 8 + member * 2 + i % 2;
          if (threadIdx.x >= 128) tiles.x[r][d] = sum[stage * 4 + n][i];
        }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = row + i / 2 * 8, d = n * 8 + member * 2 + i % 2, at = d0 + stage * DEPTH + d;
          if (threadIdx.x < 128 && r < rows && at < D) out[static_cast<int64_t>(r) * D + at] = sum[stage * 4 + n][i] + tiles.x[r][d];
        }
    }
  }
};

template <>
struct PlanProduct<double> {  // a thread: 8 dimensions of a row
  static constexpr int DIMENSIONS = 32;
  double sum[8] = {};

  __device__ __forceinline__ void add(Products<double>& plan, FeatureTiles<double>& tiles, const Pair<double>& pair, int64_t b, int column0,
                                      int d0) {
    const int row = Products<double>::row(0), group = threadIdx.x / FEATURE_ROWS * 8;
    __syncthreads();
    load_vectors(tiles.y, pair.columns, b, column0, pair.D, d0);
#pragma unroll
    for (int k = 0; k < 8; ++k) tiles.x[row][group + k] = plan.sum[k];
    __syncthreads();
    for (int j = 0; j < Products<double>::COLUMNS; ++j)
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += tiles.x[row][j] * tiles.y[j][group + k];
  }
  __device__ __forceinline__ void write(FeatureTiles<double>&, double* out, int D, int rows, int d0) {
    const int row = Products<double>::row(0), d = d0 + threadIdx.x / FEATURE_ROWS * 8;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (row < rows && d + k < D) out[static_cast<int64_t>(row) * D + d + k] = sum[k];
  }
};

template <class T>
__global__ void __launch_bounds__(FEATURE_THREADS, 1) gradient_kernel(const Pair<T> pair, const Plan<T> plan, T* result, T* statistics) {
  using P = Products<T>;
  using Result = PlanProduct<T>;
  PK_SHARED(FeatureTiles<T>, tiles);
  PK_SHARED(T, gathered, FEATURE_ROWS, P::SHARERS, 2);
  const int row_tiles = (pair.rows.count + FEATURE_ROWS - 1) / FEATURE_ROWS, parts = (pair.D + Result::DIMENSIONS - 1) / Result::DIMENSIONS;
  const int64_t b = blockIdx.x / (row_tiles * parts);
  const int place = static_cast<int>(blockIdx.x % (row_tiles * parts)), d0 = place % parts * Result::DIMENSIONS;
  const int row0 = place / parts * FEATURE_ROWS, N = pair.rows.count, M = pair.columns.count;
  const T inverse = T(1) / plan.epsilon[b];
  const Plan<T> here{plan.row_potential + b * N, plan.column_potential + b * M, plan.epsilon};
  Sums<T, 2> sums[P::ROWS];
  T row_norm[P::ROWS], u[P::ROWS];
#pragma unroll
  for (int r = 0; r < P::ROWS; ++r) {
    const int i = row0 + P::row(r) < N ? row0 + P::row(r) : N - 1;
    row_norm[r] = pair.rows.norms[b * N + i];
    u[r] = here.row_potential[i] * inverse;
  }
  Result product;
#pragma unroll 1
  for (int column0 = 0; column0 < M; column0 += P::COLUMNS) {
    load_columns(tiles, pair, here, b, column0, M);
    P entries = tile_products(tiles, pair, b, row0, column0);
#pragma unroll
    for (int h = 0; h < P::GROUPS; ++h)
#pragma unroll
      for (int k = 0; k < GROUP; ++k) {
        const T norm = tiles.norm[P::column(h, k)], v = tiles.factor[P::column(h, k)];
#pragma unroll
        for (int r = 0; r < P::ROWS; ++r) {
          T& entry = entries.at(r, h, k);
          const T log_plan = u[r] + v - pair.cost(entry, row_norm[r], norm) * inverse, weight = exponential(log_plan);
          if (weight != 0) {
            sums[r].part[0] += weight;
            sums[r].part[1] += weight * (log_plan - 1);
          }
          entry = pair.cosine ? weight * norm : weight;
        }
      }
    product.add(entries, tiles, pair, b, column0, d0);
  }
  product.write(tiles, result + (b * N + row0) * pair.D, pair.D, N - row0, d0);
  if (d0 > 0) return;
#pragma unroll
  for (int r = 0; r < P::ROWS; ++r)
#pragma unroll
    for (int k = 0; k < 2; ++k) gathered[P::row(r)][P::sharer()][k] = sums[r].part[k];
  __syncthreads();
  const int row = threadIdx.x / 2, k = threadIdx.x % 2;
  if (row >= FEATURE_ROWS || row0 + row >= N) return;
  T total = 0;
  for (int s = 0; s < P::SHARERS; ++s) total += gathered[row][s][k];
  statistics[(b * 2 + k) * N + row0 + row] = total;
}

// In place: P Y becomes the gradient; a warp per vector. The second statistic becomes its share of the gradient of epsilon.
template <class T>
__global__ void __launch_bounds__(STREAM_THREADS)
    finish_kernel(int64_t total, int D, bool cosine, Vectors<T> side, const T* upstream, T* result, T* statistics) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * STREAM_WARPS + threadIdx.x / 32, b = at / side.count, i = at % side.count;
  if (at >= total) return;
  const int lane = threadIdx.x % 32;
  const T e = upstream[b], norm = side.norms[at], mass = statistics[b * 2 * side.count + i];
  const T* const x = side.vectors + at * D;
  T* const gradient = result + at * D;
  T along = 0;
  if (cosine) {
    for (int d = lane; d < D; d += 32) along += x[d] * norm * gradient[d];
    along = warp_sum(along);
  }
  for (int d = lane; d < D; d += 32)
    gradient[d] = cosine ? e * norm * (x[d] * norm * along - gradient[d]) : 2 * e * (mass * x[d] - gradient[d]);
  if (lane == 0) statistics[(b * 2 + 1) * side.count + i] *= e;
}

template <class T>
struct AddEpsilon {
  int N;
  const T* statistics;  // [B, 2, N]
  T* sums;              // [B]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t b, T* shared) const {
    T sum = 0;
    for (int i = threadIdx.x; i < N; i += STREAM_THREADS) sum += statistics[(b * 2 + 1) * N + i];
    sum = problem_sum(sum, shared);
    if (threadIdx.x == 0) sums[b] = sum;
  }
};

template <class T>
int side_gradient(const SinkhornFeaturesBackward& p, const Pair<T>& pair, const void* row_potential, const void* column_potential,
                  void* result, T* statistics, void* stream) {
  constexpr int64_t dimensions = PlanProduct<T>::DIMENSIONS;
  const int64_t blocks = p.B * ((pair.rows.count + FEATURE_ROWS - 1) / FEATURE_ROWS) * ((p.D + dimensions - 1) / dimensions);
  const int64_t total = p.B * pair.rows.count;
  const Plan<T> plan{static_cast<const T*>(row_potential), static_cast<const T*>(column_potential), static_cast<const T*>(p.epsilon)};
  const int status = PK_LAUNCH((gradient_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(FEATURE_THREADS), 0, stream, pair, plan,
                               static_cast<T*>(result), statistics);
  if (status != 0) return status;
  const int64_t vector_blocks = (total + STREAM_WARPS - 1) / STREAM_WARPS;
  return PK_LAUNCH((finish_kernel<T>), dim3(static_cast<unsigned>(vector_blocks)), dim3(STREAM_THREADS), 0, stream, total, pair.D,
                   pair.cosine, pair.rows, static_cast<const T*>(p.grad_entropic_value), static_cast<T*>(result), statistics);
}

template <class T>
int64_t backward(const SinkhornFeaturesBackward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  T* const x_norms = pieces.take<T>(p.B * p.N);
  T* const y_norms = pieces.take<T>(p.B * p.M);
  T* const x_statistics = pieces.take<T>(p.B * p.N * 2);
  T* const y_statistics = pieces.take<T>(p.B * p.M * 2);
  if (!status) return pieces.bytes();
  const T* const x = static_cast<const T*>(p.x);
  const T* const y = static_cast<const T*>(p.y);
  const int D = static_cast<int>(p.D);
  const Vectors<T> of_x{static_cast<int>(p.N), x, x_norms}, of_y{static_cast<int>(p.M), y, y_norms};
  *status = launch_norms(p.B * p.N, D, p.cosine, x, x_norms, stream);
  if (*status == 0) *status = launch_norms(p.B * p.M, D, p.cosine, y, y_norms, stream);
  if (*status == 0) *status = side_gradient<T>(p, {D, p.cosine, of_x, of_y}, p.f, p.g, p.grad_x, x_statistics, stream);
  if (*status == 0) *status = side_gradient<T>(p, {D, p.cosine, of_y, of_x}, p.g, p.f, p.grad_y, y_statistics, stream);
  const AddEpsilon<T> add{static_cast<int>(p.N), x_statistics, static_cast<T*>(p.grad_epsilon)};
  if (*status == 0)
    *status = PK_LAUNCH((problem_kernel<T, AddEpsilon<T>>), dim3(static_cast<unsigned>(p.B)), dim3(STREAM_THREADS), 0, stream, add);
  return pieces.bytes();
}

}  // namespace

namespace protokernels {

int64_t sinkhorn_features_backward_workspace(const SinkhornFeaturesBackward& p) {
  return p.kind == Kind::f64 ? backward<double>(p, nullptr, nullptr, nullptr) : backward<float>(p, nullptr, nullptr, nullptr);
}

int launch_sinkhorn_features_backward(const SinkhornFeaturesBackward& p, void* workspace, void* stream) {
  int status = 0;
  if (p.B == 0) return 0;
  if (!p.grad_entropic_value) {
    const std::size_t bytes = p.kind == Kind::f64 ? sizeof(double) : sizeof(float);
    status = pk::memset_async(p.grad_x, 0, bytes * p.B * p.N * p.D, stream);
    if (status == 0) status = pk::memset_async(p.grad_y, 0, bytes * p.B * p.M * p.D, stream);
    if (status == 0) status = pk::memset_async(p.grad_epsilon, 0, bytes * p.B, stream);
    return status;
  }
  p.kind == Kind::f64 ? backward<double>(p, workspace, stream, &status) : backward<float>(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
