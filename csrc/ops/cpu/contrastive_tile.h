// SPDX-License-Identifier: MIT
// What the forward and the backward kernel of the contrastive losses share: products in registers, packed panels, and the classes in a strip.
//
// Rows of the problem (x) lie in the lanes, its columns (y) follow one another. A strip is up to two vectors of x. Scores of a strip come out as
// s_yx in units of log 2, less the bound 1 / temperature where there is one: the next step is 2^s. Scores must be the same to the last bit
// whenever they are worked out, forward and backward, as s_yx or as s_xy: of a score of 1e6 the last bit is worth 6 % of its exponential.
// See Scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/cpu_level.h"
#include "common/pieces.h"
#include "common/tile_product.h"
#include "common/transpose.h"
#include "ops/contrastive_schedule.h"

namespace {

using namespace protokernels;

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr int64_t Y_ROWS = 48;   // columns of the problem taken at a time
constexpr int64_t X_ROWS = 128;  // rows of the problem whose gradients are taken at a time
template <class T>
constexpr int64_t STRIP = 2 * LANES<T>;
template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();
template <class T>
constexpr T LEAST = std::numeric_limits<T>::lowest();  // above no score, and still a number
template <class T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
PK_INLINE Index<T> load_index(const Lane<T>* p) {
  Index<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What makes products scores in units of log 2: a factor folded into panels, and one that products are multiplied by at last. Bounded
// scores are small, and all goes into the panels. Others would then depend on which of the two vectors had been scaled, and rounded; a
// power of two rounds nothing.
template <class T>
struct Scale {
  T panels, last;

  static Scale of(const ContrastiveProblem& p) {
    const double all = LOG2_E / p.temperature;
    if (p.bounded) return {static_cast<T>(all), T(1)};
    int exponent = 0;
    const double last = std::frexp(all, &exponent);
    return {static_cast<T>(std::ldexp(1.0, exponent)), static_cast<T>(last)};
  }
};

// The largest score of unit vectors, which exponents are relative to where scores are bounded.
template <class T>
T bound_of(const ContrastiveProblem& p) {
  return static_cast<T>(LOG2_E / p.temperature);
}

// What scores are summed less: near those of a class that has drawn together.
template <class T>
T centre_of(const ContrastiveProblem& p) {
  return p.unit ? bound_of<T>(p) : T(0);
}

// ------------------------------------------------------------------------------------------------------------- products

// How the elements of A in C (+)= A B lie: one row after the other, or one column after the other.
enum class Order { rows, columns };
// What becomes of a product: (start + A B) last, or C + A B, where A B is added up on its own: sums of many parts lose little.
enum class End { scale, add };

// ROWS x VECTORS of C.
// Element (i, k) of A stands at a[i * stride + k] or a[k * stride + i].
template <class T, Order ORDER, End END, int ROWS, int VECTORS>
PK_INLINE void tile(const T* a, int64_t stride, const T* b, int64_t b_stride, int64_t depth, T* c, int64_t c_stride, const T* start,
                    T last) {
  Vec<T> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = END == End::add ? Vec<T>{} : load(start + v * LANES<T>);
  int64_t k = 0;
  do {  // depth is never 0; a loop that might not be entered would move every sum about
    Vec<T> row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * b_stride + v * LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = broadcast(ORDER == Order::rows ? a[i * stride + k] : a[k * stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += x * row[v];
    }
  } while (++k < depth);
  if (END == End::scale && last != T(1)) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] *= last;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      T* const out = c + i * c_stride + v * LANES<T>;
      store(out, END == End::add ? load(out) + sum[i][v] : sum[i][v]);
    }
}

template <class T, Order ORDER, End END, int VECTORS, int ROWS = MOST_ROWS>
PK_INLINE void tiles(int64_t rows, int64_t count, const T* a, int64_t stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                     int64_t c_stride, const T* start, T last) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      for (int64_t t = 0; t < count; ++t)
        tile<T, ORDER, END, ROWS, VECTORS>(a + t * ROWS * (ORDER == Order::rows ? stride : 1), stride, b, b_stride, depth,
                                           c + t * ROWS * c_stride, c_stride, start, last);
    else
      tiles<T, ORDER, END, VECTORS, ROWS - 1>(rows, count, a, stride, b, b_stride, depth, c, c_stride, start, last);
  }
}

// Any number of rows, in tiles as equal as possible.
template <class T, Order ORDER, End END, int VECTORS>
__attribute__((noinline)) void product(int64_t rows, const T* a, int64_t stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                                       int64_t c_stride, const T* start, T last) {
  if (rows == 0) return;
  const int64_t count = (rows + MOST_ROWS - 1) / MOST_ROWS, small = rows / count, large = rows % count;
  tiles<T, ORDER, END, VECTORS>(small + 1, large, a, stride, b, b_stride, depth, c, c_stride, start, last);
  const int64_t done = large * (small + 1);
  tiles<T, ORDER, END, VECTORS>(small, count - large, a + done * (ORDER == Order::rows ? stride : 1), stride, b, b_stride, depth,
                                c + done * c_stride, c_stride, start, last);
}

// Scores of a strip: rows of A with a panel, times the last factor. Not inlined: this product must not melt into a difference that follows.
template <class T, int VECTORS>
PK_INLINE void multiply_strip(int64_t rows, const T* a, int64_t stride, const T* panel, int64_t depth, T* c, int64_t c_stride,
                              const T* start, T last) {
  product<T, Order::rows, End::scale, VECTORS>(rows, a, stride, panel, VECTORS * LANES<T>, depth, c, c_stride, start, last);
}

// --------------------------------------------------------------------------------------------------------------- panels

// Vectors [R, Cp] transposed, times scale: strip after strip of up to STRIP rows, each [C, its padded rows]; padding is 0.
template <class T>
void pack_strips(const T* vectors, int64_t rows, int64_t C, int64_t Cp, T scale, T* panels) {
  constexpr int64_t lanes = LANES<T>;
  const int64_t padded = round_up(rows, lanes);
  for (int64_t begin = 0; begin < padded; begin += STRIP<T>) {
    const int64_t width = std::min<int64_t>(STRIP<T>, padded - begin);
    T* const panel = panels + begin * C;
    for (int64_t half = 0; half < width; half += lanes)
      for (int64_t c = 0; c < C; c += lanes) {
        Vec<T> square[lanes];
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          const int64_t row = begin + half + r;
          square[r] = row < rows ? load(vectors + row * Cp + c) * scale : Vec<T>{};
        }
        transpose<T>(square);
        const int64_t count = std::min<int64_t>(lanes, C - c);
        if (count == lanes) {
#pragma GCC unroll 16
          for (int64_t j = 0; j < lanes; ++j) store(panel + (c + j) * width + half, square[j]);
        } else {
          for (int64_t j = 0; j < count; ++j) store(panel + (c + j) * width + half, square[j]);
        }
      }
  }
}

// Columns of vectors [rows, Cp] by twos of vectors: panel after panel [rows, its width], so that a product reads one line after the other.
template <class T>
void pack_columns(const T* vectors, int64_t rows, int64_t Cp, T* panels) {
  for (int64_t c = 0; c < Cp; c += STRIP<T>) {
    const int64_t width = std::min<int64_t>(STRIP<T>, Cp - c);
    T* const panel = panels + c * rows;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < width; v += LANES<T>) store(panel + r * width + v, load(vectors + r * Cp + c + v));
  }
}

// Vectors whose columns lie in panels: packed, or as they are if one panel holds them all.
template <class T>
struct Columns {
  const T* data;
  int64_t rows;  // of the packing

  static Columns of(const T* vectors, int64_t rows, int64_t Cp, T* room) {
    if (Cp <= STRIP<T>) return {vectors, rows};
    pack_columns(vectors, rows, Cp, room);
    return {room, rows};
  }
};

// C [a_rows, Cp] += A V, with row k of A's depth meeting vector first + k.
template <class T, Order ORDER>
PK_INLINE void accumulate(int64_t a_rows, const T* a, int64_t stride, const Columns<T>& vectors, int64_t first, int64_t depth, int64_t Cp,
                          T* c) {
  for (int64_t begin = 0; begin < Cp; begin += STRIP<T>) {
    const int64_t width = std::min<int64_t>(STRIP<T>, Cp - begin);
    const T* const b = vectors.data + begin * vectors.rows + first * width;
    if (width == STRIP<T>)
      product<T, ORDER, End::add, 2>(a_rows, a, stride, b, width, depth, c + begin, Cp, nullptr, T(1));
    else
      product<T, ORDER, End::add, 1>(a_rows, a, stride, b, width, depth, c + begin, Cp, nullptr, T(1));
  }
}

// --------------------------------------------------------------------------------------------------------------- classes

enum class Meeting { none, other, same, mixed };  // what some columns are to all rows of a strip

// Where the classes of a strip's rows lie among the columns: some row's class is in [any_begin, any_end), all of them have [all_begin, all_end),
// and rows themselves are in [self_begin, self_end).
struct Strip {
  int32_t begin, count;  // rows, counted within the block; without padding
  int32_t any_begin, all_begin, all_end, any_end, self_begin, self_end;
};

// Rows of a block: ranges in lanes, padding belongs to no class.
template <class T>
struct Rows {
  Lane<T>*class_begin, *class_end, *self, *number;
  Strip* strips;
  T* start;  // what scores begin with: minus the bound, -infinity for padding, whose exponential is then 0
  int64_t count, padded, strip_count;

  static Rows take(int64_t most, Arena& arena) {
    Rows rows{};
    const int64_t padded = round_up(most, STRIP<T>);
    rows.class_begin = arena.take<Lane<T>>(padded), rows.class_end = arena.take<Lane<T>>(padded);
    rows.self = arena.take<Lane<T>>(padded), rows.number = arena.take<Lane<T>>(padded);
    rows.strips = arena.take<Strip>(padded / STRIP<T>);
    rows.start = arena.take<T>(padded);
    return rows;
  }

  int64_t vectors(int64_t strip) const { return strips[strip].count > LANES<T> ? 2 : 1; }

  // In a triangle a row is met by the columns after it, and its own number takes the place of self.
  void read(const ContrastivePart& part, const ContrastiveRange* ranges, T bound) {
    constexpr int32_t least = std::numeric_limits<int32_t>::min(), most = std::numeric_limits<int32_t>::max() - 1;
    count = part.x_end - part.x_begin;
    strip_count = (count + STRIP<T> - 1) / STRIP<T>;
    for (int64_t n = 0; n < strip_count; ++n) {
      const int64_t begin = n * STRIP<T>, end = begin + STRIP<T>;
      Strip s{static_cast<int32_t>(begin), static_cast<int32_t>(std::min(count - begin, STRIP<T>)), most, least, most, least, most, least};
      for (int64_t x = begin; x < end; ++x) {
        const bool there = x < count;
        const ContrastiveRange r = there ? ranges[part.x_begin + x] : ContrastiveRange{most, least, -1};
        class_begin[x] = r.class_begin, class_end[x] = r.class_end;
        self[x] = r.self, number[x] = static_cast<Lane<T>>(part.x_begin + x);
        start[x] = there ? -bound : -INFINITE<T>;
        s.all_begin = std::max(s.all_begin, r.class_begin), s.all_end = std::min(s.all_end, r.class_end);
        if (!there) continue;
        s.any_begin = std::min(s.any_begin, r.class_begin), s.any_end = std::max(s.any_end, r.class_end);
        if (r.self >= 0) s.self_begin = std::min(s.self_begin, r.self), s.self_end = std::max(s.self_end, r.self + 1);
      }
      if (part.triangle) s.self_begin = part.x_begin + s.begin, s.self_end = s.self_begin + s.count;
      strips[n] = s;
    }
  }
};

PK_INLINE Meeting meeting(const Strip& s, int32_t y, bool triangle) {
  if (triangle && y <= s.self_begin) return Meeting::none;
  if (y >= s.self_begin && y < s.self_end) return Meeting::mixed;
  if (y < s.any_begin || y >= s.any_end) return Meeting::other;
  return y >= s.all_begin && y < s.all_end ? Meeting::same : Meeting::mixed;
}

// Calls visit(meeting, begin, end) for stretches of columns [begin, end) that are the same thing to the whole strip.
template <class Visit>
PK_INLINE void for_meetings(const Strip& s, int32_t begin, int32_t end, bool triangle, const Visit& visit) {
  while (begin < end) {
    int32_t next = end;
    for (const int32_t edge : {s.any_begin, s.all_begin, s.all_end, s.any_end, s.self_begin, s.self_begin + 1, s.self_end})
      if (edge > begin) next = std::min(next, edge);
    visit(meeting(s, begin, triangle), begin, next);
    begin = next;
  }
}

template <class T>
struct Masks {
  Index<T> same, other;
};

// Which rows in the vector from x on have column y in their class, and which have it among the others.
template <class T>
PK_INLINE Masks<T> masks(const Rows<T>& rows, int64_t x, int32_t y, bool triangle) {
  const Index<T> column = Index<T>{} + static_cast<Lane<T>>(y);
  const Index<T> in_class = (load_index<T>(rows.class_begin + x) <= column) & (load_index<T>(rows.class_end + x) > column);
  const Index<T> met = triangle ? load_index<T>(rows.number + x) < column : load_index<T>(rows.self + x) != column;
  return {in_class & met, ~in_class & met};
}

template <class T>
PK_INLINE Vec<T> keep(Index<T> mask, Vec<T> value, T otherwise) {
  return mask ? value : broadcast(otherwise);
}

}  // namespace
