// SPDX-License-Identifier: MIT
// The forward pass of unit vectors of 80 to 128 channels on compute capability 9.0, as forward_block of contrastive_kernel.cu has it: sums of powers of
// two in registers, no maximum. See contrastive_hopper.cuh.
//
// 128 columns of one kind for a warp take 3 instructions an entry; others, where a class begins or ends or a row meets itself, are weighed entry by
// entry without a branch, 19 instructions each. With branches and ranges read for every fragment (5000 cycles a tile) the few blocks in which a
// class ends took twice as long as the rest, and with one block on each multiprocessor so did the kernel.
#pragma once

#include "ops/cuda/contrastive_forward.cuh"
#include "ops/cuda/contrastive_hopper.cuh"

namespace {

#if defined(__CUDACC__)

#if defined(PK_HOPPER)

// Adds scores to the sums of a thread's two rows; row0: the warp's first.
template <class P>
struct HopperSums {
  RowSums<true> row[2];

  // others, same: what all columns are to the warp's rows, if they are one.
  __device__ __forceinline__ void add(const typename P::Scores& scores, const Forward& p, bool others, bool same, int row0, int column0,
                                      int end) {
    if (others) {
#pragma unroll
      for (int i = 0; i < P::COLUMNS / 2; ++i) row[i / 2 % 2].n.part[0] += pk::exp2_fast(scores[i] * p.scale);
    } else if (same) {
#pragma unroll
      for (int i = 0; i < P::COLUMNS / 2; ++i) {
        row[i / 2 % 2].p.part[0] += pk::exp2_fast(scores[i] * p.scale);
        row[i / 2 % 2].l += scores[i];
      }
    } else {
      const int first = column0 + 2 * (threadIdx.x % 4), behind = end - first;
      const ContrastiveRange range[2] = {hopper::range_from(p.ranges, min(row0 + threadIdx.x % 32 / 4, p.R - 1), first),
                                         hopper::range_from(p.ranges, min(row0 + 8 + threadIdx.x % 32 / 4, p.R - 1), first)};
#pragma unroll
      for (int i = 0; i < P::COLUMNS / 2; ++i) {
        const int r = i / 2 % 2, column = i / 4 * 8 + i % 2;
        const float power = pk::exp2_fast(scores[i] * p.scale);
        const bool there = column < behind && column != range[r].self, own = in_class(range[r], column);
        row[r].p.part[0] += there && own ? power : 0.0f;
        row[r].l += there && own ? scores[i] : 0.0f;
        row[r].n.part[0] += there && !own ? power : 0.0f;
      }
    }
  }
};

#endif

// resources: dynamic shared 197632 bytes
template <bool two>
__global__ void __launch_bounds__(hopper::Plan<two>::THREADS, 1) hopper_forward_kernel(const Forward p) {
#if defined(PK_HOPPER)
  using namespace hopper;
  using P = Plan<two>;
  constexpr int SUMS = RowSums<true>::PARTS;
  PK_DYNAMIC_SHARED(unsigned char, dynamic);
  PK_SHARED(uint64_t, barriers, 2 * P::STAGES);
  PK_SHARED(float, gathered, P::ROWS, SUMS);
  const Portion portion = find_portion<P::THREADS>(p, P::ROWS, P::COLUMNS);
  if (portion.share >= portion.used) return;
  const Pipeline<P> pipeline(dynamic, barriers);
  const Rows& rows = portion.rows;
  const int warpgroup = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % 32;
  if (warpgroup == P::GROUPS) {
    pipeline.produce(p.columns, portion.begin, portion.end, [](int, int) {});
  } else {
    const int group_row = warpgroup * GROUP_ROWS, warp_row = threadIdx.x / 32 * 16;
    const int first = rows.first + group_row, row0 = rows.first + warp_row;
    const bool works = max(first, portion.anchors_begin) < min(first + GROUP_ROWS, portion.anchors_end);
    pipeline.load_rows(warpgroup, p.rows, first, rows.end);
    WarpClasses classes;
    classes.find(p.ranges, row0 + lane, lane < 16 && row0 + lane >= portion.anchors_begin && row0 + lane < portion.anchors_end);
    HopperSums<P> sums;
    sums.row[0] = sums.row[1] = RowSums<true>();
    const unsigned x = pk::shared_address(pipeline.rows(warpgroup));
    pipeline.consume(warpgroup, portion.begin, portion.end, [&](int stage, int column0) {
      if (!works) {
        pass_turn<P>(warpgroup);
        pipeline.release(stage);
        return;
      }
      typename P::Scores scores;
      find_scores<P>(scores, warpgroup, x, pk::shared_address(pipeline.stage(stage)));
      pipeline.release(stage);
      unsigned others, same;
      classes.template kinds<P::FRAGMENTS>(column0, portion.end, others, same);
      constexpr unsigned every = (1u << P::FRAGMENTS) - 1;
      sums.add(scores, p, others == every, same == every, row0, column0, portion.end);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums.row[r].gather();
      if (lane % 4 == 0) sums.row[r].parts(gathered[warp_row + 8 * r + lane / 4]);
    }
  }
  __syncthreads();
  RowSums<true> total;
  if (threadIdx.x < P::ROWS) total.merge(gathered[threadIdx.x]);
  finish<P::THREADS, P::ROWS, true>(p, portion, total);
#endif
}

bool on_hopper(const ContrastiveProblem& p) { return hopper::serves(p) && hopper::is_compiled(hopper_forward_kernel<false>); }
int launch_hopper(bool two, const Forward& p, int64_t blocks, void* stream) {
  const auto launch = [&](auto kernel, int threads, int bytes) {
    return PK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, stream, p);
  };
  return two ? launch(hopper_forward_kernel<true>, hopper::Plan<true>::THREADS, hopper::Plan<true>::SHARED_BYTES)
             : launch(hopper_forward_kernel<false>, hopper::Plan<false>::THREADS, hopper::Plan<false>::SHARED_BYTES);
}

#else

bool on_hopper(const ContrastiveProblem&) { return false; }
int launch_hopper(bool, const Forward&, int64_t, void*) { return 0; }

#endif

}  // namespace
