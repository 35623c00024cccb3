// SPDX-License-Identifier: MIT
// Prototypes on the CPU: what forward, backward and the update from labels share about rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/rows.h"
#include "common/scratch.h"
#include "common/tile_product.h"
#include "ops/prototypes.h"

namespace {

using namespace protokernels;

template <class T>
constexpr Kind kind_of = std::is_same_v<T, float> ? Kind::f32 : Kind::f64;

template <class T>
PK_INLINE double inverse_temperature(const PrototypesProblem& problem) {
  return 1.0 /
         (problem.temperature_pointer ? static_cast<double>(*static_cast<const T*>(problem.temperature_pointer)) : problem.temperature);
}

// 1 / |x|, or 0 for a vector that counts as zero; NaN passes through.
template <class T>
PK_INLINE double inverse_norm(const T* x, int64_t D) {
  const double squared = squared_norm(x, D);
  return squared <= PROTOTYPE_NORM_FLOOR * PROTOTYPE_NORM_FLOOR ? 0.0 : 1.0 / std::sqrt(squared);
}

// Scales a row to unit length. Of a length near the end of float's range the inverse is subnormal, and kernels flush those.
template <class T>
PK_INLINE void make_unit(T* row, int64_t D, double inverse) {
  const T scale = static_cast<T>(inverse);
  if (inverse < static_cast<double>(std::numeric_limits<T>::min()))
    for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(static_cast<double>(row[d]) * inverse);
  else
    for (int64_t d = 0; d < D; ++d) row[d] *= scale;
}

template <class T>
PK_INLINE bool is_finite_row(const T* x, int64_t D) {
  T sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += x[d] * T(0);
  return sum == T(0);
}

// The prototypes as T, unit length for cosine: [K, D].
template <class T>
PK_INLINE void read_prototypes(const PrototypesProblem& problem, T* out) {
  for (int64_t k = 0; k < problem.K; ++k) {
    T* row = out + k * problem.D;
    read_row(problem.prototypes, problem.prototypes_kind, k * problem.D, row, problem.D);
    if (problem.cosine) make_unit(row, problem.D, inverse_norm(row, problem.D));
  }
}

// Adds a row of z to the float64 sum of its cluster.
template <class T>
PK_INLINE void add_row(const void* z, Kind kind, int64_t offset, int64_t D, T* converted, double* sum) {
  const T* row = converted;
  if (kind == kind_of<T>)
    row = static_cast<const T*>(z) + offset;
  else
    read_row(z, kind, offset, converted, D);
  int64_t d = 0;
  for (; d + LANES<double> <= D; d += LANES<double>) store(sum + d, load(sum + d) + load_double(row + d));
  for (; d < D; ++d) sum[d] += static_cast<double>(row[d]);
}

}  // namespace
