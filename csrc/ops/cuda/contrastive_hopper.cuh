// SPDX-License-Identifier: MIT
// The matrix unit of compute capability 9.0 (sm_90a) as the wide kernels of contrastive use it: two or three warpgroups of 64 rows each multiply, one
// more warpgroup brings the columns, 64 or 128 at a time, and barriers in shared memory pass them on.
//
// A tile of vectors lies in shared memory as two panels of 64 channels, [vectors, 64] 16-bit floats each. The 16-byte chunk c of vector v is at chunk
// c ^ v % 8 of its 128 bytes ("128-byte swizzle"); a tile begins at a multiple of 1024 bytes. Both products read that one layout:
//
//   S = X Y^T    k are channels: 16 of them are 32 bytes, groups of 8 vectors 1024 bytes apart
//   D += H Y     k are vectors, n channels, panels a panel apart; H comes from registers, where the scores of X Y^T were: of the accumulator
//                of two fragments of 8 columns become the four registers of a step of 16 k
//
// The accumulator: entry [4 f + 2 r + e] of thread (warp, group, member) is row 16 warp + 8 r + group, column 8 f + 2 member + e.
//
// A block is alone on its multiprocessor. A step of 192 x 128 scores costs the matrix unit 1536 cycles forward and 3072 backward with one part; with
// two parts 128 x 64 cost as much. Measured on an H200, forward and backward in one graph, before / now, of which about 50 us are other kernels:
//   N = 8192, D = 128: high or medium 352 us / 177 (forward 103 / 55, backward 204 / 74), highest 717 / 306 (201 / 95, 471 / 162)
//   N = 32768: medium 4040 us / 1600; N = 2048: highest 99 us / 66
// Forward is at about half of what the matrix unit and ex2 allow: shared memory is read 144 KB a step, 1152 of its cycles, as rows come from there
// too for every step; rows in registers would be the next thing to try.
//
// Elsewhere these kernels are compiled to nothing, and on_hopper says so.
#pragma once

#include "ops/cuda/contrastive_halves.cuh"

#if defined(__CUDACC__)

#include <atomic>

#include "ops/cuda/contrastive_wgmma.cuh"

namespace {
namespace hopper {

constexpr int AHEAD = 2;  // tiles on their way while the next is asked for

// Numbers of one 16-bit float, or of two (Format::halves): then a tile has the panels of high parts before those of low ones, and three of the four
// products are taken.
template <bool two>
struct Plan {
  static constexpr int GROUPS = two ? 2 : 3, THREADS = (GROUPS + 1) * GROUP_THREADS, ROWS = GROUPS * GROUP_ROWS;
  static constexpr int COLUMNS = two ? 64 : 128, FRAGMENTS = COLUMNS / 8, STEPS = COLUMNS / 16, STAGES = 4;
  static constexpr int PARTS = two ? 2 : 1, PANELS = 2 * PARTS;
  static constexpr int ROW_PANEL = GROUP_ROWS * VECTOR_BYTES, COLUMN_PANEL = COLUMNS * VECTOR_BYTES;
  static constexpr int ROW_BYTES = PANELS * ROW_PANEL, STAGE_BYTES = PANELS * COLUMN_PANEL;
  static constexpr int FACTOR_FLOATS = 3 * COLUMNS;  // the three numbers that go with a column, one after the other
  static constexpr int SHARED_BYTES = SWIZZLE_BYTES + GROUPS * ROW_BYTES + STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES_WITH_FACTORS = SHARED_BYTES + STAGES * FACTOR_FLOATS * 4;
  // Of a thread: what all can have, what those that multiply take, and what the others need.
  static constexpr int REGISTERS = two ? 240 : 160, FEW_REGISTERS = two ? 24 : 32;
  static_assert(ROWS == contrastive_hopper_rows(two));
  using Scores = float[COLUMNS / 2];
  using Weights = unsigned[STEPS][PARTS][4];
};

#if defined(PK_HOPPER)

// Warpgroups begin their products in turns, so that one weighs while another multiplies. Without turns N = 8192 takes 2 % longer, and forward at
// N = 32768 4 %; backward there takes 2 % less.
template <class P>
__device__ __forceinline__ void take_turn(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(P::GROUPS + 1 + group), "n"(2 * GROUP_THREADS) : "memory");
}
template <class P>
__device__ __forceinline__ void pass_turn(int group) {
  const int next = group + 1 < P::GROUPS ? group + 1 : 0;
  asm volatile("bar.arrive %0, %1;" ::"r"(P::GROUPS + 1 + next), "n"(2 * GROUP_THREADS) : "memory");
}

// Begins scores = x y over steps [begin, end) of 16 channels of these parts; adds: scores += x y.
template <class P, int begin, int end, bool adds>
__device__ __forceinline__ void begin_scores(typename P::Scores& scores, unsigned x, int row_part, unsigned y, int column_part) {
  x += row_part * (2 * P::ROW_PANEL >> 4), y += column_part * (2 * P::COLUMN_PANEL >> 4);
#pragma unroll
  for (int k = begin; k < end; ++k) {
    const int panel = k / 4, inside = k % 4 * 2;  // in units of 16 bytes, as descriptors count
    const unsigned of_x = x + panel * (P::ROW_PANEL >> 4) + inside, of_y = y + panel * (P::COLUMN_PANEL >> 4) + inside;
    if (k == begin && !adds)
      multiply<false>(scores, of_x, of_y);
    else
      multiply<true>(scores, of_x, of_y);
  }
}

// The scores of a warpgroup, from tiles at these addresses; it has its turn and passes it on. Of two parts the small products come first, and the
// large ones add up in two sums that are joined with a rounded addition: see contrastive_products.cuh.
template <class P>
__device__ __forceinline__ void find_scores(typename P::Scores& scores, int group, unsigned rows, unsigned columns) {
  constexpr int steps = CHANNELS / 16;
  const unsigned x = descriptor(rows, 0), y = descriptor(columns, 0);
  pk::begin_products();
  if constexpr (P::PARTS == 1) {
    begin_scores<P, 0, steps, false>(scores, x, 0, y, 0);
    pk::commit_products();
    pass_turn<P>(group);
    pk::wait_for_products<0>();
    pk::hold(scores);
  } else {
    typename P::Scores rest;
    begin_scores<P, 0, steps, false>(scores, x, 1, y, 0);
    begin_scores<P, 0, steps, true>(scores, x, 0, y, 1);
    begin_scores<P, 0, steps / 2, true>(scores, x, 0, y, 0);
    begin_scores<P, steps / 2, steps, false>(rest, x, 0, y, 0);
    pk::commit_products();
    pass_turn<P>(group);
    pk::wait_for_products<0>();
    pk::hold(scores);
    pk::hold(rest);
#pragma unroll
    for (int i = 0; i < P::COLUMNS / 2; ++i) scores[i] += rest[i];
  }
}

// Begins d += H Y over some of the steps, in 16-bit floats of one part.
template <class P, int begin, int end>
__device__ __forceinline__ void begin_weighted(Accumulator& d, const typename P::Weights& h, unsigned columns) {
  const unsigned y = descriptor(columns, P::COLUMN_PANEL);
  pk::begin_products();
#pragma unroll
  for (int k = begin; k < end; ++k) multiply_weights<true>(d, h[k][0], y + k * (16 * VECTOR_BYTES >> 4));
  pk::commit_products();
}
// The weights stay where they are until then.
template <class P>
__device__ __forceinline__ void wait_for_weighted(Accumulator& d, typename P::Weights& h) {
  pk::wait_for_products<0>();
  pk::hold(d);
#pragma unroll
  for (int k = 0; k < P::STEPS; ++k)
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part)
      asm volatile("" : "+r"(h[k][part][0]), "+r"(h[k][part][1]), "+r"(h[k][part][2]), "+r"(h[k][part][3])::"memory");
}
// d += H Y in two parts: the products add up from 0, the small ones first, and join the sum with a rounded addition.
template <class P>
__device__ __forceinline__ void add_weighted(Accumulator& d, typename P::Weights& h, unsigned columns) {
  const unsigned high = descriptor(columns, P::COLUMN_PANEL);
  const unsigned low = high + (2 * P::COLUMN_PANEL >> 4);
  Accumulator sum;
  pk::begin_products();
  multiply_weights<false>(sum, h[0][1], high);
#pragma unroll
  for (int k = 1; k < P::STEPS; ++k) multiply_weights<true>(sum, h[k][1], high + k * (16 * VECTOR_BYTES >> 4));
#pragma unroll
  for (int k = 0; k < P::STEPS; ++k) multiply_weights<true>(sum, h[k][0], low + k * (16 * VECTOR_BYTES >> 4));
#pragma unroll
  for (int k = 0; k < P::STEPS; ++k) multiply_weights<true>(sum, h[k][0], high + k * (16 * VECTOR_BYTES >> 4));
  pk::commit_products();
  wait_for_weighted<P>(sum, h);
#pragma unroll
  for (int i = 0; i < CHANNELS / 2; ++i) d[i] += sum[i];
}

// ------------------------------------------------------------------------------------------------------------------- classes

// The range of a row, counted from a column on: what a fragment's entries are compared with are constants then.
__device__ __forceinline__ ContrastiveRange range_from(const ContrastiveRange* ranges, int row, int column) {
  const ContrastiveRange range = range_at(ranges, row);
  return {range.class_begin - column, range.class_end - column, range.self >= 0 ? range.self - column : LOWEST};
}

// -------------------------------------------------------------------------------------------------------------------- copies

// Vectors first, first + 1, ... of a side, zeros from `end` on; by GROUP_THREADS threads. Of two parts each has half the words of a vector.
template <int vectors, int parts>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Side& side, int first, int end) {
  const int thread = threadIdx.x % GROUP_THREADS, chunk = thread % 16, v0 = thread / 16;
  const int words = static_cast<int>(side.words), of_part = words / parts;
  unsigned char* to = tile + chunk / 8 * (vectors * VECTOR_BYTES) + v0 * VECTOR_BYTES + ((chunk ^ v0) & 7) * 16;
  const unsigned* from = side.vectors + static_cast<int64_t>(first + v0) * words + 4 * chunk;
  const bool there = 4 * chunk < of_part;
#pragma unroll 4
  for (int v = v0; v < vectors; v += GROUP_THREADS / 16) {
    const bool valid = there && first + v < end;
#pragma unroll
    for (int part = 0; part < parts; ++part)
      pk::copy_async_16(to + part * 2 * vectors * VECTOR_BYTES, valid ? from + part * of_part : side.vectors, valid);
    to += GROUP_THREADS / 16 * VECTOR_BYTES;
    from += GROUP_THREADS / 16 * words;
  }
}

// Shared memory of a block, and the state of its pipeline.
template <class P>
struct Pipeline {
  unsigned char* memory;  // rows, then stages, then factors
  uint64_t *full, *empty;

  __device__ __forceinline__ Pipeline(unsigned char* dynamic, uint64_t* barriers) : full(barriers), empty(barriers + P::STAGES) {
    memory = dynamic + (SWIZZLE_BYTES - pk::shared_address(dynamic) % SWIZZLE_BYTES) % SWIZZLE_BYTES;
    if (threadIdx.x == 0) {
      for (int s = 0; s < P::STAGES; ++s) {
        pk::barrier_start(full + s, GROUP_THREADS);
        pk::barrier_start(empty + s, P::GROUPS * GROUP_THREADS / 32);
      }
    }
    __syncthreads();
  }
  __device__ __forceinline__ unsigned char* rows(int group) const { return memory + group * P::ROW_BYTES; }
  __device__ __forceinline__ unsigned char* stage(int s) const { return memory + P::GROUPS * P::ROW_BYTES + s * P::STAGE_BYTES; }
  __device__ __forceinline__ float* factors(int s) const {
    return reinterpret_cast<float*>(memory + P::GROUPS * P::ROW_BYTES + P::STAGES * P::STAGE_BYTES) + s * P::FACTOR_FLOATS;
  }

  // By the warpgroup that brings columns [begin, end); beside(stage, column0) loads what else goes with them. A tile that has come is passed on when
  // AHEAD others are on their way, or when there is no room for another.
  template <class Beside>
  __device__ __forceinline__ void produce(const Side& columns, int begin, int end, const Beside& beside) const {
    const int tiles = (end - begin + P::COLUMNS - 1) / P::COLUMNS;
    int passed = 0;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int s = i % P::STAGES, column0 = begin + i * P::COLUMNS, parity = i / P::STAGES + 1 & 1;
      if (i >= P::STAGES && !pk::barrier_is_over(empty + s, parity)) {
        pass_all(passed, i);
        pk::barrier_wait(empty + s, parity);
      }
      load_tile<P::COLUMNS, P::PARTS>(stage(s), columns, column0, end);
      beside(s, column0);
      pk::copy_async_commit();
      if (i - passed < AHEAD) continue;
      pk::copy_async_wait<AHEAD>();
      pk::publish_to_tensor_cores();
      pk::barrier_arrive(full + passed++ % P::STAGES);
    }
    pass_all(passed, tiles);
  }
  // By a warpgroup that multiplies: use(stage, column0) for each tile of columns, which passes on the turn, and releases the stage.
  template <class Use>
  __device__ __forceinline__ void consume(int group, int begin, int end, const Use& use) const {
    int s = 0, parity = 0;
    if (group == P::GROUPS - 1) pass_turn<P>(group);
#pragma unroll 1
    for (int column0 = begin; column0 < end; column0 += P::COLUMNS) {
      pk::barrier_wait(full + s, parity);
      take_turn<P>(group);
      use(s, column0);
      if (++s == P::STAGES) s = 0, parity ^= 1;
    }
  }
  __device__ __forceinline__ void release(int s) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) pk::barrier_arrive(empty + s);
  }
  // The rows of a warpgroup, by itself.
  __device__ __forceinline__ void load_rows(int group, const Side& side, int first, int end) const {
    load_tile<GROUP_ROWS, P::PARTS>(rows(group), side, first, end);
    pk::copy_async_commit();
    pk::copy_async_wait<0>();
    pk::publish_to_tensor_cores();
    synchronize_group(group);
  }

 private:
  __device__ __forceinline__ void pass_all(int& passed, int count) const {
    pk::copy_async_wait<0>();
    pk::publish_to_tensor_cores();
    while (passed < count) pk::barrier_arrive(full + passed++ % P::STAGES);
  }
};

#endif

// ---------------------------------------------------------------------------------------------------------------------- host

// Unit vectors of more than one panel, and groups long enough for a few steps.
inline bool serves(const ContrastiveProblem& p) {
  return !p.double_compute && p.bounded && contrastive_width(p.Cp) == ContrastiveWidth::wide && p.M >= 512 * (p.G > 0 ? p.G : 1);
}

// Whether the kernel is there on the current device: where it was compiled to nothing it has no barriers in shared memory.
template <class Kernel>
bool is_compiled(Kernel kernel) {
  constexpr int devices = 64;
  static std::atomic<signed char> known[devices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= devices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
    if (!found) cudaGetLastError();
    known[device] = found && attributes.sharedSizeBytes > 0 ? 1 : -1;
  }
  return known[device] > 0;
}

}  // namespace hopper
}  // namespace

#endif
