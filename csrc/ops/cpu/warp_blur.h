// SPDX-License-Identifier: MIT
// The Gaussian blur of a plane, its adjoint and its derivative by sigma. Both axes are sums of rows with weights: along y of rows of the plane,
// along x of one row at shifted positions, with its border written out beside it.
#pragma once

#include "ops/cpu/warp_rows.h"

namespace {

// A weight and its derivative by sigma for every distance.
template <class T>
struct Taps {
  T value[WARP_MOST_RADIUS + 1], slope[WARP_MOST_RADIUS + 1];

  void fill(int64_t radius, double sigma) {
    double w[WARP_MOST_RADIUS + 1], sum = 1, moment = 0;
    w[0] = 1;
    for (int64_t k = 1; k <= radius; ++k) {
      const double square = static_cast<double>(k * k);
      w[k] = std::exp(-square / (2 * sigma * sigma));
      sum += 2 * w[k], moment += 2 * w[k] * square;
    }
    moment /= sum;
    for (int64_t k = 0; k <= radius; ++k) {
      const double weight = w[k] / sum, derivative = weight * (static_cast<double>(k * k) - moment) / (sigma * sigma * sigma);
      value[k] = flushed(weight), slope[k] = flushed(derivative);
    }
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

// Rows with weights, whose sum is a row of the result.
template <class T>
struct RowList {
  const T** rows;
  T *value, *slope;
  int count;

  RowList(Arena& arena, int64_t most) : rows(arena.take<const T*>(most)), value(arena.take<T>(most)), slope(arena.take<T>(most)) {}
  void add(const T* row, T v, T s) { rows[count] = row, value[count] = v, slope[count] = s, ++count; }
};

template <class T, int N, bool SLOPE>
PK_INLINE void sum_rows_block(const RowList<T>& list, int64_t at, T* out, T* out_slope) {
  Vec<T> sum[N]{}, slope[N]{};
  for (int j = 0; j < list.count; ++j) {
    const T* const row = list.rows[j] + at;
    const Vec<T> v = broadcast(list.value[j]), s = SLOPE ? broadcast(list.slope[j]) : Vec<T>{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec<T> x = load(row + n * LANES<T>);
      sum[n] += v * x;
      if constexpr (SLOPE) slope[n] += s * x;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    store(out + at + n * LANES<T>, sum[n]);
    if constexpr (SLOPE) store(out_slope + at + n * LANES<T>, slope[n]);
  }
}

// out = sum value row over [0, W), and with a second place for it sum slope row; both are written up to a whole vector.
template <class T, bool SLOPE>
void sum_rows(const RowList<T>& list, int64_t W, T* out, T* out_slope = nullptr) {
  constexpr int most = SLOPE ? 4 : 8;
  int64_t at = 0;
  for (; at + (most - 1) * LANES<T> < W; at += most * LANES<T>) sum_rows_block<T, most, SLOPE>(list, at, out, out_slope);
  for (; at + 3 * LANES<T> < W; at += 4 * LANES<T>) sum_rows_block<T, 4, SLOPE>(list, at, out, out_slope);
  for (; at + LANES<T> < W; at += 2 * LANES<T>) sum_rows_block<T, 2, SLOPE>(list, at, out, out_slope);
  for (; at < W; at += LANES<T>) sum_rows_block<T, 1, SLOPE>(list, at, out, out_slope);
}

// Memory of a blur for one plane at a time, and the taps of the last sigma.
template <class T>
struct BlurRoom {
  T *extended, *sum, *slope;  // a row with its border; results
  T *gradient, *gradient_slope;
  RowList<T> list;
  T *border_value, *border_slope;  // of the rows that a border row of the adjoint takes
  int64_t *place_y, *place_x;      // what padding puts at -radius .. size + radius - 1
  double sigma = -1;
  Taps<T> along_y, along_x;

  BlurRoom(const WarpProblem& p, Arena& arena)
      : extended(take_row<T>(arena, p.W, 2 * p.radius_x + LANES<T>)),
        sum(take_row<T>(arena, p.W, 2 * p.radius_x + LANES<T>)),
        slope(take_row<T>(arena, p.W)),
        gradient(take_row<T>(arena, p.W, 3 * p.radius_x + LANES<T>)),
        gradient_slope(take_row<T>(arena, p.W)),
        list(arena, 4 * std::max(p.radius_y, p.radius_x) + 4),
        border_value(arena.take<T>(4 * p.radius_y + 4)),
        border_slope(arena.take<T>(4 * p.radius_y + 4)),
        place_y(places(p, arena, p.H, p.radius_y)),
        place_x(places(p, arena, p.W, p.radius_x)) {}

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
      : p(problem), room(blur_room), along_y(room.along_y), along_x(room.along_x) {
    if (room.sigma == sigma) return;
    room.sigma = sigma;
    room.along_y.fill(p.radius_y, sigma);
    p.radius_x == p.radius_y ? void(room.along_x = room.along_y) : room.along_x.fill(p.radius_x, sigma);
  }

  // Row y with its border, in room.extended.
  void extend(const Rows& in, int64_t y) const {
    T* const row = room.extended;
    in.copy(y, row);
    for (int64_t i = 1; i <= p.radius_x; ++i) {
      const int64_t before = room.place_x[-i], after = room.place_x[p.W - 1 + i];
      row[-i] = before < 0 ? T(0) : row[before];
      row[p.W - 1 + i] = after < 0 ? T(0) : row[after];
    }
  }

  // The taps as shifts of one row, the middle first: sums start with their largest term.
  void shifts_of(const T* row) const {
    room.list.count = 0;
    room.list.add(row, along_x.value[0], along_x.slope[0]);
    for (int64_t k = 1; k <= p.radius_x; ++k) {
      room.list.add(row - k, along_x.value[k], along_x.slope[k]);
      room.list.add(row + k, along_x.value[k], along_x.slope[k]);
    }
  }

  // across: for the rows blurred along x.
  void forward(const Rows& in, const Plane<T>& across, const Rows& out) const {
    for (int64_t y = 0; y < p.H; ++y) {
      extend(in, y);
      shifts_of(room.extended);
      sum_rows<T, false>(room.list, p.W, across.row(y));
    }
    for (int64_t y = 0; y < p.H; ++y) {
      room.list.count = 0;
      room.list.add(across.row(y), along_y.value[0], T(0));
      for (int64_t k = 1; k <= p.radius_y; ++k)
        for (const int64_t from : {room.place_y[y - k], room.place_y[y + k]})
          if (from >= 0) room.list.add(across.row(from), along_y.value[k], T(0));
      T* const row = out.place(y, room.sum);
      sum_rows<T, false>(room.list, p.W, row);
      out.done(y, row, room.sum);
    }
  }

  // The rows of the gradient that row y of the input receives from, with their weights.
  void list_adjoint(const Plane<T>& grad, int64_t y) const {
    const int64_t R = p.radius_y;
    room.list.count = 0;
    if (y >= R + 1 && y < p.H - R - 1) {
      room.list.add(grad.row(y), along_y.value[0], along_y.slope[0]);
      for (int64_t k = 1; k <= R; ++k) {
        room.list.add(grad.row(y - k), along_y.value[k], along_y.slope[k]);
        room.list.add(grad.row(y + k), along_y.value[k], along_y.slope[k]);
      }
      return;
    }
    // Near a border: output s has read y at every position e within R of it that padding maps to y.
    const int64_t near = std::min(p.H, 2 * R + 2), first = y <= R ? 0 : p.H - near;
    std::fill_n(room.border_value, near, T(0)), std::fill_n(room.border_slope, near, T(0));
    const auto add_position = [&](int64_t e) {
      for (int64_t s = std::max(first, e - R); s <= std::min(first + near - 1, e + R); ++s) {
        room.border_value[s - first] += along_y.value[std::abs(s - e)];
        room.border_slope[s - first] += along_y.slope[std::abs(s - e)];
      }
    };
    add_position(y);
    for (int64_t i = 1; i <= R; ++i) {
      if (room.place_y[-i] == y) add_position(-i);
      if (room.place_y[p.H - 1 + i] == y) add_position(p.H - 1 + i);
    }
    for (int64_t s = 0; s < near; ++s) room.list.add(grad.row(first + s), room.border_value[s], room.border_slope[s]);
  }

  // The adjoint along x of room.gradient, in room.sum: what the border received goes back to where it came from.
  void adjoint_row() const {
    const int64_t R = p.radius_x;
    T *const row = room.gradient, *const out = room.sum;
    std::fill(row - 2 * R, row, T(0)), std::fill(row + p.W, row + p.W + 2 * R, T(0));
    shifts_of(row - R);
    sum_rows<T, false>(room.list, p.W + 2 * R, out - R);
    for (int64_t i = 1; i <= R; ++i) {
      const int64_t before = room.place_x[-i], after = room.place_x[p.W - 1 + i];
      if (before >= 0) out[before] += out[-i];
      if (after >= 0) out[after] += out[p.W - 1 + i];
    }
  }

  // grad_in: by the input, or null. grad_sigma: is added to, or null; needs the input.
  void backward(const Plane<T>& grad, const Rows& in, const Rows* grad_in, Sum<T>* grad_sigma) const {
    for (int64_t y = 0; y < p.H; ++y) {
      list_adjoint(grad, y);
      if (grad_sigma) {
        sum_rows<T, true>(room.list, p.W, room.gradient, room.gradient_slope);
        extend(in, y);
        shifts_of(room.extended);
        sum_rows<T, true>(room.list, p.W, room.sum, room.slope);
        sum_over_row<T, 1>(
            0, p.W,
            [&](int64_t i, Vec<T>(&v)[1]) {
              v[0] = load(room.gradient + i) * load(room.slope + i) + load(room.gradient_slope + i) * load(room.sum + i);
            },
            [&](const Vec<T>(&sums)[1]) { grad_sigma->add(sums[0]); });
      } else {
        sum_rows<T, false>(room.list, p.W, room.gradient);
      }
      if (!grad_in) continue;
      adjoint_row();
      grad_in->write(y, room.sum);
    }
  }
};

}  // namespace
