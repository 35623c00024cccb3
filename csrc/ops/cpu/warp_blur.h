// SPDX-License-Identifier: MIT
// The Gaussian blur of a plane, its adjoint and its derivative by sigma. Along y a row of the result is a weighted sum of rows of the plane, along x of
// one row at shifted positions, with its border written out beside it. The weights are symmetric: what lies equally far on both sides is added first,
// and one multiplication serves the two.
#pragma once

#include "ops/cpu/warp_rows.h"

namespace {

// A weight and its derivative by sigma for every distance, on both sides: value[k] = value[-k].
template <class T>
struct Taps {
  static constexpr int64_t MOST = WARP_MOST_RADIUS;
  T values[2 * MOST + 1], slopes[2 * MOST + 1];
  const T *value, *slope;
  int64_t reach;  // beyond it weights are too small to change a sum in T, and so are derivatives beside the largest of them

  void fill(int64_t radius, double sigma) {
    constexpr double least = sizeof(T) == 4 ? 1e-9 : 1e-19;
    double w[MOST + 1], slopes_wide[MOST + 1], sum = 1, moment = 0, steepest = 0;
    w[0] = 1;
    for (int64_t k = 1; k <= radius; ++k) {
      const double square = static_cast<double>(k * k);
      w[k] = std::exp(-square / (2 * sigma * sigma));
      sum += 2 * w[k], moment += 2 * w[k] * square;
    }
    moment /= sum, reach = 0;
    for (int64_t k = 0; k <= radius; ++k) {
      w[k] /= sum;
      slopes_wide[k] = w[k] * (static_cast<double>(k * k) - moment) / (sigma * sigma * sigma);
      steepest = std::max(steepest, std::abs(slopes_wide[k]));
    }
    for (int64_t k = 0; k <= radius; ++k) {
      if (w[k] > least || std::abs(slopes_wide[k]) > least * steepest) reach = k;
      values[MOST + k] = values[MOST - k] = flushed(w[k]);
      slopes[MOST + k] = slopes[MOST - k] = flushed(slopes_wide[k]);
    }
    value = values + MOST, slope = slopes + MOST;
  }
  // Tiny weights would make every product a denormal number, at a hundred times the cost on some machines.
  static T flushed(double x) { return std::abs(x) < 1e-37 && sizeof(T) == 4 ? T(0) : static_cast<T>(x); }
};

// The position that padding puts at i of an axis of n: -1 where it puts a zero.
inline int64_t padded_index(int64_t i, int64_t n, WarpBlurPadding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == WarpBlurPadding::zeros) return -1;
  if (padding == WarpBlurPadding::replicate) return i < 0 ? 0 : n - 1;
  const int64_t period = std::max<int64_t>(2 * (n - 1), 1);
  i %= period;
  if (i < 0) i += period;
  return i < n ? i : period - i;
}

// What the taps weigh: [k] is the row that tap k multiplies.
template <class T>
struct Shifts {
  const T* row;
  const T* operator[](int64_t k) const { return row + k; }
};

template <class T>
struct Lines {
  const T* const* rows;
  const T* operator[](int64_t k) const { return rows[k]; }
};

template <class T, int N, bool SLOPE, class Source, class Finish>
PK_INLINE void filter_block(const Source& source, const Taps<T>& taps, int64_t at, const Finish& finish) {
  Vec<T> sum[N], slope[N];
  const T* const middle = source[0] + at;
  const Vec<T> value_0 = broadcast(taps.value[0]), slope_0 = SLOPE ? broadcast(taps.slope[0]) : Vec<T>{};
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const Vec<T> x = load(middle + n * LANES<T>);
    sum[n] = value_0 * x;
    if constexpr (SLOPE) slope[n] = slope_0 * x;
  }
#pragma GCC unroll 1
  for (int64_t k = 1; k <= taps.reach; ++k) {
    const T *const before = source[-k] + at, *const after = source[k] + at;
    const Vec<T> value_k = broadcast(taps.value[k]), slope_k = SLOPE ? broadcast(taps.slope[k]) : Vec<T>{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec<T> both = load(before + n * LANES<T>) + load(after + n * LANES<T>);
      sum[n] += value_k * both;
      if constexpr (SLOPE) slope[n] += slope_k * both;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) finish(at + n * LANES<T>, sum[n], slope[n]);
}

// finish(at, sum value x, sum slope x) for the vectors from first on that cover [first, last).
template <class T, bool SLOPE, class Source, class Finish>
PK_INLINE void filter(const Source& source, const Taps<T>& taps, int64_t first, int64_t last, const Finish& finish) {
  int64_t at = first;
  for (; at + 3 * LANES<T> < last; at += 4 * LANES<T>) filter_block<T, 4, SLOPE>(source, taps, at, finish);
  for (; at + LANES<T> < last; at += 2 * LANES<T>) filter_block<T, 2, SLOPE>(source, taps, at, finish);
  if (at < last) filter_block<T, 1, SLOPE>(source, taps, at, finish);
}

// Memory of a blur for one plane at a time, and the taps of the last sigma.
template <class T>
struct BlurRoom {
  T *extended, *sums[2];           // a row with its border; results with theirs
  T *gradient, *gradient_slope;    // a row between zeros; another
  T* zeros;                        // a row of them
  const T** lines;                 // the rows under the taps
  T *border_value, *border_slope;  // weights of the rows that a border row of the adjoint receives from
  int64_t *place_y, *place_x;      // what padding puts at -radius .. size + radius - 1
  double sigma = -1;
  Taps<T> along_y, along_x;

  BlurRoom(const WarpProblem& p, Arena& arena)
      : extended(take_row<T>(arena, p.W, p.radius_x + LANES<T>)),
        sums{take_row<T>(arena, p.W, p.radius_x + 2 * LANES<T>), take_row<T>(arena, p.W, p.radius_x + 2 * LANES<T>)},
        gradient(take_row<T>(arena, p.W, 2 * p.radius_x + 2 * LANES<T>)),
        gradient_slope(take_row<T>(arena, p.W)),
        zeros(take_row<T>(arena, p.W)),
        lines(arena.take<const T*>(2 * p.radius_y + 1)),
        border_value(arena.take<T>(2 * p.radius_y + 2)),
        border_slope(arena.take<T>(2 * p.radius_y + 2)),
        place_y(places(p, arena, p.H, p.radius_y)),
        place_x(places(p, arena, p.W, p.radius_x)) {
    if (arena.counts_only()) return;
    std::fill_n(zeros, round_up(p.W, LANES<T>), T(0));
    std::fill(gradient - 2 * p.radius_x - 2 * LANES<T>, gradient, T(0));
    lines += p.radius_y;
  }

  static int64_t* places(const WarpProblem& p, Arena& arena, int64_t size, int64_t radius) {
    int64_t* const memory = arena.take<int64_t>(size + 2 * radius);
    for (int64_t i = -radius; memory && i < size + radius; ++i) memory[radius + i] = padded_index(i, size, p.padding);
    return memory ? memory + radius : nullptr;
  }
};

template <class T>
struct Blur {
  const WarpProblem& p;
  BlurRoom<T>& room;
  const Taps<T>&along_y, &along_x;

  Blur(const WarpProblem& problem, BlurRoom<T>& blur_room, double sigma)
      : p(problem), room(blur_room), along_y(room.along_y), along_x(p.radius_x == p.radius_y ? room.along_y : room.along_x) {
    if (room.sigma == sigma) return;
    room.sigma = sigma;
    room.along_y.fill(p.radius_y, sigma);
    if (p.radius_x != p.radius_y) room.along_x.fill(p.radius_x, sigma);
  }

  // Row y with its border. Best made some time before it is used: what reads across two writes waits until both have left the core.
  Shifts<T> extended(const Rows& in, int64_t y) const {
    T* const row = room.extended;
    in.copy(y, row);
    for (int64_t i = 1; i <= along_x.reach; ++i) {
      const int64_t before = room.place_x[-i], after = room.place_x[p.W - 1 + i];
      row[-i] = before < 0 ? T(0) : row[before];
      row[p.W - 1 + i] = after < 0 ? T(0) : row[after];
    }
    return {row};
  }

  // across: for the rows blurred along x. Each is used while it is in the first-level cache.
  void forward(const Rows& in, const Plane<T>& across, const Rows& out) const {
    int64_t ready = 0;
    Shifts<T> next = extended(in, 0);
    for (int64_t y = 0; y < p.H; ++y) {
      for (; ready < std::min(p.H, y + along_y.reach + 1); ++ready) {
        T* const row = across.row(ready);
        filter<T, false>(next, along_x, 0, p.W, [&](int64_t at, Vec<T> sum, Vec<T>) { store(row + at, sum); });
        if (ready + 1 < p.H) next = extended(in, ready + 1);
      }
      for (int64_t k = -along_y.reach; k <= along_y.reach; ++k) {
        const int64_t from = room.place_y[y + k];
        room.lines[k] = from < 0 ? room.zeros : across.row(from);
      }
      T* const row = out.place(y, room.sums[0]);
      filter<T, false>(Lines<T>{room.lines}, along_y, 0, p.W, [&](int64_t at, Vec<T> sum, Vec<T>) { store(row + at, sum); });
      out.done(y, row, room.sums[0]);
    }
  }

  // The adjoint along y for row y of the input, and with SLOPE the one of the filter's derivative.
  template <bool SLOPE>
  void adjoint_column(const Plane<T>& grad, int64_t y) const {
    const int64_t R = along_y.reach;
    const auto keep = [&](int64_t at, Vec<T> sum, Vec<T> slope) {
      store(room.gradient + at, sum);
      if constexpr (SLOPE) store(room.gradient_slope + at, slope);
    };
    if (y > R && y < p.H - R - 1) {
      for (int64_t k = -R; k <= R; ++k) room.lines[k] = grad.row(y + k);
      return filter<T, SLOPE>(Lines<T>{room.lines}, along_y, 0, p.W, keep);
    }
    // Near a border: output s has read y at every position e within R of it that padding maps to y.
    const int64_t near = std::min(p.H, 2 * R + 2), first = y <= R ? 0 : p.H - near;
    std::fill_n(room.border_value, near, T(0)), std::fill_n(room.border_slope, near, T(0));
    const auto add_position = [&](int64_t e) {
      for (int64_t s = std::max(first, e - R); s <= std::min(first + near - 1, e + R); ++s) {
        room.border_value[s - first] += along_y.value[s - e];
        room.border_slope[s - first] += along_y.slope[s - e];
      }
    };
    add_position(y);
    for (int64_t i = 1; i <= R; ++i) {
      if (room.place_y[-i] == y) add_position(-i);
      if (room.place_y[p.H - 1 + i] == y) add_position(p.H - 1 + i);
    }
    for (int64_t at = 0; at < p.W; at += LANES<T>) {
      Vec<T> sum{}, slope{};
      for (int64_t s = 0; s < near; ++s) {
        const Vec<T> x = load(grad.row(first + s) + at);
        sum += room.border_value[s] * x;
        if constexpr (SLOPE) slope += room.border_slope[s] * x;
      }
      keep(at, sum, slope);
    }
  }

  // The adjoint along x of room.gradient: what the border received goes back to where it came from.
  void adjoint_row(T* out) const {
    const int64_t R = along_x.reach;
    std::fill_n(room.gradient + p.W, 2 * R + LANES<T>, T(0));
    filter<T, false>(Shifts<T>{room.gradient}, along_x, -round_up(R, LANES<T>), p.W + R,
                     [&](int64_t at, Vec<T> sum, Vec<T>) { store(out + at, sum); });
    for (int64_t i = 1; i <= R; ++i) {
      const int64_t before = room.place_x[-i], after = room.place_x[p.W - 1 + i];
      if (before >= 0) out[before] += out[-i];
      if (after >= 0) out[after] += out[p.W - 1 + i];
    }
  }

  // sum G (K'_y K_x + K_y K'_x) X of a row of the input, after adjoint_column<true>.
  void row_sum(const Shifts<T>& row, Sum<T>& sum_of_plane) const {
    for (int64_t begin = 0; begin < p.W; begin += SUM_BLOCK) {
      Vec<T> total{};
      const int64_t end = std::min(p.W, begin + SUM_BLOCK);
      filter<T, true>(row, along_x, begin, end, [&](int64_t at, Vec<T> sum, Vec<T> slope) {
        const Vec<T> term = load(room.gradient + at) * slope + load(room.gradient_slope + at) * sum;
        total += at + LANES<T> <= p.W ? term : first_lanes<T>(term, p.W - at);
      });
      sum_of_plane.add(total);
    }
  }

  // grad_in: by the input, or null. grad_sigma: is added to, or null; needs the input.
  void backward(const Plane<T>& grad, const Rows& in, const Rows* grad_in, Sum<T>* grad_sigma) const {
    for (int64_t y = 0; y < p.H; ++y) {
      if (grad_sigma) {
        const Shifts<T> row = extended(in, y);
        adjoint_column<true>(grad, y);
        row_sum(row, *grad_sigma);
      } else {
        adjoint_column<false>(grad, y);
      }
      if (!grad_in) continue;
      if (y > 0) grad_in->write(y - 1, room.sums[(y - 1) % 2]);
      adjoint_row(room.sums[y % 2]);
    }
    if (grad_in) grad_in->write(p.H - 1, room.sums[(p.H - 1) % 2]);
  }
};

}  // namespace
