// SPDX-License-Identifier: MIT
// Sinkhorn between features on sm_90a, up to 128 dimensions: the launches around sinkhorn_features_hopper.cuh.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_launch.h"
#if defined(__CUDACC__)
#include "ops/cuda/sinkhorn_features_hopper_walk.cuh"
#include "ops/cuda/sinkhorn_features_solver.cuh"

namespace {

template <int STEPS>
struct HopperSolver : SplitSolver {
  using SplitSolver::SplitSolver;

  // A half-step of side 0: rows, 1: columns, after t iterations.
  HalfStep half_step(HalfStep step, int side, int t) const {
    float* const u[2] = {step.p.u, step.p.u_next};
    step.p.t = t, step.side = side, step.rows = side == 0 ? x : y, step.columns = side == 0 ? y : x;
    step.tested = side == 0 && t > 0 && p.tolerance > 0;
    step.before = side == 0 ? u[t % 2] : step.p.v, step.other = side == 0 ? step.p.v : u[(t + 1) % 2];
    step.after = side == 0 ? u[(t + 1) % 2] : step.p.v;
    return step;
  }
  Deal deal(int side) const {
    const int64_t rows = side == 0 ? x.count : y.count;
    Deal dealt;
    dealt.tiles = static_cast<int>((rows + HOPPER_TILE - 1) / HOPPER_TILE);
    dealt.panels = (side == 0 ? y : x).padded / HOPPER_PANEL, dealt.units = p.B * dealt.tiles * dealt.panels;
    return dealt;
  }
  // As many as have something to do in every half-step.
  unsigned blocks() const {
    const int64_t fewer = deal(0).units < deal(1).units ? deal(0).units : deal(1).units;
    return static_cast<unsigned>(fewer < HOPPER_BLOCKS ? fewer : HOPPER_BLOCKS);
  }
  template <int PRODUCTS, Walk walk>
  void half(const HalfStep& step, int side, int t) {
    if (status == 0)
      status = PK_LAUNCH_BEHIND((hopper_kernel<STEPS, PRODUCTS, walk>), dim3(blocks()), dim3(HOPPER_THREADS), HopperShape<STEPS>::BYTES,
                                stream, half_step(step, side, t), deal(side));
  }
  // Iterations first to last - 1, none of them the first of all, of balanced problems.
  template <int PRODUCTS>
  void iterations(const HalfStep& step, int first, int last, unsigned* ready) {
    if (first >= last) return;
    const HopperLoop loop{{half_step(step, 0, 1), half_step(step, 1, 1), half_step(step, 0, 2), half_step(step, 1, 2)},
                          {deal(0), deal(1)},
                          first,
                          2 * (last - first),
                          ready};
    const auto kernel = hopper_loop_kernel<STEPS, PRODUCTS>;
    constexpr std::size_t bytes = HopperShape<STEPS>::BYTES;
    if (p.tolerance == 0 && static_cast<int>(blocks()) <= pk::blocks_together(kernel, HOPPER_THREADS, bytes)) {
      if (status == 0) status = pk::memset_async(ready, 0, sizeof(unsigned), stream);
      if (status == 0) status = pk::launch_together(kernel, dim3(blocks()), dim3(HOPPER_THREADS), bytes, stream, loop);
    } else {
      for (int t = first; t < last; ++t) half<PRODUCTS, Walk::sums>(step, 0, t), half<PRODUCTS, Walk::sums>(step, 1, t);
    }
  }

  int64_t run(void* workspace) {
    Pieces pieces(workspace);
    const int64_t tiles = (longer() + HOPPER_TILE - 1) / HOPPER_TILE;
    const HalfStep step = arrange(pieces, HopperShape<STEPS>::ATOMS * 16, tiles, (HOPPER_BLOCKS + p.B * tiles) * MOST_PARTS * HOPPER_TILE);
    unsigned* const ready = pieces.take<unsigned>(1);
    if (!workspace) return pieces.bytes();

    start(step, tiles, hopper_split_kernel<STEPS>);
    const int count = static_cast<int>(p.num_iters);
    const bool balanced = step.p.balanced;
    for (int t = 0; t < (balanced ? count > 0 : count); ++t) half<3, Walk::logs>(step, 0, t), half<3, Walk::logs>(step, 1, t);
    if (balanced && p.precise) {
      iterations<3>(step, 1, count, ready);
    } else if (balanced) {
      iterations<1>(step, 1, count - 1, ready);
      iterations<3>(step, count - 1 > 1 ? count - 1 : 1, count, ready);
    }
    finish(step, [&] { half<3, Walk::values>(step, 0, 0); });
    return pieces.bytes();
  }
};

}  // namespace
#endif

namespace protokernels {

// On the current device, from what was compiled: elsewhere the kernel is empty.
bool sinkhorn_features_on_hopper(const SinkhornFeatures& p) {
#if defined(__CUDACC__)
  if (p.kind != Kind::f32 || p.D > 128 || pk::device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  cudaFuncAttributes attributes;
  const void* const kernel = reinterpret_cast<const void*>(hopper_kernel<4, 3, Walk::sums>);
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.numRegs > 64;
#else
  return false;
#endif
}

int64_t sinkhorn_features_hopper(const SinkhornFeatures& p, void* workspace, void* stream, int* status) {
#if defined(__CUDACC__)
  if (p.D <= 32) return solve_split<HopperSolver<2>>(p, workspace, stream, status);
  if (p.D <= 64) return solve_split<HopperSolver<4>>(p, workspace, stream, status);
  return solve_split<HopperSolver<8>>(p, workspace, stream, status);
#else
  return 0;
#endif
}

}  // namespace protokernels
