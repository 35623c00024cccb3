// SPDX-License-Identifier: MIT
// Numbers as the tensor cores of contrastive take them, and the products of one step of 16 along k.
//
// Vectors of length 1 are kept as 16-bit floats, which have the 11 significant bits of tf32 and twice its speed; halves_kernel writes them once:
//   halves   a number is the sum of two, and three of the four products are taken: float32 accuracy. Four channels are 16 bytes: high, high, low, low
//   half     the first of the two: tf32 accuracy, half the memory
// Other vectors may be too long for these and stay float32:
//   exact    a float is split into two tf32 numbers where it is read; three products
//   tf32, bf16
// Sums are float32. The tensor cores cut off what their sums cannot hold; where float32 accuracy is promised, a step's products add up from 0, the
// small ones first, and join the sum with a rounded addition: cut off a thousand times in one direction, they would be a thousand times as wrong.
#pragma once

#include "common/mma_from_zero.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

using Precision = ContrastivePrecision;

enum class Format { halves, half, exact, tf32, bf16 };

constexpr bool is_half(Format f) { return f == Format::halves || f == Format::half; }
constexpr int channels_of_word(Format f) { return f == Format::half ? 2 : 1; }  // a word is 32 bits
// The same in kernels, which may not call functions of the host.
template <Format F>
constexpr bool IS_HALF = F == Format::halves || F == Format::half;
template <Format F>
constexpr bool IS_ACCURATE = F == Format::halves || F == Format::exact;
template <Format F>
constexpr int CHANNELS_OF_WORD = channels_of_word(F);

constexpr Format format_of(Precision precision, bool bounded) {
  if (bounded) return precision == Precision::highest ? Format::halves : Format::half;
  return precision == Precision::highest ? Format::exact : precision == Precision::high ? Format::tf32 : Format::bf16;
}

// ------------------------------------------------------------------------------------------------------------------ conversions

// A float as the sum of two tf32 numbers: the nearest one, and the rest, which the tensor core cuts off. pk::to_tf32 also looks for a NaN; here it
// may pass as 0, as the rest is one.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}
// Two floats as sums of two 16-bit floats each.
__device__ __forceinline__ void split_pair(float x, float y, unsigned& high, unsigned& low) {
  high = pk::pack_f16(x, y);
  const float2 taken = pk::unpack_f16(high);
  low = pk::pack_f16(x - taken.x, y - taken.y);
}

// ------------------------------------------------------------------------------------------------------------- factors of a step

// Left: rows group and group + 8, four k of a lane each. Right: column group, the same four k. Numbers come as words of vectors (halves: two of high
// parts, two of low ones; half: two; else four floats), as floats (of_weights), or as words of four vectors (of_vectors).
template <Format>
struct Left;
template <Format>
struct Right;

template <>
struct Left<Format::halves> {
  unsigned high[4], low[4];
  static __device__ __forceinline__ Left of_words(const unsigned* upper, const unsigned* lower) {
    return {{upper[0], lower[0], upper[1], lower[1]}, {upper[2], lower[2], upper[3], lower[3]}};
  }
  static __device__ __forceinline__ Left of_weights(const float (&upper)[4], const float (&lower)[4]) {
    Left left;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      split_pair(upper[2 * k], upper[2 * k + 1], left.high[2 * k], left.low[2 * k]);
      split_pair(lower[2 * k], lower[2 * k + 1], left.high[2 * k + 1], left.low[2 * k + 1]);
    }
    return left;
  }
};
template <>
struct Left<Format::half> {
  unsigned value[4];
  static __device__ __forceinline__ Left of_words(const unsigned* upper, const unsigned* lower) {
    return {{upper[0], lower[0], upper[1], lower[1]}};
  }
  static __device__ __forceinline__ Left of_weights(const float (&upper)[4], const float (&lower)[4]) {
    return {{pk::pack_f16(upper[0], upper[1]), pk::pack_f16(lower[0], lower[1]), pk::pack_f16(upper[2], upper[3]),
             pk::pack_f16(lower[2], lower[3])}};
  }
};
// Channel `channel` of two vectors, from the words that hold it.
__device__ __forceinline__ unsigned pair_of(unsigned x, unsigned y, int channel) {
  return __byte_perm(x, y, channel % 2 == 0 ? 0x5410 : 0x7632);
}
template <>
struct Right<Format::halves> {
  unsigned high[2], low[2];
  static __device__ __forceinline__ Right of_words(const unsigned* word) { return {{word[0], word[1]}, {word[2], word[3]}}; }
  template <int words>
  static __device__ __forceinline__ Right of_vectors(const unsigned (&v)[4][words], int channel) {
    const int of_high = channel / 2, of_low = words / 2 + channel / 2;
    return {{pair_of(v[0][of_high], v[1][of_high], channel), pair_of(v[2][of_high], v[3][of_high], channel)},
            {pair_of(v[0][of_low], v[1][of_low], channel), pair_of(v[2][of_low], v[3][of_low], channel)}};
  }
};
template <>
struct Right<Format::half> {
  unsigned value[2];
  static __device__ __forceinline__ Right of_words(const unsigned* word) { return {{word[0], word[1]}}; }
  template <int words>
  static __device__ __forceinline__ Right of_vectors(const unsigned (&v)[4][words], int channel) {
    const int at = channel / 2;
    return {{pair_of(v[0][at], v[1][at], channel), pair_of(v[2][at], v[3][at], channel)}};
  }
};

// Of formats that keep floats: Left from two rows of four, Right from four.
template <class Side>
struct OfFloats {
  static __device__ __forceinline__ Side of_words(const unsigned* upper, const unsigned* lower) {
    float x[4], y[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = __uint_as_float(upper[k]), y[k] = __uint_as_float(lower[k]);
    return Side::of_weights(x, y);
  }
  static __device__ __forceinline__ Side of_words(const unsigned* word) {
    const float x[4] = {__uint_as_float(word[0]), __uint_as_float(word[1]), __uint_as_float(word[2]), __uint_as_float(word[3])};
    return Side::of_floats(x);
  }
  template <int words>
  static __device__ __forceinline__ Side of_vectors(const unsigned (&v)[4][words], int channel) {
    const float x[4] = {__uint_as_float(v[0][channel]), __uint_as_float(v[1][channel]), __uint_as_float(v[2][channel]),
                        __uint_as_float(v[3][channel])};
    return Side::of_floats(x);
  }
};

template <>
struct Left<Format::exact> : OfFloats<Left<Format::exact>> {
  unsigned high[2][4], low[2][4];
  static __device__ __forceinline__ Left of_weights(const float (&upper)[4], const float (&lower)[4]) {
    Left left;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      split(upper[k], left.high[k / 2][k % 2 * 2], left.low[k / 2][k % 2 * 2]);
      split(lower[k], left.high[k / 2][k % 2 * 2 + 1], left.low[k / 2][k % 2 * 2 + 1]);
    }
    return left;
  }
};
template <>
struct Right<Format::exact> : OfFloats<Right<Format::exact>> {
  unsigned high[2][2], low[2][2];
  static __device__ __forceinline__ Right of_floats(const float (&column)[4]) {
    Right right;
#pragma unroll
    for (int k = 0; k < 4; ++k) split(column[k], right.high[k / 2][k % 2], right.low[k / 2][k % 2]);
    return right;
  }
};
template <>
struct Left<Format::tf32> : OfFloats<Left<Format::tf32>> {
  unsigned value[2][4];
  static __device__ __forceinline__ Left of_weights(const float (&upper)[4], const float (&lower)[4]) {
    Left left;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      left.value[k / 2][k % 2 * 2] = pk::to_tf32(upper[k]);
      left.value[k / 2][k % 2 * 2 + 1] = pk::to_tf32(lower[k]);
    }
    return left;
  }
};
template <>
struct Right<Format::tf32> : OfFloats<Right<Format::tf32>> {
  unsigned value[2][2];
  static __device__ __forceinline__ Right of_floats(const float (&column)[4]) {
    Right right;
#pragma unroll
    for (int k = 0; k < 4; ++k) right.value[k / 2][k % 2] = pk::to_tf32(column[k]);
    return right;
  }
};
template <>
struct Left<Format::bf16> : OfFloats<Left<Format::bf16>> {
  unsigned value[4];
  static __device__ __forceinline__ Left of_weights(const float (&upper)[4], const float (&lower)[4]) {
    Left left;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      left.value[2 * k] = pk::pack_bf16(upper[2 * k], upper[2 * k + 1]);
      left.value[2 * k + 1] = pk::pack_bf16(lower[2 * k], lower[2 * k + 1]);
    }
    return left;
  }
};
template <>
struct Right<Format::bf16> : OfFloats<Right<Format::bf16>> {
  unsigned value[2];
  static __device__ __forceinline__ Right of_floats(const float (&column)[4]) {
    Right right;
    right.value[0] = pk::pack_bf16(column[0], column[1]), right.value[1] = pk::pack_bf16(column[2], column[3]);
    return right;
  }
};

// ---------------------------------------------------------------------------------------------------------------------- products

// d += a b over a step.
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Format::half>& a, const Right<Format::half>& b) {
  pk::mma_m16n8k16_f16(d, a.value, b.value);
}
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Format::bf16>& a, const Right<Format::bf16>& b) {
  pk::mma_m16n8k16_bf16(d, a.value, b.value);
}
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Format::tf32>& a, const Right<Format::tf32>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) pk::mma_m16n8k8_tf32(d, a.value[half], b.value[half]);
}
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Format::halves>& a, const Right<Format::halves>& b) {
  pk::mma_m16n8k16_f16(d, a.low, b.high);
  pk::mma_m16n8k16_f16(d, a.high, b.low);
  pk::mma_m16n8k16_f16(d, a.high, b.high);
}
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Format::exact>& a, const Right<Format::exact>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pk::mma_m16n8k8_tf32(d, a.low[half], b.high[half]);
    pk::mma_m16n8k8_tf32(d, a.high[half], b.low[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) pk::mma_m16n8k8_tf32(d, a.high[half], b.high[half]);
}

// d = a b over a step.
template <Format F>
__device__ __forceinline__ void multiply_from_zero(float (&d)[4], const Left<F>& a, const Right<F>& b) {
  if constexpr (F == Format::halves) {
    pk::mma_m16n8k16_f16_from_zero(d, a.low, b.high);
    pk::mma_m16n8k16_f16(d, a.high, b.low);
    pk::mma_m16n8k16_f16(d, a.high, b.high);
  } else if constexpr (F == Format::half) {
    pk::mma_m16n8k16_f16_from_zero(d, a.value, b.value);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = 0;
    multiply(d, a, b);
  }
}

// The same where many steps add up. See the top.
template <Format F>
__device__ __forceinline__ void accumulate(float (&d)[4], const Left<F>& a, const Right<F>& b) {
  if constexpr (IS_ACCURATE<F>) {
    float step[4];
    multiply_from_zero(step, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  } else {
    multiply(d, a, b);
  }
}

}  // namespace
