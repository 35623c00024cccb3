// SPDX-License-Identifier: MIT
// The rotation of a plane, its adjoint and its derivative by the angle.
#pragma once

#include "ops/cpu/warp_sample.h"

namespace {

// Columns of R(2 pi l): the angle is reduced in quarters, so that quarter turns are exact.
struct Rotation {
  double cosine, sine;

  explicit Rotation(double turns) {
    const double rest = turns - std::round(turns), quarters = std::round(4 * rest), angle = 6.283185307179586 * (rest - quarters / 4);
    const double c = std::cos(angle), s = std::sin(angle);
    switch (static_cast<int>(quarters) & 3) {
      case 0: cosine = c, sine = s; break;
      case 1: cosine = -s, sine = c; break;
      case 2: cosine = -c, sine = -s; break;
      default: cosine = s, sine = -c;
    }
  }

  template <class T>
  Course<T, 2> course(const WarpProblem& p, int64_t y) const {
    const double cx = 0.5 * static_cast<double>(p.W - 1), cy = 0.5 * static_cast<double>(p.H - 1), dy = static_cast<double>(y) - cy;
    return {{static_cast<T>(cosine), static_cast<T>(sine)}, {static_cast<T>(cx - sine * dy), static_cast<T>(cy + cosine * dy)}, static_cast<T>(cx)};
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
    T* const placed = out.place(y, row);
    sample_row<WarpAffinePadding::zeros, T, 2>(source_of(in), rotation.course<T>(p, y), p.W, placed);
    out.done(y, placed, row);
  }
}

// Adds to sum the derivative by the angle: in is the rotation's input, with a margin, grad the gradient of its output.
template <class T>
void rotate_sums(const WarpProblem& p, const Plane<T>& in, double turns, T* row, const Rows& grad, Sum<T>& sum) {
  const Rotation rotation(turns);
  const double cy = 0.5 * static_cast<double>(p.H - 1);
  const T c = static_cast<T>(rotation.cosine), s = static_cast<T>(rotation.sine);
  const Source<T, 2> source = source_of(in), none{nullptr, {}, {}};
  for (int64_t y = 0; y < p.H; ++y) {
    const double dy = static_cast<double>(y) - cy;
    const T c_dy = static_cast<T>(rotation.cosine * dy), s_dy = static_cast<T>(rotation.sine * dy);
    sample_row_back<WarpAffinePadding::zeros, T, 2, 1>(
        source, none, rotation.course<T>(p, y), p.W, grad.read(y, row),
        [&](Vec<T>(&v)[1], Vec<T> dx, const Vec<T>(&by)[2]) { v[0] = by[1] * (c * dx - s_dy) - by[0] * (s * dx + c_dy); },
        [&](const Vec<T>(&v)[1]) { sum.add(v[0]); });
  }
}

// p[offset], p[offset + 1] and p[offset + 2] of every lane: four neighbours come in one load, and are transposed.
template <class T>
PK_INLINE void load_threes(const T* p, const Offsets<T>& offset, Vec<T> (&three)[3]) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (int part = 0; part < LANES<float>; part += 8) {
      const auto two = [&](int i, int j) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + offset[part + i])), _mm_loadu_ps(p + offset[part + j]), 1);
      };
      const __m256 a = two(0, 4), b = two(1, 5), c = two(2, 6), d = two(3, 7);
      const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), low23 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
      const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), high23 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
      const __m256d found[3] = {_mm256_unpacklo_pd(low01, low23), _mm256_unpackhi_pd(low01, low23), _mm256_unpacklo_pd(high01, high23)};
      if constexpr (LANES<T> == 8)
        for (int k = 0; k < 3; ++k) three[k] = reinterpret_cast<Vec<T>>(found[k]);
      else
        for (int k = 0; k < 3; ++k) std::memcpy(reinterpret_cast<float*>(&three[k]) + part, &found[k], sizeof found[k]);
    }
    return;
  }
#endif
  T found[3][LANES<T>];
  for (int i = 0; i < LANES<T>; ++i)
    for (int k = 0; k < 3; ++k) found[k][i] = p[offset[i] + k];
  for (int k = 0; k < 3; ++k) three[k] = load(found[k]);
}

// The share that a tap takes of a pixel at this distance along one axis.
template <class T>
PK_INLINE Vec<T> share_at(Vec<T> distance) {
  const Vec<T> share = T(1) - magnitude(distance);
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return at_least(share, Vec<float>{});
#endif
  return share > T(0) ? share : Vec<T>{};
}

// The adjoint as a gather: a pixel of the input has been a tap of outputs around where it is turned back to. A rotation does not scale, so those lie
// among the 3 x 3 nearest; their distances, turned, give the shares. grad has a margin, and pixels in it have none.
template <class T>
void rotate_adjoint(const WarpProblem& p, const Plane<T>& grad, double turns, T* row, const Rows& out) {
  const Rotation rotation(turns);
  const double cx = 0.5 * static_cast<double>(p.W - 1), cy = 0.5 * static_cast<double>(p.H - 1);
  const T c = static_cast<T>(rotation.cosine), s = static_cast<T>(rotation.sine), center = static_cast<T>(cx);
  for (int64_t y = 0; y < p.H; ++y) {
    const double dy = static_cast<double>(y) - cy;
    const T start_x = static_cast<T>(cx + rotation.sine * dy), start_y = static_cast<T>(cy + rotation.cosine * dy);
    T* const placed = out.place(y, row);
    Vec<T> dx = __builtin_convertvector(lane_numbers<T>(), Vec<T>) - center;
    for (int64_t i = 0; i < p.W; i += LANES<T>, dx += static_cast<T>(LANES<T>)) {
      const Vec<T> x0 = c * dx + start_x, y0 = start_y - s * dx;  // turned back
      const Vec<T> x1 = clamped<T>(rounded_down<T>(x0 + T(0.5)), -1, static_cast<T>(p.W));
      const Vec<T> y1 = clamped<T>(rounded_down<T>(y0 + T(0.5)), -1, static_cast<T>(p.H));
      const Vec<T> fx = x1 - x0, fy = y1 - y0, ux = c * fx - s * fy, uy = s * fx + c * fy;
      Offsets<T> offset;
      offset.set(__builtin_convertvector(y1, Index<T>) * static_cast<typename Offsets<T>::Lane>(grad.stride) + __builtin_convertvector(x1, Index<T>));
      Vec<T> total{};
#pragma GCC unroll 3
      for (int b = -1; b <= 1; ++b) {
        Vec<T> three[3];
        load_threes<T>(grad.origin + b * grad.stride - 1, offset, three);
#pragma GCC unroll 3
        for (int a = -1; a <= 1; ++a)
          total += three[a + 1] * (share_at<T>(ux + (static_cast<T>(a) * c - static_cast<T>(b) * s)) *
                                   share_at<T>(uy + (static_cast<T>(a) * s + static_cast<T>(b) * c)));
      }
      store(placed + i, total);
    }
    out.done(y, placed, row);
  }
}

}  // namespace
