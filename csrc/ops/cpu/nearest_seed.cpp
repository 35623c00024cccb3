// SPDX-License-Identifier: MIT
// Nearest on the CPU, a round of k-means++ (ops/nearest.h). Rows stand in the lanes, transposed a block of columns at a time; candidates are
// broadcast. Compiled without contraction to fused multiply-adds, like nearest_exact.cpp: the same bits on every processor.
//
// Limit at N = 60000, D = 32, 5 candidates: 7.7 MB of rows; 29 MFLOP and the transposition of 1.9 M numbers take less.

#include <algorithm>

#include "common/cpu_level.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "ops/nearest.h"

namespace {

using namespace protokernels;

template <class T>
constexpr int WIDTH = 2 * LANES<T>;  // rows side by side; they divide NEAREST_SEED_ROWS
constexpr int64_t DEPTH = 128;       // columns at a time: the transposed rows stay in the first-level cache

// Columns [first, last) of WIDTH rows, of which the last may stand for others behind it, transposed: [columns, WIDTH].
template <class T>
PK_INLINE void transpose_rows(const T* const (&rows)[WIDTH<T>], int64_t first, int64_t last, T* columns) {
  constexpr int lanes = LANES<T>;
  int64_t j = first;
  for (; j + lanes <= last; j += lanes)
    for (int half = 0; half < 2; ++half) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) square[i] = load(rows[half * lanes + i] + j);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(columns + (j - first + i) * WIDTH<T> + half * lanes, square[i]);
    }
  for (; j < last; ++j)
    for (int i = 0; i < WIDTH<T>; ++i) columns[(j - first) * WIDTH<T> + i] = rows[i][j];
}

// Squared differences of `count` columns added to the sums of COUNT candidates, [COUNT, WIDTH], which begin at zero.
template <int COUNT, class T>
PK_INLINE void add_squares(const T* columns, int64_t count, const T* candidates, int64_t stride, bool begin, T* sums) {
  Vec<T> total[COUNT][2];
#pragma GCC unroll 8
  for (int k = 0; k < COUNT; ++k)
    for (int half = 0; half < 2; ++half) total[k][half] = begin ? Vec<T>{} : load(sums + k * WIDTH<T> + half * LANES<T>);
  for (int64_t j = 0; j < count; ++j) {
    const Vec<T> x0 = load(columns + j * WIDTH<T>), x1 = load(columns + j * WIDTH<T> + LANES<T>);
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) {
      const Vec<T> c = broadcast(candidates[k * stride + j]), y0 = x0 - c, y1 = x1 - c;
      total[k][0] += y0 * y0;
      total[k][1] += y1 * y1;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < COUNT; ++k)
    for (int half = 0; half < 2; ++half) store(sums + k * WIDTH<T> + half * LANES<T>, total[k][half]);
}

template <class T>
PK_INLINE void add_all(const NearestSeed& p, const T* columns, int64_t first, int64_t count, T* sums) {
  const T* const candidates = static_cast<const T*>(p.candidates) + first;
  int64_t k = 0;
  for (; k + TILE_ROWS <= p.K; k += TILE_ROWS)
    add_squares<TILE_ROWS>(columns, count, candidates + k * p.D, p.D, first == 0, sums + k * WIDTH<T>);
  for (; k + 2 <= p.K; k += 2) add_squares<2>(columns, count, candidates + k * p.D, p.D, first == 0, sums + k * WIDTH<T>);
  if (k < p.K) add_squares<1>(columns, count, candidates + k * p.D, p.D, first == 0, sums + k * WIDTH<T>);
}

// The sum in float64: eight of them side by side, on every processor.
template <class T>
PK_INLINE double total_of(const T* values, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(values[i + lane]);
  for (; i < count; ++i) sums[i % 8] += static_cast<double>(values[i]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template <class T>
void seed_chunks(const NearestSeed& p, double* partial, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(p.x);
  const T* const closest = static_cast<const T*>(p.closest);
  T* const closer = static_cast<T*>(p.closer);
  Scratch<T> columns(std::min(DEPTH, p.D) * WIDTH<T>), sums(p.K * WIDTH<T>);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first_row = chunk * NEAREST_SEED_ROWS, last_row = std::min(p.N, first_row + NEAREST_SEED_ROWS);
    for (int64_t row = first_row; row < last_row; row += WIDTH<T>) {
      const T* rows[WIDTH<T>];
      for (int i = 0; i < WIDTH<T>; ++i) rows[i] = x + std::min(row + i, last_row - 1) * p.x_stride;
      for (int64_t j = 0; j < p.D; j += DEPTH) {
        const int64_t count = std::min(DEPTH, p.D - j);
        transpose_rows<T>(rows, j, j + count, columns.data);
        add_all(p, columns.data, j, count, sums.data);
      }
      const int64_t width = std::min<int64_t>(WIDTH<T>, last_row - row);
      for (int64_t k = 0; k < p.K; ++k)
        for (int64_t i = 0; i < width; ++i) closer[k * p.N + row + i] = std::min(closest[row + i], sums.data[k * WIDTH<T> + i]);
    }
    for (int64_t k = 0; k < p.K; ++k) partial[chunk * p.K + k] = total_of(closer + k * p.N + first_row, last_row - first_row);
  }
}

// ------------------------------------------------------------------------------------------------------------------ table

void seed(const NearestSeed& p, double* partial, int64_t begin, int64_t end) {
  p.double_compute ? seed_chunks<double>(p, partial, begin, end) : seed_chunks<float>(p, partial, begin, end);
}

}  // namespace

namespace protokernels {

extern const NearestSeedCpu PK_LEVEL_TABLE(nearest_seed_cpu);
const NearestSeedCpu PK_LEVEL_TABLE(nearest_seed_cpu) = {seed};

}  // namespace protokernels
