// SPDX-License-Identifier: MIT
// Vectors out of images or embeddings, on the GPU. The equations stand in ops/contrastive.h.
//
// narrow_pack_kernel: up to 16 channels that lie far apart, a thread for a row. planar_pack_kernel: more channels that lie far apart. A block has 32
// rows; a warp reads a channel of all of them, which lie in short runs of a row of the image, and a square of shared memory turns them round, so that
// vectors are written whole. interleaved_pack_kernel: the channels lie side by side, and a thread's four come at once where they are aligned.
// Up to 64 channels stay in registers between the sum and the division; more are read twice, the second time from a cache.
// All are limited by memory: at 4 x 16 x 160 x 160 they move 6.6 MB each way, 3 us on an H200.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_pack.cuh"

namespace {

// Up to 16 channels, far apart: a thread has a row and all its channels under way at once; the warp turns them round so that vectors are written whole.
template <class T, class X>
__global__ void __launch_bounds__(NARROW_THREADS) narrow_pack_kernel(const Pack<T, X> p, const X* x, T* packed, T* norms) {
  struct alignas(16) Part {
    T x[16 / sizeof(T)];
  };
  constexpr int OF_PART = 16 / sizeof(T), PARTS = CHUNK / OF_PART;  // numbers of 16 bytes; of a row
  PK_SHARED(Part, turned, NARROW_THREADS * PARTS);
  pk::let_next_begin();
  pk::wait_for_previous();
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * NARROW_THREADS + threadIdx.x, row0 = row - lane;
  const bool here = row < p.R;
  T values[CHUNK];
  const X* const source = x + (here ? p.place(row) : 0);
#pragma unroll
  for (int c = 0; c < CHUNK; ++c) values[c] = here && c < p.C ? static_cast<T>(widen(source[c * p.stride_c])) : T(0);
  double squares[4] = {0, 0, 0, 0};
#pragma unroll
  for (int c = 0; c < CHUNK; ++c) squares[c / 4] += static_cast<double>(values[c]) * static_cast<double>(values[c]);
  const Length<T> length(p.normalize, p.normalize ? sum_of_quarters(squares) : 0.0);
  if (here) norms[row] = length.divisor;
  Part* const of_warp = turned + threadIdx.x / 32 * 32 * PARTS;
  const auto at = [](int r, int part) { return r * PARTS + (part ^ (PARTS == 4 ? r / 2 % 4 : r % 8)); };
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    Part mine;
#pragma unroll
    for (int j = 0; j < OF_PART; ++j) mine.x[j] = length.scaled(values[part * OF_PART + j]);
    pk::store_vector(of_warp + at(lane, part), mine);
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < PARTS; ++k) {
    const int i = k * 32 + lane, r = i / PARTS;
    if (row0 + r < p.R) pk::store_vector(packed + (row0 * CHUNK + i * OF_PART), pk::load_vector<Part>(of_warp + at(r, i % PARTS)));
  }
}

// resources: spills at most 12 bytes (sm_80, sm_100; none on sm_90)
template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_pack_kernel(const Pack<T, X> p, const X* x, T* packed, T* norms) {
  pk::let_next_begin();
  pk::wait_for_previous();
  PK_SHARED(T, tile, ROWS, SPAN + 1);
  PK_SHARED(double, squares, 4, ROWS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * ROWS, row = row0 + lane;
  const X* const source = x + (row < p.R ? p.place(row) : 0);
  Quarter<T> values = {};
  const auto read = [&](int channel0) {
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      if (channel0 + k * CHUNK >= p.C) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = channel0 + k * CHUNK + warp * 4 + j;
        values[k][j] = row < p.R && c < p.C ? static_cast<T>(widen(source[c * p.stride_c])) : T(0);
      }
    }
  };
  double sum = 0;
  for (int channel0 = 0; channel0 < p.C; channel0 += SPAN) {
    read(channel0);
    if (p.normalize) sum += squares_of<T>(values, p.C - channel0);
  }
  squares[warp][lane] = sum;
  const int at = threadIdx.x / 4, quarter = threadIdx.x % 4;
  for (int channel0 = 0; channel0 < p.Cp; channel0 += SPAN) {
    if (p.C > SPAN) read(channel0);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      if (channel0 + k * CHUNK >= p.Cp) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[lane][k * CHUNK + warp * 4 + j] = values[k][j];
    }
    __syncthreads();
    const Length<T> length(p.normalize, (squares[0][at] + squares[1][at]) + (squares[2][at] + squares[3][at]));
    if (row0 + at < p.R) {
      if (quarter == 0 && channel0 == 0) norms[row0 + at] = length.divisor;
#pragma unroll
      for (int k = 0; k < CHUNKS; ++k) {
        const int c = channel0 + k * CHUNK + quarter * 4;
        if (channel0 + k * CHUNK >= p.Cp) break;
        T scaled[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) scaled[j] = length.scaled(tile[at][k * CHUNK + quarter * 4 + j]);
        write_four(packed + (row0 + at) * p.Cp + c, scaled, true);
      }
    }
    __syncthreads();
  }
}

// resources: spills at most 8 bytes (sm_100)
template <class T, class X>
__global__ void __launch_bounds__(THREADS) interleaved_pack_kernel(const Pack<T, X> p, const X* x, bool aligned, T* packed, T* norms) {
  pk::let_next_begin();
  pk::wait_for_previous();
  const int quarter = threadIdx.x % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / 4;
  const X* const source = x + (row < p.R ? p.place(row) : 0);
  Quarter<T> values = {};
  const auto read = [&](int channel0) {
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const int c = channel0 + k * CHUNK + quarter * 4;
      if (channel0 + k * CHUNK >= p.C) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) values[k][j] = 0;
      if (row >= p.R) continue;
      if (c + 4 <= p.C) {
        read_four(values[k], source + c, aligned);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (c + j < p.C) values[k][j] = static_cast<T>(widen(source[c + j]));
      }
    }
  };
  double sum = 0;
  for (int channel0 = 0; channel0 < p.C; channel0 += SPAN) {
    read(channel0);
    if (p.normalize) sum += squares_of<T>(values, p.C - channel0);
  }
  const Length<T> length(p.normalize, sum_of_row(sum));
  if (row >= p.R) return;
  if (quarter == 0) norms[row] = length.divisor;
  for (int channel0 = 0; channel0 < p.Cp; channel0 += SPAN) {
    if (p.C > SPAN) read(channel0);
#pragma unroll
    for (int k = 0; k < CHUNKS; ++k) {
      const int c = channel0 + k * CHUNK + quarter * 4;
      if (channel0 + k * CHUNK >= p.Cp) break;
      T scaled[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) scaled[j] = length.scaled(values[k][j]);
      write_four(packed + row * p.Cp + c, scaled, true);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

template <class T, class X>
int pack(const ContrastivePack& p, void* stream) {
  const Pack<T, X> problem(p);
  const X* const x = static_cast<const X*>(p.x);
  T* const packed = static_cast<T*>(p.packed);
  T* const norms = static_cast<T*>(p.norms);
  if (p.stride_c == 1)
    return PK_LAUNCH_BEHIND((interleaved_pack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, x,
                            fours_are_aligned<X>(x, p), packed, norms);
  if (p.Cp == CHUNK)
    return PK_LAUNCH_BEHIND((narrow_pack_kernel<T, X>), blocks_for(p.R, NARROW_THREADS), dim3(NARROW_THREADS), 0, stream, problem, x,
                            packed, norms);
  return PK_LAUNCH_BEHIND((planar_pack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, x, packed, norms);
}

}  // namespace

namespace protokernels {

int launch_contrastive_pack(const ContrastivePack& p, void* stream) {
  if (p.R == 0) return 0;
  switch (p.x_kind) {
    case Kind::f32: return pack<float, float>(p, stream);
    case Kind::f64: return pack<double, double>(p, stream);
    case Kind::bf16: return pack<float, __nv_bfloat16>(p, stream);
    default: return pack<float, __half>(p, stream);
  }
}

}  // namespace protokernels
