// SPDX-License-Identifier: MIT
// The register tile under every CPU kernel here: TILE_ROWS (or up to MOST_ROWS) x 2 vectors of C (+)= A B, with B packed in panels two
// vectors wide.
#pragma once

#include "common/simd.h"

namespace {

PK_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// C[i, :] (+)= sum_p a[i * a_row + p * a_depth] * b[p * b_depth + :] for ROWS rows and VECTORS vectors of columns.
template <class T, int VECTORS, int ROWS = TILE_ROWS>
PK_INLINE void tile_product(const T* a, int64_t a_row, int64_t a_depth, const T* b, int64_t b_depth, int64_t depth, T* c, int64_t c_row,
                            bool accumulate) {
  Vec<T> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = accumulate ? load(c + i * c_row + v * LANES<T>) : Vec<T>{};
  for (int64_t p = 0; p < depth; ++p) {
    Vec<T> column[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) column[v] = load(b + p * b_depth + v * LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = broadcast(a[i * a_row + p * a_depth]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += x * column[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(c + i * c_row + v * LANES<T>, sum[i][v]);
}

// Packed panels of a [depth, columns] matrix: panel after panel of 2 vectors (the last may be 1), each stored depth-major.
// Element (p, j) of the matrix comes from source[p * source_depth + j * source_column].
template <class T>
PK_INLINE void pack_panels(const T* source, int64_t source_depth, int64_t source_column, int64_t depth, int64_t columns, T* panels) {
  const int64_t padded = round_up(columns, LANES<T>);
  for (int64_t j0 = 0; j0 < padded; j0 += 2 * LANES<T>) {
    const int64_t width = padded - j0 < 2 * LANES<T> ? LANES<T> : 2 * LANES<T>;
    T* panel = panels + j0 * depth;
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t j = 0; j < width; ++j)
        panel[p * width + j] = j0 + j < columns ? source[p * source_depth + (j0 + j) * source_column] : T(0);
  }
}

// C [rows, columns padded] = A [rows, depth] times packed panels; rows a multiple of TILE_ROWS.
template <class T>
PK_INLINE void multiply_panels(const T* a, int64_t a_row, const T* panels, int64_t rows, int64_t depth, int64_t columns, T* c,
                               int64_t c_row) {
  const int64_t padded = round_up(columns, LANES<T>);
  for (int64_t j0 = 0; j0 < padded; j0 += 2 * LANES<T>) {
    const T* panel = panels + j0 * depth;
    const bool narrow = padded - j0 < 2 * LANES<T>;
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      if (narrow)
        tile_product<T, 1>(a + i * a_row, a_row, 1, panel, LANES<T>, depth, c + i * c_row + j0, c_row, false);
      else
        tile_product<T, 2>(a + i * a_row, a_row, 1, panel, 2 * LANES<T>, depth, c + i * c_row + j0, c_row, false);
    }
  }
}

// C [outputs, columns padded] += A^T B with A [rows, outputs], B [rows, columns padded]; outputs a multiple of TILE_ROWS.
template <class T>
PK_INLINE void accumulate_outer(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t rows, int64_t outputs, int64_t columns, T* c,
                                int64_t c_row) {
  const int64_t padded = round_up(columns, LANES<T>);
  for (int64_t j0 = 0; j0 < padded; j0 += 2 * LANES<T>) {
    const bool narrow = padded - j0 < 2 * LANES<T>;
    for (int64_t i = 0; i < outputs; i += TILE_ROWS) {
      if (narrow)
        tile_product<T, 1>(a + i, 1, a_row, b + j0, b_row, rows, c + i * c_row + j0, c_row, true);
      else
        tile_product<T, 2>(a + i, 1, a_row, b + j0, b_row, rows, c + i * c_row + j0, c_row, true);
    }
  }
}

}  // namespace
