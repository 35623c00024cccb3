// SPDX-License-Identifier: MIT
// Differentiable transformations on the GPU, backward. The cut of a chain into steps stands in warp_program.cuh.
//
// In the default order two launches, with one intermediate gradient. The first takes the adjoint of the rotation (warp_turn.cuh), makes the blurred tile
// and the noise again, and walks back through flips, crop and noise in registers; the second (warp_patch.cuh), which begins while the first one ends, is
// the adjoint blur, once with the taps and once with their slopes, so that sigma's gradient needs no more than the image's own pixels. The angle's
// gradient comes with the rotation's adjoint: a pixel times the derivatives of the weights with which outputs read it. Chains of other orders take
// up to seven launches; where a block holds the whole plane it is one.
// Sums of parameters: registers, warps, block, then the blocks of a sample in their order, in float64, by the one that comes last. No float atomics.
//
// Limit: instructions and their latency. Measured on an NVIDIA H200 (profiler, float32): 51 us for the first launch at 16 x 3 x 224 x 224, 13 us at
// 32 x 1 x 128 x 128, 11 us for the only one at 64 x 1 x 28 x 28, which is bound by latency; forward and backward in a CUDA graph 114, 32 and 18 us.
// By the assembly the adjoint of the rotation is a third of the first launch's instructions, 127 a cell (at 147, and with four shuffles for two, the
// launch took 55 us): each of four candidates has its coordinates and tests. Outputs that are sorted into their cells once would take fewer, but two
// of them share a place where rounding decides, next to quarter turns. Weights max(0, 1 - |t|) over 3 x 3 outputs would give the image's gradient
// in 80 instructions, but the angle's needs to know which cell an output is in.

#include "common/simt.cuh"
#include "ops/cuda/warp_patch.cuh"
#include "ops/warp.h"

namespace {

// By the tile's pixels before the blur: their gradients at GRAD_AT, and those that the taps' slopes would give at DERIVATIVE_AT.
template <class T, bool mixed>
__device__ __forceinline__ void adjoint_blur_tile(const Program& p, const Tile& tile, const Array& grad, T* shared) {
  PK_SHARED(T, taps, TAPS);
  const T sigma = sigma_of_sample<T>(p, tile.sample);
  T* const middle = shared + MIDDLE_AT;
  T* const slope_middle = shared + SLOPE_MIDDLE_AT;
  load_raw<T, mixed>(grad, tile, p.radius_y, p.radius_x, WarpBlurPadding::zeros, shared, [&] { make_tile_taps(p, sigma, taps); });
  const Reach reach = reach_of_tiles(p, sigma);
  filter_rows<T, true>(shared, tile, reach.x, p.padding, taps, T(1), middle);
  const ColumnRun run;
  T weight[REACH + 1], out[RUN] = {};
  read_taps(taps, weight);
  filter_column<T, true>(middle, run, tile, reach.y, p.padding, weight, T(1), out);
  write_column(shared + GRAD_AT, run, tile, out);
  T by_sigma[RUN] = {};
  if (!reach.is_identity()) {
    filter_rows<T, true>(shared, tile, reach.x, p.padding, taps + SLOPES_AT, T(0), slope_middle);
    T slope[REACH + 1];
    read_taps(taps + SLOPES_AT, slope);
    filter_column<T, true>(middle, run, tile, reach.y, p.padding, slope, T(0), by_sigma);
    filter_column<T, true>(slope_middle, run, tile, reach.y, p.padding, weight, T(1), by_sigma);
  }
  write_column(shared + DERIVATIVE_AT, run, tile, by_sigma);
  __syncthreads();
}

// Derivatives of what was summed up by the parameters themselves.
template <class T>
__device__ __forceinline__ void scale_sums(const Program& p, const Step& step, int64_t sample, T (&sums)[SUMS]) {
  const T level = static_cast<const T*>(p.params)[sample * WARP_PARAMS];
  sums[0] *= step.adjoint == Reader::rotate ? T(6.283185307179586) : static_cast<T>(p.sigma_max) * sign_of(level);
  sums[1] *= static_cast<T>(p.noise_std);
  sums[2] *= static_cast<T>(p.sharpness) * T(p.W);
  sums[3] *= static_cast<T>(p.sharpness) * T(p.H);
}

// A gradient step that is nothing but the adjoint of a blur: a thread's run of a column needs no other.
template <class T, bool mixed>
__device__ __forceinline__ void run_blur_gradient(const Program& p, const Step& step, const Tile& tile, T* shared) {
  PK_SHARED(T, taps, TAPS);
  const Array target = plane_of<T, mixed>(p, tile, step.target, step.is_target_image);
  const bool nothing = is_void<T>(p, tile.sample);
  const T sigma = sigma_of_sample<T>(p, tile.sample);
  if (p.first > 0) pk::wait_for_previous();
  if (nothing) {
    if (step.target) fill_with_nan<T, mixed>(target, tile);
    return;  // nor are there sums
  }
  load_raw<T, mixed>(plane_of<T, mixed>(p, tile, step.grad, step.is_grad_image), tile, p.radius_y, p.radius_x, WarpBlurPadding::zeros,
                     shared, [&] { make_tile_taps(p, sigma, taps); });
  const Reach reach = reach_of_tiles(p, sigma);
  const bool slopes = step.values && !reach.is_identity();
  T weight[REACH + 1], slope[REACH + 1];
  read_taps(taps, weight);
  read_taps(taps + SLOPES_AT, slope);
  filter_rows_twice(shared, tile, weight, slope, reach.x, p.padding, shared + MIDDLE_AT, slopes ? shared + SLOPE_MIDDLE_AT : nullptr);
  const ColumnRun run;
  T sums[SUMS] = {}, out[RUN] = {}, by_sigma[RUN] = {};
  filter_column_twice(shared, run, tile, weight, slope, reach.y, p.padding, slopes, out, by_sigma);
  // on the middle line of an odd side the last mirror image is the pixel itself
  const int x = tile.x(run.t, run.column), rows = tile.h - run.row - ((run.t & 2) != 0 && 2 * (tile.y0 + tile.h) > tile.H ? 1 : 0);
  if (run.column < tile.w && !((run.t & 1) != 0 && x == tile.x0 + run.column)) {
    const Array source = plane_of<T, mixed>(p, tile, step.source, step.is_source_image);
    const int first = tile.at(x, tile.y(run.t, run.row)), stride = run.t & 2 ? -tile.W : tile.W;
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      if (slopes && i < rows && by_sigma[i] != 0) sums[0] = fused(by_sigma[i], load<T, mixed>(source, first + i * stride), sums[0]);
    }
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      if (step.target && i < rows) store<T, mixed>(target, first + i * stride, out[i]);
    }
  }
  if (!step.values) return;
  scale_sums(p, step, tile.sample, sums);
  write_block_sums(sums, step.sums, step.behind, p.partial + static_cast<int64_t>(blockIdx.x) * COLUMNS);
}

// By the tile's values before the stage behind: their gradients at GRAD_AT; what times the value adds up to the gradient by that stage's parameter
// at DERIVATIVE_AT. Either is read by the thread that wrote it, or behind a barrier.
template <class T, bool mixed>
__device__ __forceinline__ void adjoint_tile(const Program& p, const Step& step, Reader reader, const Tile& tile, T* shared) {
  const Array grad = plane_of<T, mixed>(p, tile, step.grad, step.is_grad_image);
  if (reader == Reader::blur) return adjoint_blur_tile<T, mixed>(p, tile, grad, shared);
  Turn<T> turn;
  Taps<T> taps;
  if (reader == Reader::rotate) turn = turn_of_sample<T>(p, tile.sample);
  if (reader == Reader::rotate && turn.on) return adjoint_rotate_tile<T, mixed>(tile, turn, grad, shared);
  if (reader == Reader::blur_x) taps = taps_of_sample<T>(p, tile.sample, 0, p.radius_x);
  if (reader == Reader::blur_y) taps = taps_of_sample<T>(p, tile.sample, p.radius_y, 0);
  if (reader == Reader::none || reader == Reader::rotate || taps.is_identity()) {
    for_orbits(tile, [&](const Orbit& orbit) {
      T g[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) g[t] = load<T, mixed>(grad, tile.at(orbit.x(t), orbit.y(t)));
#pragma unroll
      for (int t = 0; t < 4; ++t) shared[GRAD_AT + orbit.at(t)] = g[t], shared[DERIVATIVE_AT + orbit.at(t)] = 0;
    });
    return;
  }
  const bool along_x = reader == Reader::blur_x;
  const int reach = along_x ? taps.reach_x : taps.reach_y;
  for_orbits(tile, [&](const Orbit& orbit) {
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
      T derivative;
      const Line line = line_through(tile, orbit.x(t), orbit.y(t), along_x);
      shared[GRAD_AT + orbit.at(t)] = gathered_blur<T, mixed>(grad, line, taps, reach, p.padding, derivative);
      shared[DERIVATIVE_AT + orbit.at(t)] = derivative;
    }
  });
}

template <class T, bool mixed, Work work>
__device__ __forceinline__ void run_gradient(const Program& p, const Step& step, const Tile& tile, T* shared) {
  const bool nothing = is_void<T>(p, tile.sample);
  if (p.first > 0) pk::wait_for_previous();
  if (nothing) {
    if (step.target) fill_with_nan<T, mixed>(plane_of<T, mixed>(p, tile, step.target, step.is_target_image), tile);
    return;  // nor are there sums
  }
  adjoint_tile<T, mixed>(p, step, gradient_adjoint<work>(step), tile, shared);
  const T* const noise = step.values ? shared + NOISE_AT : nullptr;
  if (step.values) read_tile<T, mixed>(p, step, gradient_reader<work>(step), tile, shared);
  const Local<T> local = local_of_sample<T>(p, step, tile.sample);
  PK_SHARED(T, masks, 3 * MASKS);
  if (step.values && local.on(WarpStage::noise)) make_noise(p, tile, shared + NOISE_AT);
  const Mask<T> mask{masks};
  if (local.on(WarpStage::crop)) make_mask(p, tile, masks);
  __syncthreads();
  const Array target = plane_of<T, mixed>(p, tile, step.target, step.is_target_image);
  T sums[SUMS] = {};
  for_orbits(tile, [&](const Orbit& orbit) {
    T before[MOST_LOCAL][4], v[4], g[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) v[t] = step.values ? shared[VALUE_AT + orbit.at(t)] : T(0);
#pragma unroll
    for (int i = 0; i < MOST_LOCAL; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) before[i][t] = v[t];
      if (step.values && i < stages_of<work>(step, true)) apply(stage_at<work>(step, i), local, mask, orbit, noise, v);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      g[t] = shared[GRAD_AT + orbit.at(t)];
      const T derivative = shared[DERIVATIVE_AT + orbit.at(t)];  // none where the stage is off, whatever the value
      if (orbit.owns(t) && derivative != 0) sums[0] = fused(v[t], derivative, sums[0]);
    }
#pragma unroll
    for (int i = MOST_LOCAL - 1; i >= 0; --i)
      if (i < stages_of<work>(step, true)) apply_adjoint(stage_at<work>(step, i), local, mask, orbit, noise, before[i], g, sums);
    if (step.target) store_orbit<T, mixed>(target, tile, orbit, g);
  });
  if (!step.values) return;
  scale_sums(p, step, tile.sample, sums);
  write_block_sums(sums, step.sums, step.behind, p.partial + static_cast<int64_t>(blockIdx.x) * COLUMNS);
}

// The gradients by a sample's parameters, from the sums of its blocks, a warp for each; `patches`: as many of sigma's sums stand by themselves.
template <class T>
__device__ __forceinline__ void add_up(const Program& p, int64_t sample, int64_t patches) {
  const int column = threadIdx.x / 32;
  if (column >= WARP_PARAMS) return;
  const int64_t blocks = p.C * p.tiles_y * p.tiles_x;
  const double* const partial = p.partial + sample * blocks * COLUMNS;
  double sum = 0;
  if (is_void<T>(p, sample)) {
    sum = is_used(p, sample, column) ? double(NAN) : 0.0;
  } else if (column == 0 && patches > 0) {
    sum = column_sum(p.patch_partial + sample * patches, patches, 1, 0);
  } else {
    if ((p.columns >> column & 1u) != 0) sum = column_sum(partial, blocks, COLUMNS, column);
    if (column == 0 && (p.columns >> SECOND_BLUR & 1u) != 0) sum += column_sum(partial, blocks, COLUMNS, SECOND_BLUR);
  }
  if (threadIdx.x % 32 == 0) static_cast<T*>(p.grad_params)[sample * WARP_PARAMS + column] = static_cast<T>(sum);
}

// resources: spills at most 128 bytes (chains in any order, whose bound gives 128 registers)
// resources: dynamic shared 68352 bytes
template <class T, bool mixed, Work work>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8       ? 1
                                           : work == Work::turn ? 4
                                                                : 2) warp_backward_kernel(const Program p) {
  PK_DYNAMIC_SHARED(T, dynamic);
  T* const shared = dynamic - GRAD_AT;
  const Tile tile = tile_of_block(p);
  const int64_t blocks = p.C * p.tiles_y * p.tiles_x;
  if (p.followed) pk::let_next_begin();
  if (p.clear && tile.channel == 0 && tile.x0 == 0 && tile.y0 == 0 && threadIdx.x == 0) p.arrivals[tile.sample] = 0;
  if constexpr (work == Work::any) {
    for (int i = p.first; i < p.last; ++i) {
      if (p.step[i].gradient) {
        run_gradient<T, mixed, work>(p, p.step[i], tile, shared);
      } else {
        run_pass<T, mixed, work>(p, p.step[i], tile, shared);
      }
      __syncthreads();
    }
  }
  if constexpr (work == Work::turn || work == Work::chain) run_gradient<T, mixed, Work::turn>(p, p.step[p.first], tile, shared);
  if constexpr (work == Work::chain) {
    __syncthreads();
    run_blur_gradient<T, mixed>(p, p.step[p.last - 1], tile, shared);
  }
  if (p.finish && arrives_last(p.arrivals + tile.sample, blocks)) add_up<T>(p, tile.sample, 0);
}

// resources: dynamic shared 37312 bytes
template <class T, bool mixed>
__global__ void __launch_bounds__(THREADS, 4) warp_backward_blur_kernel(const Program p) {
  PK_DYNAMIC_SHARED(T, shared);
  const Patch patch = patch_of_block(p);
  const int64_t blocks = patches_of_sample(p);
  run_patch<T, mixed>(p, p.step[p.last - 1], patch, shared);
  if (p.finish && arrives_last(p.arrivals + patch.sample, blocks)) add_up<T>(p, patch.sample, blocks);
}

// ------------------------------------------------------------------------------------------------------------------------ launch

// The steps of a backward program; without a workspace `pieces` counts. Returns their number.
template <class T>
int backward_steps(const WarpBackward& p, Pieces& pieces, Program& program) {
  cut_into_patches(program);
  Pass passes[MOST_PASSES];
  const int count = passes_of(p, passes);
  const bool values = p.grad_params != nullptr;
  // the last pass without its reading stage: nothing to do if nothing is left of it
  const int top = passes[count - 1].stages > 0 || passes[count - 1].reader == Reader::none ? count - 1 : count - 2;
  int steps = 0;
  const void* sources[MOST_PASSES] = {p.images};
  for (int i = 0; values && i < top; ++i) {
    Step& step = program.step[steps++] = step_of(passes[i]);
    step.source = sources[i];
    step.is_source_image = i == 0;
    sources[i + 1] = step.target = pieces.take<T>(elements_of(p));
  }
  const bool reads_images = passes[0].reader != Reader::none;
  const int gradients = top + 1 + (reads_images ? 1 : 0);
  void* const between[2] = {gradients > 1 ? pieces.take<T>(elements_of(p)) : nullptr,
                            gradients > 2 ? pieces.take<T>(elements_of(p)) : nullptr};
  for (int i = 0; i < gradients; ++i) {
    const int pass = top - i;  // -1: before the first
    Step& step = program.step[steps++];
    step = pass >= 0 ? step_of(passes[pass]) : Step{};
    step.gradient = true;
    step.values = values;
    step.adjoint = pass + 1 < count ? passes[pass + 1].reader : Reader::none;
    step.behind = column_of(step.adjoint);
    step.sums = sums_of(step);
    program.columns |= (step.sums & ~1u) | (step.behind < 0 ? 0 : 1u << step.behind);
    step.source = pass >= 0 ? sources[pass] : p.images;
    step.is_source_image = pass <= 0;
    step.grad = i == 0 ? p.grad : between[(i - 1) % 2];
    step.is_grad_image = i == 0;
    step.target = i == gradients - 1 ? p.grad_images : between[i % 2];
    step.is_target_image = i == gradients - 1;
  }
  program.partial = pieces.take<double>(values ? p.B * blocks_of_sample(program) * COLUMNS : 0);
  program.patch_partial = pieces.take<double>(values ? p.B * patches_of_sample(program) : 0);
  program.arrivals = pieces.take<unsigned>(values ? p.B : 0);
  program.grad_params = p.grad_params;
  return steps;
}

template <class T, bool mixed>
int launch_backward(const WarpBackward& p, void* workspace, void* stream) {
  Program program = program_of(p);
  Pieces pieces(workspace);
  const int steps = backward_steps<T>(p, pieces, program);
  const bool whole = program.tiles_y == 1 && program.tiles_x == 1;
  if (p.grad_params && (steps == 1 || (whole && blocks_of_sample(program) > 1))) {  // no launch before the last could do it
    const int status = pk::memset_async(program.arrivals, 0, sizeof(unsigned) * static_cast<std::size_t>(p.B), stream);
    if (status != 0) return status;
  }
  return launch_steps(program, steps, [&](const Program& part) {
    auto* kernel = warp_backward_kernel<T, mixed, Work::any>;
    if constexpr (sizeof(T) == 4) {
      const Work work = work_of(part, true);
      if (work == Work::blur)
        return launch_part(warp_backward_blur_kernel<T, mixed>, part, patches_of_sample(part), PATCH_ELEMENTS * sizeof(T), stream);
      if (work == Work::turn) kernel = warp_backward_kernel<T, mixed, Work::turn>;
      if (work == Work::chain) kernel = warp_backward_kernel<T, mixed, Work::chain>;
    }
    return launch_part(kernel, part, blocks_of_sample(part), shared_bytes(part, true, sizeof(T)), stream);
  });
}

}  // namespace

namespace protokernels {

int64_t warp_backward_workspace(const WarpBackward& p) {
  Program program = program_of(p);
  Pieces pieces(nullptr);
  p.double_compute ? backward_steps<double>(p, pieces, program) : backward_steps<float>(p, pieces, program);
  return pieces.bytes();
}

int launch_warp_backward(const WarpBackward& p, void* workspace, void* stream) {
  switch (p.kind) {
    case Kind::f32: return launch_backward<float, false>(p, workspace, stream);
    case Kind::f64: return launch_backward<double, false>(p, workspace, stream);
    default: return launch_backward<float, true>(p, workspace, stream);
  }
}

}  // namespace protokernels
