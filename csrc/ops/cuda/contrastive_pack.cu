// SPDX-License-Identifier: MIT
// Around the losses on the GPU: vectors out of images or embeddings, their gradient back, and the derivative of losses by the statistics of
// rows. The equations stand in ops/contrastive.h.
//
// planar kernels: the channels of a position lie far apart. A block takes 32 positions; a warp reads one channel of all of them, which lie in short
// runs of a row of the image, and a square of shared memory turns them round, so that vectors are written whole. Images are read twice, the second
// time from a cache. interleaved kernels: the channels lie side by side; a warp has one vector.
// All are limited by memory: at 4 x 16 x 160 x 160 they move 6.6 MB each way, 3 us on an H200. Not yet run on a GPU; run in the emulator.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, POSITIONS = 32, CHUNK = 16;  // of a planar block: positions, channels at a time

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
  int64_t R, C, P, Cp, stride_n, stride_c, stride_p;
  const int64_t* order;  // [R]
  bool normalize;

  explicit Pack(const ContrastivePack& p)
      : R(p.R),
        C(p.C),
        P(p.P),
        Cp(p.Cp),
        stride_n(p.stride_n),
        stride_c(p.stride_c),
        stride_p(p.stride_p),
        order(p.order),
        normalize(p.normalize) {}
  // Of the first channel of a row's position.
  __device__ __forceinline__ int64_t place(int64_t row) const {
    const int64_t position = order[row], n = position / P;
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

// ------------------------------------------------------------------------------------------------------------------------- pack

template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_pack_kernel(const Pack<T, X> p, const X* x, T* packed, T* norms) {
  PK_SHARED(T, tile, POSITIONS, CHUNK + 1);
  PK_SHARED(double, squares, WARPS, POSITIONS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * POSITIONS, row = row0 + lane;
  const X* const source = x + (row < p.R ? p.place(row) : 0);
  double sum = 0;
  if (p.normalize && row < p.R) {
    for (int64_t c = warp; c < p.C; c += WARPS) {
      const double value = widen(source[c * p.stride_c]);
      sum += value * value;
    }
  }
  squares[warp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < WARPS; ++w) sum += squares[w][lane];
  const Length<T> length(p.normalize, sum);
  if (warp == 0 && row < p.R) norms[row] = length.divisor;
  for (int64_t c0 = 0; c0 < p.Cp; c0 += CHUNK) {
#pragma unroll
    for (int k = warp; k < CHUNK; k += WARPS) {
      const bool present = row < p.R && c0 + k < p.C;
      tile[lane][k] = present ? length.scaled(static_cast<T>(widen(source[(c0 + k) * p.stride_c]))) : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < POSITIONS * CHUNK; i += THREADS)
      if (row0 + i / CHUNK < p.R) packed[(row0 + i / CHUNK) * p.Cp + c0 + i % CHUNK] = tile[i / CHUNK][i % CHUNK];
    __syncthreads();
  }
}

template <class T, class X>
__global__ void __launch_bounds__(THREADS) interleaved_pack_kernel(const Pack<T, X> p, const X* x, T* packed, T* norms) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= p.R) return;
  const X* const source = x + p.place(row);
  double sum = 0;
  if (p.normalize) {
    for (int64_t c = lane; c < p.C; c += 32) {
      const double value = widen(source[c]);
      sum += value * value;
    }
    sum = warp_sum(sum);
  }
  const Length<T> length(p.normalize, sum);
  if (lane == 0) norms[row] = length.divisor;
  for (int64_t c = lane; c < p.Cp; c += 32) packed[row * p.Cp + c] = c < p.C ? length.scaled(static_cast<T>(widen(source[c]))) : T(0);
}

// ----------------------------------------------------------------------------------------------------------------------- unpack

template <class T>
struct Gradients {
  const T* grad_packed;  // [R, Cp]
  const T* packed;       // [R, Cp]
  const T* norms;        // [R]
};

template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, X* grad_x) {
  PK_SHARED(T, tile, POSITIONS, CHUNK + 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * POSITIONS, row = row0 + lane;
  constexpr int ROWS_OF_THREAD = POSITIONS * CHUNK / THREADS;
  T along[ROWS_OF_THREAD], norm[ROWS_OF_THREAD];  // of the rows this thread reads, 16 threads to a row
#pragma unroll
  for (int i = 0; i < ROWS_OF_THREAD; ++i) {
    const int64_t from = row0 + (threadIdx.x + i * THREADS) / CHUNK;
    T sum = 0;
    if (p.normalize && from < p.R)
      for (int64_t c = threadIdx.x % CHUNK; c < p.Cp; c += CHUNK) sum += in.packed[from * p.Cp + c] * in.grad_packed[from * p.Cp + c];
#pragma unroll
    for (int step = CHUNK / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    along[i] = sum;
    norm[i] = from < p.R ? in.norms[from] : T(1);
  }
  X* const target = grad_x + (row < p.R ? p.place(row) : 0);
  for (int64_t c0 = 0; c0 < p.Cp; c0 += CHUNK) {
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; ++i) {
      const int at = threadIdx.x + i * THREADS, k = at % CHUNK;
      const int64_t from = (row0 + at / CHUNK) * p.Cp + c0 + k;
      if (row0 + at / CHUNK >= p.R) continue;
      const T df = in.grad_packed[from];
      tile[at / CHUNK][k] = p.normalize ? (df - in.packed[from] * along[i]) / norm[i] : df;
    }
    __syncthreads();
#pragma unroll
    for (int k = warp; k < CHUNK; k += WARPS)
      if (row < p.R && c0 + k < p.C) narrow(target[(c0 + k) * p.stride_c], tile[lane][k]);
    __syncthreads();
  }
}

template <class T, class X>
__global__ void __launch_bounds__(THREADS) interleaved_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, X* grad_x) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= p.R) return;
  const T* const f = in.packed + row * p.Cp;
  const T* const df = in.grad_packed + row * p.Cp;
  T along = 0;
  if (p.normalize) {
    for (int64_t c = lane; c < p.C; c += 32) along += f[c] * df[c];
    along = warp_sum(along);
  }
  const T norm = in.norms[row];
  X* const target = grad_x + p.place(row);
  for (int64_t c = lane; c < p.C; c += 32) narrow(target[c], p.normalize ? (df[c] - f[c] * along) / norm : df[c]);
}

// ------------------------------------------------------------------------------------------------------------------ coefficients

template <class T>
__global__ void __launch_bounds__(THREADS) coefficients_kernel(int64_t R, ContrastiveForm form, const ContrastiveRange* ranges,
                                                               const T* grad_losses, const T* statistics, T* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= R) return;
  const T p = statistics[row], n = statistics[R + row], g = grad_losses[row];
  const int positives = positives_of(range_at(ranges, static_cast<int>(row)));
  T dp = 0, dn = 0, dl = 0;
  if (has_loss(form, p, n) && !is_certain(n, positives)) {
    const T count = static_cast<T>(positives);
    // exp(p) and exp(n) as shares of their sum
    const T of_n = n == -T(INFINITY) ? T(0) : T(1) / (T(1) + exponential(p - n)), of_p = T(1) / (T(1) + exponential(n - p));
    switch (form) {
      case ContrastiveForm::supcon: dp = g * of_p, dn = g * of_n, dl = -g / count; break;
      case ContrastiveForm::in: dp = -g * of_n, dn = g * of_n; break;
      case ContrastiveForm::paper: dp = -g / count, dn = g / count; break;
      default: dn = g, dl = -g / count;
    }
  }
  out[row] = dp, out[R + row] = dn, out[2 * R + row] = dl;
}

// ------------------------------------------------------------------------------------------------------------------------ launch

dim3 blocks_for(int64_t count, int of_block) { return dim3(static_cast<unsigned>((count + of_block - 1) / of_block)); }

template <class T, class X>
int pack(const ContrastivePack& p, void* stream) {
  const Pack<T, X> problem(p);
  const X* const x = static_cast<const X*>(p.x);
  T* const packed = static_cast<T*>(p.packed);
  T* const norms = static_cast<T*>(p.norms);
  if (p.stride_c == 1)
    return PK_LAUNCH((interleaved_pack_kernel<T, X>), blocks_for(p.R, WARPS), dim3(THREADS), 0, stream, problem, x, packed, norms);
  return PK_LAUNCH((planar_pack_kernel<T, X>), blocks_for(p.R, POSITIONS), dim3(THREADS), 0, stream, problem, x, packed, norms);
}

template <class T, class X>
int unpack(const ContrastiveUnpack& p, void* stream) {
  const Pack<T, X> problem(p);
  const Gradients<T> in{static_cast<const T*>(p.grad_packed), static_cast<const T*>(p.packed), static_cast<const T*>(p.norms)};
  X* const grad_x = static_cast<X*>(p.grad_x);
  if (p.stride_c == 1)
    return PK_LAUNCH((interleaved_unpack_kernel<T, X>), blocks_for(p.R, WARPS), dim3(THREADS), 0, stream, problem, in, grad_x);
  return PK_LAUNCH((planar_unpack_kernel<T, X>), blocks_for(p.R, POSITIONS), dim3(THREADS), 0, stream, problem, in, grad_x);
}

template <class T>
int coefficients(const ContrastiveCoefficients& p, void* stream) {
  return PK_LAUNCH((coefficients_kernel<T>), blocks_for(p.R, THREADS), dim3(THREADS), 0, stream, p.R, p.form, p.ranges,
                   static_cast<const T*>(p.grad_losses), static_cast<const T*>(p.statistics), static_cast<T*>(p.coefficients));
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

int launch_contrastive_unpack(const ContrastiveUnpack& p, void* stream) {
  if (p.R == 0) return 0;
  switch (p.x_kind) {
    case Kind::f32: return unpack<float, float>(p, stream);
    case Kind::f64: return unpack<double, double>(p, stream);
    case Kind::bf16: return unpack<float, __nv_bfloat16>(p, stream);
    default: return unpack<float, __half>(p, stream);
  }
}

int launch_contrastive_coefficients(const ContrastiveCoefficients& p, void* stream) {
  if (p.R == 0) return 0;
  return p.double_compute ? coefficients<double>(p, stream) : coefficients<float>(p, stream);
}

}  // namespace protokernels
