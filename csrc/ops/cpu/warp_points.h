// SPDX-License-Identifier: MIT
// Noise, soft crop and flips: stages whose result at a pixel depends on it and its mirror images alone. All that follow each other run on one block of
// pixels at a time, its mirror image in the row and both in the mirrored row: four vectors that no flip leads out of. The backward pass keeps what
// every stage got and walks back.
#pragma once

#include "common/exponentials.h"
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

  CropAxis(Arena& arena, int64_t size)
      : argument(take_row<T>(arena, size)), value(take_row<T>(arena, size)), slope(take_row<T>(arena, size)) {}

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
  T* noise;  // of the plane, element i at noise + first % 4 + i
  CropAxis<T> crop_y, crop_x;
  T *in[2], *out[2], *gradient[2];  // a row and its mirror image, where they cannot be read or written in place
  int64_t plane = -1;               // whose noise and mask these are
  uint32_t ready = 0;               // bit k: what stage k needs is there

  PointsRoom(const WarpProblem& p, Arena& arena)
      : noise(arena.take<T>(normal_room<T>(p.H * p.W) + 2 * LANES<T>)), crop_y(arena, p.H), crop_x(arena, p.W) {
    if (noise) noise += LANES<T>;
    for (int r = 0; r < 2; ++r) in[r] = take_row<T>(arena, p.W), out[r] = take_row<T>(arena, p.W), gradient[r] = take_row<T>(arena, p.W);
  }
};

template <class T>
using PointSums = Sum<T>[WARP_PARAMS];

// Sums for the parameters, of a part of the plane.
template <class T>
struct PointTotals {
  Vec<T> noise{}, crop_x{}, crop_y{}, hflip{}, vflip{};
};

// A block of pixels and its mirror image, whose lanes are in the block's order, in one row or in two that mirror each other.
template <class T, int ROWS>
struct Block {
  Vec<T> of[ROWS][2];

  Block() = default;
  // Vector by vector: compilers would copy halves, which the next load of a whole has to wait for.
  inline __attribute__((always_inline)) Block(const Block& other) { *this = other; }
  inline __attribute__((always_inline)) Block& operator=(const Block& other) {
    for (int r = 0; r < ROWS; ++r) of[r][0] = other.of[r][0], of[r][1] = other.of[r][1];
    return *this;
  }
};

// The stages of a pass with all they need, held by value: a function that works on its own copy need not read them again after every store.
template <class T>
struct PointStages {
  int64_t H, W;
  int count;
  WarpStage stage[POINT_STAGES];
  T noise_scale, flip_x, flip_y;
  const T* noise;
  CropAxis<T> crop_y, crop_x;

  inline __attribute__((always_inline)) Vec<T> mirrored(const T* row, int64_t i) const { return reversed<T>(load(row + W - LANES<T> - i)); }

  // At column i of the rows. Blocks lie inside a row, or begin at its first pixel and are wider; then only the buffers hold what is beyond.
  template <int ROWS>
  inline __attribute__((always_inline)) Block<T, ROWS> read(const T* const (&rows)[2], int64_t i) const {
    Block<T, ROWS> block;
    for (int r = 0; r < ROWS; ++r) block.of[r][0] = load(rows[r] + i), block.of[r][1] = mirrored(rows[r], i);
    return block;
  }
  template <int ROWS>
  inline __attribute__((always_inline)) void write(T* const (&rows)[2], int64_t i, const Block<T, ROWS>& block) const {
    for (int r = 0; r < ROWS; ++r) store(rows[r] + i, block.of[r][0]), store(rows[r] + W - LANES<T> - i, reversed<T>(block.of[r][1]));
  }

  // What a stage makes of a block at column i of row y and its mirror image. BACK: of a gradient instead; a mixture with the mirror image is its
  // own adjoint.
  template <int ROWS, bool BACK>
  inline __attribute__((always_inline)) void run(WarpStage kind, int64_t y, int64_t i, Block<T, ROWS>& block) const {
    Vec<T>(&v)[ROWS][2] = block.of;
    if (kind == WarpStage::noise) {
      for (int r = 0; r < ROWS && !BACK; ++r) {
        const T* const n = noise + (r ? H - 1 - y : y) * W;
        v[r][0] += noise_scale * load(n + i), v[r][1] += noise_scale * mirrored(n, i);
      }
    } else if (kind == WarpStage::crop) {
      const Vec<T> mask[2] = {load(crop_x.value + i), mirrored(crop_x.value, i)};
      for (int r = 0; r < ROWS; ++r) {
        const Vec<T> of_row = broadcast(crop_y.value[r ? H - 1 - y : y]);
        v[r][0] *= smaller<T>(mask[0], of_row), v[r][1] *= smaller<T>(mask[1], of_row);
      }
    } else if (kind == WarpStage::hflip) {
      for (int r = 0; r < ROWS; ++r) mix(v[r][0], v[r][1], flip_x);
    } else {
      for (int s = 0; s < 2; ++s) {
        Vec<T> alone = v[0][s];
        mix(v[0][s], ROWS == 2 ? v[ROWS - 1][s] : alone, flip_y);
      }
    }
  }
  static inline __attribute__((always_inline)) void mix(Vec<T>& a, Vec<T>& b, T share) {
    const Vec<T> u = a, v = b;
    a = (1 - share) * u + share * v, b = (1 - share) * v + share * u;
  }

  // Adds what a block gives to the derivative by the stage's parameters: x its input there, g the gradient by its output. MIDDLE: the block and its
  // mirror image meet or overlap, and the pixels from the middle of the row on count in the mirror image alone. What does not count may be beside the
  // row, and anything: whole terms are dropped, not factors.
  template <int ROWS, bool MIDDLE>
  inline __attribute__((always_inline)) void add(WarpStage kind, int64_t y, int64_t i, const Block<T, ROWS>& x, const Block<T, ROWS>& g,
                                                 PointTotals<T>& totals) const {
    const auto counted = [&](Vec<T> term, int side) { return MIDDLE ? first_lanes<T>(term, (side ? W : W + 1) / 2 - i) : term; };
    if (kind == WarpStage::noise) {
      for (int r = 0; r < ROWS; ++r) {
        const T* const n = noise + (r ? H - 1 - y : y) * W;
        totals.noise += counted(g.of[r][0] * load(n + i), 0) + counted(g.of[r][1] * mirrored(n, i), 1);
      }
    } else if (kind == WarpStage::crop) {
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = r ? H - 1 - y : y;
        const Vec<T> argument_y = broadcast(crop_y.argument[row]), slope_y = broadcast(crop_y.slope[row]);
        for (int s = 0; s < 2; ++s) {
          const Vec<T> argument_x = s ? mirrored(crop_x.argument, i) : load(crop_x.argument + i);
          const Vec<T> slope_x = s ? mirrored(crop_x.slope, i) : load(crop_x.slope + i);
          const Vec<T> product = g.of[r][s] * x.of[r][s];
          const auto x_is_smaller = argument_x <= argument_y;
          totals.crop_x += counted(x_is_smaller ? product * slope_x : Vec<T>{}, s);
          totals.crop_y += counted(x_is_smaller ? Vec<T>{} : product * slope_y, s);
        }
      }
    } else if (kind == WarpStage::hflip) {  // both pixels of a pair at once
      for (int r = 0; r < ROWS; ++r) totals.hflip += counted((g.of[r][0] - g.of[r][1]) * (x.of[r][1] - x.of[r][0]), 1);
    } else if (ROWS == 2) {
      for (int s = 0; s < 2; ++s) totals.vflip += counted((g.of[0][s] - g.of[1][s]) * (x.of[1][s] - x.of[0][s]), s);
    }
  }

  template <int ROWS, bool SUMS, bool MIDDLE>
  inline __attribute__((always_inline)) void backward_block(const T* const (&x)[2], const T* const (&g)[2], T* const (&out)[2], int64_t y,
                                                            int64_t i, PointTotals<T>& totals) const {
    Block<T, ROWS> input[POINT_STAGES], gradient = read<ROWS>(g, i);
    if constexpr (SUMS) {
      input[0] = read<ROWS>(x, i);
      for (int k = 0; k + 1 < count; ++k) input[k + 1] = input[k], run<ROWS, false>(stage[k], y, i, input[k + 1]);
    }
    for (int k = count - 1; k >= 0; --k) {
      if constexpr (SUMS) add<ROWS, MIDDLE>(stage[k], y, i, input[k], gradient, totals);
      run<ROWS, true>(stage[k], y, i, gradient);
    }
    if (out[0]) write<ROWS>(out, i, gradient);
  }
};

template <class T>
struct Points {
  // What has added up in T, and over how many columns.
  struct Unsaved {
    Sum<T>* sums;
    PointTotals<T> totals{};
    int64_t columns = 0;

    void keep(const PointTotals<T>& now, int64_t more) {
      totals = now, columns += more;
      if (columns >= SUM_BLOCK / 4) save();
    }
    void save() {
      sums[1].add(totals.noise), sums[2].add(totals.crop_x), sums[3].add(totals.crop_y), sums[4].add(totals.hflip),
          sums[5].add(totals.vflip);
      totals = {}, columns = 0;
    }
  };

  const WarpProblem& p;
  PointsRoom<T>& room;
  PointStages<T> all;

  Points(const WarpProblem& problem, PointsRoom<T>& points_room, const Pass& pass, const Sample& sample, int64_t plane,
         bool with_noise = true)
      : p(problem),
        room(points_room),
        all{p.H,
            p.W,
            pass.count,
            {},
            static_cast<T>(p.noise_std) * static_cast<T>(sample.param[1]),
            static_cast<T>(sample.param[4]),
            static_cast<T>(sample.param[5]),
            nullptr,
            room.crop_y,
            room.crop_x} {
    const uint64_t first = static_cast<uint64_t>(plane % p.C * p.H * p.W);
    all.noise = room.noise + first % 4;
    if (room.plane != plane) room.plane = plane, room.ready = 0;
    for (int k = 0; k < pass.count; ++k) {
      all.stage[k] = pass.stages[k];
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

  // ------------------------------------------------------------------------------------------------------------ rows

  bool in_place(const Rows& rows) const { return rows.kind == KIND<T> && p.W >= LANES<T>; }
  static T* at(const Rows& rows, int64_t y) { return static_cast<T*>(rows.base) + rows.start + y * rows.stride; }

  // Rows y and H - 1 - y, in the buffers unless they can be used in place.
  template <int ROWS>
  void open(const Rows& rows, int64_t y, T* const (&buffers)[2], bool filled, T* (&found)[2]) const {
    for (int r = 0; r < ROWS; ++r) {
      found[r] = in_place(rows) ? at(rows, r ? p.H - 1 - y : y) : buffers[r];
      if (filled && found[r] == buffers[r]) rows.copy(r ? p.H - 1 - y : y, buffers[r]);
    }
  }
  template <int ROWS>
  void close(const Rows& rows, int64_t y, T* const (&written)[2]) const {
    for (int r = 0; r < ROWS && !in_place(rows); ++r) rows.write(r ? p.H - 1 - y : y, written[r]);
  }

  template <int ROWS>
  void forward_rows(const Rows& in, const Rows& out, int64_t y) const {
    const PointStages<T> stages = all;
    T *x[2], *result[2];
    open<ROWS>(in, y, room.in, true, x), open<ROWS>(out, y, room.out, false, result);
    for (int64_t i = 0; 2 * i < stages.W; i += LANES<T>) {
      Block<T, ROWS> block = stages.template read<ROWS>({x[0], x[1]}, i);
      for (int k = 0; k < stages.template count; ++k) stages.template run<ROWS, false>(stages.template stage[k], y, i, block);
      stages.template write<ROWS>(result, i, block);
    }
    close<ROWS>(out, y, result);
  }

  void forward(const Rows& in, const Rows& out) const {
    for (int64_t y = 0; 2 * y < p.H; ++y) 2 * y + 1 == p.H ? forward_rows<1>(in, out, y) : forward_rows<2>(in, out, y);
  }

  template <int ROWS, bool SUMS>
  void backward_rows(const Rows& grad, const Rows& in, const Rows* grad_in, int64_t y, Unsaved& unsaved) const {
    const PointStages<T> stages = all;
    T *x[2] = {}, *g[2], *out[2] = {};
    open<ROWS>(grad, y, room.gradient, true, g);
    if (SUMS) open<ROWS>(in, y, room.in, true, x);
    if (grad_in) open<ROWS>(*grad_in, y, room.out, false, out);
    for (int64_t i = 0; 2 * i < stages.W;) {
      PointTotals<T> totals = unsaved.totals;
      const int64_t begin = i;
      for (; i < begin + SUM_BLOCK / 4 && 2 * (i + LANES<T>) <= stages.W; i += LANES<T>)
        stages.template backward_block<ROWS, SUMS, false>({x[0], x[1]}, {g[0], g[1]}, out, y, i, totals);
      if (2 * i < stages.W && 2 * (i + LANES<T>) > stages.W)
        stages.template backward_block<ROWS, SUMS, true>({x[0], x[1]}, {g[0], g[1]}, out, y, i, totals), i += LANES<T>;
      if constexpr (SUMS) unsaved.keep(totals, i - begin);
    }
    if (grad_in) close<ROWS>(*grad_in, y, out);
  }

  template <bool SUMS>
  void backward_plane(const Rows& grad, const Rows& in, const Rows* grad_in, Sum<T>* sums) const {
    Unsaved unsaved{sums};
    for (int64_t y = 0; 2 * y < p.H; ++y)
      2 * y + 1 == p.H ? backward_rows<1, SUMS>(grad, in, grad_in, y, unsaved) : backward_rows<2, SUMS>(grad, in, grad_in, y, unsaved);
    if constexpr (SUMS) unsaved.save();
  }
  // grad_in may be null, and so may sums, the seven of the parameters.
  void backward(const Rows& grad, const Rows& in, const Rows* grad_in, Sum<T>* sums) const {
    sums ? backward_plane<true>(grad, in, grad_in, sums) : backward_plane<false>(grad, in, grad_in, sums);
  }
};

}  // namespace
