// SPDX-License-Identifier: MIT
// The gradient of vectors back into images or embeddings, on the GPU. The equations stand in ops/contrastive.h, the kinds of kernels in
// contrastive_pack.cu.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_pack.cuh"

namespace {

template <class T>
struct Gradients {
  const T* grad_packed;  // [R, Cp]
  const T* packed;       // [R, Cp]
  const T* norms;        // [R]
};

// The gradient of a row's vector, a span of channels at a time; by the row's four threads, all lanes of a warp together.
template <class T, class X>
struct RowGradient {
  const Pack<T, X>& p;
  const Gradients<T>& in;
  int64_t row;
  Quarter<T> f, df;
  T along = 0, norm = 1;

  __device__ __forceinline__ RowGradient(const Pack<T, X>& pack, const Gradients<T>& gradients, int64_t of_row)
      : p(pack), in(gradients), row(of_row) {
    if (row < p.R) norm = in.norms[row];
    if (!p.normalize) {
      read(0);
      return;
    }
    for (int channel0 = 0; channel0 < p.Cp; channel0 += SPAN) {
      read(channel0);
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        if (channel0 + k * CHUNK >= p.Cp) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) along += f[k][j] * df[k][j];
      }
    }
    along = sum_of_row(along);
  }
  __device__ __forceinline__ void read(int channel0) {
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const int c = channel0 + k * CHUNK + threadIdx.x % 4 * 4;
      if (channel0 + k * CHUNK >= p.Cp) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) f[k][j] = df[k][j] = 0;
      if (row >= p.R) continue;
      read_four(df[k], in.grad_packed + row * p.Cp + c, true);
      if (p.normalize) read_four(f[k], in.packed + row * p.Cp + c, true);
    }
  }
  __device__ __forceinline__ void span(int channel0, Quarter<T>& out) {
    if (p.Cp > SPAN) read(channel0);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      if (channel0 + k * CHUNK >= p.Cp) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) out[k][j] = p.normalize ? (df[k][j] - f[k][j] * along) / norm : df[k][j];
    }
  }
};

// Up to 16 channels, far apart: a thread has a row.
template <class T, class X>
__global__ void __launch_bounds__(NARROW_THREADS) narrow_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, X* grad_x) {
  pk::let_next_begin();
  pk::wait_for_previous();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * NARROW_THREADS + threadIdx.x;
  if (row >= p.R) return;
  T f[4][4], df[4][4];
  X* const target = grad_x + p.place(row);
  const T norm = in.norms[row];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    read_four(df[q], in.grad_packed + row * CHUNK + 4 * q, true);
    if (p.normalize) read_four(f[q], in.packed + row * CHUNK + 4 * q, true);
  }
  T along = 0;
  if (p.normalize) {
    T of_quarter[4] = {0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < CHUNK; ++c) of_quarter[c / 4] += f[c / 4][c % 4] * df[c / 4][c % 4];
    along = sum_of_quarters(of_quarter);
  }
#pragma unroll
  for (int c = 0; c < CHUNK; ++c)
    if (c < p.C) narrow(target[c * p.stride_c], p.normalize ? (df[c / 4][c % 4] - f[c / 4][c % 4] * along) / norm : df[c / 4][c % 4]);
}

template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, X* grad_x) {
  pk::let_next_begin();
  pk::wait_for_previous();
  PK_SHARED(T, tile, ROWS, SPAN + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = threadIdx.x / 4, quarter = threadIdx.x % 4;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * ROWS, row = row0 + lane;
  X* const target = grad_x + (row < p.R ? p.place(row) : 0);
  RowGradient<T, X> gradient(p, in, row0 + at);
  for (int channel0 = 0; channel0 < p.Cp; channel0 += SPAN) {
    Quarter<T> values;
    gradient.span(channel0, values);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      if (channel0 + k * CHUNK >= p.Cp) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[at][k * CHUNK + quarter * 4 + j] = values[k][j];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      if (channel0 + k * CHUNK >= p.C) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = channel0 + k * CHUNK + warp * 4 + j;
        if (row < p.R && c < p.C) narrow(target[c * p.stride_c], tile[lane][k * CHUNK + warp * 4 + j]);
      }
    }
    __syncthreads();
  }
}

template <class T, class X>
__global__ void __launch_bounds__(THREADS) interleaved_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, bool aligned, X* grad_x) {
  pk::let_next_begin();
  pk::wait_for_previous();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / 4;
  RowGradient<T, X> gradient(p, in, row);
  if (row >= p.R) return;
  X* const target = grad_x + p.place(row);
  for (int channel0 = 0; channel0 < p.C; channel0 += SPAN) {
    Quarter<T> values;
    gradient.span(channel0, values);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const int c = channel0 + k * CHUNK + threadIdx.x % 4 * 4;
      if (c + 4 <= p.C) {
        write_four(target + c, values[k], aligned);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (c + j < p.C) narrow(target[c + j], values[k][j]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class T, class X>
int unpack(const ContrastiveUnpack& p, void* stream) {
  const Pack<T, X> problem(p);
  const Gradients<T> in{static_cast<const T*>(p.grad_packed), static_cast<const T*>(p.packed), static_cast<const T*>(p.norms)};
  X* const grad_x = static_cast<X*>(p.grad_x);
  if (p.stride_c == 1)
    return PK_LAUNCH_BEHIND((interleaved_unpack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, in,
                            fours_are_aligned<X>(grad_x, p), grad_x);
  if (p.Cp == CHUNK)
    return PK_LAUNCH_BEHIND((narrow_unpack_kernel<T, X>), blocks_for(p.R, NARROW_THREADS), dim3(NARROW_THREADS), 0, stream, problem, in,
                            grad_x);
  return PK_LAUNCH_BEHIND((planar_unpack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, in, grad_x);
}

}  // namespace

namespace protokernels {

int launch_contrastive_unpack(const ContrastiveUnpack& p, void* stream) {
  if (p.R == 0) return 0;
  switch (p.x_kind) {
    case Kind::f32: return unpack<float, float>(p, stream);
    case Kind::f64: return unpack<double, double>(p, stream);
    case Kind::bf16: return unpack<float, __nv_bfloat16>(p, stream);
    default: return unpack<float, __half>(p, stream);
  }
}

}  // namespace protokernels
