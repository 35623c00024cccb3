// SPDX-License-Identifier: MIT
// Standard normal numbers as a function of a key and an index: Philox4x32-10 (Salmon et al. 2011) and the transformation of Box and Muller. What an
// element gets depends on nothing else, so that noise need not be stored to be used again.
//
// Counter (q low, q high, 0, 0) gives the words w0..w3 and the elements 4 q .. 4 q + 3: with u1 = (w0 + .5) 2^-32 and u2 = w1 2^-32 the first is
// sqrt(-2 ln u1) cos(2 pi u2), the second has the sine, the others come from w2 and w3.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "common/transpose.h"

namespace {

struct PhiloxKey {
  uint32_t low, high;
};

// A 32-bit word in every 64-bit lane. The upper halves hold anything: products leave them, and nothing looks at them before the words are packed.
typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Packed __attribute__((vector_size(VECTOR_BYTES)));

// 64-bit products of the lower halves.
PK_INLINE Words multiply_low(Words a, uint32_t b) {
  const Words factor = Words{} + static_cast<uint64_t>(b);
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(factor)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

PK_INLINE void philox(Words counter, PhiloxKey key, Words (&words)[4]) {
  Words c0 = counter, c1 = counter >> 32, c2{}, c3{};
#pragma GCC unroll 10
  for (uint32_t round = 0; round < 10; ++round) {
    const Words p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(key.low + round * 0x9E3779B9u);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(key.high + round * 0xBB67AE85u);
    c3 = p0;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

PK_INLINE Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < LANES<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

PK_INLINE Vec<float> with_sign_of(Vec<float> x, Packed bits) {  // flips x where bit 1 is set
  Packed raw;
  std::memcpy(&raw, &x, sizeof raw);
  raw ^= (bits & 2u) << 30;
  std::memcpy(&x, &raw, sizeof raw);
  return x;
}

// Both from words; exact to a few units in the last place, also where u1 is next to 1, which float32 cannot tell from 1.
PK_INLINE void box_muller(Packed radius_word, Packed angle_word, Vec<float>& first, Vec<float>& second) {
  typedef Index<float> I;
  // -2 ln u1. t is u1 or, in the upper half, 1 - u1: the small one of the two has all its digits.
  const I word = reinterpret_cast<I>(radius_word), upper = word >> 31;
  const Vec<float> t = (__builtin_convertvector(word ^ upper, Vec<float>) + 0.5f) * 2.3283064365386963e-10f;
  Vec<float> m;
  I exponent;
  split_for_log(upper != 0 ? 1.0f - t : t, m, exponent);
  m = exponent == 0 ? -t : m;  // only in the upper half
  const Vec<float> radius = square_root(log_of_parts(m, __builtin_convertvector(exponent, Vec<float>)) * -2.0f);
  // The nearest quarter turn, and what remains of the angle: |x| <= pi / 4.
  const Packed shifted = angle_word + 0x20000000u, quarter = shifted >> 30;
  const I rest = reinterpret_cast<I>(shifted & 0x3fffffffu) - 0x20000000;
  const Vec<float> x = __builtin_convertvector(rest, Vec<float>) * 1.4629180792671596e-9f, square = x * x;
  Vec<float> s = broadcast(-1.9515295891e-4f), c = broadcast(2.443315711809948e-5f);
  s = s * square + 8.3321608736e-3f;
  s = s * square - 1.6666654611e-1f;
  s = s * square * x + x;
  c = c * square - 1.388731625493765e-3f;
  c = c * square + 4.166664568298827e-2f;
  c = c * square * square + (1.0f - 0.5f * square);
  const auto odd = (quarter & 1u) != 0u;
  first = radius * with_sign_of(odd ? s : c, quarter + 1u);
  second = radius * with_sign_of(odd ? c : s, quarter);
}

// Counters of lanes: those of one 128-bit block lie LANES / 4 apart, so that a transposition inside the blocks puts all elements in order.
PK_INLINE Words lane_counters(bool odd) {
  constexpr int blocks = LANES<float> / 4;
  Words counters{};
  for (int i = 0; i < LANES<float> / 2; ++i) counters[i] = static_cast<uint64_t>(blocks * ((2 * i + odd) % 4) + (2 * i + odd) / 4);
  return counters;
}

// Elements of the counters q .. q + LANES<float> - 1.
PK_INLINE void normal_block(PhiloxKey key, uint64_t q, float* out) {
  constexpr auto every = std::make_integer_sequence<int, LANES<float>>{};
  Words even[4], odd[4];
  philox(lane_counters(false) + q, key, even);
  philox(lane_counters(true) + q, key, odd);
  Packed words[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) words[k] = reinterpret_cast<Packed>((even[k] & 0xffffffffu) | (odd[k] << 32));
  Vec<float> n[4];
  box_muller(words[0], words[1], n[0], n[1]);
  box_muller(words[2], words[3], n[2], n[3]);
  const Vec<float> low01 = unpack<float, 1, false>(n[0], n[1], every), high01 = unpack<float, 1, true>(n[0], n[1], every);
  const Vec<float> low23 = unpack<float, 1, false>(n[2], n[3], every), high23 = unpack<float, 1, true>(n[2], n[3], every);
  store(out, unpack<float, 2, false>(low01, low23, every));
  store(out + LANES<float>, unpack<float, 2, true>(low01, low23, every));
  store(out + 2 * LANES<float>, unpack<float, 2, false>(high01, high23, every));
  store(out + 3 * LANES<float>, unpack<float, 2, true>(high01, high23, every));
}

// The same in float64, where the numbers need not be fast.
PK_INLINE void normal_block(PhiloxKey key, uint64_t q, double* out) {
  for (int lane = 0; lane < LANES<double>; ++lane) {
    Words words[4];
    philox(Words{} + (q + static_cast<uint64_t>(lane)), key, words);
    for (int k = 0; k < 4; k += 2) {
      const double u1 = (static_cast<double>(static_cast<uint32_t>(words[k][0])) + 0.5) * 0x1p-32;
      const double angle = static_cast<double>(static_cast<uint32_t>(words[k + 1][0])) * 0x1p-32 * 6.283185307179586;
      const double radius = std::sqrt(-2 * std::log(u1));
      out[4 * lane + k] = radius * std::cos(angle), out[4 * lane + k + 1] = radius * std::sin(angle);
    }
  }
}

// How many elements normals may write for count of them.
template <class T>
constexpr int64_t normal_room(int64_t count) {
  constexpr int64_t block = 4 * LANES<T>;
  return (count + 3 + block - 1) / block * block;
}

// Elements first .. first + count - 1 of a key, at out + first % 4; room for normal_room(count).
template <class T>
void normals(PhiloxKey key, uint64_t first, int64_t count, T* out) {
  const int64_t end = static_cast<int64_t>(first % 4) + count;
  uint64_t q = first / 4;
  for (int64_t at = 0; at < end; at += 4 * LANES<T>, q += LANES<T>) normal_block(key, q, out + at);
}

}  // namespace
