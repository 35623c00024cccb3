// SPDX-License-Identifier: MIT
// Noise, soft crop and flips: stages whose result at a pixel depends on its row and the mirrored row alone. All that follow each other run on one such
// pair of rows at a time, in the first-level cache; the backward pass keeps the input of every stage there and walks back.
#pragma once

#include "common/normal.h"
#include "ops/cpu/warp_rows.h"

namespace {

template <class T>
PK_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

template <class T>
PK_INLINE Vec<T> reversed(Vec<T> v) {
  if constexpr (LANES<T> == 16)
    return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  else if constexpr (LANES<T> == 8)
    return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0);
  else if constexpr (LANES<T> == 4)
    return __builtin_shufflevector(v, v, 3, 2, 1, 0);
  else
    return __builtin_shufflevector(v, v, 1, 0);
}

// One axis of the crop's mask: the sigmoid's argument, the sigmoid, and its derivative by the parameter.
template <class T>
struct CropAxis {
  T *argument, *value, *slope;

  CropAxis(Arena& arena, int64_t size) : argument(take_row<T>(arena, size)), value(take_row<T>(arena, size)), slope(take_row<T>(arena, size)) {}

  void fill(int64_t size, double center, double half, double sharpness) const {
    const T middle = static_cast<T>(center) * static_cast<T>(size), k = static_cast<T>(sharpness), scale = k * static_cast<T>(size);
    for (int64_t i = 0; i < size; i += LANES<T>) {
      const Vec<T> x = __builtin_convertvector(lane_numbers<T>(), Vec<T>) + static_cast<T>(i) + T(0.5);
      const Vec<T> d = x - middle, t = k * (static_cast<T>(half) - magnitude(d));
      const Vec<T> e = exp_nonpositive(-magnitude(t)), whole = T(1) / (T(1) + e);
      const Vec<T> sign = d > T(0) ? broadcast(T(1)) : d < T(0) ? broadcast(T(-1)) : Vec<T>{};
      store(argument + i, t);
      store(value + i, t >= T(0) ? whole : e * whole);
      store(slope + i, e * whole * whole * scale * sign);
    }
  }
};

constexpr int POINT_STAGES = 4;  // noise, crop and two flips

template <class T>
struct PointsRoom {
  T* noise;                              // of the plane, element i at noise + first % 4 + i
  CropAxis<T> crop_y, crop_x;
  T* level[POINT_STAGES + 1][2];         // inputs of the stages and the result, for both rows
  T* gradient[2][2];                     // two to work with, for both rows
  int64_t plane = -1;                    // whose noise and mask these are
  uint32_t ready = 0;                    // bit k: what stage k needs is there

  PointsRoom(const WarpProblem& p, Arena& arena)
      : noise(arena.take<T>(normal_room<T>(p.H * p.W) + LANES<T>)), crop_y(arena, p.H), crop_x(arena, p.W) {
    for (auto& rows : level)
      for (T*& row : rows) row = take_row<T>(arena, p.W);
    for (auto& rows : gradient)
      for (T*& row : rows) row = take_row<T>(arena, p.W);
  }
};

template <class T>
using PointSums = Sum<T>[WARP_PARAMS];

template <class T>
struct Points {
  const WarpProblem& p;
  PointsRoom<T>& room;
  const Pass& pass;
  T noise_scale, flip_x, flip_y;
  const T* noise = nullptr;

  Points(const WarpProblem& problem, PointsRoom<T>& points_room, const Pass& points, const Sample& sample, int64_t plane,
         bool with_noise = true)
      : p(problem),
        room(points_room),
        pass(points),
        noise_scale(static_cast<T>(p.noise_std) * static_cast<T>(sample.param[1])),
        flip_x(static_cast<T>(sample.param[4])),
        flip_y(static_cast<T>(sample.param[5])) {
    const uint64_t first = static_cast<uint64_t>(plane % p.C * p.H * p.W);
    noise = room.noise + first % 4;
    if (room.plane != plane) room.plane = plane, room.ready = 0;
    for (int k = 0; k < pass.count; ++k) {
      const uint32_t bit = 1u << static_cast<int>(pass.stages[k]);
      if (room.ready & bit || (pass.stages[k] == WarpStage::noise && !with_noise)) continue;
      room.ready |= bit;
      if (pass.stages[k] == WarpStage::noise) {
        const uint64_t seed = static_cast<uint64_t>(p.seed[plane / p.C]);
        normals<T>({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, first, p.H * p.W, room.noise);
      }
      if (pass.stages[k] == WarpStage::crop) {
        room.crop_x.fill(p.W, sample.param[2], p.crop_half_x, p.sharpness);
        room.crop_y.fill(p.H, sample.param[3], p.crop_half_y, p.sharpness);
      }
    }
  }

  // ------------------------------------------------------------------------------------------------------------ forward

  // x[0], x[1]: rows y and H - 1 - y, which may be one; the result in out.
  void run(WarpStage stage, int64_t y, const T* const* x, T* const* out) const {
    const int64_t W = p.W, mirror = p.H - 1 - y;
    const int rows = y == mirror ? 1 : 2;
    if (stage == WarpStage::vflip) {
      const T *const a = x[0], *const b = x[rows - 1];
      for (int64_t i = 0; i < W; i += LANES<T>) {
        const Vec<T> u = load(a + i), v = load(b + i);
        store(out[0] + i, (1 - flip_y) * u + flip_y * v);
        if (rows == 2) store(out[1] + i, (1 - flip_y) * v + flip_y * u);
      }
      return;
    }
    for (int r = 0; r < rows; ++r) {
      const T* const in = x[r];
      if (stage == WarpStage::noise) {
        const T* const n = noise + (r ? mirror : y) * W;
        for (int64_t i = 0; i < W; i += LANES<T>) store(out[r] + i, load(in + i) + noise_scale * load(n + i));
      } else if (stage == WarpStage::crop) {
        const Vec<T> of_row = broadcast(room.crop_y.value[r ? mirror : y]);
        for (int64_t i = 0; i < W; i += LANES<T>) store(out[r] + i, load(in + i) * smaller<T>(load(room.crop_x.value + i), of_row));
      } else {
        for (int64_t i = 0; i < W; i += LANES<T>)
          store(out[r] + i, (1 - flip_x) * load(in + i) + flip_x * reversed<T>(load(in + W - LANES<T> - i)));
      }
    }
  }

  void forward(const Rows& in, const Rows& out) const {
    for (int64_t y = 0; 2 * y < p.H; ++y) {
      const int64_t rows[2] = {y, p.H - 1 - y};
      const int count = rows[0] == rows[1] ? 1 : 2;
      const T* now[2];
      T* last[2];
      for (int r = 0; r < count; ++r) now[r] = in.read(rows[r], room.level[0][r]), last[r] = out.place(rows[r], room.level[pass.count][r]);
      for (int k = 0; k < pass.count; ++k) {
        T* const* const next = k + 1 < pass.count ? room.level[k + 1] : last;
        run(pass.stages[k], y, now, next);
        now[0] = next[0], now[1] = next[1];
      }
      for (int r = 0; r < count; ++r) out.done(rows[r], last[r], room.level[pass.count][r]);
    }
  }

  // ------------------------------------------------------------------------------------------------------------ backward

  // g: gradients of the result for the same rows; out: by the stage's input; sums: null if the parameters' gradients are not wanted.
  void run_back(WarpStage stage, int64_t y, const T* const* x, const T* const* g, T* const* out, Sum<T>* sums) const {
    const int64_t W = p.W, mirror = p.H - 1 - y;
    const int rows = y == mirror ? 1 : 2;
    const auto add = [&](int column, const auto& term) {
      sum_over_row<T, 1>(
          0, W, [&](int64_t i, Vec<T>(&v)[1]) { v[0] = term(i); }, [&](const Vec<T>(&v)[1]) { sums[column].add(v[0]); });
    };
    if (stage == WarpStage::vflip) {
      if (sums && rows == 2) add(5, [&](int64_t i) { return (load(g[0] + i) - load(g[1] + i)) * (load(x[1] + i) - load(x[0] + i)); });
      run(stage, y, g, out);  // a mixture with the mirror image is its own adjoint
      return;
    }
    for (int r = 0; r < rows; ++r) {
      const T *const in = x[r], *const grad = g[r];
      const int64_t row = r ? mirror : y;
      if (stage == WarpStage::noise) {
        if (sums) add(1, [&](int64_t i) { return load(grad + i) * load(noise + row * W + i); });
        std::memcpy(out[r], grad, static_cast<size_t>(W) * sizeof(T));
      } else if (stage == WarpStage::crop) {
        if (sums) crop_sums(in, grad, row, sums);
        const Vec<T> of_row = broadcast(room.crop_y.value[row]);
        for (int64_t i = 0; i < W; i += LANES<T>) store(out[r] + i, load(grad + i) * smaller<T>(load(room.crop_x.value + i), of_row));
      } else {
        if (sums) add(4, [&](int64_t i) { return load(grad + i) * (reversed<T>(load(in + W - LANES<T> - i)) - load(in + i)); });
        for (int64_t i = 0; i < W; i += LANES<T>)
          store(out[r] + i, (1 - flip_x) * load(grad + i) + flip_x * reversed<T>(load(grad + W - LANES<T> - i)));
      }
    }
  }

  void crop_sums(const T* in, const T* grad, int64_t row, Sum<T>* sums) const {
    const Vec<T> of_row = broadcast(room.crop_y.argument[row]);
    const double slope = room.crop_y.slope[row];
    sum_over_row<T, 2>(
        0, p.W,
        [&](int64_t i, Vec<T>(&v)[2]) {
          const Vec<T> product = load(grad + i) * load(in + i);
          const auto x_is_smaller = load(room.crop_x.argument + i) <= of_row;
          v[0] = x_is_smaller ? product * load(room.crop_x.slope + i) : Vec<T>{};
          v[1] = x_is_smaller ? Vec<T>{} : product;
        },
        [&](const Vec<T>(&v)[2]) { sums[2].add(v[0]), sums[3].add(v[1], slope); });
  }

  // grad_in may be null, and so may sums, the seven of the parameters.
  void backward(const Rows& grad, const Rows& in, const Rows* grad_in, Sum<T>* sums) const {
    for (int64_t y = 0; 2 * y < p.H; ++y) {
      const int64_t rows[2] = {y, p.H - 1 - y};
      const int count = rows[0] == rows[1] ? 1 : 2;
      const T *x[POINT_STAGES][2] = {}, *g[2];
      for (int r = 0; r < count; ++r) {
        g[r] = grad.read(rows[r], room.gradient[0][r]);
        if (sums) x[0][r] = in.read(rows[r], room.level[0][r]);
      }
      for (int k = 0; sums && k + 1 < pass.count; ++k) {
        run(pass.stages[k], y, x[k], room.level[k + 1]);
        x[k + 1][0] = room.level[k + 1][0], x[k + 1][1] = room.level[k + 1][1];
      }
      int now = 0;
      for (int k = pass.count - 1; k >= 0; --k, now ^= 1) {
        T* next[2] = {room.gradient[now ^ 1][0], room.gradient[now ^ 1][1]};
        for (int r = 0; k == 0 && grad_in && r < count; ++r) next[r] = grad_in->place(rows[r], next[r]);
        run_back(pass.stages[k], y, x[k], g, next, sums);
        g[0] = next[0], g[1] = next[1];
      }
      for (int r = 0; grad_in && r < count; ++r) grad_in->done(rows[r], g[r], static_cast<const T*>(room.gradient[now][r]));
    }
  }
};

}  // namespace
