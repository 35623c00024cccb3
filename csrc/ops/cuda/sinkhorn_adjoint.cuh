// SPDX-License-Identifier: MIT
// What the two backward kernels for problems on chip share.
#pragma once

#include "ops/cuda/sinkhorn_tile.cuh"
#include "ops/sinkhorn.h"

namespace {

using namespace protokernels;

// The parts of a problem a kernel needs.
template <class T>
struct Backward {
  int N, M, num_iters;
  bool balanced;
  T rho_a, rho_b;
  const T* cost;                 // [B, N, M]
  const T* a;                    // [B, N]
  const T* b;                    // [B, M]
  const T* epsilon;              // [B]
  const T* g_init;               // [B, M] or null
  const T* f;                    // [B, N]
  const T* g;                    // [B, M]
  const int64_t* iterations;     // [B]
  const T* history;              // [B, num_iters, N + M]
  const T* grad_f;               // [B, N] or null
  const T* grad_g;               // [B, M] or null
  const T* grad_transport_cost;  // [B] or null
  const T* grad_entropic_value;  // [B] or null
  T* grad_cost;                  // [B, N, M]
  T* grad_a;                     // [B, N]
  T* grad_b;                     // [B, M]
  T* grad_epsilon;               // [B]

  explicit Backward(const SinkhornBackward& p)
      : N(static_cast<int>(p.N)),
        M(static_cast<int>(p.M)),
        num_iters(static_cast<int>(p.num_iters)),
        balanced(p.rho_a == INFINITY && p.rho_b == INFINITY),
        rho_a(static_cast<T>(p.rho_a)),
        rho_b(static_cast<T>(p.rho_b)),
        cost(static_cast<const T*>(p.cost)),
        a(static_cast<const T*>(p.a)),
        b(static_cast<const T*>(p.b)),
        epsilon(static_cast<const T*>(p.epsilon)),
        g_init(static_cast<const T*>(p.g_init)),
        f(static_cast<const T*>(p.f)),
        g(static_cast<const T*>(p.g)),
        iterations(p.iterations),
        history(static_cast<const T*>(p.history)),
        grad_f(static_cast<const T*>(p.grad_f)),
        grad_g(static_cast<const T*>(p.grad_g)),
        grad_transport_cost(static_cast<const T*>(p.grad_transport_cost)),
        grad_entropic_value(static_cast<const T*>(p.grad_entropic_value)),
        grad_cost(static_cast<T*>(p.grad_cost)),
        grad_a(static_cast<T*>(p.grad_a)),
        grad_b(static_cast<T*>(p.grad_b)),
        grad_epsilon(static_cast<T*>(p.grad_epsilon)) {}

  __device__ __forceinline__ T transport_gradient() const { return grad_transport_cost ? grad_transport_cost[blockIdx.x] : T(0); }
  __device__ __forceinline__ T entropic_gradient() const { return grad_entropic_value ? grad_entropic_value[blockIdx.x] : T(0); }
  __device__ __forceinline__ T row_gradient(int i) const { return grad_f ? grad_f[static_cast<int64_t>(blockIdx.x) * N + i] : T(0); }
  __device__ __forceinline__ T column_gradient(int j) const { return grad_g ? grad_g[static_cast<int64_t>(blockIdx.x) * M + j] : T(0); }
};

template <class T>
__device__ __forceinline__ bool alive(T potential) {
  return potential != -T(INFINITY);
}

// The block's sum, warps in their order; in every thread. Begins and ends with a barrier.
template <class S, class T>
__device__ __forceinline__ T block_sum(T value, T (&sums)[S::W]) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < S::W; ++w) total += sums[w];
  return total;
}

}  // namespace
