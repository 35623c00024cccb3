// SPDX-License-Identifier: MIT
// Differentiable transformations on the GPU, forward. The equations stand in ops/warp.h, the cut of a chain into passes in warp_program.cuh.
//
// A block takes a tile of 32 x 16 pixels of a plane's upper left quarter and the three mirror images of the tile: flips need no other block, whatever
// their place in the order. The blur of both axes runs in shared memory (rows, then columns, runs of 8 outputs from 20 inputs in registers); the
// rotation reads its four pixels there too, from a box that is copied in rows; the noise is made by Philox, four numbers at a time, and never stored.
// A chain in the default order is two launches, with one intermediate image that the L2 cache holds; one launch where a block holds
// the whole plane (up to 64 x 32), the passes separated by barriers. Nothing depends on the order of threads or blocks.
//
// Limit: instructions and their latency. Measured on an NVIDIA H200 (profiler, float32): 24 us for the first launch at 16 x 3 x 224 x 224, 7 us at
// 32 x 1 x 128 x 128, 5.5 us for the only one at 64 x 1 x 28 x 28, where one block a plane leaves half of the multiprocessors idle and latency
// decides; memory alone would take 4.5 us at 224. The second launch begins while the first one ends. What a block waits for shows at every size: with
// the taps made by all threads' first warp behind two barriers, where now a warp without pixels to load makes them meanwhile, and the noise
// and the crop's mask behind three more, these were 30, 9 and 9 us. A third of the instructions are the noise's, 180 for four numbers.

#include "common/simt.cuh"
#include "ops/cuda/warp_step.cuh"
#include "ops/warp.h"

namespace {

// resources: spills at most 8 bytes (sm_100)
// resources: dynamic shared 35840 bytes
template <class T, bool mixed, Work work>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8        ? 1
                                           : work == Work::any   ? 3
                                           : work == Work::chain ? 2
                                                                 : 6) warp_forward_kernel(const Program p) {
  PK_DYNAMIC_SHARED(T, shared);
  const Tile tile = tile_of_block(p);
  if (p.followed) pk::let_next_begin();
  if constexpr (work == Work::chain) {
    run_pass<T, mixed, Work::blur>(p, p.step[0], tile, shared);
    __syncthreads();  // the next pass reads what the others of this block wrote
    run_turn<T, mixed>(p, p.step[1], tile, shared);
  } else if constexpr (work == Work::turn) {
    run_turn<T, mixed>(p, p.step[p.first], tile, shared);
  } else if constexpr (work == Work::any) {
    for (int i = p.first; i < p.last; ++i) {
      run_pass<T, mixed, work>(p, p.step[i], tile, shared);
      __syncthreads();
    }
  } else {
    run_pass<T, mixed, work>(p, p.step[p.first], tile, shared);
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class T, bool mixed>
int launch_forward(const WarpForward& p, void* workspace, void* stream) {
  Pass passes[MOST_PASSES];
  const int count = passes_of(p, passes);
  Program program = program_of(p);
  Pieces pieces(workspace);
  T* const between[2] = {count > 1 ? pieces.take<T>(elements_of(p)) : nullptr, count > 2 ? pieces.take<T>(elements_of(p)) : nullptr};
  for (int i = 0; i < count; ++i) {
    Step& step = program.step[i] = step_of(passes[i]);
    step.source = i == 0 ? p.images : between[(i - 1) % 2];
    step.target = i == count - 1 ? p.output : between[i % 2];
    step.is_source_image = i == 0;
    step.is_target_image = i == count - 1;
  }
  return launch_steps(program, count, [&](const Program& part) {
    auto* kernel = warp_forward_kernel<T, mixed, Work::any>;
    if constexpr (sizeof(T) == 4) {
      const Work work = work_of(part, false);
      if (work == Work::blur) kernel = warp_forward_kernel<T, mixed, Work::blur>;
      if (work == Work::turn) kernel = warp_forward_kernel<T, mixed, Work::turn>;
      if (work == Work::chain) kernel = warp_forward_kernel<T, mixed, Work::chain>;
    }
    return launch_part(kernel, part, blocks_of_sample(part), shared_bytes(part, false, sizeof(T)), stream);
  });
}

}  // namespace

namespace protokernels {

int64_t warp_forward_workspace(const WarpForward& p) {
  Pass passes[MOST_PASSES];
  const int count = passes_of(p, passes);
  Pieces pieces(nullptr);
  for (int i = 1; i < count && i < 3; ++i) pieces.take<unsigned char>(elements_of(p) * element_size(p));
  return pieces.bytes();
}

int launch_warp_forward(const WarpForward& p, void* workspace, void* stream) {
  switch (p.kind) {
    case Kind::f32: return launch_forward<float, false>(p, workspace, stream);
    case Kind::f64: return launch_forward<double, false>(p, workspace, stream);
    default: return launch_forward<float, true>(p, workspace, stream);
  }
}

}  // namespace protokernels
