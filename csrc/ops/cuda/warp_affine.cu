// SPDX-License-Identifier: MIT
// Affine warps of images and volumes on the GPU. The equations stand in ops/warp.h.
//
// A thread has one output pixel and all channels: coordinates are made once. Forward reads 2^dims pixels each; it is limited by memory where the
// matrix keeps neighbours together.
//
// Backward scatters, with any matrix, singular ones too, and any padding, and gives the same bits in every run: what an output adds to a pixel is
// rounded to a multiple of 2^-k and added as a 64-bit integer, whose sum knows no order. k is chosen per sample from the largest gradient in it, so that
// no sum can overflow: with N outputs a part is rounded at 2^-62 N of that gradient, 2^-46 of it at 256 x 256, far below float32. Three launches,
// one fill and 8 bytes of workspace per image element. A sample with a gradient that is not finite gets NaN.
// Gradients of the matrix: registers, warps, block, then the blocks of a sample in their order, in float64, by the one that comes last.
// Limit: atomics in the L2 cache, 4 or 8 an output element; by an estimate of 150 G a second 65 us at 16 x 3 x 224 x 224. Not yet timed.

#include "common/simt.cuh"
#include "ops/cuda/warp_math.cuh"
#include "ops/warp.h"

namespace {

constexpr int MOST_ENTRIES = 12;  // of a matrix

// Axes in the order x, y, z.
struct Affine {
  int64_t C, out_count, in_count, blocks;  // blocks of a sample
  int in[3], out[3];
  Array images;        // [B, C, D, H, W]
  const void* matrix;  // T [B, dims, dims + 1]
  WarpAffinePadding padding;
};

struct AffineGradient : Affine {
  Array grad;                   // [B, C, out]
  Array grad_images;            // or null
  void* grad_matrix;            // T, or null
  int entries;                  // of a matrix
  int bits;                     // log2 of the outputs of a sample, rounded up
  unsigned long long* largest;  // [B]: bits of the largest |grad| as float64
  unsigned long long* sums;     // [B, C, in]: fixed-point
  double* partial;              // [B, blocks, MOST_ENTRIES]
  unsigned* arrivals;           // [B]
};

// A coordinate inside the image in place of one beyond it, and its derivative.
template <class T>
__device__ __forceinline__ T within(T s, int n, WarpAffinePadding padding, T& slope) {
  slope = 1;
  if (padding == WarpAffinePadding::zeros) return s;
  const T last = T(n - 1);
  if (padding == WarpAffinePadding::reflection && last > 0) {
    const T distance = magnitude(s), flips = floored(distance / last), rest = distance - flips * last;
    const bool even = flips == 2 * floored(flips / 2);
    slope = (s < 0) == even ? T(-1) : T(1);
    s = even ? rest : last - rest;
  }
  if (s > 0 && s < last) return s;
  slope = 0;
  return s >= last ? last : T(0);
}

// Whether an entry is not finite: then the sample is NaN, output and gradients.
template <class T>
__device__ __forceinline__ bool is_void(const T* matrix, int entries) {
  bool found = false;
  for (int i = 0; i < entries; ++i) found = found || !is_finite(matrix[i]);
  return found;
}

// Where an output pixel reads: the lower neighbour on every axis, the share of the upper one, and how the coordinate follows the matrix.
template <class T, int dims>
struct Place {
  T offset[dims], share[dims], slope[dims];
  int low[dims];
  bool finite;

  __device__ __forceinline__ Place(const Affine& p, int64_t sample, int64_t pixel) {
    const T* const matrix = static_cast<const T*>(p.matrix) + sample * (dims * (dims + 1));
#pragma unroll
    for (int j = 0; j < dims; ++j) {
      offset[j] = T(static_cast<int>(pixel % p.out[j])) - T(p.out[j] - 1) / 2;
      pixel /= p.out[j];
    }
    finite = !is_void(matrix, dims * (dims + 1));
#pragma unroll
    for (int i = 0; i < dims; ++i) {
      const T* const row = matrix + i * (dims + 1);
      T s = row[0] * offset[0];
#pragma unroll
      for (int j = 1; j < dims; ++j) s = fused(row[j], offset[j], s);
      s += T(p.in[i] - 1) / 2 + row[dims];
      const bool here = is_finite(s);
      finite = finite && here;
      s = within(here ? s : T(0), p.in[i], p.padding, slope[i]);
      const T floor = floored(s);
      share[i] = s - floor;
      low[i] = static_cast<int>(floor < -2 ? T(-2) : floor > T(p.in[i] + 1) ? T(p.in[i] + 1) : floor);
    }
  }

  // Visits the 2^dims pixels inside the image with their place in the plane and their corner, bit i the upper one on axis i.
  template <class Visit>
  __device__ __forceinline__ void for_corners(const Affine& p, const Visit& visit) const {
#pragma unroll
    for (int corner = 0; corner < 1 << dims; ++corner) {
      bool inside = true;
      int64_t at = 0;
#pragma unroll
      for (int i = dims - 1; i >= 0; --i) {
        const int place = low[i] + (corner >> i & 1);
        inside = inside && place >= 0 && place < p.in[i];
        at = at * p.in[i] + place;
      }
      if (inside) visit(at, corner);
    }
  }
  // Of a corner without axis `skip`.
  __device__ __forceinline__ T weight(int corner, int skip = -1) const {
    T product = 1;
#pragma unroll
    for (int i = 0; i < dims; ++i)
      if (i != skip) product *= corner >> i & 1 ? share[i] : 1 - share[i];
    return product;
  }
};

template <class T, bool mixed, int dims>
__global__ void __launch_bounds__(THREADS) warp_affine_forward_kernel(const Affine p, const Array output) {
  const int64_t sample = blockIdx.x / p.blocks, pixel = blockIdx.x % p.blocks * THREADS + threadIdx.x;
  if (pixel >= p.out_count) return;
  const Place<T, dims> place(p, sample, pixel);
  for (int64_t plane = sample * p.C; plane < (sample + 1) * p.C; ++plane) {
    T value = 0;
    place.for_corners(
        p, [&](int64_t at, int corner) { value = fused(place.weight(corner), load<T, mixed>(p.images, plane * p.in_count + at), value); });
    store<T, mixed>(output, plane * p.out_count + pixel, place.finite ? value : T(NAN));
  }
}

// ---------------------------------------------------------------------------------------------------------------------- backward

constexpr unsigned long long INFINITE_BITS = 0x7ff0000000000000ull;

// The largest |gradient| of a sample: as integers the bits of float64 keep its order, and NaN is above all.
template <class T, bool mixed>
__global__ void __launch_bounds__(THREADS) warp_affine_largest_kernel(const AffineGradient p) {
  const int64_t sample = blockIdx.x / p.blocks, pixel = blockIdx.x % p.blocks * THREADS + threadIdx.x;
  unsigned long long bits = is_void(static_cast<const T*>(p.matrix) + sample * p.entries, p.entries) ? INFINITE_BITS : 0;
  for (int64_t plane = sample * p.C; plane < (sample + 1) * p.C && pixel < p.out_count; ++plane) {
    const double g = fabs(static_cast<double>(load<T, mixed>(p.grad, plane * p.out_count + pixel)));
    bits = max(bits, static_cast<unsigned long long>(__double_as_longlong(g)));
  }
  for (int step = 16; step > 0; step /= 2) bits = max(bits, __shfl_xor_sync(ALL, bits, step));
  if (threadIdx.x % 32 == 0 && bits > 0) atomicMax(p.largest + sample, bits);
}

// 2^k and 2^-k such that the sum of 2^bits numbers no larger than the largest fits 62 bits.
struct Scale {
  double up, down;
  bool finite;

  __device__ __forceinline__ Scale(unsigned long long largest, int bits) : finite(largest < INFINITE_BITS) {
    const int exponent = static_cast<int>(largest >> 52) - 1022;  // the largest is below 2^exponent
    const long long k = min(61 - bits - exponent, 1000);
    up = __longlong_as_double((k + 1023) << 52);
    down = __longlong_as_double((1023 - k) << 52);
  }
};

// Of a volume, lanes pick halves of its twelve sums by address, once a block: local memory, no spills.
// resources: spills at most 128 bytes
template <class T, bool mixed, int dims>
__global__ void __launch_bounds__(THREADS, 2) warp_affine_scatter_kernel(const AffineGradient p) {
  constexpr int ENTRIES = dims * (dims + 1);
  const int64_t sample = blockIdx.x / p.blocks, pixel = blockIdx.x % p.blocks * THREADS + threadIdx.x;
  T entries[ENTRIES] = {};
  if (pixel < p.out_count) {
    const Place<T, dims> place(p, sample, pixel);
    const bool scatters = p.grad_images.data != nullptr;
    const Scale scale(scatters ? p.largest[sample] : 0, p.bits);
    T by_coordinate[dims] = {};
    for (int64_t plane = sample * p.C; place.finite && plane < (sample + 1) * p.C; ++plane) {
      const T g = load<T, mixed>(p.grad, plane * p.out_count + pixel);
      place.for_corners(p, [&](int64_t at, int corner) {
        if (scatters && scale.finite) {
          const double part = static_cast<double>(place.weight(corner) * g) * scale.up;
          atomicAdd(p.sums + plane * p.in_count + at, static_cast<unsigned long long>(__double2ll_rn(part)));
        }
        if (p.grad_matrix) {
          const T value = load<T, mixed>(p.images, plane * p.in_count + at) * g;
#pragma unroll
          for (int i = 0; i < dims; ++i)
            by_coordinate[i] = fused(corner >> i & 1 ? value : -value, place.weight(corner, i), by_coordinate[i]);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < dims; ++i) {
      const T by_source = place.slope[i] == 0 ? T(0) : by_coordinate[i] * place.slope[i];
#pragma unroll
      for (int j = 0; j < dims; ++j) entries[i * (dims + 1) + j] = by_source * place.offset[j];
      entries[i * (dims + 1) + dims] = by_source;
    }
  }
  if (!p.grad_matrix) return;
  write_block_sums(entries, (1u << ENTRIES) - 1, 0, p.partial + static_cast<int64_t>(blockIdx.x) * MOST_ENTRIES);
  if (!arrives_last(p.arrivals + sample, p.blocks)) return;
  for (int entry = threadIdx.x / 32; entry < ENTRIES; entry += THREADS / 32) {
    const double sum = column_sum(p.partial + sample * p.blocks * MOST_ENTRIES, p.blocks, MOST_ENTRIES, entry);
    const bool void_sample = is_void(static_cast<const T*>(p.matrix) + sample * ENTRIES, ENTRIES);
    if (threadIdx.x % 32 == 0) static_cast<T*>(p.grad_matrix)[sample * ENTRIES + entry] = void_sample ? T(NAN) : static_cast<T>(sum);
  }
}

template <class T, bool mixed>
__global__ void __launch_bounds__(THREADS) warp_affine_finish_kernel(const AffineGradient p, int64_t blocks) {
  const int64_t sample = blockIdx.x / blocks, i = blockIdx.x % blocks * THREADS + threadIdx.x, count = p.C * p.in_count;
  if (i >= count) return;
  const Scale scale(p.largest[sample], p.bits);
  const double sum = static_cast<double>(static_cast<long long>(p.sums[sample * count + i])) * scale.down;
  store<T, mixed>(p.grad_images, sample * count + i, scale.finite ? static_cast<T>(sum) : T(NAN));
}

// ------------------------------------------------------------------------------------------------------------------------ launch

int64_t blocks_for(int64_t count) { return (count + THREADS - 1) / THREADS; }

void fill(Affine& a, const WarpAffineProblem& p) {
  a.C = p.C;
  a.in_count = a.out_count = 1;
  for (int axis = 0; axis < 3; ++axis) {
    a.in[axis] = static_cast<int>(p.in[2 - axis]), a.out[axis] = static_cast<int>(p.out[2 - axis]);
    a.in_count *= a.in[axis], a.out_count *= a.out[axis];
  }
  a.blocks = blocks_for(a.out_count);
  a.images = {const_cast<void*>(p.images), p.kind};
  a.matrix = p.matrix;
  a.padding = p.padding;
}

template <class T, bool mixed, int dims>
int launch_forward(const WarpAffineForward& p, void* stream) {
  Affine a;
  fill(a, p);
  return PK_LAUNCH((warp_affine_forward_kernel<T, mixed, dims>), dim3(static_cast<unsigned>(p.B * a.blocks)), dim3(THREADS), 0, stream, a,
                   Array{p.output, p.kind});
}

// What must be zero comes first; returns its size.
int64_t take_workspace(AffineGradient& a, const WarpAffineBackward& p, Pieces& pieces) {
  fill(a, p);
  a.entries = p.dims * (p.dims + 1);
  a.bits = 0;
  while ((int64_t{1} << a.bits) < a.out_count) ++a.bits;
  a.grad = {const_cast<void*>(p.grad), p.kind};
  a.grad_images = {p.grad_images, p.kind};
  a.grad_matrix = p.grad_matrix;
  a.largest = pieces.take<unsigned long long>(p.grad_images ? p.B : 0);
  a.sums = pieces.take<unsigned long long>(p.grad_images ? p.B * p.C * a.in_count : 0);
  a.arrivals = pieces.take<unsigned>(p.grad_matrix ? p.B : 0);
  const int64_t zeros = pieces.bytes();
  a.partial = pieces.take<double>(p.grad_matrix ? p.B * a.blocks * MOST_ENTRIES : 0);
  return zeros;
}

template <class T, bool mixed, int dims>
int launch_backward(const WarpAffineBackward& p, void* workspace, void* stream) {
  AffineGradient a;
  Pieces pieces(workspace);
  const int64_t zeros = take_workspace(a, p, pieces), finish_blocks = blocks_for(p.C * a.in_count);
  const dim3 grid(static_cast<unsigned>(p.B * a.blocks)), block(THREADS);
  int status = zeros > 0 ? pk::memset_async(workspace, 0, static_cast<std::size_t>(zeros), stream) : 0;
  if (status == 0 && p.grad_images) status = PK_LAUNCH((warp_affine_largest_kernel<T, mixed>), grid, block, 0, stream, a);
  if (status == 0) status = PK_LAUNCH((warp_affine_scatter_kernel<T, mixed, dims>), grid, block, 0, stream, a);
  if (status == 0 && p.grad_images)
    status = PK_LAUNCH((warp_affine_finish_kernel<T, mixed>), dim3(static_cast<unsigned>(p.B * finish_blocks)), block, 0, stream, a,
                       finish_blocks);
  return status;
}

// launch(T, mixed, dims) as types and constants, by kind and number of axes.
template <class Launch>
int by_kind(const WarpAffineProblem& p, const Launch& launch) {
  const bool flat = p.dims == 2;
  switch (p.kind) {
    case Kind::f32: return flat ? launch.template operator()<float, false, 2>() : launch.template operator()<float, false, 3>();
    case Kind::f64: return flat ? launch.template operator()<double, false, 2>() : launch.template operator()<double, false, 3>();
    default: return flat ? launch.template operator()<float, true, 2>() : launch.template operator()<float, true, 3>();
  }
}

}  // namespace

namespace protokernels {

int64_t warp_affine_forward_workspace(const WarpAffineForward&) { return 0; }

int launch_warp_affine_forward(const WarpAffineForward& p, void*, void* stream) {
  return by_kind(p, [&]<class T, bool mixed, int dims>() { return launch_forward<T, mixed, dims>(p, stream); });
}

int64_t warp_affine_backward_workspace(const WarpAffineBackward& p) {
  AffineGradient a;
  Pieces pieces(nullptr);
  take_workspace(a, p, pieces);
  return pieces.bytes();
}

int launch_warp_affine_backward(const WarpAffineBackward& p, void* workspace, void* stream) {
  return by_kind(p, [&]<class T, bool mixed, int dims>() { return launch_backward<T, mixed, dims>(p, workspace, stream); });
}

}  // namespace protokernels
