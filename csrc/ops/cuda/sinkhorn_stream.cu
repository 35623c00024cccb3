// SPDX-License-Identifier: MIT
// Sinkhorn on the GPU, problems of any size: the cost is read in every half-step, in the log domain. The equations stand in ops/sinkhorn.h.
//
// An iteration is two launches: rows, the last block of a problem looking at the error; columns by chunks of rows, the last block of a
// panel adding up its chunks. A problem that has reached the tolerance, or its last iteration, is marked on the device and skipped from
// then on: the host never waits. 1.13 exponentials per entry and half-step (the largest of 8 entries is taken out at a time).
// Limit at 4096 x 4096 on an H200: memory, 31 us an iteration. Not yet run on a GPU; runs in the emulator.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_stream_solve.cuh"

namespace {

template <class T>
struct CostRowsOp : RowsOp<T> {
  __device__ __forceinline__ void add(LogSum<T>& sum, int64_t b, int, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = this->p.inverse_epsilon(b);
    const T* const v = this->p.v + b * this->p.M + j;
    T x[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) x[k] = k < n ? v[k * dj] - c[k] * inverse : -T(INFINITY);
    sum.add(x, n);
  }
};

template <class T>
struct CostColumnsOp : ColumnsOp<T> {
  __device__ __forceinline__ void add(LogSum<T>& sum, int64_t b, int i, int, int di, int, int n, const T (&c)[STEP]) const {
    const T inverse = this->p.inverse_epsilon(b);
    const T* const u = this->p.u + b * this->p.N + i;
    T x[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) x[k] = k < n ? u[k * di] - c[k] * inverse : -T(INFINITY);
    sum.add(x, n);
  }
};

template <class T>
struct CostValuesOp : ValuesOp<T> {
  __device__ __forceinline__ void add(Sums<T, 3>& sum, int64_t b, int i, int j, int, int dj, int n, const T (&c)[STEP]) const {
    const T inverse = this->p.inverse_epsilon(b), u = this->p.u[b * this->p.N + i];
#pragma unroll
    for (int k = 0; k < STEP; ++k) {
      if (k >= n) continue;
      const T total = u + this->p.v[b * this->p.M + j + k * dj], plan = exponential(total - c[k] * inverse);
      if (plan == 0) continue;
      sum.part[0] += plan;
      sum.part[1] += plan * c[k];
      sum.part[2] += plan * (total - 1);
    }
  }
};

template <class T>
struct CostPasses {
  Streamer<T> streamer;
  void rows(const Solve<T>& p) { streamer.rows(CostRowsOp<T>{{p}}); }
  void columns(const Solve<T>& p) { streamer.columns(CostColumnsOp<T>{{p}}); }
  void values(const Solve<T>& p) { streamer.rows(CostValuesOp<T>{{p}}); }
  template <class Op>
  void problems(const Op& op) {
    streamer.problems(op);
  }
};

template <class T>
int64_t forward(const SinkhornForward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  const Solve<T> solve(p, static_cast<T*>(p.history), pieces);
  CostPasses<T> passes{Streamer<T>(p.B, p.N, p.M, p.cost, LogSum<T>::PARTS, pieces, stream)};
  if (status) {
    passes.streamer.clear();
    iterate(passes, solve);
    *status = passes.streamer.status;
  }
  return pieces.used();
}

}  // namespace

namespace protokernels {

int64_t stream_forward_workspace(const SinkhornForward& p) {
  return p.kind == Kind::f64 ? forward<double>(p, nullptr, nullptr, nullptr) : forward<float>(p, nullptr, nullptr, nullptr);
}

int launch_stream_forward(const SinkhornForward& p, void* workspace, void* stream) {
  int status = 0;
  p.kind == Kind::f64 ? forward<double>(p, workspace, stream, &status) : forward<float>(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
