// SPDX-License-Identifier: MIT
// Values of single pixels straight from memory: rotation, blur along one axis with any radius, and their adjoints as gathers.
#pragma once

#include "ops/cuda/warp_tile.cuh"

namespace {

// ---------------------------------------------------------------------------------------------------------------------- rotation

template <class T>
struct Turn {
  T cosine, sine, center_x, center_y;
  bool on;

  // Of the output pixel (dx, dy) from the centre.
  __device__ __forceinline__ T source_x(T dx, T dy) const { return fused(cosine, dx, -(sine * dy)) + center_x; }
  __device__ __forceinline__ T source_y(T dx, T dy) const { return fused(sine, dx, cosine * dy) + center_y; }
};

template <class T>
__device__ __forceinline__ Turn<T> turn_of_sample(const Program& p, int64_t sample) {
  Turn<T> turn;
  turn.on = (p.enabled[sample] >> static_cast<int>(WarpStage::rotate) & 1) != 0;
  const T turns = static_cast<const T*>(p.params)[sample * WARP_PARAMS + WARP_COLUMN[static_cast<int>(WarpStage::rotate)]];
  sine_cosine_pi(2 * (turns - rounded(turns)), turn.sine, turn.cosine);
  turn.center_x = T(p.W - 1) / 2, turn.center_y = T(p.H - 1) / 2;
  return turn;
}

// Bilinear, every tap outside is 0.
template <class T, bool mixed>
__device__ __forceinline__ T rotated(const Array& source, const Tile& tile, const Turn<T>& turn, int x, int y) {
  if (!turn.on) return load<T, mixed>(source, tile.at(x, y));
  const T dx = T(x) - turn.center_x, dy = T(y) - turn.center_y;
  const T sx = turn.source_x(dx, dy), sy = turn.source_y(dx, dy), low_x = floored(sx), low_y = floored(sy), ax = sx - low_x,
          ay = sy - low_y;
  const int x0 = static_cast<int>(low_x), y0 = static_cast<int>(low_y);
  const bool left = x0 >= 0 && x0 < tile.W, right = x0 >= -1 && x0 < tile.W - 1;
  const bool top = y0 >= 0 && y0 < tile.H, bottom = y0 >= -1 && y0 < tile.H - 1;
  const int at = tile.at(x0, y0);
  const T q00 = top && left ? load<T, mixed>(source, at) : T(0), q01 = top && right ? load<T, mixed>(source, at + 1) : T(0);
  const T q10 = bottom && left ? load<T, mixed>(source, at + tile.W) : T(0);
  const T q11 = bottom && right ? load<T, mixed>(source, at + tile.W + 1) : T(0);
  return (1 - ay) * ((1 - ax) * q00 + ax * q01) + ay * ((1 - ax) * q10 + ax * q11);
}

// value, negated where `sign` is below 0. A difference that is 0 is +0.
__device__ __forceinline__ float with_sign_of(float sign, float value) {
  return __uint_as_float(__float_as_uint(value) ^ (__float_as_uint(sign) & 0x80000000u));
}
__device__ __forceinline__ double with_sign_of(double sign, double value) { return sign < 0 ? -value : value; }

// x + i step, i = -1, 0 or 1.
template <class T>
__device__ __forceinline__ T plus(T x, T step, int i) {
  return i < 0 ? x - step : i > 0 ? x + step : x;
}

// The gradient by pixel (x, y) before the rotation, and the derivative of its part of the sum by the angle in radians.
//
// The outputs that read a pixel lie, turned back, in a square of side 2 about it, whose corners are at most sqrt 2 away along an axis: among the 3 x 3
// around the rounded place. An output at t = source - pixel has the weight (1 - |t_x|) (1 - |t_y|); t = -1 has no weight but a derivative. t of the
// nine is exact at quarter turns, where it decides.
template <class T, bool mixed>
__device__ __forceinline__ T gathered_rotation(const Array& grad, const Tile& tile, const Turn<T>& turn, int x, int y, T& by_angle) {
  by_angle = 0;
  if (!turn.on) return load<T, mixed>(grad, tile.at(x, y));
  const T px = T(x), py = T(y), dx = px - turn.center_x, dy = py - turn.center_y;
  const int near_x = static_cast<int>(rounded(turn.cosine * dx + turn.sine * dy + turn.center_x));
  const int near_y = static_cast<int>(rounded(turn.cosine * dy - turn.sine * dx + turn.center_y));
  const T from_x = T(near_x) - turn.center_x, from_y = T(near_y) - turn.center_y;
  const T base_x = turn.source_x(from_x, from_y) - px, base_y = turn.source_y(from_x, from_y) - py;
  T sum = 0, derivative = 0;
#pragma unroll
  for (int j = -1; j <= 1; ++j) {
    const int oy = near_y + j;
    const bool row_inside = static_cast<unsigned>(oy) < static_cast<unsigned>(tile.H);
    const T row_x = plus(base_x, -turn.sine, j), row_y = plus(base_y, turn.cosine, j);
#pragma unroll
    for (int i = -1; i <= 1; ++i) {
      const int ox = near_x + i;
      const T tx = plus(row_x, turn.cosine, i), ty = plus(row_y, turn.sine, i);
      const bool inside = row_inside && static_cast<unsigned>(ox) < static_cast<unsigned>(tile.W);
      const T g = inside && tx >= -1 && tx < 1 && ty >= -1 && ty < 1 ? load<T, mixed>(grad, tile.at(ox, oy)) : T(0);
      const T minus_x = magnitude(tx) - 1, along_x = g * (1 - magnitude(ty));
      sum = fused(along_x, -minus_x, sum);
      // the source moves by (-(s_y - c_y), s_x - c_x)
      derivative = fused(with_sign_of(tx, along_x), ty + dy, derivative);
      derivative = fused(with_sign_of(ty, g * minus_x), tx + dx, derivative);
    }
  }
  by_angle = derivative;
  return sum;
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
