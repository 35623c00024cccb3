// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU, forward, of vectors of up to 64 channels: pixels. The equations stand in ops/contrastive.h, the products in
// contrastive_tile.cuh, how the work is shared out in contrastive_units.cuh.
//
// A block has 64 anchors and walks over columns. Two warps share rows and take 16 columns (narrow, up to 16 channels) or 32 in turn. Scores stay in
// registers as they come from the tensor cores; a thread adds up powers of two for its part of four rows, and the threads of a row meet once, at the
// end. Of narrow vectors the rows lie in shared memory as the tensor cores take them, and the next step's products are under way while this
// step's powers are taken.
//
// Measured on an H200, precision highest, and with a block for every 64 rows and share of columns, as it was before:
//   100 groups of 1024 rows, 17 % anchors, C = 16: 24 us (40)      stride 4 of these maps, C = 16: 18 to 20 us (24)    C = 64: 26 to 28 us (36)
//   one group of 102,400, 17 % anchors, C = 16: 0.97 ms (1.15). A power takes 8 of a scheduler's cycles: 64 for 8 columns, of which the products take
//     36. Multiprocessors are busy four fifths of the time, since blocks that meet other anchors are slower than those that meet the background.
//   Twice and three times as many ranges as blocks fit on the GPU: 0.85 ms in the largest case, but 32 and 36 us in the first: a range has its price,
//     about 3 us of loads that wait for each other before it and a fence behind it.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_halves.cuh"
#include "ops/cuda/contrastive_local.cuh"
#include "ops/cuda/contrastive_sums.cuh"

namespace {

constexpr int ROWS = 64, THREADS = 128;

struct LocalForward {
  int R, G;
  Side rows, columns;
  const ContrastiveGroup* groups;  // [G]
  const ContrastiveRange* ranges;  // [R]
  float scale;                     // log2(e) / temperature
  float inverse_temperature;
  Results<float> results;
  const int64_t* starts;    // [G + 1]
  float* partial;           // [2 blocks, ROWS, parts]
  double* totals;           // [2 blocks], 0 before the launch: of the tiles that a block does alone, of the one that it leaves to others
  unsigned* tile_arrivals;  // [blocks], 0 before the launch
};

template <class L, bool bounded>
__device__ __forceinline__ void forward_tile(const LocalForward& p, const TileWork& tile, unsigned* shared, ContrastiveRange* own_ranges,
                                             RowSums<bounded>& total) {
  using S = typename L::S;
  constexpr int PARTS = RowSums<bounded>::PARTS;
  const ContrastiveGroup group = p.groups[tile.group];
  const int begin = group.column_begin + tile.first * L::COLUMNS, end = min(begin + tile.count * L::COLUMNS, group.column_end);
  const int rows_end = min(tile.first_row + ROWS, group.row_anchor_end), row0 = tile.first_row + S::warp_row(), lane = threadIdx.x % 32;
  const bool takes_part = row0 + lane < rows_end, works = row0 < rows_end;
  if (threadIdx.x < ROWS) own_ranges[threadIdx.x] = range_at(p.ranges, min(tile.first_row + static_cast<int>(threadIdx.x), rows_end - 1));
  WarpClasses classes;
  classes.find(p.ranges, row0 + lane, takes_part);
  load_vectors<S, ROWS>(shared, p.rows, tile.first_row, rows_end, 0);
  unsigned *const fragments = shared + S::ROW_WORDS, *const stages = fragments + L::FRAGMENTS_OF_ROWS;
  const int words = L::NARROW ? S::WORDS : min(static_cast<int>(p.rows.words), S::WORDS);

  RowSums<bounded> sums[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = RowSums<bounded>();
  RowsOfWarp<L> rows;
  walk_stages<L::COLUMNS>(
      begin, end, [&](int stage, int column0) { load_vectors<S, L::COLUMNS>(stages + stage * L::STAGE_WORDS, p.columns, column0, end, 0); },
      [&](int stage, int column0) {
        if (!works) return;
        if (column0 == begin) rows.lay_out(shared + S::warp_row() * S::WORDS, fragments);
        rows.take(shared + S::warp_row() * S::WORDS, fragments);
        unsigned others, same;
        classes.kinds<L::FRAGMENTS>(column0, end, others, same);
        walk_steps<L>(rows, stages + stage * L::STAGE_WORDS, words, column0, end, others, same,
                      [&](const Scores<S>& scores, int at, auto kinds) {
                        add_entries<S>(sums, scores, p.scale, kinds.others(others >> (at / 8)), kinds.same(same >> (at / 8)), own_ranges,
                                       S::warp_row(), ROWS - 1, column0 + at, end);
                      });
      });

  float (*const gathered)[2][PARTS] = reinterpret_cast<float (*)[2][PARTS]>(shared);  // the columns are not needed any more
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[t][r].gather();
      if (lane % 4 == 0) sums[t][r].parts(gathered[S::warp_row() + 16 * t + 8 * r + lane / 4][threadIdx.x / 32 % 2]);
    }
  __syncthreads();
  total = RowSums<bounded>();
  if (threadIdx.x < ROWS) {
    total.merge(gathered[threadIdx.x][0]);
    total.merge(gathered[threadIdx.x][1]);
  }
}

template <class L, bool bounded>
__device__ __forceinline__ void forward_blocks(const LocalForward& p, unsigned* shared) {
  using Sums = RowSums<bounded>;
  constexpr int PARTS = Sums::PARTS;
  PK_SHARED(ContrastiveRange, own_ranges, ROWS);
  pk::let_next_begin();
  pk::wait_for_previous();
  const Work work(p.starts, p.G);
  const int block = static_cast<int>(blockIdx.x);
  if (block >= work.blocks) return;
  const ForwardTiles tiles{ROWS, L::COLUMNS};
  float (*const partial)[ROWS][PARTS] = reinterpret_cast<float (*)[ROWS][PARTS]>(p.partial);
  const int at = threadIdx.x;
  double alone = 0;
  const int64_t end = work.begin_of(block + 1);
  for (int64_t unit = work.begin_of(block); unit < end;) {
    const TileWork tile = work.find<THREADS>(p.groups, tiles, unit, end);
    unit += tile.count;
    Sums total;
    forward_tile<L, bounded>(p, tile, shared, own_ranges, total);
    const int row = tile.first_row + at;
    const bool speaks = at < ROWS && row < p.groups[tile.group].row_anchor_end;
    const auto write = [&] {
      return speaks ? p.results.write(row, true, total.p.value(), total.n.value(), total.l * p.inverse_temperature) : 0.0;
    };
    if (tile.whole()) {
      alone += write();
      __syncthreads();
      continue;
    }
    const Sharers sharers(work, tile);
    if (speaks) total.parts(partial[sharers.place(block)][at]);
    if (!arrives_last(p.tile_arrivals + sharers.first, sharers.count())) continue;
    // Two threads have a row, each half of its parts.
    const bool present = tile.first_row + at % ROWS < p.groups[tile.group].row_anchor_end;
    const int half = at / ROWS, middle = sharers.first + (sharers.count() + 1) / 2;
    total = Sums();
#pragma unroll 8
    for (int b = half ? middle : sharers.first; present && b < (half ? sharers.last + 1 : middle); ++b) {
      float part[PARTS];
#pragma unroll
      for (int k = 0; k < PARTS; ++k) part[k] = __ldcg(&partial[sharers.place(b)][at % ROWS][k]);
      total.merge(part);
    }
    float (*const second)[PARTS] = reinterpret_cast<float (*)[PARTS]>(shared);
    if (half) total.parts(second[at % ROWS]);
    __syncthreads();
    if (!half) total.merge(second[at]);
    __syncthreads();
    const double weighted = write();
    if (!p.results.weights) continue;
    const double sum = block_sum<THREADS>(weighted);
    if (at == 0) p.totals[2 * sharers.first + 1] = sum;
  }
  if (!p.results.weights) return;
  alone = block_sum<THREADS>(alone);
  if (at == 0) p.totals[2 * block] = alone;
  if (!arrives_last(p.results.arrivals, work.blocks)) return;
  double mine = 0;
#pragma unroll 8
  for (int t = at; t < 2 * work.blocks; t += THREADS) mine += __ldcg(p.totals + t);
  mine = block_sum<THREADS>(mine);
  if (at == 0) *p.results.total = static_cast<float>(mine);
}

// ---------------------------------------------------------------------------------------------------------------------- kernels

template <Format F>
using Narrow = Local<Shape<F, 16, 2, IS_HALF<F> ? 1 : 4>, IS_HALF<F> ? 4 : 1>;
template <Format F>
using Middle = Local<Shape<F, 64, 2, IS_HALF<F> ? 2 : 4>, 1>;
// Of a multiprocessor, as registers allow.
template <Format F>
constexpr int NARROW_BLOCKS = IS_HALF<F> ? 4 : 2;
template <Format F>
constexpr int MIDDLE_BLOCKS = IS_HALF<F> ? 3 : 2;

// resources: dynamic shared 36864 bytes
template <Format F>
__global__ void __launch_bounds__(THREADS, NARROW_BLOCKS<F>) narrow_forward_kernel(const LocalForward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  forward_blocks<Narrow<F>, IS_HALF<F>>(p, shared);
}
// resources: dynamic shared 81920 bytes
template <Format F>
__global__ void __launch_bounds__(THREADS, MIDDLE_BLOCKS<F>) middle_forward_kernel(const LocalForward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  forward_blocks<Middle<F>, IS_HALF<F>>(p, shared);
}

constexpr int PREPARE_THREADS = 256;

struct Prepare {
  int64_t fours, other_fours;  // of the rows' and the columns' vectors that become 16-bit floats
  const float4 *vectors, *other_vectors;
  bool two;
  unsigned *halves, *other_halves;
  const ContrastiveGroup* groups;
  int G;
  ForwardTiles tiles;
  int64_t* starts;
  int64_t R, totals_count, arrivals_count;
  float *losses, *statistics, *total;  // total null: without weights
  double* totals;
  unsigned* arrivals;
};

// The launch before: 16-bit floats; zeros to count in; what rows hold that are no anchors; the first block finds out where the groups' units begin.
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_forward_kernel(const Prepare p) {
  pk::let_next_begin();
  pk::wait_for_previous();
  if (blockIdx.x == 0) {
    write_unit_starts<PREPARE_THREADS>(p.groups, p.G, p.tiles, p.starts);
    return;
  }
  const int64_t i = static_cast<int64_t>(blockIdx.x - 1) * PREPARE_THREADS + threadIdx.x;
  if (i < p.fours) write_halves(p.halves, p.two, 0, i, p.vectors[i]);
  if (i < p.other_fours) write_halves(p.other_halves, p.two, 0, i, p.other_vectors[i]);
  if (i < p.R) {
    p.losses[i] = 0;
    p.statistics[i] = p.statistics[p.R + i] = -INFINITY, p.statistics[2 * p.R + i] = 0;
  }
  if (i < p.totals_count) p.totals[i] = 0;
  if (i < p.arrivals_count) p.arrivals[i] = 0;
  if (i == 0 && p.total) *p.total = 0;
}

// ------------------------------------------------------------------------------------------------------------------------ launch

struct Choice {
  int columns, blocks;  // of a stage, of a multiprocessor
  std::size_t shared_bytes;
  void (*kernel)(LocalForward);
};

template <Format F>
Choice choose(bool narrow) {
  if (narrow) return {Narrow<F>::COLUMNS, NARROW_BLOCKS<F>, Narrow<F>::shared_bytes(0, 0), narrow_forward_kernel<F>};
  return {Middle<F>::COLUMNS, MIDDLE_BLOCKS<F>, Middle<F>::shared_bytes(0, 0), middle_forward_kernel<F>};
}
Choice choose(Format format, bool narrow) {
  switch (format) {
    case Format::halves: return choose<Format::halves>(narrow);
    case Format::half: return choose<Format::half>(narrow);
    case Format::exact: return choose<Format::exact>(narrow);
    case Format::tf32: return choose<Format::tf32>(narrow);
    default: return choose<Format::bf16>(narrow);
  }
}

struct Arrangement {
  Format format;
  Choice choice;
  int64_t blocks;
  unsigned* arrivals;  // [1 + blocks]
  double* totals;
  int64_t* starts;
  float* partial;
  Side rows, columns;
  int64_t bytes;

  Arrangement(const ContrastiveForward& p, void* workspace)
      : format(format_of(p.precision, p.bounded)), choice(choose(format, contrastive_width(p.Cp) == ContrastiveWidth::narrow)) {
    blocks = local_blocks(p.R, p.M, p.G, ROWS, choice.columns, choice.blocks);
    Pieces pieces(workspace);
    arrivals = pieces.take<unsigned>(1 + blocks), totals = pieces.take<double>(2 * blocks), starts = pieces.take<int64_t>(p.G + 1);
    partial = pieces.take<float>(2 * blocks * ROWS * (p.bounded ? RowSums<true>::PARTS : RowSums<false>::PARTS));
    const Halves halves(p, pieces);
    rows = halves.rows, columns = halves.columns, bytes = pieces.bytes();
  }
};

}  // namespace

namespace protokernels {

int64_t contrastive_local_forward_workspace(const ContrastiveForward& p) { return Arrangement(p, nullptr).bytes; }

int launch_contrastive_local_forward(const ContrastiveForward& p, void* workspace, void* stream) {
  const Arrangement memory(p, workspace);
  Prepare prepare{};
  if (is_half(memory.format)) {
    prepare.fours = p.R * p.Cp / 4, prepare.vectors = static_cast<const float4*>(p.rows),
    prepare.halves = const_cast<unsigned*>(memory.rows.vectors);
    if (memory.columns.vectors != memory.rows.vectors)
      prepare.other_fours = p.M * p.Cp / 4, prepare.other_vectors = static_cast<const float4*>(p.columns),
      prepare.other_halves = const_cast<unsigned*>(memory.columns.vectors);
  }
  prepare.two = memory.format == Format::halves;
  prepare.groups = p.groups, prepare.G = static_cast<int>(p.G), prepare.tiles = {ROWS, memory.choice.columns},
  prepare.starts = memory.starts;
  prepare.R = p.R, prepare.totals_count = 2 * memory.blocks, prepare.arrivals_count = 1 + memory.blocks;
  prepare.losses = static_cast<float*>(p.losses), prepare.statistics = static_cast<float*>(p.statistics);
  prepare.total = p.weights ? static_cast<float*>(p.total) : nullptr;
  prepare.totals = memory.totals, prepare.arrivals = memory.arrivals;
  int64_t threads = prepare.totals_count > p.R ? prepare.totals_count : p.R;
  for (const int64_t fours : {prepare.fours, prepare.other_fours}) threads = fours > threads ? fours : threads;
  const int status =
      PK_LAUNCH_BEHIND(prepare_forward_kernel, dim3(static_cast<unsigned>((threads + PREPARE_THREADS - 1) / PREPARE_THREADS + 1)),
                       dim3(PREPARE_THREADS), 0, stream, prepare);
  if (status != 0 || p.G == 0) return status;
  LocalForward launch{};
  launch.R = static_cast<int>(p.R), launch.G = static_cast<int>(p.G), launch.rows = memory.rows, launch.columns = memory.columns;
  launch.groups = p.groups, launch.ranges = p.ranges;
  launch.inverse_temperature = static_cast<float>(1.0 / p.temperature),
  launch.scale = static_cast<float>(1.4426950408889634 / p.temperature);
  Results<float>& results = launch.results;
  results.R = launch.R, results.G = launch.G, results.form = p.form, results.groups = p.groups, results.ranges = p.ranges;
  results.weights = p.weights;
  results.losses = static_cast<float*>(p.losses), results.statistics = static_cast<float*>(p.statistics),
  results.total = static_cast<float*>(p.total);
  results.arrivals = memory.arrivals;
  launch.starts = memory.starts, launch.partial = memory.partial, launch.totals = memory.totals, launch.tile_arrivals = memory.arrivals + 1;
  return PK_LAUNCH_BEHIND(memory.choice.kernel, dim3(static_cast<unsigned>(memory.blocks)), dim3(THREADS), memory.choice.shared_bytes,
                          stream, launch);
}

}  // namespace protokernels
