// SPDX-License-Identifier: MIT
// Vectors of the width this file is compiled for, on the compiler's own vector types: one source serves AVX-512, AVX2 and any other CPU.
//
// The build compiles every CPU kernel once per level (PROTOKERNELS_LEVEL = generic, avx2, avx512) with that level's flags. Everything here has
// internal linkage, so that no AVX-512 body of a shared inline function can end up in the generic path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/kind.h"

#define PK_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int TILE_ROWS = 8;   // 8 x 2 accumulators of 32 registers
constexpr int MOST_ROWS = 12;  // as many as fit beside two vectors of B
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int TILE_ROWS = 4;  // 4 x 2 accumulators of 16 registers
constexpr int MOST_ROWS = 6;
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

// exp(x) for x <= 0, to one unit in the last place; 0 below -87.3 at full speed, where libraries fall into denormals. NaN stays NaN.
PK_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));  // they wrap where x is too small, and are not used there
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const Vec<float> t = x * 1.44269504f + magic;
  const Vec<float> n = t - magic;
  const Vec<float> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  Vec<float> p = broadcast(1.38888889e-3f);
  p = p * r + 8.33333377e-3f;
  p = p * r + 4.16666679e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Bits exponent, result;
  std::memcpy(&exponent, &t, sizeof t);
  std::memcpy(&result, &p, sizeof p);
  result += exponent << 23;
  Vec<float> y;
  std::memcpy(&y, &result, sizeof y);
  y = x < -87.3f ? Vec<float>{} : y;
  return x == x ? y : x;
}

PK_INLINE Vec<double> exp_nonpositive(Vec<double> x) {  // double is for checking gradients; the library's exp will do
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 2^x for x <= 0 to 1.3 units in the last place; 0 from -127 on at full speed. NaN stays NaN. A softmax that folds log2(e) into its scale needs
// nothing else: 12 instructions instead of the 17 of exp_nonpositive. Adding 127 to the magic number puts the finished exponent into the low bits.
PK_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  const Vec<float> magic = broadcast(12582912.0f + 127.0f), floor = broadcast(-127.0f);
  x = at_least(x, floor);
  const Vec<float> t = x + magic;
  const Vec<float> r = x - (t - magic);
  Vec<float> p = broadcast(1.32647273e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  Index<float> exponent;
  std::memcpy(&exponent, &t, sizeof t);
  exponent <<= 23;
  Vec<float> power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

PK_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// log((1 + m) 2^e) for 1 + m in [1 / sqrt(2), sqrt(2)). N at a time: their chains of multiply-adds fill each other's waits.
template <int N>
PK_INLINE void log_of_parts(const Vec<float> (&m)[N], const Vec<float> (&e)[N], Vec<float> (&y)[N]) {
  constexpr float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  for (int n = 0; n < N; ++n) y[n] = broadcast(7.0376836292e-2f);
#pragma GCC unroll 8
  for (const float coefficient : coefficients)
    for (int n = 0; n < N; ++n) y[n] = y[n] * m[n] + coefficient;
  for (int n = 0; n < N; ++n) y[n] = y[n] * m[n] * (m[n] * m[n]) + e[n] * -2.12194440e-4f;
  for (int n = 0; n < N; ++n) y[n] -= m[n] * m[n] * 0.5f;
  for (int n = 0; n < N; ++n) y[n] = (m[n] + y[n]) + e[n] * 0.693359375f;
}

// The parts of a normal x > 0.
PK_INLINE void split_for_log(Vec<float> x, Vec<float>& m, Index<float>& exponent) {
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));  // -0 wraps, and is not used
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Index<float> above = reinterpret_cast<Index<float>>(bits - 0x3f3504f3);  // 1 / sqrt(2): the mantissa lies in [1 / sqrt(2), sqrt(2))
  exponent = above >> 23;
  const Index<float> mantissa = (above & 0x007fffff) + 0x3f3504f3;
  std::memcpy(&m, &mantissa, sizeof m);
  m -= 1.0f;
}

// log(x) for x >= 0, to two units in the last place: -infinity at 0, infinity stays, NaN stays NaN.
PK_INLINE Vec<float> log_nonnegative(Vec<float> x) {
  const Vec<float> infinity = broadcast(INFINITY);
  Vec<float> m[1], e[1], logs[1];
  Index<float> exponent;
  split_for_log(x < 1.17549435e-38f ? x * 16777216.0f : x, m[0], exponent);
  e[0] = __builtin_convertvector(exponent, Vec<float>);
  e[0] = x < 1.17549435e-38f ? e[0] - 24.0f : e[0];
  log_of_parts<1>(m, e, logs);
  const Vec<float> y = x > 0.0f ? logs[0] : x == 0.0f ? -infinity : x;
  return x == infinity ? x : y;
}

PK_INLINE Vec<double> log_nonnegative(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// ------------------------------------------------------------------------------- rows of any floating-point kind

PK_INLINE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

PK_INLINE uint16_t to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
PK_INLINE void read_row(const void* base, Kind kind, int64_t offset, T* out, int64_t count) {
  if (kind == Kind::f32) {
    const float* p = static_cast<const float*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
  } else if (kind == Kind::f64) {
    const double* p = static_cast<const double*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
  } else if (kind == Kind::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(from_bf16(p[i]));
  } else {
    const _Float16* p = static_cast<const _Float16*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
  }
}

template <class T>
PK_INLINE void write_row(void* base, Kind kind, int64_t offset, const T* in, int64_t count) {
  if (kind == Kind::f32) {
    float* p = static_cast<float*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(in[i]);
  } else if (kind == Kind::f64) {
    double* p = static_cast<double*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<double>(in[i]);
  } else if (kind == Kind::bf16) {
    uint16_t* p = static_cast<uint16_t*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = to_bf16(static_cast<float>(in[i]));
  } else {
    _Float16* p = static_cast<_Float16*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<_Float16>(in[i]);
  }
}

PK_INLINE Vec<double> load_double(const double* p) { return load(p); }
PK_INLINE Vec<double> load_double(const float* p) {
  VectorOf<float>::half h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX2__) && !defined(__AVX512F__)
  return __builtin_ia32_cvtps2pd256(h);  // GCC converts the halves one by one
#else
  return __builtin_convertvector(h, Vec<double>);
#endif
}

// Sum of squares in double: no overflow, no underflow for float rows.
PK_INLINE double squared_norm(const float* x, int64_t count) {
  constexpr int64_t step = LANES<double>;
  Vec<double> sum[4]{};
  int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vec<double> d = load_double(x + i + v * step);
      sum[v] += d * d;
    }
  for (; i + step <= count; i += step) sum[0] += load_double(x + i) * load_double(x + i);
  double total = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < count; ++i) total += static_cast<double>(x[i]) * x[i];
  return total;
}

PK_INLINE double squared_norm(const double* x, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i] * x[i];
  return total;
}

}  // namespace
