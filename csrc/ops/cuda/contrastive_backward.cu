// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU, backward: the gradient of rows from the derivatives by statistics. The equations stand in ops/contrastive.h.
//
// What a vector brings to its pairs is worked out first (contrastive_factors.cuh).
// backward_block: like attention without a softmax. A block has 64 or 128 rows and walks over columns; scores become H in their registers, one
// exponential for both roles of a pair, and H is at once the left factor of H F: the gradient of the rows stays in registers to the end. Rows with
// losses meet all columns of their group, the others its anchors only. No block adds to another's rows; where columns are cut into shares,
// combine_kernel adds up the shares in their order. Vectors beyond 128 channels are done in slices, each with scores of its own.
//
// Measured on an H200, precision highest (high) / what counting allows, as in contrastive_kernel.cu:
//   100 groups of 1024 rows, 17 % anchors, C = 16: 80 us / 20
//   N = 8192, D = 128: 471 us / 180 (204 / 60): one block of 8 warps is all that registers allow, and they issue in a third of all cycles.
//     Now by contrastive_hopper.cuh
//   one group of 102,400, 17 % anchors, C = 16: 3.4 ms / 1.3

#include "common/simt.cuh"
#include "ops/cuda/contrastive_hopper_backward.cuh"

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
// layout of Scores.
template <class S, bool bounded>
struct Weigh;

template <class S>
struct Weigh<S, true> {
  static __device__ __forceinline__ void run(Scores<S>& scores, const Backward& p, const WarpClasses& classes, const float4* weight,
                                             const float2*, const Own<S>& kept, int lift, int row0, int column0, int end) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const float lifted = static_cast<float>(lift), factor = power_of_two(lift);
    unsigned others, same;
    classes.kinds<S::FRAGMENTS>(column0, end, others, same);
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
          for (int i = 0; i < 4; ++i) {
            const ContrastiveRange range = range_at(p.ranges, min(row + 8 * (i / 2), p.R - 1));
            const int j = column0 + 8 * f + 2 * member + i % 2;
            const float h = in_class(range, j) ? as_same(power(i), i) : as_other(power(i), i);
            scores[t][f][i] = j < end && j != range.self ? h : 0.0f;
          }
        }
      }
    }
  }
};

template <class S>
struct Weigh<S, false> {
  static __device__ __forceinline__ void run(Scores<S>& scores, const Backward& p, const WarpClasses& classes, const float4* weight,
                                             const float2* level, const Own<S>&, int, int row0, int column0, int end) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    unsigned others, same;
    classes.kinds<S::FRAGMENTS>(column0, end, others, same);
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
          if (!pure) range = range_at(p.ranges, min(row, p.R - 1));
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
        Weigh<S, bounded>::run(scores, p, of_warp.classes, weight + at, level + at, own, lift, row0, column0 + S::warp_column(), end);
        const unsigned* const y = shared + S::ROW_WORDS + stage * S::STAGE_WORDS + S::warp_column() * S::WORDS;
        add_gradient<S>(gradient, scores, y, p.Cp - slice * S::CHANNELS);
      });
  float* const target = p.gradient + (static_cast<int64_t>(portion.share) * p.R + row0) * p.Cp + slice * S::CHANNELS;
  write_gradient<S>(gradient, target, p.Cp, p.Cp - slice * S::CHANNELS, of_warp, p.inverse_temperature * power_of_two(-lift),
                    reinterpret_cast<float*>(shared));
}

template <Format F>
using Narrow = Shape<F, 16, 2, 2>;
template <Format F>
using Middle = Shape<F, 64, 2, 2>;
template <Format F>
using Wide = Shape<F, 128, 4, F == Format::half || F == Format::bf16 ? 2 : 1>;
template <Format F>
using Sliced = Shape<F, 128, 4, F == Format::half ? 2 : 1, 2, true>;
template <Format F>
constexpr int NARROW_BLOCKS = IS_HALF<F> ? 4 : 3;  // of a multiprocessor, as registers allow
template <Format F>
constexpr int MIDDLE_BLOCKS = F == Format::half ? 3 : 2;

// None on sm_90, where the bounds were measured.
// resources: spills at most 12 bytes
// resources: dynamic shared 15360 bytes
template <Format F>
__global__ void __launch_bounds__(128, NARROW_BLOCKS<F>) narrow_backward_kernel(const Backward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_block<Narrow<F>, IS_HALF<F>>(p, shared);
}
// resources: spills at most 8 bytes (sm_80)
// resources: dynamic shared 52224 bytes
template <Format F>
__global__ void __launch_bounds__(128, MIDDLE_BLOCKS<F>) middle_backward_kernel(const Backward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_block<Middle<F>, IS_HALF<F>>(p, shared);
}
// resources: dynamic shared 134144 bytes
template <Format F>
__global__ void __launch_bounds__(256, 1) wide_backward_kernel(const Backward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  backward_block<Wide<F>, IS_HALF<F>>(p, shared);
}

// With all 255 registers; none on sm_90.
// resources: spills at most 40 bytes (sm_80, sm_100)
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

template <class S, class Kernel>
int launch_shape(Kernel kernel, const Backward& p, int64_t blocks, void* stream) {
  const std::size_t bytes = sizeof(unsigned) * static_cast<std::size_t>(S::shared_words(S::STAGES, S::STAGES * S::COLUMNS * 6));
  return PK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::THREADS), bytes, stream, p);
}

template <Format F>
int launch_format(ContrastiveWidth width, const Backward& p, int64_t blocks, void* stream) {
  switch (width) {
    case ContrastiveWidth::narrow: return launch_shape<Narrow<F>>(narrow_backward_kernel<F>, p, blocks, stream);
    case ContrastiveWidth::middle: return launch_shape<Middle<F>>(middle_backward_kernel<F>, p, blocks, stream);
    case ContrastiveWidth::wide: return launch_shape<Wide<F>>(wide_backward_kernel<F>, p, blocks, stream);
    default: return launch_shape<Sliced<F>>(sliced_backward_kernel<F>, p, blocks, stream);
  }
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
    bytes = pieces.used();
  }
};

}  // namespace

namespace protokernels {

int64_t contrastive_backward_workspace(const ContrastiveBackward& p) {
  return p.double_compute ? 0 : Arrangement(p, grid_of(p), nullptr).bytes;
}

int launch_contrastive_backward(const ContrastiveBackward& p, void* workspace, void* stream) {
  if (p.R == 0) return 0;
  if (p.double_compute) return launch_contrastive_double_backward(p, stream);
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
                     in, weight, level, const_cast<unsigned*>(side.vectors), largest);
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
