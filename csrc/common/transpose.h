// SPDX-License-Identifier: MIT
// Transposes a square of LANES x LANES elements in registers: log2(LANES) rounds of two-input shuffles, the first ones inside 128-bit blocks
// (unpack), the others of whole blocks, because each of those is a single instruction on every x86 level.
#pragma once

#include <utility>

#include "common/simd.h"

namespace {

// Lane numbers for __builtin_shufflevector(a, b, ...): unpack takes units of `unit` lanes alternately from a and b inside each block.
template <class T>
constexpr int unpack_lane(int lane, int unit, bool high) {
  constexpr int block = 16 / static_cast<int>(sizeof(T));
  const int within = lane % block, pair = within / unit;
  return (pair % 2) * LANES<T> + lane - within + (high ? block / 2 : 0) + pair / 2 * unit + within % unit;
}

// The even (or odd) 128-bit blocks of a, then those of b.
template <class T>
constexpr int block_lane(int lane, bool odd) {
  constexpr int block = 16 / static_cast<int>(sizeof(T)), blocks = LANES<T> / block;
  const int target = lane / block, source = target % (blocks / 2) * 2 + odd;
  return target / (blocks / 2) * LANES<T> + source * block + lane % block;
}

template <class T, int UNIT, bool HIGH, int... LANE>
PK_INLINE Vec<T> unpack(Vec<T> a, Vec<T> b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, unpack_lane<T>(LANE, UNIT, HIGH)...);
}

template <class T, bool ODD, int... LANE>
PK_INLINE Vec<T> blocks_of(Vec<T> a, Vec<T> b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, block_lane<T>(LANE, ODD)...);
}

// square[i][j] becomes square[j][i].
template <class T>
PK_INLINE void transpose(Vec<T> (&square)[LANES<T>]) {
  constexpr int lanes = LANES<T>, block = 16 / static_cast<int>(sizeof(T)), blocks = lanes / block;
  constexpr auto every = std::make_integer_sequence<int, lanes>{};
  Vec<T> other[lanes];
  // Inside the blocks: rows g..g + block - 1 become other[g + j] = column j of every block.
#pragma GCC unroll 16
  for (int g = 0; g < lanes; g += block) {
    if constexpr (block == 2) {
      other[g] = unpack<T, 1, false>(square[g], square[g + 1], every);
      other[g + 1] = unpack<T, 1, true>(square[g], square[g + 1], every);
    } else {
      const Vec<T> low01 = unpack<T, 1, false>(square[g], square[g + 1], every),
                   high01 = unpack<T, 1, true>(square[g], square[g + 1], every);
      const Vec<T> low23 = unpack<T, 1, false>(square[g + 2], square[g + 3], every);
      const Vec<T> high23 = unpack<T, 1, true>(square[g + 2], square[g + 3], every);
      other[g] = unpack<T, 2, false>(low01, low23, every);
      other[g + 1] = unpack<T, 2, true>(low01, low23, every);
      other[g + 2] = unpack<T, 2, false>(high01, high23, every);
      other[g + 3] = unpack<T, 2, true>(high01, high23, every);
    }
  }
  // Of the blocks: column block * B + j is block B of other[j], other[block + j], ...
#pragma GCC unroll 16
  for (int j = 0; j < block; ++j) {
    if constexpr (blocks == 1) {
      square[j] = other[j];
    } else if constexpr (blocks == 2) {
      square[j] = blocks_of<T, false>(other[j], other[block + j], every);
      square[block + j] = blocks_of<T, true>(other[j], other[block + j], every);
    } else {
      static_assert(blocks == 4);
      const Vec<T> even01 = blocks_of<T, false>(other[j], other[block + j], every);
      const Vec<T> odd01 = blocks_of<T, true>(other[j], other[block + j], every);
      const Vec<T> even23 = blocks_of<T, false>(other[2 * block + j], other[3 * block + j], every);
      const Vec<T> odd23 = blocks_of<T, true>(other[2 * block + j], other[3 * block + j], every);
      square[j] = blocks_of<T, false>(even01, even23, every);
      square[block + j] = blocks_of<T, false>(odd01, odd23, every);
      square[2 * block + j] = blocks_of<T, true>(even01, even23, every);
      square[3 * block + j] = blocks_of<T, true>(odd01, odd23, every);
    }
  }
}

}  // namespace
