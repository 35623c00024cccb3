// SPDX-License-Identifier: MIT
// Nearest on the CPU: float64 distances and ranking by them. A sum runs over the columns one after the other, so pairs of rows stand in the lanes,
// where squares of differences transposed in registers bring them; two vectors of pairs fill each other's waits.
// A product that is fused with its addition is not rounded on the way: CMakeLists.txt forbids that here, so that every level gives the same bits.
#include "ops/cpu/nearest_exact.h"

#include <algorithm>
#include <cmath>

#include "common/rows.h"
#include "common/transpose.h"

namespace {

using namespace protokernels;

constexpr int LANE_COUNT = LANES<double>;
constexpr int TOGETHER = 2 * LANE_COUNT;

bool is_half(Kind kind) { return kind == Kind::bf16 || kind == Kind::f16; }

int64_t workspace_bytes(const NearestProblem& p) {  // rows of half precision as float
  return (is_half(p.queries_kind) + is_half(p.bank_kind)) * TOGETHER * p.D * static_cast<int64_t>(sizeof(float));
}

// Rows of a matrix as float or double: where they are, or converted.
template <class T>
struct Rows {
  const T* row[TOGETHER];
};

PK_INLINE Rows<double> double_rows(const void* base, int64_t stride, const int64_t (&indices)[TOGETHER]) {
  Rows<double> rows;
  for (int i = 0; i < TOGETHER; ++i) rows.row[i] = static_cast<const double*>(base) + indices[i] * stride;
  return rows;
}

PK_INLINE Rows<float> float_rows(const void* base, Kind kind, int64_t stride, const int64_t (&indices)[TOGETHER], int64_t D,
                                 float* converted) {
  Rows<float> rows;
  for (int i = 0; i < TOGETHER; ++i) {
    rows.row[i] = static_cast<const float*>(base) + indices[i] * stride;
    if (kind == Kind::f32) continue;
    if (i > 0 && indices[i] == indices[i - 1]) {
      rows.row[i] = rows.row[i - 1];
      continue;
    }
    read_row(base, kind, indices[i] * stride, converted + i * D, D);
    rows.row[i] = converted + i * D;
  }
  return rows;
}

// Columns j..j + LANE_COUNT of a vector's rows: a vector for each column.
template <class T>
PK_INLINE void load_columns(const T* const* rows, int64_t j, Vec<double> (&columns)[LANE_COUNT]) {
#pragma GCC unroll 8
  for (int i = 0; i < LANE_COUNT; ++i) columns[i] = load_double(rows[i] + j);
  transpose<double>(columns);
}

template <class T>
PK_INLINE Vec<double> load_column(const T* const* rows, int64_t j) {
  Vec<double> column;
  for (int i = 0; i < LANE_COUNT; ++i) column[i] = static_cast<double>(rows[i][j]);
  return column;
}

template <int VECTORS, class Q, class B>
PK_INLINE void squared_distances(const Rows<Q>& q, const Rows<B>& b, int64_t D, double (&out)[TOGETHER]) {
  Vec<double> total[VECTORS]{};
  int64_t j = 0;
  for (; j + LANE_COUNT <= D; j += LANE_COUNT)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const Q* const* const x = q.row + v * LANE_COUNT;
      const B* const* const y = b.row + v * LANE_COUNT;
      Vec<double> difference[LANE_COUNT];
#pragma GCC unroll 8
      for (int i = 0; i < LANE_COUNT; ++i) difference[i] = load_double(x[i] + j) - load_double(y[i] + j);
      transpose<double>(difference);
#pragma GCC unroll 8
      for (int i = 0; i < LANE_COUNT; ++i) total[v] += difference[i] * difference[i];
    }
  for (; j < D; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      const Vec<double> difference = load_column(q.row + v * LANE_COUNT, j) - load_column(b.row + v * LANE_COUNT, j);
      total[v] += difference * difference;
    }
  for (int v = 0; v < VECTORS; ++v) store(out + v * LANE_COUNT, total[v]);
}

template <int VECTORS, class Q, class B>
PK_INLINE void cosine_distances(const Rows<Q>& q, const Rows<B>& b, int64_t D, double (&out)[TOGETHER]) {
  Vec<double> product[VECTORS]{}, q_square[VECTORS]{}, b_square[VECTORS]{};
  const auto add = [&](int v, Vec<double> x, Vec<double> y) {
    product[v] += x * y;
    q_square[v] += x * x;
    b_square[v] += y * y;
  };
  int64_t j = 0;
  for (; j + LANE_COUNT <= D; j += LANE_COUNT)
    for (int v = 0; v < VECTORS; ++v) {
      Vec<double> x[LANE_COUNT], y[LANE_COUNT];
      load_columns(q.row + v * LANE_COUNT, j, x);
      load_columns(b.row + v * LANE_COUNT, j, y);
#pragma GCC unroll 8
      for (int i = 0; i < LANE_COUNT; ++i) add(v, x[i], y[i]);
    }
  for (; j < D; ++j)
    for (int v = 0; v < VECTORS; ++v) add(v, load_column(q.row + v * LANE_COUNT, j), load_column(b.row + v * LANE_COUNT, j));
  for (int i = 0; i < VECTORS * LANE_COUNT; ++i) {
    const int v = i / LANE_COUNT, lane = i % LANE_COUNT;
    const double q_norm = std::sqrt(q_square[v][lane]), b_norm = std::sqrt(b_square[v][lane]);
    const bool zero = q_norm <= NEAREST_NORM_FLOOR || b_norm <= NEAREST_NORM_FLOOR;
    const double distance = 1.0 - (zero ? 0.0 : product[v][lane] / (q_norm * b_norm));
    out[i] = distance < 0.0 ? 0.0 : distance;
  }
}

// Distances of count pairs of a query and a row of the bank; behind them the last pair stands again.
void distances_of(const NearestProblem& p, const int64_t (&queries)[TOGETHER], const int64_t (&rows)[TOGETHER], int64_t count,
                  float* converted, double (&out)[TOGETHER]) {
  const bool one = count <= LANE_COUNT;
  const auto measure = [&](const auto& q, const auto& b) {
    if (p.cosine)
      one ? cosine_distances<1>(q, b, p.D, out) : cosine_distances<2>(q, b, p.D, out);
    else
      one ? squared_distances<1>(q, b, p.D, out) : squared_distances<2>(q, b, p.D, out);
  };
  const auto against = [&](const auto& q) {
    if (p.bank_kind == Kind::f64)
      measure(q, double_rows(p.bank, p.bank_stride, rows));
    else
      measure(q, float_rows(p.bank, p.bank_kind, p.bank_stride, rows, p.D, converted + (is_half(p.queries_kind) ? TOGETHER * p.D : 0)));
  };
  if (p.queries_kind == Kind::f64)
    against(double_rows(p.queries, p.queries_stride, queries));
  else
    against(float_rows(p.queries, p.queries_kind, p.queries_stride, queries, p.D, converted));
}

// of(i) is the query of found[i].
template <class QueryOf>
PK_INLINE void measure_all(const NearestProblem& p, QueryOf of, NearestCandidate* found, int64_t count, void* workspace) {
  for (int64_t first = 0; first < count; first += TOGETHER) {
    int64_t queries[TOGETHER], rows[TOGETHER];
    double distances[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) {
      const int64_t one = std::min<int64_t>(first + i, count - 1);
      queries[i] = of(one);
      rows[i] = found[one].index;
    }
    distances_of(p, queries, rows, count - first, static_cast<float*>(workspace), distances);
    for (int i = 0; i < TOGETHER && first + i < count; ++i) found[first + i].distance = distances[i];
  }
}

void measure(const NearestProblem& p, const int64_t* queries, NearestCandidate* found, int64_t count, void* workspace) {
  measure_all(p, [&](int64_t i) { return queries[i]; }, found, count, workspace);
}

void rank(const NearestProblem& p, int64_t query, NearestCandidate* found, int64_t count, void* workspace) {
  measure_all(p, [&](int64_t) { return query; }, found, count, workspace);
  std::sort(found, found + count, Nearer{});
}

// A heap whose front is the farthest of the nearest k so far.
void rank_all(const NearestProblem& p, int64_t query, int64_t first_row, int64_t last_row, NearestCandidate* nearest, void* workspace) {
  for (int64_t i = 0; i < p.k; ++i) nearest[i] = NO_CANDIDATE;
  int64_t queries[TOGETHER];
  std::fill(queries, queries + TOGETHER, query);
  for (int64_t first = first_row; first < last_row; first += TOGETHER) {
    int64_t rows[TOGETHER];
    double distances[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) rows[i] = std::min(first + i, last_row - 1);
    distances_of(p, queries, rows, last_row - first, static_cast<float*>(workspace), distances);
    for (int i = 0; i < TOGETHER && first + i < last_row; ++i) {
      const NearestCandidate candidate = {distances[i], first + i};
      if (!Nearer{}(candidate, nearest[0])) continue;
      std::pop_heap(nearest, nearest + p.k, Nearer{});
      nearest[p.k - 1] = candidate;
      std::push_heap(nearest, nearest + p.k, Nearer{});
    }
  }
  std::sort_heap(nearest, nearest + p.k, Nearer{});
}

}  // namespace

namespace protokernels {

const NearestExact PK_LEVEL_TABLE(nearest_exact) = {workspace_bytes, measure, rank, rank_all};

}  // namespace protokernels
