// SPDX-License-Identifier: MIT
// The plan of Sinkhorn on the GPU, its gradient, and the envelope gradient of the entropic value. The equations stand in ops/sinkhorn.h.
// Limited by memory: each reads its matrices once (the plan's gradient twice) and writes one. Not yet run on a GPU; runs in the emulator.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_stream.cuh"

namespace {

template <class T>
struct Potentials {
  int N, M;
  const T* f;        // [B, N]
  const T* g;        // [B, M]
  const T* epsilon;  // [B]

  // log P, -infinity for absent and forbidden pairs; infinities of both signs never meet
  __device__ __forceinline__ T log_plan(int64_t b, int i, int j, T c) const {
    const T u = f[b * N + i], v = g[b * M + j];
    const bool absent = u == -T(INFINITY) || v == -T(INFINITY) || c == T(INFINITY);
    return absent ? -T(INFINITY) : (u + v - c) / epsilon[b];
  }
};

template <class T>
struct PlanOp {
  using Sum = Sums<T, 1>;
  Potentials<T> potentials;
  T* plan;  // [B, N, M]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum&, int64_t b, int i, int j, int di, int dj, int n, const T (&c)[STEP]) const {
#pragma unroll
    for (int k = 0; k < STEP; ++k)
      if (k < n)
        plan[(b * potentials.N + i + k * di) * potentials.M + j + k * dj] = exponential(potentials.log_plan(b, i, j + k * dj, c[k]));
  }
  __device__ __forceinline__ void row(int64_t, int, const Sum&) const {}
};

template <class T>
struct PlanGradientOp {
  using Sum = Sums<T, 2>;  // Gamma, Gamma log P
  Potentials<T> potentials;
  const T* grad_plan;  // [B, N, M]
  const T* plan;       // [B, N, M]
  T* grad_cost;        // [B, N, M]
  T* grad_f;           // [B, N]
  T* grad_g;           // [B, M]
  T* row_epsilon;      // [B, N]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t b, int i, int j, int di, int dj, int n, const T (&c)[STEP]) const {
    const T epsilon = potentials.epsilon[b];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const int64_t at = (b * potentials.N + i + k * di) * potentials.M + j + k * dj;
      const T gamma = plan[at] == 0 ? T(0) : grad_plan[at] * plan[at];
      sum.part[0] += gamma;
      if (dj == 0) continue;
      if (gamma != 0) sum.part[1] += gamma * potentials.log_plan(b, i, j + k * dj, c[k]);
      grad_cost[at] = -gamma / epsilon;
    }
  }
  __device__ __forceinline__ void row(int64_t b, int i, const Sum& sum) const {
    grad_f[b * potentials.N + i] = sum.part[0] / potentials.epsilon[b];
    row_epsilon[b * potentials.N + i] = -sum.part[1] / potentials.epsilon[b];
  }
  __device__ __forceinline__ void column(int64_t b, int j, const Sum& sum) const {
    grad_g[b * potentials.M + j] = sum.part[0] / potentials.epsilon[b];
  }
};

template <class T>
struct EnvelopeOp {
  using Sum = Sums<T, 1>;  // P (log P - 1)
  Potentials<T> potentials;
  const T* gradient;  // [B]
  T* grad_cost;       // [B, N, M]
  T* row_epsilon;     // [B, N]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t b, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const T log_plan = potentials.log_plan(b, i, j + k * dj, c[k]), plan = exponential(log_plan);
      if (plan != 0) sum.part[0] += plan * (log_plan - 1);
      grad_cost[(b * potentials.N + i) * potentials.M + j + k * dj] = gradient[b] * plan;
    }
  }
  __device__ __forceinline__ void row(int64_t b, int i, const Sum& sum) const {
    row_epsilon[b * potentials.N + i] = gradient[b] * sum.part[0];
  }
};

template <class T>
struct AddRows {
  int N;
  const T* values;  // [B, N]
  T* sums;          // [B]

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t b, T* shared) const {
    T sum = 0;
    for (int i = threadIdx.x; i < N; i += STREAM_THREADS) sum += values[b * N + i];
    sum = problem_sum(sum, shared);
    if (threadIdx.x == 0) sums[b] = sum;
  }
};

template <class T, class Problem>
Potentials<T> potentials_of(const Problem& p) {
  return {static_cast<int>(p.N), static_cast<int>(p.M), static_cast<const T*>(p.f), static_cast<const T*>(p.g),
          static_cast<const T*>(p.epsilon)};
}

template <class T>
int plan(const SinkhornPlan& p, void* stream) {
  Pieces none(nullptr);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 0, none, stream);
  streamer.rows(PlanOp<T>{potentials_of<T>(p), static_cast<T*>(p.plan)});
  return streamer.status;
}

template <class T>
int64_t plan_backward(const SinkhornPlanBackward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  T* const row_epsilon = pieces.take<T>(p.B * p.N);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 2, pieces, stream);
  if (status) {
    streamer.clear();
    const PlanGradientOp<T> op{potentials_of<T>(p),           static_cast<const T*>(p.grad_plan), static_cast<const T*>(p.plan),
                               static_cast<T*>(p.grad_cost), static_cast<T*>(p.grad_f),          static_cast<T*>(p.grad_g),
                               row_epsilon};
    streamer.rows(op);
    streamer.columns(op);
    streamer.problems(AddRows<T>{static_cast<int>(p.N), row_epsilon, static_cast<T*>(p.grad_epsilon)});
    *status = streamer.status;
  }
  return pieces.used();
}

template <class T>
int64_t envelope(const SinkhornEnvelope& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  T* const row_epsilon = pieces.take<T>(p.B * p.N);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 0, pieces, stream);
  if (status) {
    const T* const gradient = static_cast<const T*>(p.grad_entropic_value);
    streamer.rows(EnvelopeOp<T>{potentials_of<T>(p), gradient, static_cast<T*>(p.grad_cost), row_epsilon});
    streamer.problems(AddRows<T>{static_cast<int>(p.N), row_epsilon, static_cast<T*>(p.grad_epsilon)});
    *status = streamer.status;
  }
  return pieces.used();
}

}  // namespace

namespace protokernels {

int launch_sinkhorn_plan(const SinkhornPlan& p, void* stream) {
  if (p.B == 0) return 0;
  return p.kind == Kind::f64 ? plan<double>(p, stream) : plan<float>(p, stream);
}

int64_t sinkhorn_plan_backward_workspace(const SinkhornPlanBackward& p) {
  return p.kind == Kind::f64 ? plan_backward<double>(p, nullptr, nullptr, nullptr) : plan_backward<float>(p, nullptr, nullptr, nullptr);
}

int launch_sinkhorn_plan_backward(const SinkhornPlanBackward& p, void* workspace, void* stream) {
  int status = 0;
  if (p.B == 0) return 0;
  p.kind == Kind::f64 ? plan_backward<double>(p, workspace, stream, &status) : plan_backward<float>(p, workspace, stream, &status);
  return status;
}

int64_t sinkhorn_envelope_workspace(const SinkhornEnvelope& p) {
  return p.kind == Kind::f64 ? envelope<double>(p, nullptr, nullptr, nullptr) : envelope<float>(p, nullptr, nullptr, nullptr);
}

int launch_sinkhorn_envelope(const SinkhornEnvelope& p, void* workspace, void* stream) {
  int status = 0;
  if (p.B > 0) p.kind == Kind::f64 ? envelope<double>(p, workspace, stream, &status) : envelope<float>(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
