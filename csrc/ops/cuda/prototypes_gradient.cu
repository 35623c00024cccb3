// SPDX-License-Identifier: MIT
// Gradient of the soft assignment on the GPU, continued: the prototypes' and the temperature's. The equations stand in ops/prototypes.h.
//
// parts_kernel: weights^T z over a block's share of the rows, weights being the gradients of the scores (prototypes_backward.cu). All of [K, D] is in
// the registers of a block; rows come to shared memory 32 at a time, two such stages ahead. The sum runs over rows, which share no scale, so the
// products are three of tf32 numbers, whose range is that of float.
// finish_kernel: adds up the blocks' parts in order, in float64, and goes on to the gradient.
// Limit at B = 65536, D = 128, K = 256 on an H200: memory, 24 us; mma.sync at its rate for tf32, about 40 us. Measured: 86 us.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_gradient.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int ROWS = 32;  // of a stage
constexpr int STAGES = 3;
constexpr int PANEL = 64;  // prototypes
constexpr int MAX_PARTS = 128;

template <class Z>
struct Parts {
  int64_t B, rows;  // of a block
  int K, D;
  int64_t z_stride;
  const Z* z;            // [B, D]
  bool z_aligned;        // 16-byte pieces
  const float* weights;  // [B, PANELS * PANEL]
  float* gradients;      // [blocks, K, D]
};

// A float as the sum of two tf32 numbers, without cvt.rna.tf32, which runs at an eighth of the rate: the rounding is an addition; the tensor cores ignore
// the lower 13 bits of the second, which carries NaN.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

template <int PANELS, int F, class Z>
struct Stage {
  static constexpr int WEIGHTS_STRIDE = PANELS * PANEL + 8;  // 8 member + group: the fragments of a warp touch 32 different banks
  static constexpr int Z_STRIDE = F * 8 + (sizeof(Z) == 4 ? 8 : 16);
  static constexpr int BYTES = ROWS * (WEIGHTS_STRIDE * 4 + Z_STRIDE * static_cast<int>(sizeof(Z)));
};

// Starts the copy of rows row0 ... of the block, which ends before `end`.
template <int PANELS, int F, class Z>
__device__ __forceinline__ void copy_stage(const Parts<Z>& p, int64_t row0, int64_t end, unsigned char* stage) {
  using S = Stage<PANELS, F, Z>;
  float* const weights = reinterpret_cast<float*>(stage);
  Z* const z = reinterpret_cast<Z*>(weights + ROWS * S::WEIGHTS_STRIDE);
  constexpr int PIECES = PANELS * PANEL / 4;
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
    const int r = i / PIECES, k = i % PIECES * 4;
    const bool valid = row0 + r < end;
    pk::copy_async_16(weights + r * S::WEIGHTS_STRIDE + k, valid ? p.weights + (row0 + r) * (PANELS * PANEL) + k : p.weights, valid);
  }
  if (p.z_aligned) {
    constexpr int EACH = 16 / static_cast<int>(sizeof(Z)), Z_PIECES = F * 8 / EACH;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * Z_PIECES; i += THREADS) {
      const int r = i / Z_PIECES, d = i % Z_PIECES * EACH;
      const bool valid = row0 + r < end && d < p.D;
      pk::copy_async_16(z + r * S::Z_STRIDE + d, valid ? p.z + (row0 + r) * p.z_stride + d : p.z, valid);
    }
  } else {
    for (int i = threadIdx.x; i < ROWS * F * 8; i += THREADS) {
      const int r = i / (F * 8), d = i % (F * 8);
      z[r * S::Z_STRIDE + d] = row0 + r < end && d < p.D ? p.z[(row0 + r) * p.z_stride + d] : Z(0.0f);
    }
  }
}

// resources: dynamic shared 153600 bytes
template <class Z, int PANELS, int F>
__global__ void __launch_bounds__(THREADS, 1) parts_kernel(const Parts<Z> p) {
  using S = Stage<PANELS, F, Z>;
  constexpr int SIDES = PANELS == 1 ? 2 : 1;             // warps that share the dimensions of the same prototypes
  constexpr int M = PANELS == 4 ? 2 : 1, N = F / SIDES;  // fragments of a warp
  PK_DYNAMIC_SHARED(unsigned char, memory);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const int k0 = warp / SIDES * M * 16, d0 = warp % SIDES * N * 8;
  const int64_t begin = blockIdx.x * p.rows, end = p.B - begin < p.rows ? p.B : begin + p.rows;
  pk::wait_for_previous();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    copy_stage<PANELS, F>(p, begin + s * ROWS, end, memory + s * S::BYTES);
    pk::copy_async_commit();
  }
  float sum[M][N][4] = {};
  int at = 0;
  for (int64_t row0 = begin; row0 < end; row0 += ROWS) {
    pk::copy_async_wait<STAGES - 2>();
    __syncthreads();
    const int ahead = at == 0 ? STAGES - 1 : at - 1;
    copy_stage<PANELS, F>(p, row0 + (STAGES - 1) * ROWS, end, memory + ahead * S::BYTES);
    pk::copy_async_commit();
    const float* const weights = reinterpret_cast<const float*>(memory + at * S::BYTES);
    const Z* const z = reinterpret_cast<const Z*>(weights + ROWS * S::WEIGHTS_STRIDE);
#pragma unroll 1
    for (int r = member; r < ROWS; r += 8) {
      unsigned high[M][4], low[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          split(weights[(r + i / 2 * 4) * S::WEIGHTS_STRIDE + k0 + m * 16 + i % 2 * 8 + group], high[m][i], low[m][i]);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        unsigned z_high[2], z_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) split(widen(z[(r + i * 4) * S::Z_STRIDE + d0 + n * 8 + group]), z_high[i], z_low[i]);
#pragma unroll
        for (int m = 0; m < M; ++m) pk::mma_m16n8k8_tf32(sum[m][n], low[m], z_high);
#pragma unroll
        for (int m = 0; m < M; ++m) pk::mma_m16n8k8_tf32(sum[m][n], high[m], z_low);
#pragma unroll
        for (int m = 0; m < M; ++m) pk::mma_m16n8k8_tf32(sum[m][n], high[m], z_high);
      }
    }
    at = at == STAGES - 1 ? 0 : at + 1;
  }
  pk::copy_async_wait<0>();
  float* const gradients = p.gradients + static_cast<int64_t>(blockIdx.x) * p.K * p.D;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = k0 + m * 16 + i / 2 * 8 + group, d = d0 + n * 8 + member * 2 + i % 2;
        if (k < p.K && d < p.D) gradients[k * p.D + d] = sum[m][n][i];
      }
}

// ---------------------------------------------------------------------------------------------------------------------- finish

constexpr int FINISH_THREADS = 512;
constexpr int MAX_D = 128;
constexpr int SHARES = FINISH_THREADS / MAX_D;  // threads on an element, each with a share of the parts

struct Finish {
  int64_t parts, temperature_parts;
  int K, D;
  const float* gradients;      // [parts, K, D] or null
  const double* temperatures;  // [temperature_parts]
  const float* prototypes;     // [K, D]
  const float* temperature_pointer;
  double temperature;
  bool cosine;
  void* grad_prototypes;  // [K, D] of kind
  Kind kind;
  float* grad_temperature;
};

// The sum over a block's threads, the same in all of them.
__device__ __forceinline__ double block_sum(double x, double (&of_warp)[FINISH_THREADS / 32]) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < FINISH_THREADS / 32; ++w) sum += of_warp[w];
  return sum;
}

// A block per prototype; the last one has the temperature.
__global__ void __launch_bounds__(FINISH_THREADS) gradient_kernel(const Finish p) {
  PK_SHARED(double, shares, SHARES, MAX_D);
  PK_SHARED(double, of_warp, FINISH_THREADS / 32);
  const int d = threadIdx.x % MAX_D, share = threadIdx.x / MAX_D, k = blockIdx.x;
  pk::wait_for_previous();
  const double inverse_t = 1.0 / (p.temperature_pointer ? static_cast<double>(*p.temperature_pointer) : p.temperature);
  if (k == static_cast<int>(gridDim.x) - 1) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < p.temperature_parts; i += FINISH_THREADS) sum += p.temperatures[i];
    sum = block_sum(sum, of_warp);
    if (threadIdx.x == 0) *p.grad_temperature = static_cast<float>(-(sum * inverse_t));
    return;
  }
  const int64_t at = static_cast<int64_t>(k) * p.D + d, each = (p.parts + SHARES - 1) / SHARES;
  double sum = 0;
  if (d < p.D) {
#pragma unroll 16
    for (int64_t b = share * each; b < (share + 1) * each && b < p.parts; ++b) sum += p.gradients[b * p.K * p.D + at];
  }
  shares[share][d] = sum;
  const bool mine = share == 0 && d < p.D;
  const double q = mine ? static_cast<double>(p.prototypes[at]) : 0.0;
  const double squared = p.cosine ? block_sum(q * q, of_warp) : 1.0;
  const double inverse = !p.cosine ? 1.0 : squared <= PROTOTYPE_NORM_FLOOR * PROTOTYPE_NORM_FLOOR ? 0.0 : 1.0 / sqrt(squared);
  __syncthreads();
  double t = 0;
  if (mine)
    for (int s = 0; s < SHARES; ++s) t += shares[s][d];
  t *= inverse_t;
  const double along = p.cosine ? block_sum(t * q * inverse, of_warp) : 0.0;
  if (mine) write_kind(p.grad_prototypes, p.kind, at, p.cosine ? (t - q * inverse * along) * inverse : t);
}

// ---------------------------------------------------------------------------------------------------------------------- launch

int64_t rows_of_part(int64_t B) {
  const int64_t rows = (B + MAX_PARTS - 1) / MAX_PARTS;
  return rows > ROWS ? (rows + ROWS - 1) / ROWS * ROWS : ROWS;
}

template <class Z, int PANELS, int F>
int launch_parts(const PrototypesBackward& p, const PrototypesGradientParts& parts, void* stream) {
  const Parts<Z> of{p.B,
                    rows_of_part(p.B),
                    static_cast<int>(p.K),
                    static_cast<int>(p.D),
                    p.z_stride,
                    static_cast<const Z*>(p.z),
                    aligned_rows(p.z, p.z_stride, p.D, sizeof(Z), 16),
                    parts.weights,
                    parts.gradients};
  return PK_LAUNCH_BEHIND((parts_kernel<Z, PANELS, F>), dim3(static_cast<unsigned>(parts.parts)), dim3(THREADS),
                          STAGES * Stage<PANELS, F, Z>::BYTES, stream, of);
}

template <class Z>
int launch_sizes(const PrototypesBackward& p, const PrototypesGradientParts& parts, void* stream) {
  if (p.K <= PANEL) return p.D <= 64 ? launch_parts<Z, 1, 8>(p, parts, stream) : launch_parts<Z, 1, 16>(p, parts, stream);
  return p.K <= 2 * PANEL ? launch_parts<Z, 2, 16>(p, parts, stream) : launch_parts<Z, 4, 16>(p, parts, stream);
}

}  // namespace

namespace protokernels {

int64_t prototypes_gradient_parts(int64_t B) {
  const int64_t rows = rows_of_part(B);
  return (B + rows - 1) / rows;
}

int launch_prototypes_gradient(const PrototypesBackward& p, const PrototypesGradientParts& parts, void* stream) {
  if (p.grad_prototypes && parts.parts > 0) {
    int status = 0;
    switch (p.z_kind) {
      case Kind::f32: status = launch_sizes<float>(p, parts, stream); break;
      case Kind::bf16: status = launch_sizes<__nv_bfloat16>(p, parts, stream); break;
      default: status = launch_sizes<__half>(p, parts, stream);
    }
    if (status != 0) return status;
  }
  const Finish finish{parts.parts,
                      parts.temperature_parts,
                      static_cast<int>(p.K),
                      static_cast<int>(p.D),
                      parts.gradients,
                      parts.temperatures,
                      static_cast<const float*>(p.prototypes),
                      static_cast<const float*>(p.temperature_pointer),
                      p.temperature,
                      p.cosine,
                      p.grad_prototypes,
                      p.grad_prototypes_kind,
                      static_cast<float*>(p.grad_temperature)};
  const dim3 blocks(static_cast<unsigned>((p.grad_prototypes ? p.K : 0) + 1));
  return PK_LAUNCH_BEHIND(gradient_kernel, blocks, dim3(FINISH_THREADS), 0, stream, finish);
}

}  // namespace protokernels
