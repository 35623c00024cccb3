// SPDX-License-Identifier: MIT
// Vectors whose channels lie in planes, out of x and gradients back into it; and where a vector lies in x, which those with their channels beside
// each other need, too.
//
// LANES vectors go together, as squares transposed in registers. With row_at they go in the order of the map: its planes are read and written by the
// vector, and the rows, which are sorted by class, are whole lines wherever they lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/rows.h"
#include "common/tile_product.h"
#include "common/transpose.h"
#include "ops/contrastive.h"

namespace {

using namespace protokernels;

// Half precision as a number of its own, so that conversions read like any other.
struct Bf16 {
  uint16_t bits;
  operator float() const { return from_bf16(bits); }
  static Bf16 of(float x) { return {to_bf16(x)}; }
};

template <class E, class T>
PK_INLINE E converted(T x) {
  if constexpr (std::is_same_v<E, Bf16>)
    return Bf16::of(static_cast<float>(x));
  else
    return static_cast<E>(x);
}

// From the vectors at work to those that memory is asked for: planes and sorted rows are read across, which it does not see coming.
constexpr int64_t AHEAD = 32;

// Where a row lies in x. Rows in turn mostly come from the same map, which spares a division.
struct Finder {
  const ContrastivePack& p;
  int64_t begin = 0, end = 0, base = 0;  // places of the map, and what to add to their offset in it

  explicit Finder(const ContrastivePack& pack) : p(pack) {}
  PK_MEMBER int64_t offset(int64_t row) {
    const int64_t place = p.order[row];
    if (place < begin || place >= end) {
      const int64_t n = place / p.P;
      begin = n * p.P, end = begin + p.P, base = n * p.stride_n;
    }
    return base + (place - begin) * p.stride_p;
  }
};

// Where LANES rows lie in x; those past the end repeat the last one.
template <class T>
struct Places {
  int64_t offset[LANES<T>];
  int64_t count;

  Places(Finder& finder, int64_t row, int64_t last) : count(std::min<int64_t>(LANES<T>, last - row)) {
    for (int64_t r = 0; r < LANES<T>; ++r) offset[r] = finder.offset(row + std::min(r, count - 1));
  }
};

// Up to LANES positions of one map, beside each other in every plane, and their rows.
template <class T>
struct Stretch {
  int64_t base, count;  // base: where the first lies in x
  const int32_t* rows;

  Stretch(const ContrastivePack& p, int64_t position, int64_t last) {
    const int64_t n = position / p.P, place = position - n * p.P;
    base = n * p.stride_n + place * p.stride_p, count = std::min({static_cast<int64_t>(LANES<T>), p.P - place, last - position});
    rows = p.row_at + position;
  }
};

// --------------------------------------------------------------------------------------------------- channels in planes

// LANES rows, one in each lane: [Cp, LANES].
template <class T>
struct Lanes {
  std::vector<T> memory;
  T* data;

  explicit Lanes(int64_t Cp) : memory(static_cast<size_t>((Cp + 1) * LANES<T>)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (VECTOR_BYTES - address % VECTOR_BYTES) % VECTOR_BYTES / sizeof(T);
  }
  PK_MEMBER T* at(int64_t c) { return data + c * LANES<T>; }
};

template <class T, class E, int... LANE>
PK_INLINE Vec<T> gather(const E* x, const int64_t* offset, std::integer_sequence<int, LANE...>) {
  return Vec<T>{static_cast<T>(x[offset[LANE]])...};
}

template <class T, class E>
PK_INLINE void read_lanes(const E* x, const ContrastivePack& p, const Places<T>& places, Lanes<T>& lanes) {
  for (int64_t c = 0; c < p.C; ++c)
    store(lanes.at(c), gather<T>(x + c * p.stride_c, places.offset, std::make_integer_sequence<int, LANES<T>>{}));
}

// Not inlined: GCC would unroll it into scalar square roots.
__attribute__((noinline)) void take_roots(const double* squared, int64_t count, double* root) {
  for (int64_t l = 0; l < count; ++l) root[l] = std::sqrt(squared[l]);
}

// Divides by the lengths: exactly where it can be, so that a vector of one channel becomes 1 or -1 and its gradient 0. norm [LANES] are the divisors,
// infinite where a vector counts as zero.
template <class T>
PK_INLINE void normalise(Lanes<T>& lanes, int64_t C, int64_t Cp, T* norm) {
  constexpr double floor = CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
  constexpr int64_t halves = LANES<T> / LANES<double>;
  Vec<double> sum[4][halves]{};
  for (int64_t c = 0; c < Cp; c += 4)
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k)
#pragma GCC unroll 2
      for (int64_t h = 0; h < halves; ++h) {
        const Vec<double> x = load_double(lanes.at(c + k) + h * LANES<double>);
        sum[k][h] += x * x;
      }
  double squared[LANES<T>], length[LANES<T>];
  for (int64_t h = 0; h < halves; ++h) store(squared + h * LANES<double>, (sum[0][h] + sum[1][h]) + (sum[2][h] + sum[3][h]));
  take_roots(squared, LANES<T>, length);
  bool ordinary = true;
  for (int64_t l = 0; l < LANES<T>; ++l) {
    norm[l] = squared[l] <= floor ? std::numeric_limits<T>::infinity() : static_cast<T>(length[l]);
    ordinary &= length[l] < std::numeric_limits<T>::max();
  }
  if (ordinary) {
    const Vec<T> divisor = load(norm);
    for (int64_t c = 0; c < C; ++c) store(lanes.at(c), load(lanes.at(c)) / divisor);
  } else {  // one is longer than T can say, or not a number; the others are what they are without it
    for (int64_t l = 0; l < LANES<T>; ++l) {
      const bool usual = length[l] < std::numeric_limits<T>::max();
      for (int64_t c = 0; c < C; ++c) {
        T& x = lanes.at(c)[l];
        x = usual ? x / norm[l] : static_cast<T>(x / length[l]);
      }
    }
  }
}

// Calls write(lane, channel, vector) for the parts of all rows that are in lanes.
template <class T, class Write>
PK_INLINE void rows_of(Lanes<T>& lanes, int64_t Cp, int64_t count, const Write& write) {
  for (int64_t c = 0; c < Cp; c += LANES<T>) {
    Vec<T> square[LANES<T>];
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES<T>; ++j) square[j] = load(lanes.at(c + j));
    transpose<T>(square);
    if (count == LANES<T>) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < LANES<T>; ++r) write(r, c, square[r]);
    } else {
      for (int64_t r = 0; r < count; ++r) write(r, c, square[r]);
    }
  }
}

template <class T, class E>
void pack_planes(const ContrastivePack& p, int64_t first, int64_t last) {
  const E* const x = static_cast<const E*>(p.x);
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  Finder finder(p), ahead_finder(p);
  Lanes<T> lanes(p.Cp);
  T norm[LANES<T>];
  std::fill(norm, norm + LANES<T>, T(1));
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(finder, row, last);
    if (row + AHEAD < last) {
      const E* const ahead = x + ahead_finder.offset(row + AHEAD);
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(ahead + c * p.stride_c);
    }
    read_lanes(x, p, places, lanes);
    if (p.normalize) normalise(lanes, p.C, p.Cp, norm);
    std::copy(norm, norm + places.count, norms + row);
    rows_of(lanes, p.Cp, places.count, [&](int64_t r, int64_t c, Vec<T> v) { store(packed + (row + r) * p.Cp + c, v); });
  }
}

// The first `count` lanes, converted; of those behind them nothing is read or written.
template <class T, class E>
PK_INLINE Vec<T> load_first(const E* x, int64_t count) {
  if (std::is_same_v<T, E> && count == LANES<T>) return load(reinterpret_cast<const T*>(x));
  T lane[LANES<T>]{};
  if (count == LANES<T>)
    for (int64_t l = 0; l < LANES<T>; ++l) lane[l] = static_cast<T>(x[l]);
  else
    for (int64_t l = 0; l < count; ++l) lane[l] = static_cast<T>(x[l]);
  return load(lane);
}

template <class T, class E>
PK_INLINE void store_first(E* x, int64_t count, Vec<T> v) {
  if (std::is_same_v<T, E> && count == LANES<T>) return store(reinterpret_cast<T*>(x), v);
  E lane[LANES<T>];
  for (int64_t l = 0; l < LANES<T>; ++l) lane[l] = converted<E>(v[l]);
  std::memcpy(static_cast<void*>(x), lane, static_cast<size_t>(count) * sizeof(E));
}

template <class T, class E>
void pack_map(const ContrastivePack& p, int64_t first, int64_t last) {
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  Lanes<T> lanes(p.Cp);
  T norm[LANES<T>];
  std::fill(norm, norm + LANES<T>, T(1));
  for (int64_t position = first; position < last;) {
    const Stretch<T> at(p, position, last);
    position += at.count;
    const E* const x = static_cast<const E*>(p.x) + at.base;
    if (position + AHEAD < last)
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(x + c * p.stride_c + AHEAD);
    for (int64_t c = 0; c < p.C; ++c) store(lanes.at(c), load_first<T>(x + c * p.stride_c, at.count));
    if (p.normalize) normalise(lanes, p.C, p.Cp, norm);
    for (int64_t l = 0; l < at.count; ++l)
      if (at.rows[l] >= 0) norms[at.rows[l]] = norm[l];
    rows_of(lanes, p.Cp, at.count, [&](int64_t r, int64_t c, Vec<T> v) {
      if (at.rows[r] >= 0) store(packed + at.rows[r] * p.Cp + c, v);
    });
  }
}

// The rows at row(0), row(1), ..., [Cp] each, into lanes.
template <class T, class Row>
PK_INLINE void transpose_rows(const Row& row, int64_t Cp, Lanes<T>& lanes) {
  for (int64_t c = 0; c < Cp; c += LANES<T>) {
    Vec<T> square[LANES<T>];
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES<T>; ++r) square[r] = load(row(r) + c);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES<T>; ++j) store(lanes.at(c + j), square[j]);
  }
}

// Gradients of unit vectors f in lanes become those of what they were divided by.
template <class T>
PK_INLINE void through_division(Lanes<T>& grad, Lanes<T>& f, const T* norm, int64_t C, int64_t Cp) {
  Vec<T> along[4]{};
  for (int64_t c = 0; c < Cp; c += 4)
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) along[k] += load(f.at(c + k)) * load(grad.at(c + k));
  const Vec<T> total = (along[0] + along[1]) + (along[2] + along[3]), scale = T(1) / load(norm);
  for (int64_t c = 0; c < C; ++c) store(grad.at(c), (load(grad.at(c)) - load(f.at(c)) * total) * scale);
}

template <class T, class E>
void unpack_planes(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  const T *const all = static_cast<const T*>(p.grad_packed), *const vectors = static_cast<const T*>(p.packed);
  E* const x = static_cast<E*>(p.grad_x);
  Finder finder(p), ahead_finder(p);
  Lanes<T> grad(p.Cp), f(p.Cp);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(finder, row, last);
    const auto row_of = [&](int64_t r) { return row + std::min(r, places.count - 1); };
    if (row + AHEAD < last) {
      const E* const ahead = x + ahead_finder.offset(row + AHEAD);
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(ahead + c * p.stride_c, 1);
    }
    transpose_rows([&](int64_t r) { return all + row_of(r) * p.Cp; }, p.Cp, grad);
    if (p.normalize) {
      transpose_rows([&](int64_t r) { return vectors + row_of(r) * p.Cp; }, p.Cp, f);
      T norm[LANES<T>];
      for (int64_t l = 0; l < LANES<T>; ++l) norm[l] = static_cast<const T*>(p.norms)[row_of(l)];
      through_division(grad, f, norm, p.C, p.Cp);
    }
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t r = 0; r < places.count; ++r) x[places.offset[r] + c * p.stride_c] = converted<E>(grad.at(c)[r]);
  }
}

template <class T, class E>
void unpack_map(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  const T *const all = static_cast<const T*>(p.grad_packed), *const vectors = static_cast<const T*>(p.packed);
  const std::vector<T> nothing(static_cast<size_t>(p.Cp));
  Lanes<T> grad(p.Cp), f(p.Cp);
  for (int64_t position = first; position < last;) {
    const Stretch<T> at(p, position, last);
    position += at.count;
    const T *rows[LANES<T>], *units[LANES<T>];
    T norm[LANES<T>];
    for (int64_t r = 0; r < LANES<T>; ++r) {
      const int64_t row = at.rows[std::min(r, at.count - 1)];
      rows[r] = row < 0 ? nothing.data() : all + row * p.Cp, units[r] = row < 0 ? nothing.data() : vectors + row * p.Cp;
      norm[r] = row < 0 ? T(1) : static_cast<const T*>(p.norms)[row];
    }
    if (position + AHEAD < last)
      for (int64_t r = 0; r < LANES<T>; ++r) {
        const int64_t ahead = p.row_at[position + AHEAD - LANES<T> + r];
        __builtin_prefetch(all + ahead * p.Cp), __builtin_prefetch(vectors + ahead * p.Cp);
      }
    transpose_rows([&](int64_t r) { return rows[r]; }, p.Cp, grad);
    if (p.normalize) {
      transpose_rows([&](int64_t r) { return units[r]; }, p.Cp, f);
      through_division(grad, f, norm, p.C, p.Cp);
    }
    E* const x = static_cast<E*>(p.grad_x) + at.base;
    for (int64_t c = 0; c < p.C; ++c) store_first<T>(x + c * p.stride_c, at.count, load(grad.at(c)));
  }
}

}  // namespace
