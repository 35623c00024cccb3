// SPDX-License-Identifier: MIT
// Nearest on the CPU: the filter of ops/nearest.h. Queries stand in the lanes, two vectors of them side by side; rows of the bank are broadcast.
// A register tile of rows x 2 vectors of s meets the limits of its queries while it is in registers. What is below goes to a query's
// candidates; the k-th smallest s + 2 e_b among them is the next limit: the last of a sorted list, or, of many, selected when k more have come.
//
// Limit at N = 60000, M = 10000, D = 32: 38.4 GFLOP of FMA. Beside it: an instruction for every s to compare it, k (1 + ln(M / k)) rows of
// a query to keep (gathered: k (1 + log2(M / k))), and the bank, converted and moved to its center once for every block of queries (1 part in 500).

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ops/cpu/nearest_exact.h"
#include "ops/cpu/nearest_filter.h"

namespace {

using namespace protokernels;

// s of MOST_ROWS rows against a panel, without |q|^2, for columns [first, last); the sums go on in partial [MOST_ROWS, WIDTH] from the first
// columns to the last.
template <class T>
PK_INLINE void scores(const T* rows, int64_t stride, const T* low, const T* panel, int64_t first, int64_t last, const T* partial,
                      Vec<T> (&s)[MOST_ROWS][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < MOST_ROWS; ++i) {
    s[i][0] = first == 0 ? broadcast(low[i]) : load(partial + i * WIDTH<T>);
    s[i][1] = first == 0 ? s[i][0] : load(partial + i * WIDTH<T> + LANES<T>);
  }
  for (int64_t j = first; j < last; ++j) {
    const Vec<T> q0 = load(panel + j * WIDTH<T>), q1 = load(panel + j * WIDTH<T> + LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i) {
      const Vec<T> b = broadcast(rows[i * stride + j]);
      s[i][0] += b * q0;
      s[i][1] += b * q1;
    }
  }
}

template <class T>
PK_INLINE void keep_scores(const Vec<T> (&s)[MOST_ROWS][2], T* out) {
#pragma GCC unroll 16
  for (int i = 0; i < MOST_ROWS; ++i) {
    store(out + i * WIDTH<T>, s[i][0]);
    store(out + i * WIDTH<T> + LANES<T>, s[i][1]);
  }
}

// The smallest s of every lane.
template <class T>
PK_INLINE void smallest(const Vec<T> (&s)[MOST_ROWS][2], Vec<T> (&least)[2]) {
  for (int half = 0; half < 2; ++half) least[half] = s[0][half];
#pragma GCC unroll 16
  for (int i = 1; i < MOST_ROWS; ++i)
    for (int half = 0; half < 2; ++half) least[half] = smaller<T>(s[i][half], least[half]);
}

// The scores of a tile against a panel but for the last DEPTH columns or fewer, which begin at the column returned.
template <class T>
PK_INLINE int64_t partial_scores(const Tile<T>& tile, int64_t rows, const T* panel, T* partial) {
  int64_t first = 0;
  for (; first + DEPTH < tile.p.D; first += DEPTH)
    for (int64_t i0 = 0; i0 < rows; i0 += MOST_ROWS) {
      Vec<T> s[MOST_ROWS][2];
      T* const own = partial + i0 * WIDTH<T>;
      scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, first, first + DEPTH, own, s);
      keep_scores(s, own);
    }
  return first;
}

// Candidates of a panel among the first rows of all, up to FIRST_ROWS; returns how many rows. Most of them would go into the lists, each by branches
// nobody can guess: instead the k smallest s + 2 e_b of every lane are exchanged into place, and what is below the limits they give is taken.
template <class T>
int64_t scan_first(const Tile<T>& tile, int64_t rows, int64_t first_query, int64_t column, Block<T>& block) {
  const int64_t k = block.p.k, count = std::min(round_up(rows, MOST_ROWS), FIRST_ROWS);
  const T* const panel = block.panels.data + first_query * block.p.D;
  T* const partial = tile.partial.data;
  Vec<T> least[LISTED][2];
  for (int64_t n = 0; n < k; ++n) least[n][0] = least[n][1] = broadcast(std::numeric_limits<T>::infinity());
  for (int64_t i0 = 0; i0 < count; i0 += MOST_ROWS) {
    Vec<T> s[MOST_ROWS][2];
    scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, column, block.p.D, partial + i0 * WIDTH<T>, s);
    keep_scores(s, partial + i0 * WIDTH<T>);
    for (int i = 0; i < MOST_ROWS; ++i) {
      Vec<T> high[2] = {s[i][0] + tile.width.data[i0 + i], s[i][1] + tile.width.data[i0 + i]};
      for (int64_t n = 0; n < k; ++n)
        for (int half = 0; half < 2; ++half) {
          const Vec<T> own = least[n][half];
          least[n][half] = smaller<T>(high[half], own);
          high[half] = larger<T>(high[half], own);
        }
    }
  }
  alignas(64) T heights[LISTED][WIDTH<T>];
  for (int64_t n = 0; n < k; ++n)
    for (int half = 0; half < 2; ++half) store(heights[n] + half * LANES<T>, least[n][half]);
  for (int lane = 0; lane < WIDTH<T>; ++lane) block.begin_list(first_query + lane, heights[0] + lane, WIDTH<T>);
  const T* const limit = block.limit.data + first_query;
  for (int64_t i = 0; i < count; ++i)
    for (int half = 0; half < 2; ++half) {
      const T* const own = partial + i * WIDTH<T> + half * LANES<T>;
      for (unsigned bits = lanes_not_above<T>(load(own), load(limit + half * LANES<T>)); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        block.take(first_query + half * LANES<T> + lane, own[lane], static_cast<int32_t>(i));
      }
    }
  return count;
}

// Candidates of a panel among the rows of a tile.
template <class T, bool LIST>
void scan(const Tile<T>& tile, int64_t rows, int32_t first_row, int64_t first_query, Block<T>& block) {
  const T* const panel = block.panels.data + first_query * block.p.D;
  T* const limit = block.limit.data + first_query;
  const int64_t column = partial_scores(tile, rows, panel, tile.partial.data);
  int64_t i0 = LIST && first_row == 0 ? scan_first(tile, rows, first_query, column, block) : 0;
  for (; i0 < rows; i0 += MOST_ROWS) {
    Vec<T> s[MOST_ROWS][2];
    scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, column, block.p.D, tile.partial.data + i0 * WIDTH<T>,
           s);
    const Vec<T> limits[2] = {load(limit), load(limit + LANES<T>)};
    Vec<T> least[2];
    smallest<T>(s, least);
    if (!any_lane((least[0] <= limits[0]) | (least[1] <= limits[1]))) continue;
    alignas(64) T found[MOST_ROWS][WIDTH<T>];
    keep_scores(s, found[0]);
    for (int i = 0; i < MOST_ROWS; ++i)
      for (int half = 0; half < 2; ++half)
        for (unsigned bits = lanes_not_above<T>(load(found[i] + half * LANES<T>), load(limit + half * LANES<T>)); bits; bits &= bits - 1) {
          const int lane = half * LANES<T> + __builtin_ctz(bits);
          const int32_t row = first_row + static_cast<int32_t>(i0) + i;
          if constexpr (LIST)
            block.push(first_query + lane, found[i][lane], tile.width.data[i0 + i], row);
          else
            block.gather(first_query + lane, found[i][lane], tile.width.data[i0 + i], row);
        }
  }
}

// From this row on a tile seldom holds one of the two smallest s of any of its lanes so far: at row r, 2 MOST_ROWS WIDTH / r are expected.
template <class T>
constexpr int64_t FEW_CHANGES = 2 * MOST_ROWS * WIDTH<T>;

// The same for k = 1: the smallest and second smallest s stay in registers.
template <class T>
void scan_one(const Tile<T>& tile, int64_t rows, int32_t first_row, int64_t first_query, Block<T>& block) {
  const T* const panel = block.panels.data + first_query * block.p.D;
  T* const states[3] = {block.limit.data + first_query, block.second.data + first_query, block.height.data + first_query};
  const int64_t column = partial_scores(tile, rows, panel, tile.partial.data);
  Index<T> nearest[2];
  Vec<T> best[2], second[2], height[2];
  for (int half = 0; half < 2; ++half) {
    std::memcpy(&nearest[half], block.nearest.data + first_query + half * LANES<T>, sizeof nearest[half]);
    best[half] = load(states[0] + half * LANES<T>);
    second[half] = load(states[1] + half * LANES<T>);
    height[half] = load(states[2] + half * LANES<T>);
  }
  for (int64_t i0 = 0; i0 < rows; i0 += MOST_ROWS) {
    Vec<T> s[MOST_ROWS][2];
    scores(tile.rows.data + i0 * tile.stride, tile.stride, tile.low.data + i0, panel, column, block.p.D, tile.partial.data + i0 * WIDTH<T>,
           s);
    if (first_row + i0 >= FEW_CHANGES<T>) {
      Vec<T> least[2];
      smallest<T>(s, least);
      if (!any_lane((least[0] < second[0]) | (least[1] < second[1]))) continue;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MOST_ROWS; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Index<T> less = s[i][half] < best[half];
        const Vec<T> loser = less ? best[half] : s[i][half];
        second[half] = loser < second[half] ? loser : second[half];
        best[half] = less ? s[i][half] : best[half];
        height[half] = less ? s[i][half] + tile.width.data[i0 + i] : height[half];
        nearest[half] = less ? Index<T>{} + (first_row + static_cast<int32_t>(i0) + i) : nearest[half];
      }
  }
  for (int half = 0; half < 2; ++half) {
    std::memcpy(block.nearest.data + first_query + half * LANES<T>, &nearest[half], sizeof nearest[half]);
    store(states[0] + half * LANES<T>, best[half]);
    store(states[1] + half * LANES<T>, second[half]);
    store(states[2] + half * LANES<T>, height[half]);
  }
}

template <class T>
void scan_block(const NearestProblem& p, Tile<T>& tile, Block<T>& block, int64_t first_row, int64_t last_row) {
  for (int64_t first = first_row; first < last_row; first += tile.most) {
    const int64_t rows = std::min(tile.most, last_row - first);
    if (!tile.fill(first, rows)) {
      for (int64_t query = 0; query < block.padded; ++query) block.distrust(query);
      return;
    }
    const int32_t part_row = static_cast<int32_t>(first - first_row);
    for (int64_t query = 0; query < block.padded; query += WIDTH<T>) {
      if (p.k == 1)
        scan_one(tile, rows, part_row, query, block);
      else if (p.k <= LISTED)
        scan<T, true>(tile, rows, part_row, query, block);
      else
        scan<T, false>(tile, rows, part_row, query, block);
    }
  }
}

// What the filter left of a query after rows [first_row, ...), into found: how many, or -1 if it cannot tell.
template <class T>
int64_t leave(Block<T>& block, int64_t query, int64_t first_row, NearestCandidate* found) {
  const NearestProblem& p = block.p;
  if (!block.trusted.data[query]) return -1;
  if (p.k == 1) {
    if (block.limit.data[query] == std::numeric_limits<T>::max()) return -1;  // no row was finite
    found[0].index = first_row + block.nearest.data[query];
    return block.second.data[query] > rounded_up<T>(static_cast<double>(block.height.data[query]) + block.margin.data[query]) ? 1 : -1;
  }
  if (block.counts.data[query] < p.k) return -1;
  if (p.k > LISTED)
    block.select(query);
  else
    block.shrink(query);
  if (!block.trusted.data[query]) return -1;
  const Candidate<T>* const own = block.candidates.data + query * block.capacity;
  for (int32_t i = 0; i < block.counts.data[query]; ++i) found[i].index = first_row + own[i].row;
  return block.counts.data[query];
}

template <class T>
void write(const NearestProblem& p, int64_t query, const NearestCandidate* nearest) {
  for (int64_t i = 0; i < p.k; ++i) {
    static_cast<T*>(p.distances)[query * p.k + i] = static_cast<T>(nearest[i].distance);
    p.indices[query * p.k + i] = nearest[i].index;
  }
}

// The neighbours of a query: the result, or one of several parts.
template <class T>
PK_INLINE void deliver(const NearestProblem& p, int64_t query, const NearestCandidate* nearest, NearestCandidate* candidates, int64_t part,
                       int64_t parts) {
  if (!candidates) return write<T>(p, query, nearest);
  for (int64_t i = 0; i < p.k; ++i) candidates[(query * parts + part) * p.k + i] = nearest[i];
}

template <class T>
void search_units(const NearestProblem& p, NearestUnits units, const T* center, NearestCandidate* candidates, int64_t begin, int64_t end) {
  const NearestExact& exact = PK_LEVEL_TABLE(nearest_exact);
  const bool filter = p.N > 4 && p.D > 0 && p.k <= MOST_FILTERED;  // few queries do not fill the lanes
  Tile<T> tile(p, center);
  Block<T> block(p, filter ? units.block : 0);
  Scratch<char> workspace(exact.workspace_bytes(p));
  Scratch<NearestCandidate> found(std::max(p.k, block.capacity)), ones(p.k == 1 ? units.block : 0);
  Scratch<int64_t> queries(p.k == 1 ? units.block : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % units.parts, first_query = unit / units.parts * units.block;
    const int64_t count = std::min(units.block, p.N - first_query);
    const int64_t first_row = part * units.part, last_row = std::min(p.M, first_row + units.part);
    if (filter) {
      block.begin(first_query, count, tile);
      scan_block(p, tile, block, first_row, last_row);
    }
    int64_t known = 0;  // k = 1: queries whose neighbour the filter has found, measured together
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = first_query + i, left = filter ? leave(block, i, first_row, found.data) : -1;
      if (left == 1 && p.k == 1) {
        queries.data[known] = query;
        ones.data[known++].index = found.data[0].index;
        continue;
      }
      if (left < 0)
        exact.rank_all(p, query, first_row, last_row, found.data, workspace.data);
      else
        exact.rank(p, query, found.data, left, workspace.data);
      deliver<T>(p, query, found.data, candidates, part, units.parts);
    }
    exact.measure(p, queries.data, ones.data, known, workspace.data);
    for (int64_t i = 0; i < known; ++i) deliver<T>(p, queries.data[i], ones.data + i, candidates, part, units.parts);
  }
}

// The mean of up to a thousand rows, and the power of two that makes their lengths about 1, so that squares neither overflow nor vanish;
// rows that hold no finite numbers are left out.
template <class T>
void center_of(const NearestProblem& p, T* center) {
  Scratch<double> sum(p.D);
  Scratch<T> row(p.D);
  for (int64_t j = 0; j < p.D; ++j) sum.data[j] = 0;
  const int64_t step = p.M / 1024 + 1;
  double count = 0, squares = 0;
  for (int64_t i = 0; i < p.M && !p.cosine; i += step) {
    read_row(p.bank, p.bank_kind, i * p.bank_stride, row.data, p.D);
    const double square = squared_norm(row.data, p.D);
    if (!std::isfinite(square)) continue;
    squares += square;
    for (int64_t j = 0; j < p.D; ++j) sum.data[j] += row.data[j];
    ++count;
  }
  for (int64_t j = 0; j < p.D; ++j) center[j] = count > 0 ? static_cast<T>(sum.data[j] / count) : T(0);
  constexpr int most = std::numeric_limits<T>::max_exponent - 2;
  const bool usable = squares > 0 && std::isfinite(squares);
  center[p.D] = std::ldexp(T(1), usable ? std::clamp(-std::ilogb(std::sqrt(squares / count)), -most, most) : 0);
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
