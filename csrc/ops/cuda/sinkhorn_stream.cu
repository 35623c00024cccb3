// SPDX-License-Identifier: MIT
// Sinkhorn on the GPU, problems of any size: the cost is read in every half-step, in the log domain. The equations stand in ops/sinkhorn.h.
//
// Single precision, up to 8192 columns (fused_forward): an iteration reads the cost once, see sinkhorn_stream_fused.cuh. Where all blocks find
// a place on the GPU at the same time they run all iterations in one launch, with part of the cost in shared memory; else, and in the
// emulator, an iteration is two launches.
// Everything else (general_forward): an iteration is two launches that read the cost: rows, the last block of a problem looking at the
// error; columns by chunks of rows, the last block of a panel adding up its chunks; 1.13 exponentials per entry and half-step.
// A problem that has reached the tolerance, or its last iteration, is marked on the device: the host never waits.

#include <type_traits>

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_stream_kernels.cuh"

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
int64_t general_forward(const SinkhornForward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  const Solve<T> solve(p, static_cast<T*>(p.history), pieces);
  CostPasses<T> passes{Streamer<T>(p.B, p.N, p.M, p.cost, LogSum<T>::PARTS, pieces, stream)};
  if (status) {
    passes.streamer.clear();
    iterate(passes, solve);
    *status = passes.streamer.status;
  }
  return pieces.bytes();
}

template <class Action>
auto with_fused_shape(int64_t M, const Action& action) {
  if (M <= 128) return action(FusedShape<32, 4>());
  if (M <= 512) return action(FusedShape<128, 4>());
  if (M <= 1024) return action(FusedShape<128, 8>());
  if (M <= 2048) return action(FusedShape<256, 8>());
  if (M <= 4096) return action(FusedShape<512, 8>());
  return action(FusedShape<512, 16>());
}

// All iterations at once, if every block finds a place; false if not.
template <class S>
bool launch_resident(S, const FusedStep& step, unsigned* arrivals, int panels, void* stream, int* status) {
#if defined(PK_BLOCKS_WAIT)
  const int64_t row_bytes = step.p.M * sizeof(float), room = static_cast<int64_t>(pk::shared_memory_limit()) - SHARED_BESIDE;
  const int64_t kept = row_bytes * step.chunk_rows <= room ? step.chunk_rows : room / row_bytes, blocks = step.p.B * step.chunks;
  const std::size_t bytes = kept * row_bytes;
  if (blocks > pk::blocks_together(resident_kernel<S>, FUSED_THREADS, bytes)) return false;
  if (*status == 0) *status = pk::memset_async(arrivals, 0, sizeof(unsigned) * static_cast<std::size_t>(step.p.B), stream);
  if (*status == 0)
    *status = pk::launch_together(resident_kernel<S>, dim3(static_cast<unsigned>(blocks)), dim3(FUSED_THREADS), bytes, stream, step,
                                  arrivals, static_cast<int>(kept), panels);
  return true;
#else
  return false;
#endif
}

int64_t fused_forward(const SinkhornForward& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  Solve<float> solve(p, static_cast<float*>(p.history), pieces);
  solve.by_turns = true;
  const int64_t rows = fused_chunk_rows(p.N), chunks = (p.N + rows - 1) / rows;
  float* const partial = pieces.take<float>(p.B * chunks * p.M);
  float* const errors = pieces.take<float>(p.B * chunks);
  unsigned* const arrivals = pieces.take<unsigned>(p.B);
  if (!status) return pieces.bytes();
  const bool aligned = p.M % 4 == 0 && reinterpret_cast<std::uintptr_t>(p.cost) % 16 == 0;
  FusedStep step{solve, static_cast<const float*>(p.cost), static_cast<int>(rows), static_cast<int>(chunks), aligned, partial, errors};
  const auto problems = [&](const auto& op) {
    using Op = std::remove_cvref_t<decltype(op)>;
    if (*status == 0) *status = PK_LAUNCH((wide_kernel<float, Op>), dim3(static_cast<unsigned>(p.B)), dim3(WIDE_THREADS), 0, stream, op);
  };
  const dim3 threads(FUSED_THREADS);
  const int panels = static_cast<int>((p.M + COLUMNS_PER_BLOCK - 1) / COLUMNS_PER_BLOCK);
  problems(StartOp<float>{solve});
  const bool resident = with_fused_shape(p.M, [&](auto shape) { return launch_resident(shape, step, arrivals, panels, stream, status); });
  for (int t = 0; t < p.num_iters && !resident; ++t) {
    step.p.t = t;
    if (*status == 0)
      *status = with_fused_shape(p.M, [&](auto shape) {
        return PK_LAUNCH((fused_kernel<decltype(shape)>), dim3(static_cast<unsigned>(p.B * chunks)), threads, 0, stream, step);
      });
    if (*status == 0)
      *status = PK_LAUNCH(fused_columns_kernel, dim3(static_cast<unsigned>(p.B * panels)), threads, 0, stream, step, panels);
  }
  const int64_t blocks = (p.N + VALUE_ROWS * STREAM_WARPS - 1) / (VALUE_ROWS * STREAM_WARPS);
  if (*status == 0)
    *status = PK_LAUNCH(fused_values_kernel, dim3(static_cast<unsigned>(p.B * blocks)), dim3(STREAM_THREADS), 0, stream, step, blocks);
  problems(FinishOp<float>{solve});
  return pieces.bytes();
}

int64_t forward(const SinkhornForward& p, void* workspace, void* stream, int* status) {
  if (p.kind == Kind::f64) return general_forward<double>(p, workspace, stream, status);
  return p.M <= MOST_FUSED_COLUMNS ? fused_forward(p, workspace, stream, status) : general_forward<float>(p, workspace, stream, status);
}

}  // namespace

namespace protokernels {

int64_t stream_forward_workspace(const SinkhornForward& p) { return forward(p, nullptr, nullptr, nullptr); }

int launch_stream_forward(const SinkhornForward& p, void* workspace, void* stream) {
  int status = 0;
  forward(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
