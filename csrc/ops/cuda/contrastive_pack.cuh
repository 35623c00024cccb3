// SPDX-License-Identifier: MIT
// What packing and unpacking have in common: where a row lies in the images, four numbers at a time, the length of a vector.
//
// Four threads have a row, each of them 4 of every 16 channels; that is the order in which squares and products add up, whatever the layout of x and
// whatever the kernel.
#pragma once

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int THREADS = 128, ROWS = THREADS / 4;              // of a block
constexpr int CHUNK = 16, CHUNKS = 4, SPAN = CHUNK * CHUNKS;  // channels: of a row's four threads at once, and in registers

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float& out, float x) { out = x; }
__device__ __forceinline__ void narrow(double& out, double x) { out = x; }
__device__ __forceinline__ void narrow(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(__half& out, float x) { out = __float2half_rn(x); }

// T the compute type, X that of the images.
template <class T, class X>
struct Pack {
  int64_t R, P, stride_n, stride_c, stride_p;
  int C, Cp;
  const int64_t* order;  // [R]
  bool normalize;

  explicit Pack(const ContrastivePack& p)
      : R(p.R),
        P(p.P),
        stride_n(p.stride_n),
        stride_c(p.stride_c),
        stride_p(p.stride_p),
        C(static_cast<int>(p.C)),
        Cp(static_cast<int>(p.Cp)),
        order(p.order),
        normalize(p.normalize) {}
  // Of the first channel of a row's position.
  __device__ __forceinline__ int64_t place(int64_t row) const {
    const int64_t position = order[row];
    const int64_t n = (position | P) >> 32 == 0 ? static_cast<unsigned>(position) / static_cast<unsigned>(P) : position / P;
    return n * stride_n + (position - n * P) * stride_p;
  }
};

// What a vector is divided by, from its squares, which add up in float64: no overflow for float vectors. Division is exact where it can be: a
// vector of one channel becomes 1 or -1, and its gradient 0.
template <class T>
struct Length {
  double length;
  T divisor;

  __device__ __forceinline__ Length(bool normalize, double squares) : length(sqrt(squares)) {
    const bool zero = squares <= CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
    divisor = !normalize ? T(1) : zero ? T(INFINITY) : static_cast<T>(length);
  }
  __device__ __forceinline__ T scaled(T x) const {  // the length may be more than T can say
    return divisor == T(INFINITY) && length > 1 ? static_cast<T>(static_cast<double>(x) / length) : x / divisor;
  }
};

// What a thread has of its row: 4 of every 16 channels from channel0 on.
template <class T>
using Quarter = T[CHUNKS][4];

// Sums over the four threads of a row, in the same order everywhere.
template <class V>
__device__ __forceinline__ V sum_of_row(V quarter) {
  quarter += __shfl_xor_sync(ALL, quarter, 1);
  return quarter + __shfl_xor_sync(ALL, quarter, 2);
}

// Four numbers side by side, at once where `aligned`.
template <class T, class X>
__device__ __forceinline__ void read_four(T (&out)[4], const X* from, bool aligned) {
  struct alignas(4 * sizeof(X) > 16 ? 16 : 4 * sizeof(X)) Four {
    X x[4];
  };
  if (aligned) {
    const Four four = pk::load_vector<Four>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = static_cast<T>(widen(four.x[j]));
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = static_cast<T>(widen(from[j]));
  }
}
template <class T, class X>
__device__ __forceinline__ void write_four(X* to, const T (&values)[4], bool aligned) {
  struct alignas(4 * sizeof(X) > 16 ? 16 : 4 * sizeof(X)) Four {
    X x[4];
  };
  if (aligned) {
    Four four;
#pragma unroll
    for (int j = 0; j < 4; ++j) narrow(four.x[j], values[j]);
    pk::store_vector(to, four);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) narrow(to[j], values[j]);
  }
}

// Only chunks that are there, `channels` in all: zeros add nothing but time.
template <class T>
__device__ __forceinline__ double squares_of(const Quarter<T>& v, int channels) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    if (k * CHUNK >= channels) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += static_cast<double>(v[k][j]) * static_cast<double>(v[k][j]);
  }
  return sum;
}

// Four channels of every vector lie at a multiple of their size (16 bytes at the most).
template <class X>
bool fours_are_aligned(const void* x, const ContrastivePack& p) {
  constexpr uintptr_t size = 4 * sizeof(X) > 16 ? 16 : 4 * sizeof(X);
  const int64_t strides = p.stride_n * (p.N > 1) | p.stride_p * (p.P > 1);
  return reinterpret_cast<uintptr_t>(x) % size == 0 && strides * static_cast<int64_t>(sizeof(X)) % static_cast<int64_t>(size) == 0;
}

dim3 blocks_for(int64_t count, int of_block) { return dim3(static_cast<unsigned>((count + of_block - 1) / of_block)); }

// Sums over a row's four quarters by one thread, in the order of sum_of_row.
template <class V>
__device__ __forceinline__ V sum_of_quarters(const V (&of_quarter)[4]) {
  return (of_quarter[0] + of_quarter[1]) + (of_quarter[2] + of_quarter[3]);
}

constexpr int NARROW_THREADS = 128;  // of the kernels for up to 16 channels, a row each

}  // namespace
