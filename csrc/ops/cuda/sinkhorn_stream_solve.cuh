// SPDX-License-Identifier: MIT
// The iterations of a streamed Sinkhorn, whatever the cost is made of: the state of the problems, what becomes of the sums, the order of
// launches.
#pragma once

#include "ops/cuda/sinkhorn_stream.cuh"
#include "ops/sinkhorn.h"

namespace {

// A problem with its state in the workspace; u and v are potentials over epsilon.
template <class T>
struct Solve {
  int64_t B;
  int N, M, num_iters;
  bool balanced;
  bool by_turns;  // u after t iterations lies in u or u_next, t even or odd, and the last error comes from the values; else in u
  T tolerance, rho_a, rho_b;
  const T* a;        // [B, N]
  const T* b;        // [B, M]
  const T* epsilon;  // [B]
  const T* g_init;   // [B, M] or null
  T* f;              // [B, N]
  T* g;              // [B, M]
  T* transport_cost;
  T* entropic_value;
  T* marginal_error;
  int64_t* iterations;
  bool* feasible;
  T* history;  // [B, num_iters, N + M] or null
  T* u;        // [B, N]
  T* u_next;   // [B, N]
  T* v;        // [B, M]
  T* values;   // [B, 3, N]: sums along the rows of P, P C, P (u + v - 1)
  T* factors;  // [3, B]: 1 / epsilon, lambda_a, lambda_b
  int* done;   // [B]
  int t;       // full iterations before this half-step

  template <class Problem>
  Solve(const Problem& p, T* kept, Pieces& pieces)
      : B(p.B),
        N(static_cast<int>(p.N)),
        M(static_cast<int>(p.M)),
        num_iters(static_cast<int>(p.num_iters)),
        balanced(p.rho_a == INFINITY && p.rho_b == INFINITY),
        by_turns(false),
        tolerance(static_cast<T>(p.tolerance)),
        rho_a(static_cast<T>(p.rho_a)),
        rho_b(static_cast<T>(p.rho_b)),
        a(static_cast<const T*>(p.a)),
        b(static_cast<const T*>(p.b)),
        epsilon(static_cast<const T*>(p.epsilon)),
        g_init(static_cast<const T*>(p.g_init)),
        f(static_cast<T*>(p.f)),
        g(static_cast<T*>(p.g)),
        transport_cost(static_cast<T*>(p.transport_cost)),
        entropic_value(static_cast<T*>(p.entropic_value)),
        marginal_error(static_cast<T*>(p.marginal_error)),
        iterations(p.iterations),
        feasible(p.feasible),
        history(kept),
        u(pieces.take<T>(p.B * p.N)),
        u_next(pieces.take<T>(p.B * p.N)),
        v(pieces.take<T>(p.B * p.M)),
        values(pieces.take<T>(p.B * p.N * 3)),
        factors(pieces.take<T>(p.B * 3)),
        done(pieces.take<int>(p.B)),
        t(0) {}

  __device__ __forceinline__ T* kept(int64_t problem, int iteration) const { return history + (problem * num_iters + iteration) * (N + M); }
  __device__ __forceinline__ const T* result(int64_t problem) const {
    return (by_turns && iterations[problem] % 2 ? u_next : u) + problem * N;
  }
  __device__ __forceinline__ T inverse_epsilon(int64_t problem) const { return factors[problem]; }
  // What a row adds to the error of an iterate whose plan has this row sum.
  __device__ __forceinline__ T row_error(int64_t problem, T mass, T potential, T sum) const {
    if (potential == -T(INFINITY)) return balanced ? mass : T(0);
    if (balanced) return magnitude(sum - mass);
    return sum == 0 ? T(0) : mass * magnitude(potential - half_step(problem, 0, mass, logarithm(sum) - potential));
  }
  // A half-step from its log-sum; side 0: rows.
  __device__ __forceinline__ T half_step(int64_t problem, int side, T mass, T log_sum) const {
    return mass == 0 || log_sum == -T(INFINITY) ? -T(INFINITY) : factors[(1 + side) * B + problem] * (logarithm(mass) - log_sum);
  }
};

template <class T>
struct RowsOp {
  using Sum = LogSum<T>;
  Solve<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return p.done[problem] != 0; }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    p.u_next[problem * p.N + i] = p.half_step(problem, 0, p.a[problem * p.N + i], sum.value());
  }
  // The error of the iterate before these rows, and whether that is the result. If not, the new u takes its place.
  __device__ __forceinline__ void after_rows(int64_t problem, T* shared) const {
    const int64_t first = problem * p.N;
    if (p.t > 0 && (p.tolerance > 0 || p.t == p.num_iters)) {
      T error = 0;
      for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
        const T before = p.u[first + i], after = p.u_next[first + i], mass = p.a[first + i];
        if (before == -T(INFINITY))
          error += p.balanced ? mass : T(0);
        else if (p.balanced)  // after = -infinity leaves the whole row too much
          error += mass * magnitude(exponential(before - after) - 1);
        else
          error += mass * magnitude(before - after);
      }
      error = problem_sum(error, shared);
      if (p.t == p.num_iters || error <= p.tolerance) {
        if (threadIdx.x == 0) {
          p.done[problem] = 1;
          p.marginal_error[problem] = error;
          p.iterations[problem] = p.t;
        }
        return;
      }
    }
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
      const T u = p.u_next[first + i];
      p.u[first + i] = u;
      if (p.history) p.kept(problem, p.t)[i] = u;
    }
  }
};

template <class T>
struct ColumnsOp {
  using Sum = LogSum<T>;
  Solve<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return p.done[problem] != 0; }
  __device__ __forceinline__ void column(int64_t problem, int j, const Sum& sum) const {
    const T v = p.half_step(problem, 1, p.b[problem * p.M + j], sum.value());
    p.v[problem * p.M + j] = v;
    if (p.history) p.kept(problem, p.t)[p.N + j] = v;
  }
};

template <class T>
struct ValuesOp {
  using Sum = Sums<T, 3>;
  Solve<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) p.values[(problem * 3 + k) * p.N + i] = sum.part[k];
  }
};

template <class T>
struct StartOp {
  Solve<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T*) const {
    for (int j = threadIdx.x; j < p.M; j += blockDim.x) {
      const int64_t at = problem * p.M + j;
      p.v[at] = p.b[at] == 0 ? -T(INFINITY) : p.g_init ? p.g_init[at] / p.epsilon[problem] : T(0);
    }
    if (threadIdx.x != 0) return;
    const T eps = p.epsilon[problem];
    p.done[problem] = 0;
    p.iterations[problem] = p.num_iters;
    p.factors[problem] = T(1) / eps;
    p.factors[p.B + problem] = p.rho_a == T(INFINITY) ? T(1) : p.rho_a / (p.rho_a + eps);
    p.factors[2 * p.B + problem] = p.rho_b == T(INFINITY) ? T(1) : p.rho_b / (p.rho_b + eps);
  }
};

template <class T>
struct FinishOp {
  Solve<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    const T eps = p.epsilon[problem];
    const T* const u_of = p.result(problem);
    const bool open = p.by_turns && p.done[problem] == 0;  // the error of the last iterate is not known yet
    T transported = 0, value = 0, mass_a = 0, mass_b = 0, dead = 0, dead_mass = 0, error = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < p.N; i += blockDim.x) {
      const T mass = p.a[problem * p.N + i], u = u_of[i];
      const T sum = p.values[problem * 3 * p.N + i];
      if (open) error += p.row_error(problem, mass, u, sum);
      transported += p.values[(problem * 3 + 1) * p.N + i];
      value += eps * p.values[(problem * 3 + 2) * p.N + i];
      if (p.rho_a != T(INFINITY) && mass != 0) value += p.rho_a * ((sum == 0 ? T(0) : sum * logarithm(sum / mass)) - sum + mass);
      mass_a += mass;
      if (mass != 0 && u == -T(INFINITY)) dead += 1;
      p.f[problem * p.N + i] = u * eps;
    }
#pragma unroll 4
    for (int j = threadIdx.x; j < p.M; j += blockDim.x) {
      const T mass = p.b[problem * p.M + j], v = p.v[problem * p.M + j];
      const bool missing = mass != 0 && v == -T(INFINITY);
      if (p.rho_b != T(INFINITY) && mass != 0) {  // q_j = b_j exp(-g_j / rho_b): columns come last
        const T q = missing ? T(0) : mass * exponential(-v * eps / p.rho_b);
        value += p.rho_b * ((q == 0 ? T(0) : -q * v * eps / p.rho_b) - q + mass);
      }
      mass_b += mass;
      if (missing) dead += 1, dead_mass += mass;
      p.g[problem * p.M + j] = v * eps;
    }
    transported = problem_sum(transported, shared);
    value = problem_sum(value, shared);
    mass_a = problem_sum(mass_a, shared);
    mass_b = problem_sum(mass_b, shared);
    dead = problem_sum(dead, shared);
    dead_mass = problem_sum(dead_mass, shared);
    if (open) error = problem_sum(error, shared);
    if (threadIdx.x != 0) return;
    p.transport_cost[problem] = transported;
    p.entropic_value[problem] = value;
    if (open) p.marginal_error[problem] = error;
    if (p.balanced) p.marginal_error[problem] += dead_mass;
    p.feasible[problem] =
        dead == 0 && (!p.balanced || magnitude(mass_a - mass_b) <= static_cast<T>(SINKHORN_MASS_TOLERANCE) * larger(mass_a, mass_b));
  }
};

// Passes: rows, columns and values launch the sums over the cost, and what follows them; problems launches an Op per problem.
template <class Passes, class T>
void iterate(Passes& passes, Solve<T> p) {
  passes.problems(StartOp<T>{p});
  for (p.t = 0; p.t <= p.num_iters; ++p.t) {
    passes.rows(p);
    if (p.t < p.num_iters) passes.columns(p);
  }
  passes.values(p);
  passes.problems(FinishOp<T>{p});
}

}  // namespace
