// SPDX-License-Identifier: MIT
// What forward and backward of short vectors (up to 64 channels) share: the shapes of their tiles, a warp's scores.
#pragma once

#include "ops/cuda/contrastive_tile.cuh"
#include "ops/cuda/contrastive_units.cuh"

namespace {

// A stage holds SUBS times the columns of shape S_; the two warps that share rows take them in turn.
template <class S_, int SUBS_>
struct Local {
  using S = S_;
  static constexpr int SUBS = SUBS_, COLUMNS = SUBS_ * S_::COLUMNS, STAGE_WORDS = COLUMNS * S_::WORDS, OF_WARP = S_::COLUMNS / 2;
  static constexpr bool NARROW = S_::CHANNELS == 16;
  // Scores are worked out one step ahead where registers allow.
  static constexpr bool AHEAD = NARROW && IS_HALF<S_::FORMAT>;
  static constexpr int FRAGMENTS = COLUMNS / 8;  // of a stage
  static constexpr int FRAGMENTS_OF_ROWS =
      NARROW ? S::ROWS * S::WORDS * 2 * (IS_ACCURATE<S::FORMAT> && !IS_HALF<S::FORMAT> ? 2 : 1) : 0;  // words; see RowsOfWarp
  static constexpr std::size_t shared_bytes(int factor_words, int exchange_words) {
    const int walk = S::ROW_WORDS + FRAGMENTS_OF_ROWS + 2 * (STAGE_WORDS + factor_words * COLUMNS);
    return sizeof(unsigned) * static_cast<std::size_t>(walk > exchange_words ? walk : exchange_words);
  }
};

// The rows' side of a warp's scores. Narrow: all of it is a left factor, which lies in shared memory the way registers take it (FRAGMENT_WORDS a warp).
// Other vectors are read where they are, with every step.
template <class L, bool narrow = L::NARROW>
struct RowsOfWarp;

template <class L>
struct RowsOfWarp<L, true> {
  using S = typename L::S;
  using Factor = Left<S::FORMAT>;
  static_assert(S::STEPS == 1, "one step of 16 channels");
  static constexpr int QUADS = sizeof(Factor) / 16, FRAGMENT_WORDS = 2 * QUADS * 32 * 4;
  Factor left[2];

  static __device__ __forceinline__ int at() {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    return group * S::WORDS + (S::READ == 4 ? (member ^ S::turn(group)) << 2 : 2 * member);
  }
  static __device__ __forceinline__ unsigned* of_lane(unsigned* fragments) {
    return fragments + threadIdx.x / 32 * FRAGMENT_WORDS + threadIdx.x % 32 * 4;
  }
  // Once, when the rows have come.
  static __device__ __forceinline__ void lay_out(const unsigned* x, unsigned* fragments) {
    unsigned* const to = of_lane(fragments);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      unsigned upper[S::READ], lower[S::READ];
      read(upper, x + at() + t * 16 * S::WORDS);
      read(lower, x + at() + (t * 16 + 8) * S::WORDS);
      const Factor factor = Factor::of_words(upper, lower);
      const unsigned* const words = reinterpret_cast<const unsigned*>(&factor);
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
        pk::store_vector(to + (t * QUADS + q) * 128, uint4{words[4 * q], words[4 * q + 1], words[4 * q + 2], words[4 * q + 3]});
    }
  }
  // For a stage.
  __device__ __forceinline__ void take(const unsigned*, unsigned* fragments) {
    const unsigned* const from = of_lane(fragments);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      unsigned* const words = reinterpret_cast<unsigned*>(&left[t]);
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        const uint4 v = pk::load_vector<uint4>(from + (t * QUADS + q) * 128);
        words[4 * q] = v.x, words[4 * q + 1] = v.y, words[4 * q + 2] = v.z, words[4 * q + 3] = v.w;
      }
    }
  }
  __device__ __forceinline__ void scores(Scores<S>& s, const unsigned* y, int) const {
#pragma unroll
    for (int f = 0; f < S::FRAGMENTS; ++f) {
      unsigned column[S::READ];
      read(column, y + at() + f * 8 * S::WORDS);
      const Right<S::FORMAT> right = Right<S::FORMAT>::of_words(column);
#pragma unroll
      for (int t = 0; t < 2; ++t) multiply_from_zero(s[t][f], left[t], right);
    }
  }
};
template <class L>
struct RowsOfWarp<L, false> {
  using S = typename L::S;
  static constexpr int FRAGMENT_WORDS = 0;
  const unsigned* rows;

  static __device__ __forceinline__ void lay_out(const unsigned*, unsigned*) {}
  __device__ __forceinline__ void take(const unsigned* x, unsigned*) { rows = x; }
  __device__ __forceinline__ void scores(Scores<S>& s, const unsigned* y, int words) const {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int f = 0; f < S::FRAGMENTS; ++f)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][f][i] = 0;
    add_scores<S>(s, rows, y, words);
  }
};

// What the fragments of a step are.
enum class Kinds { others, same, mixed };
template <Kinds kinds>
struct Known {
  static constexpr bool MIXED = kinds == Kinds::mixed;
  static __device__ __forceinline__ unsigned others(unsigned found) { return MIXED ? found : kinds == Kinds::others ? ~0u : 0u; }
  static __device__ __forceinline__ unsigned same(unsigned found) { return MIXED ? found : kinds == Kinds::same ? ~0u : 0u; }
};

// The scores of a warp with its columns of a stage, before `end`, step by step: body(scores, at, kinds), `at` being the step's first column in the stage.
// others, same: of the fragments of the stage, as WarpClasses finds them.
template <class L, class Body>
__device__ __forceinline__ void walk_steps(const RowsOfWarp<L>& rows, const unsigned* stage, int words, int column0, int end,
                                           unsigned others, unsigned same, const Body& body) {
  using S = typename L::S;
  constexpr unsigned all = (1u << S::FRAGMENTS) - 1;
  const int first = S::warp_column();
  const unsigned* const y = stage + first * S::WORDS;
  const auto by_kind = [&](Scores<S>& scores, int s) {
    const int at = first + s * S::COLUMNS, bit = at / 8;
    if ((others >> bit & all) == all)
      body(scores, at, Known<Kinds::others>());
    else if ((same >> bit & all) == all)
      body(scores, at, Known<Kinds::same>());
    else
      body(scores, at, Known<Kinds::mixed>());
  };
  const int steps = min(L::SUBS, (end - column0 - first + S::COLUMNS - 1) / S::COLUMNS);
  if constexpr (L::AHEAD) {  // columns behind `end` are zeros
    static_assert(L::SUBS % 2 == 0, "two at a time");
    if (steps <= 0) return;
    Scores<S> even, odd;
    rows.scores(even, y, words);
#pragma unroll 1
    for (int s = 0; s < steps; s += 2) {
      rows.scores(odd, y + (s + 1) * S::COLUMNS * S::WORDS, words);
      by_kind(even, s);
      if (s + 1 >= steps) break;
      if (s + 2 < L::SUBS) rows.scores(even, y + (s + 2) * S::COLUMNS * S::WORDS, words);
      by_kind(odd, s + 1);
    }
  } else {
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      Scores<S> scores;
      rows.scores(scores, y + s * S::COLUMNS * S::WORDS, words);
      by_kind(scores, s);
    }
  }
}

// Blocks of one launch: what the device holds at once, or fewer where there is less to do.
inline int64_t local_blocks(int64_t R, int64_t M, int64_t G, int rows, int columns, int of_multiprocessor) {
  const int64_t most = static_cast<int64_t>(of_multiprocessor) * pk::multiprocessor_count();
  const int64_t units = contrastive_tiles(R, G, rows) * (M / columns + 1);
  return units < most ? units : most;
}

}  // namespace
