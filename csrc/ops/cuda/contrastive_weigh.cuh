// SPDX-License-Identifier: MIT
// From scores to gradients: what the backward kernels of contrastive have in common.
#pragma once

#include "ops/cuda/contrastive_backward.cuh"
#include "ops/cuda/contrastive_tile.cuh"

namespace {

// The weights of a thread's rows: kept in registers, or read again where these are short.
template <class S>
struct Own {
  static constexpr bool KEPT = S::CHANNELS == 16 && IS_HALF<S::FORMAT>;
  float3 weight[KEPT ? 2 : 1][KEPT ? 2 : 1];

  static __device__ __forceinline__ float3 read(const Backward& p, int row) {
    const float4 weight = p.of_rows.weight[row];
    return make_float3(weight.x, weight.y, weight.z);
  }

  __device__ __forceinline__ void keep(const Backward& p, int row0) {
    if constexpr (KEPT) {
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) weight[t][r] = read(p, row0 + 16 * t + 8 * r + threadIdx.x % 32 / 4);
    }
  }
  // row: the first of the thread's two.
  __device__ __forceinline__ float3 of(const Backward& p, int t, int r, int row) const {
    if constexpr (KEPT)
      return weight[t][r];
    else
      return read(p, row + 8 * r);
  }
};

// Scores become H, bounded ones H 2^lift. weight, level: of the warp's columns, in shared memory; row0, column0: the warp's first. Entries in the
// layout of Scores. Bit f of others, same: fragment f is pure (WarpClasses). ranges: of the rows from range0 on, up to last_range.
template <class S, bool bounded>
struct Weigh;

template <class S>
struct Weigh<S, true> {
  static __device__ __forceinline__ void run(Scores<S>& scores, const Backward& p, unsigned others, unsigned same, const float4* weight,
                                             const float2*, const Own<S>& kept, int lift, int row0, int column0, int end,
                                             const ContrastiveRange* ranges, int range0, int last_range) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const float lifted = static_cast<float>(lift), factor = power_of_two(lift);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int row = row0 + 16 * t + group;
      const float3 own[2] = {kept.of(p, t, 0, row), kept.of(p, t, 1, row)};
#pragma unroll
      for (int f = 0; f < S::FRAGMENTS; ++f) {
        const float4 column[2] = {weight[8 * f + 2 * member], weight[8 * f + 2 * member + 1]};
        const auto power = [&](int i) { return pk::exp2_fast(scores[t][f][i] * p.scale + lifted); };
        const auto as_other = [&](float power, int i) { return power * (own[i / 2].y + column[i % 2].y); };
        const auto as_same = [&](float power, int i) {
          return power * (own[i / 2].x + column[i % 2].x) + (own[i / 2].z + column[i % 2].z) * factor;
        };
        if (others >> f & 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[t][f][i] = as_other(power(i), i);
        } else if (same >> f & 1) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[t][f][i] = as_same(power(i), i);
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const ContrastiveRange range = range_at(ranges, min(range0 + 16 * t + 8 * r + group, last_range));
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
              const int j = column0 + 8 * f + 2 * member + i % 2;
              const bool positive = in_class(range, j);
              const float of_both = positive ? own[r].x + column[i % 2].x : own[r].y + column[i % 2].y;
              const float h = power(i) * of_both + (positive ? (own[r].z + column[i % 2].z) * factor : 0.0f);
              scores[t][f][i] = j < end && j != range.self ? h : 0.0f;
            }
          }
        }
      }
    }
  }
};

template <class S>
struct Weigh<S, false> {
  static __device__ __forceinline__ void run(Scores<S>& scores, const Backward& p, unsigned others, unsigned same, const float4* weight,
                                             const float2* level, const Own<S>&, int, int row0, int column0, int end,
                                             const ContrastiveRange* ranges, int range0, int last_range) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int f = 0; f < S::FRAGMENTS; ++f) {
      const bool pure = (others | same) >> f & 1, of_others = others >> f & 1;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row0 + 16 * t + 8 * r + group;
          const float4 own = p.of_rows.weight[row];
          const float2 own_level = p.of_rows.level[row];
          ContrastiveRange range = {0, 0, -1};
          if (!pure) range = range_at(ranges, min(range0 + 16 * t + 8 * r + group, last_range));
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = 8 * f + 2 * member + e, j = column0 + at;
            const float4 other = weight[at];
            const float2 other_level = level[at];
            const bool positive = pure ? !of_others : in_class(range, j);
            const float exponent = scores[t][f][2 * r + e] * p.scale;
            const float by_row = (positive ? own.x : own.y) * pk::exp2_fast(exponent - (positive ? own_level.x : own_level.y));
            const float by_column = (positive ? other.x : other.y) * pk::exp2_fast(exponent - (positive ? other_level.x : other_level.y));
            const float h = by_row + by_column + (positive ? own.z + other.z : 0.0f);
            scores[t][f][2 * r + e] = pure || (j < end && j != range.self) ? h : 0.0f;
          }
        }
    }
  }
};

// What a warp keeps of its rows in shared memory, as registers are short. A bit for each: it is there; it has a gradient.
struct WarpRows {
  WarpClasses classes;
  unsigned present, takes_part;
  int end;  // of the columns it needs
};

// The two warps that share rows have their gradients from other columns; the second hands them over. target: of the warp's first row.
template <class S>
__device__ __forceinline__ void write_gradient(const Gradient<S>& d, float* target, int Cp, int channels, const WarpRows& rows,
                                               float factor, float* shared) {
  constexpr int V = S::VECTOR;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const bool gives = S::warp_column() != 0;
  float* const exchange = shared + S::warp_row() * S::CHANNELS;
  const auto each = [&](const auto& action) {
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int q = 0; q < S::CHANNELS / (8 * V); ++q)
#pragma unroll
          for (int k = 0; k < 2 * V; k += 4) {  // four channels in a row
            const auto at = [&](int c) { return d[t][q * V + c % V][2 * r + c / V]; };
            action(16 * t + 8 * r + group, q * 8 * V + 2 * V * member + k, make_float4(at(k), at(k + 1), at(k + 2), at(k + 3)));
          }
  };
  if (gives) each([&](int row, int channel, const float4& v) { pk::store_vector(exchange + row * S::CHANNELS + channel, v); });
  __syncthreads();
  if (gives) return;
  const unsigned present = rows.present, takes_part = rows.takes_part;
  each([&](int row, int channel, const float4& v) {
    if (!(present >> row & 1) || channel >= channels) return;
    const float4 w = pk::load_vector<float4>(exchange + row * S::CHANNELS + channel);
    const float4 sum = make_float4((v.x + w.x) * factor, (v.y + w.y) * factor, (v.z + w.z) * factor, (v.w + w.w) * factor);
    pk::store_vector(target + row * Cp + channel, takes_part >> row & 1 ? sum : make_float4(0, 0, 0, 0));
  });
}

}  // namespace
