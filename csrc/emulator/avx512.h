// SPDX-License-Identifier: MIT
// What the CPU kernels' AVX-512 code asks of the processor, in plain C++, so that it runs on one with AVX2: csrc/sanitize.sh compiles it so, with
// this file included before all others. Vectors of 64 bytes are the compiler's own, which it makes of two of 32; what remains are the instructions that
// the kernels name. Each does what Intel's manual says of it, for the arguments that the kernels pass; others do not compile.
#pragma once

#if defined(__AVX512F__)
#error "this file stands in for AVX-512; compile without it"
#endif

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pk_avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));
typedef uint64_t Quads __attribute__((vector_size(64)));

template <int MASK, int ROUNDING>
struct Whole {
  static_assert(MASK == -1 && ROUNDING == 4, "a whole vector in the current rounding");
};

// VMAXPS, VMINPS: the second operand unless the first is more (less); so it is where one of them is no number.
inline Floats larger(Floats first, Floats second, Floats) { return first > second ? first : second; }
inline Floats smaller(Floats first, Floats second, Floats) { return first < second ? first : second; }

// VCMPPS, VCMPPD with predicate 18: less or equal, false where one of them is no number, no exception.
template <int PREDICATE, class V>
unsigned not_above(V first, V second) {
  static_assert(PREDICATE == 18);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(first[0]); ++lane) bits |= static_cast<unsigned>(first[lane] <= second[lane]) << lane;
  return bits;
}

// VPTESTMQ: a bit for every lane in which the operands have a common bit.
inline unsigned common_bits(Quads first, Quads second) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 8; ++lane) bits |= static_cast<unsigned>((first[lane] & second[lane]) != 0) << lane;
  return bits;
}

// VRNDSCALEPS towards negative infinity.
template <int MASK, int HOW>
Floats rounded(Floats x) {
  static_assert(MASK == 0xffff && HOW == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  for (int lane = 0; lane < 16; ++lane) x[lane] = std::floor(x[lane]);
  return x;
}

template <int MASK>
Floats square_roots(Floats x) {
  static_assert(MASK == 0xffff);
  for (int lane = 0; lane < 16; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// VPMULUDQ: the 64-bit products of the lower halves.
template <int MASK>
__m512i products(__m512i first, __m512i second) {
  static_assert(MASK == 0xff);
  return reinterpret_cast<__m512i>((reinterpret_cast<Quads>(first) & 0xffffffffu) * (reinterpret_cast<Quads>(second) & 0xffffffffu));
}

// VEXTRACTF32X8.
inline __m256 half(Floats x, int part) {
  EightFloats out;
  std::memcpy(&out, reinterpret_cast<const char*>(&x) + 32 * part, sizeof out);
  return reinterpret_cast<__m256>(out);
}

// VMOVNTPS, VMOVNTPD, which fault where the address is not a multiple of the vector.
template <class T, class V>
void stream(T* to, V x) {
  if (reinterpret_cast<uintptr_t>(to) % 64 != 0) __builtin_trap();
  std::memcpy(to, &x, sizeof x);
}

// VMOVUPS, VMOVUPD with a mask: memory is touched where a bit is set, and nowhere else.
template <class T, class V>
V masked_load(const T* from, V otherwise, unsigned mask) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(T); ++lane)
    if (mask >> lane & 1) otherwise[lane] = from[lane];
  return otherwise;
}
template <class T, class V>
void masked_store(T* to, V x, unsigned mask) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(T); ++lane)
    if (mask >> lane & 1) to[lane] = x[lane];
}

}  // namespace pk_avx512

#define __builtin_ia32_maxps512_mask(first, second, otherwise, mask, rounding) \
  (pk_avx512::Whole<mask, rounding>{}, pk_avx512::larger(first, second, otherwise))
#define __builtin_ia32_minps512_mask(first, second, otherwise, mask, rounding) \
  (pk_avx512::Whole<mask, rounding>{}, pk_avx512::smaller(first, second, otherwise))
#define __builtin_ia32_cmpps512_mask(first, second, predicate, mask, rounding) \
  (pk_avx512::Whole<mask, rounding>{}, pk_avx512::not_above<predicate>(first, second))
#define __builtin_ia32_cmppd512_mask(first, second, predicate, mask, rounding) \
  (pk_avx512::Whole<mask, rounding>{}, pk_avx512::not_above<predicate>(first, second))
#define __builtin_ia32_ptestmq512(first, second, mask) \
  (pk_avx512::Whole<mask, 4>{}, pk_avx512::common_bits((pk_avx512::Quads)(first), (pk_avx512::Quads)(second)))
#define __builtin_ia32_movntps512(to, x) pk_avx512::stream(to, x)
#define __builtin_ia32_movntpd512(to, x) pk_avx512::stream(to, x)
#define __builtin_ia32_loadups512_mask(from, otherwise, mask) pk_avx512::masked_load(from, otherwise, mask)
#define __builtin_ia32_loadupd512_mask(from, otherwise, mask) pk_avx512::masked_load(from, otherwise, mask)
#define __builtin_ia32_storeups512_mask(to, x, mask) pk_avx512::masked_store(to, x, mask)
#define __builtin_ia32_storeupd512_mask(to, x, mask) pk_avx512::masked_store(to, x, mask)
#define _mm512_maskz_roundscale_ps(mask, x, how) pk_avx512::rounded<mask, how>(x)
#define _mm512_maskz_sqrt_ps(mask, x) pk_avx512::square_roots<mask>(x)
#define _mm512_maskz_mul_epu32(mask, first, second) pk_avx512::products<mask>(first, second)
#define _mm512_extractf32x8_ps(x, part) pk_avx512::half(reinterpret_cast<pk_avx512::Floats>(x), part)

// Last: from here on the kernels take their AVX-512 branches.
#define __AVX512F__ 1
