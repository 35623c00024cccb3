// SPDX-License-Identifier: MIT
// The unrolled gradient of Sinkhorn on the GPU, problems of any size. The equations stand in ops/sinkhorn.h.
//
// An iteration is walked back in two launches: S w along the rows gives the row factors z; along the columns S and R are made again,
// subtracted from M_bar, which lies in grad_cost, and R z is summed by chunks, which give the column factors of the iteration before. Row
// and column shifts are kept, so that an entry of S or R is one exponential. Problems that stopped early wait on the device.
// Limit at 4096 x 4096 on an H200: memory, 62 us a step (the cost twice, M_bar there and back). Tested on an H200 and in the emulator.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_stream.cuh"
#include "ops/sinkhorn.h"

namespace {

template <class T>
struct WalkState {
  int64_t B;
  int N, M, num_iters;
  T rho_a, rho_b;
  const T* a;                    // [B, N]
  const T* b;                    // [B, M]
  const T* epsilon;              // [B]
  const T* g_init;               // [B, M] or null
  const int64_t* iterations;     // [B]
  const T* history;              // [B, num_iters, N + M]
  const T* grad_f;               // [B, N] or null
  const T* grad_g;               // [B, M] or null
  const T* grad_transport_cost;  // [B] or null
  const T* grad_entropic_value;  // [B] or null
  T* grad_cost;                  // [B, N, M], holds M_bar on the way
  T* grad_a;                     // [B, N]
  T* grad_b;                     // [B, M]
  T* grad_epsilon;               // [B]
  T* pull;                       // [B, N]: rho_a log(p / a)
  T* u_bar;                      // [B, N]: before the first step back
  T* row_factor;                 // [B, N]: z
  T* row_shift;                  // [B, N]: -LSE_i
  T* log_a_bar;                  // [B, N]
  T* row_epsilon;                // [B, N]
  T* column_factor;              // [B, M]: w
  T* column_shift;               // [B, M]: -LSE_j
  T* log_b_bar;                  // [B, M]
  T* column_epsilon;             // [B, M]
  int t;

  WalkState(const SinkhornBackward& p, Pieces& pieces)
      : B(p.B),
        N(static_cast<int>(p.N)),
        M(static_cast<int>(p.M)),
        num_iters(static_cast<int>(p.num_iters)),
        rho_a(static_cast<T>(p.rho_a)),
        rho_b(static_cast<T>(p.rho_b)),
        a(static_cast<const T*>(p.a)),
        b(static_cast<const T*>(p.b)),
        epsilon(static_cast<const T*>(p.epsilon)),
        g_init(static_cast<const T*>(p.g_init)),
        iterations(p.iterations),
        history(static_cast<const T*>(p.history)),
        grad_f(static_cast<const T*>(p.grad_f)),
        grad_g(static_cast<const T*>(p.grad_g)),
        grad_transport_cost(static_cast<const T*>(p.grad_transport_cost)),
        grad_entropic_value(static_cast<const T*>(p.grad_entropic_value)),
        grad_cost(static_cast<T*>(p.grad_cost)),
        grad_a(static_cast<T*>(p.grad_a)),
        grad_b(static_cast<T*>(p.grad_b)),
        grad_epsilon(static_cast<T*>(p.grad_epsilon)),
        t(0) {
    for (T** array : {&pull, &u_bar, &row_factor, &row_shift, &log_a_bar, &row_epsilon}) *array = pieces.take<T>(p.B * p.N);
    for (T** array : {&column_factor, &column_shift, &log_b_bar, &column_epsilon}) *array = pieces.take<T>(p.B * p.M);
  }

  __device__ __forceinline__ int last(int64_t problem) const { return static_cast<int>(iterations[problem]) - 1; }
  __device__ __forceinline__ T u(int64_t problem, int iteration, int i) const {
    return history[(problem * num_iters + iteration) * (N + M) + i];
  }
  // v after an iteration, at -1 before the first.
  __device__ __forceinline__ T v(int64_t problem, int iteration, int j) const {
    if (iteration >= 0) return history[(problem * num_iters + iteration) * (N + M) + N + j];
    if (b[problem * M + j] == 0) return -INFINITY;
    return g_init ? g_init[problem * M + j] / epsilon[problem] : T(0);
  }
  __device__ __forceinline__ T transport_gradient(int64_t problem) const {
    return grad_transport_cost ? grad_transport_cost[problem] : T(0);
  }
  __device__ __forceinline__ T entropic_gradient(int64_t problem) const {
    return grad_entropic_value ? grad_entropic_value[problem] : T(0);
  }
  // What the step back of an iteration needs of a column whose v_bar is known.
  __device__ __forceinline__ void set_column(int64_t problem, int j, int iteration, T v_bar) const {
    const int64_t at = problem * M + j;
    const T eps = epsilon[problem], here = v(problem, iteration, j);
    const bool there = here != -T(INFINITY);
    if (iteration < 0) {
      if (there && g_init) column_epsilon[at] -= v_bar * here / eps;
      return;
    }
    const T damping = rho_b == T(INFINITY) ? T(1) : rho_b / (rho_b + eps);
    column_factor[at] = there ? damping * v_bar : T(0);
    column_shift[at] = there ? here / damping - logarithm(b[at]) : -T(INFINITY);
    log_b_bar[at] += column_factor[at];
    if (rho_b != T(INFINITY) && there) column_epsilon[at] -= v_bar * here / (rho_b + eps);
  }
};

template <class T>
struct PullOp {  // p_i, where its divergence counts
  using Sum = Sums<T, 1>;
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const int t = p.last(problem);
    const T inverse = T(1) / p.epsilon[problem], u = p.u(problem, t, i);
#pragma unroll
    for (int k = 0; k < STEP; ++k)
      if (k < n) sum.part[0] += exponential(u + p.v(problem, t, j + k * dj) - c[k] * inverse);
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    p.pull[at] = sum.part[0] == 0 ? T(0) : p.rho_a * logarithm(sum.part[0] / p.a[at]);
  }
};

template <class T>
struct GammaOp {
  using Sum = Sums<T, 2>;  // Gamma; e P (log P - 1)
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int di, int dj, int n, const T (&c)[STEP]) const {
    const int t = p.last(problem);
    const T tc = p.transport_gradient(problem), entropic = p.entropic_gradient(problem), eps = p.epsilon[problem], inverse = T(1) / eps;
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const int row = i + k * di, column = j + k * dj;
      const T u = p.u(problem, t, row), v = p.v(problem, t, column), plan = exponential(u + v - c[k] * inverse);
      T gamma = 0;
      if (plan != 0) {  // eps v_j + rho_b log(q_j / b_j) = 0 where rho_b is finite: columns come last
        const T pull = p.rho_a == T(INFINITY) ? T(0) : p.pull[problem * p.N + row];
        gamma = plan * (tc * c[k] + entropic * (eps * (u + (p.rho_b == T(INFINITY) ? v : T(0))) + pull));
        sum.part[1] += entropic * plan * (u + v - c[k] * inverse - 1);
      }
      sum.part[0] += gamma;
      if (dj == 0) p.grad_cost[(problem * p.N + row) * p.M + column] = gamma;
    }
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    const T u = p.u(problem, p.last(problem), i);
    const T upstream = p.grad_f && u != -T(INFINITY) ? p.grad_f[at] : T(0);
    p.u_bar[at] = sum.part[0] + p.epsilon[problem] * upstream;
    p.row_epsilon[at] = sum.part[1] + (upstream == 0 ? T(0) : upstream * u);
    p.log_a_bar[at] = 0;
  }
  __device__ __forceinline__ void column(int64_t problem, int j, const Sum& sum) const {
    const int64_t at = problem * p.M + j;
    const T v = p.v(problem, p.last(problem), j);
    const T upstream = p.grad_g && v != -T(INFINITY) ? p.grad_g[at] : T(0);
    p.column_epsilon[at] = upstream == 0 ? T(0) : upstream * v;
    p.log_b_bar[at] = 0;
    p.set_column(problem, j, p.last(problem), sum.part[0] + p.epsilon[problem] * upstream);
  }
};

template <class T>
struct BackRowsOp {
  using Sum = Sums<T, 1>;  // S w
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return p.t > p.last(problem); }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], u = p.u(problem, p.t, i);
    const int64_t at = problem * p.M + j;
#pragma unroll
    for (int k = 0; k < STEP; ++k)
      if (k < n) sum.part[0] += exponential(u + p.column_shift[at + k * dj] - c[k] * inverse) * p.column_factor[at + k * dj];
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    const T eps = p.epsilon[problem], u = p.u(problem, p.t, i), u_bar = (p.t == p.last(problem) ? p.u_bar[at] : T(0)) - sum.part[0];
    const bool there = u != -T(INFINITY);
    const T damping = p.rho_a == T(INFINITY) ? T(1) : p.rho_a / (p.rho_a + eps);
    p.row_factor[at] = there ? damping * u_bar : T(0);
    p.row_shift[at] = there ? u / damping - logarithm(p.a[at]) : -T(INFINITY);
    p.log_a_bar[at] += p.row_factor[at];
    if (p.rho_a != T(INFINITY) && there) p.row_epsilon[at] -= u_bar * u / (p.rho_a + eps);
  }
};

template <class T>
struct BackColumnsOp {
  using Sum = Sums<T, 1>;  // R z
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return p.t > p.last(problem); }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int di, int, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], before = p.v(problem, p.t - 1, j);
    const T shift = p.column_shift[problem * p.M + j], factor = p.column_factor[problem * p.M + j];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const int64_t row = problem * p.N + i + k * di;
      const T s = exponential(p.u(problem, p.t, i + k * di) + shift - c[k] * inverse) * factor;
      const T r = exponential(before + p.row_shift[row] - c[k] * inverse) * p.row_factor[row];
      sum.part[0] += r;
      p.grad_cost[row * p.M + j] -= s + r;
    }
  }
  __device__ __forceinline__ void column(int64_t problem, int j, const Sum& sum) const { p.set_column(problem, j, p.t - 1, -sum.part[0]); }
};

template <class T>
struct CostGradientOp {
  using Sum = Sums<T, 1>;  // M_bar C / eps^2
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const int t = p.last(problem);
    const T inverse = T(1) / p.epsilon[problem], values = p.transport_gradient(problem) + p.entropic_gradient(problem);
    const T u = p.u(problem, t, i);
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      T& gradient = p.grad_cost[(problem * p.N + i) * p.M + j + k * dj];
      const T m = gradient;
      if (m != 0) sum.part[0] += m * c[k] * inverse * inverse;
      gradient = values * exponential(u + p.v(problem, t, j + k * dj) - c[k] * inverse) - m * inverse;
    }
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    T gradient = 0;
    if (p.u(problem, p.last(problem), i) != -T(INFINITY)) {
      gradient = p.log_a_bar[at] / p.a[at];
      if (p.rho_a != T(INFINITY)) gradient += p.entropic_gradient(problem) * p.rho_a * (1 - exponential(p.pull[at] / p.rho_a));
    }
    p.grad_a[at] = gradient;
    p.row_epsilon[at] += sum.part[0];
  }
};

template <class T>
struct MassGradientOp {
  WalkState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    T sum = 0;
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const int64_t at = problem * p.M + j;
      const T v = p.v(problem, p.last(problem), j);
      T gradient = 0;
      if (v != -T(INFINITY)) {
        gradient = p.log_b_bar[at] / p.b[at];
        if (p.rho_b != T(INFINITY))
          gradient += p.entropic_gradient(problem) * p.rho_b * (1 - exponential(-v * p.epsilon[problem] / p.rho_b));
      }
      p.grad_b[at] = gradient;
      sum += p.column_epsilon[at];
    }
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) sum += p.row_epsilon[problem * p.N + i];
    sum = problem_sum(sum, shared);
    if (threadIdx.x == 0) p.grad_epsilon[problem] = sum;
  }
};

template <class T>
int64_t unrolled(const SinkhornBackward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  WalkState<T> state(p, pieces);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 2, pieces, stream);
  if (status) {
    streamer.clear();
    if (p.rho_a != INFINITY) streamer.rows(PullOp<T>{state});
    streamer.rows(GammaOp<T>{state});
    streamer.columns(GammaOp<T>{state});
    for (state.t = state.num_iters - 1; state.t >= 0; --state.t) {
      streamer.rows(BackRowsOp<T>{state});
      streamer.columns(BackColumnsOp<T>{state});
    }
    streamer.rows(CostGradientOp<T>{state});
    streamer.problems(MassGradientOp<T>{state});
    *status = streamer.status;
  }
  return pieces.bytes();
}

}  // namespace

namespace protokernels {

int64_t stream_backward_workspace(const SinkhornBackward& p) {
  if (p.implicit) return stream_implicit_workspace(p);
  return p.kind == Kind::f64 ? unrolled<double>(p, nullptr, nullptr, nullptr) : unrolled<float>(p, nullptr, nullptr, nullptr);
}

int launch_stream_backward(const SinkhornBackward& p, void* workspace, void* stream) {
  if (p.implicit) return launch_stream_implicit(p, workspace, stream);
  int status = 0;
  p.kind == Kind::f64 ? unrolled<double>(p, workspace, stream, &status) : unrolled<float>(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
