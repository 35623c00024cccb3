// SPDX-License-Identifier: MIT
// Around the losses on the GPU: vectors out of images or embeddings, their gradient back, and the derivative of losses by the statistics of
// rows. The equations stand in ops/contrastive.h.
//
// Four threads have a row, each of them 4 of every 16 channels; that is the order in which squares and products add up, whatever the layout of x.
// planar kernels: the channels of a position lie far apart. A block has 32 rows; a warp reads a channel of all of them, which lie in short runs of
// a row of the image, and a square of shared memory turns them round, so that vectors are written whole. interleaved kernels: the channels lie
// side by side, and a thread's four come at once where they are aligned.
// Up to 64 channels stay in registers between the sum and the division; more are read twice, the second time from a cache.
// All are limited by memory: at 4 x 16 x 160 x 160 they move 6.6 MB each way, 3 us on an H200.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int THREADS = 128, ROWS = THREADS / 4;         // of a block
constexpr int COEFFICIENT_THREADS = 256;
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

// ------------------------------------------------------------------------------------------------------------------------- pack

// resources: spills at most 12 bytes (sm_80, sm_100; none on sm_90)
template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_pack_kernel(const Pack<T, X> p, const X* x, T* packed, T* norms) {
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

// ----------------------------------------------------------------------------------------------------------------------- unpack

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

template <class T, class X>
__global__ void __launch_bounds__(THREADS) planar_unpack_kernel(const Pack<T, X> p, const Gradients<T> in, X* grad_x) {
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

// ------------------------------------------------------------------------------------------------------------------ coefficients

template <class T>
__global__ void __launch_bounds__(COEFFICIENT_THREADS) coefficients_kernel(const ContrastiveCoefficients p) {
  const int64_t R = p.R, row = static_cast<int64_t>(blockIdx.x) * COEFFICIENT_THREADS + threadIdx.x;
  if (row >= R) return;
  const T* const statistics = static_cast<const T*>(p.statistics);
  T* const out = static_cast<T*>(p.coefficients);
  const ContrastiveForm form = p.form;
  const ContrastiveRange* const ranges = p.ranges;
  const T p_log = statistics[row], n = statistics[R + row];
  T g = p.grad_losses ? static_cast<const T*>(p.grad_losses)[row] : T(0);
  if (p.grad_total) g += static_cast<T>(static_cast<double>(*static_cast<const T*>(p.grad_total)) * p.weights[row]);
  const int positives = positives_of(range_at(ranges, static_cast<int>(row)));
  T dp = 0, dn = 0, dl = 0;
  if (has_loss(form, p_log, n) && !is_certain(n, positives)) {
    const T count = static_cast<T>(positives);
    // exp(p) and exp(n) as shares of their sum
    const T of_n = n == -T(INFINITY) ? T(0) : T(1) / (T(1) + exponential(p_log - n)), of_p = T(1) / (T(1) + exponential(n - p_log));
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

// Four channels of every vector lie at a multiple of their size (16 bytes at the most).
template <class X>
bool fours_are_aligned(const void* x, const ContrastivePack& p) {
  constexpr uintptr_t size = 4 * sizeof(X) > 16 ? 16 : 4 * sizeof(X);
  const int64_t strides = p.stride_n * (p.N > 1) | p.stride_p * (p.P > 1);
  return reinterpret_cast<uintptr_t>(x) % size == 0 && strides * static_cast<int64_t>(sizeof(X)) % static_cast<int64_t>(size) == 0;
}

dim3 blocks_for(int64_t count, int of_block) { return dim3(static_cast<unsigned>((count + of_block - 1) / of_block)); }

template <class T, class X>
int pack(const ContrastivePack& p, void* stream) {
  const Pack<T, X> problem(p);
  const X* const x = static_cast<const X*>(p.x);
  T* const packed = static_cast<T*>(p.packed);
  T* const norms = static_cast<T*>(p.norms);
  if (p.stride_c == 1)
    return PK_LAUNCH((interleaved_pack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, x,
                     fours_are_aligned<X>(x, p), packed, norms);
  return PK_LAUNCH((planar_pack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, x, packed, norms);
}

template <class T, class X>
int unpack(const ContrastiveUnpack& p, void* stream) {
  const Pack<T, X> problem(p);
  const Gradients<T> in{static_cast<const T*>(p.grad_packed), static_cast<const T*>(p.packed), static_cast<const T*>(p.norms)};
  X* const grad_x = static_cast<X*>(p.grad_x);
  if (p.stride_c == 1)
    return PK_LAUNCH((interleaved_unpack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, in,
                     fours_are_aligned<X>(grad_x, p), grad_x);
  return PK_LAUNCH((planar_unpack_kernel<T, X>), blocks_for(p.R, ROWS), dim3(THREADS), 0, stream, problem, in, grad_x);
}

template <class T>
int coefficients(const ContrastiveCoefficients& p, void* stream) {
  return PK_LAUNCH((coefficients_kernel<T>), blocks_for(p.R, COEFFICIENT_THREADS), dim3(COEFFICIENT_THREADS), 0, stream, p);
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
