// SPDX-License-Identifier: MIT
// The rotation of a plane, its adjoint and its derivative by the angle.
//
// The adjoint adds four weighted numbers to four pixels for every pixel of the gradient. They go to one cell, the four of them side by side: one
// load and one store, which the next pixel's may follow at once, for it takes the same cell or another one, never a part of it. Afterwards every
// pixel adds up what four cells hold for it.
#pragma once

#include "ops/cpu/warp_sample.h"

namespace {

// Columns of R(2 pi l): the angle is reduced in quarters, so that quarter turns are exact.
struct Rotation {
  double cosine, sine, inverse_cosine, inverse_sine;

  explicit Rotation(double turns) {
    const double rest = turns - std::round(turns), quarters = std::round(4 * rest), angle = 6.283185307179586 * (rest - quarters / 4);
    const double c = std::cos(angle), s = std::sin(angle);
    switch (static_cast<int>(quarters) & 3) {
      case 0: cosine = c, sine = s; break;
      case 1: cosine = -s, sine = c; break;
      case 2: cosine = -c, sine = -s; break;
      default: cosine = s, sine = -c;
    }
    inverse_cosine = 1 / cosine, inverse_sine = 1 / sine;
  }

  // Pixels of row y from which taps may lie on the plane: all others, and a few of these, have none there.
  void span(const WarpProblem& p, int64_t y, int64_t& first, int64_t& last) const {
    const double cx = 0.5 * static_cast<double>(p.W - 1), cy = 0.5 * static_cast<double>(p.H - 1), dy = static_cast<double>(y) - cy;
    double from = 0, to = static_cast<double>(p.W);
    const auto meet = [&](double step, double inverse, double start, int64_t size) {  // start + step (x - cx) in [-slack, size + slack)
      const double n = static_cast<double>(size), slack = 2 + 1e-6 * n, low = -slack - start, high = n + slack - start;
      if (std::abs(step) < 1e-12) return void(low > 0 || high < 0 ? to = 0 : to);
      const double a = cx + low * inverse, b = cx + high * inverse;
      from = std::max(from, std::min(a, b)), to = std::min(to, std::max(a, b) + 1);
    };
    meet(cosine, inverse_cosine, cx - sine * dy, p.W), meet(sine, inverse_sine, cy + cosine * dy, p.H);
    first = static_cast<int64_t>(std::min(from, static_cast<double>(p.W))), last = std::max(static_cast<int64_t>(std::max(to, 0.0)), first);
  }

  template <class T>
  Course<T, 2> course(const WarpProblem& p, int64_t y) const {
    const double cx = 0.5 * static_cast<double>(p.W - 1), cy = 0.5 * static_cast<double>(p.H - 1), dy = static_cast<double>(y) - cy;
    return {{static_cast<T>(cosine), static_cast<T>(sine)},
            {static_cast<T>(cx - sine * dy), static_cast<T>(cy + cosine * dy)},
            static_cast<T>(cx)};
  }
};

template <class T>
Source<T, 2> source_of(const Plane<T>& plane) {
  return {plane.origin, {plane.W, plane.H}, {1, plane.stride}};
}

template <class T>
void rotate_forward(const WarpProblem& p, const Plane<T>& in, double turns, T* row, const Rows& out) {
  const Rotation rotation(turns);
  for (int64_t y = 0; y < p.H; ++y) {
    int64_t first, last;
    rotation.span(p, y, first, last);
    first = first / LANES<T> * LANES<T>, last = std::min(round_up(last, LANES<T>), p.W);
    T* const placed = out.place(y, row);
    std::fill(placed, placed + first, T(0)), std::fill(placed + last, placed + p.W, T(0));
    sample_row<WarpAffinePadding::zeros, T, 2>(source_of(in), rotation.course<T>(p, y), first, last, placed);
    out.done(y, placed, row);
  }
}

// A cell for every pixel of a plane and its margin: what the pixel itself, the ones to its right, below and below to the right receive.
template <class T>
struct Cells {
  T* memory;
  int64_t stride, H, W;

  Cells(Arena& arena, const WarpProblem& p, bool wanted) : stride(round_up(p.W + 2 * MARGIN, LANES<T>)), H(p.H), W(p.W) {
    memory = wanted ? arena.take<T>(4 * elements()) : nullptr;
  }
  int64_t elements() const { return (H + 2 * MARGIN) * stride + 2 * LANES<T>; }
  T* row(int64_t y) const { return memory + 4 * (LANES<T> + (y + MARGIN) * stride); }
  void clear() const { std::fill_n(memory, 4 * elements(), T(0)); }
};

#if defined(__AVX2__)
PK_INLINE void add_to_cells(float* cells, const int64_t* offset, __m256 w0, __m256 w1, __m256 w2, __m256 w3) {
  const __m256d upper_low = _mm256_castps_pd(_mm256_unpacklo_ps(w0, w1)), upper_high = _mm256_castps_pd(_mm256_unpackhi_ps(w0, w1));
  const __m256d lower_low = _mm256_castps_pd(_mm256_unpacklo_ps(w2, w3)), lower_high = _mm256_castps_pd(_mm256_unpackhi_ps(w2, w3));
  const __m256 a = _mm256_castpd_ps(_mm256_unpacklo_pd(upper_low, lower_low)),
               b = _mm256_castpd_ps(_mm256_unpackhi_pd(upper_low, lower_low));
  const __m256 c = _mm256_castpd_ps(_mm256_unpacklo_pd(upper_high, lower_high)),
               d = _mm256_castpd_ps(_mm256_unpackhi_pd(upper_high, lower_high));
  const auto add = [&](int lane, __m128 four) {
    float* const cell = cells + 4 * offset[lane];
    _mm_store_ps(cell, _mm_add_ps(_mm_load_ps(cell), four));
  };
  add(0, _mm256_castps256_ps128(a)), add(1, _mm256_castps256_ps128(b)), add(2, _mm256_castps256_ps128(c)),
      add(3, _mm256_castps256_ps128(d));
  add(4, _mm256_extractf128_ps(a, 1)), add(5, _mm256_extractf128_ps(b, 1));
  add(6, _mm256_extractf128_ps(c, 1)), add(7, _mm256_extractf128_ps(d, 1));
}
#endif

// Adds w0 .. w3 of every lane to the four numbers of its cell.
template <class T>
PK_INLINE void add_to_cells(T* cells, const Offsets<T>& offset, Vec<T> w0, Vec<T> w1, Vec<T> w2, Vec<T> w3) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const auto half = [](Vec<float> v, auto part) { return _mm512_extractf32x8_ps(reinterpret_cast<__m512>(v), part.value); };
    const auto add = [&](auto part) {
      add_to_cells(cells, offset.numbers + 8 * part.value, half(w0, part), half(w1, part), half(w2, part), half(w3, part));
    };
    return add(std::integral_constant<int, 0>{}), add(std::integral_constant<int, 1>{});
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return add_to_cells(cells, offset.numbers, w0, w1, w2, w3);
#endif
  T parts[4][LANES<T>];
  store(parts[0], w0), store(parts[1], w1), store(parts[2], w2), store(parts[3], w3);
  for (int i = 0; i < LANES<T>; ++i)
    for (int k = 0; k < 4; ++k) cells[4 * offset[i] + k] += parts[k][i];
}

// What the cells hold for the pixels i, i + 1, .. of a row: here is the row of cells at the first pixel, above the one before.
template <class T>
PK_INLINE Vec<T> sum_of_cells(const T* here, const T* above) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    Vec<float> sums{};
    for (int part = 0; part < LANES<float>; part += 8) {
      const auto two = [&](int i) {  // the four terms of pixel i, and those of the next one
        const int64_t at = 4 * (part + i);
        const __m256 upper = _mm256_blend_ps(_mm256_loadu_ps(above + at), _mm256_loadu_ps(above + at - 4), 0x88);
        const __m256 lower = _mm256_blend_ps(_mm256_loadu_ps(here + at), _mm256_loadu_ps(here + at - 4), 0x22);
        return _mm256_blend_ps(lower, upper, 0xcc);
      };
      const __m256 a = two(0), b = two(2), c = two(4), d = two(6);
      const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
      const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
      const __m256 mixed = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
      const __m256 found = _mm256_permutevar8x32_ps(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      std::memcpy(reinterpret_cast<float*>(&sums) + part, &found, sizeof found);
    }
    return sums;
  }
#endif
  T found[LANES<T>];
  for (int i = 0; i < LANES<T>; ++i) found[i] = (here[4 * i] + above[4 * i + 2]) + (here[4 * i - 3] + above[4 * i - 1]);
  return load(found);
}

// The way back through a row: every pixel's part goes to the cells (if CELLS), and the derivatives by the angle are added to sum (if SUM).
// Products have one use each, so that compilers fuse the same ones whatever is asked for: gradients do not depend on which others are computed.
template <bool CELLS, bool SUM, class T>
PK_INLINE void row_back(const Source<T, 2>& source, T* cells, const Course<T, 2>& course, T center_y, const T* grad, int64_t first,
                        int64_t last, int64_t W, Sum<T>* sum) {
  const T c = course.step[0], s = course.step[1];
  const T high_x = static_cast<T>(source.size[0]), high_y = static_cast<T>(source.size[1]);
  const auto stride = static_cast<typename Offsets<T>::Lane>(source.stride[1]);
  Vec<T> dx = __builtin_convertvector(lane_numbers<T>(), Vec<T>) + (static_cast<T>(first) - course.center), total{};
  for (int64_t i = first; i < last; i += LANES<T>, dx += static_cast<T>(LANES<T>)) {
    const Vec<T> turned_x = c * dx + course.start[0], turned_y = s * dx + course.start[1];
    const Vec<T> x = clamped<T>(turned_x, -MARGIN, high_x), y = clamped<T>(turned_y, -MARGIN, high_y);
    const Vec<T> left = rounded_down<T>(x), top = rounded_down<T>(y), fx = x - left, fy = y - top;
    Offsets<T> offset;
    offset.set(__builtin_convertvector(top, Index<T>) * stride + __builtin_convertvector(left, Index<T>));
    Vec<T> g = load(grad + i);
    if (i + LANES<T> > W) g = first_lanes<T>(g, W - i);
    if constexpr (SUM) {
      Vec<T> q00{}, q01{}, q10{}, q11{};
      load_taps<T>(source.origin, source.stride[1], offset, q00, q01, q10, q11);
      const Vec<T> upper = q01 - q00, lower = q11 - q10;
      const Vec<T> by_x = between<T>(upper, lower, fy), by_y = between<T>(q10 - q00, q11 - q01, fx);
      Vec<T> term = by_y * (turned_x - course.center) - by_x * (turned_y - center_y);
      if (i + LANES<T> > W) term = first_lanes<T>(term, W - i);
      total += g * term;
    }
    if constexpr (CELLS) {
      const Vec<T> lower = g * fy, upper = g - lower, upper_right = upper * fx, lower_right = lower * fx;
      add_to_cells<T>(cells, offset, upper - upper_right, upper_right, lower - lower_right, lower_right);
    }
    if (SUM && (i - first) % SUM_BLOCK == SUM_BLOCK - LANES<T>) sum->add(total), total = Vec<T>{};
  }
  if constexpr (SUM) sum->add(total);
}

// grad: by the rotation's output. Writes the gradient by its input to out (null: not wanted; else cells work for it); adds the derivative by the angle
// to sum (null: not wanted; else in is the input, with a margin).
template <bool CELLS, bool SUM, class T>
void rotate_back(const WarpProblem& p, const Plane<T>& in, const Cells<T>& cells, double turns, T* row, const Rows& grad, const Rows* out,
                 Sum<T>* sum) {
  const Rotation rotation(turns);
  const double cy = 0.5 * static_cast<double>(p.H - 1);
  const Source<T, 2> source = source_of(in);
  if constexpr (CELLS) cells.clear();
  for (int64_t y = 0; y < p.H; ++y) {
    int64_t first, last;
    rotation.span(p, y, first, last);
    first = first / LANES<T> * LANES<T>;
    row_back<CELLS, SUM, T>(source, cells.row(0), rotation.course<T>(p, y), static_cast<T>(cy), grad.read(y, row), first, last, p.W, sum);
  }
  if constexpr (CELLS)
    for (int64_t y = 0; y < p.H; ++y) {
      T* const placed = out->place(y, row);
      for (int64_t i = 0; i < p.W; i += LANES<T>) store(placed + i, sum_of_cells<T>(cells.row(y) + 4 * i, cells.row(y - 1) + 4 * i));
      out->done(y, placed, row);
    }
}

template <class T>
void rotate_backward(const WarpProblem& p, const Plane<T>& in, const Cells<T>& cells, double turns, T* row, const Rows& grad,
                     const Rows* out, Sum<T>* sum) {
  const auto run = out && sum ? rotate_back<true, true, T> : out ? rotate_back<true, false, T> : rotate_back<false, true, T>;
  run(p, in, cells, turns, row, grad, out, sum);
}

}  // namespace
