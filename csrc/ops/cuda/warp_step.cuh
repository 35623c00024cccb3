// SPDX-License-Identifier: MIT
// One step of a program, by a block on its tile: a pass, for the forward and the backward kernel.
#pragma once

#include "ops/cuda/warp_local.cuh"
#include "ops/cuda/warp_readers.cuh"

namespace {

// Intermediate results are T in every case; images are of the program's kind.
__device__ __forceinline__ Array array_of(const Program& p, const void* data, bool is_image) {
  return {const_cast<void*>(data), is_image ? p.kind : Kind::f32};
}

// The values of the blur by tiles, at VALUE_AT. Ends with a barrier.
template <class T, bool mixed>
__device__ __forceinline__ void blur_tile(const Program& p, const Tile& tile, const Array& source, T* shared, T* middle) {
  const Taps<T> taps = taps_of_sample<T>(p, tile.sample, p.radius_y, p.radius_x);
  load_raw<T, mixed>(source, tile, taps.reach_y, taps.reach_x, p.padding, shared);
  filter_rows<T, false>(shared, tile, taps.reach_x, p.padding, taps.weight, T(1), middle);
  const ColumnRun run;
  T weight[REACH + 1], out[RUN] = {};
  read_taps(taps.weight, taps.reach_y, weight);
  filter_column<T, false>(middle, run, tile, taps.reach_y, p.padding, weight, T(1), out);
  write_column(shared + VALUE_AT, run, tile, out);
  __syncthreads();
}

// Where a pass takes a pixel's value from; made by the whole block.
template <class T, bool mixed>
struct Source {
  Reader reader;
  Array array;
  const T* values;  // blur: in shared memory
  Turn<T> turn;
  Taps<T> taps;
  WarpBlurPadding padding;

  __device__ __forceinline__ Source(const Program& p, const Step& step, const Tile& tile, T* shared, T* middle)
      : reader(step.reader), array(array_of(p, step.source, step.is_source_image)), values(shared + VALUE_AT), padding(p.padding) {
    switch (reader) {
      case Reader::blur: blur_tile<T, mixed>(p, tile, array, shared, middle); break;
      case Reader::rotate: turn = turn_of_sample<T>(p, tile.sample); break;
      case Reader::blur_x: taps = taps_of_sample<T>(p, tile.sample, 0, p.radius_x); break;
      case Reader::blur_y: taps = taps_of_sample<T>(p, tile.sample, p.radius_y, 0); break;
      default: break;
    }
  }

  // Of mirror image t.
  __device__ __forceinline__ T read(const Tile& tile, const Orbit& orbit, int t) const {
    const int x = orbit.x[t & 1], y = orbit.y[t / 2];
    if (reader == Reader::blur) return values[orbit.at(t)];
    if (reader == Reader::rotate) return rotated<T, mixed>(array, tile, turn, x, y);
    if (reader == Reader::none || taps.is_identity()) return load<T, mixed>(array, tile.at(x, y));
    const bool along_x = reader == Reader::blur_x;
    return blurred<T, mixed>(array, line_through(tile, x, y, along_x), taps.weight, along_x ? taps.reach_x : taps.reach_y, padding);
  }
};

template <class T, bool mixed>
__device__ __forceinline__ void store_orbit(const Array& target, const Tile& tile, const Orbit& orbit, const T (&v)[4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t)
    if (orbit.owns(t)) store<T, mixed>(target, tile.at(orbit.x[t & 1], orbit.y[t / 2]), v[t]);
}

template <class T, bool mixed>
__device__ __forceinline__ void run_pass(const Program& p, const Step& step, const Tile& tile, T* shared, T* middle) {
  const Local<T> local = local_of_sample<T>(p, tile.sample);
  const Source<T, mixed> source(p, step, tile, shared, middle);
  if (has_noise(step, local)) make_noise(p, tile, shared + NOISE_AT);
  const Array target = array_of(p, step.target, step.is_target_image);
  for_orbits(tile, [&](const Orbit& orbit) {
    T v[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) v[t] = source.read(tile, orbit, t);
    for (int i = 0; i < step.stages; ++i) apply(step.stage[i], local, orbit, shared + NOISE_AT, v);
    store_orbit<T, mixed>(target, tile, orbit, v);
  });
}

}  // namespace
