// SPDX-License-Identifier: MIT
// The adjoint of the blur by itself, and sigma's derivative. Nothing mixes mirror images here, so that a block takes one larger patch: of 64 x 32 outputs
// 44 lines are filtered along x, where four rectangles of 32 x 16 (warp_tile.cuh) take 112 for as many outputs.
//
// A patch lies in one quarter of the plane and is addressed from that quarter's corner: the filter is symmetric, and paddings fold back at the near edges only.
#pragma once

#include "ops/cuda/warp_step.cuh"

namespace {

constexpr int PATCH_W = 64, PATCH_H = 32;
constexpr int PATCH_RAW_W = PATCH_W + 2 * REACH, PATCH_RAW_H = PATCH_H + 2 * REACH;
constexpr int PATCH_MIDDLE_W = PATCH_W + 4;  // four runs of two lines each lie in different banks, here and in raw
constexpr int PATCH_MIDDLE_AT = PATCH_RAW_H * PATCH_RAW_W, PATCH_SLOPE_AT = PATCH_MIDDLE_AT + PATCH_RAW_H * PATCH_MIDDLE_W,
              PATCH_ELEMENTS = PATCH_SLOPE_AT + PATCH_RAW_H * PATCH_MIDDLE_W;
static_assert(THREADS == PATCH_W * PATCH_H / RUN && PATCH_RAW_W % 32 == 12 && PATCH_MIDDLE_W % 32 == 4 && PATCH_RAW_H % 2 == 0);

struct Patch {
  int64_t sample, first;  // first element of the plane in [B, C, H, W]
  int x0, y0, w, h;       // in the quarter
  int W, H;
  bool far_x, far_y;

  __device__ __forceinline__ int x(int column) const { return far_x ? W - 1 - x0 - column : x0 + column; }
  __device__ __forceinline__ int y(int row) const { return far_y ? H - 1 - y0 - row : y0 + row; }
  __device__ __forceinline__ int lines() const { return (h + RUN - 1) / RUN * RUN + 2 * REACH; }
};

// Of an axis of n: patches of a half, and their side, as even as whole runs allow.
inline int patches_of(int n, int most) { return ((n + 1) / 2 + most - 1) / most; }
inline int patch_side(int n, int most) {
  const int count = patches_of(n, most);
  return (((n + 1) / 2 + count - 1) / count + RUN - 1) / RUN * RUN;
}

inline void cut_into_patches(Program& p) {
  const int along_x = patches_of(p.W, PATCH_W), along_y = patches_of(p.H, PATCH_H);
  p.patches = divider(int64_t{along_x} * along_y), p.patch_columns = divider(along_x);
  p.patch_w = patch_side(p.W, PATCH_W), p.patch_h = patch_side(p.H, PATCH_H);
}

__host__ __device__ __forceinline__ int64_t patches_of_sample(const Program& p) { return 4 * p.C * p.patches.divisor; }

__device__ __forceinline__ Patch patch_of_block(const Program& p) {
  const unsigned quarter = blockIdx.x % 4, rest = blockIdx.x / 4, plane = p.patches.quotient(rest),
                 place = rest - plane * p.patches.divisor;
  const unsigned patch_row = p.patch_columns.quotient(place), patch_column = place - patch_row * p.patch_columns.divisor;
  Patch patch;
  patch.sample = p.channels.quotient(plane), patch.first = static_cast<int64_t>(plane) * p.H * p.W;
  patch.W = p.W, patch.H = p.H, patch.far_x = (quarter & 1) != 0, patch.far_y = (quarter & 2) != 0;
  patch.x0 = static_cast<int>(patch_column) * p.patch_w, patch.y0 = static_cast<int>(patch_row) * p.patch_h;
  // the middle line of an odd side belongs to the near half
  patch.w = max(0, min(p.patch_w, (patch.far_x ? p.W / 2 : (p.W + 1) / 2) - patch.x0));
  patch.h = max(0, min(p.patch_h, (patch.far_y ? p.H / 2 : (p.H + 1) / 2) - patch.y0));
  return patch;
}

// The patch and the pixels in reach around it, zeros beyond the plane. Ends with a barrier.
template <class T, bool mixed, class Meanwhile>
__device__ __forceinline__ void load_patch(const Array& source, const Patch& patch, int reach_y, int reach_x, T* raw,
                                           const Meanwhile& meanwhile) {
  constexpr int LINES_AT_ONCE = THREADS / PATCH_RAW_W, ROUNDS = (PATCH_RAW_H + LINES_AT_ONCE - 1) / LINES_AT_ONCE;
  const int column = threadIdx.x % PATCH_RAW_W, first = threadIdx.x / PATCH_RAW_W;
  if (threadIdx.x >= THREADS - 32) meanwhile();  // the warp with the fewest pixels
  if (first < LINES_AT_ONCE) {
    const int first_x = max(REACH - reach_x, REACH - patch.x0), first_y = max(REACH - reach_y, REACH - patch.y0);
    const unsigned columns = REACH + patch.w + reach_x - first_x, lines = REACH + patch.h + reach_y - first_y;
    const bool seen_x = static_cast<unsigned>(column - first_x) < columns;
    const int line_step = patch.far_y ? -patch.W : patch.W;
    int at = patch.y(first - REACH) * patch.W + patch.x(column - REACH);
    T* target = raw + first * PATCH_RAW_W + column;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int line = first + k * LINES_AT_ONCE;
      T v = 0;
      if (seen_x && static_cast<unsigned>(line - first_y) < lines) v = load<T, mixed>(source, at + k * LINES_AT_ONCE * line_step);
      if (line < PATCH_RAW_H) target[k * LINES_AT_ONCE * PATCH_RAW_W] = v;
    }
  }
  __syncthreads();
}

// The gradients by the pixels before the blur, and the block's part of sigma's derivative.
template <class T, bool mixed>
__device__ __forceinline__ void run_patch(const Program& p, const Step& step, const Patch& patch, T* shared) {
  PK_SHARED(T, taps, TAPS);
  const Array target = Array{step.target, step.is_target_image ? p.kind : Kind::f32}.from<T, mixed>(patch.first);
  const bool nothing = is_void<T>(p, patch.sample);
  const T sigma = sigma_of_sample<T>(p, patch.sample);
  const int column = threadIdx.x % PATCH_W, row = threadIdx.x / PATCH_W * RUN, rows = column < patch.w ? patch.h - row : 0;
  const int first = patch.y(row) * patch.W + patch.x(column), stride = patch.far_y ? -patch.W : patch.W;
  if (p.first > 0) pk::wait_for_previous();
  if (nothing) {
#pragma unroll
    for (int i = 0; i < RUN; ++i)
      if (step.target && i < rows) store<T, mixed>(target, first + i * stride, T(NAN));
    return;  // nor are there sums
  }
  const Array grad = Array{const_cast<void*>(step.grad), step.is_grad_image ? p.kind : Kind::f32}.from<T, mixed>(patch.first);
  load_patch<T, mixed>(grad, patch, p.radius_y, p.radius_x, shared, [&] { make_tile_taps(p, sigma, taps); });
  const Reach reach = reach_of_tiles(p, sigma);
  const bool slopes = step.values && !reach.is_identity();
  T value[RUN] = {};
  if (slopes) {
    const Array source = Array{const_cast<void*>(step.source), step.is_source_image ? p.kind : Kind::f32}.from<T, mixed>(patch.first);
#pragma unroll
    for (int i = 0; i < RUN; ++i)
      if (i < rows) value[i] = load<T, mixed>(source, first + i * stride);
  }
  T weight[REACH + 1], slope[REACH + 1], in[RUN + 2 * REACH];
  read_taps(taps, weight);
  read_taps(taps + SLOPES_AT, slope);
#pragma unroll 1
  for (int e = threadIdx.x; e < PATCH_RAW_H * (PATCH_W / RUN); e += THREADS) {
    const int run = (e & 3) + (e >> 1 & 4), line = (e >> 4) * 2 + (e >> 2 & 1);  // eight lanes: four runs of two lines
    if (run * RUN >= patch.w || line >= patch.lines()) continue;
    T out[RUN] = {}, slope_out[RUN] = {};
    read_row(shared + line * PATCH_RAW_W + run * RUN, in);
    filter_twice(in, weight, slope, reach.x, p.padding, patch.x0 == 0 && run == 0, out, slope_out);
    write_row(shared + PATCH_MIDDLE_AT + line * PATCH_MIDDLE_W + run * RUN, out);
    if (slopes) write_row(shared + PATCH_SLOPE_AT + line * PATCH_MIDDLE_W + run * RUN, slope_out);
  }
  __syncthreads();
  T sum = 0;
  if (rows > 0) {
    const int at = row * PATCH_MIDDLE_W + column;
    const bool at_edge = patch.y0 == 0 && row == 0;
    T out[RUN] = {}, by_sigma[RUN] = {};
    read_run(shared + PATCH_MIDDLE_AT + at, PATCH_MIDDLE_W, in);
    filter_twice(in, weight, slope, reach.y, p.padding, at_edge, out, by_sigma);
#pragma unroll
    for (int i = 0; i < RUN; ++i)
      if (step.target && i < rows) store<T, mixed>(target, first + i * stride, out[i]);
    if (slopes) {
      read_run(shared + PATCH_SLOPE_AT + at, PATCH_MIDDLE_W, in);
      if (reach.y == 0) {
#pragma unroll
        for (int i = 0; i < RUN; ++i) by_sigma[i] += in[REACH + i];
      } else {
        filter(in, weight, by_sigma);
        if (at_edge) fold(in, weight, p.padding, by_sigma);
      }
#pragma unroll
      for (int i = 0; i < RUN; ++i)
        if (i < rows && by_sigma[i] != 0) sum = fused(by_sigma[i], value[i], sum);
    }
  }
  if (!step.values) return;
  const T level = static_cast<const T*>(p.params)[patch.sample * WARP_PARAMS];
  const T sums[1] = {sum * static_cast<T>(p.sigma_max) * sign_of(level)};
  write_block_sums(sums, 1u, 0, p.patch_partial + blockIdx.x);
}

}  // namespace
