// SPDX-License-Identifier: MIT
// Sinkhorn between split features on the host: everything but the half-steps, which differ in how the tensor cores are asked for products
// (sinkhorn_features.cu, sinkhorn_features_hopper.cu).
#pragma once

#include "ops/cuda/sinkhorn_features_pass.cuh"

namespace {

struct SplitSolver {
  const SinkhornFeatures& p;
  void* stream;
  SplitSide x, y;
  int status;

  SplitSolver(const SinkhornFeatures& problem, void* on) : p(problem), stream(on), x{}, y{}, status(0) {}

  int64_t longer() const { return p.N > p.M ? p.N : p.M; }

  // Both sides and what half-steps work on. A split vector has so many units of 16 bytes; tiles of a problem; partial sums of all.
  HalfStep arrange(Pieces& pieces, int64_t units, int64_t tiles, int64_t partial_sums) {
    Solve<float> solve(p, nullptr, pieces);
    solve.by_turns = true;
    const auto side = [&](int64_t count, const void* vectors) {
      const int64_t padded = (count + PAD - 1) / PAD * PAD;
      float* const norms = pieces.take<float>(p.B * count);
      uint4* const split = pieces.take<uint4>(p.B * padded * units);
      return SplitSide{static_cast<int>(count),          static_cast<int>(padded), static_cast<const float*>(vectors), norms, split,
                       pieces.take<float2>(p.B * padded)};
    };
    x = side(p.N, p.x), y = side(p.M, p.y);
    float* const partial = pieces.take<float>(partial_sums);
    float* const errors = pieces.take<float>(p.B * tiles);
    unsigned* const arrivals = pieces.take<unsigned>(p.B * (1 + tiles));
    return {solve,   x,       y,      static_cast<int>(p.D), 0,       0, 0, p.cosine, false, nullptr, nullptr,
            nullptr, partial, errors, arrivals + p.B,        arrivals};
  }

  template <class Op>
  void problems(const Op& op) {
    if (status == 0) status = PK_LAUNCH((wide_kernel<float, Op>), dim3(static_cast<unsigned>(p.B)), dim3(WIDE_THREADS), 0, stream, op);
  }

  // Before the first half-step; the kernel writes the vectors of a side.
  template <class Kernel>
  void start(const HalfStep& step, int64_t tiles, Kernel write_vectors) {
    status = pk::memset_async(step.problem_arrivals, 0, sizeof(unsigned) * static_cast<std::size_t>(p.B * (1 + tiles)), stream);
    for (const SplitSide& side : {x, y}) {
      const int64_t vectors = p.B * side.padded, blocks = (vectors + STREAM_WARPS - 1) / STREAM_WARPS;
      if (status == 0)
        status = PK_LAUNCH(write_vectors, dim3(static_cast<unsigned>(blocks)), dim3(STREAM_THREADS), 0, stream, vectors,
                           static_cast<int>(p.D), p.cosine, side, const_cast<float*>(side.norms));
    }
    problems(StartOp<float>{step.p});
    problems(BiasOp{step.p, y, p.cosine, false, step.p.v});
  }

  // The last half-step takes values from the plan, where a problem stopped early with the row potentials of that iteration.
  template <class Values>
  void finish(const HalfStep& step, const Values& take_values) {
    if (p.tolerance > 0) problems(BiasOp{step.p, x, p.cosine, true, nullptr});
    take_values();
    problems(FinishOp<float>{step.p});
  }
};

template <class Solver>
int64_t solve_split(const SinkhornFeatures& p, void* workspace, void* stream, int* status) {
  Solver solver(p, stream);
  const int64_t bytes = solver.run(workspace);
  if (status) *status = solver.status;
  return bytes;
}

}  // namespace
