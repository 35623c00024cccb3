// SPDX-License-Identifier: MIT
// One step of a program, by a block on its tile: a pass, for the forward and the backward kernel.
#pragma once

#include "ops/cuda/warp_local.cuh"
#include "ops/cuda/warp_readers.cuh"

namespace {

// The tile's plane. Intermediate results are T in every case; images are of the program's kind.
template <class T, bool mixed>
__device__ __forceinline__ Array plane_of(const Program& p, const Tile& tile, const void* data, bool is_image) {
  return Array{const_cast<void*>(data), is_image ? p.kind : Kind::f32}.from<T, mixed>(tile.first);
}

// The values of the blur by tiles, at VALUE_AT; the caller's barrier ends it.
template <class T, bool mixed>
__device__ __forceinline__ void blur_tile(const Program& p, const Tile& tile, const Array& source, T* shared) {
  PK_SHARED(T, taps, TAPS);
  const T sigma = sigma_of_sample<T>(p, tile.sample);
  load_raw<T, mixed>(source, tile, p.radius_y, p.radius_x, p.padding, shared, [&] { make_tile_taps(p, sigma, taps); });
  const Reach reach = reach_of_tiles(p, sigma);
  filter_rows<T, false>(shared, tile, reach.x, p.padding, taps, T(1), shared + MIDDLE_AT);
  const ColumnRun run;
  T weight[REACH + 1], out[RUN] = {};
  read_taps(taps, weight);
  filter_column<T, false>(shared + MIDDLE_AT, run, tile, reach.y, p.padding, weight, T(1), out);
  write_column(shared + VALUE_AT, run, tile, out);
}

// The values of the tile after the reading stage of a pass, at VALUE_AT: they are read behind a barrier. Nothing is left at NOISE_AT.
template <class T, bool mixed>
__device__ __forceinline__ void read_tile(const Program& p, const Step& step, Reader reader, const Tile& tile, T* shared) {
  const Array source = plane_of<T, mixed>(p, tile, step.source, step.is_source_image);
  if (reader == Reader::blur) return blur_tile<T, mixed>(p, tile, source, shared);
  Turn<T> turn;
  Taps<T> taps;
  if (reader == Reader::rotate) turn = turn_of_sample<T>(p, tile.sample);
  if constexpr (sizeof(T) == 4) {  // boxes of float64 would not fit everywhere
    if (reader == Reader::rotate && turn.on) {
      rotate_tile<T, mixed>(tile, turn, source, shared, [&](const Orbit& orbit, const T(&v)[4]) {
#pragma unroll
        for (int t = 0; t < 4; ++t) shared[VALUE_AT + orbit.at(t)] = v[t];
      });
      return __syncthreads();  // what comes next may lie where the boxes are
    }
  }
  if (reader == Reader::blur_x) taps = taps_of_sample<T>(p, tile.sample, 0, p.radius_x);
  if (reader == Reader::blur_y) taps = taps_of_sample<T>(p, tile.sample, p.radius_y, 0);
  if (reader == Reader::none || (reader == Reader::rotate && !turn.on) || (reader != Reader::rotate && taps.is_identity())) {
    for_orbits(tile, [&](const Orbit& orbit) {
      T v[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) v[t] = load<T, mixed>(source, tile.at(orbit.x(t), orbit.y(t)));
#pragma unroll
      for (int t = 0; t < 4; ++t) shared[VALUE_AT + orbit.at(t)] = v[t];
    });
    return;
  }
  const bool along_x = reader == Reader::blur_x;
  for_orbits(tile, [&](const Orbit& orbit) {
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
      const int x = orbit.x(t), y = orbit.y(t);
      shared[VALUE_AT + orbit.at(t)] = reader == Reader::rotate ? rotated<T, mixed>(source, tile, turn, x, y)
                                                                : blurred<T, mixed>(source, line_through(tile, x, y, along_x), taps.weight,
                                                                                    along_x ? taps.reach_x : taps.reach_y, p.padding);
    }
  });
}

template <class T, bool mixed>
__device__ __forceinline__ void store_orbit(const Array& target, const Tile& tile, const Orbit& orbit, const T (&v)[4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
    if (orbit.owns(t)) store<T, mixed>(target, tile.at(orbit.x(t), orbit.y(t)), v[t]);
}

template <class T, bool mixed>
__device__ __forceinline__ void fill_with_nan(const Array& target, const Tile& tile) {
  for_orbits(tile, [&](const Orbit& orbit) {
    const T nothing[4] = {T(NAN), T(NAN), T(NAN), T(NAN)};
    store_orbit<T, mixed>(target, tile, orbit, nothing);
  });
}

// A pass that is nothing but a rotation.
template <class T, bool mixed>
__device__ __forceinline__ void run_turn(const Program& p, const Step& step, const Tile& tile, T* shared) {
  const Array source = plane_of<T, mixed>(p, tile, step.source, step.is_source_image),
              target = plane_of<T, mixed>(p, tile, step.target, step.is_target_image);
  const bool nothing = is_void<T>(p, tile.sample);
  const Turn<T> turn = turn_of_sample<T>(p, tile.sample);
  if (p.first > 0) pk::wait_for_previous();
  if (nothing) return fill_with_nan<T, mixed>(target, tile);
  const auto take = [&](const Orbit& orbit, const T(&v)[4]) { store_orbit<T, mixed>(target, tile, orbit, v); };
  if (turn.on) return rotate_tile<T, mixed>(tile, turn, source, shared, take);
  for_orbits(tile, [&](const Orbit& orbit) {
    T v[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) v[t] = load<T, mixed>(source, tile.at(orbit.x(t), orbit.y(t)));
    take(orbit, v);
  });
}

template <class T, bool mixed, Work work>
__device__ __forceinline__ void run_pass(const Program& p, const Step& step, const Tile& tile, T* shared) {
  const Array target = plane_of<T, mixed>(p, tile, step.target, step.is_target_image);
  const bool nothing = is_void<T>(p, tile.sample);
  const Local<T> local = local_of_sample<T>(p, step, tile.sample);
  if (p.first > 0) pk::wait_for_previous();
  if (nothing) return fill_with_nan<T, mixed>(target, tile);
  PK_SHARED(T, masks, 3 * MASKS);
  read_tile<T, mixed>(p, step, pass_reader<work>(step), tile, shared);
  if (local.on(WarpStage::noise)) make_noise(p, tile, shared + NOISE_AT);
  const Mask<T> mask{masks};
  if (local.on(WarpStage::crop)) make_mask(p, tile, masks);
  __syncthreads();
  for_orbits(tile, [&](const Orbit& orbit) {
    T v[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) v[t] = shared[VALUE_AT + orbit.at(t)];
#pragma unroll(work == Work::any ? 1 : MOST_LOCAL)
    for (int i = 0; i < stages_of<work>(step, false); ++i) apply(stage_at<work>(step, i), local, mask, orbit, shared + NOISE_AT, v);
    store_orbit<T, mixed>(target, tile, orbit, v);
  });
}

}  // namespace
