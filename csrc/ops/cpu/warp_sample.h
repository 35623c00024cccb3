// SPDX-License-Identifier: MIT
// Reads a plane at coordinates that an affine map gives, and the adjoint of that. Both coordinates of a row of pixels are a number of the row plus a
// multiple of x. The plane has a margin of zeros, into which coordinates outside are moved: no tap needs a test.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "ops/cpu/warp_rows.h"

namespace {

template <class T>
PK_INLINE Vec<T> rounded_down(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_floor_ps(x);
#endif
  const Vec<T> cut = __builtin_convertvector(__builtin_convertvector(x, Index<T>), Vec<T>);
  return cut > x ? cut - T(1) : cut;
}

// x within [low, high]; what is no number becomes high.
template <class T>
PK_INLINE Vec<T> clamped(Vec<T> x, T low, T high) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return at_least(at_most(broadcast(high), x), broadcast(low));  // at_most gives its first argument up for a number only
#endif
  const Vec<T> below = x < high ? x : broadcast(high);
  return below > low ? below : broadcast(low);
}

// The lanes of offsets as numbers. Two at a time leave the vector: by way of memory, or one by one, they take longer.
template <class T>
struct Offsets {
  typedef std::remove_reference_t<decltype(Index<T>{}[0])> Lane;
  int64_t numbers[LANES<T>];

  __attribute__((always_inline)) void set(Index<T> offset) {
    if constexpr (sizeof(T) == 4) {
      typedef int64_t Twice __attribute__((vector_size(VECTOR_BYTES)));
      const Twice twos = reinterpret_cast<Twice>(offset);
#pragma GCC unroll 8
      for (int i = 0; i < LANES<T>; i += 2) numbers[i] = static_cast<int32_t>(twos[i / 2]), numbers[i + 1] = twos[i / 2] >> 32;
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < LANES<T>; ++i) numbers[i] = offset[i];
    }
  }
  __attribute__((always_inline)) int64_t operator[](int lane) const { return numbers[lane]; }
};

#if defined(__AVX2__)
struct Pairs {  // left and right of eight lanes
  __m256 left, right;
  __attribute__((always_inline)) Pairs(__m128 ab, __m128 cd, __m128 ef, __m128 gh) {
    const __m256 abef = _mm256_insertf128_ps(_mm256_castps128_ps256(ab), ef, 1),
                 cdgh = _mm256_insertf128_ps(_mm256_castps128_ps256(cd), gh, 1);
    left = _mm256_shuffle_ps(abef, cdgh, 0x88), right = _mm256_shuffle_ps(abef, cdgh, 0xdd);
  }
};
#endif

// The four taps of every lane: p[offset], p[offset + 1] and the two below them. Neighbours come in one load: half as many as a gather would make.
template <class T>
PK_INLINE void load_taps(const T* p, int64_t stride, const Offsets<T>& offset, Vec<T>& a, Vec<T>& b, Vec<T>& c, Vec<T>& d) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const float* const below = p + stride;
    for (int part = 0; part < LANES<float>; part += 8) {
      __m128 upper[4], lower[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t first = offset[part + 2 * i], second = offset[part + 2 * i + 1];
        const auto two = [&](const float* from) {
          const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + first)));
          return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(from + second));
        };
        upper[i] = two(p), lower[i] = two(below);
      }
      const Pairs u(upper[0], upper[1], upper[2], upper[3]), l(lower[0], lower[1], lower[2], lower[3]);
      if constexpr (LANES<T> == 8) {
        a = reinterpret_cast<Vec<T>>(u.left), b = reinterpret_cast<Vec<T>>(u.right);
        c = reinterpret_cast<Vec<T>>(l.left), d = reinterpret_cast<Vec<T>>(l.right);
      } else {
        const auto put = [&](Vec<T>& v, __m256 half) { std::memcpy(reinterpret_cast<float*>(&v) + part, &half, sizeof half); };
        put(a, u.left), put(b, u.right), put(c, l.left), put(d, l.right);
      }
    }
    return;
  }
#endif
  T found[4][LANES<T>];
  for (int i = 0; i < LANES<T>; ++i) {
    const T* const first = p + offset[i];
    found[0][i] = first[0], found[1][i] = first[1], found[2][i] = first[stride], found[3][i] = first[stride + 1];
  }
  a = load(found[0]), b = load(found[1]), c = load(found[2]), d = load(found[3]);
}

// A plane (DIMS 2) or a volume of planes with a margin; axes in the order x, y, z.
template <class T, int DIMS>
struct Source {
  T* origin;
  int64_t size[DIMS], stride[DIMS];  // stride[0] is 1
};

// Coordinates along a row of pixels: start + step dx, dx = x - center.
template <class T, int DIMS>
struct Course {
  T step[DIMS], start[DIMS], center;
};

// Where padding puts coordinate s of an axis, and the derivative of that.
template <WarpAffinePadding PADDING, class T>
PK_INLINE Vec<T> placed(Vec<T> s, int64_t size, Vec<T>& slope) {
  const T last = static_cast<T>(size - 1);
  slope = broadcast(T(1));
  if constexpr (PADDING == WarpAffinePadding::zeros) return clamped<T>(s, -MARGIN, static_cast<T>(size));
  if constexpr (PADDING == WarpAffinePadding::reflection) {
    const Vec<T> away = s < T(0) ? -s : s, turns = rounded_down<T>(away / std::max(last, T(1)));
    const Vec<T> rest = away - turns * last, half = turns * T(0.5);
    const auto odd = rounded_down<T>(half) != half;
    slope = s < T(0) ? broadcast(T(-1)) : slope;
    slope = odd ? -slope : slope;
    s = odd ? last - rest : rest;
  }
  slope = s > T(0) ? slope : Vec<T>{};
  slope = s < last ? slope : Vec<T>{};
  return clamped<T>(s, 0, last);
}

// The taps of LANES pixels: offset of the first, fractions, and the slopes of the placed coordinates.
template <class T, int DIMS>
struct Spot {
  Offsets<T> offset;
  Vec<T> fraction[DIMS], slope[DIMS];
};

template <WarpAffinePadding PADDING, class T, int DIMS>
PK_INLINE Spot<T, DIMS> taps_at(const Source<T, DIMS>& source, const Course<T, DIMS>& course, Vec<T> dx) {
  Spot<T, DIMS> taps;
  Index<T> offset{};
  for (int axis = 0; axis < DIMS; ++axis) {
    const Vec<T> s = placed<PADDING, T>(course.step[axis] * dx + course.start[axis], source.size[axis], taps.slope[axis]);
    const Vec<T> whole = rounded_down<T>(s);
    taps.fraction[axis] = s - whole;
    const Index<T> steps = __builtin_convertvector(whole, Index<T>);
    offset += axis == 0 ? steps : steps * static_cast<typename Offsets<T>::Lane>(source.stride[axis]);
  }
  taps.offset.set(offset);
  return taps;
}

template <class T>
PK_INLINE Vec<T> between(Vec<T> a, Vec<T> b, Vec<T> fraction) {
  return a + fraction * (b - a);
}

// The interpolated value, and its derivatives by the coordinates.
template <class T, int DIMS>
PK_INLINE Vec<T> interpolate(const Source<T, DIMS>& source, const Spot<T, DIMS>& taps, Vec<T> (&slope)[DIMS]) {
  const Vec<T>(&f)[DIMS] = taps.fraction;
  Vec<T> value[2], along[2], down[2];  // of one plane, or of both that a volume has here
  for (int z = 0; z + 2 < DIMS + 1; ++z) {
    const T* const plane = source.origin + (DIMS == 3 ? z * source.stride[DIMS - 1] : 0);
    Vec<T> a{}, b{}, c{}, d{};
    load_taps<T>(plane, source.stride[1], taps.offset, a, b, c, d);
    const Vec<T> top = between<T>(a, b, f[0]), bottom = between<T>(c, d, f[0]);
    down[z] = bottom - top;
    value[z] = top + f[1] * down[z];
    along[z] = between<T>(b - a, d - c, f[1]);
  }
  if constexpr (DIMS == 2) {
    slope[0] = along[0], slope[1] = down[0];
    return value[0];
  } else {
    slope[0] = between<T>(along[0], along[1], f[2]), slope[1] = between<T>(down[0], down[1], f[2]), slope[2] = value[1] - value[0];
    return between<T>(value[0], value[1], f[2]);
  }
}

// Adds weight to the first `count` lanes' elements at[offset]. Neighbouring pixels share taps: each is added on its own, for a load of two would have to
// wait until the store of one of them has left the core.
template <class T>
PK_INLINE void add_at(T* at, const Offsets<T>& offset, Vec<T> weight, int64_t count) {
  const auto add = [&](int i) { at[offset[i]] += weight[i]; };
  if (count == LANES<T>)
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i) add(i);
  else
    for (int i = 0; i < count; ++i) add(i);
}

// Adds g times its taps' weights to the first `count` lanes' taps.
template <class T, int DIMS>
PK_INLINE void scatter(const Source<T, DIMS>& target, const Spot<T, DIMS>& taps, Vec<T> g, int64_t count) {
  for (int z = 0; z < DIMS - 1; ++z) {
    T* const plane = target.origin + (DIMS == 3 ? z * target.stride[DIMS - 1] : 0);
    const Vec<T> part = DIMS == 2 ? g : z == 0 ? g - g * taps.fraction[DIMS - 1] : g * taps.fraction[DIMS - 1];
    const Vec<T> lower = part * taps.fraction[1], upper = part - lower;
    const Vec<T> upper_right = upper * taps.fraction[0], lower_right = lower * taps.fraction[0];
    add_at<T>(plane, taps.offset, upper - upper_right, count);
    add_at<T>(plane + 1, taps.offset, upper_right, count);
    add_at<T>(plane + target.stride[1], taps.offset, lower - lower_right, count);
    add_at<T>(plane + target.stride[1] + 1, taps.offset, lower_right, count);
  }
}

// Pixels first .. last - 1 of a row, written up to a whole vector.
template <WarpAffinePadding PADDING, class T, int DIMS>
void sample_row(const Source<T, DIMS>& source, const Course<T, DIMS>& course, int64_t first, int64_t last, T* out) {
  Vec<T> x = __builtin_convertvector(lane_numbers<T>(), Vec<T>) + (static_cast<T>(first) - course.center), unused[DIMS];
  for (int64_t i = first; i < last; i += LANES<T>, x += static_cast<T>(LANES<T>))
    store(out + i, interpolate<T, DIMS>(source, taps_at<PADDING, T, DIMS>(source, course, x), unused));
}

// The way back for the gradient of a row: into target (same margin, or null) and, where source is not null, sums for take of the N terms that
// terms(v, dx, gradients by the coordinates) makes.
template <WarpAffinePadding PADDING, class T, int DIMS, int N, class Terms, class Take>
PK_INLINE void sample_row_back(const Source<T, DIMS>& source, const Source<T, DIMS>& target, const Course<T, DIMS>& course, int64_t W,
                               const T* grad, const Terms& terms, const Take& take) {
  const auto step = [&](int64_t i, Vec<T>(&v)[N]) {
    const Vec<T> dx = __builtin_convertvector(lane_numbers<T>(), Vec<T>) + (static_cast<T>(i) - course.center), g = load(grad + i);
    const Spot<T, DIMS> taps = taps_at<PADDING, T, DIMS>(source, course, dx);
    if (source.origin) {
      Vec<T> slope[DIMS];
      interpolate<T, DIMS>(source, taps, slope);
      for (int axis = 0; axis < DIMS; ++axis) slope[axis] *= g * taps.slope[axis];
      terms(v, dx, slope);
    } else {
      for (Vec<T>& value : v) value = Vec<T>{};
    }
    if (target.origin) scatter<T, DIMS>(target, taps, g, std::min<int64_t>(LANES<T>, W - i));
  };
  sum_over_row<T, N>(0, W, step, take);
}

}  // namespace
