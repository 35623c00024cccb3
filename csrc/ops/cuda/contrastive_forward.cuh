// SPDX-License-Identifier: MIT
// What the forward kernels of contrastive share: the sums of a row, a block's part of the problem, and what becomes of its sums.
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

struct Forward {
  int R, G, shares, stages;
  Side rows, columns;
  const ContrastiveGroup* groups;  // [G]
  const ContrastiveRange* ranges;  // [R]
  float scale;                     // log2(e) / temperature
  float inverse_temperature;
  Results<float> results;
  float* partial;           // [tiles, shares, ROWS, parts]
  unsigned* tile_arrivals;  // [tiles], 0 before the launch
};

// What a block does: a tile of rows, and a share of the columns of their group.
struct Portion {
  Rows rows;
  int tile, share, used;  // shares that have columns; others have nothing to do
  int anchors_begin, anchors_end;
  int begin, end;  // columns
};

template <int threads>
__device__ __forceinline__ Portion find_portion(const Forward& p, int tile_rows, int step) {
  Portion out;
  out.tile = static_cast<int>(blockIdx.x) / p.shares, out.share = static_cast<int>(blockIdx.x) % p.shares;
  const Rows rows = out.rows = find_rows<threads>(p.groups, p.G, p.R, tile_rows, out.tile);
  out.anchors_begin = max(rows.first, rows.group.row_begin), out.anchors_end = min(rows.end, rows.group.row_anchor_end);
  const int count = out.anchors_begin < out.anchors_end ? rows.group.column_end - rows.group.column_begin : 0;
  const int of_share = ((count + p.shares - 1) / p.shares + step - 1) / step * step;
  out.used = count > 0 ? (count + of_share - 1) / of_share : 1;
  out.begin = rows.group.column_begin + out.share * of_share, out.end = min(out.begin + of_share, rows.group.column_begin + count);
  return out;
}

// By the whole block: thread i has the sums of row i of the tile, over the columns of the share.
template <int threads, int tile_rows, bool bounded>
__device__ __forceinline__ void finish(const Forward& p, const Portion& portion, RowSums<bounded>& total) {
  constexpr int PARTS = RowSums<bounded>::PARTS;
  const int at = threadIdx.x, row = portion.rows.first + at;
  const bool speaks = at < tile_rows && row < portion.rows.end;
  if (portion.used > 1) {
    float(*const partial)[tile_rows][PARTS] =
        reinterpret_cast<float(*)[tile_rows][PARTS]>(p.partial) + static_cast<int64_t>(portion.tile) * p.shares;
    if (speaks) total.parts(partial[portion.share][at]);
    if (!arrives_last(p.tile_arrivals + portion.tile, portion.used)) return;
    if (speaks) {
      total = RowSums<bounded>();
      for (int s = 0; s < portion.used; ++s) {
        float part[PARTS];
#pragma unroll
        for (int k = 0; k < PARTS; ++k) part[k] = __ldcg(&partial[s][at][k]);
        total.merge(part);
      }
    }
  }
  double weighted = 0;
  if (speaks)
    weighted = p.results.write(row, portion.rows.is_anchor(row), total.p.value(), total.n.value(), total.l * p.inverse_temperature);
  p.results.template add<threads>(portion.tile, weighted);
}

}  // namespace
