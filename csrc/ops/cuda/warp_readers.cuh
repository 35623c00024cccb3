// SPDX-License-Identifier: MIT
// Values of single pixels straight from memory: rotation, and blur along one axis with any radius and its adjoint as a gather.
#pragma once

#include "ops/cuda/warp_turn.cuh"

namespace {

// ---------------------------------------------------------------------------------------------------------------------- rotation

// Bilinear, every tap outside is 0.
template <class T, bool mixed>
__device__ __forceinline__ T rotated(const Array& source, const Tile& tile, const Turn<T>& turn, int x, int y) {
  const T dx = T(x) - turn.center_x, dy = T(y) - turn.center_y;
  const T sx = turn.source_x(dx, turn.row_x(dy)), sy = turn.source_y(dx, turn.row_y(dy)), low_x = floored(sx), low_y = floored(sy),
          ax = sx - low_x, ay = sy - low_y;
  const int x0 = static_cast<int>(low_x), y0 = static_cast<int>(low_y);
  const bool left = x0 >= 0 && x0 < tile.W, right = x0 >= -1 && x0 < tile.W - 1;
  const bool top = y0 >= 0 && y0 < tile.H, bottom = y0 >= -1 && y0 < tile.H - 1;
  const int at = tile.at(x0, y0);
  const T q00 = top && left ? load<T, mixed>(source, at) : T(0), q01 = top && right ? load<T, mixed>(source, at + 1) : T(0);
  const T q10 = bottom && left ? load<T, mixed>(source, at + tile.W) : T(0);
  const T q11 = bottom && right ? load<T, mixed>(source, at + tile.W + 1) : T(0);
  return (1 - ay) * ((1 - ax) * q00 + ax * q01) + ay * ((1 - ax) * q10 + ax * q11);
}

// --------------------------------------------------------------------------------------------------------------- blur of one axis

// A line of the image through a pixel: n elements, stride apart, element 0 at `first`.
struct Line {
  int first, stride, n, place;  // place: of the pixel
};

__device__ __forceinline__ Line line_through(const Tile& tile, int x, int y, bool along_x) {
  if (along_x) return {tile.at(0, y), 1, tile.W, x};
  return {tile.at(x, 0), tile.W, tile.H, y};
}

template <class T, bool mixed>
__device__ __forceinline__ T blurred(const Array& source, const Line& line, const T* weight, int reach, WarpBlurPadding padding) {
  T sum = 0;
  for (int k = -reach; k <= reach; ++k) {
    const int place = padded_place(line.place + k, line.n, padding);
    if (place >= 0) sum = fused(weight[k < 0 ? -k : k], load<T, mixed>(source, line.first + place * line.stride), sum);
  }
  return sum;
}

// The adjoint filter at one position of the padded axis, with the weights and with their slopes.
template <class T, bool mixed>
__device__ __forceinline__ void add_position(const Array& grad, const Line& line, const Taps<T>& taps, int reach, int position, T& sum,
                                             T& by_sigma) {
  for (int place = max(0, position - reach); place <= min(line.n - 1, position + reach); ++place) {
    const int k = place < position ? position - place : place - position;
    const T g = load<T, mixed>(grad, line.first + place * line.stride);
    sum = fused(taps.weight[k], g, sum);
    by_sigma = fused(taps.slope[k], g, by_sigma);
  }
}

// Every position within reach of the axis at which the padding shows the pixel: first, first + step, ... .
template <class T, bool mixed>
__device__ __forceinline__ void add_positions(const Array& grad, const Line& line, const Taps<T>& taps, int reach, int position, int step,
                                              T& sum, T& by_sigma) {
  const int below = (position + reach) / step;  // steps down that stay within
  for (int at = position - below * step; at <= line.n - 1 + reach; at += step)
    add_position<T, mixed>(grad, line, taps, reach, at, sum, by_sigma);
}

template <class T, bool mixed>
__device__ __forceinline__ T gathered_blur(const Array& grad, const Line& line, const Taps<T>& taps, int reach, WarpBlurPadding padding,
                                           T& by_sigma) {
  T sum = 0;
  by_sigma = 0;
  const int last = line.n - 1, x = line.place;
  if (padding == WarpBlurPadding::zeros) {
    add_position<T, mixed>(grad, line, taps, reach, x, sum, by_sigma);
  } else if (padding == WarpBlurPadding::reflect && last > 0) {
    add_positions<T, mixed>(grad, line, taps, reach, x, 2 * last, sum, by_sigma);
    if (x > 0 && x < last) add_positions<T, mixed>(grad, line, taps, reach, 2 * last - x, 2 * last, sum, by_sigma);
  } else {
    const int from = x == 0 ? -reach : x, to = x == last ? last + reach : x;
    for (int at = from; at <= to; ++at) add_position<T, mixed>(grad, line, taps, reach, at, sum, by_sigma);
  }
  return sum;
}

}  // namespace
