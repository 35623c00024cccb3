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

#include "common/exponentials.h"
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

constexpr uint32_t PHILOX_0 = 0xD2511F53u, PHILOX_1 = 0xCD9E8D57u;

// The key of every round, and for small counters what the second round makes of the key alone: words 2 (without the first product) and 3.
struct PhiloxRounds {
  Words low[10], high[10], second, third;

  // Not inlined: compilers would rather make them again in every round than read them.
  __attribute__((noinline)) explicit PhiloxRounds(PhiloxKey key) {
    for (uint32_t round = 0; round < 10; ++round) {
      low[round] = Words{} + static_cast<uint64_t>(key.low + round * 0x9E3779B9u);
      high[round] = Words{} + static_cast<uint64_t>(key.high + round * 0xBB67AE85u);
    }
    third = multiply_low(low[0], PHILOX_0), second = (third >> 32) ^ high[1];
  }
};

// N counters in every lane, round by round for all: each waits for its own products only. SMALL: no counter reaches 2^32. Its upper three words are zero
// then, two products of the first two rounds are known, and what they do to the key has been done (PhiloxRounds).
template <int N, bool SMALL>
PK_INLINE void philox(const Words (&counter)[N], const PhiloxRounds& key, Words (&words)[N][4]) {
  for (int n = 0; n < N; ++n) {
    Words(&c)[4] = words[n];
    if constexpr (SMALL) {
      const Words p0 = multiply_low(counter[n], PHILOX_0), p1 = multiply_low((p0 >> 32) ^ key.high[0], PHILOX_1);
      c[0] = (p1 >> 32) ^ key.low[1], c[1] = p1, c[2] = p0 ^ key.second, c[3] = key.third;
    } else {
      c[0] = counter[n], c[1] = counter[n] >> 32, c[2] = c[3] = Words{};
    }
  }
#pragma GCC unroll 10
  for (int round = SMALL ? 2 : 0; round < 10; ++round)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      Words(&c)[4] = words[n];
      const Words p0 = multiply_low(c[0], PHILOX_0), p1 = multiply_low(c[2], PHILOX_1);
      c[0] = (c[1] ^ key.low[round]) ^ (p1 >> 32);  // in this order only one step waits for the product
      c[1] = p1;
      c[2] = (c[3] ^ key.high[round]) ^ (p0 >> 32);
      c[3] = p0;
    }
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

PK_INLINE Vec<float> with_sign_of(Vec<float> x, Packed bits) {  // flips x where the highest bit is set
  Packed raw;
  std::memcpy(&raw, &x, sizeof raw);
  raw ^= bits & 0x80000000u;
  std::memcpy(&x, &raw, sizeof raw);
  return x;
}

// Two vectors of pairs at a time, from words; exact to a few units in the last place, also where u1 is next to 1, which float32 cannot tell from 1.
PK_INLINE void box_muller(const Packed (&radius_word)[2], const Packed (&angle_word)[2], Vec<float> (&first)[2], Vec<float> (&second)[2]) {
  typedef Index<float> I;
  Vec<float> m[2], e[2], logs[2], x[2], square[2], s[2], c[2];
  Packed turned[2];
  for (int k = 0; k < 2; ++k) {
    // -2 ln u1. t is u1 or, in the upper half, 1 - u1: the small one of the two has all its digits.
    const I word = reinterpret_cast<I>(radius_word[k]), upper = word >> 31;
    const Vec<float> t = (__builtin_convertvector(word ^ upper, Vec<float>) + 0.5f) * 2.3283064365386963e-10f;
    I exponent;
    split_for_log(word < 0 ? 1.0f - t : t, m[k], exponent);
    m[k] = exponent == 0 ? -t : m[k];  // only in the upper half
    e[k] = __builtin_convertvector(exponent, Vec<float>);
  }
  log_of_parts<2>(m, e, logs);
  for (int k = 0; k < 2; ++k) {
    // The nearest quarter turn, and what remains of the angle: |x| <= pi / 4.
    turned[k] = angle_word[k] + 0x20000000u;  // its two highest bits count the quarters
    const I rest = reinterpret_cast<I>(angle_word[k] << 2);
    x[k] = __builtin_convertvector(rest, Vec<float>) * 3.657295198167899e-10f, square[k] = x[k] * x[k];
    s[k] = broadcast(-1.9515295891e-4f), c[k] = broadcast(2.443315711809948e-5f);
  }
  for (int k = 0; k < 2; ++k) s[k] = s[k] * square[k] + 8.3321608736e-3f, c[k] = c[k] * square[k] - 1.388731625493765e-3f;
  for (int k = 0; k < 2; ++k) s[k] = s[k] * square[k] - 1.6666654611e-1f, c[k] = c[k] * square[k] + 4.166664568298827e-2f;
  for (int k = 0; k < 2; ++k) s[k] = s[k] * square[k] * x[k] + x[k], c[k] = c[k] * square[k] * square[k] + (1.0f - 0.5f * square[k]);
  for (int k = 0; k < 2; ++k) {
    const Vec<float> radius = square_root(logs[k] * -2.0f);
    const auto odd = reinterpret_cast<I>(turned[k] << 1) < 0;
    first[k] = radius * with_sign_of(odd ? s[k] : c[k], turned[k] + 0x40000000u);
    second[k] = radius * with_sign_of(odd ? c[k] : s[k], turned[k]);
  }
}

// Counters of lanes: those of one 128-bit block lie LANES / 4 apart, so that a transposition inside the blocks puts all elements in order.
PK_INLINE Words lane_counters(bool odd) {
  constexpr int blocks = LANES<float> / 4;
  Words counters{};
  for (int i = 0; i < LANES<float> / 2; ++i) counters[i] = static_cast<uint64_t>(blocks * ((2 * i + odd) % 4) + (2 * i + odd) / 4);
  return counters;
}

// Elements of the counters q .. q + LANES<float> - 1.
PK_INLINE void normal_block(const PhiloxRounds& key, uint64_t q, float* out) {
  constexpr auto every = std::make_integer_sequence<int, LANES<float>>{};
  Words words[2][4];
  const Words counters[2] = {lane_counters(false) + q, lane_counters(true) + q};
  q + LANES<float> <= uint64_t{1} << 32 ? philox<2, true>(counters, key, words) : philox<2, false>(counters, key, words);
  const auto packed = [&](int k) { return reinterpret_cast<Packed>((words[0][k] & 0xffffffffu) | (words[1][k] << 32)); };
  Vec<float> cosines[2], sines[2];
  box_muller({packed(0), packed(2)}, {packed(1), packed(3)}, cosines, sines);
  const Vec<float> n[4] = {cosines[0], sines[0], cosines[1], sines[1]};
  const Vec<float> low01 = unpack<float, 1, false>(n[0], n[1], every), high01 = unpack<float, 1, true>(n[0], n[1], every);
  const Vec<float> low23 = unpack<float, 1, false>(n[2], n[3], every), high23 = unpack<float, 1, true>(n[2], n[3], every);
  store(out, unpack<float, 2, false>(low01, low23, every));
  store(out + LANES<float>, unpack<float, 2, true>(low01, low23, every));
  store(out + 2 * LANES<float>, unpack<float, 2, false>(high01, high23, every));
  store(out + 3 * LANES<float>, unpack<float, 2, true>(high01, high23, every));
}

// The same in float64, where the numbers need not be fast.
PK_INLINE void normal_block(const PhiloxRounds& key, uint64_t q, double* out) {
  for (int lane = 0; lane < LANES<double>; ++lane) {
    Words all[1][4];
    philox<1, false>({Words{} + (q + static_cast<uint64_t>(lane))}, key, all);
    const Words(&words)[4] = all[0];
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
  const PhiloxRounds rounds(key);
  uint64_t q = first / 4;
  for (int64_t at = 0; at < end; at += 4 * LANES<T>, q += LANES<T>) normal_block(rounds, q, out + at);
}

}  // namespace
