// SPDX-License-Identifier: MIT
// What the forward kernels of contrastive share: a block's part of the problem, and what becomes of its sums.
#pragma once

#include "ops/cuda/contrastive_sums.cuh"

namespace {

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
    float (*const partial)[tile_rows][PARTS] =
        reinterpret_cast<float (*)[tile_rows][PARTS]>(p.partial) + static_cast<int64_t>(portion.tile) * p.shares;
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
