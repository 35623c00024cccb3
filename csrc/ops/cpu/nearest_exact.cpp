// SPDX-License-Identifier: MIT
// Nearest on the CPU: float64 distances, four rows at a time because one sum waits for its own additions, and ranking by them.
// A product that is fused with its addition is not rounded on the way: CMakeLists.txt forbids that here, so that every level gives the same bits.
#include "ops/cpu/nearest_exact.h"

#include <algorithm>
#include <cmath>

#include "common/scratch.h"
#include "common/simd.h"

namespace {

using namespace protokernels;

constexpr int TOGETHER = 4;

// The query as double, and memory for the rows of the bank that have to be converted.
struct Query {
  Query(const NearestProblem& problem, int64_t query)
      : p(problem), values(p.D), converted(p.bank_kind == Kind::bf16 || p.bank_kind == Kind::f16 ? TOGETHER * p.D : 0) {
    read_row(p.queries, p.queries_kind, query * p.queries_stride, values.data, p.D);
    double square = 0;
    if (p.cosine)
      for (int64_t j = 0; j < p.D; ++j) square += values.data[j] * values.data[j];
    norm = std::sqrt(square);
  }
  const NearestProblem& p;
  Scratch<double> values;
  Scratch<float> converted;
  double norm;
};

template <class B>
PK_INLINE void squared_distances(const Query& query, const B* const (&rows)[TOGETHER], double (&out)[TOGETHER]) {
  double total[TOGETHER]{};
  for (int64_t j = 0; j < query.p.D; ++j)
    for (int i = 0; i < TOGETHER; ++i) {
      const double difference = query.values.data[j] - static_cast<double>(rows[i][j]);
      total[i] += difference * difference;
    }
  for (int i = 0; i < TOGETHER; ++i) out[i] = total[i];
}

template <class B>
PK_INLINE void cosine_distances(const Query& query, const B* const (&rows)[TOGETHER], double (&out)[TOGETHER]) {
  double product[TOGETHER]{}, square[TOGETHER]{};
  for (int64_t j = 0; j < query.p.D; ++j)
    for (int i = 0; i < TOGETHER; ++i) {
      const double b = static_cast<double>(rows[i][j]);
      product[i] += query.values.data[j] * b;
      square[i] += b * b;
    }
  for (int i = 0; i < TOGETHER; ++i) {
    const double norm = std::sqrt(square[i]);
    const bool zero = query.norm <= NEAREST_NORM_FLOOR || norm <= NEAREST_NORM_FLOOR;
    const double distance = 1.0 - (zero ? 0.0 : product[i] / (query.norm * norm));
    out[i] = distance < 0.0 ? 0.0 : distance;
  }
}

// Distances of TOGETHER rows of the bank.
PK_INLINE void distances_of(const Query& query, const int64_t (&indices)[TOGETHER], double (&out)[TOGETHER]) {
  const NearestProblem& p = query.p;
  const auto measure = [&](const auto& rows) { p.cosine ? cosine_distances(query, rows, out) : squared_distances(query, rows, out); };
  if (p.bank_kind == Kind::f64) {
    const double* rows[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) rows[i] = static_cast<const double*>(p.bank) + indices[i] * p.bank_stride;
    return measure(rows);
  }
  const float* rows[TOGETHER];
  for (int i = 0; i < TOGETHER; ++i) {
    rows[i] = static_cast<const float*>(p.bank) + indices[i] * p.bank_stride;
    if (p.bank_kind == Kind::f32) continue;
    float* const row = query.converted.data + i * p.D;
    read_row(p.bank, p.bank_kind, indices[i] * p.bank_stride, row, p.D);
    rows[i] = row;
  }
  measure(rows);
}

void rank(const NearestProblem& p, int64_t index, NearestCandidate* found, int64_t count) {
  const Query query(p, index);
  for (int64_t first = 0; first < count; first += TOGETHER) {
    int64_t indices[TOGETHER];
    double distances[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) indices[i] = found[std::min<int64_t>(first + i, count - 1)].index;
    distances_of(query, indices, distances);
    for (int i = 0; i < TOGETHER && first + i < count; ++i) found[first + i].distance = distances[i];
  }
  std::partial_sort(found, found + p.k, found + count, Nearer{});
}

// A heap whose front is the farthest of the nearest k so far.
void rank_all(const NearestProblem& p, int64_t index, int64_t first_row, int64_t last_row, NearestCandidate* nearest) {
  const Query query(p, index);
  for (int64_t i = 0; i < p.k; ++i) nearest[i] = NO_CANDIDATE;
  for (int64_t first = first_row; first < last_row; first += TOGETHER) {
    int64_t indices[TOGETHER];
    double distances[TOGETHER];
    for (int i = 0; i < TOGETHER; ++i) indices[i] = std::min(first + i, last_row - 1);
    distances_of(query, indices, distances);
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

const NearestExact PK_LEVEL_TABLE(nearest_exact) = {rank, rank_all};

}  // namespace protokernels
