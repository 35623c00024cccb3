// SPDX-License-Identifier: MIT
// The gradient of unit vectors of 80 to 128 channels on compute capability 9.0, as backward_block of contrastive_backward.cu has it: scores become H
// in the registers that feed the second product. See contrastive_hopper.cuh.
#pragma once

#include "ops/cuda/contrastive_backward.cuh"
#include "ops/cuda/contrastive_hopper.cuh"

namespace {

#if defined(__CUDACC__)

#if defined(PK_HOPPER)

enum class Kind { others, same, mixed };

// Scores become H 2^lift, 16-bit floats, in the order of the second product's left factor.
template <class P>
struct HopperWeigh {
  float own_other[2];  // of the weights of a thread's rows those that nearly all columns need; registers are short
  float lifted;

  // Those of fragments [begin, behind).
  template <int begin, int behind>
  __device__ __forceinline__ void run(typename P::Weights& h, const typename P::Scores& scores, const float* factors, const Backward& p,
                                      unsigned others, unsigned same, int row0, int column0, int end) const {
    constexpr unsigned all = (1u << behind) - (1u << begin);
    if ((others & all) == all)
      run<Kind::others, begin, behind>(h, scores, factors, p, row0, column0, end);
    else if ((same & all) == all)
      run<Kind::same, begin, behind>(h, scores, factors, p, row0, column0, end);
    else
      run<Kind::mixed, begin, behind>(h, scores, factors, p, row0, column0, end);
  }

 private:
  template <Kind kind, int begin, int behind>
  __device__ __forceinline__ void run(typename P::Weights& h, const typename P::Scores& scores, const float* factors, const Backward& p,
                                      int row0, int column0, int end) const {
    const int member = threadIdx.x % 4, row = row0 + threadIdx.x % 32 / 4;
    float4 own[2];
    ContrastiveRange range[2];
    float factor = 0;
    if constexpr (kind != Kind::others) {
      factor = power_of_two(static_cast<int>(lifted));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        own[r] = p.of_rows.weight[min(row + 8 * r, p.R - 1)];
        if constexpr (kind == Kind::mixed) range[r] = hopper::range_from(p.ranges, min(row + 8 * r, p.R - 1), column0 + 2 * member);
      }
    }
#pragma unroll
    for (int f = begin; f < behind; ++f) {
      const auto column = [&](int which) { return pk::load_vector<float2>(factors + which * P::COLUMNS + 8 * f + 2 * member); };
      const float2 x = kind == Kind::others ? float2() : column(0), y = kind == Kind::same ? float2() : column(1),
                   z = kind == Kind::others ? float2() : column(2);
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2, j = 8 * f + i % 2;  // as range_from counts
        const float power = pk::exp2_fast(scores[4 * f + i] * p.scale + lifted);
        const auto as_other = [&] { return power * (own_other[r] + (i % 2 == 0 ? y.x : y.y)); };
        const auto as_same = [&] { return power * (own[r].x + (i % 2 == 0 ? x.x : x.y)) + (own[r].z + (i % 2 == 0 ? z.x : z.y)) * factor; };
        if constexpr (kind == Kind::others) {
          v[i] = as_other();
        } else if constexpr (kind == Kind::same) {
          v[i] = as_same();
        } else {
          const float weight = in_class(range[r], j) ? as_same() : as_other();
          v[i] = j < end - column0 - 2 * member && j != range[r].self ? weight : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (P::PARTS == 2)
          split_pair(v[2 * r], v[2 * r + 1], h[f / 2][0][f % 2 * 2 + r], h[f / 2][1][f % 2 * 2 + r]);
        else
          h[f / 2][0][f % 2 * 2 + r] = pk::pack_f16(v[2 * r], v[2 * r + 1]);
      }
    }
  }
};

#endif

// Outside of the path that nearly all columns take: 128 of 160 registers hold the scores and the gradient (128 of 240 with two parts).
// resources: spills at most 240 bytes (sm_90)
// resources: dynamic shared 200704 bytes
template <bool two>
__global__ void __launch_bounds__(hopper::Plan<two>::THREADS, 1) hopper_backward_kernel(const Backward p) {
#if defined(PK_HOPPER)
  using namespace hopper;
  using P = Plan<two>;
  PK_DYNAMIC_SHARED(unsigned char, dynamic);
  PK_SHARED(uint64_t, barriers, 2 * P::STAGES);
  PK_SHARED(WarpClasses, of_warps, P::GROUPS * 4);  // registers are short
  const Portion portion = find_portion<P::THREADS>(p, P::ROWS, P::COLUMNS);
  const Rows& rows = portion.rows;
  if (rows.first >= rows.end) return;
  const int lift = find_lift<P::THREADS>(p);
  const Pipeline<P> pipeline(dynamic, barriers);
  const int warpgroup = threadIdx.x / GROUP_THREADS, lane = threadIdx.x % 32;
  if (warpgroup == P::GROUPS) {
    pk::fewer_registers<P::FEW_REGISTERS>();
    pipeline.produce(p.columns, portion.begin, portion.end, [&](int stage, int column0) {
      const int at = threadIdx.x % GROUP_THREADS, j = column0 + at;
      const bool valid = j < portion.end;
      if (at >= P::COLUMNS) return;
      const float* const from = reinterpret_cast<const float*>(p.of_columns.weight + (valid ? j : 0));
#pragma unroll
      for (int k = 0; k < 3; ++k) pk::copy_async_4(pipeline.factors(stage) + k * P::COLUMNS + at, from + k, valid);
    });
  } else {
    pk::more_registers<P::REGISTERS>();
    const int first = rows.first + warpgroup * GROUP_ROWS, row0 = rows.first + threadIdx.x / 32 * 16;
    const int end = min(portion.end, columns_end(p, rows, first, first + GROUP_ROWS));
    pipeline.load_rows(warpgroup, p.rows, first, rows.end);
    WarpClasses& classes = of_warps[threadIdx.x / 32];
    {
      WarpClasses mine;
      mine.find(p.ranges, row0 + lane, lane < 16 && rows.in_group(row0 + lane));
      if (lane == 0) classes = mine;
      __syncwarp();
    }
    HopperWeigh<P> weigh;
    weigh.lifted = static_cast<float>(lift);
#pragma unroll
    for (int r = 0; r < 2; ++r) weigh.own_other[r] = p.of_rows.weight[min(row0 + 8 * r + lane / 4, p.R - 1)].y;
    Accumulator gradient;
#pragma unroll
    for (int i = 0; i < 64; ++i) gradient[i] = 0;
    const unsigned x = pk::shared_address(pipeline.rows(warpgroup));
    pipeline.consume(warpgroup, portion.begin, portion.end, [&](int stage, int column0) {
      if (column0 >= end) {
        pass_turn<P>(warpgroup);
        pipeline.release(stage);
        return;
      }
      const unsigned y = pk::shared_address(pipeline.stage(stage));
      const float* const factors = pipeline.factors(stage);
      typename P::Scores scores;
      find_scores<P>(scores, warpgroup, x, y);
      unsigned others, same;
      classes.template kinds<P::FRAGMENTS>(column0, portion.end, others, same);
      typename P::Weights h;
      if constexpr (two) {
        weigh.template run<0, P::FRAGMENTS>(h, scores, factors, p, others, same, row0, column0, portion.end);
        add_weighted<P>(gradient, h, y);
      } else {  // the second half is weighed while the first is multiplied
        weigh.template run<0, P::FRAGMENTS / 2>(h, scores, factors, p, others, same, row0, column0, portion.end);
        begin_weighted<P, 0, P::STEPS / 2>(gradient, h, y);
        weigh.template run<P::FRAGMENTS / 2, P::FRAGMENTS>(h, scores, factors, p, others, same, row0, column0, portion.end);
        begin_weighted<P, P::STEPS / 2, P::STEPS>(gradient, h, y);
        wait_for_weighted<P>(gradient, h);
      }
      pipeline.release(stage);
    });
    const float factor = p.inverse_temperature * power_of_two(-lift);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + 8 * r + lane / 4;
      if (row >= rows.end) continue;
      const bool takes_part = rows.in_group(row);  // else 0, even where the vector is none
      const auto number = [&](float sum) { return takes_part ? sum * factor : 0.0f; };
      float* const target = p.gradient + (static_cast<int64_t>(portion.share) * p.R + row) * p.Cp + 2 * (lane % 4);
#pragma unroll
      for (int f = 0; f < CHANNELS / 8; ++f)
        if (8 * f < p.Cp)
          pk::store_vector(target + 8 * f, make_float2(number(gradient[4 * f + 2 * r]), number(gradient[4 * f + 2 * r + 1])));
    }
  }
#endif
}

bool on_hopper(const ContrastiveProblem& p) { return hopper::serves(p) && hopper::is_compiled(hopper_backward_kernel<false>); }
int launch_hopper(bool two, const Backward& p, int64_t blocks, void* stream) {
  const auto launch = [&](auto kernel, int threads, int bytes) {
    return PK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, stream, p);
  };
  return two ? launch(hopper_backward_kernel<true>, hopper::Plan<true>::THREADS, hopper::Plan<true>::SHARED_BYTES_WITH_FACTORS)
             : launch(hopper_backward_kernel<false>, hopper::Plan<false>::THREADS, hopper::Plan<false>::SHARED_BYTES_WITH_FACTORS);
}

#else

bool on_hopper(const ContrastiveProblem&) { return false; }
int launch_hopper(bool, const Backward&, int64_t, void*) { return 0; }

#endif

}  // namespace
