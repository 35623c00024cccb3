// SPDX-License-Identifier: MIT
// Nearest on the CPU, what the filter works on: rows of the bank, queries, and what is known of a query's neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/rows.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "common/transpose.h"
#include "ops/nearest.h"

namespace {

using namespace protokernels;

template <class T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // of Index<T>
template <class T>
constexpr int WIDTH = 2 * LANES<T>;  // queries of a panel
constexpr int64_t TILE_BYTES = 128 << 10;
constexpr int64_t DEPTH = 256;  // columns at a time: that much of a panel stays in the first-level cache
constexpr int64_t FIRST_ROWS = 128 / MOST_ROWS * MOST_ROWS;
constexpr int64_t LISTED = 16;  // k up to which the smallest stand in a sorted list; more are gathered, and now and then selected from
constexpr int64_t MOST_FILTERED = 1 << 14;  // k; the candidates of a panel of queries would take more than 25 MB

template <class T>
double error_factor(int64_t D) {  // c of ops/nearest.h
  const double depth = static_cast<double>(D);
  return 1.01 * (std::numeric_limits<T>::epsilon() / 2 * (depth + 10) + 0x1p-53 * (2 * depth + 8));
}

// Squares beyond it are not trusted. A unit vector has none.
template <class T>
double most_square(bool cosine) {
  return cosine ? std::numeric_limits<double>::max() : static_cast<double>(std::numeric_limits<T>::max()) / 16;
}

// No less than x.
template <class T>
T rounded_up(double x) {
  const T y = static_cast<T>(x);
  return static_cast<double>(y) < x ? std::nextafter(y, std::numeric_limits<T>::infinity()) : y;
}

// A bit for every lane with x <= y.
template <class T>
PK_INLINE unsigned lanes_not_above(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_cmpps512_mask(x, y, 18, -1, 4);  // 18: <=, false for NaN, quiet
  else
    return __builtin_ia32_cmppd512_mask(x, y, 18, -1, 4);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<unsigned>(__builtin_ia32_movmskps256((Vec<float>)(x <= y)));
  else
    return static_cast<unsigned>(__builtin_ia32_movmskpd256((Vec<double>)(x <= y)));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < LANES<T>; ++lane) bits |= static_cast<unsigned>(x[lane] <= y[lane]) << lane;
  return bits;
#endif
}

template <class T>
PK_INLINE Vec<T> smaller(Vec<T> x, Vec<T> y) {  // of numbers that are none of them NaN
  if constexpr (sizeof(T) == 4) return at_most(x, y);
  return x < y ? x : y;
}

template <class T>
PK_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
  if constexpr (sizeof(T) == 4) return at_least(x, y);
  return x > y ? x : y;
}

// Numbers in the order of integers.
template <class T>
PK_INLINE int64_t key_of(T x) {
  Lane<T> bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits ^ (bits >> (8 * sizeof(T) - 1) & std::numeric_limits<Lane<T>>::max());
}
template <class T>
PK_INLINE T number_of(int64_t key) {
  const Lane<T> ordered = static_cast<Lane<T>>(key),
                bits = ordered ^ (ordered >> (8 * sizeof(T) - 1) & std::numeric_limits<Lane<T>>::max());
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A number that no fewer than k of count numbers reach up to, and no more unless some are equal. Those behind them, up to whole vectors, become
// infinite. By bisection, without a branch that anybody had to guess: a dozen passes over a few vectors.
template <class T>
T bound_of_smallest(T* x, int64_t count, int64_t k) {
  const int64_t whole = round_up(count, LANES<T>);
  std::fill(x + count, x + whole, std::numeric_limits<T>::infinity());
  Vec<T> least = load(x), most = broadcast(x[0]);
  for (int64_t i = 0; i < whole; i += LANES<T>) {
    const Vec<T> v = load(x + i);
    least = smaller<T>(v, least);
    most = larger<T>(v < std::numeric_limits<T>::infinity() ? v : least, most);
  }
  int64_t below = key_of(reduce_min(least)) - 1, above = key_of(reduce_max(most));
  while (below < above - 1) {
    const int64_t middle = (below & above) + ((below ^ above) >> 1);  // their mean, whose sum might overflow
    const Vec<T> bound = broadcast(number_of<T>(middle));
    int reached = 0;
    for (int64_t i = 0; i < whole; i += LANES<T>) reached += __builtin_popcount(lanes_not_above<T>(load(x + i), bound));
    (reached < k ? below : above) = middle;
    if (reached == k) break;
  }
  return number_of<T>(above);
}

template <class T>
struct Candidate {
  T low;        // s - e_b
  int32_t row;  // of the part
};

// Rows of the bank as the filter wants them.
template <class T>
struct Tile {
  Tile(const NearestProblem& problem, const T* center_)
      : p(problem),
        center(center_),
        stride(round_up(problem.D, LANES<T>) + LANES<T>),  // rows a power of two apart would fall on the same lines of the cache
        most(std::clamp<int64_t>(TILE_BYTES / static_cast<int64_t>(stride * sizeof(T)) / MOST_ROWS, 1, 64) * MOST_ROWS),
        rows(most * stride),
        low(most),
        width(most),
        partial((problem.D > DEPTH ? most : FIRST_ROWS) * WIDTH<T>),
        factor(error_factor<T>(problem.D)) {}

  // Rows first..first + count of the bank; false if one is too long for T. Rows that hold no finite numbers are never candidates.
  bool fill(int64_t first, int64_t count) {
    bool trusted = true;
    for (int64_t i = 0; i < round_up(count, MOST_ROWS); ++i) {
      T* const row = rows.data + i * stride;
      const double square = i < count ? read(p.bank, p.bank_kind, (first + i) * p.bank_stride, row) : double(NAN);
      low.data[i] = std::numeric_limits<T>::infinity();
      width.data[i] = 0;
      if (!std::isfinite(square)) {
        if (i < count && holds_numbers(first + i, row)) trusted = false;
        for (int64_t j = 0; j < p.D; ++j) row[j] = 0;
        continue;
      }
      if (p.cosine && is_nearly_zero(square) && square > 0.999 * NEAREST_NORM_FLOOR * NEAREST_NORM_FLOOR) trusted = false;
      if (square > most_square<T>(p.cosine)) trusted = false;
      const double error = 2 * factor * (p.cosine ? 1.0 : square);
      low.data[i] = static_cast<T>((p.cosine ? 0.0 : square) - error);
      width.data[i] = rounded_up<T>(2 * error);
    }
    return trusted;
  }

  // Whether a row holds finite numbers only: then it is its square that is too large.
  bool holds_numbers(int64_t index, T* row) const {
    read_row(p.bank, p.bank_kind, index * p.bank_stride, row, p.D);
    bool finite = true;
    for (int64_t j = 0; j < p.D; ++j) finite &= std::isfinite(row[j]);
    return finite;
  }

  // Whether a vector with this squared norm counts as zero, or may do so in another order of summation.
  static bool is_nearly_zero(double square) { return square <= 1.001 * NEAREST_NORM_FLOOR * NEAREST_NORM_FLOOR; }

  // A row moved to the center and scaled, or made a unit vector; returns its squared norm before the latter.
  double read(const void* base, Kind kind, int64_t offset, T* row) const {
    read_row(base, kind, offset, row, p.D);
    if (!p.cosine) {
      const T scale = center[p.D];
      for (int64_t j = 0; j < p.D; ++j) row[j] = (row[j] - center[j]) * scale;
      return squared_norm(row, p.D);
    }
    const double square = squared_norm(row, p.D);
    const double scale = square <= NEAREST_NORM_FLOOR * NEAREST_NORM_FLOOR ? 0.0 : 1.0 / std::sqrt(square);
    for (int64_t j = 0; j < p.D; ++j) row[j] = static_cast<T>(row[j] * scale);
    return square;
  }

  const NearestProblem& p;
  const T* center;
  const int64_t stride, most;
  Scratch<T> rows, low, width;
  Scratch<T> partial;  // scores of the columns so far, or of the first rows
  const double factor;
};

// A block of queries: panels [panel, D, WIDTH] of -2 q, and what is known of their neighbours.
template <class T>
struct Block {
  Block(const NearestProblem& problem, int64_t block)
      : p(problem),
        capacity(problem.k == 1 ? 0 : nearest_capacity(problem.k)),
        padded(round_up(block, WIDTH<T>)),
        stride(round_up(problem.D, LANES<T>)),
        rows(WIDTH<T> * stride),
        panels(padded * problem.D),
        margin(padded),
        limit(padded),
        second(padded),
        height(padded),
        trusted(padded),
        counts(padded),
        due(padded),
        nearest(padded),
        candidates(padded * capacity),
        height_stride(problem.k == 1        ? 0
                      : problem.k <= LISTED ? problem.k
                                            : round_up(capacity, LANES<T>)),
        heights(padded * height_stride) {}

  void begin(int64_t first, int64_t count, const Tile<T>& tile) {
    constexpr T infinity = std::numeric_limits<T>::infinity(), most = std::numeric_limits<T>::max();
    for (int64_t i = 0; i < padded; ++i) {
      T* const row = rows.data + i % WIDTH<T> * stride;
      const double square = i < count ? tile.read(p.queries, p.queries_kind, (first + i) * p.queries_stride, row) : double(NAN);
      trusted.data[i] =
          square <= most_square<T>(p.cosine) && !(p.cosine && tile.is_nearly_zero(square));  // everything is at distance 1 from zero
      counts.data[i] = 0;
      due.data[i] = static_cast<int32_t>(std::min(capacity, 2 * p.k));
      limit.data[i] = trusted.data[i] ? most : -infinity;  // the latter lets nothing in
      second.data[i] = height.data[i] = infinity;
      margin.data[i] = 4 * tile.factor * (p.cosine ? 1.0 : square) + 8 * (static_cast<double>(p.D) + 8) * std::numeric_limits<T>::min();
      for (int64_t j = 0; j < (trusted.data[i] ? 0 : p.D); ++j) row[j] = 0;
      if (i % WIDTH<T> == WIDTH<T> - 1) pack(panels.data + (i - i % WIDTH<T>)*p.D);
    }
    if (p.k > 1 && p.k <= LISTED) std::fill(heights.data, heights.data + padded * p.k, infinity);
  }

  // -2 times the WIDTH rows, transposed.
  void pack(T* panel) const {
    constexpr int lanes = LANES<T>;
    for (int64_t j = 0; j < p.D; j += lanes)
      for (int half = 0; half < 2; ++half) {
        Vec<T> square[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(rows.data + (half * lanes + i) * stride + j) * T(-2);
        transpose<T>(square);
        const int columns = static_cast<int>(std::min<int64_t>(lanes, p.D - j));
        for (int i = 0; i < columns; ++i) store(panel + (j + i) * WIDTH<T> + half * lanes, square[i]);
      }
  }

  void distrust(int64_t query) {
    trusted.data[query] = false;
    limit.data[query] = -std::numeric_limits<T>::infinity();
  }

  // The smallest k of s + 2 e_b, in order, step apart, and the limit they give.
  void begin_list(int64_t query, const T* smallest, int64_t step) {
    T* const own = heights.data + query * p.k;
    for (int64_t i = 0; i < p.k; ++i) own[i] = smallest[i * step];
    if (trusted.data[query] && own[p.k - 1] < std::numeric_limits<T>::infinity())
      limit.data[query] = rounded_up<T>(static_cast<double>(own[p.k - 1]) + margin.data[query]);
  }

  // Takes a row with s <= limit; the smallest k of s + 2 e_b, in order, give the next limit.
  void push(int64_t query, T s, T width, int32_t row) {
    T* const own = heights.data + query * p.k;
    const T high = s + width;
    if (high < own[p.k - 1]) {
      int64_t place = p.k - 1;
      for (; place > 0 && own[place - 1] > high; --place) own[place] = own[place - 1];
      own[place] = high;
      if (own[p.k - 1] < std::numeric_limits<T>::infinity())
        limit.data[query] = rounded_up<T>(static_cast<double>(own[p.k - 1]) + margin.data[query]);
    }
    take(query, s, row);
  }

  // The same for many: the limit stays until k more rows have come, which lets half as many again in and saves the order of the list.
  PK_MEMBER void gather(int64_t query, T s, T width, int32_t row) {
    const int32_t place = counts.data[query]++;
    candidates.data[query * capacity + place] = {s, row};
    heights.data[query * height_stride + place] = s + width;
    if (place + 1 == due.data[query]) select(query);
  }

  // The limit that k of the candidates give, and the candidates that may still be among the nearest k.
  __attribute__((noinline)) void select(int64_t query) {
    T* const own = heights.data + query * height_stride;
    limit.data[query] = rounded_up<T>(static_cast<double>(bound_of_smallest(own, counts.data[query], p.k)) + margin.data[query]);
    Candidate<T>* const rows_of = candidates.data + query * capacity;
    const T most = limit.data[query];
    int32_t kept = 0;
    for (int32_t i = 0; i < counts.data[query]; ++i) {
      rows_of[kept] = rows_of[i], own[kept] = own[i];
      kept += rows_of[i].low <= most;
    }
    counts.data[query] = kept;
    due.data[query] = static_cast<int32_t>(std::min(capacity, kept + p.k));
    if (kept > capacity * 3 / 4) distrust(query);  // too many rows too close to each other
  }

  void take(int64_t query, T s, int32_t row) {
    candidates.data[query * capacity + counts.data[query]++] = {s, row};
    if (counts.data[query] < capacity) return;
    shrink(query);
    if (counts.data[query] > capacity * 3 / 4) distrust(query);  // too many rows too close to each other
  }

  // Leaves the candidates that may still be among the nearest k.
  void shrink(int64_t query) {
    Candidate<T>* const own = candidates.data + query * capacity;
    int32_t kept = 0;
    for (int32_t i = 0; i < counts.data[query]; ++i)
      if (own[i].low <= limit.data[query]) own[kept++] = own[i];
    counts.data[query] = kept;
  }

  const NearestProblem& p;
  const int64_t capacity, padded, stride;
  Scratch<T> rows;  // [WIDTH, stride]
  Scratch<T> panels;
  Scratch<double> margin;  // 2 e_q and underflow
  Scratch<T> limit;        // of s; for k = 1 the smallest s
  Scratch<T> second;       // k = 1: the second smallest s
  Scratch<T> height;       // k = 1: s + 2 e_b of the smallest
  Scratch<bool> trusted;
  Scratch<int32_t> counts;
  Scratch<int32_t> due;      // k > LISTED: the count at which the next limit is selected
  Scratch<Lane<T>> nearest;  // k = 1: the row of the smallest s
  Scratch<Candidate<T>> candidates;
  const int64_t height_stride;
  Scratch<T> heights;  // s + 2 e_b: [padded, k], the smallest in order; or, of more than LISTED, [padded, height_stride], of the candidates
};

}  // namespace
