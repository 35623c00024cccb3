// SPDX-License-Identifier: MIT
// Nearest on the CPU, one neighbour among few rows: an iteration of k-means. Centers stand in the lanes, packed once a call, but for a few that do
// not fill a vector: those are multiplied along long rows. Rows are moved to the centers' origin, multiplied, ranked and added to the sum of their
// cluster while the caches hold them, so that a call reads the rows once. Only a row whose nearest center the filter leaves open is measured in
// float64.
//
// Limit at N = 60000, D = 32, K = 50: 0.19 GFLOP of FMA (1 ms on two cores of 3 GHz) and 7.7 MB. Beside it: K rounded up to the lanes where rows are
// short, an eighth of the products' time for the minima, as much to add D float64 numbers.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "ops/cpu/nearest_exact.h"
#include "ops/cpu/nearest_filter.h"
#include "ops/cpu/prototypes_rows.h"

namespace {

using namespace protokernels;

constexpr int64_t SUMMED =
    128;  // columns summed in one go: fewer roundings, and a block and its part of the panels stay in the first-level cache
constexpr int64_t BLOCK = 4 * MOST_ROWS;
template <int VECTORS>
constexpr int ROWS = VECTORS == 1   ? 2 * MOST_ROWS
                     : VECTORS == 2 ? MOST_ROWS
                                    : 2 * MOST_ROWS / 3;  // of a register tile; they divide BLOCK
constexpr int64_t PADDING = 2 * MOST_ROWS;                // what they all divide

constexpr int MOST_ALONG = 10;  // centers that are multiplied along the rows

// The largest number of rows that divides PADDING and whose sums with so many centers fit into the registers.
constexpr int rows_along(int count) {
  int rows = count < 2 * MOST_ROWS ? 2 * MOST_ROWS / count : 1;
  while (PADDING % rows != 0) --rows;
  return rows;
}

// How many centers behind whole vectors of them are multiplied along the rows: all or none. It has to pay, a horizontal sum taking as long as some
// eight products, and to meet no more roundings than product_error allows.
template <class T>
int64_t centers_along(int64_t K, int64_t D) {
  const int64_t left = K % LANES<T>, vectors = (D + LANES<T> - 1) / LANES<T>;
  const bool exact = vectors + 5 <= std::min(D, SUMMED) + (D + SUMMED - 1) / SUMMED;
  return left <= MOST_ALONG && exact && 4 * left * (vectors + 8) < 3 * D ? left : 0;
}

// Vectors of the panel that begins before the last so many: two, and three or one at the end.
constexpr int panel_vectors(int64_t left) { return left < 4 ? static_cast<int>(left) : 2; }

// The bound of ops/nearest.h for sums in parts of SUMMED columns.
template <class T>
double product_error(int64_t D) {
  const double roundings = static_cast<double>(std::min(D, SUMMED) + (D + SUMMED - 1) / SUMMED);
  return 1.01 * (std::numeric_limits<T>::epsilon() / 2 * (roundings + 10) + 0x1p-53 * (2 * static_cast<double>(D) + 8));
}

// What a call keeps of its centers, in one piece of memory.
template <class T>
struct Centers {
  Centers(int64_t K, int64_t D, void* memory)
      : lanes(round_up(K, LANES<T>)),
        left(centers_along<T>(K, D)),
        in_panels(left > 0 ? K - left : lanes),
        panels(static_cast<T*>(memory)),
        along(panels + in_panels * D),
        low(panels + lanes * round_up(D, LANES<T>)),
        reach(low + lanes),
        origin(reach + lanes),
        facts(origin + round_up(D, LANES<T>)) {}
  static int64_t elements(int64_t K, int64_t D) {
    return round_up(K, LANES<T>) * (round_up(D, LANES<T>) + 2) + round_up(D, LANES<T>) + LANES<T>;
  }

  bool trusted() const { return facts[1] > 0; }

  const int64_t lanes, left, in_panels;
  T* const panels;  // of -2 b, moved by the origin
  T* const along;   // the same of those left, row after row, with zeros up to a whole vector
  T* const low;     // |b|^2; infinity behind the last center
  T* const reach;   // |b|, rounded up
  T* const origin;
  T* const facts;  // the largest reach; whether all are short enough for T
};

template <class T>
void pack_centers(const NearestAssign& p, void* memory) {
  const Centers<T> centers(p.K, p.D, memory);
  const T* const rows = static_cast<const T*>(p.centers);
  Scratch<double> mean(p.D);
  std::fill(mean.data, mean.data + p.D, 0.0);
  for (int64_t k = 0; k < p.K; ++k)
    for (int64_t j = 0; j < p.D; ++j) mean.data[j] += static_cast<double>(rows[k * p.D + j]);
  std::fill(centers.origin, centers.origin + round_up(p.D, LANES<T>), T(0));
  for (int64_t j = 0; j < p.D; ++j) {
    const T x = static_cast<T>(mean.data[j] / static_cast<double>(p.K));
    centers.origin[j] = std::isfinite(x) ? x : T(0);
  }
  Scratch<T> moved(p.K * p.D);
  bool trusted = true;
  T most = 0;
  for (int64_t k = 0; k < centers.lanes; ++k) {
    centers.low[k] = std::numeric_limits<T>::infinity();
    centers.reach[k] = 0;
    if (k >= p.K) continue;
    T* const row = moved.data + k * p.D;
    for (int64_t j = 0; j < p.D; ++j) row[j] = rows[k * p.D + j] - centers.origin[j];
    const double square = squared_norm(row, p.D);
    trusted &= square <= most_square<T>(false);
    centers.low[k] = static_cast<T>(square);
    centers.reach[k] = rounded_up<T>(std::sqrt(square) * (1 + 0x1p-40));
    most = std::max(most, centers.reach[k]);
    for (int64_t j = 0; j < p.D; ++j) row[j] *= T(-2);
  }
  for (int64_t k = 0; k < centers.in_panels;) {
    const int64_t width = panel_vectors((centers.in_panels - k) / LANES<T>) * LANES<T>;
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < p.D; ++j) centers.panels[k * p.D + j * width + i] = k + i < p.K ? moved.data[(k + i) * p.D + j] : T(0);
    k += width;
  }
  const int64_t padded = round_up(p.D, LANES<T>);
  std::fill(centers.along, centers.along + centers.left * padded, T(0));
  for (int64_t k = 0; k < centers.left; ++k) std::copy_n(moved.data + (centers.in_panels + k) * p.D, p.D, centers.along + k * padded);
  centers.facts[0] = most;
  centers.facts[1] = trusted;
}

// A row moved to the origin, and its squared length.
template <class T>
PK_INLINE double move_row(const T* x, const T* origin, int64_t D, T* moved) {
  Vec<T> squares[2]{};
  int64_t j = 0;
  for (; j + 2 * LANES<T> <= D; j += 2 * LANES<T>)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec<T> y = load(x + j + v * LANES<T>) - load(origin + j + v * LANES<T>);
      store(moved + j + v * LANES<T>, y);
      squares[v] += y * y;
    }
  T rest = 0;
  for (; j < D; ++j) {
    moved[j] = x[j] - origin[j];
    rest += moved[j] * moved[j];
  }
  return static_cast<double>(reduce_sum(squares[0] + squares[1])) + static_cast<double>(rest);
}

// s of ROWS rows against one panel of VECTORS vectors of centers for columns [first, last), added to those of the columns before.
template <class T, int VECTORS>
PK_INLINE void score_tile(const T* rows, int64_t stride, const T* panel, const T* low, int64_t first, int64_t last, T* scores,
                          int64_t scores_stride) {
  constexpr int rows_here = ROWS<VECTORS>;
  Vec<T> s[rows_here][VECTORS];
#pragma GCC unroll 24
  for (int i = 0; i < rows_here; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) s[i][v] = first == 0 ? load(low + v * LANES<T>) : Vec<T>{};
  for (int64_t j = first; j < last; ++j) {
    Vec<T> b[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) b[v] = load(panel + (j * VECTORS + v) * LANES<T>);
#pragma GCC unroll 24
    for (int i = 0; i < rows_here; ++i) {
      const Vec<T> x = broadcast(rows[i * stride + j]);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) s[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < rows_here; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      T* const own = scores + i * scores_stride + v * LANES<T>;
      store(own, first == 0 ? s[i][v] : load(own) + s[i][v]);
    }
}

// The same for all of a block's rows, a multiple of PADDING.
template <class T, int VECTORS>
void score_block(const T* rows, int64_t stride, const T* panel, const T* low, int64_t first, int64_t last, T* scores, int64_t scores_stride,
                 int64_t count) {
  for (int64_t i = 0; i < count; i += ROWS<VECTORS>)
    score_tile<T, VECTORS>(rows + i * stride, stride, panel, low, first, last, scores + i * scores_stride, scores_stride);
}

// s of a block's rows, a multiple of PADDING, with COUNT centers, along the rows.
template <class T, int COUNT>
void score_along(const T* rows, int64_t stride, const T* centers, const T* low, int64_t padded_D, T* scores, int64_t scores_stride,
                 int64_t count) {
  constexpr int rows_here = rows_along(COUNT);
  for (int64_t i0 = 0; i0 < count; i0 += rows_here) {
    Vec<T> s[rows_here][COUNT]{};
    for (int64_t j = 0; j < padded_D; j += LANES<T>) {
      Vec<T> b[COUNT];
#pragma GCC unroll 10
      for (int k = 0; k < COUNT; ++k) b[k] = load(centers + k * padded_D + j);
#pragma GCC unroll 24
      for (int i = 0; i < rows_here; ++i) {
        const Vec<T> x = load(rows + (i0 + i) * stride + j);
#pragma GCC unroll 10
        for (int k = 0; k < COUNT; ++k) s[i][k] += x * b[k];
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < rows_here; ++i)
#pragma GCC unroll 10
      for (int k = 0; k < COUNT; ++k) scores[(i0 + i) * scores_stride + k] = low[k] + reduce_sum(s[i][k]);
  }
}

template <class T, int COUNT = MOST_ALONG>
void score_left(int64_t left, const T* rows, int64_t stride, const T* centers, const T* low, int64_t padded_D, T* scores,
                int64_t scores_stride, int64_t count) {
  if constexpr (COUNT > 0) {
    if (left == COUNT)
      score_along<T, COUNT>(rows, stride, centers, low, padded_D, scores, scores_stride, count);
    else
      score_left<T, COUNT - 1>(left, rows, stride, centers, low, padded_D, scores, scores_stride, count);
  }
}

template <class T>
struct Assigner {
  Assigner(const NearestAssign& problem, const void* packed)
      : p(problem),
        centers(problem.K, problem.D, const_cast<void*>(packed)),
        search{problem.N,       problem.K,  problem.D, 1,     problem.x,      kind_of<T>, problem.x_stride,
               problem.centers, kind_of<T>, problem.D, false, sizeof(T) == 8, nullptr,    nullptr},
        stride(round_up(problem.D, LANES<T>) + LANES<T>),  // rows a power of two apart would fall on the same lines of the cache
        error(product_error<T>(problem.D)),
        moved(BLOCK * stride),
        scores(BLOCK * centers.lanes),
        lengths(BLOCK),
        margins(BLOCK),
        found(std::max(problem.K, BLOCK)),
        rows(BLOCK) {
    std::fill(lengths.data, lengths.data + BLOCK, 0.0);
    std::fill(moved.data, moved.data + BLOCK * stride, T(0));                                         // stays so behind the rows
    std::fill(scores.data, scores.data + BLOCK * centers.lanes, std::numeric_limits<T>::infinity());  // and so behind the centers
    const double depth = static_cast<double>(p.D);
    exact_error = 1.01 * 0x1p-53 * (depth + 8);
    underflow = 8 * (depth + 8) * static_cast<double>(std::numeric_limits<T>::min());
  }

  // The labels of rows first..first + count, count at most BLOCK.
  void assign(int64_t first, int64_t count) {
    if (!centers.trusted()) {
      for (int64_t i = 0; i < count; ++i) label_exactly(first + i);
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      lengths.data[i] = move_row(static_cast<const T*>(p.x) + (first + i) * p.x_stride, centers.origin, p.D, moved.data + i * stride);
    const double most = centers.facts[0], largest = most_square<T>(false), unit = std::numeric_limits<T>::epsilon();
    const double depth = static_cast<double>(p.D), least = depth * static_cast<double>(std::numeric_limits<T>::min());
    for (int64_t i = 0; i < BLOCK; ++i) {  // all together, or each would wait for its root
      const double square = lengths.data[i], length = std::sqrt(square * (1 + (depth + 8) * unit) + least),
                   error_here = error_of(length, most);
      lengths.data[i] = length;
      margins.data[i] = square <= largest ? 2 * error_here : std::numeric_limits<double>::infinity();  // so for NaN
    }
    const int64_t padded = round_up(count, PADDING);
    std::fill(moved.data + count * stride, moved.data + padded * stride, T(0));
    for (int64_t column = 0; column < p.D; column += SUMMED)
      for (int64_t k = 0, vectors; k < centers.in_panels; k += vectors * LANES<T>) {
        vectors = panel_vectors((centers.in_panels - k) / LANES<T>);
        const auto score = vectors == 1 ? score_block<T, 1> : vectors == 2 ? score_block<T, 2> : score_block<T, 3>;
        score(moved.data, stride, centers.panels + k * p.D, centers.low + k, column, std::min(column + SUMMED, p.D), scores.data + k,
              centers.lanes, padded);
      }
    score_left<T>(centers.left, moved.data, stride, centers.along, centers.low + centers.in_panels, round_up(p.D, LANES<T>),
                  scores.data + centers.in_panels, centers.lanes, padded);
    for (int64_t i = 0; i < count; ++i) choose(first + i, scores.data + i * centers.lanes, i);
  }

  // The distances of rows from their own centers.
  void measure(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      rows.data[i] = first + i;
      found.data[i].index = p.labels[first + i];
    }
    exact.measure(search, rows.data, found.data, count, nullptr);
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(p.distances)[first + i] = static_cast<T>(found.data[i].distance);
  }

 private:
  // e of ops/nearest.h for a row and a center of these lengths.
  double error_of(double row, double center) const { return error * center * (2 * row + center) + exact_error * row * row + underflow; }

  void choose(int64_t row, const T* s, int64_t i) {
    if (margins.data[i] == std::numeric_limits<double>::infinity()) return label_exactly(row);
    Vec<T> least = load(s);
    for (int64_t k = LANES<T>; k < centers.lanes; k += LANES<T>) least = smaller<T>(load(s + k), least);
    const T smallest = reduce(least, [](Vec<T> a, Vec<T> b) { return smaller<T>(a, b); });
    const Vec<T> limit = broadcast(static_cast<T>(static_cast<double>(smallest) + margins.data[i]));
    int64_t label = -1;
    for (int64_t k = 0; k < centers.lanes; k += 64) {  // a bit for every center: no branch to guess up to 64 of them
      uint64_t near = 0;
      const int64_t last = std::min<int64_t>(k + 64, centers.lanes);
      for (int64_t lane = k; lane < last; lane += LANES<T>)
        near |= static_cast<uint64_t>(lanes_not_above<T>(load(s + lane), limit)) << (lane - k);
      if (near == 0) continue;
      if (label >= 0 || (near & (near - 1)) != 0) return decide(row, s, lengths.data[i]);
      label = k + std::countr_zero(near);
    }
    p.labels[row] = label;
  }

  // The filter leaves several: those that their own bounds leave are measured.
  void decide(int64_t row, const T* s, double length) {
    double limit = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < p.K; ++k) limit = std::min(limit, static_cast<double>(s[k]) + error_of(length, centers.reach[k]));
    int64_t left = 0;
    for (int64_t k = 0; k < p.K; ++k)
      if (static_cast<double>(s[k]) - error_of(length, centers.reach[k]) <= limit) found.data[left++].index = k;
    if (left > 1) exact.rank(search, row, found.data, left, nullptr);
    p.labels[row] = found.data[0].index;
  }

  void label_exactly(int64_t row) {
    exact.rank_all(search, row, 0, p.K, found.data, nullptr);
    p.labels[row] = found.data[0].index;
  }

  const NearestAssign& p;
  const Centers<T> centers;
  const NearestProblem search;
  const NearestExact& exact = PK_LEVEL_TABLE(nearest_exact);
  const int64_t stride;
  const double error;
  double exact_error, underflow;
  Scratch<T> moved;   // [BLOCK, stride]
  Scratch<T> scores;  // [BLOCK, lanes]
  Scratch<double> lengths, margins;
  Scratch<NearestCandidate> found;
  Scratch<int64_t> rows;
};

template <class T>
void assign_chunks(const NearestAssign& p, const void* packed, PrototypesChunks chunks, double* partial_sums, int64_t* partial_counts,
                   int64_t begin, int64_t end) {
  Assigner<T> assigner(p, packed);
  for (int64_t c = begin; c < end; ++c) {
    double* const sums = partial_sums ? partial_sums + c * p.K * p.D : nullptr;
    int64_t* const counts = partial_sums ? partial_counts + c * p.K : nullptr;
    if (sums) {
      std::fill(sums, sums + p.K * p.D, 0.0);
      std::fill(counts, counts + p.K, int64_t{0});
    }
    const int64_t last_row = std::min(p.N, (c + 1) * chunks.rows);
    for (int64_t first = c * chunks.rows; first < last_row; first += BLOCK) {
      const int64_t count = std::min(BLOCK, last_row - first);
      assigner.assign(first, count);
      if (p.distances) assigner.measure(first, count);
      for (int64_t i = first; sums && i < first + count; ++i) {
        add_row<T>(p.x, kind_of<T>, i * p.x_stride, p.D, nullptr, sums + p.labels[i] * p.D);
        ++counts[p.labels[i]];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------ table

int64_t center_elements(const NearestAssign& p) {
  return p.double_compute ? Centers<double>::elements(p.K, p.D) : Centers<float>::elements(p.K, p.D);
}

void pack(const NearestAssign& p, void* packed) { p.double_compute ? pack_centers<double>(p, packed) : pack_centers<float>(p, packed); }

void assign(const NearestAssign& p, const void* packed, PrototypesChunks chunks, double* partial_sums, int64_t* partial_counts,
            int64_t begin, int64_t end) {
  p.double_compute ? assign_chunks<double>(p, packed, chunks, partial_sums, partial_counts, begin, end)
                   : assign_chunks<float>(p, packed, chunks, partial_sums, partial_counts, begin, end);
}

}  // namespace

namespace protokernels {

extern const NearestAssignCpu PK_LEVEL_TABLE(nearest_assign_cpu);
const NearestAssignCpu PK_LEVEL_TABLE(nearest_assign_cpu) = {center_elements, pack, assign};

}  // namespace protokernels
