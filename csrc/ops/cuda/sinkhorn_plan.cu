// SPDX-License-Identifier: MIT
// The plan of Sinkhorn on the GPU, its gradient, and the envelope gradient of the entropic value. The equations stand in ops/sinkhorn.h.
// Limited by memory: each reads its matrices once and writes one; the plan's gradient reads them twice where a problem is larger than 256
// rows or columns. Smaller ones are a block's work from end to end, so that a gradient is one launch.

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

// A problem of up to 32 E columns by one block: a warp per row, lane l having the columns l, l + 32, ...; each matrix is read once.
//   op.entry(b, at, log P, eps, sum for eps)     what it returns enters the sums of its row and its column, if the Op has MARGINS
template <class T, int E, int WARPS, class Op>
__global__ void __launch_bounds__(32 * WARPS, 1) whole_kernel(const T* cost, const Op op) {
  PK_SHARED(T, parts, WARPS, Op::MARGINS ? 32 * E : 1);
  PK_SHARED(T, sums, WARPS);
  const int N = op.potentials.N, M = op.potentials.M, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t b = blockIdx.x;
  const T epsilon = op.potentials.epsilon[b];
  T v[E], columns[E] = {}, of_epsilon = 0;
#pragma unroll
  for (int e = 0; e < E; ++e) v[e] = lane + 32 * e < M ? op.potentials.g[b * M + lane + 32 * e] : -T(INFINITY);
#pragma unroll(E > 2 ? 1 : 4)
  for (int i = warp; i < N; i += WARPS) {
    const T u = op.potentials.f[b * N + i];
    T of_row = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int j = lane + 32 * e;
      if (j >= M) continue;
      const int64_t at = (b * N + i) * M + j;
      const T c = cost[at];
      const bool absent = u == -T(INFINITY) || v[e] == -T(INFINITY) || c == T(INFINITY);
      const T value = op.entry(b, at, absent ? -T(INFINITY) : (u + v[e] - c) / epsilon, epsilon, of_epsilon);
      of_row += value, columns[e] += value;
    }
    if (Op::MARGINS) {
      of_row = warp_sum(of_row);
      if (lane == 0) op.row(b, i, of_row, epsilon);
    }
  }
  of_epsilon = warp_sum(of_epsilon);
  if (lane == 0) sums[warp] = of_epsilon;
  if (Op::MARGINS)
#pragma unroll
    for (int e = 0; e < E; ++e) parts[warp][lane + 32 * e] = columns[e];
  __syncthreads();
  if (Op::MARGINS)
    for (int j = threadIdx.x; j < M; j += 32 * WARPS) {
      T total = 0;
      for (int w = 0; w < WARPS; ++w) total += parts[w][j];
      op.column(b, j, total, epsilon);
    }
  if (threadIdx.x == 0) {
    T total = 0;
    for (int w = 0; w < WARPS; ++w) total += sums[w];
    op.problem(b, total, epsilon);
  }
}

template <class T>
struct WholePlanGradient {
  static constexpr bool MARGINS = true;
  Potentials<T> potentials;
  const T* grad_plan;  // [B, N, M]
  const T* plan;       // [B, N, M]
  T* grad_cost;        // [B, N, M]
  T* grad_f;           // [B, N]
  T* grad_g;           // [B, M]
  T* grad_epsilon;     // [B]

  __device__ __forceinline__ T entry(int64_t, int64_t at, T log_plan, T epsilon, T& of_epsilon) const {
    const T p = plan[at], gradient = grad_plan[at], gamma = p == 0 ? T(0) : gradient * p;
    if (gamma != 0) of_epsilon += gamma * log_plan;
    grad_cost[at] = -gamma / epsilon;
    return gamma;
  }
  __device__ __forceinline__ void row(int64_t b, int i, T sum, T epsilon) const { grad_f[b * potentials.N + i] = sum / epsilon; }
  __device__ __forceinline__ void column(int64_t b, int j, T sum, T epsilon) const { grad_g[b * potentials.M + j] = sum / epsilon; }
  __device__ __forceinline__ void problem(int64_t b, T sum, T epsilon) const { grad_epsilon[b] = -sum / epsilon; }
};

template <class T>
struct WholeEnvelope {
  static constexpr bool MARGINS = false;
  Potentials<T> potentials;
  const T* gradient;  // [B]
  T* grad_cost;       // [B, N, M]
  T* grad_epsilon;    // [B]

  __device__ __forceinline__ T entry(int64_t b, int64_t at, T log_plan, T, T& of_epsilon) const {
    const T plan = exponential(log_plan);
    if (plan != 0) of_epsilon += plan * (log_plan - 1);
    grad_cost[at] = gradient[b] * plan;
    return 0;
  }
  __device__ __forceinline__ void row(int64_t, int, T, T) const {}
  __device__ __forceinline__ void column(int64_t, int, T, T) const {}
  __device__ __forceinline__ void problem(int64_t b, T sum, T) const { grad_epsilon[b] = gradient[b] * sum; }
};

constexpr bool whole(int64_t N, int64_t M) { return N <= 256 && M <= 256; }

template <class T, class Op>
int launch_whole(int64_t B, int64_t M, const void* cost, const Op& op, void* stream) {
  constexpr int WARPS = sizeof(T) == 4 ? 32 : 16;
  const T* const costs = static_cast<const T*>(cost);
  const dim3 blocks(static_cast<unsigned>(B));
  if (M <= 64) return PK_LAUNCH((whole_kernel<T, 2, 16, Op>), blocks, dim3(32 * 16), 0, stream, costs, op);
  return PK_LAUNCH((whole_kernel<T, 8, WARPS, Op>), blocks, dim3(32 * WARPS), 0, stream, costs, op);
}

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
  if (whole(p.N, p.M)) {
    const WholePlanGradient<T> op{
        potentials_of<T>(p),       static_cast<const T*>(p.grad_plan), static_cast<const T*>(p.plan),  static_cast<T*>(p.grad_cost),
        static_cast<T*>(p.grad_f), static_cast<T*>(p.grad_g),          static_cast<T*>(p.grad_epsilon)};
    if (status) *status = launch_whole<T>(p.B, p.M, p.cost, op, stream);
    return 0;
  }
  Pieces pieces(workspace);
  T* const row_epsilon = pieces.take<T>(p.B * p.N);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 2, pieces, stream);
  if (status) {
    streamer.clear();
    const PlanGradientOp<T> op{potentials_of<T>(p),
                               static_cast<const T*>(p.grad_plan),
                               static_cast<const T*>(p.plan),
                               static_cast<T*>(p.grad_cost),
                               static_cast<T*>(p.grad_f),
                               static_cast<T*>(p.grad_g),
                               row_epsilon};
    streamer.rows(op);
    streamer.columns(op);
    streamer.problems(AddRows<T>{static_cast<int>(p.N), row_epsilon, static_cast<T*>(p.grad_epsilon)});
    *status = streamer.status;
  }
  return pieces.bytes();
}

template <class T>
int64_t envelope(const SinkhornEnvelope& p, void* workspace, void* stream, int* status) {
  if (whole(p.N, p.M)) {
    const WholeEnvelope<T> op{potentials_of<T>(p), static_cast<const T*>(p.grad_entropic_value), static_cast<T*>(p.grad_cost),
                              static_cast<T*>(p.grad_epsilon)};
    if (status) *status = launch_whole<T>(p.B, p.M, p.cost, op, stream);
    return 0;
  }
  Pieces pieces(workspace);
  T* const row_epsilon = pieces.take<T>(p.B * p.N);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 0, pieces, stream);
  if (status) {
    const T* const gradient = static_cast<const T*>(p.grad_entropic_value);
    streamer.rows(EnvelopeOp<T>{potentials_of<T>(p), gradient, static_cast<T*>(p.grad_cost), row_epsilon});
    streamer.problems(AddRows<T>{static_cast<int>(p.N), row_epsilon, static_cast<T*>(p.grad_epsilon)});
    *status = streamer.status;
  }
  return pieces.bytes();
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
