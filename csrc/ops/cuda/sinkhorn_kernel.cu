// SPDX-License-Identifier: MIT
// Sinkhorn on the GPU, problems that fit one multiprocessor: one block, one launch for all iterations. The equations stand in
// ops/sinkhorn.h.
//
// The iteration runs on a scaled kernel K = exp(alpha_i + beta_j - C_ij / eps) that is made once: w_i = a_i / (K z)_i, z_j = b_j / (K^T
// w)_j, and u_i = alpha_i + log w_i, v_j = beta_j + log z_j. alpha and beta take the log-sums without the masses, so that both products
// stay near 1; one that leaves [1e-13, 1e13] has its half-step done again in the log domain and K made anew: a warp does that for its own
// rows, the block for columns. Unbalanced problems always take the log domain: their weights have no bound. The first iteration does too,
// for everyone. The stop test is free: sum_i |w_i (K z)_i - a_i| of the last iterate falls out of the next row pass.
// Balanced problems in float that fit registers have kernels of their own (sinkhorn_scaled.cu); here are the others: double, unbalanced, up
// to 256 x 256. Limited by latency.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_forward.cuh"
#include "ops/cuda/sinkhorn_tile.cuh"

namespace {

using namespace protokernels;

// What a lane knows of a row or of a column: the potential is base + log weight. Weight 0: no mass, or no partner for it.
template <class T>
struct Side {
  T mass, base, weight;

  __device__ __forceinline__ bool present() const { return weight != 0; }
  __device__ __forceinline__ bool dead() const { return mass != 0 && weight == 0; }
  __device__ __forceinline__ T potential() const { return present() ? base + logarithm(weight) : -T(INFINITY); }
  __device__ __forceinline__ bool strays(T sum) const { return present() && !(sum >= LOW<T> && sum <= HIGH<T>); }
  // A half-step in the log domain. Balanced: the base carries the log-sum, the weight the mass.
  __device__ __forceinline__ void take_log_sum(T log_sum, T damping, bool balanced) {
    const bool alive = mass != 0 && log_sum != -T(INFINITY);
    weight = !alive ? T(0) : balanced ? mass : T(1);
    base = !alive ? -T(INFINITY) : balanced ? -log_sum : damping * (logarithm(mass) - log_sum);
  }
};

// The potentials, P and what is summed over it.
template <class S, class T>
__device__ __forceinline__ void write_solution(const Forward<T>& p, Tile<S, Side<T>>& tile, const Rows<S, Side<T>>& rows,
                                               const Side<T> (&columns)[S::E], T error, int iterations, T (&sums)[6][S::W]) {
  const T epsilon = p.epsilon[blockIdx.x];
  const int64_t problem = blockIdx.x;
  Values<T> values;
  T v[S::E];
  values.error = error;
#pragma unroll
  for (int e = 0; e < S::E; ++e) {
    v[e] = columns[e].potential();
    if (tile.warp != 0 || tile.column(e) >= tile.M) continue;
    values.mass_b += columns[e].mass;
    if (columns[e].dead()) values.dead += 1;
    if (columns[e].dead() && p.balanced) values.error += columns[e].mass;
    if (p.rho_b != T(INFINITY) && columns[e].mass != 0) {  // q_j = b_j exp(-g_j / rho_b): columns come last
      const T q = columns[e].dead() ? T(0) : columns[e].mass * exponential(-v[e] * epsilon / p.rho_b);
      values.value += p.rho_b * ((q == 0 ? T(0) : -q * v[e] * epsilon / p.rho_b) - q + columns[e].mass);
    }
    p.g[problem * tile.M + tile.column(e)] = v[e] * epsilon;
  }
#pragma unroll 1
  for (int batch = 0; batch < S::BATCHES; ++batch) {
    const Side<T> row = rows.get(batch);
    const T own_u = row.potential();
    const bool first = tile.lane < SLOTS && tile.own_row(batch) < tile.N;
    T own_sum = 0;
    for (int s = 0; s < SLOTS; ++s) {
      const int i = tile.row(batch, s);
      const T u = __shfl_sync(ALL, own_u, s);
      if (i >= tile.N) break;
      T sum = 0;
#pragma unroll
      for (int e = 0; e < S::E; ++e) {
        const T c = tile.cost_at(i, e), plan = exponential(u + v[e] - c * tile.inverse_epsilon);
        if (plan == 0) continue;
        sum += plan;
        values.transported += plan * c;
        values.value += plan * epsilon * (u + v[e] - 1);
      }
      if (p.rho_a != T(INFINITY)) {
        sum = warp_sum(sum);
        if (tile.lane == s) own_sum = sum;
      }
    }
    if (first) {
      values.mass_a += row.mass;
      if (row.dead()) values.dead += 1;
      if (p.rho_a != T(INFINITY) && row.mass != 0)
        values.value += p.rho_a * ((own_sum == 0 ? T(0) : own_sum * logarithm(own_sum / row.mass)) - own_sum + row.mass);
      p.f[problem * tile.N + tile.own_row(batch)] = own_u * epsilon;
    }
  }
  write_values<S::W>(p, values, iterations, sums);
}

// resources: dynamic shared 147456 bytes
template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) solve_kernel(const Forward<typename S::T> p) {
  using T = typename S::T;
  PK_DYNAMIC_SHARED(T, dynamic);
  using Row = Side<T>;
  using Shared = Exchange<S, Row>;
  PK_SHARED(Shared, exchange);
  PK_SHARED(T, sums, 6, S::W);
  const int64_t problem = blockIdx.x;
  const T epsilon = p.epsilon[problem];
  Tile<S, Row> tile(p.N, p.M, p.cost + problem * p.N * p.M, epsilon, dynamic, &exchange);
  const T damping_a = p.rho_a == T(INFINITY) ? T(1) : p.rho_a / (p.rho_a + epsilon);
  const T damping_b = p.rho_b == T(INFINITY) ? T(1) : p.rho_b / (p.rho_b + epsilon);
  const bool tested = p.tolerance > 0;
  Rows<S, Row> rows(exchange);
  Side<T> columns[S::E];
#pragma unroll 1
  for (int batch = 0; batch < S::BATCHES; ++batch) {
    const int i = tile.own_row(batch);
    rows.set(batch, {i < p.N ? p.a[problem * p.N + i] : T(0), -T(INFINITY), T(0)});
  }
#pragma unroll
  for (int e = 0; e < S::E; ++e) {
    const int j = tile.column(e);
    const T mass = j < p.M ? p.b[problem * p.M + j] : T(0);
    const T start = mass != 0 && p.g_init ? p.g_init[problem * p.M + j] / epsilon : T(0);
    columns[e] = {mass, mass != 0 ? start : -T(INFINITY), mass != 0 ? T(1) : T(0)};
  }

  T error = 0;
  int t = 0;
  for (;; ++t) {
    const bool last = t == p.num_iters, in_log = t == 0 || !p.balanced, with_error = tested || last;
    T z[S::E], sum[S::E] = {};
#pragma unroll
    for (int e = 0; e < S::E; ++e) z[e] = columns[e].weight;
    error = 0;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      Side<T> row = rows.get(batch);
      rows.keep(batch, row);
      const T old = row.base;
      bool strays = false;
      if (!in_log) {
        tile.fetch(batch);
        const T product = tile.times_columns(z);
        error += row.present() ? magnitude(row.weight * product - row.mass) : row.mass;
        strays = row.strays(product);  // before the weight goes: over an infinite product it would be 0, an absent row's
        row.weight = row.present() ? quotient(row.mass, product) : T(0);
      }
      if (in_log || __any_sync(ALL, strays)) {
        T v[S::E], beta[S::E];
#pragma unroll
        for (int e = 0; e < S::E; ++e) v[e] = columns[e].potential(), beta[e] = columns[e].base;
        row.take_log_sum(tile.log_row_sum(batch, v), damping_a, p.balanced);
        if (!in_log) tile.build(batch, row.base, beta);
        if (!p.balanced && t > 0 && row.present()) error += row.mass * magnitude(row.base - old);
      }
      if (!in_log) tile.add_rows(row.weight, sum);
      rows.set(batch, row);
    }
    if (with_error) error = warp_sum(tile.lane < SLOTS ? error : T(0));
    if (!in_log || with_error) tile.template combine<false>(sum, error, with_error);
    if (last || (tested && t > 0 && error <= p.tolerance)) break;

    bool strays = in_log;
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      strays |= columns[e].strays(sum[e]);
      columns[e].weight = columns[e].present() ? quotient(columns[e].mass, sum[e]) : T(0);
    }
    if (__any_sync(ALL, strays)) {  // the same in every warp
      T log_sum[S::E], beta[S::E];
      tile.log_column_sums(rows, log_sum);
#pragma unroll
      for (int e = 0; e < S::E; ++e) columns[e].take_log_sum(log_sum[e], damping_b, p.balanced), beta[e] = columns[e].base;
#pragma unroll 1
      for (int batch = 0; batch < S::BATCHES && p.balanced; ++batch) {
        Side<T> row = rows.get(batch);
        if (row.present()) row = {row.mass, row.potential() - logarithm(row.mass), row.mass};
        rows.set(batch, row);
        tile.build(batch, row.base, beta);
      }
    }
    if (p.history) {
      T* const out = p.history + (problem * p.num_iters + t) * (p.N + p.M);
#pragma unroll 1
      for (int batch = 0; batch < S::BATCHES; ++batch) {
        const T u = rows.get(batch).potential();
        if (tile.lane < SLOTS && tile.own_row(batch) < p.N) out[tile.own_row(batch)] = u;
      }
#pragma unroll
      for (int e = 0; e < S::E; ++e)
        if (tile.warp == 0 && tile.column(e) < p.M) out[p.N + tile.column(e)] = columns[e].potential();
    }
  }
  rows.restore();
  write_solution(p, tile, rows, columns, threadIdx.x == 0 ? error : T(0), t, sums);
}

struct LaunchForward {
  const SinkhornForward& p;
  void *workspace, *stream;

  template <class S>
  int operator()(S) const {
    const Forward<typename S::T> forward(p);
    return PK_LAUNCH((solve_kernel<S>), dim3(static_cast<unsigned>(p.B)), dim3(S::THREADS), S::dynamic_bytes(p.N, p.M), stream, forward);
  }
  int operator()() const { return launch_stream_forward(p, workspace, stream); }
};

}  // namespace

namespace protokernels {

int64_t sinkhorn_forward_workspace(const SinkhornForward& p) {
  if (sinkhorn_scaled(p.N, p.M, p.kind, p.rho_a == INFINITY && p.rho_b == INFINITY, pk::shared_memory_limit())) return 0;
  return sinkhorn_tier(p.N, p.M, p.kind, pk::shared_memory_limit()) == SinkhornTier::stream ? stream_forward_workspace(p) : 0;
}

int launch_sinkhorn_forward(const SinkhornForward& p, void* workspace, void* stream) {
  if (p.B == 0) return 0;
  if (sinkhorn_scaled(p.N, p.M, p.kind, p.rho_a == INFINITY && p.rho_b == INFINITY, pk::shared_memory_limit()))
    return launch_scaled_forward(p, stream);
  return with_shape(sinkhorn_tier(p.N, p.M, p.kind, pk::shared_memory_limit()), p.kind, LaunchForward{p, workspace, stream});
}

}  // namespace protokernels
