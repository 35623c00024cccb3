// SPDX-License-Identifier: MIT
// What the forward kernels for problems on chip share.
#pragma once

#include "common/arithmetic.cuh"
#include "ops/cuda/sinkhorn_launch.h"
#include "ops/sinkhorn.h"

namespace {

using namespace protokernels;

// A product of scaled kernel and weights outside of these has lost entries that count, or soon will.
template <class T>
constexpr T LOW = T(1e-13);
template <class T>
constexpr T HIGH = T(1e13);

// The parts of a problem a kernel needs.
template <class T>
struct Forward {
  int N, M, num_iters;
  bool balanced;
  T tolerance, rho_a, rho_b;
  const T* cost;     // [B, N, M]
  const T* a;        // [B, N]
  const T* b;        // [B, M]
  const T* epsilon;  // [B]
  const T* g_init;   // [B, M] or null
  T* f;              // [B, N]
  T* g;              // [B, M]
  T* transport_cost;
  T* entropic_value;
  T* marginal_error;
  int64_t* iterations;
  bool* feasible;
  T* history;  // [B, num_iters, N + M] or null

  explicit Forward(const SinkhornForward& p)
      : N(static_cast<int>(p.N)),
        M(static_cast<int>(p.M)),
        num_iters(static_cast<int>(p.num_iters)),
        balanced(p.rho_a == INFINITY && p.rho_b == INFINITY),
        tolerance(static_cast<T>(p.tolerance)),
        rho_a(static_cast<T>(p.rho_a)),
        rho_b(static_cast<T>(p.rho_b)),
        cost(static_cast<const T*>(p.cost)),
        a(static_cast<const T*>(p.a)),
        b(static_cast<const T*>(p.b)),
        epsilon(static_cast<const T*>(p.epsilon)),
        g_init(static_cast<const T*>(p.g_init)),
        f(static_cast<T*>(p.f)),
        g(static_cast<T*>(p.g)),
        transport_cost(static_cast<T*>(p.transport_cost)),
        entropic_value(static_cast<T*>(p.entropic_value)),
        marginal_error(static_cast<T*>(p.marginal_error)),
        iterations(p.iterations),
        feasible(p.feasible),
        history(static_cast<T*>(p.history)) {}
};

// What is summed over a problem, each thread its part; the sums over the block are written by thread 0.
template <class T>
struct Values {
  T transported = 0, value = 0, mass_a = 0, mass_b = 0, dead = 0, error = 0;
};

// sums: [6, warps] in shared memory.
template <int WARPS, class T>
__device__ __forceinline__ void write_values(const Forward<T>& p, const Values<T>& values, int iterations, T (&sums)[6][WARPS]) {
  const int64_t problem = blockIdx.x;
  const T all[6] = {warp_sum(values.transported), warp_sum(values.value), warp_sum(values.mass_a),
                    warp_sum(values.mass_b),      warp_sum(values.dead),  warp_sum(values.error)};
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < 6; ++k) sums[k][threadIdx.x / 32] = all[k];
  __syncthreads();
  if (threadIdx.x != 0) return;
  T total[6] = {};
  for (int w = 0; w < WARPS; ++w)
#pragma unroll
    for (int k = 0; k < 6; ++k) total[k] += sums[k][w];
  const T difference = magnitude(total[2] - total[3]), largest = larger(total[2], total[3]);
  p.transport_cost[problem] = total[0];
  p.entropic_value[problem] = total[1];
  p.marginal_error[problem] = total[5];
  p.iterations[problem] = iterations;
  p.feasible[problem] = total[4] == 0 && (!p.balanced || difference <= static_cast<T>(SINKHORN_MASS_TOLERANCE) * largest);
}

}  // namespace
