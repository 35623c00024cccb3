// SPDX-License-Identifier: MIT
// What the forward kernels of contrastive add up for a row: powers of two over its class and over the others, and its class's scores.
#pragma once

#include "ops/cuda/contrastive_tile.cuh"

namespace {

constexpr float LN_2 = 0.693147181f;

// Log of a sum of powers of two. Bounded: a plain sum; else relative to the largest exponent.
template <bool bounded>
struct LogSum;

template <>
struct LogSum<true> {
  static constexpr int PARTS = 1;
  float part[1] = {0};

  __device__ __forceinline__ void merge(const float* other) { part[0] += other[0]; }
  __device__ __forceinline__ float value() const { return logf(part[0]); }
};

template <>
struct LogSum<false> {
  static constexpr int PARTS = 2;
  float part[2] = {-INFINITY, 0};

  __device__ __forceinline__ float shift() const { return part[0] == -INFINITY ? 0.0f : part[0]; }
  __device__ __forceinline__ void raise(float top) {  // a NaN among the exponents comes with the sum
    const float before = part[0];
    part[0] = fmaxf(before, top);
    part[1] *= pk::exp2_fast(before - shift());
  }
  __device__ __forceinline__ void merge(const float* other) {
    raise(other[0]);
    part[1] += other[1] * pk::exp2_fast(other[0] - shift());
  }
  __device__ __forceinline__ float value() const { return shift() * LN_2 + logf(part[1]); }
};

template <bool bounded>
struct RowSums {
  static constexpr int OF_LOG = LogSum<bounded>::PARTS, PARTS = 2 * OF_LOG + 1;
  LogSum<bounded> p, n;
  float l = 0;

  __device__ __forceinline__ void merge(const float (&other)[PARTS]) {
    p.merge(other);
    n.merge(other + OF_LOG);
    l += other[PARTS - 1];
  }
  __device__ __forceinline__ void parts(float (&out)[PARTS]) const {
#pragma unroll
    for (int k = 0; k < OF_LOG; ++k) out[k] = p.part[k], out[OF_LOG + k] = n.part[k];
    out[PARTS - 1] = l;
  }
  // With the other threads of the warp that share the row.
  __device__ __forceinline__ void gather() {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      float mine[PARTS], other[PARTS];
      parts(mine);
#pragma unroll
      for (int k = 0; k < PARTS; ++k) other[k] = __shfl_xor_sync(ALL, mine[k], step);
      merge(other);
    }
  }
};

// Adds the scores of a warp to the sums of its rows; entries in the layout of Scores. Bit f of others, same: fragment f is pure (WarpClasses).
template <class S>
__device__ __forceinline__ void add_entries(RowSums<true> (&sums)[2][2], const Scores<S>& scores, float scale, unsigned others,
                                            unsigned same, const ContrastiveRange* ranges, int row0, int last_row, int column0, int end) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int f = 0; f < S::FRAGMENTS; ++f) {
    if (others >> f & 1) {
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[t][i / 2].n.part[0] += pk::exp2_fast(scores[t][f][i] * scale);
    } else if (same >> f & 1) {
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[t][i / 2].p.part[0] += pk::exp2_fast(scores[t][f][i] * scale);
          sums[t][i / 2].l += scores[t][f][i];
        }
    } else {
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const ContrastiveRange range = range_at(ranges, min(row0 + 16 * t + 8 * r + group, last_row));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column0 + 8 * f + 2 * member + e;
            const float s = scores[t][f][2 * r + e], power = pk::exp2_fast(s * scale);
            if (column >= end || column == range.self) continue;
            if (in_class(range, column)) {
              sums[t][r].p.part[0] += power;
              sums[t][r].l += s;
            } else {
              sums[t][r].n.part[0] += power;
            }
          }
        }
    }
  }
}

template <class S>
__device__ __forceinline__ void add_entries(RowSums<false> (&sums)[2][2], const Scores<S>& scores, float scale, unsigned, unsigned,
                                            const ContrastiveRange* ranges, int row0, int last_row, int column0, int end) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const ContrastiveRange range = range_at(ranges, min(row0 + 16 * t + 8 * r + group, last_row));
      float top_p = -INFINITY, top_n = -INFINITY;
      const auto each = [&](const auto& entry) {
#pragma unroll
        for (int f = 0; f < S::FRAGMENTS; ++f)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = column0 + 8 * f + 2 * member + e;
            if (column < end && column != range.self) entry(scores[t][f][2 * r + e], in_class(range, column));
          }
      };
      each([&](float s, bool positive) {
        top_p = positive ? fmaxf(top_p, s * scale) : top_p;
        top_n = positive ? top_n : fmaxf(top_n, s * scale);
      });
      RowSums<false>& row = sums[t][r];
      row.p.raise(top_p);
      row.n.raise(top_n);
      const float shift_p = row.p.shift(), shift_n = row.n.shift();
      each([&](float s, bool positive) {
        const float power = pk::exp2_fast(s * scale - (positive ? shift_p : shift_n));
        row.p.part[1] += positive ? power : 0.0f;
        row.n.part[1] += positive ? 0.0f : power;
        row.l += positive ? s : 0.0f;
      });
    }
}

}  // namespace
