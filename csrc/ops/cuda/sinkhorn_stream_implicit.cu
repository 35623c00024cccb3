// SPDX-License-Identifier: MIT
// The implicit gradient of Sinkhorn on the GPU, problems of any size. The equations stand in ops/sinkhorn.h.
//
// Conjugate residuals as in sinkhorn_implicit.cu, with P made again from the cost in every product: three launches a step, a fixed number
// of steps, and a flag on the device for problems that are done. Vectors and inner products of a problem belong to one block.
// Limit at 4096 x 4096 on an H200: memory, 31 us a step (with conjugate gradients, which were tested there; these are in the emulator).

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_stream.cuh"
#include "ops/sinkhorn.h"

namespace {

constexpr int MOST_STEPS = 200;

template <class T>
struct SolverState {
  int64_t B;
  int N, M;
  const T* f;                    // [B, N]
  const T* g;                    // [B, M]
  const T* epsilon;              // [B]
  const T* grad_f;               // [B, N] or null
  const T* grad_g;               // [B, M] or null
  const T* grad_transport_cost;  // [B] or null
  const T* grad_entropic_value;  // [B] or null
  T* grad_cost;                  // [B, N, M]
  T* grad_a;                     // [B, N]
  T* grad_b;                     // [B, M]
  T* grad_epsilon;               // [B]
  T* row_mass;                   // [B, N]: p
  T* row_right;                  // [B, N]: right side
  T* row_vector;                 // [B, N]: what is multiplied by P^T; the solution x in the end
  T* row_epsilon;                // [B, N]
  T* column_mass;                // [B, M]: q
  T* column_right;               // [B, M]
  T* y;                          // [B, M]
  T* z;                          // [B, M]: the scaled residual
  T* of_z;                       // [B, M]: L z
  T* direction;                  // [B, M]
  T* of_direction;               // [B, M]
  T* scalars;                    // [2, B]: <z, L z> of the step before, the size of L z at the start
  int* done;                     // [B]

  SolverState(const SinkhornBackward& p, Pieces& pieces)
      : B(p.B),
        N(static_cast<int>(p.N)),
        M(static_cast<int>(p.M)),
        f(static_cast<const T*>(p.f)),
        g(static_cast<const T*>(p.g)),
        epsilon(static_cast<const T*>(p.epsilon)),
        grad_f(static_cast<const T*>(p.grad_f)),
        grad_g(static_cast<const T*>(p.grad_g)),
        grad_transport_cost(static_cast<const T*>(p.grad_transport_cost)),
        grad_entropic_value(static_cast<const T*>(p.grad_entropic_value)),
        grad_cost(static_cast<T*>(p.grad_cost)),
        grad_a(static_cast<T*>(p.grad_a)),
        grad_b(static_cast<T*>(p.grad_b)),
        grad_epsilon(static_cast<T*>(p.grad_epsilon)) {
    for (T** array : {&row_mass, &row_right, &row_vector, &row_epsilon}) *array = pieces.take<T>(p.B * p.N);
    for (T** array : {&column_mass, &column_right, &y, &z, &of_z, &direction, &of_direction}) *array = pieces.take<T>(p.B * p.M);
    scalars = pieces.take<T>(p.B * 2);
    done = pieces.take<int>(p.B);
  }

  __device__ __forceinline__ T transport_gradient(int64_t problem) const {
    return grad_transport_cost ? grad_transport_cost[problem] : T(0);
  }
  __device__ __forceinline__ T entropic_gradient(int64_t problem) const {
    return grad_entropic_value ? grad_entropic_value[problem] : T(0);
  }
  __device__ __forceinline__ T over_mass(int64_t at, T value) const { return column_mass[at] != 0 ? value / column_mass[at] : T(0); }
  // log P; -infinity if there is no pair. Potentials are never +infinity.
  __device__ __forceinline__ T log_plan(T potential, T other, T c, T inverse) const { return (potential + other - c) * inverse; }
};

template <class T>
struct MarginalsOp {
  using Sum = Sums<T, 2>;  // P; tc P C
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int di, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], tc = p.transport_gradient(problem);
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const T plan = exponential(p.log_plan(p.f[problem * p.N + i + k * di], p.g[problem * p.M + j + k * dj], c[k], inverse));
      sum.part[0] += plan;
      if (plan != 0) sum.part[1] += tc * plan * c[k];
    }
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    const T upstream = p.grad_f && sum.part[0] != 0 ? p.grad_f[at] : T(0);
    p.row_mass[at] = sum.part[0];
    p.row_right[at] = sum.part[1] + p.epsilon[problem] * upstream;
    p.row_epsilon[at] = sum.part[0] != 0 ? upstream * p.f[at] / p.epsilon[problem] : T(0);
  }
  __device__ __forceinline__ void column(int64_t problem, int j, const Sum& sum) const {
    const int64_t at = problem * p.M + j;
    const T upstream = p.grad_g && sum.part[0] != 0 ? p.grad_g[at] : T(0);
    p.column_mass[at] = sum.part[0];
    p.column_right[at] = sum.part[1] + p.epsilon[problem] * upstream;
  }
};

// Both right sides lose what makes their sums differ, every entry as its mass: beside a light one the rounding of the sums would be large.
template <class T>
struct GaugeOp {
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    T excess = 0, mass = 0;
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
      excess += p.row_right[problem * p.N + i];
      mass += p.row_mass[problem * p.N + i];
    }
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      excess -= p.column_right[problem * p.M + j];
      mass += p.column_mass[problem * p.M + j];
    }
    excess = problem_sum(excess, shared) / problem_sum(mass, shared);
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
      const int64_t at = problem * p.N + i;
      if (p.row_mass[at] != 0) p.row_right[at] -= excess * p.row_mass[at];
      p.row_vector[at] = p.row_mass[at] != 0 ? p.row_right[at] / p.row_mass[at] : T(0);
    }
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const int64_t at = problem * p.M + j;
      if (p.column_mass[at] != 0) p.column_right[at] += excess * p.column_mass[at];
      p.y[at] = 0;
    }
    if (threadIdx.x == 0) p.done[problem] = 0;
  }
};

template <class T, bool solution>  // (P z) / p, or in the end x = (r - P y) / p
struct ProductRowsOp {
  using Sum = Sums<T, 1>;
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return !solution && p.done[problem] != 0; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], f = p.f[problem * p.N + i];
    const T* const vector = solution ? p.y : p.z;
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      const int64_t at = problem * p.M + j + k * dj;
      if (k < n) sum.part[0] += exponential(p.log_plan(f, p.g[at], c[k], inverse)) * vector[at];
    }
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const {
    const int64_t at = problem * p.N + i;
    const T value = solution ? p.row_right[at] - sum.part[0] : sum.part[0];
    p.row_vector[at] = p.row_mass[at] != 0 ? value / p.row_mass[at] : T(0);
  }
};

template <class T, bool start>  // q z - P^T h, or at the start z = (c - P^T (r / p)) / q
struct ProductColumnsOp {
  using Sum = Sums<T, 1>;
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t problem) const { return !start && p.done[problem] != 0; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int di, int, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], g = p.g[problem * p.M + j];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      const int64_t at = problem * p.N + i + k * di;
      if (k < n) sum.part[0] += exponential(p.log_plan(g, p.f[at], c[k], inverse)) * p.row_vector[at];
    }
  }
  __device__ __forceinline__ void column(int64_t problem, int j, const Sum& sum) const {
    const int64_t at = problem * p.M + j;
    if (start)
      p.z[at] = p.over_mass(at, p.column_right[at] - sum.part[0]);
    else
      p.of_z[at] = p.column_mass[at] * p.z[at] - sum.part[0];
  }
};

// The vectors of a step, from L z to the next z.
template <class T>
struct StepOp {
  SolverState<T> p;
  bool first;

  __device__ __forceinline__ bool skip(int64_t problem) const { return !first && p.done[problem] != 0; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    constexpr T tolerance = sizeof(T) == 4 ? T(1e-7) : T(3e-15), rounding = sizeof(T) == 4 ? T(1e-6) : T(2e-15);
    const int64_t begin = problem * p.M;
    T energy = 0, scale = 0, size = 0, curvature = 0;
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const T z = p.z[begin + j], of_z = p.of_z[begin + j];
      energy += z * of_z, scale += z * (p.column_mass[begin + j] * z), size += magnitude(of_z);
    }
    energy = problem_sum(energy, shared), scale = problem_sum(scale, shared), size = problem_sum(size, shared);
    const T start = first ? size : p.scalars[p.B + problem], keep = first ? T(0) : energy / p.scalars[problem];
    // Energy that is the rounding of its two terms: what is left of z is between parts that do not touch.
    bool ends = !(size > tolerance * start) || !(energy > rounding * scale);
    if (!ends) {
      for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
        const int64_t at = begin + j;
        const T d = p.z[at] + (first ? T(0) : keep * p.direction[at]), of_d = p.of_z[at] + (first ? T(0) : keep * p.of_direction[at]);
        p.direction[at] = d, p.of_direction[at] = of_d;
        curvature += of_d * p.over_mass(at, of_d);
      }
      curvature = problem_sum(curvature, shared);
      ends = !(curvature > 0);  // it has vanished in the type
      const T length = ends ? T(0) : energy / curvature;
      for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
        const int64_t at = begin + j;
        p.y[at] += length * p.direction[at];
        p.z[at] -= length * p.over_mass(at, p.of_direction[at]);
      }
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    p.scalars[problem] = energy;
    if (first) p.scalars[p.B + problem] = start;
    p.done[problem] = ends;
  }
};

// The gradients of the masses: x and y, shifted to equal sums, weighted with the masses: x of a light entry may be so large that the others
// would not survive its share.
template <class T>
struct CenterOp {
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    T excess = 0, mass = 0;
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
      const T of_row = p.row_mass[problem * p.N + i];
      excess -= of_row * p.row_vector[problem * p.N + i], mass += of_row;
    }
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const T of_column = p.column_mass[problem * p.M + j];
      excess += of_column * p.y[problem * p.M + j], mass += of_column;
    }
    const T shift = problem_sum(excess, shared) / problem_sum(mass, shared), entropic = p.entropic_gradient(problem);
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) {
      const int64_t at = problem * p.N + i;
      p.grad_a[at] = p.row_mass[at] != 0 ? p.row_vector[at] + shift + entropic * p.f[at] : T(0);
    }
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const int64_t at = problem * p.M + j;
      p.grad_b[at] = p.column_mass[at] != 0 ? p.y[at] - shift + entropic * p.g[at] : T(0);
    }
  }
};

template <class T>
struct CostGradientOp {
  using Sum = Sums<T, 1>;  // M_bar C / eps^2 + e P (log P - 1)
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void add(Sum& sum, int64_t problem, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = T(1) / p.epsilon[problem], tc = p.transport_gradient(problem), entropic = p.entropic_gradient(problem);
    const T f = p.f[problem * p.N + i], x = p.row_vector[problem * p.N + i];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const int64_t at = problem * p.M + j + k * dj;
      const T log_plan = p.log_plan(f, p.g[at], c[k], inverse), plan = exponential(log_plan);
      T gradient = 0;
      if (plan != 0) {
        const T m = plan * (tc * c[k] - x - p.y[at]);
        gradient = (tc + entropic) * plan - m * inverse;
        sum.part[0] += m * c[k] * inverse * inverse + entropic * plan * (log_plan - 1);
      }
      p.grad_cost[(problem * p.N + i) * p.M + j + k * dj] = gradient;
    }
  }
  __device__ __forceinline__ void row(int64_t problem, int i, const Sum& sum) const { p.row_epsilon[problem * p.N + i] += sum.part[0]; }
};

template <class T>
struct EpsilonOp {
  SolverState<T> p;

  __device__ __forceinline__ bool skip(int64_t) const { return false; }
  __device__ __forceinline__ void run(int64_t problem, T* shared) const {
    T sum = 0;
    for (int i = threadIdx.x; i < p.N; i += STREAM_THREADS) sum += p.row_epsilon[problem * p.N + i];
    for (int j = threadIdx.x; j < p.M; j += STREAM_THREADS) {
      const int64_t at = problem * p.M + j;
      if (p.grad_g && p.column_mass[at] != 0) sum += p.grad_g[at] * p.g[at] / p.epsilon[problem];
    }
    sum = problem_sum(sum, shared);
    if (threadIdx.x == 0) p.grad_epsilon[problem] = sum;
  }
};

template <class T>
int64_t implicit(const SinkhornBackward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  const SolverState<T> state(p, pieces);
  Streamer<T> streamer(p.B, p.N, p.M, p.cost, 2, pieces, stream);
  if (status) {
    streamer.clear();
    streamer.rows(MarginalsOp<T>{state});
    streamer.columns(MarginalsOp<T>{state});
    streamer.problems(GaugeOp<T>{state});
    streamer.columns(ProductColumnsOp<T, true>{state});
    const int64_t enough = 2 * p.M + 32;
    for (int step = 0; step < MOST_STEPS && step < enough; ++step) {
      streamer.rows(ProductRowsOp<T, false>{state});
      streamer.columns(ProductColumnsOp<T, false>{state});
      streamer.problems(StepOp<T>{state, step == 0});
    }
    streamer.rows(ProductRowsOp<T, true>{state});
    streamer.problems(CenterOp<T>{state});
    streamer.rows(CostGradientOp<T>{state});
    streamer.problems(EpsilonOp<T>{state});
    *status = streamer.status;
  }
  return pieces.bytes();
}

}  // namespace

namespace protokernels {

int64_t stream_implicit_workspace(const SinkhornBackward& p) {
  return p.kind == Kind::f64 ? implicit<double>(p, nullptr, nullptr, nullptr) : implicit<float>(p, nullptr, nullptr, nullptr);
}

int launch_stream_implicit(const SinkhornBackward& p, void* workspace, void* stream) {
  int status = 0;
  p.kind == Kind::f64 ? implicit<double>(p, workspace, stream, &status) : implicit<float>(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
