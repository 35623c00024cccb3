// SPDX-License-Identifier: MIT
// Half-steps of Sinkhorn between features of up to 128 dimensions, in single precision.
//
// half_kernel: 4 warps have 16 FRAGMENTS rows each, in registers, and walk over a share of the columns, which come through shared memory in
// three stages. An exponent is bias_i + bias_j + factor_i scale_j <x_i, y_j>, base 2. How the terms are added up is a Walk:
//
//   logs     the largest exponent so far is taken out of each two; for the first iteration and unbalanced problems
//   sums     nothing is taken out: with the potential from before, an exponential is an entry of a plan whose column sums are the masses. A
//            row whose sum is not within [1e-25, 1e25] is done again by exact_log_sum
//   values   sums of P, P C and P v
//
// The last share of a tile to arrive adds the shares up in their order and gives the potentials; the last tile of a problem looks at the
// error. u after t iterations lies in one of two arrays, by turns, so that a problem that stops keeps the one before.
//
// Limit at 4096 x 4096, D = 64 on an H200: latency of the tensor cores. A half-step takes 23 us, of which 10 us are products at the rate that
// mma.sync is said to reach and 4 us exponentials; 12 warps of a multiprocessor issue in 35 % of the cycles (Nsight Compute).
#pragma once

#include "ops/cuda/sinkhorn_features_split.cuh"
#include "ops/cuda/sinkhorn_stream_solve.cuh"

namespace {

enum class Walk { logs, sums, values };

constexpr int HALF_THREADS = 128, HALF_STAGES = 3;
constexpr int MOST_PARTS = 3;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

template <int STEPS>
constexpr int PANEL = 32;  // columns of a stage
template <int STEPS>
constexpr int PANEL_UNITS = PANEL<STEPS> * STEPS * 4;  // of 16 bytes
template <int STEPS>
constexpr int STAGE_UNITS = PANEL_UNITS<STEPS> + PANEL<STEPS> / 2;  // vectors, then terms
template <int FRAGMENTS>
constexpr int HALF_ROWS = HALF_THREADS / 32 * 16 * FRAGMENTS;

struct HalfStep {
  Solve<float> p;
  SplitSide rows, columns;  // roles
  int D, side, shares, share_columns;
  bool cosine, tested;
  const float* before;         // [B, rows]: potential of the rows; unknown before the first half-step
  const float* other;          // [B, columns]
  float* after;                // [B, rows]
  float* partial;              // [B, shares, MOST_PARTS, rows]
  float* errors;               // [B, tiles]
  unsigned* tile_arrivals;     // [B, tiles]; 0 between launches
  unsigned* problem_arrivals;  // [B]

  __device__ __forceinline__ float scale(int64_t b) const { return LOG2_E * p.inverse_epsilon(b); }
  __device__ __forceinline__ float cost(float product, float row_norm, float column_norm) const {
    if (cosine) return 1 - product;  // of unit vectors
    const float squares = row_norm + column_norm - 2 * product;
    return squares < 0 ? 0.0f : squares;  // a NaN stays
  }
};

// What a thread adds up of a row.
template <Walk walk>
struct RowTotal {
  static constexpr int PARTS = walk == Walk::logs ? 2 : walk == Walk::sums ? 1 : 3;
  float part[PARTS];

  __device__ __forceinline__ RowTotal() {
#pragma unroll
    for (int k = 0; k < PARTS; ++k) part[k] = walk == Walk::logs && k == 0 ? -INFINITY : 0.0f;
  }
  template <int count>
  __device__ __forceinline__ void add(const float (&x)[count]) {
    if constexpr (walk == Walk::sums) {
#pragma unroll
      for (int k = 0; k < count; ++k) part[0] += pk::exp2_fast(x[k]);
    } else {
      float top = part[0];
#pragma unroll
      for (int k = 0; k < count; ++k) top = larger(top, x[k]);
      const float shift = top == -INFINITY ? 0.0f : top;
      part[1] *= pk::exp2_fast(part[0] - shift);
#pragma unroll
      for (int k = 0; k < count; ++k) part[1] += pk::exp2_fast(x[k] - shift);
      part[0] = top;
    }
  }
  __device__ __forceinline__ void merge(const float (&other)[PARTS]) {
    if constexpr (walk == Walk::logs) {
      const float top = larger(part[0], other[0]), shift = top == -INFINITY ? 0.0f : top;
      part[1] = part[1] * pk::exp2_fast(part[0] - shift) + other[1] * pk::exp2_fast(other[0] - shift);
      part[0] = top;
    } else {
#pragma unroll
      for (int k = 0; k < PARTS; ++k) part[k] += other[k];
    }
  }
  __device__ __forceinline__ void merge_neighbour(int lanes) {
    float other[PARTS];
#pragma unroll
    for (int k = 0; k < PARTS; ++k) other[k] = __shfl_xor_sync(ALL, part[k], lanes);
    merge(other);
  }
};

// Entries (row, column) and (row, column + 1) of the plan, from their exponents and their products over the scale of the row.
__device__ __forceinline__ void add_values(const HalfStep& step, int64_t b, int row, int column, const float (&x)[2],
                                           const float (&product)[2], RowTotal<Walk::values>& total) {
  const int i = row < step.rows.count ? row : step.rows.count - 1;
  const float row_scale = step.rows.terms[b * step.rows.padded + i].y, row_norm = step.rows.norms[b * step.rows.count + i];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int j = column + k;
    const float plan = pk::exp2_fast(x[k]);
    if (plan == 0 || j >= step.columns.count) continue;
    const int64_t at = b * step.columns.count + j;
    total.part[0] += plan;
    total.part[1] += plan * step.cost(row_scale * product[k], row_norm, step.columns.norms[at]);
    total.part[2] += plan * step.other[at];
  }
}

// The threads that have a tile of rows together.
template <int THREADS_>
struct WholeBlock {
  static constexpr int THREADS = THREADS_;
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x) != 0; }
  static __device__ __forceinline__ bool is_last(unsigned* count, int64_t blocks) { return arrives_last(count, blocks); }
};

template <class Block>
__device__ __forceinline__ float block_sum(float value, float (*shared)[2]) {
  value = warp_sum(value);
  Block::sync();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][0] = value;
  Block::sync();
  float total = 0;
#pragma unroll
  for (int w = 0; w < Block::THREADS / 32; ++w) total += shared[w][0];
  return total;
}

// log sum_j exp(v_j - C_ij / epsilon) of a row by the whole block, in every thread.
template <class Block>
__device__ __forceinline__ float exact_log_sum(const HalfStep& step, int64_t b, int i, float (*shared)[2]) {
  const int64_t row = b * step.rows.count + i;
  const float inverse = step.p.inverse_epsilon(b);
  LogSum<float> sum;
#pragma unroll 1
  for (int j = threadIdx.x; j < step.columns.count; j += Block::THREADS) {
    const int64_t column = b * step.columns.count + j;
    float product = 0;
#pragma unroll 1
    for (int d = 0; d < step.D; ++d) product += step.rows.vectors[row * step.D + d] * step.columns.vectors[column * step.D + d];
    if (step.cosine) product *= step.rows.norms[row] * step.columns.norms[column];
    sum.merge(step.other[column] - step.cost(product, step.rows.norms[row], step.columns.norms[column]) * inverse, 1);
  }
  sum.reduce();
  Block::sync();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][0] = sum.part[0], shared[threadIdx.x / 32][1] = sum.part[1];
  Block::sync();
  LogSum<float> total;
#pragma unroll 1
  for (int w = 0; w < Block::THREADS / 32; ++w) total.merge(shared[w][0], shared[w][1]);
  return total.value();
}

// The potential of a row from its log-sum; what the row adds to the error of the iterate before.
__device__ __forceinline__ float finish_row(const HalfStep& step, int64_t b, int64_t at, float log_sum, float row_sum) {
  const Solve<float>& p = step.p;
  const float mass = step.side == 0 ? p.a[at] : p.b[at], potential = p.half_step(b, step.side, mass, log_sum);
  step.after[at] = potential;
  const int64_t place = b * step.rows.padded + at - b * step.rows.count;
  step.rows.terms[place].x = potential * LOG2_E - (step.cosine ? 0.0f : step.scale(b) * step.rows.norms[at]);
  if (!step.tested) return 0;
  const float before = step.before[at];
  if (before == -INFINITY) return p.balanced ? mass : 0.0f;
  if (!p.balanced) return mass * magnitude(before - potential);
  return row_sum >= 0 ? magnitude(row_sum - mass) : mass * magnitude(exponential(before - potential) - 1);
}

// What becomes of the sums of a tile of rows, of iteration t, a thread per row; by the whole block that is the last to have some of them.
template <class Block, Walk walk>
__device__ __forceinline__ void finish_tile(const HalfStep& step, int64_t b, int tile, int tiles, int tile_rows, int t,
                                            const RowTotal<walk>& total, float (*shared)[2]) {
  const int N = step.rows.count, i = tile * tile_rows + static_cast<int>(threadIdx.x);
  const int64_t at = b * N + i;
  const bool speaks = static_cast<int>(threadIdx.x) < tile_rows && i < N;
  if constexpr (walk == Walk::values) {
    if (!speaks) return;
    const float u = step.p.result(b)[i];
    step.p.values[b * 3 * N + i] = total.part[0];
    step.p.values[(b * 3 + 1) * N + i] = total.part[1];
    step.p.values[(b * 3 + 2) * N + i] = total.part[0] == 0 ? 0.0f : total.part[0] * (u - 1) + total.part[2];
  } else {
    float error = 0, log_sum = -INFINITY;
    bool strays = false;
    if (speaks) {
      if constexpr (walk == Walk::logs) {
        log_sum = total.part[0] == -INFINITY ? -INFINITY : (total.part[0] + log2f(total.part[1])) * LN_2;
        if (total.part[1] != total.part[1]) log_sum = total.part[1];
      } else {
        const float mass = step.side == 0 ? step.p.a[at] : step.p.b[at];
        strays = mass != 0 && (total.part[0] < 1e-25f || total.part[0] > 1e25f || step.before[at] == -INFINITY);
        log_sum = logarithm(total.part[0]) - step.before[at];
      }
      if (!strays) error = finish_row(step, b, at, log_sum, walk == Walk::sums ? total.part[0] : -1.0f);
    }
    if constexpr (walk == Walk::sums) {
      if (Block::any(strays)) {
        PK_SHARED(int, again, Block::THREADS);
        again[threadIdx.x] = strays;
        Block::sync();
#pragma unroll 1
        for (int row = 0; row < tile_rows; ++row) {
          if (!again[row]) continue;
          const float exact = exact_log_sum<Block>(step, b, tile * tile_rows + row, shared);
          if (static_cast<int>(threadIdx.x) == row) error = finish_row(step, b, at, exact, -1.0f);
        }
      }
    }
    if (!step.tested) return;
    error = block_sum<Block>(error, shared);
    if (threadIdx.x == 0) step.errors[b * tiles + tile] = error;
    if (!Block::is_last(step.problem_arrivals + b, tiles) || threadIdx.x != 0) return;
    float sum = 0;
    for (int other = 0; other < tiles; ++other) sum += step.errors[b * tiles + other];
    if (sum > step.p.tolerance || sum != sum) return;
    step.p.done[b] = 1;
    step.p.marginal_error[b] = sum;
    step.p.iterations[b] = t;
  }
}

// resources: dynamic shared 49920 bytes
template <int STEPS, int FRAGMENTS, Walk walk>
__global__ void __launch_bounds__(HALF_THREADS, 3) half_kernel(const HalfStep step) {
  using Total = RowTotal<walk>;
  constexpr int panel = PANEL<STEPS>, tile_rows = HALF_ROWS<FRAGMENTS>;
  constexpr int AT_ONCE = FRAGMENTS == 1 ? 4 : 2;  // times 8 columns whose products a thread holds
  PK_DYNAMIC_SHARED(uint4, stages);                // [HALF_STAGES, STAGE_UNITS]
  PK_SHARED(float, shared, HALF_THREADS / 32, 2);
  const int N = step.rows.count, tiles = (N + tile_rows - 1) / tile_rows;
  const int b = static_cast<int>(blockIdx.x / (tiles * step.shares));
  const int place = static_cast<int>(blockIdx.x % (tiles * step.shares)), share = place % step.shares, tile = place / step.shares;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int warp_row = tile * tile_rows + warp * 16 * FRAGMENTS;
  const bool active = warp_row < N;  // of the whole warp
  const int first = share * step.share_columns, left = step.columns.padded - first;
  const int panels = ((left < step.share_columns ? left : step.share_columns) + panel - 1) / panel;
  const uint4* const vectors = step.columns.split + (static_cast<int64_t>(b) * step.columns.padded + first) * STEPS * 4;
  const float2* const terms = step.columns.terms + static_cast<int64_t>(b) * step.columns.padded + first;

  const auto fetch_vectors = [&](int which) {
    uint4* const stage = stages + which % HALF_STAGES * STAGE_UNITS<STEPS>;
#pragma unroll 1
    for (int u = threadIdx.x; u < PANEL_UNITS<STEPS> && which < panels; u += HALF_THREADS)
      pk::copy_async_16(stage + u, vectors + which * PANEL_UNITS<STEPS> + u);
  };
  const auto fetch_terms = [&](int which) {
    uint4* const stage = stages + which % HALF_STAGES * STAGE_UNITS<STEPS> + PANEL_UNITS<STEPS>;
    for (int u = threadIdx.x; u < panel / 2 && which < panels; u += HALF_THREADS)
      pk::copy_async_16(stage + u, terms + which * panel + 2 * u);
    pk::copy_async_commit();
  };
  // What does not depend on the half-step before comes first.
  pk::let_next_begin();
  fetch_vectors(0);
  fetch_vectors(1);
  RowFragments<STEPS, FRAGMENTS> fragments;
  float bias[FRAGMENTS][2], factor[FRAGMENTS][2];
  Total totals[FRAGMENTS][2];
  fragments.load(step.rows, b, warp_row);
  pk::wait_for_previous();
  if (walk != Walk::values && step.p.done[b] != 0) {
    pk::copy_async_wait<0>();
    return;
  }
  fetch_terms(0);
  fetch_terms(1);
  const float scale = step.scale(b);
#pragma unroll
  for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + m * 16 + h * 8 + group, i = row < N ? row : N - 1;
      const float2 of_row = step.rows.terms[static_cast<int64_t>(b) * step.rows.padded + i];
      // logs: the potential is not among the terms
      const float norm = step.cosine ? 0.0f : step.rows.norms[static_cast<int64_t>(b) * N + i];
      bias[m][h] = (walk == Walk::logs ? -scale * norm : of_row.x) - (step.cosine ? scale : 0.0f);
      factor[m][h] = (step.cosine ? scale : 2 * scale) * of_row.y;
    }

#pragma unroll 1
  for (int which = 0; which < panels; ++which) {
    pk::copy_async_wait<1>();
    __syncthreads();
    fetch_vectors(which + 2);
    fetch_terms(which + 2);
    const uint4* const stage = stages + which % HALF_STAGES * STAGE_UNITS<STEPS>;
    const float4* const stage_terms = reinterpret_cast<const float4*>(stage + PANEL_UNITS<STEPS>);
    if (!active) continue;
#pragma unroll
    for (int c = 0; c < panel; c += 8 * AT_ONCE) {
      float products[AT_ONCE][FRAGMENTS][4];
      multiply_columns(fragments, stage + c * STEPS * 4, products);
#pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        const float4 pair = pk::load_vector<float4>(stage_terms + c / 2 + f * 4 + member);
        const float column_bias[2] = {pair.x, pair.z}, column_scale[2] = {pair.y, pair.w};
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float x[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) x[k] = factor[m][h] * (column_scale[k] * products[f][m][h * 2 + k]) + (bias[m][h] + column_bias[k]);
            if constexpr (walk != Walk::values) {
              totals[m][h].add(x);
            } else {
              float product[2];
#pragma unroll
              for (int k = 0; k < 2; ++k) product[k] = column_scale[k] * products[f][m][h * 2 + k];
              const int row = warp_row + m * 16 + h * 8 + group, column = first + which * panel + c + f * 8 + member * 2;
              add_values(step, b, row, column, x, product, totals[m][h]);
            }
          }
      }
    }
  }
  pk::copy_async_wait<0>();

  float* const partial = step.partial + static_cast<int64_t>(b) * step.shares * MOST_PARTS * N;
#pragma unroll
  for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      totals[m][h].merge_neighbour(1);
      totals[m][h].merge_neighbour(2);
      const int row = warp_row + m * 16 + h * 8 + group;
      if (member == 0 && row < N)
#pragma unroll
        for (int k = 0; k < Total::PARTS; ++k) partial[(static_cast<int64_t>(share) * MOST_PARTS + k) * N + row] = totals[m][h].part[k];
    }
  if (!arrives_last(step.tile_arrivals + static_cast<int64_t>(b) * tiles + tile, step.shares)) return;

  const int i = tile * tile_rows + static_cast<int>(threadIdx.x);
  Total total;
  if (threadIdx.x < tile_rows && i < N) {
#pragma unroll 4
    for (int s = 0; s < step.shares; ++s) {
      float part[Total::PARTS];
#pragma unroll
      for (int k = 0; k < Total::PARTS; ++k) part[k] = partial[(static_cast<int64_t>(s) * MOST_PARTS + k) * N + i];
      total.merge(part);
    }
  }
  finish_tile<WholeBlock<HALF_THREADS>>(step, b, tile, tiles, tile_rows, step.p.t, total, shared);
}

// Biases of one side from its potentials; result: u where a problem stopped.
struct BiasOp {
  Solve<float> p;
  SplitSide vectors;
  bool cosine, result;
  const float* potentials;  // [B, count]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t b, float*) const {
    const float* const here = result ? p.result(b) : potentials + b * vectors.count;
    for (int i = threadIdx.x; i < vectors.count; i += blockDim.x)
      vectors.terms[b * vectors.padded + i].x =
          here[i] * LOG2_E - (cosine ? 0.0f : LOG2_E * p.inverse_epsilon(b) * vectors.norms[b * vectors.count + i]);
  }
};

}  // namespace
