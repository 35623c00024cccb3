// SPDX-License-Identifier: MIT
// What the dense Sinkhorn kernels share: rows of any length as vectors, scratch, and the fused pass over the absorbed kernel matrix
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
#include "ops/sinkhorn.h"

#define PK_MEMBER inline __attribute__((always_inline))

namespace {

using namespace protokernels;

constexpr int ROWS = 4;               // rows of K that go through the fused pass together
constexpr int64_t HELD_STRIDE = 128;  // longest rows that go by eight: beyond, K comes from L2, which is the limit

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

template <class T>
struct FourOf;
template <>
struct FourOf<float> {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct FourOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <class T>
using Four = typename FourOf<T>::type;

template <class T>
PK_INLINE Four<T> load_four(const T* p) {
  Four<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
PK_INLINE void store_four(T* p, Four<T> v) {
  std::memcpy(p, &v, sizeof v);
}

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
  if (count >= LANES<T>)
    store(p, v);
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
};

// --------------------------------------------------------------------------------------------------------------- fused pass

// The sums of the lanes of four vectors.
template <class T>
PK_INLINE Four<T> sum_four(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d) {
  if constexpr (LANES<T> == 16) {
    const Vec<T> ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                      __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const Vec<T> cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                      __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const Vec<T> s = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                     __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return (__builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7)) +
           (__builtin_shufflevector(s, s, 8, 9, 10, 11) + __builtin_shufflevector(s, s, 12, 13, 14, 15));
  } else if constexpr (LANES<T> == 8) {
    const Vec<T> ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec<T> cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec<T> s = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
  } else {
    return Four<T>{reduce_sum(a), reduce_sum(b), reduce_sum(c), reduce_sum(d)};
  }
}

// sums[j] += scale_i K_ij over rows [begin, end), where scale = finish(i, K v) is known as soon as four rows have met v: K is read once. The sums
// of the columns stay in registers, rows are read a second time from L1, and the next rows meet v while the scale of these is being worked out.
template <class T, int VECTORS, class Finish>
PK_INLINE void fused_rows_narrow(const T* kernel, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  constexpr int64_t stride = VECTORS * LANES<T>;
  Vec<T> sum[VECTORS], r[ROWS];
  const auto meet = [&](const T* rows) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int c = 0; c < VECTORS; ++c) {
      const Vec<T> weight = load(v + c * LANES<T>);
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; ++row) {
        const Vec<T> product = load(rows + row * stride + c * LANES<T>) * weight;
        r[row] = c == 0 ? product : r[row] + product;
      }
    }
  };
  if (begin >= end) return;
#pragma GCC unroll 16
  for (int c = 0; c < VECTORS; ++c) sum[c] = load(sums + c * LANES<T>);
  meet(kernel + begin * stride);
  for (int64_t i = begin; i < end; i += ROWS) {
    const T* const rows = kernel + i * stride;
    const Four<T> scale = finish(i, sum_four<T>(r[0], r[1], r[2], r[3]));
    if (i + ROWS < end) meet(rows + ROWS * stride);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const Vec<T> s = broadcast(scale[row]);
#pragma GCC unroll 16
      for (int c = 0; c < VECTORS; ++c) sum[c] += s * load(rows + row * stride + c * LANES<T>);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < VECTORS; ++c) store(sums + c * LANES<T>, sum[c]);
}

// The sums of four rows of K under v. Two chains a row, or the latency of the additions would be the limit.
template <class T>
PK_INLINE Four<T> four_sums(const T* rows, int64_t stride, const T* v) {
  Vec<T> even[ROWS] = {}, odd[ROWS] = {};
  int64_t j = 0;
  for (; j + 2 * LANES<T> <= stride; j += 2 * LANES<T>) {
    const Vec<T> first = load(v + j), second = load(v + j + LANES<T>);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      even[row] += load(rows + row * stride + j) * first;
      odd[row] += load(rows + row * stride + j + LANES<T>) * second;
    }
  }
  if (j < stride)
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) even[row] += load(rows + row * stride + j) * load(v + j);
  return sum_four<T>(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]);
}

// sums += four rows of K, scaled.
template <class T>
PK_INLINE void add_four(const T* rows, int64_t stride, Four<T> scale, T* sums) {
  const Vec<T> s0 = broadcast(scale[0]), s1 = broadcast(scale[1]), s2 = broadcast(scale[2]), s3 = broadcast(scale[3]);
  for (int64_t j = 0; j < stride; j += LANES<T>) {
    const Vec<T> upper = s0 * load(rows + j) + s1 * load(rows + stride + j);
    const Vec<T> lower = s2 * load(rows + 2 * stride + j) + s3 * load(rows + 3 * stride + j);
    store(sums + j, load(sums + j) + (upper + lower));
  }
}

// Eight rows at a time: the columns' sums are read and written half as often. Returns the first row that is left.
template <class T, class Finish>
PK_INLINE int64_t fused_rows_by_eight(const T* kernel, int64_t stride, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  constexpr int EIGHT = 2 * ROWS;
  Vec<T> r[EIGHT];
  const auto meet = [&](const T* rows) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int row = 0; row < EIGHT; ++row) r[row] = Vec<T>{};
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> weight = load(v + j);
#pragma GCC unroll 8
      for (int row = 0; row < EIGHT; ++row) r[row] += load(rows + row * stride + j) * weight;
    }
  };
  int64_t i = begin;
  if (i + EIGHT <= end) meet(kernel + i * stride);
  for (; i + EIGHT <= end; i += EIGHT) {
    const T* const rows = kernel + i * stride;
    const Four<T> upper = finish(i, sum_four<T>(r[0], r[1], r[2], r[3])), lower = finish(i + ROWS, sum_four<T>(r[4], r[5], r[6], r[7]));
    if (i + 2 * EIGHT <= end) meet(rows + EIGHT * stride);
    Vec<T> s[EIGHT];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) s[row] = broadcast(upper[row]), s[ROWS + row] = broadcast(lower[row]);
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      Vec<T> sum = load(sums + j);
#pragma GCC unroll 8
      for (int row = 0; row < EIGHT; ++row) sum += s[row] * load(rows + row * stride + j);
      store(sums + j, sum);
    }
  }
  return i;
}

template <class T, class Finish>
PK_INLINE void fused_rows_long(const T* kernel, int64_t stride, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  if (VECTOR_BYTES < 64 && stride <= HELD_STRIDE) begin = fused_rows_by_eight(kernel, stride, begin, end, v, sums, finish);
  for (int64_t i = begin; i < end; i += ROWS)
    add_four(kernel + i * stride, stride, finish(i, four_sums(kernel + i * stride, stride, v)), sums);
}

template <class T, int VECTORS = VECTOR_BYTES == 64 ? 16 : 8, class Finish>
PK_INLINE void fused_rows(const T* kernel, int64_t stride, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  if constexpr (VECTORS == 0)
    fused_rows_long<T>(kernel, stride, begin, end, v, sums, finish);
  else if (stride != VECTORS * LANES<T>)
    fused_rows<T, VECTORS - 1>(kernel, stride, begin, end, v, sums, finish);
  else
    fused_rows_narrow<T, VECTORS>(kernel, begin, end, v, sums, finish);
}

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
