// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU, backward, of vectors of up to 64 channels: pixels. The equations stand in ops/contrastive.h, how the work is shared
// out in contrastive_units.cuh.
//
// Like attention without a softmax. A block has 64 rows and walks over columns; scores become H in their registers, one exponential for both roles of a
// pair, and H is at once the left factor of H F: the gradient of the rows stays in registers to the end. Rows with losses meet all columns of
// their group, the others its anchors only. No block adds to another's rows.
//
// Measured on an H200, precision highest, and with a block for every 64 rows, as it was before:
//   100 groups of 1024 rows, 17 % anchors, C = 16: 66 us (81). Half of all samples lie outside the walk: finding a tile, its classes and rows, waiting for
//     its first columns, writing its gradient. A background tile has 170 columns here, one stage and a bit.
//   stride 4 of these maps, C = 16: 29 us (32)      C = 64: 63 to 67 us (66): 2 warps to a scheduler hide little
//   one group of 102,400, 17 % anchors, C = 16: 2.79 ms (3.4). 94 instructions for 8 columns and 32 rows, of which 24 split H into two parts.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_local.cuh"
#include "ops/cuda/contrastive_weigh.cuh"

namespace {

constexpr int ROWS = 64, THREADS = 128;

struct LocalBackward {
  Backward problem;
  BackwardTiles tiles;
  const int64_t* starts;    // [G + 1]
  float* partial;           // [2 blocks, ROWS, CHANNELS]
  unsigned* tile_arrivals;  // [blocks], 0 before the launch
};

template <class L, bool bounded>
__device__ __forceinline__ void backward_tile(const LocalBackward& local, const TileWork& tile, const Rows& rows, int lift,
                                              unsigned* shared, ContrastiveRange* own_ranges, float* target, int pitch) {
  using S = typename L::S;
  const Backward& p = local.problem;
  const ContrastiveGroup& group = rows.group;
  const int of_anchors = p.columns_have_losses ? group.column_anchor_end : group.column_begin;
  const auto columns_end = [&](int first, int behind) {  // of rows [first, behind)
    first = max(first, group.row_begin), behind = min(behind, rows.end);
    if (first >= min(behind, group.row_end)) return group.column_begin;
    return p.rows_have_losses && first < group.row_anchor_end ? group.column_end : of_anchors;
  };
  const int row0 = rows.first + S::warp_row(), lane = threadIdx.x % 32,
            words = L::NARROW ? S::WORDS : min(static_cast<int>(p.rows.words), S::WORDS);
  const int begin = group.column_begin + tile.first * L::COLUMNS;
  const int end = min(begin + tile.count * L::COLUMNS, columns_end(rows.first, rows.end));
  PK_SHARED(WarpRows, of_warps, THREADS / 32);
  WarpRows& of_warp = of_warps[threadIdx.x / 32];
  if (threadIdx.x < ROWS) own_ranges[threadIdx.x] = range_at(p.ranges, min(rows.first + static_cast<int>(threadIdx.x), rows.end - 1));
  WarpClasses classes;
  classes.find(p.ranges, row0 + lane, rows.in_group(row0 + lane));
  const unsigned present = __ballot_sync(ALL, row0 + lane < rows.end), takes_part = __ballot_sync(ALL, rows.in_group(row0 + lane));
  if (lane == 0) of_warp = {classes, present, takes_part, min(end, columns_end(row0, row0 + 32))};
  __syncwarp();
  load_vectors<S, ROWS>(shared, p.rows, rows.first, rows.end, 0);
  unsigned *const fragments = shared + S::ROW_WORDS, *const stages = fragments + L::FRAGMENTS_OF_ROWS;
  float4* const weight = reinterpret_cast<float4*>(stages + 2 * L::STAGE_WORDS);  // [2, COLUMNS]
  float2* const level = reinterpret_cast<float2*>(weight + 2 * L::COLUMNS);       // [2, COLUMNS]
  Own<S> own;
  own.keep(p, row0);
  Gradient<S> gradient = {};
  RowsOfWarp<L> of_rows;
  walk_stages<L::COLUMNS>(
      begin, end,
      [&](int stage, int column0) {
        load_vectors<S, L::COLUMNS>(stages + stage * L::STAGE_WORDS, p.columns, column0, end, 0);
        const int at = threadIdx.x, j = column0 + at;
        if (at >= L::COLUMNS) return;
        pk::copy_async_16(weight + stage * L::COLUMNS + at, p.of_columns.weight + (j < end ? j : 0), j < end);
        if (!bounded) pk::copy_async_8(level + stage * L::COLUMNS + at, p.of_columns.level + (j < end ? j : 0), j < end);
      },
      [&](int stage, int column0) {
        const int warp_end = of_warp.end;
        if (column0 >= warp_end) return;
        if (column0 == begin) of_rows.lay_out(shared + S::warp_row() * S::WORDS, fragments);
        of_rows.take(shared + S::warp_row() * S::WORDS, fragments);
        unsigned others, same;
        of_warp.classes.template kinds<L::FRAGMENTS>(column0, warp_end, others, same);
        const unsigned* const columns = stages + stage * L::STAGE_WORDS;
        walk_steps<L>(of_rows, columns, words, column0, warp_end, others, same, [&](Scores<S>& scores, int at, auto kinds) {
          Weigh<S, bounded>::run(scores, p, kinds.others(others >> (at / 8)), kinds.same(same >> (at / 8)),
                                 weight + stage * L::COLUMNS + at, level + stage * L::COLUMNS + at, own, lift, row0, column0 + at, warp_end,
                                 own_ranges, S::warp_row(), ROWS - 1);
          add_gradient<S>(gradient, scores, columns + at * S::WORDS, L::NARROW ? S::CHANNELS : p.Cp);
        });
      });
  write_gradient<S>(gradient, target + S::warp_row() * pitch, pitch, p.Cp, of_warp, p.inverse_temperature * power_of_two(-lift),
                    reinterpret_cast<float*>(shared));
}

template <class L, bool bounded>
__device__ __forceinline__ void backward_blocks(const LocalBackward& local, unsigned* shared) {
  using S = typename L::S;
  constexpr int FOURS = S::CHANNELS / 4;  // of a row
  PK_SHARED(ContrastiveRange, own_ranges, ROWS);
  const Backward& p = local.problem;
  pk::let_next_begin();
  pk::wait_for_previous();
  const Work work(local.starts, p.G);
  const int block = static_cast<int>(blockIdx.x);
  if (block >= work.blocks) return;
  const int lift = bounded ? find_lift<THREADS>(p) : 0;
  // What is needed between tiles only stays in shared memory.
  PK_SHARED(int64_t, next);
  PK_SHARED(int64_t, last);
  PK_SHARED(TileWork, tile);
  PK_SHARED(Rows, rows);
  if (threadIdx.x == 0) next = work.begin_of(block), last = work.begin_of(block + 1);
  __syncthreads();
  while (next < last) {
    const TileWork found = work.find<THREADS>(p.groups, local.tiles, next, last);
    __syncthreads();
    if (threadIdx.x == 0) {
      next += found.count, tile = found;
      rows = {found.first_row, min(found.first_row + ROWS, local.tiles.limit(p.groups, found.group)), p.groups[found.group]};
    }
    __syncthreads();
    const bool whole = tile.whole();
    const auto part = [&](int64_t place) { return local.partial + place * ROWS * S::CHANNELS; };
    float* const gradient = p.gradient + static_cast<int64_t>(rows.first) * p.Cp;
    // A part of the tile that the block goes on with comes first, that of the one it begins second (Sharers::place).
    float* const target = whole ? gradient : part(2 * static_cast<int64_t>(block) + (tile.first == 0));
    backward_tile<L, bounded>(local, tile, rows, lift, shared, own_ranges, target, whole ? p.Cp : S::CHANNELS);
    if (whole) continue;
    const Sharers sharers(work, tile);
    if (!arrives_last(local.tile_arrivals + sharers.first, sharers.count())) continue;
    constexpr int EACH = ROWS * FOURS / THREADS;
    float4 sums[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) sums[k] = make_float4(0, 0, 0, 0);
#pragma unroll 2
    for (int b = sharers.first; b <= sharers.last; ++b)
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(part(sharers.place(b))) + k * THREADS + threadIdx.x);
        sums[k].x += v.x, sums[k].y += v.y, sums[k].z += v.z, sums[k].w += v.w;
      }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
      const int i = k * THREADS + static_cast<int>(threadIdx.x), row = i / FOURS, channel = i % FOURS * 4;
      if (rows.first + row < rows.end && channel < p.Cp) pk::store_vector(gradient + row * p.Cp + channel, sums[k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------- kernels

template <Format F>
using Narrow = Local<Shape<F, 16, 2, IS_HALF<F> ? 1 : 2>, IS_HALF<F> ? 4 : 1>;
template <Format F>
using Middle = Local<Shape<F, 64, 2, 2>, 1>;
// Of a multiprocessor, as registers allow.
template <Format F>
constexpr int NARROW_BLOCKS = IS_HALF<F> ? 4 : 3;
template <Format F>
constexpr int MIDDLE_BLOCKS = F == Format::half ? 3 : 2;

// What is needed between tiles only spills.
// resources: spills at most 112 bytes (sm_80; 92 on sm_90)
// resources: dynamic shared 32768 bytes
template <Format F>
__global__ void __launch_bounds__(THREADS, NARROW_BLOCKS<F>) narrow_backward_kernel(const LocalBackward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_blocks<Narrow<F>, IS_HALF<F>>(p, shared);
}
// resources: spills at most 80 bytes (sm_80; 12 on sm_90)
// resources: dynamic shared 52224 bytes
template <Format F>
__global__ void __launch_bounds__(THREADS, MIDDLE_BLOCKS<F>) middle_backward_kernel(const LocalBackward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_blocks<Middle<F>, IS_HALF<F>>(p, shared);
}

// The launch before: factors; zeros to count in; the first block finds out where the groups' units begin.
__global__ void __launch_bounds__(FACTOR_THREADS)
    prepare_backward_kernel(const FactorsInput in, const FactorsOutput out, const BackwardTiles tiles, const ContrastiveGroup* groups,
                            int64_t* starts, unsigned* arrivals, int arrivals_count) {
  pk::let_next_begin();
  pk::wait_for_previous();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < arrivals_count; i += FACTOR_THREADS) arrivals[i] = 0;
    write_unit_starts<FACTOR_THREADS>(groups, tiles.G, tiles, starts);
  } else {
    write_factors(in, out, static_cast<int>(blockIdx.x) - 1);
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

struct Choice {
  int columns, blocks, channels;  // of a stage, of a multiprocessor, of a tile
  std::size_t shared_bytes;
  void (*kernel)(LocalBackward);
};

template <Format F>
Choice choose(bool narrow) {
  constexpr int factor_words = IS_HALF<F> ? 4 : 6;
  if (narrow)
    return {Narrow<F>::COLUMNS, NARROW_BLOCKS<F>, 16, Narrow<F>::shared_bytes(factor_words, ROWS * 16), narrow_backward_kernel<F>};
  return {Middle<F>::COLUMNS, MIDDLE_BLOCKS<F>, 64, Middle<F>::shared_bytes(factor_words, ROWS * 64), middle_backward_kernel<F>};
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

int64_t blocks_of(int64_t count) { return (count + FACTOR_THREADS - 1) / FACTOR_THREADS; }

struct Arrangement {
  Format format;
  Choice choice;
  int64_t blocks, largest_of_rows, largest_of_columns;
  FactorsOutput of_rows, of_columns;
  unsigned* arrivals;  // [blocks]
  int64_t* starts;
  float* partial;
  Side rows, columns;
  int64_t bytes;

  Arrangement(const ContrastiveBackward& p, void* workspace)
      : format(format_of(p.precision, p.bounded)), choice(choose(format, contrastive_width(p.Cp) == ContrastiveWidth::narrow)) {
    blocks = local_blocks(p.R, p.M, p.G, ROWS, choice.columns, choice.blocks);
    Pieces pieces(workspace);
    arrivals = pieces.take<unsigned>(blocks), starts = pieces.take<int64_t>(p.G + 1);
    partial = pieces.take<float>(2 * blocks * ROWS * choice.channels);
    largest_of_rows = blocks_of(p.R + PADDING), largest_of_columns = p.one_set ? 0 : blocks_of(p.M + PADDING);
    of_rows.largest = pieces.take<float>(largest_of_rows + largest_of_columns), of_columns.largest = of_rows.largest + largest_of_rows;
    of_rows.weight = pieces.take<float4>(p.R + PADDING), of_rows.level = pieces.take<float2>(p.bounded ? 0 : p.R + PADDING);
    of_columns.weight = pieces.take<float4>(p.one_set ? 0 : p.M + PADDING);
    of_columns.level = pieces.take<float2>(p.one_set || p.bounded ? 0 : p.M + PADDING);
    const Halves halves(p, pieces);
    rows = halves.rows, columns = halves.columns, bytes = pieces.bytes();
    of_rows.halves = const_cast<unsigned*>(rows.vectors), of_columns.halves = const_cast<unsigned*>(columns.vectors);
  }
};

}  // namespace

namespace protokernels {

int64_t contrastive_local_backward_workspace(const ContrastiveBackward& p) { return Arrangement(p, nullptr).bytes; }

int launch_contrastive_local_backward(const ContrastiveBackward& p, void* workspace, void* stream) {
  if (p.G == 0) return pk::memset_async(p.grad_rows, 0, sizeof(float) * static_cast<std::size_t>(p.R * p.Cp), stream);
  const Arrangement memory(p, workspace);
  LocalBackward launch{};
  Backward& problem = launch.problem;
  problem.R = static_cast<int>(p.R), problem.G = static_cast<int>(p.G), problem.Cp = static_cast<int>(p.Cp);
  problem.rows = memory.rows, problem.columns = memory.columns, problem.groups = p.groups, problem.ranges = p.ranges;
  problem.inverse_temperature = static_cast<float>(1.0 / p.temperature),
  problem.scale = static_cast<float>(1.4426950408889634 / p.temperature);
  problem.rows_have_losses = p.row_statistics != nullptr, problem.columns_have_losses = p.column_statistics != nullptr;
  problem.of_rows = {memory.of_rows.weight, memory.of_rows.level};
  problem.of_columns = p.one_set ? problem.of_rows : Factors{memory.of_columns.weight, memory.of_columns.level};
  problem.largest = memory.of_rows.largest, problem.largest_count = static_cast<int>(memory.largest_of_rows + memory.largest_of_columns);
  problem.gradient = static_cast<float*>(p.grad_rows);
  launch.tiles = {ROWS, memory.choice.columns, problem.G, problem.R, problem.rows_have_losses, problem.columns_have_losses};
  launch.starts = memory.starts, launch.partial = memory.partial, launch.tile_arrivals = memory.arrivals;

  const auto input = [&](int64_t count, const void* statistics, const void* coefficients, const void* vectors, const Side& side) {
    return FactorsInput{count,
                        p.bounded,
                        static_cast<const float*>(statistics),
                        static_cast<const float*>(coefficients),
                        is_half(memory.format) && static_cast<const void*>(side.vectors) != vectors ? count * p.Cp / 4 : 0,
                        static_cast<const float4*>(vectors),
                        memory.format == Format::halves,
                        0};
  };
  const auto blocks = [](const FactorsInput& in) {
    return static_cast<unsigned>(blocks_of(in.fours > in.count + PADDING ? in.fours : in.count + PADDING));
  };
  int status = 0;
  if (!p.one_set) {
    const FactorsInput in = input(p.M, p.column_statistics, p.column_coefficients, p.columns, memory.columns);
    status = PK_LAUNCH(factors_kernel, dim3(blocks(in)), dim3(FACTOR_THREADS), 0, stream, in, memory.of_columns);
  }
  if (status != 0) return status;
  const FactorsInput in = input(p.R, p.row_statistics, p.row_coefficients, p.rows, memory.rows);
  status = PK_LAUNCH_BEHIND(prepare_backward_kernel, dim3(blocks(in) + 1), dim3(FACTOR_THREADS), 0, stream, in, memory.of_rows,
                            launch.tiles, p.groups, memory.starts, memory.arrivals, static_cast<int>(memory.blocks));
  if (status != 0) return status;
  return PK_LAUNCH_BEHIND(memory.choice.kernel, dim3(static_cast<unsigned>(memory.blocks)), dim3(THREADS), memory.choice.shared_bytes,
                          stream, launch);
}

}  // namespace protokernels
