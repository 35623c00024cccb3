// SPDX-License-Identifier: MIT
// Tiles of scores on tensor cores: a warp has 32 rows and 16, 32 or 64 of the columns in shared memory.
//
// Two products, S = X Y^T and D += H Y, read the same columns Y from shared memory, 16 bytes a lane and without bank conflicts:
//
//   Order of k. A product may number k as it likes, if both factors do. In X Y^T lane (group, member) takes the 16 bytes at chunk `member` of 64,
//   4 or 8 channels, as its k of one step of 16 or of two. In H Y it takes columns 2 member and 2 member + 1: where the accumulator of X Y^T has
//   them, so H never leaves its registers.
//   Order of n. In H Y column `group` of the VECTOR products side by side is the channel VECTOR * group + 0, 1, ...
//   Order of chunks. The 16-byte chunk c of vector v lies at c ^ turn(v): eight lanes that read together, of two vectors and four chunks (X Y^T)
//   or of four vectors and two chunks (H Y), then meet in no bank. Vectors of 16 channels are shorter than the banks; H Y meets in pairs.
//
// What a word of a vector holds, and how it is multiplied, stands in contrastive_products.cuh.
#pragma once

#include "ops/cuda/contrastive_products.cuh"

namespace {

constexpr int HIGHEST = 0x7fffffff, LOWEST = -HIGHEST;

// CHANNELS of a vector in shared memory, in WORDS of 32 bits; 32 * ROW_WARPS rows of a block; COLUMNS in shared memory at a time, of which each of
// the two warps that share rows has half, PAIRS pairs of fragments of 8; STAGES of columns.
template <Format FORMAT_, int CHANNELS_, int ROW_WARPS_, int PAIRS_, int STAGES_ = 2, bool SLICED_ = false>
struct Shape {
  static constexpr Format FORMAT = FORMAT_;
  static constexpr int CHANNELS = CHANNELS_, ROWS = 32 * ROW_WARPS_, THREADS = 64 * ROW_WARPS_, COLUMNS = 32 * PAIRS_;
  static constexpr int FRAGMENTS = 2 * PAIRS_, STAGES = STAGES_;
  static constexpr bool SLICED = SLICED_;  // vectors are longer
  static constexpr int WORDS = CHANNELS / CHANNELS_OF_WORD<FORMAT_>;
  static constexpr int ROW_WORDS = ROWS * WORDS, STAGE_WORDS = COLUMNS * WORDS;
  // Words of a vector that a lane reads at a time in X Y^T, steps of 16 k in these; words in H Y, channels in these.
  static constexpr int READ = WORDS < 16 ? 2 : 4, STEPS = FORMAT_ == Format::half && READ == 4 ? 2 : 1;
  static constexpr int WEIGHED = CHANNELS > 16 ? 4 : FORMAT_ == Format::half ? 1 : 2;
  static constexpr int VECTOR = WEIGHED * CHANNELS_OF_WORD<FORMAT_>;

  static __device__ __forceinline__ int turn(int v) { return WORDS < 16 ? 0 : WORDS == 16 ? v & 2 : (v & 6) ^ (v & 1) << 2; }
  // Where a warp's rows and columns begin.
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * 32; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * (COLUMNS / 2); }
  // Words of shared memory; at the end half the gradients of the rows lie there.
  static constexpr int shared_words(int stages, int beside) {
    const int walk = ROW_WORDS + stages * STAGE_WORDS + beside;
    return beside > 0 && walk < ROWS * CHANNELS ? ROWS * CHANNELS : walk;
  }
};

// Of a warp: entry [t][f][2 r + e] is row 16 t + 8 r + group, column 8 f + 2 member + e.
template <class S>
using Scores = float[2][S::FRAGMENTS][4];

// ---------------------------------------------------------------------------------------------------------------------- products

__device__ __forceinline__ void read(unsigned (&out)[4], const unsigned* shared) {
  const uint4 v = pk::load_vector<uint4>(shared);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
__device__ __forceinline__ void read(unsigned (&out)[2], const unsigned* shared) {
  const uint2 v = pk::load_vector<uint2>(shared);
  out[0] = v.x, out[1] = v.y;
}
__device__ __forceinline__ void read(unsigned (&out)[1], const unsigned* shared) { out[0] = *shared; }

// s += X Y^T over `words` words; x and y: the warp's first row and column in shared memory.
template <class S>
__device__ __forceinline__ void add_scores(Scores<S>& s, const unsigned* x, const unsigned* y, int words) {
  constexpr Format F = S::FORMAT;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll 1
  for (int k = 0; k < words; k += 4 * S::READ) {
    const int at = group * S::WORDS + (S::READ == 4 ? ((k / 4 + member) ^ S::turn(group)) << 2 : 2 * member);
    unsigned upper[2][S::READ], lower[2][S::READ];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      read(upper[t], x + at + t * 16 * S::WORDS);
      read(lower[t], x + at + (t * 16 + 8) * S::WORDS);
    }
    Left<F> left[2][S::STEPS];
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int i = 0; i < S::STEPS; ++i) left[t][i] = Left<F>::of_words(upper[t] + 2 * i, lower[t] + 2 * i);
#pragma unroll
    for (int f = 0; f < S::FRAGMENTS; ++f) {
      unsigned column[S::READ];
      read(column, y + at + f * 8 * S::WORDS);
#pragma unroll
      for (int i = 0; i < S::STEPS; ++i) {
        const Right<F> right = Right<F>::of_words(column + 2 * i);
#pragma unroll
        for (int t = 0; t < 2; ++t)
          if constexpr (S::CHANNELS == 16)
            multiply(s[t][f], left[t][i], right);  // from 0
          else
            accumulate<F>(s[t][f], left[t][i], right);
      }
    }
  }
}

// Of a warp: entry [t][VECTOR q + i][2 r + e] is row 16 t + 8 r + group, channel 8 VECTOR q + VECTOR (2 member + e) + i.
template <class S>
using Gradient = float[2][S::CHANNELS / 8][4];

// d += H Y, over the first `channels` channels; y: the warp's first column in shared memory.
template <class S>
__device__ __forceinline__ void add_gradient(Gradient<S>& d, const Scores<S>& h, const unsigned* y, int channels) {
  constexpr Format F = S::FORMAT;
  constexpr int V = S::VECTOR, W = S::WEIGHED;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  int at[2];  // of columns 2 member and 2 member + 1
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = 2 * member + e, word = group * W;  // in the order of channels
    at[e] = column * S::WORDS;
    if (F == Format::halves && W == 2)
      at[e] += ((group / 2 ^ S::turn(column)) << 2) + group % 2;  // one word of a chunk's high parts, and later the low ones
    else
      at[e] += ((word / 4 ^ S::turn(column)) << 2) + word % 4;
  }
#pragma unroll
  for (int f = 0; f < S::FRAGMENTS; f += 2) {
    const auto of_rows = [&](int t) {
      const float upper[4] = {h[t][f][0], h[t][f][1], h[t][f + 1][0], h[t][f + 1][1]};
      const float lower[4] = {h[t][f][2], h[t][f][3], h[t][f + 1][2], h[t][f + 1][3]};
      return Left<F>::of_weights(upper, lower);
    };
    const Left<F> left[2] = {of_rows(0), of_rows(1)};
#pragma unroll
    for (int q = 0; q < S::CHANNELS / (8 * V); ++q) {
      if (q * 8 * V >= channels) continue;
      unsigned v[4][W];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned* const from = y + at[k % 2] + (f + k / 2) * 8 * S::WORDS + q * 8 * W;
        if constexpr (F == Format::halves && W == 2)
          v[k][0] = from[0], v[k][1] = from[2];
        else
          read(v[k], from);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Right<F> right = Right<F>::of_vectors(v, i);
#pragma unroll
        for (int t = 0; t < 2; ++t) accumulate<F>(d[t][q * V + i], left[t], right);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------- loading

// One side of a problem.
struct Side {
  const unsigned* vectors;  // [count, words]
  int64_t words;
};

// `count` vectors from `first` on, of them the words from word0 on; zeros from vector `end` on and behind the last word.
template <class S, int count>
__device__ __forceinline__ void load_vectors(unsigned* tile, const Side& side, int first, int end, int word0) {
  constexpr int chunks = S::WORDS / 4, at_once = S::THREADS / chunks;
  static_assert(at_once % 8 == 0 && count % at_once == 0, "turn() must be the same for all vectors of a thread");
  const int v0 = threadIdx.x / chunks, chunk = threadIdx.x % chunks, word = word0 + 4 * chunk;
  const int limit = word < side.words ? end - first : 0;
  const unsigned* source = side.vectors + (first + v0) * side.words + word;  // not read from `limit` on
  unsigned* const target = tile + v0 * S::WORDS + ((chunk ^ S::turn(v0)) << 2);
#pragma unroll
  for (int v = 0; v < count; v += at_once) {
    pk::copy_async_16(target + v * S::WORDS, source, v0 + v < limit);
    source += at_once * side.words;
  }
}

// Calls body(scores, stage, column0) for the columns of [begin, end), COLUMNS at a time, where wanted(column0) holds for the warp. The columns'
// vectors are then in that stage of shared memory. `beside` loads what else goes with them. With two stages the next columns are on their way;
// vectors of more than one slice come slice by slice, both rows and columns, slice `last` at the end.
template <class S, class Beside, class Wanted, class Body>
__device__ __forceinline__ void walk_columns(const Side& row_side, const Rows& rows, const Side& column_side, int begin, int end, int last,
                                             int stages, unsigned* shared, const Beside& beside, const Wanted& wanted, const Body& body) {
  const int slices = S::SLICED ? static_cast<int>((row_side.words + S::WORDS - 1) / S::WORDS) : 1;
  const auto load_rows = [&](int word0) { load_vectors<S, S::ROWS>(shared, row_side, rows.first, rows.end, word0); };
  const auto load_columns = [&](int stage, int column0, int word0) {
    load_vectors<S, S::COLUMNS>(shared + S::ROW_WORDS + stage * S::STAGE_WORDS, column_side, column0, end, word0);
  };
  if (begin >= end) return;
  int stage = 0;
  if (slices == 1) {
    load_rows(0);
    load_columns(0, begin, 0);
    beside(0, begin);
    pk::copy_async_commit();
  }
#pragma unroll 1
  for (int column0 = begin; column0 < end; column0 += S::COLUMNS) {
    const bool more = column0 + S::COLUMNS < end, mine = wanted(column0);
    Scores<S> scores = {};
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int word0 = slices == 1 ? 0 : (last + 1 + i) % slices * S::WORDS;
      if (slices > 1) {
        load_rows(word0);
        load_columns(0, column0, word0);
        if (i == 0) beside(0, column0);
        pk::copy_async_commit();
      } else if (more && stages == 2) {
        load_columns(stage ^ 1, column0 + S::COLUMNS, 0);
        beside(stage ^ 1, column0 + S::COLUMNS);
      }
      pk::copy_async_commit();  // perhaps of nothing: what is needed now is one group behind
      pk::copy_async_wait<1>();
      __syncthreads();
      const unsigned* const y = shared + S::ROW_WORDS + stage * S::STAGE_WORDS + S::warp_column() * S::WORDS;
      const int words = S::CHANNELS == 16 ? S::WORDS : min(static_cast<int>(row_side.words) - word0, S::WORDS);
      if (mine) add_scores<S>(scores, shared + S::warp_row() * S::WORDS, y, words);
      if (i + 1 < slices) __syncthreads();
    }
    if (mine) body(scores, stage, column0);
    __syncthreads();
    if (slices > 1 || !more) continue;
    if (stages == 2) {
      stage ^= 1;
    } else {
      load_columns(0, column0 + S::COLUMNS, 0);
      beside(0, column0 + S::COLUMNS);
      pk::copy_async_commit();
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------- classes

// What columns are to the 32 rows of a warp. Rows that take no part are left out.
struct WarpClasses {
  int any_begin, any_end;  // columns outside are of another class for every row
  int all_begin, all_end;  // columns inside are of the own class for every row
  int first_self, last_self;

  // By the whole warp, each lane its row.
  __device__ __forceinline__ void find(const ContrastiveRange* ranges, int row, bool takes_part) {
    const ContrastiveRange range = takes_part ? range_at(ranges, row) : ContrastiveRange{HIGHEST, LOWEST, -1};
    any_begin = __reduce_min_sync(ALL, range.class_begin);
    any_end = __reduce_max_sync(ALL, range.class_end);
    all_begin = __reduce_max_sync(ALL, takes_part ? range.class_begin : LOWEST);
    all_end = __reduce_min_sync(ALL, takes_part ? range.class_end : HIGHEST);
    first_self = __reduce_min_sync(ALL, range.self >= 0 ? range.self : HIGHEST);
    last_self = __reduce_max_sync(ALL, range.self);
  }
  // Bit f: the fragment of 8 columns from column0 + 8 f on is of one kind for all rows, and nobody's self and nothing from `end` on is in it.
  template <int fragments>
  __device__ __forceinline__ void kinds(int column0, int end, unsigned& others, unsigned& same) const {
    const int lane = threadIdx.x % 32, first = column0 + 8 * lane, behind = first + 8;
    const bool pure = lane < fragments && behind <= end && (behind <= first_self || first > last_self);
    others = __ballot_sync(ALL, pure && (behind <= any_begin || first >= any_end));
    same = __ballot_sync(ALL, pure && first >= all_begin && behind <= all_end);
  }
};

}  // namespace
