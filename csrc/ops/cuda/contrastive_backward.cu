// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU, backward, from 65 channels on (contrastive_local_backward.cu is about fewer): the gradient of rows from the
// derivatives by statistics. The equations stand in ops/contrastive.h.
//
// What a vector brings to its pairs is worked out first (contrastive_factors.cuh).
// backward_block: like attention without a softmax. A block has 128 rows and walks over columns; scores become H in their registers, one
// exponential for both roles of a pair, and H is at once the left factor of H F: the gradient of the rows stays in registers to the end. Rows with
// losses meet all columns of their group, the others its anchors only. No block adds to another's rows; where columns are cut into shares,
// combine_kernel adds up the shares in their order. Vectors beyond 128 channels are done in slices, each with scores of its own.
//
// Measured on an H200, precision highest (high) / what counting allows, as in contrastive_kernel.cu:
//   N = 8192, D = 128: 471 us / 180 (204 / 60): one block of 8 warps is all that registers allow, and they issue in a third of all cycles.
//     Now by contrastive_hopper.cuh

#include "common/simt.cuh"
#include "ops/cuda/contrastive_hopper_backward.cuh"
#include "ops/cuda/contrastive_weigh.cuh"

namespace {

template <class S, bool bounded>
__device__ __forceinline__ void backward_block(const Backward& p, unsigned* shared) {
  const Portion portion = find_portion<S::THREADS>(p, S::ROWS, S::COLUMNS);
  const Rows& rows = portion.rows;
  if (rows.first >= rows.end) return;
  const int slice = portion.slice, begin = portion.begin, end = portion.end;
  const int row0 = rows.first + S::warp_row(), lane = threadIdx.x % 32;

  PK_SHARED(WarpRows, of_warps, S::THREADS / 32);
  WarpRows& of_warp = of_warps[threadIdx.x / 32];
  WarpClasses classes;
  classes.find(p.ranges, row0 + lane, rows.in_group(row0 + lane));
  const unsigned present = __ballot_sync(ALL, row0 + lane < rows.end), takes_part = __ballot_sync(ALL, rows.in_group(row0 + lane));
  const int lift = bounded ? find_lift<S::THREADS>(p) : 0;
  if (lane == 0) of_warp = {classes, present, takes_part, min(end, columns_end(p, rows, row0, row0 + 32))};
  __syncwarp();
  float4* const weight = reinterpret_cast<float4*>(shared + S::ROW_WORDS + S::STAGES * S::STAGE_WORDS);  // [STAGES, COLUMNS]
  float2* const level = reinterpret_cast<float2*>(weight + S::STAGES * S::COLUMNS);                      // [STAGES, COLUMNS]
  Own<S> own;
  own.keep(p, row0);
  const auto load_factors = [&](int stage, int column0) {
    const int at = threadIdx.x, j = column0 + at;
    if (at >= S::COLUMNS) return;
    pk::copy_async_16(weight + stage * S::COLUMNS + at, p.of_columns.weight + (j < end ? j : 0), j < end);
    if (!bounded) pk::copy_async_8(level + stage * S::COLUMNS + at, p.of_columns.level + (j < end ? j : 0), j < end);
  };
  Gradient<S> gradient = {};
  walk_columns<S>(
      p.rows, rows, p.columns, begin, end, slice, S::STAGES, shared, load_factors,
      [&](int column0) { return column0 + S::warp_column() < of_warp.end; },
      [&](Scores<S>& scores, int stage, int column0) {
        const int at = stage * S::COLUMNS + S::warp_column();
        unsigned others, same;
        of_warp.classes.template kinds<S::FRAGMENTS>(column0 + S::warp_column(), end, others, same);
        Weigh<S, bounded>::run(scores, p, others, same, weight + at, level + at, own, lift, row0, column0 + S::warp_column(), end, p.ranges,
                               row0, p.R - 1);
        const unsigned* const y = shared + S::ROW_WORDS + stage * S::STAGE_WORDS + S::warp_column() * S::WORDS;
        add_gradient<S>(gradient, scores, y, p.Cp - slice * S::CHANNELS);
      });
  float* const target = p.gradient + (static_cast<int64_t>(portion.share) * p.R + row0) * p.Cp + slice * S::CHANNELS;
  write_gradient<S>(gradient, target, p.Cp, p.Cp - slice * S::CHANNELS, of_warp, p.inverse_temperature * power_of_two(-lift),
                    reinterpret_cast<float*>(shared));
}

template <Format F>
using Wide = Shape<F, 128, 4, F == Format::half || F == Format::bf16 ? 2 : 1>;
template <Format F>
using Sliced = Shape<F, 128, 4, F == Format::half ? 2 : 1, 2, true>;

// resources: dynamic shared 134144 bytes
template <Format F>
__global__ void __launch_bounds__(256, 1) wide_backward_kernel(const Backward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_block<Wide<F>, IS_HALF<F>>(p, shared);
}

// With all 255 registers; none on sm_90.
// resources: spills at most 44 bytes (sm_80, sm_100)
// resources: dynamic shared 134144 bytes
template <Format F>
__global__ void __launch_bounds__(256, 1) sliced_backward_kernel(const Backward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_block<Sliced<F>, IS_HALF<F>>(p, shared);
}

__global__ void __launch_bounds__(FACTOR_THREADS) combine_kernel(int64_t vectors, int shares, const float4* partial, float4* gradient) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * FACTOR_THREADS + threadIdx.x;
  if (i >= vectors) return;
  float4 sum = partial[i];
  for (int s = 1; s < shares; ++s) {
    const float4 part = partial[s * vectors + i];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  gradient[i] = sum;
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class S>
std::size_t bytes_of() {
  return sizeof(unsigned) * static_cast<std::size_t>(S::shared_words(S::STAGES, S::STAGES * S::COLUMNS * 6));
}

template <class S, class Kernel>
int launch_shape(Kernel kernel, const Backward& p, int64_t blocks, void* stream) {
  return PK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::THREADS), bytes_of<S>(), stream, p);
}

// One slice is as good where the wide shape does not fit: of bf16, on compute capability 8.6, 8.9 and 12.0.
template <Format F>
int launch_format(ContrastiveWidth width, const Backward& p, int64_t blocks, void* stream) {
  constexpr std::size_t beside = 1024;
  if (width == ContrastiveWidth::wide && bytes_of<Wide<F>>() + beside <= pk::shared_memory_limit())
    return launch_shape<Wide<F>>(wide_backward_kernel<F>, p, blocks, stream);
  return launch_shape<Sliced<F>>(sliced_backward_kernel<F>, p, blocks, stream);
}

int64_t blocks_of(int64_t count) { return (count + FACTOR_THREADS - 1) / FACTOR_THREADS; }
dim3 blocks_for(int64_t count) { return dim3(static_cast<unsigned>(blocks_of(count))); }

ContrastiveGrid grid_of(const ContrastiveBackward& p) {
  return on_hopper(p) ? contrastive_hopper_grid(p.R, p.M, p.G, p.precision == Precision::highest)
                      : contrastive_backward_grid(p.R, p.M, p.G, p.Cp);
}

// What lies in the workspace; without one its size.
struct Arrangement {
  float4 *row_weight, *column_weight;
  float2 *row_level, *column_level;
  float *partial, *largest;
  int64_t largest_of_rows, largest_of_columns;
  Side rows, columns;
  int64_t bytes;

  Arrangement(const ContrastiveBackward& p, const ContrastiveGrid& grid, void* workspace) {
    Pieces pieces(workspace);
    row_weight = pieces.take<float4>(p.R + PADDING), row_level = pieces.take<float2>(p.bounded ? 0 : p.R + PADDING);
    column_weight = pieces.take<float4>(p.M + PADDING), column_level = pieces.take<float2>(p.bounded ? 0 : p.M + PADDING);
    partial = pieces.take<float>(grid.shares > 1 ? grid.shares * p.R * p.Cp : 0);
    largest_of_rows = blocks_of(p.R + PADDING), largest_of_columns = p.one_set ? 0 : blocks_of(p.M + PADDING);
    largest = pieces.take<float>(largest_of_rows + largest_of_columns);
    const Halves halves(p, pieces);
    rows = halves.rows, columns = halves.columns;
    bytes = pieces.bytes();
  }
};

}  // namespace

namespace protokernels {

int64_t contrastive_backward_workspace(const ContrastiveBackward& p) {
  if (p.double_compute) return 0;
  if (contrastive_width(p.Cp) < ContrastiveWidth::wide) return contrastive_local_backward_workspace(p);
  return Arrangement(p, grid_of(p), nullptr).bytes;
}

int launch_contrastive_backward(const ContrastiveBackward& p, void* workspace, void* stream) {
  if (p.R == 0) return 0;
  if (p.double_compute) return launch_contrastive_double_backward(p, stream);
  if (contrastive_width(p.Cp) < ContrastiveWidth::wide) return launch_contrastive_local_backward(p, workspace, stream);
  const ContrastiveGrid grid = grid_of(p);
  const ContrastiveWidth width = contrastive_width(p.Cp);
  const Arrangement memory(p, grid, workspace);
  const bool one_set = p.one_set;
  const Format format = format_of(p.precision, p.bounded);
  const auto factors = [&](int64_t count, const void* statistics, const void* coefficients, const void* vectors, const Side& side,
                           float4* weight, float2* level, float* largest) {
    const FactorsInput in{count,
                          p.bounded,
                          static_cast<const float*>(statistics),
                          static_cast<const float*>(coefficients),
                          is_half(format) && static_cast<const void*>(side.vectors) != vectors ? count * p.Cp / 4 : 0,
                          static_cast<const float4*>(vectors),
                          format == Format::halves,
                          on_hopper(p) ? static_cast<int>(p.Cp) : 0};
    return PK_LAUNCH(factors_kernel, blocks_for(in.fours > count + PADDING ? in.fours : count + PADDING), dim3(FACTOR_THREADS), 0, stream,
                     in, FactorsOutput{weight, level, const_cast<unsigned*>(side.vectors), largest});
  };
  int status = factors(p.R, p.row_statistics, p.row_coefficients, p.rows, memory.rows, memory.row_weight, memory.row_level, memory.largest);
  if (status == 0 && !one_set)
    status = factors(p.M, p.column_statistics, p.column_coefficients, p.columns, memory.columns, memory.column_weight, memory.column_level,
                     memory.largest + memory.largest_of_rows);
  if (status != 0) return status;
  Backward launch;
  launch.R = static_cast<int>(p.R), launch.G = static_cast<int>(p.G);
  launch.shares = static_cast<int>(grid.shares), launch.slices = static_cast<int>(grid.slices);
  launch.rows = memory.rows, launch.columns = memory.columns, launch.Cp = static_cast<int>(p.Cp);
  launch.largest = memory.largest, launch.largest_count = static_cast<int>(memory.largest_of_rows + memory.largest_of_columns);
  launch.groups = p.groups, launch.ranges = p.ranges;
  launch.inverse_temperature = static_cast<float>(1.0 / p.temperature),
  launch.scale = static_cast<float>(1.4426950408889634 / p.temperature);
  launch.rows_have_losses = p.row_statistics != nullptr, launch.columns_have_losses = p.column_statistics != nullptr;
  launch.of_rows = {memory.row_weight, memory.row_level};
  launch.of_columns = one_set ? launch.of_rows : Factors{memory.column_weight, memory.column_level};
  launch.gradient = grid.shares > 1 ? memory.partial : static_cast<float*>(p.grad_rows);
  if (on_hopper(p)) {
    status = launch_hopper(format == Format::halves, launch, grid.blocks(), stream);
  } else
    switch (format) {
      case Format::halves: status = launch_format<Format::halves>(width, launch, grid.blocks(), stream); break;
      case Format::half: status = launch_format<Format::half>(width, launch, grid.blocks(), stream); break;
      case Format::exact: status = launch_format<Format::exact>(width, launch, grid.blocks(), stream); break;
      case Format::tf32: status = launch_format<Format::tf32>(width, launch, grid.blocks(), stream); break;
      default: status = launch_format<Format::bf16>(width, launch, grid.blocks(), stream);
    }
  if (status != 0 || grid.shares == 1) return status;
  const int64_t vectors = p.R * p.Cp / 4;
  return PK_LAUNCH(combine_kernel, blocks_for(vectors), dim3(FACTOR_THREADS), 0, stream, vectors, launch.shares,
                   reinterpret_cast<const float4*>(memory.partial), static_cast<float4*>(p.grad_rows));
}

}  // namespace protokernels
