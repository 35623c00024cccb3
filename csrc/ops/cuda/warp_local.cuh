// SPDX-License-Identifier: MIT
// The stages that a pixel and its mirror images do alone: noise, crop and flips, forward and backward, in registers of one thread.
#pragma once

#include "ops/cuda/warp_tile.cuh"

namespace {

// What such stages need to know of a sample.
template <class T>
struct Local {
  int enabled;  // of the step's
  T noise, hflip, vflip;

  __device__ __forceinline__ bool on(WarpStage stage) const { return (enabled >> static_cast<int>(stage) & 1) != 0; }
};

// Whether a column of params belongs to a stage that is on for the sample.
__device__ __forceinline__ bool is_used(const Program& p, int64_t sample, int column) {
  const int stage = column < 3 ? column : column - 1;  // the crop has two
  return (p.stages & static_cast<unsigned>(p.on(sample)) & 1u << stage) != 0;
}

// Whether one of these is not finite: then the sample is NaN, output and gradients. By whole warps.
template <class T>
__device__ __forceinline__ bool is_void(const Program& p, int64_t sample) {
  const int column = min(static_cast<int>(threadIdx.x % 32), WARP_PARAMS - 1);
  const T level = static_cast<const T*>(p.params)[sample * WARP_PARAMS + column];  // does not wait for what is on
  return __any_sync(ALL, is_used(p, sample, column) && !is_finite(level)) != 0;
}

template <class T>
__device__ __forceinline__ Local<T> local_of_sample(const Program& p, const Step& step, int64_t sample) {
  const T* const params = static_cast<const T*>(p.params) + sample * WARP_PARAMS;
  return {p.on(sample) & step.local, static_cast<T>(p.noise_std) * params[1], params[4], params[5]};
}

// A pixel (column, row) of the tile with its mirror images; on the middle line of an odd side an image is the pixel itself.
struct Orbit {
  int column, row, near_x, near_y, far_x, far_y;

  __device__ __forceinline__ Orbit(const Tile& tile, int column_, int row_)
      : column(column_),
        row(row_),
        near_x(tile.x(0, column_)),
        near_y(tile.y(0, row_)),
        far_x(tile.x(1, column_)),
        far_y(tile.y(2, row_)) {}
  __device__ __forceinline__ int x(int t) const { return t & 1 ? far_x : near_x; }
  __device__ __forceinline__ int y(int t) const { return t & 2 ? far_y : near_y; }
  // The pixel itself, not its double.
  __device__ __forceinline__ bool owns(int t) const { return !((t & 1) != 0 && far_x == near_x) && !((t & 2) != 0 && far_y == near_y); }
  __device__ __forceinline__ int at(int t) const { return (t * TILE_H + row) * VALUE_W + column; }
};

// Calls visit(orbit) for the thread's pixels of the tile.
template <class Visit>
__device__ __forceinline__ void for_orbits(const Tile& tile, const Visit& visit) {
  const int lanes = tile.lanes(), column = threadIdx.x & (lanes - 1),
            rows_at_once = lanes == TILE_W ? THREADS / TILE_W : 2 * THREADS / TILE_W;
  if (column >= tile.w) return;
#pragma unroll 1
  for (int row = lanes == TILE_W ? threadIdx.x / TILE_W : threadIdx.x / (TILE_W / 2); row < tile.h; row += rows_at_once)
    visit(Orbit(tile, column, row));
}

// The normal numbers of the tile. Four threads make a row of a mirror image, the four numbers of a Philox block at a time, of which some may lie
// beside the tile. The caller's barrier ends it.
template <class T>
__device__ __forceinline__ void make_noise(const Program& p, const Tile& tile, T* noise) {
  static_assert(THREADS == 4 * 4 * TILE_H);
  const int line = threadIdx.x / 4, t = line / TILE_H, row = line % TILE_H;
  if (row < tile.h) {
    const auto key = p.seed ? static_cast<unsigned long long>(p.seed[tile.sample]) : 0ull;
    const int x = t & 1 ? tile.W - tile.x0 - tile.w : tile.x0;  // the row's first pixel, from the left
    const auto start = static_cast<unsigned long long>((tile.channel * tile.H + tile.y(t, row)) * tile.W + x);  // in the sample
    const int before = static_cast<int>(start % 4);
    T* const target = noise + line * VALUE_W;
    const bool mirrored = (t & 1) != 0, whole = before == 0 && tile.w % 4 == 0;  // all four are in the tile
#pragma unroll 1
    for (int group = threadIdx.x % 4; 4 * group - before < tile.w; group += 4) {
      T n[4];
      normal_numbers(key, start / 4 + group, n);
      if (whole) {
        const T four[4] = {mirrored ? n[3] : n[0], mirrored ? n[2] : n[1], mirrored ? n[1] : n[2], mirrored ? n[0] : n[3]};
        write_row(target + (mirrored ? tile.w - 4 - 4 * group : 4 * group), four);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int place = 4 * group - before + i;
          if (static_cast<unsigned>(place) < static_cast<unsigned>(tile.w)) target[mirrored ? tile.w - 1 - place : place] = n[i];
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ T sign_of(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : T(0);
}

// The crop's mask on the tile: m is the smaller one of a function of the column and one of the row, the sigmoid being monotone.
constexpr int MASK_ROWS = 2 * TILE_W, MASKS = MASK_ROWS + 2 * TILE_H;

template <class T>
struct Mask {
  const T* table;  // [3, MASKS]; columns of both mirror images, then rows

  __device__ __forceinline__ T inside(int at) const { return table[at]; }             // distance from the window's edge times the sharpness
  __device__ __forceinline__ T value(int at) const { return table[MASKS + at]; }      // sigmoid of it
  __device__ __forceinline__ T slope(int at) const { return table[2 * MASKS + at]; }  // m (1 - m), with the sign of the way from the centre

  // Which side decides: x at ties.
  __device__ __forceinline__ int at(const Orbit& orbit, int t, bool& along_x) const {
    const int x = (t & 1) * TILE_W + orbit.column, y = MASK_ROWS + (t & 2) / 2 * TILE_H + orbit.row;
    along_x = !(inside(y) < inside(x));
    return along_x ? x : y;
  }
};

// By the block's last warps; the caller's barrier ends it.
template <class T>
__device__ __forceinline__ void make_mask(const Program& p, const Tile& tile, T* table) {
  const int i = THREADS - 1 - threadIdx.x;
  if (i < MASKS) {
    const bool along_x = i < MASK_ROWS;
    const int place = along_x ? tile.x(i / TILE_W, i % TILE_W) : tile.y((i - MASK_ROWS) / TILE_H * 2, (i - MASK_ROWS) % TILE_H);
    const T center = static_cast<const T*>(p.params)[tile.sample * WARP_PARAMS + (along_x ? 2 : 3)];
    const T distance = T(place) + T(0.5) - center * T(along_x ? p.W : p.H);
    const T here = static_cast<T>(p.sharpness) * (static_cast<T>(along_x ? p.half_x : p.half_y) - magnitude(distance));
    const T e = exponential(-magnitude(here)), share = T(1) / (1 + e);
    table[i] = here;
    table[MASKS + i] = here >= 0 ? share : e * share;
    table[2 * MASKS + i] = e * share * share * sign_of(distance);
  }
}

template <class T>
__device__ __forceinline__ void mix(T weight, T& a, T& b) {
  const T mixed = (1 - weight) * a + weight * b;
  b = (1 - weight) * b + weight * a;
  a = mixed;
}

// The values of an orbit after a stage. Pairs along x are (0, 1) and (2, 3), along y (0, 2) and (1, 3).
template <class T>
__device__ __forceinline__ void apply(WarpStage stage, const Local<T>& local, const Mask<T>& mask, const Orbit& orbit, const T* noise,
                                      T (&v)[4]) {
  if (!local.on(stage)) return;
  switch (stage) {
    case WarpStage::noise:
#pragma unroll
      for (int t = 0; t < 4; ++t) v[t] = fused(local.noise, noise[orbit.at(t)], v[t]);
      break;
    case WarpStage::crop:
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        bool along_x;
        v[t] *= mask.value(mask.at(orbit, t, along_x));
      }
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
__device__ __forceinline__ void apply_adjoint(WarpStage stage, const Local<T>& local, const Mask<T>& mask, const Orbit& orbit,
                                              const T* noise, const T (&v)[4], T (&g)[4], T (&sums)[SUMS]) {
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
        bool along_x;
        const int at = mask.at(orbit, t, along_x);
        const T by_center = orbit.owns(t) ? g[t] * v[t] * mask.slope(at) : T(0);
        sums[2] += along_x ? by_center : T(0);
        sums[3] += along_x ? T(0) : by_center;
        g[t] *= mask.value(at);
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

}  // namespace
