// SPDX-License-Identifier: MIT
// What a vector brings to the gradients of its pairs, from its statistics and their derivatives: dp exp(-p), dn exp(-n), dl.
#pragma once

#include "ops/cuda/contrastive_halves.cuh"

namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr int FACTOR_THREADS = 256;
constexpr int PADDING = 128;  // factors behind the last vector, so that a block may read those of all its rows

// Of one side, or null where its vectors have no losses of their own. Bounded scores: weight = dp exp(-p), dn exp(-n), dl; else weight =
// dp, dn, dl and level = p, n in units of log 2. A derivative of 0 stays one, whatever the statistic.
struct Factors {
  const float4* weight;  // [count + PADDING]
  const float2* level;   // [count + PADDING], unless bounded
};

struct FactorsInput {
  int64_t count;
  bool bounded;
  const float* statistics;    // [3, count], or null
  const float* coefficients;  // [3, count]
  // Of vectors that become 16-bit floats: a fourth of their numbers, else 0; two parts or one.
  int64_t fours;
  const float4* vectors;
  bool two;
  int apart;  // see write_halves
};

struct FactorsOutput {
  float4* weight;
  float2* level;
  unsigned* halves;
  float* largest;  // of every block's vectors
};

// By block number `block`: its vectors' factors, also the vectors as 16-bit floats, and their largest derivative.
__device__ __forceinline__ void write_factors(const FactorsInput& in, const FactorsOutput& out, int block) {
  PK_SHARED(float, of_warp, FACTOR_THREADS / 32);
  const int64_t i = static_cast<int64_t>(block) * FACTOR_THREADS + threadIdx.x, count = in.count;
  if (i < in.fours) write_halves(out.halves, in.two, in.apart, i, in.vectors[i]);
  float4 mine = make_float4(0, 0, 0, 0);
  float2 levels = make_float2(INFINITY, INFINITY);
  float size = 0;
  if (in.statistics && i < count) {
    const float dp = in.coefficients[i], dn = in.coefficients[count + i], dl = in.coefficients[2 * count + i];
    const float p = in.statistics[i], n = in.statistics[count + i];
    size = fabsf(dp) + fabsf(dn) + fabsf(dl);
    if (in.bounded) {
      mine = make_float4(dp == 0 ? 0.0f : dp * expf(-p), dn == 0 ? 0.0f : dn * expf(-n), dl, 0);
    } else {
      mine = make_float4(dp, dn, dl, 0);
      levels = make_float2(dp == 0 ? INFINITY : p * LOG2_E, dn == 0 ? INFINITY : n * LOG2_E);
    }
  }
  if (i < count + PADDING) {
    out.weight[i] = mine;
    if (!in.bounded) out.level[i] = levels;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) size = fmaxf(size, __shfl_xor_sync(ALL, size, step));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = size;
  __syncthreads();
  if (threadIdx.x > 0 || static_cast<int64_t>(block) * FACTOR_THREADS >= count + PADDING) return;
  for (int w = 1; w < FACTOR_THREADS / 32; ++w) size = fmaxf(size, of_warp[w]);
  out.largest[block] = size;
}

__global__ void __launch_bounds__(FACTOR_THREADS) factors_kernel(const FactorsInput in, const FactorsOutput out) {
  write_factors(in, out, static_cast<int>(blockIdx.x));
}

}  // namespace
