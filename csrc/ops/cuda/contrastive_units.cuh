// SPDX-License-Identifier: MIT
// How the pairs of short vectors are shared out among the blocks of one launch, whatever the groups are.
//
// A tile is the rows of a group that a block has at once; a unit of work is a tile and so many columns. All units of all groups, in their order,
// are cut into as many equal ranges as there are blocks on the GPU at once, so that all blocks end together and none of them only looks and leaves.
// A tile cut by the end of a range is worked on by several blocks: each leaves its part, and the last to arrive adds the parts up in the order of
// columns. Which parts there are depends on the groups and the number of blocks alone: the same bits every time.
//
// Where the units of every group begin is written by the launch before, by one of its blocks (write_unit_starts).
#pragma once

#include "ops/cuda/contrastive_rows.cuh"

namespace {

__device__ __forceinline__ int ceiling(int n, int step) { return (n + step - 1) / step; }
// Of numbers that are not negative; a division of 64 bits is five times as long.
__device__ __forceinline__ int64_t quotient(int64_t n, int64_t d) {
  return (n | d) >> 32 == 0 ? static_cast<int64_t>(static_cast<unsigned>(n) / static_cast<unsigned>(d)) : n / d;
}

// The tiles of a group, in order of rows: some without columns, those that meet all columns, those that meet fewer, and again some without.
// A tile without columns is one unit.
struct GroupTiles {
  int first;  // row
  int before, heavy, light, behind;
  int heavy_units, light_units;  // of a tile

  __device__ __forceinline__ int64_t units() const {
    return before + static_cast<int64_t>(heavy) * heavy_units + static_cast<int64_t>(light) * light_units + behind;
  }
};

// Forward: anchors alone have work.
struct ForwardTiles {
  int rows, columns;
  __device__ __forceinline__ GroupTiles operator()(const ContrastiveGroup* groups, int g) const {
    const ContrastiveGroup group = groups[g];
    return {group.row_begin,
            0,
            ceiling(group.row_anchor_end - group.row_begin, rows),
            0,
            0,
            ceiling(group.column_end - group.column_begin, columns),
            0};
  }
};

// Backward: rows with losses meet all columns, the others the anchors among them. A group's tiles also cover the rows behind it that are in no group,
// and those of the first group the rows before it: every row is in one tile.
struct BackwardTiles {
  int rows, columns, G, R;
  bool rows_have_losses, columns_have_losses;
  __device__ __forceinline__ int limit(const ContrastiveGroup* groups, int g) const { return g + 1 < G ? groups[g + 1].row_begin : R; }
  __device__ __forceinline__ GroupTiles operator()(const ContrastiveGroup* groups, int g) const {
    const ContrastiveGroup group = groups[g];
    const int first = group_rows_begin(groups, g), offset = group.row_begin - first, all = ceiling(limit(groups, g) - first, rows);
    const int anchors = rows_have_losses ? group.row_anchor_end - group.row_begin : 0, members = group.row_end - group.row_begin;
    const int before = min(offset / rows, all), heavy_end = anchors > 0 ? ceiling(offset + anchors, rows) : before;
    const int light_end = max(heavy_end, members > 0 ? ceiling(offset + members, rows) : before);
    const int of_anchors = columns_have_losses ? group.column_anchor_end - group.column_begin : 0;
    return {first,
            before,
            heavy_end - before,
            light_end - heavy_end,
            all - light_end,
            max(1, ceiling(group.column_end - group.column_begin, columns)),
            max(1, ceiling(of_anchors, columns))};
  }
};

// By one block: starts[g], the units of the groups before g; starts[G], all of them.
template <int threads, class Tiles>
__device__ __forceinline__ void write_unit_starts(const ContrastiveGroup* groups, int G, const Tiles& tiles, int64_t* starts) {
  PK_SHARED(int64_t, of_warp, threads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (G + threads - 1) / threads;
  const int begin = min(G, static_cast<int>(threadIdx.x) * each), end = min(G, begin + each);
  int64_t own = 0;
  for (int g = begin; g < end; ++g) own += tiles(groups, g).units();
  int64_t upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(ALL, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) of_warp[warp] = upto;
  __syncthreads();
  int64_t next = upto - own;
  for (int w = 0; w < warp; ++w) next += of_warp[w];
  for (int g = begin; g < end; ++g) {
    starts[g] = next;
    next += tiles(groups, g).units();
  }
  if (end == G && begin < end) starts[G] = next;
}

// What a block has to do with a tile.
struct TileWork {
  int group, first_row;  // of the tile
  int64_t begin;         // the tile's first unit
  int units;             // of the tile; 0 columns are one unit
  int first, count;      // of these: the block's
  __device__ __forceinline__ bool whole() const { return count == units; }
};

struct Work {
  const int64_t* starts;
  int G, blocks;
  int64_t total;

  __device__ __forceinline__ Work(const int64_t* unit_starts, int groups) : starts(unit_starts), G(groups) {
    total = starts[G];
    blocks = static_cast<int>(total < gridDim.x ? total : gridDim.x);
  }
  __device__ __forceinline__ int64_t begin_of(int block) const { return quotient(total * block, blocks); }
  __device__ __forceinline__ int owner(int64_t unit) const { return static_cast<int>(quotient((unit + 1) * blocks - 1, total)); }

  // By all threads of the block: the tile of unit `unit`, as far as units before `end` go.
  template <int threads, class Tiles>
  __device__ __forceinline__ TileWork find(const ContrastiveGroup* groups, const Tiles& tiles, int64_t unit, int64_t end) const {
    int group = 0, count = G;
    while (count > 1) {  // so many probes at a time
      const int step = (count + threads - 1) / threads, probe = threadIdx.x * step;
      const int before = __syncthreads_count(probe < count && starts[group + probe] <= unit) - 1;
      group += before * step;
      count = min(step, count - before * step);
    }
    const GroupTiles of_group = tiles(groups, group);
    int64_t at = starts[group], left = unit - at;
    int tile = 0, units = 1, tiles_here = of_group.before;
    const auto pass = [&](int next_units, int next_tiles) {  // on to the next kind of tiles, if the unit is not among these
      const int64_t here = static_cast<int64_t>(tiles_here) * units;
      if (left < here) return false;
      left -= here, at += here, tile += tiles_here;
      units = next_units, tiles_here = next_tiles;
      return true;
    };
    if (pass(of_group.heavy_units, of_group.heavy) && pass(of_group.light_units, of_group.light)) pass(1, of_group.behind);
    const int64_t which = quotient(left, units);
    TileWork work;
    work.group = group, work.first_row = of_group.first + (tile + static_cast<int>(which)) * tiles.rows;
    work.begin = at + which * units, work.units = units;
    work.first = static_cast<int>(unit - work.begin);
    work.count = static_cast<int>((end - work.begin < units ? end - work.begin : units) - work.first);
    return work;
  }
};

// The blocks that share a tile, and where they leave their parts: a block has one for the tile that it goes on with and one for the tile that it begins.
struct Sharers {
  int first, last;

  __device__ __forceinline__ Sharers(const Work& work, const TileWork& tile)
      : first(work.owner(tile.begin)), last(work.owner(tile.begin + tile.units - 1)) {}
  __device__ __forceinline__ int count() const { return last - first + 1; }
  __device__ __forceinline__ int64_t place(int block) const { return 2 * static_cast<int64_t>(block) + (block == first); }
};

// Calls body(stage, column0) for the columns [begin, end), so many at a time; load(stage, column0) brings them. One barrier each: what a stage held before
// is done with when the barrier opens, so the next columns travel while these are used.
template <int columns, class Load, class Body>
__device__ __forceinline__ void walk_stages(int begin, int end, const Load& load, const Body& body) {
  if (begin < end) load(0, begin);
  pk::copy_async_commit();
  int stage = 0;
#pragma unroll 1
  for (int column0 = begin; column0 < end; column0 += columns) {
    pk::copy_async_wait<0>();
    __syncthreads();
    if (column0 + columns < end) load(stage ^ 1, column0 + columns);
    pk::copy_async_commit();
    body(stage, column0);
    stage ^= 1;
  }
  pk::copy_async_wait<0>();
  __syncthreads();
}

}  // namespace
