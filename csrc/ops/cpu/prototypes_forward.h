// SPDX-License-Identifier: MIT
// Prototypes on the CPU, forward: one pass over z in tiles of two vectors of rows, ONE ROW IN EACH LANE.
//
// A tile of z is transposed on the way in, so that all a softmax does along a row (largest score, its number, sum, entropy, drawing a
// label) runs down the lanes of 32 rows at once, without a horizontal operation and without padding K; c is transposed on the way out.
// Nanoseconds a row on one core of a Zen 5 (AVX-512, 262 GFLOP/s) at 32x10 / 64x64 / 128x256; the products alone need 2 / 31 / 250:
//   27 / 72 / 435  rows in memory order, reductions across lanes
//   20 / 83 / 437  one row in each lane: reading across rows waits for memory, which does not see it coming
//   18 / 70 / 415  the next tile's rows are prefetched, square roots by the vector
//   18 / 68 / 380  a large c is streamed past the caches
//   16 / 64 / 353  c is written and members are added up between the products of the next tile
// Products run at 95 % of the peak with 12 x 2 registers; of the rest at 128x256 softmax takes 40, c 30 (memory), members 25, norms 8.
// Tried without gain: prefetching c for writing, two chains for the norms.
#pragma once

#include <limits>

#include "common/exponentials.h"
#include "common/transpose.h"
#include "ops/cpu/prototypes_rows.h"

namespace {

using namespace protokernels;

template <class T>
constexpr int64_t LANE_ROWS = 2 * LANES<T>;  // rows of z at a time
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr double LONG = 0x1p60, SHORTENED = 0x1p-64;  // a vector longer than this is shortened before the product, which might overflow

// ------------------------------------------------------------------------------------------------------------ prototypes

// Groups of at most MOST_ROWS prototypes, as equal as possible: the register tile's rows.
PK_INLINE int64_t group_count(int64_t K) { return (K + MOST_ROWS - 1) / MOST_ROWS; }
PK_INLINE int64_t group_begin(int64_t K, int64_t group) { return group * K / group_count(K); }

// Group after group, each depth-major: element (k, d) of a group of n rows from first stands at first * D + d * n + k - first.
template <class T>
PK_INLINE void pack_groups(const T* rows, int64_t K, int64_t D, T factor, T* groups) {
  for (int64_t g = 0; g < group_count(K); ++g) {
    const int64_t first = group_begin(K, g), n = group_begin(K, g + 1) - first;
    for (int64_t d = 0; d < D; ++d)
      for (int64_t k = 0; k < n; ++k) groups[first * D + d * n + k] = rows[(first + k) * D + d] * factor;
  }
}

template <class T, int ROWS = MOST_ROWS>
PK_INLINE void multiply_group(int64_t rows, const T* group, const T* lanes, int64_t D, T* scores) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      tile_product<T, 2, ROWS>(group, 1, ROWS, lanes, LANE_ROWS<T>, D, scores, LANE_ROWS<T>, false);
    else
      multiply_group<T, ROWS - 1>(rows, group, lanes, D, scores);
  }
}

// ------------------------------------------------------------------------------------------------------------------ rows

// Rows [first, first + count) of z, one in each lane: lanes [D, LANE_ROWS]. The last one is repeated where there are no more.
template <class T>
PK_INLINE void read_lanes(const PrototypesProblem& p, int64_t first, int64_t count, T* converted, T* lanes) {
  const T* row[LANE_ROWS<T>];
  const bool as_is = p.z_kind == kind_of<T>;
  if (!as_is)
    for (int64_t r = 0; r < count; ++r) read_row(p.z, p.z_kind, (first + r) * p.z_stride, converted + r * p.D, p.D);
  for (int64_t r = 0; r < LANE_ROWS<T>; ++r) {
    const int64_t source = std::min(r, count - 1);
    row[r] = as_is ? static_cast<const T*>(p.z) + (first + source) * p.z_stride : converted + source * p.D;
  }
  const int64_t whole = p.D / LANES<T> * LANES<T>;
  for (int64_t half = 0; half < LANE_ROWS<T>; half += LANES<T>) {
    Vec<T> square[LANES<T>];
    for (int64_t d = 0; d < whole; d += LANES<T>) {
#pragma GCC unroll 16
      for (int r = 0; r < LANES<T>; ++r) square[r] = load(row[half + r] + d);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int j = 0; j < LANES<T>; ++j) store(lanes + (d + j) * LANE_ROWS<T> + half, square[j]);
    }
    for (int64_t d = whole; d < p.D; ++d)
      for (int r = 0; r < LANES<T>; ++r) lanes[d * LANE_ROWS<T> + half + r] = row[half + r][d];
  }
}

// 1 / |x| of squared norms, 0 for a vector that counts as zero. Not inlined: GCC would unroll it into scalar square roots.
__attribute__((noinline)) void invert_roots(const double* squared, int64_t count, double* inverse) {
  for (int64_t r = 0; r < count; ++r)
    inverse[r] = squared[r] <= PROTOTYPE_NORM_FLOOR * PROTOTYPE_NORM_FLOOR ? 0.0 : 1.0 / std::sqrt(squared[r]);
}

// What turns similarities of a row into exponents of two: log2(e) / temperature; for cosine also / |z|, or 0 for a zero vector.
template <class T>
PK_INLINE void find_scales(const PrototypesProblem& p, double exponent_scale, T* lanes, T* scale) {
  std::fill(scale, scale + LANE_ROWS<T>, static_cast<T>(exponent_scale));
  if (!p.cosine) return;
  constexpr int vectors = LANE_ROWS<T> / LANES<double>;
  Vec<double> sum[vectors]{};
  for (int64_t d = 0; d < p.D; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Vec<double> x = load_double(lanes + d * LANE_ROWS<T> + v * LANES<double>);
      sum[v] += x * x;
    }
  double squared[LANE_ROWS<T>], inverse[LANE_ROWS<T>];
  for (int v = 0; v < vectors; ++v) store(squared + v * LANES<double>, sum[v]);
  invert_roots(squared, LANE_ROWS<T>, inverse);
  bool any_long = false;
  for (int64_t r = 0; r < LANE_ROWS<T>; ++r) {
    scale[r] = static_cast<T>(inverse[r] * exponent_scale);
    any_long |= squared[r] > LONG * LONG;
  }
  if (!any_long) return;
  for (int64_t r = 0; r < LANE_ROWS<T>; ++r) {
    if (!(squared[r] > LONG * LONG)) continue;
    for (int64_t d = 0; d < p.D; ++d) lanes[d * LANE_ROWS<T> + r] *= static_cast<T>(SHORTENED);
    scale[r] = static_cast<T>(inverse[r] / SHORTENED * exponent_scale);
  }
}

// --------------------------------------------------------------------------------------------------------------- softmax

template <class T>
struct LaneResults {
  T sum[LANE_ROWS<T>], entropy[LANE_ROWS<T>];
  int64_t label[LANE_ROWS<T>];
};

// Softmax of every lane of scores [K, LANE_ROWS] in place, not yet divided by its sum.
template <class T, bool WITH_ENTROPY>
PK_INLINE void softmax_lanes(T* scores, int64_t K, const T* scale, LaneResults<T>& result) {
  constexpr int64_t step = LANE_ROWS<T>;
  Vec<T> best[2], factor[2], sum[2][2]{}, weighted[2]{};
  Index<T> number{}, best_number[2]{};
  for (int v = 0; v < 2; ++v) best[v] = broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < K; ++k, number += 1)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec<T> s = load(scores + k * step + v * LANES<T>);
      best_number[v] = s > best[v] ? number : best_number[v];
      best[v] = s > best[v] ? s : best[v];
    }
  for (int v = 0; v < 2; ++v) {
    factor[v] = load(scale + v * LANES<T>);
    best_number[v] = factor[v] == T(0) ? Index<T>{} : best_number[v];
  }
  const auto raise = [&](int64_t k, Vec<T>* total) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      T* const s = scores + k * step + v * LANES<T>;
      const Vec<T> x = (load(s) - best[v]) * factor[v], e = exp2_nonpositive(x);
      total[v] += e;
      if constexpr (WITH_ENTROPY) weighted[v] += e == T(0) ? Vec<T>{} : e * x;
      store(s, e);
    }
  };
  int64_t k = 0;
  for (; k + 2 <= K; k += 2) raise(k, sum[0]), raise(k + 1, sum[1]);
  if (k < K) raise(k, sum[0]);
  for (int v = 0; v < 2; ++v) {
    const Vec<T> total = sum[0][v] + sum[1][v];
    store(result.sum + v * LANES<T>, total);
    if constexpr (WITH_ENTROPY) store(result.entropy + v * LANES<T>, weighted[v] / total * static_cast<T>(LN_2));
    for (int r = 0; r < LANES<T>; ++r) result.label[v * LANES<T> + r] = best_number[v][r];
  }
  if constexpr (WITH_ENTROPY)
    for (int64_t r = 0; r < LANE_ROWS<T>; ++r) result.entropy[r] = std::log(result.sum[r]) - result.entropy[r];
}

// Labels drawn from the weights: the first k whose cumulative weight exceeds uniform * sum; if rounding leaves none, the last with any.
template <class T>
PK_INLINE void draw_labels(const T* weights, int64_t K, const float* uniform, int64_t count, LaneResults<T>& result) {
  T threshold[LANE_ROWS<T>]{};
  for (int64_t r = 0; r < count; ++r) threshold[r] = result.sum[r] * static_cast<T>(uniform[r]);
  for (int v = 0; v < 2; ++v) {
    const Vec<T> limit = load(threshold + v * LANES<T>);
    Vec<T> cumulative{};
    Index<T> number{}, below{}, last{};
    for (int64_t k = 0; k < K; ++k, number += 1) {
      const Vec<T> weight = load(weights + k * LANE_ROWS<T> + v * LANES<T>);
      cumulative += weight;
      below -= cumulative <= limit;  // a comparison is -1 where it holds; weights are not negative, so it holds up to some k
      last = weight > T(0) ? number : last;
    }
    const Index<T> drawn = below < number ? below : last;
    for (int r = 0; r < LANES<T>; ++r) result.label[v * LANES<T> + r] = drawn[r];
  }
}

// The first weight of a lane that is NaN: what torch's argmax calls the largest.
template <class T>
PK_INLINE int64_t first_nan(const T* weights, int64_t K, int64_t lane) {
  for (int64_t k = 0; k < K; ++k)
    if (weights[k * LANE_ROWS<T> + lane] != weights[k * LANE_ROWS<T> + lane]) return k;
  return 0;
}

template <class T>
PK_INLINE void skip_nonfinite_lanes(const T* lanes, int64_t D, LaneResults<T>& result) {
  Vec<T> sum[2]{};
  for (int64_t d = 0; d < D; ++d)
    for (int v = 0; v < 2; ++v) sum[v] += load(lanes + d * LANE_ROWS<T> + v * LANES<T>) * T(0);
  for (int64_t r = 0; r < LANE_ROWS<T>; ++r)
    if (sum[r / LANES<T>][r % LANES<T>] != T(0)) result.label[r] = -1;
}

// ------------------------------------------------------------------------------------------- what is left of a tile

// A tile whose softmax is done. What is left waits for memory: c is written and rows are added to the sums of their clusters in parts,
// between the products of the next tile.
template <class T>
struct Finished {
  int64_t first, rows;
  T* weights;  // [K padded to whole vectors, LANE_ROWS]
  LaneResults<T> result;
};

// c = weights / sum of one square of the tile, back in memory order. Squares go by halves of the tile; in each half the one at the end of
// the rows, if it is not whole, comes first: its vectors run over into the next rows, which are written after it. Never past limit.
template <class T>
PK_INLINE void write_square(const Finished<T>& tile, int64_t number, int64_t K, T* assignment, const T* limit, bool streamed) {
  const int64_t squares = round_up(K, LANES<T>) / LANES<T>, whole = K / LANES<T>;
  const int64_t half = number / squares * LANES<T>, rows = std::min<int64_t>(LANES<T>, tile.rows - half);
  const int64_t k = (number % squares + whole) % squares * LANES<T>;
  const Vec<T> inverse = T(1) / load(tile.result.sum + half);
  Vec<T> square[LANES<T>];
#pragma GCC unroll 16
  for (int j = 0; j < LANES<T>; ++j) square[j] = load(tile.weights + (k + j) * LANE_ROWS<T> + half) * inverse;
  transpose<T>(square);
  T* const out = assignment + (tile.first + half) * K + k;
  if (streamed && rows == LANES<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES<T>; ++r) stream(out + r * K, square[r]);
  } else if (rows == LANES<T> && out + (LANES<T> - 1) * K + LANES<T> <= limit) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES<T>; ++r) store(out + r * K, square[r]);
  } else {
    const size_t bytes = static_cast<size_t>(std::min<int64_t>(LANES<T>, K - k)) * sizeof(T);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * K, &square[r], bytes);
  }
}

// Part `part` of `parts` of what is left.
template <class T>
PK_INLINE void finish(const PrototypesForward& p, const Finished<T>& tile, int64_t part, int64_t parts, const T* limit, bool streamed,
                      T* row, double* sums, int64_t* counts) {
  const int64_t squares = round_up(p.K, LANES<T>) / LANES<T> * ((tile.rows + LANES<T> - 1) / LANES<T>);
  for (int64_t n = squares * part / parts; n < squares * (part + 1) / parts; ++n)
    write_square(tile, n, p.K, static_cast<T*>(p.assignment), limit, streamed);
  if (!sums) return;
  for (int64_t r = tile.rows * part / parts; r < tile.rows * (part + 1) / parts; ++r) {
    const int64_t label = tile.result.label[r];
    if (label < 0) continue;
    add_row(p.z, p.z_kind, (tile.first + r) * p.z_stride, p.D, row, sums + label * p.D);
    ++counts[label];
  }
}

// Asks for part `part` of `parts` of rows [first, first + rows) of z: read across rows, memory would not see them coming.
PK_INLINE void prefetch(const PrototypesProblem& p, int64_t first, int64_t rows, int64_t part, int64_t parts) {
  const int64_t size = p.z_kind == Kind::f64 ? 8 : p.z_kind == Kind::f32 ? 4 : 2;
  for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
    const char* const row = static_cast<const char*>(p.z) + (first + r) * p.z_stride * size;
    for (int64_t byte = 0; byte < p.D * size; byte += 64) __builtin_prefetch(row + byte);
  }
}

template <class T>
void forward_chunk(const PrototypesForward& p, const T* groups, int64_t first, int64_t last, double* sums, int64_t* counts) {
  constexpr int64_t step = LANE_ROWS<T>;
  const double exponent_scale = std::abs(inverse_temperature<T>(p)) * LOG2_E;
  const int64_t padded = round_up(p.K, LANES<T>), parts = group_count(p.K);
  Scratch<T> lanes(p.D * step), scores(2 * padded * step), converted(p.z_kind == kind_of<T> ? 0 : step * p.D), row(p.D);
  alignas(64) T scale[step];
  alignas(64) Finished<T> tile{}, previous{};
  tile.weights = scores.data, previous.weights = scores.data + padded * step;
  const bool streamed = worth_streaming(p.assignment, p.K * static_cast<int64_t>(sizeof(T)), p.B);
  const T* const limit = static_cast<const T*>(p.assignment) + last * p.K;
  std::fill(scores.data, scores.data + 2 * padded * step, T(0));
  if (sums) std::fill(sums, sums + p.K * p.D, 0.0), std::fill(counts, counts + p.K, int64_t{0});
  for (int64_t i = first; i < last; i += step) {
    tile.first = i, tile.rows = std::min(step, last - i);
    read_lanes(p, i, tile.rows, converted.data, lanes.data);
    find_scales(p, exponent_scale, lanes.data, scale);
    for (int64_t g = 0; g < parts; ++g) {
      const int64_t begin = group_begin(p.K, g);
      if (i + step < last) prefetch(p, i + step, std::min(step, last - i - step), g, parts);
      multiply_group(group_begin(p.K, g + 1) - begin, groups + begin * p.D, lanes.data, p.D, tile.weights + begin * step);
      if (i > first) finish(p, previous, g, parts, limit, streamed, row.data, sums, counts);
    }
    LaneResults<T>& result = tile.result;
    if (p.entropy)
      softmax_lanes<T, true>(tile.weights, p.K, scale, result);
    else
      softmax_lanes<T, false>(tile.weights, p.K, scale, result);
    if (p.uniform) draw_labels(tile.weights, p.K, p.uniform + i, tile.rows, result);
    bool any_nan = false;
    for (int64_t r = 0; r < step; ++r) any_nan |= result.sum[r] != result.sum[r];
    for (int64_t r = 0; any_nan && r < step; ++r)
      if (result.sum[r] != result.sum[r]) result.label[r] = first_nan(tile.weights, p.K, r);
    if (p.skip_nonfinite) skip_nonfinite_lanes(lanes.data, p.D, result);
    if (p.entropy) std::copy(result.entropy, result.entropy + tile.rows, static_cast<T*>(p.entropy) + i);
    if (p.labels) std::copy(result.label, result.label + tile.rows, p.labels + i);
    std::swap(tile, previous);
  }
  finish(p, previous, 0, 1, limit, streamed, row.data, sums, counts);
  if (streamed) stream_end();
}

}  // namespace
