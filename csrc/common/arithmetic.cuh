// SPDX-License-Identifier: MIT
// Arithmetic for float and double under one name, and reductions over a warp.
#pragma once

#include "common/simt.cuh"

namespace {

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
// Two units in the last place up to y = 2^126, 0 beyond.
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }
__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}
template <class T>
__device__ __forceinline__ T warp_larger(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(ALL, value, step));
  return value;
}

}  // namespace
