// SPDX-License-Identifier: MIT
// Exponentials and logarithms of vectors. float has its own; double, which checks gradients, has the library's.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace {

// exp(x) for x <= 0, to one unit in the last place; 0 below -87.3 at full speed, where libraries fall into denormals. NaN stays NaN.
PK_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));  // they wrap where x is too small, and are not used there
  const Vec<float> magic = broadcast(12582912.0f);                   // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
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

}  // namespace
