// SPDX-License-Identifier: MIT
// What the dense Sinkhorn kernels share: rows of any length as vectors, chunks, and the absorbed kernel matrix
//
//   K_ij = exp(row_center_i + column_center_j - C_ij / epsilon),     P_ij = row_scale_i K_ij column_scale_j
//
// The centers are potentials of some moment, so the scales stay near 1 and the exponential stays out of the loop.
#pragma once

#include <algorithm>
#include <limits>

#include "common/cpu_level.h"
#include "common/exponentials.h"
#include "common/pieces.h"
#include "common/tile_product.h"
#include "ops/cpu/sinkhorn_fused.h"
#include "ops/sinkhorn.h"

namespace {

using namespace protokernels;

template <class T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();

// Scales beyond large (or below its inverse) are absorbed. A sum that is small against the largest scale is not trusted: exponentials that
// were flushed to zero could have mattered in it.
template <class T>
constexpr T LARGE_SCALE = sizeof(T) == 4 ? T(1e13) : T(1e100);
template <class T>
constexpr T TRUSTED_SUM = sizeof(T) == 4 ? T(1e-28) : T(1e-180);
template <class T>
constexpr T LARGEST_SUM = sizeof(T) == 4 ? T(1e30) : T(1e200);

// ------------------------------------------------------------------------------------------------------------- rows and scratch

template <class Function>
PK_INLINE void for_chunks(SinkhornEach each, int64_t count, Function function) {
  if (each == nullptr || count == 1) {
    for (int64_t chunk = 0; chunk < count; ++chunk) function(chunk);
    return;
  }
  const auto body = [](void* context, int64_t chunk) {
    [[maybe_unused]] const FlushToZero flush;
    (*static_cast<Function*>(context))(chunk);
  };
  each(count, body, &function);
}

// The first count lanes come from memory, the others are fill; readable elements lie behind p, maybe of the next row.
template <class T>
PK_INLINE Vec<T> load_part(const T* p, int64_t count, [[maybe_unused]] int64_t readable, T fill) {
  if (count >= LANES<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_loadups512_mask(p, broadcast(fill), static_cast<uint16_t>((1u << count) - 1));
  else
    return __builtin_ia32_loadupd512_mask(p, broadcast(fill), static_cast<uint8_t>((1u << count) - 1));
#else
  Vec<T> v{};
  if (readable >= LANES<T>)
    v = load(p);
  else
    std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
  return lane_numbers<T>() < Index<T>{} + static_cast<int>(count) ? v : broadcast(fill);
#endif
}

template <class T>
PK_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
  if (count >= LANES<T>) store(p, v);
#if defined(__AVX512F__)
  else if constexpr (sizeof(T) == 4)
    __builtin_ia32_storeups512_mask(p, v, static_cast<uint16_t>((1u << count) - 1));
  else
    __builtin_ia32_storeupd512_mask(p, v, static_cast<uint8_t>((1u << count) - 1));
#else
  else
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(T));
#endif
}

template <class T>
PK_INLINE void copy_padded(T* out, const T* in, int64_t count, int64_t padded, T fill) {
  std::copy(in, in + count, out);
  std::fill(out + count, out + padded, fill);
}

// exp for any x: what would overflow stays below infinity.
template <class T>
PK_INLINE Vec<T> exp_any(Vec<T> x) {
  const Vec<T> top = broadcast(sizeof(T) == 4 ? T(88) : T(700));
  return exp_nonpositive(x > top ? top : x);
}

template <class T>
PK_INLINE Vec<T> absolute(Vec<T> x) {
  return x < Vec<T>{} ? -x : x;
}

// One dense problem's cost.
template <class T>
struct Cost {
  const T* data;  // [N, M]
  int64_t N, M;
  T inverse_epsilon;

  PK_MEMBER Vec<T> at(int64_t i, int64_t j, T fill) const { return load_part(data + i * M + j, M - j, (N - i) * M - j, fill); }
  // v_j - C_ij / epsilon; -infinity where v is, whatever the cost says there. v is -infinity after the last column.
  PK_MEMBER Vec<T> score(int64_t i, int64_t j, const T* v) const {
    const Vec<T> column = load(v + j), absent = broadcast(-INFINITE<T>);
    return column == absent ? absent : column - at(i, j, T(0)) * inverse_epsilon;
  }
  bool has_nan(int64_t i, const T* v) const {
    bool found = false;
    for (int64_t j = 0; j < M; ++j) found |= v[j] != -INFINITE<T> && std::isnan(v[j] - data[i * M + j]);
    return found;
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel matrix

// K around the centers, rows [begin, end) of a multiple of ROWS; rows after the last and columns after the last are 0.
template <class T>
PK_INLINE void fill_kernel(const Cost<T>& cost, const T* row_center, const T* column_center, T* kernel, int64_t stride, int64_t begin,
                           int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const row = kernel + i * stride;
    if (i >= cost.N || row_center[i] == -INFINITE<T>) {
      std::fill(row, row + stride, T(0));
      continue;
    }
    for (int64_t j = 0; j < stride; j += LANES<T>) store(row + j, exp_any<T>(row_center[i] + cost.score(i, j, column_center)));
  }
}

// Moves scales into centers.
template <class T>
PK_INLINE void absorb(T* center, T* scale, const T* active, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES<T>) {
    const Vec<T> none{}, moved = load(center + i) + log_nonnegative(load(scale + i));
    store(center + i, load(active + i) == none ? broadcast(-INFINITE<T>) : moved);
    store(scale + i, load(active + i) == none ? none : broadcast(T(1)));
  }
}

// total[j] = the partial sums of the chunks, added up in order.
template <class T>
PK_INLINE void add_chunks(T* partial, int64_t stride, int64_t count) {
  for (int64_t c = 1; c < count; ++c)
    for (int64_t j = 0; j < stride; j += LANES<T>) store(partial + j, load(partial + j) + load(partial + c * stride + j));
}

// rho KL(marginal | mass) of one entry; 0 where it is balanced.
PK_INLINE double divergence(double rho, double marginal, double mass) {
  if (std::isinf(rho)) return 0;
  return rho * ((marginal > 0 ? marginal * std::log(marginal / mass) : 0.0) - marginal + mass);
}

// How every kernel begins: with its floating-point type, and without subnormal numbers.
template <class Function>
PK_INLINE auto with_type(Kind kind, Function function) {
  [[maybe_unused]] const FlushToZero flush;
  return kind == Kind::f64 ? function(double{}) : function(float{});
}

}  // namespace
