// SPDX-License-Identifier: MIT
// What all stages of a warp work on: planes with a margin, rows of images of any kind, sums over pixels, and the parameters of one sample.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu_level.h"
#include "common/pieces.h"
#include "common/rows.h"
#include "ops/warp.h"

namespace {

using namespace protokernels;

constexpr int64_t MARGIN = 2;  // zero pixels around a plane that is sampled: both taps of a coordinate at -2 or at size are zero

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class T>
constexpr Kind KIND = sizeof(T) == 8 ? Kind::f64 : Kind::f32;

// A row of T as it is: whole vectors, of which the last two overlap.
template <class T>
PK_INLINE void copy_row(const T* in, T* out, int64_t W) {
  if (W < LANES<T>) return void(std::memcpy(out, in, static_cast<size_t>(W) * sizeof(T)));
  const Vec<T> last = load(in + W - LANES<T>);
  for (int64_t i = 0; i + LANES<T> < W; i += LANES<T>) store(out + i, load(in + i));
  store(out + W - LANES<T>, last);
}

// Rows of W elements at base[start + y stride]. Kernels see them as rows of T that may be read up to a whole vector: in place where that is safe, else
// through a buffer.
struct Rows {
  void* base;
  Kind kind;
  int64_t start, stride, W;
  bool has_margin;  // whole vectors may be read beyond a row, but not written

  template <class T>
  const T* read(int64_t y, T* buffer) const {
    const int64_t at = start + y * stride;
    if (kind == KIND<T> && (has_margin || W % LANES<T> == 0)) return static_cast<const T*>(base) + at;
    copy(y, buffer);
    return buffer;
  }
  template <class T>
  void copy(int64_t y, T* out) const {
    if (kind == KIND<T>) return copy_row(static_cast<const T*>(base) + start + y * stride, out, W);
    read_row(base, kind, start + y * stride, out, W);
  }
  // Where a kernel puts whole vectors; then done.
  template <class T>
  T* place(int64_t y, T* buffer) const {
    return kind == KIND<T> && W % LANES<T> == 0 ? static_cast<T*>(base) + start + y * stride : buffer;
  }
  template <class T>
  void done(int64_t y, const T* placed, const T* buffer) const {
    if (placed == buffer) write(y, buffer);
  }
  template <class T>
  void write(int64_t y, const T* in) const {
    if (kind == KIND<T>) return copy_row(in, static_cast<T*>(base) + start + y * stride, W);
    write_row(base, kind, start + y * stride, in, W);
  }
};

// Rows of plane number `plane` of a tensor [B, C, H, W].
inline Rows rows_of(const void* tensor, Kind kind, int64_t plane, int64_t H, int64_t W) {
  return {const_cast<void*>(tensor), kind, plane * H * W, W, W, false};
}

// H x W pixels with MARGIN more on every side, of which one row's right and the next row's left are the same. Whole vectors may be read beyond a
// row; rows are written to their last pixel and no further.
template <class T>
struct Plane {
  T* origin = nullptr;
  int64_t stride = 0, H = 0, W = 0;

  Plane() = default;
  Plane(Arena& arena, int64_t height, int64_t width) : stride(round_up(width + 2 * MARGIN, LANES<T>)), H(height), W(width) {
    T* const memory = arena.take<T>(elements());
    origin = memory ? memory + LANES<T> + MARGIN * stride : nullptr;
  }
  int64_t elements() const { return (H + 2 * MARGIN) * stride + 2 * LANES<T>; }
  T* row(int64_t y) const { return origin + y * stride; }
  Rows rows() const { return {origin, KIND<T>, 0, stride, W, true}; }
  void clear() const { std::fill_n(origin - LANES<T> - MARGIN * stride, elements(), T(0)); }
  void clear_margin() const {
    std::fill_n(origin - LANES<T> - MARGIN * stride, LANES<T> + MARGIN * stride, T(0));
    for (int64_t y = 0; y < H; ++y) std::fill(row(y) + W, row(y + 1), T(0));
    std::fill_n(row(H), MARGIN * stride + LANES<T>, T(0));
  }
};

// A row with room for whole vectors on both sides.
template <class T>
T* take_row(Arena& arena, int64_t W, int64_t margin = LANES<T>) {
  margin = round_up(margin, LANES<T>);
  T* const memory = arena.take<T>(round_up(W, LANES<T>) + 2 * margin);
  return memory ? memory + margin : nullptr;
}

// ---------------------------------------------------------------------------------------------------------- sums over pixels

// Lanes from `count` on become zero, whatever they hold.
template <class T>
PK_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  return lane_numbers<T>() < static_cast<decltype(lane_numbers<T>()[0] + 0)>(count) ? v : Vec<T>{};
}

// A row adds up in T, vector by vector, and goes into float64; the lanes of all rows meet at the end.
template <class T>
struct Sum {
  Vec<double> low{}, high{};

  void add(Vec<T> v) {
    if constexpr (sizeof(T) == 8) {
      low += v;
    } else {
      T parts[LANES<T>];
      store(parts, v);
      low += load_double(parts), high += load_double(parts + LANES<T> / 2);
    }
  }
  void add(Vec<T> v, double factor) {
    if constexpr (sizeof(T) == 8) {
      low += v * factor;
    } else {
      T parts[LANES<T>];
      store(parts, v);
      low += load_double(parts) * factor, high += load_double(parts + LANES<T> / 2) * factor;
    }
  }
  double total() const { return reduce_sum(low + high); }
};

constexpr int64_t SUM_BLOCK = 512;  // pixels of a row that add up in T

// function(i, values) gives N vectors of terms for the pixels at i; take(sums) gets their sums over a part of [first, last) at a time. Lanes from last on
// do not count.
template <class T, int N, class Function, class Take>
PK_INLINE void sum_over_row(int64_t first, int64_t last, const Function& function, const Take& take) {
  for (int64_t begin = first; begin < last; begin += SUM_BLOCK) {
    Vec<T> sums[N]{};
    const int64_t end = std::min(last, begin + SUM_BLOCK);
    for (int64_t i = begin; i < end;
         i += LANES<T>) {  // one loop for the last vector too: a second copy of the function would not be inlined
      Vec<T> values[N];
      function(i, values);
      if (i + LANES<T> > end)
        for (Vec<T>& value : values) value = first_lanes<T>(value, end - i);
      for (int n = 0; n < N; ++n) sums[n] += values[n];
    }
    take(sums);
  }
}

// ---------------------------------------------------------------------------------------------------------- one sample

// Stages that belong to one pass over a plane: a blur, a rotation, or any others in a row, which stay within a row and its mirror.
struct Pass {
  enum class Kind { blur, points, rotate } kind;
  int count;
  WarpStage stages[WARP_STAGES];
};

struct Passes {
  int count = 0;
  Pass pass[WARP_STAGES];

  void add(WarpStage stage) {
    const Pass::Kind kind = stage == WarpStage::blur     ? Pass::Kind::blur
                            : stage == WarpStage::rotate ? Pass::Kind::rotate
                                                         : Pass::Kind::points;
    if (count == 0 || kind != Pass::Kind::points || pass[count - 1].kind != kind) pass[count++] = {kind, 0, {}};
    Pass& last = pass[count - 1];
    last.stages[last.count++] = stage;
  }
};

// The passes of sample b and its parameters. A sample is void if a parameter of a stage that is on is not finite.
struct Sample {
  Passes passes;
  double param[WARP_PARAMS];
  double sigma;
  bool is_void = false;
  uint32_t used = 0;  // bit k: column k of params belongs to a stage that is on

  Sample(const WarpProblem& p, int64_t b) {
    for (int k = 0; k < WARP_PARAMS; ++k) {
      const int64_t at = b * WARP_PARAMS + k;
      param[k] = p.double_compute ? static_cast<const double*>(p.params)[at] : static_cast<const float*>(p.params)[at];
    }
    sigma = std::abs(p.double_compute ? p.sigma_max * param[0] : static_cast<float>(p.sigma_max) * static_cast<float>(param[0]));
    for (int k = 0; k < p.stages; ++k) {
      const WarpStage stage = p.order[k];
      if (!(p.enabled[b] >> static_cast<int>(stage) & 1)) continue;
      const int column = WARP_COLUMN[static_cast<int>(stage)], columns = stage == WarpStage::crop ? 2 : 1;
      for (int c = column; c < column + columns; ++c) used |= 1u << c, is_void |= !std::isfinite(param[c]);
      if (stage == WarpStage::blur && (!(sigma >= WARP_LEAST_SIGMA) || (p.radius_y == 0 && p.radius_x == 0))) continue;
      passes.add(stage);
    }
  }
};

}  // namespace
