// SPDX-License-Identifier: MIT
// Nearest on the CPU: the filter of ops/nearest.h. Queries stand in the lanes, two vectors of them side by side; rows of the bank are broadcast.
// A register tile of rows x 2 vectors of s meets the limits of its queries while it is in registers; what is below goes to a query's
// candidates, and a full set of candidates is cut down to those a k-th best still allows, which gives the next limit.
//
// Limit at N = 60000, M = 10000, D = 32: 38.4 GFLOP of FMA. Beside it: two instructions for every s to compare it, one row in a few thousand
// to keep, and the bank, converted and moved to its center once for every block of queries (1 part in 500).

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/scratch.h"
#include "common/tile_product.h"
#include "common/transpose.h"
#include "ops/cpu/nearest_exact.h"

namespace {

using namespace protokernels;

template <class T>
constexpr int WIDTH = 2 * LANES<T>;  // queries of a panel
constexpr int64_t TILE_BYTES = 48 << 10;
constexpr double LARGE = 1.0 / 16;  // of the largest number of T: squares beyond it are not trusted

template <class T>
double error_factor(int64_t D) {  // c of ops/nearest.h
  const double depth = static_cast<double>(D);
  return 1.01 * (std::numeric_limits<T>::epsilon() / 2 * (depth / 2 + 8) + 0x1p-53 * (2 * depth + 8));
}

// No less than x.
template <class T>
T rounded_up(double x) {
  const T y = static_cast<T>(x);
  return static_cast<double>(y) < x ? std::nextafter(y, std::numeric_limits<T>::infinity()) : y;
}

template <class T>
struct Candidate {
  T low, high;  // s - e_b, s + e_b
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
        factor(error_factor<T>(problem.D)) {}

  // Rows first..first + count of the bank; false if one is too long for T. Rows that hold no finite numbers are never candidates.
  bool fill(int64_t first, int64_t count) {
    bool trusted = true;
    for (int64_t i = 0; i < round_up(count, MOST_ROWS); ++i) {
      T* const row = rows.data + i * stride;
      low.data[i] = std::numeric_limits<T>::quiet_NaN();
      width.data[i] = 0;
      if (i >= count) {
        for (int64_t j = 0; j < p.D; ++j) row[j] = 0;
        continue;
      }
      const double square = read(p.bank, p.bank_kind, (first + i) * p.bank_stride, row);
      if (!std::isfinite(square)) continue;
      if (square > std::numeric_limits<T>::max() * LARGE) trusted = false;
      const double error = 2 * factor * (p.cosine ? 1.0 : square);
      low.data[i] = static_cast<T>((p.cosine ? 0.0 : square) - error);
      width.data[i] = rounded_up<T>(2 * error);
    }
    return trusted;
  }

  // A row moved to the center, or made a unit vector; returns its squared norm before the latter.
  double read(const void* base, Kind kind, int64_t offset, T* row) const {
    read_row(base, kind, offset, row, p.D);
    if (!p.cosine) {
      for (int64_t j = 0; j < p.D; ++j) row[j] -= center[j];
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
  const double factor;
};

// A block of queries: panels [panel, D, WIDTH] of -2 q, and what is known of their neighbours.
template <class T>
struct Block {
  Block(const NearestProblem& problem, int64_t block)
      : p(problem),
        capacity(problem.k == 1 ? 0 : nearest_capacity(problem.k)),
        padded(round_up(block, WIDTH<T>)),
        panels(padded * problem.D),
        margin(padded),
        limit(padded),
        second(padded),
        trusted(padded),
        counts(padded),
        candidates(padded * capacity),
        heights(capacity) {}

  void begin(int64_t first, int64_t count, Tile<T>& tile) {
    Scratch<T> row(p.D);
    for (int64_t i = 0; i < padded; ++i) {
      counts.data[i] = 0;
      trusted.data[i] = false;
      limit.data[i] = -std::numeric_limits<T>::infinity();  // no candidates, for those that are none and those that cannot be trusted
      second.data[i] = std::numeric_limits<T>::infinity();
      T* const lane = panels.data + i / WIDTH<T> * WIDTH<T> * p.D + i % WIDTH<T>;
      if (i >= count) {
        for (int64_t j = 0; j < p.D; ++j) lane[j * WIDTH<T>] = 0;
        continue;
      }
      const double square = tile.read(p.queries, p.queries_kind, (first + i) * p.queries_stride, row.data);
      for (int64_t j = 0; j < p.D; ++j) lane[j * WIDTH<T>] = -2 * row.data[j];
      if (!(square <= std::numeric_limits<T>::max() * LARGE)) continue;
      trusted.data[i] = true;
      limit.data[i] = std::numeric_limits<T>::infinity();
      margin.data[i] = 4 * tile.factor * (p.cosine ? 1.0 : square) + 8 * (static_cast<double>(p.D) + 8) * std::numeric_limits<T>::min();
    }
  }

  void distrust() {
    for (int64_t i = 0; i < padded; ++i) {
      trusted.data[i] = false;
      limit.data[i] = -std::numeric_limits<T>::infinity();
    }
  }

  void push(int64_t query, T s, T width, int32_t row) {
    Candidate<T>* const own = candidates.data + query * capacity;
    own[counts.data[query]++] = {s, s + width, row};
    if (counts.data[query] == capacity) {
      shrink(query);
      if (counts.data[query] <= capacity * 3 / 4) return;
      trusted.data[query] = false;  // too many rows too close to each other
      limit.data[query] = -std::numeric_limits<T>::infinity();
    }
  }

  // Leaves the candidates that may still be among the nearest k.
  void shrink(int64_t query) {
    Candidate<T>* const own = candidates.data + query * capacity;
    const int32_t count = counts.data[query];
    for (int32_t i = 0; i < count; ++i) heights.data[i] = own[i].high;
    std::nth_element(heights.data, heights.data + p.k - 1, heights.data + count, Less{});
    limit.data[query] = rounded_up<T>(static_cast<double>(heights.data[p.k - 1]) + margin.data[query]);
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i)
      if (own[i].low <= limit.data[query]) own[kept++] = own[i];
    counts.data[query] = kept;
  }

  struct Less {
    bool operator()(T x, T y) const { return x < y; }
  };

  const NearestProblem& p;
  const int64_t capacity, padded;
  Scratch<T> panels;
  Scratch<double> margin;  // 2 e_q and underflow
  Scratch<T> limit;        // of s; for k = 1 the smallest s
  Scratch<T> second;       // k = 1: the second smallest s
  Scratch<bool> trusted;
  Scratch<int32_t> counts;  // k = 1: the row of the smallest s
  Scratch<Candidate<T>> candidates;
  Scratch<T> heights;
};

template <class V>
PK_INLINE bool any_lane(V mask) {
#if defined(__AVX512F__)
  typedef long long Quads __attribute__((vector_size(64)));
  return __builtin_ia32_ptestmq512((Quads)mask, (Quads)mask, -1) != 0;
#elif defined(__AVX2__)
  typedef long long Quads __attribute__((vector_size(32)));
  return !__builtin_ia32_ptestz256((Quads)mask, (Quads)mask);
#else
  typedef long long Quads __attribute__((vector_size(16)));
  const Quads quads = (Quads)mask;
  return (quads[0] | quads[1]) != 0;
#endif
}

// s of MOST_ROWS rows against a panel, without |q|^2.
template <class T>
PK_INLINE void scores(const T* rows, int64_t stride, const T* low, const T* panel, int64_t D, Vec<T> (&s)[MOST_ROWS][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < MOST_ROWS; ++i) s[i][0] = s[i][1] = Vec<T>{};
  for (int64_t j = 0; j < D; ++j) {
    const Vec<T> q0 = load(panel + j * WIDTH<T>), q1 = load(panel + j * WIDTH<T> + LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i) {
      const Vec<T> b = broadcast(rows[i * stride + j]);
      s[i][0] += b * q0;
      s[i][1] += b * q1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MOST_ROWS; ++i) {
    s[i][0] += low[i];
    s[i][1] += low[i];
  }
}

// Candidates of a panel among the rows of a tile.
template <class T>
void scan(const Tile<T>& tile, int64_t rows, int32_t first_row, int64_t first_query, Block<T>& block) {
  const T* const panel = block.panels.data + first_query * block.p.D;
  T* const limit = block.limit.data + first_query;
  for (int64_t i0 = 0; i0 < rows; i0 += MOST_ROWS) {
    Vec<T> s[MOST_ROWS][2];
    scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, block.p.D, s);
    const Vec<T> limits[2] = {load(limit), load(limit + LANES<T>)};
    Index<T> below{};
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i) below |= (s[i][0] <= limits[0]) | (s[i][1] <= limits[1]);
    if (!any_lane(below)) continue;
    alignas(64) T found[MOST_ROWS][WIDTH<T>];
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i) {
      store(found[i], s[i][0]);
      store(found[i] + LANES<T>, s[i][1]);
    }
    for (int i = 0; i < MOST_ROWS; ++i) {
      const T width = tile.width.data[i0 + i];
      const int32_t row = first_row + static_cast<int32_t>(i0) + i;
      for (int half = 0; half < 2; ++half) {
        if (!any_lane(load(found[i] + half * LANES<T>) <= load(limit + half * LANES<T>))) continue;
        for (int lane = half * LANES<T>; lane < (half + 1) * LANES<T>; ++lane)
          if (found[i][lane] <= limit[lane]) block.push(first_query + lane, found[i][lane], width, row);
      }
    }
  }
}

// The same for k = 1: the smallest and second smallest s stay in registers.
template <class T>
void scan_one(const Tile<T>& tile, int64_t rows, int32_t first_row, int64_t first_query, Block<T>& block, Index<T> (&nearest)[2]) {
  const T* const panel = block.panels.data + first_query * block.p.D;
  T *const best_s = block.limit.data + first_query, *const second_s = block.second.data + first_query;
  Vec<T> best[2] = {load(best_s), load(best_s + LANES<T>)}, second[2] = {load(second_s), load(second_s + LANES<T>)};
  for (int64_t i0 = 0; i0 < rows; i0 += MOST_ROWS) {
    Vec<T> s[MOST_ROWS][2];
    scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, block.p.D, s);
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Index<T> less = s[i][half] < best[half];
        const Vec<T> loser = less ? best[half] : s[i][half];
        second[half] = loser < second[half] ? loser : second[half];
        best[half] = less ? s[i][half] : best[half];
        nearest[half] = less ? Index<T>{} + (first_row + static_cast<int32_t>(i0) + i) : nearest[half];
      }
  }
  for (int half = 0; half < 2; ++half) {
    store(best_s + half * LANES<T>, best[half]);
    store(second_s + half * LANES<T>, second[half]);
  }
}

template <class T>
void scan_block(const NearestProblem& p, Tile<T>& tile, Block<T>& block, int64_t first_row, int64_t last_row) {
  for (int64_t first = first_row; first < last_row; first += tile.most) {
    const int64_t rows = std::min(tile.most, last_row - first);
    if (!tile.fill(first, rows)) return block.distrust();
    const int32_t part_row = static_cast<int32_t>(first - first_row);
    for (int64_t query = 0; query < block.padded; query += WIDTH<T>) {
      if (p.k > 1) {
        scan(tile, rows, part_row, query, block);
        continue;
      }
      Index<T> nearest[2];
      for (int lane = 0; lane < WIDTH<T>; ++lane) nearest[lane / LANES<T>][lane % LANES<T>] = block.counts.data[query + lane];
      scan_one(tile, rows, part_row, query, block, nearest);
      for (int lane = 0; lane < WIDTH<T>; ++lane)
        block.counts.data[query + lane] = static_cast<int32_t>(nearest[lane / LANES<T>][lane % LANES<T>]);
    }
  }
}

// What the filter left of a query after rows [first_row, ...), into found: how many, or -1 if it cannot tell.
template <class T>
int64_t leave(Block<T>& block, const Tile<T>& tile, int64_t query, int64_t first_row, T* row, NearestCandidate* found) {
  const NearestProblem& p = block.p;
  if (!block.trusted.data[query]) return -1;
  if (p.k > 1) {
    if (block.counts.data[query] < p.k) return -1;
    block.shrink(query);
    const Candidate<T>* const own = block.candidates.data + query * block.capacity;
    for (int32_t i = 0; i < block.counts.data[query]; ++i) found[i].index = first_row + own[i].row;
    return block.counts.data[query];
  }
  const T best = block.limit.data[query];
  if (!(best < std::numeric_limits<T>::infinity())) return -1;
  found[0].index = first_row + block.counts.data[query];
  const double square = tile.read(p.bank, p.bank_kind, found[0].index * p.bank_stride, row);
  const double reach = static_cast<double>(best) + 4 * tile.factor * (p.cosine ? 1.0 : square) + block.margin.data[query];
  return static_cast<double>(block.second.data[query]) > reach * (reach > 0 ? 1 + 0x1p-20 : 1) ? 1 : -1;
}

template <class T>
void write(const NearestProblem& p, int64_t query, const NearestCandidate* nearest) {
  for (int64_t i = 0; i < p.k; ++i) {
    static_cast<T*>(p.distances)[query * p.k + i] = static_cast<T>(nearest[i].distance);
    p.indices[query * p.k + i] = nearest[i].index;
  }
}

template <class T>
void search_units(const NearestProblem& p, NearestUnits units, const T* center, NearestCandidate* candidates, int64_t begin, int64_t end) {
  const NearestExact& exact = PK_LEVEL_TABLE(nearest_exact);
  const bool filter = p.N > 4 && p.D > 0;  // few queries do not fill the lanes
  Tile<T> tile(p, center);
  Block<T> block(p, units.block);
  Scratch<T> row(p.D);
  Scratch<NearestCandidate> found(std::max(p.k, block.capacity));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % units.parts, first_query = unit / units.parts * units.block;
    const int64_t count = std::min(units.block, p.N - first_query);
    const int64_t first_row = part * units.part, last_row = std::min(p.M, first_row + units.part);
    if (filter) {
      block.begin(first_query, count, tile);
      scan_block(p, tile, block, first_row, last_row);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first_query + i, left = filter ? leave(block, tile, i, first_row, row.data, found.data) : -1;
      if (left < 0)
        exact.rank_all(p, query, first_row, last_row, found.data);
      else
        exact.rank(p, query, found.data, left);
      if (!candidates) {
        write<T>(p, query, found.data);
        continue;
      }
      NearestCandidate* const out = candidates + (query * units.parts + part) * p.k;
      for (int64_t j = 0; j < p.k; ++j) out[j] = found.data[j];
    }
  }
}

// The mean of up to a thousand rows; rows that hold no finite numbers are left out.
template <class T>
void center_of(const NearestProblem& p, T* center) {
  Scratch<double> sum(p.D);
  Scratch<T> row(p.D);
  for (int64_t j = 0; j < p.D; ++j) sum.data[j] = 0;
  const int64_t step = p.M / 1024 + 1;
  double count = 0;
  for (int64_t i = 0; i < p.M && !p.cosine; i += step) {
    read_row(p.bank, p.bank_kind, i * p.bank_stride, row.data, p.D);
    if (!std::isfinite(squared_norm(row.data, p.D))) continue;
    for (int64_t j = 0; j < p.D; ++j) sum.data[j] += row.data[j];
    ++count;
  }
  for (int64_t j = 0; j < p.D; ++j) center[j] = count > 0 ? static_cast<T>(sum.data[j] / count) : T(0);
}

// ------------------------------------------------------------------------------------------------------------------ table

void find_center(const NearestProblem& p, void* center) {
  p.double_compute ? center_of(p, static_cast<double*>(center)) : center_of(p, static_cast<float*>(center));
}

void search(const NearestProblem& p, NearestUnits units, const void* center, NearestCandidate* candidates, int64_t begin, int64_t end) {
  if (p.double_compute)
    search_units(p, units, static_cast<const double*>(center), candidates, begin, end);
  else
    search_units(p, units, static_cast<const float*>(center), candidates, begin, end);
}

void merge(const NearestProblem& p, int64_t parts, NearestCandidate* candidates, int64_t begin, int64_t end) {
  for (int64_t query = begin; query < end; ++query) {
    NearestCandidate* const own = candidates + query * parts * p.k;
    std::partial_sort(own, own + p.k, own + parts * p.k, Nearer{});
    p.double_compute ? write<double>(p, query, own) : write<float>(p, query, own);
  }
}

}  // namespace

namespace protokernels {

extern const NearestCpu PK_LEVEL_TABLE(nearest_cpu);
const NearestCpu PK_LEVEL_TABLE(nearest_cpu) = {PK_STRINGIFY(PROTOKERNELS_LEVEL), find_center, search, merge};

}  // namespace protokernels
