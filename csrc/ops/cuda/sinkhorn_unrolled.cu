// SPDX-License-Identifier: MIT
// The unrolled gradient of Sinkhorn on the GPU, problems that fit one multiprocessor: one block, one launch. The equations stand in
// ops/sinkhorn.h.
//
// An iteration is walked back with one read of a scaled kernel K = exp(alpha_i + beta_j - C_ij / eps), as in the forward kernel: its
// softmaxes are S = K sr_i sc_j and R = K rr_i rc_j, whose four factors cost an exponential per row and column, not per entry. K follows
// the potentials of the iteration when they have moved by more than 30; a step whose two ends lie further apart than that (the first ones
// of a small epsilon), and every step of an unbalanced problem, takes S and R entry by entry. A warp decides for itself: only column sums
// meet. The gradient of C / eps is kept by the thread that owns the entry, in registers, or in grad_cost where they do not suffice.
// Limited by latency. Balanced problems in float of up to 64 x 64 have a kernel of their own (sinkhorn_scaled_unrolled.cu).

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_adjoint.cuh"

namespace {

template <class T>
constexpr T DRIFT = T(30);

template <class T>
struct Adjoint {               // of a row
  T base, gradient, log_mass;  // alpha; u_bar before the first step back; gradient of log a
};

// The gradient of -C / eps: M_bar.
template <class S>
struct Accumulator {
  using T = typename S::T;
  static constexpr bool REGISTERS = S::REGISTERS && S::E <= 2;
  const int N, M;
  T* const memory;  // [N, M]
  T kept[REGISTERS ? SLOTS : 1][S::E];

  __device__ __forceinline__ Accumulator(int rows, int columns, T* grad_cost) : N(rows), M(columns), memory(grad_cost), kept{} {}
  __device__ __forceinline__ T get(int i, int j, int s, int e) const {
    if constexpr (REGISTERS) return kept[s][e];
    return i < N && j < M ? memory[static_cast<int64_t>(i) * M + j] : T(0);
  }
  __device__ __forceinline__ void set(int i, int j, int s, int e, T value) {
    if constexpr (REGISTERS)
      kept[s][e] = value;
    else if (i < N && j < M)
      memory[static_cast<int64_t>(i) * M + j] = value;
  }
};

template <class S>
struct Walk {
  using T = typename S::T;
  using Row = Adjoint<T>;
  const Backward<T>& p;
  Tile<S, Row> tile;
  Rows<S, Row> rows;
  Accumulator<S> accumulator;
  const int steps;
  const T epsilon, damping_a, damping_b;
  T epsilon_bar, u_ahead, own_log_mass;  // the latter two of the lane's row where it has only one: u of the step that comes next
  T v[S::E], v_bar[S::E], b_bar[S::E], log_b[S::E], beta[S::E];

  __device__ __forceinline__ Walk(const Backward<T>& problem, T* dynamic, Exchange<S, Row>& exchange)
      : p(problem),
        tile(p.N, p.M, p.cost + blockIdx.x * static_cast<int64_t>(p.N) * p.M, p.epsilon[blockIdx.x], dynamic, &exchange),
        rows(exchange),
        accumulator(p.N, p.M, p.grad_cost + blockIdx.x * static_cast<int64_t>(p.N) * p.M),
        steps(static_cast<int>(p.iterations[blockIdx.x])),
        epsilon(p.epsilon[blockIdx.x]),
        damping_a(p.rho_a == T(INFINITY) ? T(1) : p.rho_a / (p.rho_a + epsilon)),
        damping_b(p.rho_b == T(INFINITY) ? T(1) : p.rho_b / (p.rho_b + epsilon)),
        epsilon_bar(0),
        u_ahead(u_at(steps - 1, 0)),
        own_log_mass(load_log_mass(0)) {}

  __device__ __forceinline__ const T* potentials(int t) const {
    return p.history + (static_cast<int64_t>(blockIdx.x) * p.num_iters + t) * (p.N + p.M);
  }
  __device__ __forceinline__ T u_at(int t, int batch) const {
    const int i = tile.own_row(batch);
    return i < p.N ? potentials(t)[i] : -T(INFINITY);
  }
  __device__ __forceinline__ T log_mass(int batch) const {
    if constexpr (S::BATCHES == 1) return own_log_mass;
    return load_log_mass(batch);
  }
  __device__ __forceinline__ T load_log_mass(int batch) const {
    const int i = tile.own_row(batch);
    return i < p.N ? logarithm(p.a[static_cast<int64_t>(blockIdx.x) * p.N + i]) : T(0);
  }
  // The lane that writes and sums for its row.
  __device__ __forceinline__ bool speaks(int batch) const { return tile.lane < SLOTS && tile.own_row(batch) < p.N; }
  // v after iteration t, at t = -1 before the first.
  __device__ __forceinline__ void load_columns(int t, T (&result)[S::E]) const {
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const int j = tile.column(e);
      const int64_t at = static_cast<int64_t>(blockIdx.x) * p.M + j;
      result[e] = -INFINITY;
      if (j < p.M) result[e] = t >= 0 ? potentials(t)[p.N + j] : p.b[at] == 0 ? -T(INFINITY) : p.g_init ? p.g_init[at] / epsilon : T(0);
    }
  }

  // Gamma and its sums; what the values give directly to a, b and epsilon.
  __device__ __forceinline__ void begin() {
    const T tc = p.transport_gradient(), entropic = p.entropic_gradient();
    T ones[S::E], unused = 0;
    load_columns(steps - 1, v);
#pragma unroll
    for (int e = 0; e < S::E; ++e) ones[e] = 1, v_bar[e] = 0, b_bar[e] = 0;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T u = u_at(steps - 1, batch);
      T pull = 0, direct = 0;  // rho_a log(p / a), rho_a (1 - p / a)
      tile.build(batch, u, v);
      if (p.rho_a != T(INFINITY)) {
        const T sum = tile.times_columns(ones), ratio = alive(u) ? sum * exponential(-log_mass(batch)) : T(0);
        if (sum != 0) pull = p.rho_a * logarithm(ratio), direct = p.rho_a * (1 - ratio);
      }
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const T of_row = __shfl_sync(ALL, u, s), row_pull = __shfl_sync(ALL, pull, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e) {
          const T plan = tile.k[s][e], c = tile.cost_at(tile.row(batch, s), e);
          T gamma = 0;
          if (plan != 0) {  // eps v_j + rho_b log(q_j / b_j) = 0 where rho_b is finite: columns come last
            gamma = plan * (tc * c + entropic * (epsilon * (of_row + (p.rho_b == T(INFINITY) ? v[e] : T(0))) + row_pull));
            epsilon_bar += entropic * plan * (of_row + v[e] - c * tile.inverse_epsilon - 1);
          }
          tile.k[s][e] = gamma;
          accumulator.set(tile.row(batch, s), tile.column(e), s, e, gamma);
        }
      }
      Row row{-T(INFINITY), tile.times_columns(ones), T(0)};
      tile.add_rows(T(1), v_bar);
      const int i = tile.own_row(batch);
      if (i < p.N && alive(u)) {
        row.gradient += epsilon * p.row_gradient(i);
        if (speaks(batch)) epsilon_bar += p.row_gradient(i) * u;
      }
      if (speaks(batch)) p.grad_a[static_cast<int64_t>(blockIdx.x) * p.N + i] = entropic * direct;
      rows.set(batch, row);
    }
    tile.template combine<false>(v_bar, unused, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const int j = tile.column(e);
      log_b[e] = j < p.M ? logarithm(p.b[static_cast<int64_t>(blockIdx.x) * p.M + j]) : T(0);
      if (j < p.M && alive(v[e])) {
        v_bar[e] += epsilon * p.column_gradient(j);
        if (tile.warp == 0) epsilon_bar += p.column_gradient(j) * v[e];
      }
    }
  }

  // One iteration back. S = softmax over the rows, R over the columns; see the top of the file.
  __device__ __forceinline__ void step(int t, bool& stale, const T (&v_before)[S::E]) {
    T w[S::E], minus_lse[S::E], from_s[S::E], from_r[S::E], sum[S::E] = {}, unused = 0;
    bool moved = stale, far = !p.balanced;
    const T u_here = u_ahead;
    if (S::BATCHES == 1 && t > 0) u_ahead = u_at(t - 1, 0);
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const bool there = alive(v[e]);
      minus_lse[e] = there ? v[e] / damping_b - log_b[e] : -T(INFINITY);
      w[e] = there ? damping_b * v_bar[e] : T(0);
      b_bar[e] += w[e];
      if (p.rho_b != T(INFINITY) && there && tile.warp == 0) epsilon_bar -= v_bar[e] * v[e] / (p.rho_b + epsilon);
      moved |= there && !(magnitude(minus_lse[e] - beta[e]) <= DRIFT<T>);
    }
    moved = __any_sync(ALL, moved);
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      if (moved) beta[e] = minus_lse[e];
      far |= alive(v[e]) && !(magnitude(v_before[e] - log_b[e] - beta[e]) <= DRIFT<T>);
    }
    far = __any_sync(ALL, far);  // the same in every warp
    stale = far;
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      from_s[e] = far ? w[e] : alive(v[e]) ? exponential(minus_lse[e] - beta[e]) * w[e] : T(0);
      from_r[e] = !alive(v_before[e]) || !alive(v[e]) ? T(0) : far ? T(1) : exponential(v_before[e] - beta[e]);
    }
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      Row row = rows.get(batch);
      const T u = S::BATCHES == 1 ? u_here : u_at(t, batch), minus_lse_row = alive(u) ? u / damping_a - log_mass(batch) : -T(INFINITY);
      const bool off = alive(u) && !(magnitude(minus_lse_row - row.base) <= DRIFT<T>);
      T s_factor = 1, r_factor = 1;
      if (far) {
        tile.build(batch, u, minus_lse);
      } else {
        if (moved || __any_sync(ALL, off)) {
          row.base = minus_lse_row;
          tile.build(batch, row.base, beta);
        } else {
          tile.fetch(batch);
        }
        s_factor = alive(u) ? exponential(u - row.base) : T(0);
        r_factor = alive(u) ? exponential(minus_lse_row - row.base) : T(0);
      }
      const T u_bar = (t == steps - 1 ? row.gradient : T(0)) - s_factor * tile.times_columns(from_s);
      const T z = alive(u) ? damping_a * u_bar : T(0);
      row.log_mass += z;
      if (p.rho_a != T(INFINITY) && alive(u) && speaks(batch)) epsilon_bar -= u_bar * u / (p.rho_a + epsilon);
      rows.set(batch, row);
      if (far) {
        subtract(batch, T(1), T(0), from_s, from_r);
        tile.build(batch, minus_lse_row, v_before);
      }
      tile.add_rows(r_factor * z, sum);
      subtract(batch, far ? T(0) : s_factor, r_factor * z, from_s, from_r);
    }
    tile.template combine<false>(sum, unused, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) v_bar[e] = -from_r[e] * sum[e], v[e] = v_before[e];
  }

  // M_bar_ij -= K_ij (x_i s_j + y_i r_j).
  __device__ __forceinline__ void subtract(int batch, T x, T y, const T (&s_columns)[S::E], const T (&r_columns)[S::E]) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const T of_x = __shfl_sync(ALL, x, s), of_y = __shfl_sync(ALL, y, s);
      const int i = tile.row(batch, s);
#pragma unroll
      for (int e = 0; e < S::E; ++e) {
        const int j = tile.column(e);
        accumulator.set(i, j, s, e, accumulator.get(i, j, s, e) - tile.k[s][e] * (of_x * s_columns[e] + of_y * r_columns[e]));
      }
    }
  }

  __device__ __forceinline__ void finish(T (&sums)[S::W]) {
    const T values = p.transport_gradient() + p.entropic_gradient();
    const int64_t problem = blockIdx.x;
    T last_v[S::E];
    load_columns(steps - 1, last_v);
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T u = u_at(steps - 1, batch);
      tile.build(batch, u, last_v);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s)
#pragma unroll
        for (int e = 0; e < S::E; ++e) {
          const int i = tile.row(batch, s), j = tile.column(e);
          if (i >= p.N || j >= p.M) continue;
          const T m = accumulator.get(i, j, s, e);
          if (m != 0) epsilon_bar += m * tile.cost_at(i, e) * tile.inverse_epsilon * tile.inverse_epsilon;
          p.grad_cost[(problem * p.N + i) * p.M + j] = values * tile.k[s][e] - m * tile.inverse_epsilon;
        }
      if (speaks(batch) && alive(u))
        p.grad_a[problem * p.N + tile.own_row(batch)] += rows.get(batch).log_mass / p.a[problem * p.N + tile.own_row(batch)];
    }
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const int j = tile.column(e);
      if (tile.warp != 0 || j >= p.M) continue;
      if (p.g_init && alive(v[e])) epsilon_bar -= v_bar[e] * v[e] * tile.inverse_epsilon;
      T gradient = 0;
      if (alive(last_v[e])) {
        gradient = b_bar[e] / p.b[problem * p.M + j];
        if (p.rho_b != T(INFINITY)) gradient += p.entropic_gradient() * p.rho_b * (1 - exponential(-last_v[e] * epsilon / p.rho_b));
      }
      p.grad_b[problem * p.M + j] = gradient;
    }
    const T total = block_sum<S>(epsilon_bar, sums);
    if (threadIdx.x == 0) p.grad_epsilon[problem] = total;
  }
};

// resources: dynamic shared 147456 bytes
template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) unrolled_kernel(const Backward<typename S::T> p) {
  using T = typename S::T;
  using Shared = Exchange<S, Adjoint<T>>;
  PK_DYNAMIC_SHARED(T, dynamic);
  PK_SHARED(Shared, exchange);
  PK_SHARED(T, sums, S::W);
  Walk<S> walk(p, dynamic, exchange);
  T ahead[S::E], further[S::E];
  walk.begin();
  walk.load_columns(walk.steps - 2, ahead);
  bool stale = true;
#pragma unroll 1
  for (int t = walk.steps - 1; t >= 0; --t) {
    if (t > 0) walk.load_columns(t - 2, further);  // in flight during the step
    walk.step(t, stale, ahead);
#pragma unroll
    for (int e = 0; e < S::E; ++e) ahead[e] = further[e];
  }
  walk.finish(sums);
}

}  // namespace

namespace protokernels {

struct LaunchUnrolled {
  const SinkhornBackward& p;
  void *workspace, *stream;

  // 16 warps would leave too few registers.
  int operator()(Shape<float, 4, 16, 1, true>) const { return (*this)(Shape<float, 4, 8, 2, false>()); }
  template <class S>
  int operator()(S) const {
    const Backward<typename S::T> backward(p);
    return PK_LAUNCH((unrolled_kernel<S>), dim3(static_cast<unsigned>(p.B)), dim3(S::THREADS), S::dynamic_bytes(p.N, p.M), stream,
                     backward);
  }
  int operator()() const { return launch_stream_backward(p, workspace, stream); }
};

int64_t sinkhorn_backward_workspace(const SinkhornBackward& p) {
  return sinkhorn_tier(p.N, p.M, p.kind, pk::shared_memory_limit()) == SinkhornTier::stream ? stream_backward_workspace(p) : 0;
}

int launch_sinkhorn_backward(const SinkhornBackward& p, void* workspace, void* stream) {
  if (p.B == 0) return 0;
  const SinkhornTier tier = sinkhorn_tier(p.N, p.M, p.kind, pk::shared_memory_limit());
  if (p.implicit && tier != SinkhornTier::stream) return launch_on_chip_implicit(p, stream);
  const bool balanced = p.rho_a == INFINITY && p.rho_b == INFINITY;
  if (sinkhorn_scaled(p.N, p.M, p.kind, balanced, pk::shared_memory_limit()) && p.N <= SINKHORN_SCALED_UNROLLED_SIDE &&
      p.M <= SINKHORN_SCALED_UNROLLED_SIDE)
    return launch_scaled_unrolled(p, stream);
  return with_shape(tier, p.kind, LaunchUnrolled{p, workspace, stream});
}

}  // namespace protokernels
