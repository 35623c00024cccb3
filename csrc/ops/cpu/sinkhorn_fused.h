// SPDX-License-Identifier: MIT
// The fused pass of Sinkhorn: K v, a scale for each row from it, and the sums of the scaled columns, in one read of K.
#pragma once

#include <algorithm>

#include "common/pieces.h"
#include "common/simd.h"

namespace {

constexpr int ROWS = 4;               // rows of K that go through the fused pass together
constexpr int64_t HELD_STRIDE = 128;  // longest rows that go by eight: beyond, K comes from L2, which is the limit

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
    const Vec<T> s =
        __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
  } else {
    return Four<T>{reduce_sum(a), reduce_sum(b), reduce_sum(c), reduce_sum(d)};
  }
}

// The last columns of K by themselves, [columns, rows], where one or two stand behind whole vectors, as in 49 = 3 x 16 + 1: four rows take a
// multiply-add for each of them instead of four for a vector that is nearly empty.
template <class T>
struct Tail {
  static constexpr int MOST = 2;
  static constexpr int64_t VECTORS = 7;  // of rows of more vectors one is too small a part
  int columns = 0;
  int64_t rows = 0;
  T* kernel = nullptr;

  Tail() = default;
  Tail(int64_t M, int64_t all_rows, Arena& arena) : rows(all_rows) {
    const int64_t behind = M % LANES<T>;
    if (M > LANES<T> && M < VECTORS * LANES<T> && behind <= MOST) columns = static_cast<int>(behind);
    kernel = arena.take<T>(columns * rows);
  }
  void copy(const T* whole, int64_t stride, int64_t begin, int64_t end) const {
    for (int c = 0; c < columns; ++c)
      for (int64_t i = begin; i < end; ++i) kernel[c * rows + i] = whole[(i + 1) * stride - LANES<T> + c];
  }
};

// sums[j] = sum of scale_i K_ij over rows [begin, end), where scale = finish(i, K v) is known as soon as four rows have met v: K is read once. The sums
// of the columns stay in registers, and v where there are enough of them; rows are read a second time from L1, and the next rows meet v while
// the scale of these is being worked out.
template <class T, int VECTORS, int TAIL, class Finish>
PK_INLINE void fused_rows_narrow(const T* kernel, const Tail<T>& tail, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  constexpr int64_t stride = (VECTORS + (TAIL > 0)) * LANES<T>;
  constexpr bool held = 2 * VECTORS + 10 <= (VECTOR_BYTES == 64 ? 32 : 16);
  Vec<T> sum[VECTORS]{}, weight[held ? VECTORS : 1], r[ROWS];
  Four<T> tail_sum[TAIL + 1]{}, r_tail{};
  const auto meet = [&](int64_t i) __attribute__((always_inline)) {
    const T* const rows = kernel + i * stride;
#pragma GCC unroll 16
    for (int c = 0; c < VECTORS; ++c) {
      const Vec<T> w = held ? weight[held ? c : 0] : load(v + c * LANES<T>);
#pragma GCC unroll 4
      for (int row = 0; row < ROWS; ++row) {
        const Vec<T> product = load(rows + row * stride + c * LANES<T>) * w;
        r[row] = c == 0 ? product : r[row] + product;
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < TAIL; ++c) {
      const Four<T> product = load_four(tail.kernel + c * tail.rows + i) * v[VECTORS * LANES<T> + c];
      r_tail = c == 0 ? product : r_tail + product;
    }
  };
  if constexpr (held)
#pragma GCC unroll 16
    for (int c = 0; c < VECTORS; ++c) weight[c] = load(v + c * LANES<T>);
  if (begin < end) meet(begin);
  for (int64_t i = begin; i < end; i += ROWS) {
    const T* const rows = kernel + i * stride;
    Four<T> met = sum_four<T>(r[0], r[1], r[2], r[3]);
    if constexpr (TAIL > 0) met += r_tail;
    const Four<T> scale = finish(i, met);
    if (i + ROWS < end) meet(i + ROWS);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      const Vec<T> s = broadcast(scale[row]);
#pragma GCC unroll 16
      for (int c = 0; c < VECTORS; ++c) sum[c] += s * load(rows + row * stride + c * LANES<T>);
    }
#pragma GCC unroll 4
    for (int c = 0; c < TAIL; ++c) tail_sum[c] += scale * load_four(tail.kernel + c * tail.rows + i);
  }
#pragma GCC unroll 16
  for (int c = 0; c < VECTORS; ++c) store(sums + c * LANES<T>, sum[c]);
  if constexpr (TAIL > 0) store(sums + VECTORS * LANES<T>, Vec<T>{});
#pragma GCC unroll 4
  for (int c = 0; c < TAIL; ++c) sums[VECTORS * LANES<T> + c] = (tail_sum[c][0] + tail_sum[c][1]) + (tail_sum[c][2] + tail_sum[c][3]);
}

// Of more than a few vectors as a function of its own: all in one would have to share registers, which cost a tenth of the time.
template <class T, int VECTORS, int TAIL, class Finish>
__attribute__((noinline)) void fused_rows_apart(const T* kernel, Tail<T> tail, int64_t begin, int64_t end, const T* v, T* sums,
                                                Finish finish) {
  fused_rows_narrow<T, VECTORS, TAIL>(kernel, tail, begin, end, v, sums, finish);
}
template <class T, int VECTORS, int TAIL, class Finish>
PK_INLINE void fused_rows_of(const T* kernel, const Tail<T>& tail, int64_t begin, int64_t end, const T* v, T* sums, Finish& finish) {
  if constexpr (VECTORS < 4)
    fused_rows_narrow<T, VECTORS, TAIL>(kernel, tail, begin, end, v, sums, finish);
  else
    fused_rows_apart<T, VECTORS, TAIL>(kernel, tail, begin, end, v, sums, finish);
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
__attribute__((noinline)) void fused_rows_long(const T* kernel, int64_t stride, int64_t begin, int64_t end, const T* v, T* sums,
                                               Finish finish) {
  std::fill(sums, sums + stride, T(0));
  if (VECTOR_BYTES < 64 && stride <= HELD_STRIDE) begin = fused_rows_by_eight(kernel, stride, begin, end, v, sums, finish);
  for (int64_t i = begin; i < end; i += ROWS)
    add_four(kernel + i * stride, stride, finish(i, four_sums(kernel + i * stride, stride, v)), sums);
}

template <class T, int VECTORS = VECTOR_BYTES == 64 ? 16 : 8, class Finish>
PK_INLINE void fused_rows(const T* kernel, int64_t stride, const Tail<T>& tail, int64_t begin, int64_t end, const T* v, T* sums,
                          Finish& finish) {
  if constexpr (VECTORS == 0) {
    fused_rows_long<T>(kernel, stride, begin, end, v, sums, finish);
  } else if (stride != VECTORS * LANES<T>) {
    fused_rows<T, VECTORS - 1>(kernel, stride, tail, begin, end, v, sums, finish);
  } else {
    if constexpr (VECTORS > 1 && VECTORS <= Tail<T>::VECTORS) {
      static_assert(Tail<T>::MOST == 2);
      if (tail.columns == 1) return fused_rows_of<T, VECTORS - 1, 1>(kernel, tail, begin, end, v, sums, finish);
      if (tail.columns == 2) return fused_rows_of<T, VECTORS - 1, 2>(kernel, tail, begin, end, v, sums, finish);
    }
    fused_rows_of<T, VECTORS, 0>(kernel, tail, begin, end, v, sums, finish);
  }
}

}  // namespace
