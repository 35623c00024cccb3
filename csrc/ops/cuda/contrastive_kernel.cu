// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU, forward, from 65 channels on (contrastive_local_forward.cu is about fewer). The equations stand in
// ops/contrastive.h, the products in contrastive_tile.cuh.
//
// forward_block: a block has 128 rows of a group and walks over the group's columns, or a share of them. Scores stay in registers as they
// come from the tensor cores; a thread adds up powers of two for its part of four rows, and the threads of a row meet once, at the end. Rows and
// columns are in order of their classes, so that a fragment of 8 columns nearly always is of one kind for all rows of a warp: 4 instructions an
// entry. Unit vectors need no maximum and no shift. Blocks without anchors write zeros and leave. The last share of a tile to arrive adds up all
// of them in their order, the last tile the total: no atomics on floats, the same bits every time.
//
// Measured on an H200, precision highest (high) / what counting allows (products at 60 % of the tensor cores' speed, 16 ex2 a clock):
//   N = 8192, D = 128: 201 us / 90 (103 / 36): 4 warps of a scheduler hide half of their latencies. Now by contrastive_hopper.cuh

#include "common/simt.cuh"
#include "ops/cuda/contrastive_halves.cuh"
#include "ops/cuda/contrastive_hopper_forward.cuh"

namespace {

template <class S, bool bounded>
__device__ __forceinline__ void forward_block(const Forward& p, unsigned* shared) {
  using Sums = RowSums<bounded>;
  constexpr int PARTS = Sums::PARTS;
  const Portion portion = find_portion<S::THREADS>(p, S::ROWS, S::COLUMNS);
  if (portion.share >= portion.used) return;
  const Rows& rows = portion.rows;
  const int anchors_begin = portion.anchors_begin, anchors_end = portion.anchors_end, begin = portion.begin, end = portion.end;

  const int row0 = rows.first + S::warp_row(), lane = threadIdx.x % 32;
  const bool takes_part = row0 + lane >= anchors_begin && row0 + lane < anchors_end;
  const bool works = __any_sync(ALL, takes_part);
  WarpClasses classes;
  classes.find(p.ranges, row0 + lane, takes_part);
  Sums sums[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i / 2][i % 2] = Sums();  // nvcc 13.0 constructs sums[0] alone
  walk_columns<S>(
      p.rows, rows, p.columns, begin, end, -1, p.stages, shared, [](int, int) {},
      [&](int column0) { return works && column0 + S::warp_column() < end; },
      [&](const Scores<S>& scores, int, int column0) {
        unsigned others, same;
        classes.kinds<S::FRAGMENTS>(column0 + S::warp_column(), end, others, same);
        add_entries<S>(sums, scores, p.scale, others, same, p.ranges, row0, p.R - 1, column0 + S::warp_column(), end);
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
  const int at = threadIdx.x;
  Sums total;
  if (at < S::ROWS && rows.first + at < rows.end) {
    total.merge(gathered[at][0]);
    total.merge(gathered[at][1]);
  }
  finish<S::THREADS, S::ROWS, bounded>(p, portion, total);
}

constexpr int HALVES_THREADS = 256;

// `fours` times four channels; and zeros to count in, which spares a launch.
__global__ void __launch_bounds__(HALVES_THREADS)
    halves_kernel(int64_t fours, const float4* vectors, bool two, int apart, unsigned* halves, unsigned* zeros, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * HALVES_THREADS + threadIdx.x;
  if (i < count) zeros[i] = 0;
  if (i < fours) write_halves(halves, two, apart, i, vectors[i]);
}

template <Format F>
using Wide = Shape<F, 128, 4, IS_HALF<F> ? 2 : 4, F == Format::halves ? 1 : 2>;
template <Format F, int pairs>
using Sliced = Shape<F, 128, 4, pairs, 1, true>;
constexpr int LEAST_PAIRS = 2;
template <Format F>
constexpr int MOST_PAIRS = IS_HALF<F> || F == Format::exact ? LEAST_PAIRS : 4;
// Of 128 threads on a multiprocessor, as registers allow: measured on sm_90; other assemblers need a few registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <Format F>
constexpr int BLOCKS = IS_HALF<F> ? 3 : 2;
#else
template <Format F>
constexpr int BLOCKS = IS_HALF<F> ? 4 : 2;
#endif

// With the second stage of floats, where it fits, 196608 bytes.
// resources: dynamic shared 131072 bytes
template <Format F>
__global__ void __launch_bounds__(256, BLOCKS<F> / 2) wide_forward_kernel(const Forward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  forward_block<Wide<F>, IS_HALF<F>>(p, shared);
}
// resources: dynamic shared 131072 bytes
template <Format F, int pairs>
__global__ void __launch_bounds__(256, BLOCKS<F> / 2) sliced_forward_kernel(const Forward p) {
  PK_DYNAMIC_SHARED(unsigned, shared);
  forward_block<Sliced<F, pairs>, IS_HALF<F>>(p, shared);
}

// ------------------------------------------------------------------------------------------------------------------------ launch

constexpr std::size_t SHARED_BESIDE = 1024;  // of a block, beside rows and columns

// Fewer stages than the shape has where they do not fit.
template <class S, class Kernel>
int launch_shape(Kernel kernel, Forward& p, int64_t blocks, void* stream) {
  const auto bytes = [](int stages) { return sizeof(unsigned) * static_cast<std::size_t>(S::shared_words(stages, 0)); };
  p.stages = S::STAGES > 1 && bytes(S::STAGES) > pk::shared_memory_limit() ? 1 : S::STAGES;
  return PK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::THREADS), bytes(p.stages), stream, p);
}

template <class S>
bool fits() {
  return sizeof(unsigned) * static_cast<std::size_t>(S::shared_words(1, 0)) + SHARED_BESIDE <= pk::shared_memory_limit();
}

// Where a block has 99 KB (compute capability 8.6, 8.9, 12.0) raw vectors meet fewer columns at a time, in slices or in one.
// The format stays, since backward has to make the scores again that the statistics are of.
template <Format F>
int launch_format(ContrastiveWidth width, Forward& p, int64_t blocks, void* stream) {
  if (width == ContrastiveWidth::wide && fits<Wide<F>>()) return launch_shape<Wide<F>>(wide_forward_kernel<F>, p, blocks, stream);
  constexpr int most = MOST_PAIRS<F>;
  if (fits<Sliced<F, most>>()) return launch_shape<Sliced<F, most>>(sliced_forward_kernel<F, most>, p, blocks, stream);
  return launch_shape<Sliced<F, LEAST_PAIRS>>(sliced_forward_kernel<F, LEAST_PAIRS>, p, blocks, stream);
}

// Writes both sides, where they are in a workspace, and so many zeros.
int launch_halves(const ContrastiveForward& p, const Side& rows, const Side& columns, unsigned* zeros, int64_t count, void* stream) {
  const Format format = format_of(p.precision, p.bounded);
  const auto write = [&](const void* vectors, const Side& side, int64_t number, int64_t zero_count) {
    const int64_t fours = is_half(format) ? number * p.Cp / 4 : 0, threads = fours > zero_count ? fours : zero_count;
    if (threads == 0) return 0;
    return PK_LAUNCH(halves_kernel, dim3(static_cast<unsigned>((threads + HALVES_THREADS - 1) / HALVES_THREADS)), dim3(HALVES_THREADS), 0,
                     stream, fours, static_cast<const float4*>(vectors), format == Format::halves,
                     on_hopper(p) ? static_cast<int>(p.Cp) : 0, const_cast<unsigned*>(side.vectors), zeros, zero_count);
  };
  const int status = write(p.rows, rows, p.R, count);
  return status == 0 && columns.vectors != rows.vectors ? write(p.columns, columns, p.M, 0) : status;
}

ContrastiveGrid grid_of(const ContrastiveForward& p) {
  return on_hopper(p) ? contrastive_hopper_grid(p.R, p.M, p.G, p.precision == Precision::highest)
                      : contrastive_forward_grid(p.R, p.M, p.G, p.Cp);
}

// The workspace; without one its size.
int64_t arrange(const ContrastiveForward& p, void* workspace, Forward& out) {
  const ContrastiveGrid grid = grid_of(p);
  const int64_t rows =
                    on_hopper(p) ? contrastive_hopper_rows(p.precision == Precision::highest) : contrastive_rows(contrastive_width(p.Cp)),
                parts = p.bounded ? RowSums<true>::PARTS : RowSums<false>::PARTS;
  Pieces pieces(workspace);
  unsigned* const arrivals = pieces.take<unsigned>(1 + grid.tiles);
  out.results.arrivals = arrivals;
  out.tile_arrivals = arrivals ? arrivals + 1 : nullptr;
  out.results.tile_totals = pieces.take<double>(grid.tiles);
  out.partial = pieces.take<float>(grid.shares > 1 ? grid.tiles * grid.shares * rows * parts : 0);
  const Halves halves(p, pieces);
  out.rows = halves.rows, out.columns = halves.columns;
  return pieces.bytes();
}

}  // namespace

namespace protokernels {

int64_t contrastive_forward_workspace(const ContrastiveForward& p) {
  if (p.double_compute) return contrastive_double_forward_workspace(p);
  if (contrastive_width(p.Cp) < ContrastiveWidth::wide) return contrastive_local_forward_workspace(p);
  Forward ignored;
  return arrange(p, nullptr, ignored);
}

int launch_contrastive_forward(const ContrastiveForward& p, void* workspace, void* stream) {
  if (p.R == 0) return p.weights ? pk::memset_async(p.total, 0, p.double_compute ? sizeof(double) : sizeof(float), stream) : 0;
  if (p.double_compute) return launch_contrastive_double_forward(p, workspace, stream);
  if (contrastive_width(p.Cp) < ContrastiveWidth::wide) return launch_contrastive_local_forward(p, workspace, stream);
  const ContrastiveGrid grid = grid_of(p);
  Forward launch;
  arrange(p, workspace, launch);
  launch.R = static_cast<int>(p.R), launch.G = static_cast<int>(p.G), launch.shares = static_cast<int>(grid.shares);
  launch.groups = p.groups, launch.ranges = p.ranges;
  launch.inverse_temperature = static_cast<float>(1.0 / p.temperature),
  launch.scale = static_cast<float>(1.4426950408889634 / p.temperature);
  Results<float>& results = launch.results;
  results.R = launch.R, results.G = launch.G, results.tiles = static_cast<int>(grid.tiles), results.form = p.form;
  results.groups = p.groups, results.ranges = p.ranges, results.weights = p.weights;
  results.losses = static_cast<float*>(p.losses), results.statistics = static_cast<float*>(p.statistics);
  results.total = static_cast<float*>(p.total);
  const int status = launch_halves(p, launch.rows, launch.columns, results.arrivals, 1 + grid.tiles, stream);
  if (status != 0) return status;
  if (on_hopper(p)) return launch_hopper(p.precision == Precision::highest, launch, grid.blocks(), stream);
  const ContrastiveWidth width = contrastive_width(p.Cp);
  switch (format_of(p.precision, p.bounded)) {
    case Format::halves: return launch_format<Format::halves>(width, launch, grid.blocks(), stream);
    case Format::half: return launch_format<Format::half>(width, launch, grid.blocks(), stream);
    case Format::exact: return launch_format<Format::exact>(width, launch, grid.blocks(), stream);
    case Format::tf32: return launch_format<Format::tf32>(width, launch, grid.blocks(), stream);
    default: return launch_format<Format::bf16>(width, launch, grid.blocks(), stream);
  }
}

}  // namespace protokernels
