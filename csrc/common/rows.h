// SPDX-License-Identifier: MIT
// Rows of any floating-point kind, read and written in the kernels' own.
#pragma once

#include "common/kind.h"
#include "common/simd.h"

namespace {

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC 12 has no _Float16 in C++ here
#else
typedef _Float16 Half;
#endif

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
    const Half* p = static_cast<const Half*>(base) + offset;
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
    Half* p = static_cast<Half*>(base) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Half>(in[i]);
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
