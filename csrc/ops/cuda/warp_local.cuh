// SPDX-License-Identifier: MIT
// The stages that a pixel and its mirror images do alone: noise, crop and flips, forward and backward, in registers of one thread.
#pragma once

#include "ops/cuda/warp_tile.cuh"

namespace {

// What such stages need to know of a sample.
template <class T>
struct Local {
  int enabled;
  T noise, crop_x, crop_y, half_x, half_y, sharpness, hflip, vflip;

  __device__ __forceinline__ bool on(WarpStage stage) const { return (enabled >> static_cast<int>(stage) & 1) != 0; }
};

// Whether a column of params belongs to a stage that is on for the sample.
__device__ __forceinline__ bool is_used(const Program& p, int64_t sample, int column) {
  const int stage = column < 3 ? column : column - 1;  // the crop has two
  return (p.stages & static_cast<unsigned>(p.enabled[sample]) & 1u << stage) != 0;
}

// Whether one of these is not finite: then the sample is NaN, output and gradients.
template <class T>
__device__ __forceinline__ bool is_void(const Program& p, int64_t sample) {
  bool found = false;
#pragma unroll
  for (int column = 0; column < WARP_PARAMS; ++column)
    found = found || (is_used(p, sample, column) && !is_finite(static_cast<const T*>(p.params)[sample * WARP_PARAMS + column]));
  return found;
}

template <class T>
__device__ __forceinline__ Local<T> local_of_sample(const Program& p, int64_t sample) {
  const T* const params = static_cast<const T*>(p.params) + sample * WARP_PARAMS;
  return {p.enabled[sample],
          static_cast<T>(p.noise_std) * params[1],
          params[2] * T(p.W),
          params[3] * T(p.H),
          static_cast<T>(p.half_x),
          static_cast<T>(p.half_y),
          static_cast<T>(p.sharpness),
          params[4],
          params[5]};
}

// A pixel (column, row) of the tile with its mirror images; on the middle line of an odd side an image is the pixel itself.
struct Orbit {
  int column, row, near_x, near_y, far_x, far_y;

  __device__ __forceinline__ Orbit(const Tile& tile, int column_, int row_)
      : column(column_), row(row_), near_x(tile.x(0, column_)), near_y(tile.y(0, row_)), far_x(tile.x(1, column_)), far_y(tile.y(2, row_)) {}
  __device__ __forceinline__ int x(int t) const { return t & 1 ? far_x : near_x; }
  __device__ __forceinline__ int y(int t) const { return t & 2 ? far_y : near_y; }
  // The pixel itself, not its double.
  __device__ __forceinline__ bool owns(int t) const { return !((t & 1) != 0 && far_x == near_x) && !((t & 2) != 0 && far_y == near_y); }
  __device__ __forceinline__ int at(int t) const { return (t * TILE_H + row) * VALUE_W + column; }
};

// Calls visit(orbit) for the thread's pixels of the tile. A warp has 8 x 4 pixels: turned, they still lie in few lines of memory.
template <class Visit>
__device__ __forceinline__ void for_orbits(const Tile& tile, const Visit& visit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int patch = warp; patch < TILE_W * TILE_H / 32; patch += THREADS / 32) {
    const int column = patch % (TILE_W / 8) * 8 + lane % 8, row = patch / (TILE_W / 8) * 4 + lane / 8;
    if (column < tile.w && row < tile.h) visit(Orbit(tile, column, row));
  }
}

// The normal numbers of the tile. A thread makes the four of one Philox block, of which some may lie beside the tile. Ends with a barrier.
template <class T>
__device__ __forceinline__ void make_noise(const Program& p, const Tile& tile, T* noise) {
  constexpr int GROUPS = TILE_W / 4 + 1;  // Philox blocks that a row of the tile touches
  const auto key = static_cast<unsigned long long>(p.seed[tile.sample]);
  for (int e = threadIdx.x; e < 4 * TILE_H * GROUPS; e += THREADS) {
    const int group = e % GROUPS, row = e / GROUPS % TILE_H, t = e / (GROUPS * TILE_H);
    if (row >= tile.h) continue;
    const int x = t & 1 ? tile.W - tile.x0 - tile.w : tile.x0;
    const int64_t start = (tile.channel * tile.H + tile.y(t, row)) * tile.W + x;  // in the sample
    const int64_t q = start / 4 + group;
    const int offset = static_cast<int>(4 * q - start);
    if (offset >= tile.w) continue;
    T n[4];
    normal_numbers(key, q, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = offset + i;
      if (place >= 0 && place < tile.w) noise[(t * TILE_H + row) * VALUE_W + (t & 1 ? tile.w - 1 - place : place)] = n[i];
    }
  }
  __syncthreads();
}

// The crop's mask m at a pixel, m (1 - m), and which side of the window is nearer: x at ties.
template <class T>
struct Mask {
  T value, slope, distance;
  bool along_x;

  __device__ __forceinline__ Mask(const Local<T>& local, int x, int y) {
    const T dx = T(x) + T(0.5) - local.crop_x, dy = T(y) + T(0.5) - local.crop_y;
    const T inside_x = local.sharpness * (local.half_x - magnitude(dx)), inside_y = local.sharpness * (local.half_y - magnitude(dy));
    along_x = !(inside_y < inside_x);
    distance = along_x ? dx : dy;
    const T inside = along_x ? inside_x : inside_y, e = exponential(-magnitude(inside)), share = T(1) / (1 + e);
    value = inside >= 0 ? share : e * share;
    slope = e * share * share;
  }
};

template <class T>
__device__ __forceinline__ T sign_of(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : T(0);
}

template <class T>
__device__ __forceinline__ void mix(T weight, T& a, T& b) {
  const T mixed = (1 - weight) * a + weight * b;
  b = (1 - weight) * b + weight * a;
  a = mixed;
}

// The values of an orbit after a stage. Pairs along x are (0, 1) and (2, 3), along y (0, 2) and (1, 3).
template <class T>
__device__ __forceinline__ void apply(WarpStage stage, const Local<T>& local, const Orbit& orbit, const T* noise, T (&v)[4]) {
  if (!local.on(stage)) return;
  switch (stage) {
    case WarpStage::noise:
#pragma unroll
      for (int t = 0; t < 4; ++t) v[t] = fused(local.noise, noise[orbit.at(t)], v[t]);
      break;
    case WarpStage::crop:
#pragma unroll
      for (int t = 0; t < 4; ++t) v[t] *= Mask<T>(local, orbit.x(t), orbit.y(t)).value;
      break;
    case WarpStage::hflip:
      mix(local.hflip, v[0], v[1]);
      mix(local.hflip, v[2], v[3]);
      break;
    case WarpStage::vflip:
      mix(local.vflip, v[0], v[2]);
      mix(local.vflip, v[1], v[3]);
      break;
    default: break;
  }
}

// The gradients by an orbit's values before a stage, in place; `v` are these values. Adds to the sums of the stage's parameters; without noise they
// are not wanted.
template <class T>
__device__ __forceinline__ void apply_adjoint(WarpStage stage, const Local<T>& local, const Orbit& orbit, const T* noise, const T (&v)[4],
                                              T (&g)[4], T (&sums)[SUMS]) {
  if (!local.on(stage)) return;
  switch (stage) {
    case WarpStage::noise:
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (noise && orbit.owns(t)) sums[1] = fused(g[t], noise[orbit.at(t)], sums[1]);
      break;
    case WarpStage::crop:
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const Mask<T> mask(local, orbit.x(t), orbit.y(t));
        const T by_center = g[t] * v[t] * mask.slope * sign_of(mask.distance);
        if (orbit.owns(t)) sums[2] += mask.along_x ? by_center : T(0), sums[3] += mask.along_x ? T(0) : by_center;
        g[t] *= mask.value;
      }
      break;
    case WarpStage::hflip:
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (orbit.owns(t)) sums[4] = fused(g[t], v[t ^ 1] - v[t], sums[4]);
      mix(local.hflip, g[0], g[1]);
      mix(local.hflip, g[2], g[3]);
      break;
    case WarpStage::vflip:
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (orbit.owns(t)) sums[5] = fused(g[t], v[t ^ 2] - v[t], sums[5]);
      mix(local.vflip, g[0], g[2]);
      mix(local.vflip, g[1], g[3]);
      break;
    default: break;
  }
}

// True if one of the step's stages is the noise and it is on: then noise must be made.
template <class T>
__device__ __forceinline__ bool has_noise(const Step& step, const Local<T>& local) {
  bool found = false;
  for (int i = 0; i < step.stages; ++i) found |= step.stage[i] == WarpStage::noise;
  return found && local.on(WarpStage::noise);
}

}  // namespace
