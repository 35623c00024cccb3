// SPDX-License-Identifier: MIT
// Vectors of the width this file is compiled for, on the compiler's own vector types: one source serves AVX-512, AVX2 and any other CPU.
//
// The build compiles every CPU kernel once per level (PROTOKERNELS_LEVEL = generic, avx2, avx512) with that level's flags. Everything here has
// internal linkage, so that no AVX-512 body of a shared inline function can end up in the generic path.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define PK_INLINE static inline __attribute__((always_inline))
#define PK_MEMBER inline __attribute__((always_inline))  // of a class

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE_ROWS = 8;   // 8 x 2 accumulators of 32 registers
constexpr int MOST_ROWS = 12;  // as many as fit beside two vectors of B
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE_ROWS = 4;  // 4 x 2 accumulators of 16 registers
constexpr int MOST_ROWS = 6;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16;
constexpr int TILE_ROWS = 8;  // 32 registers here, too
constexpr int MOST_ROWS = 12;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int TILE_ROWS = 4;
constexpr int MOST_ROWS = 4;
#endif

template <class T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));

// GCC ignores vector_size on a dependent type inside an alias template's argument list, so the types are spelled out.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef int32_t index __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t index __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Index = typename VectorOf<T>::index;

template <class T>
PK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
PK_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Stores past the caches, p on a vector boundary: memory the caches will not hold anyway is not read before it is written, half its traffic.
// stream_end comes before another thread looks.
template <class T>
PK_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps512(p, v);
  else
    __builtin_ia32_movntpd512(p, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    __builtin_ia32_movntps256(p, v);
  else
    __builtin_ia32_movntpd256(p, v);
#else
  store(p, v);
#endif
}

PK_INLINE void stream_end() {
#if defined(__AVX2__)
  __builtin_ia32_sfence();
#endif
}

// Whether rows of row_bytes from base on are to be streamed: they fall on vector boundaries and are more than caches hold.
PK_INLINE bool worth_streaming(const void* base, int64_t row_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(base) % VECTOR_BYTES == 0 && row_bytes % VECTOR_BYTES == 0 && rows * row_bytes >= int64_t{24} << 20;
}

// Four numbers, whatever the width of the vectors.
template <class T>
struct FourOf {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
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

template <class T>
PK_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // folds to a plain broadcast; x + 0 would not (-0)
}

template <class T>
PK_INLINE Index<T> lane_numbers() {
  if constexpr (LANES<T> == 16)
    return Index<T>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  else if constexpr (LANES<T> == 8)
    return Index<T>{0, 1, 2, 3, 4, 5, 6, 7};
  else if constexpr (LANES<T> == 4)
    return Index<T>{0, 1, 2, 3};
  else
    return Index<T>{0, 1};
}

// While it lives, results of this thread below the smallest normal number become 0: products of small weights are too small to matter, and cost an
// Intel core some 150 cycles each where they are kept. What is read stays as it is.
struct FlushToZero {
#if defined(__SSE__)
  unsigned before = __builtin_ia32_stmxcsr();
  FlushToZero() { __builtin_ia32_ldmxcsr(before | 0x8000); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;
#endif
};

// Horizontal reductions: halving trees, log2(lanes) shuffles each.
template <class V, class Op>
PK_INLINE auto reduce(V v, Op op) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 16) {
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  } else if constexpr (lanes == 8) {
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
  } else if constexpr (lanes == 4) {
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
  } else {
    static_assert(lanes == 2);
    v = op(v, __builtin_shufflevector(v, v, 1, 0));
  }
  return v[0];
}

template <class V>
PK_INLINE auto reduce_sum(V v) {
  return reduce(v, [](V a, V b) { return a + b; });
}
template <class V>
PK_INLINE auto reduce_max(V v) {
  return reduce(v, [](V a, V b) { return a > b ? a : b; });
}
template <class V>
PK_INLINE auto reduce_min(V v) {
  return reduce(v, [](V a, V b) { return a < b ? a : b; });
}

// What op makes of the lanes of each of LANES vectors, that of vector k in lane k. Half of the shuffles that they would take one after another.
template <class T, int HALF, class Op, int... I>
PK_INLINE Vec<T> reduce_halves(Vec<T> a, Vec<T> b, Op op, std::integer_sequence<int, I...>) {
  return op(__builtin_shufflevector(a, b, (I & HALF ? LANES<T> + I : I)...),
            __builtin_shufflevector(a, b, (I & HALF ? LANES<T> + I - HALF : I + HALF)...));
}
template <class T, int HALF, class Op>
PK_INLINE Vec<T> reduce_vectors(Vec<T> (&v)[LANES<T>], Op op) {
#pragma GCC unroll 8
  for (int k = 0; k < HALF; ++k) v[k] = reduce_halves<T, HALF>(v[k], v[k + HALF], op, std::make_integer_sequence<int, LANES<T>>{});
  if constexpr (HALF > 1)
    return reduce_vectors<T, HALF / 2>(v, op);
  else
    return v[0];
}
template <class T, class Op>
PK_INLINE Vec<T> reduce_each(const T* vectors, Op op) {
  Vec<T> v[LANES<T>];
#pragma GCC unroll 16
  for (int k = 0; k < LANES<T>; ++k) v[k] = load(vectors + k * LANES<T>);
  return reduce_vectors<T, LANES<T> / 2>(v, op);
}

template <class T>
PK_INLINE T dot(const T* x, const T* y, int64_t count) {
  constexpr int64_t step = LANES<T>;
  Vec<T> sum[4]{};  // four chains: one would wait for its own additions
  int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] += load(x + i + v * step) * load(y + i + v * step);
  for (; i + step <= count; i += step) sum[0] += load(x + i) * load(y + i);
  T total = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total += x[i] * y[i];
  return total;
}

// x, or floor where x is less. NaN stays NaN. One instruction; GCC makes two of the comparison.
PK_INLINE Vec<float> at_least(Vec<float> x, Vec<float> floor) {
#if defined(__AVX512F__)
  return __builtin_ia32_maxps512_mask(floor, x, x, -1, 4);  // 4: rounding as it is
#elif defined(__AVX2__)
  return __builtin_ia32_maxps256(floor, x);
#else
  return x < floor ? floor : x;
#endif
}

template <class V>
PK_INLINE V magnitude(V x) {
  typedef decltype(x < x) Bits;
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= ~((Bits{} + 1) << (8 * sizeof(x[0]) - 1));
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// x, or ceiling where x is more. NaN stays NaN.
PK_INLINE Vec<float> at_most(Vec<float> x, Vec<float> ceiling) {
#if defined(__AVX512F__)
  return __builtin_ia32_minps512_mask(ceiling, x, x, -1, 4);
#elif defined(__AVX2__)
  return __builtin_ia32_minps256(ceiling, x);
#else
  return x > ceiling ? ceiling : x;
#endif
}

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

}  // namespace
