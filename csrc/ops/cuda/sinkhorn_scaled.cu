// SPDX-License-Identifier: MIT
// Balanced Sinkhorn in float on the GPU, problems whose kernel fits the registers of a block: one launch for all iterations. The equations
// stand in ops/sinkhorn.h.
//
// Iterated is w_i = a_i / (K z)_i, z_j = b_j / (K^T w)_j on K = exp(alpha_i + beta_j - C_ij / eps), u_i being alpha_i + log w_i and v_j
// being beta_j + log z_j: four operations per entry and no exponential. At the start beta is v, and alpha makes the largest entry of every
// row 1. A product outside of [1e-13, 1e13] makes its weight NaN, which the next product hands to every thread: no vote is needed for all
// of them to leave the loop together, take the whole iteration again in the log domain, and make K anew from its log-sums. The stop test
// is free: sum_i |w_i (K z)_i - a_i| of the last iterate falls out of the next row product.
//
// Limit on an H200 (measured): latency. 64 x 49 x 49, 100 iterations: 29 us, about 240 cycles a half-step, of which a product takes 150
// (weights arrive at 128 bytes a cycle for all lanes together, then a shuffle), quotient, store and barrier the rest. 16 x 196 x 196: 100
// us, about 1700 cycles an iteration, of which the multiprocessor's 128 units need 680.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_grid.cuh"
#include "ops/cuda/sinkhorn_scaled.cuh"

namespace {

// The row or column that a thread looks after. Weight 0: no mass, or no partner for it.
struct Mine {
  float mass, base, weight, share, stray;  // share: the mass if there is a partner; stray: what the weight becomes outside of the range

  __device__ __forceinline__ void live(bool alive) { share = alive ? mass : 0.0f, stray = alive ? NAN : 0.0f; }
  __device__ __forceinline__ bool alive() const { return share != 0; }
  __device__ __forceinline__ float potential() const { return alive() ? base + logf(weight) : -INFINITY; }
  __device__ __forceinline__ float step(float product) const {
    return product >= LOW<float> && product <= HIGH<float> ? share * pk::reciprocal_fast(product) : stray;
  }
  __device__ __forceinline__ void take_log_sum(float log_sum) {
    live(mass != 0 && log_sum != -INFINITY);
    base = alive() ? -log_sum : -INFINITY;
    weight = share;
  }
};

// Of a column: infinity would make NaN in rows where K is 0 and infinity in the others, which then part.
__device__ __forceinline__ float finite_or_nan(float weight) { return fabsf(weight) < INFINITY ? weight : NAN; }

// Whether the errors of all rows keep to the tolerance; for every thread.
template <int WARPS>
__device__ __forceinline__ bool stops(float error, float tolerance, float (&sums)[WARPS]) {
  error = warp_sum(error);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = error;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < WARPS; ++w) total += sums[w];
  return total <= tolerance;
}

template <class Layout>
__device__ __forceinline__ void record(const Forward<float>& p, const Layout& layout, const Mine& row, const Mine& column, int t) {
  float* const out = p.history + (static_cast<int64_t>(blockIdx.x) * p.num_iters + t) * (p.N + p.M);
  if (layout.speaks_for_row()) out[layout.own_row] = row.potential();
  if (layout.speaks_for_column()) out[p.N + layout.own_column] = column.potential();
}

// The potentials, P and what is summed over it.
template <class Layout, int WARPS>
__device__ __forceinline__ void write_solution(const Forward<float>& p, Layout& layout, const Mine& row, const Mine& column, float error,
                                               int iterations, float (&sums)[6][WARPS]) {
  const float epsilon = p.epsilon[blockIdx.x], u = row.potential(), v = column.potential();
  Values<float> values;
  values.error = error;
  if (layout.speaks_for_row()) {
    values.mass_a = row.mass;
    if (row.mass != 0 && !row.alive()) values.dead += 1;
    p.f[static_cast<int64_t>(blockIdx.x) * p.N + layout.own_row] = u * epsilon;
  }
  if (layout.speaks_for_column()) {
    values.mass_b = column.mass;
    if (column.mass != 0 && !column.alive()) values.dead += 1, values.error += column.mass;
    p.g[static_cast<int64_t>(blockIdx.x) * p.M + layout.own_column] = v * epsilon;
  }
  __syncthreads();  // K may have been made just now
  layout.put_row_base(u);
  layout.put_column_base(v);
  layout.put_row(row.weight);
  layout.put_column(column.weight);
  layout.each([&](float plan, float of_row, float of_column, float c) {
    if (plan == 0) return;
    values.transported += plan * c;
    values.value += plan * epsilon * (of_row + of_column - 1);
  });
  write_values(p, values, iterations, sums);
}

template <class Layout, bool RECORD>
__device__ __forceinline__ void solve_problem(const Forward<float>& p) {
  constexpr int WARPS = Layout::THREADS / 32;
  using Shared = typename Layout::Shared;
  PK_SHARED(Shared, shared);
  PK_SHARED(float, sums, 6, WARPS);
  const int64_t problem = blockIdx.x;
  const float epsilon = p.epsilon[problem];
  Layout layout(shared, p.N, p.M, p.cost, epsilon);
  const bool speaks_for_row = layout.speaks_for_row(), speaks_for_column = layout.speaks_for_column(), tested = p.tolerance > 0;
  const int i = layout.own_row, j = layout.own_column;
  Mine row{}, column{};
  row.mass = i < p.N ? p.a[problem * p.N + i] : 0.0f;
  column.mass = j < p.M ? p.b[problem * p.M + j] : 0.0f;
  column.live(column.mass != 0);
  column.base = !column.alive() ? -INFINITY : p.g_init ? p.g_init[problem * p.M + j] / epsilon : 0.0f;
  column.weight = column.alive() ? 1.0f : 0.0f;

  layout.put_column_base(column.base);
  layout.put_column(column.weight);
  layout.fill();
  const float top = layout.row_top();
  row.live(row.mass != 0 && top != -INFINITY);
  row.base = row.alive() ? -top : -INFINITY;
  layout.put_row_base(row.base);
  layout.exponentiate();

  float error = 0, before = 0;  // the latter: the column's weight before the last iteration
  bool fresh = true;            // K has just been made: a NaN may be one of the input, seen by its row alone
  int t = 0;
  for (;;) {
    const float product = layout.row_product();
    if (!fresh && product != product) {  // for every thread
      column.weight = before;
      layout.put_column_base(column.potential());
      row.take_log_sum(layout.row_log_sum());
      layout.put_row_base(row.potential());
      column.take_log_sum(layout.column_log_sum());
      layout.put_column_base(column.base);  // a barrier, after which nobody reads the potentials of the rows
      layout.put_row_base(row.base);
      layout.put_column(column.weight);
      layout.fill();
      layout.exponentiate();
      fresh = true;
      if (RECORD) record(p, layout, row, column, t - 1);
      continue;
    }
    const bool last = t == p.num_iters;
    if (tested || last) error = !speaks_for_row ? 0.0f : row.alive() ? fabsf(row.weight * product - row.mass) : row.mass;
    if (last) break;
    const float weight = row.step(product);
    layout.put_row(weight);
    if (tested && t > 0 && stops(error, p.tolerance, sums[0])) break;
    row.weight = weight, before = column.weight;
    column.weight = finite_or_nan(column.step(layout.column_product()));
    layout.put_column(column.weight);
    if (RECORD) record(p, layout, row, column, t);
    ++t;
    fresh = false;
  }
  write_solution(p, layout, row, column, error, t, sums);
}

// Before sm_90 the assembler spills the widest layout; sinkhorn_scaled() knows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool WIDE_FITS = false;
#else
constexpr bool WIDE_FITS = true;
#endif

// The widest layout takes all 255 registers: none on sm_90.
// resources: spills at most 84 bytes (sm_100)
template <class Layout, bool RECORD>
__global__ void __launch_bounds__(Layout::THREADS, 1) scaled_kernel(const Forward<float> p) {
  if constexpr (Layout::SIDE <= SINKHORN_SCALED_NARROW || WIDE_FITS) solve_problem<Layout, RECORD>(p);
}

template <class Layout>
int solve(const SinkhornForward& p, void* stream) {
  const dim3 blocks(static_cast<unsigned>(p.B)), threads(Layout::THREADS);
  if (p.history) return PK_LAUNCH((scaled_kernel<Layout, true>), blocks, threads, 0, stream, Forward<float>(p));
  return PK_LAUNCH((scaled_kernel<Layout, false>), blocks, threads, 0, stream, Forward<float>(p));
}

}  // namespace

namespace protokernels {

int launch_scaled_forward(const SinkhornForward& p, void* stream) {
  const int64_t side = p.N > p.M ? p.N : p.M;
  if (side <= 32) return solve<Twice<32, 32, 1, 1>>(p, stream);
  if (side <= 56) return solve<Twice<64, 56, 1, 2>>(p, stream);
  if (side <= 64) return solve<Twice<64, 64, 1, 2>>(p, stream);
  if (side <= 128) return solve<Grid<8, 8>>(p, stream);
  return solve<Grid<13, 13>>(p, stream);
}

}  // namespace protokernels
