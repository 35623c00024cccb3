// SPDX-License-Identifier: MIT
// Tiles of scores on tensor cores: a warp has 32 rows and 32 or 64 of the columns in shared memory.
//
// Two products, S = X Y^T and D += H Y, read the same columns Y from shared memory, 16 bytes a lane and without bank conflicts:
//
//   Order of k. A product may number k as it likes, if both factors do. In X Y^T lane (group, member) takes the channels 4 member + 0, 1, 2, 3
//   of 16 as its k = member and member + 4 of two products (tf32) or as its four of one (bf16). In H Y it takes columns 2 member and 2 member + 1:
//   where the accumulator of X Y^T has them, so H never leaves its registers.
//   Order of n. In H Y column `group` of the VECTOR products side by side is the channel VECTOR * group + 0, 1, ...
//   Order of chunks. The 16-byte chunk c of vector v lies at c ^ turn(v): eight lanes that read together, of two vectors and four chunks (X Y^T)
//   or of four vectors and two chunks (H Y), then meet in no bank. Vectors of 16 channels are shorter than the banks; H Y meets in pairs.
//
// Precision highest: a float is the sum of two tf32 numbers, and three of the four products are taken (float32 accuracy); high: tf32;
// medium: bf16. Sums are float32.
#pragma once

#include "ops/cuda/contrastive_rows.cuh"

namespace {

using Precision = ContrastivePrecision;

constexpr int HIGHEST = 0x7fffffff, LOWEST = -HIGHEST;

// CHANNELS of a vector in shared memory; 32 * ROW_WARPS rows of a block; COLUMNS in shared memory at a time, of which each of the two warps that
// share rows has half, PAIRS pairs of fragments of 8.
template <int CHANNELS_, int ROW_WARPS_, int PAIRS_, bool SLICED_ = false>
struct Shape {
  static constexpr int CHANNELS = CHANNELS_, ROWS = 32 * ROW_WARPS_, THREADS = 64 * ROW_WARPS_, COLUMNS = 32 * PAIRS_;
  static constexpr int FRAGMENTS = 2 * PAIRS_;
  static constexpr bool SLICED = SLICED_;  // vectors are longer
  static constexpr int VECTOR = CHANNELS_ == 16 ? 2 : 4;
  static constexpr int ROW_FLOATS = ROWS * CHANNELS, STAGE_FLOATS = COLUMNS * CHANNELS;

  static __device__ __forceinline__ int turn(int v) { return CHANNELS == 16 ? v & 2 : (v & 6) ^ (v & 1) << 2; }
  // Where a warp's rows and columns begin.
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 64 * 32; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % 2 * (COLUMNS / 2); }
};

// Of a warp: entry [t][f][2 r + e] is row 16 t + 8 r + group, column 8 f + 2 member + e.
template <class S>
using Scores = float[2][S::FRAGMENTS][4];

// ---------------------------------------------------------------------------------------------------------------------- products

// A float as the sum of two tf32 numbers: the nearest one, and the rest, which the tensor core cuts off. pk::to_tf32 also looks for a NaN; here it
// may pass as 0, as the rest is one.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

// Left: rows group and group + 8, four k of a lane each. Right: column group, the same four k. 16 k in all.
template <Precision>
struct Left;
template <Precision>
struct Right;

template <>
struct Left<Precision::highest> {
  unsigned high[2][4], low[2][4];
  __device__ __forceinline__ Left(const float (&upper)[4], const float (&lower)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      split(upper[k], high[k / 2][k % 2 * 2], low[k / 2][k % 2 * 2]);
      split(lower[k], high[k / 2][k % 2 * 2 + 1], low[k / 2][k % 2 * 2 + 1]);
    }
  }
};
template <>
struct Right<Precision::highest> {
  unsigned high[2][2], low[2][2];
  __device__ __forceinline__ explicit Right(const float (&column)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) split(column[k], high[k / 2][k % 2], low[k / 2][k % 2]);
  }
};
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Precision::highest>& a, const Right<Precision::highest>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    pk::mma_m16n8k8_tf32(d, a.low[half], b.high[half]);
    pk::mma_m16n8k8_tf32(d, a.high[half], b.low[half]);
    pk::mma_m16n8k8_tf32(d, a.high[half], b.high[half]);
  }
}

template <>
struct Left<Precision::high> {
  unsigned value[2][4];
  __device__ __forceinline__ Left(const float (&upper)[4], const float (&lower)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      value[k / 2][k % 2 * 2] = pk::to_tf32(upper[k]);
      value[k / 2][k % 2 * 2 + 1] = pk::to_tf32(lower[k]);
    }
  }
};
template <>
struct Right<Precision::high> {
  unsigned value[2][2];
  __device__ __forceinline__ explicit Right(const float (&column)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k / 2][k % 2] = pk::to_tf32(column[k]);
  }
};
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Precision::high>& a, const Right<Precision::high>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) pk::mma_m16n8k8_tf32(d, a.value[half], b.value[half]);
}

template <>
struct Left<Precision::medium> {
  unsigned value[4];
  __device__ __forceinline__ Left(const float (&upper)[4], const float (&lower)[4])
      : value{pk::pack_bf16(upper[0], upper[1]), pk::pack_bf16(lower[0], lower[1]), pk::pack_bf16(upper[2], upper[3]),
              pk::pack_bf16(lower[2], lower[3])} {}
};
template <>
struct Right<Precision::medium> {
  unsigned value[2];
  __device__ __forceinline__ explicit Right(const float (&column)[4])
      : value{pk::pack_bf16(column[0], column[1]), pk::pack_bf16(column[2], column[3])} {}
};
__device__ __forceinline__ void multiply(float (&d)[4], const Left<Precision::medium>& a, const Right<Precision::medium>& b) {
  pk::mma_m16n8k16_bf16(d, a.value, b.value);
}

__device__ __forceinline__ void read(float (&out)[4], const float* shared) {
  const float4 v = pk::load_vector<float4>(shared);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
__device__ __forceinline__ void read(float (&out)[2], const float* shared) {
  const float2 v = pk::load_vector<float2>(shared);
  out[0] = v.x, out[1] = v.y;
}

// s += X Y^T over `channels` channels; x and y: the warp's first row and column in shared memory.
template <class S, Precision precision>
__device__ __forceinline__ void add_scores(Scores<S>& s, const float* x, const float* y, int channels) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll 1
  for (int k = 0; k < channels; k += 16) {
    const int at = group * S::CHANNELS + (((k / 4 + member) ^ S::turn(group)) << 2);
    float upper[2][4], lower[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      read(upper[t], x + at + t * 16 * S::CHANNELS);
      read(lower[t], x + at + (t * 16 + 8) * S::CHANNELS);
    }
    const Left<precision> left[2] = {{upper[0], lower[0]}, {upper[1], lower[1]}};
#pragma unroll
    for (int f = 0; f < S::FRAGMENTS; ++f) {
      float column[4];
      read(column, y + at + f * 8 * S::CHANNELS);
      const Right<precision> right(column);
#pragma unroll
      for (int t = 0; t < 2; ++t) multiply(s[t][f], left[t], right);
    }
  }
}

// Of a warp: entry [t][VECTOR q + i][2 r + e] is row 16 t + 8 r + group, channel 8 VECTOR q + VECTOR (2 member + e) + i.
template <class S>
using Gradient = float[2][S::CHANNELS / 8][4];

// d += H Y, over the first `channels` channels; y: the warp's first column in shared memory.
template <class S, Precision precision>
__device__ __forceinline__ void add_gradient(Gradient<S>& d, const Scores<S>& h, const float* y, int channels) {
  constexpr int V = S::VECTOR, CHUNK = V / 2;  // V floats: a chunk or half of one
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  int at[2];  // of columns 2 member and 2 member + 1
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = 2 * member + e, chunk = CHUNK == 2 ? group : group / 2;
    at[e] = column * S::CHANNELS + ((chunk ^ S::turn(column)) << 2) + (CHUNK == 2 ? 0 : group % 2 * 2);
  }
#pragma unroll
  for (int f = 0; f < S::FRAGMENTS; f += 2) {
    const auto of_rows = [&](int t) {
      const float upper[4] = {h[t][f][0], h[t][f][1], h[t][f + 1][0], h[t][f + 1][1]};
      const float lower[4] = {h[t][f][2], h[t][f][3], h[t][f + 1][2], h[t][f + 1][3]};
      return Left<precision>(upper, lower);
    };
    const Left<precision> left[2] = {of_rows(0), of_rows(1)};
#pragma unroll
    for (int q = 0; q < S::CHANNELS / (8 * V); ++q) {
      if (q * 8 * V >= channels) continue;
      float v[4][V];
#pragma unroll
      for (int k = 0; k < 4; ++k) read(v[k], y + at[k % 2] + (f + k / 2) * 8 * S::CHANNELS + q * 8 * V);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float column[4] = {v[0][i], v[1][i], v[2][i], v[3][i]};
        const Right<precision> right(column);
#pragma unroll
        for (int t = 0; t < 2; ++t) multiply(d[t][q * V + i], left[t], right);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------------- loading

// One side of a problem.
struct Side {
  const float* vectors;  // [count, Cp]
  int64_t Cp;
};

// `count` vectors from `first` on, of them the channels from channel0 on; zeros from vector `end` on and behind the last channel.
template <class S, int count>
__device__ __forceinline__ void load_vectors(float* tile, const Side& side, int first, int end, int channel0) {
  constexpr int chunks = S::CHANNELS / 4, at_once = S::THREADS / chunks;
  static_assert(at_once % 8 == 0 && count % at_once == 0, "turn() must be the same for all vectors of a thread");
  const int v0 = threadIdx.x / chunks, chunk = threadIdx.x % chunks, channel = channel0 + 4 * chunk;
  const int limit = channel < side.Cp ? end - first : 0;
  const float* source = side.vectors + (first + v0) * side.Cp + channel;  // not read from `limit` on
  float* const target = tile + v0 * S::CHANNELS + ((chunk ^ S::turn(v0)) << 2);
#pragma unroll
  for (int v = 0; v < count; v += at_once) {
    pk::copy_async_16(target + v * S::CHANNELS, source, v0 + v < limit);
    source += at_once * side.Cp;
  }
}

// Calls body(scores, stage, column0) for the columns of [begin, end), COLUMNS at a time, where wanted(column0) holds for the warp. The columns'
// vectors are then in that stage of shared memory. `beside` loads what else goes with them. With two stages the next columns are on their way;
// vectors of more than one slice come slice by slice, both rows and columns, slice `last` at the end.
template <class S, Precision precision, class Beside, class Wanted, class Body>
__device__ __forceinline__ void walk_columns(const Side& row_side, const Rows& rows, const Side& column_side, int begin, int end, int last,
                                             int stages, float* shared, const Beside& beside, const Wanted& wanted, const Body& body) {
  const int slices = S::SLICED ? static_cast<int>((row_side.Cp + S::CHANNELS - 1) / S::CHANNELS) : 1;
  const auto load_rows = [&](int channel0) { load_vectors<S, S::ROWS>(shared, row_side, rows.first, rows.end, channel0); };
  const auto load_columns = [&](int stage, int column0, int channel0) {
    load_vectors<S, S::COLUMNS>(shared + S::ROW_FLOATS + stage * S::STAGE_FLOATS, column_side, column0, end, channel0);
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
      const int channel0 = slices == 1 ? 0 : (last + 1 + i) % slices * S::CHANNELS;
      if (slices > 1) {
        load_rows(channel0);
        load_columns(0, column0, channel0);
        if (i == 0) beside(0, column0);
        pk::copy_async_commit();
      } else if (more && stages == 2) {
        load_columns(stage ^ 1, column0 + S::COLUMNS, 0);
        beside(stage ^ 1, column0 + S::COLUMNS);
      }
      pk::copy_async_commit();  // perhaps of nothing: what is needed now is one group behind
      pk::copy_async_wait<1>();
      __syncthreads();
      const float* const y = shared + S::ROW_FLOATS + stage * S::STAGE_FLOATS + S::warp_column() * S::CHANNELS;
      const int channels = S::CHANNELS == 16 ? 16 : min(static_cast<int>(row_side.Cp) - channel0, S::CHANNELS);
      if (mine) add_scores<S, precision>(scores, shared + S::warp_row() * S::CHANNELS, y, channels);
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
