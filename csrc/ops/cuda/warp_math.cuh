// SPDX-License-Identifier: MIT
// What all kernels of warp share: images of any kind, normal numbers, taps, paddings, sums over a block and over the blocks of a sample.
#pragma once

#include "common/arithmetic.cuh"
#include "common/pieces.h"
#include "common/simt.cuh"
#include "ops/warp.h"

namespace {

using namespace protokernels;

constexpr int THREADS = 256;
constexpr int MOST_TAPS = static_cast<int>(WARP_MOST_RADIUS) + 1;  // of one side, the middle included

// Elements of an image or of an intermediate result. mixed: T is float and the kind decides; else everything is T.
struct Array {
  void* data;
  Kind kind;

  template <class T, bool mixed>
  __device__ __forceinline__ Array from(int64_t first) const {
    const bool half = mixed && (kind == Kind::f16 || kind == Kind::bf16);
    return {static_cast<char*>(data) + first * (half ? 2 : static_cast<int64_t>(sizeof(T))), kind};
  }
};

template <class T, bool mixed, class Index>
__device__ __forceinline__ T load(const Array& array, Index i) {
  if constexpr (mixed) {
    if (array.kind == Kind::f16) return __half2float(static_cast<const __half*>(array.data)[i]);
    if (array.kind == Kind::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(array.data)[i]);
  }
  return static_cast<const T*>(array.data)[i];
}

template <class T, bool mixed, class Index>
__device__ __forceinline__ void store(const Array& array, Index i, T value) {
  if constexpr (mixed) {
    if (array.kind == Kind::f16) {
      static_cast<__half*>(array.data)[i] = __float2half_rn(value);
      return;
    }
    if (array.kind == Kind::bf16) {
      static_cast<__nv_bfloat16*>(array.data)[i] = __float2bfloat16_rn(value);
      return;
    }
  }
  static_cast<T*>(array.data)[i] = value;
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float rounded(float x) { return rintf(x); }
__device__ __forceinline__ double rounded(double x) { return rint(x); }
__device__ __forceinline__ float floored(float x) { return floorf(x); }
__device__ __forceinline__ double floored(double x) { return floor(x); }
__device__ __forceinline__ void sine_cosine_pi(float x, float& sine, float& cosine) { sincospif(x, &sine, &cosine); }
__device__ __forceinline__ void sine_cosine_pi(double x, double& sine, double& cosine) { sincospi(x, &sine, &cosine); }

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == 0;
}

// ------------------------------------------------------------------------------------------------------------------------- noise

struct Words {
  unsigned w[4];
};

// Philox4x32-10 of the counter (q low, q high, 0, 0).
__device__ __forceinline__ Words philox(unsigned long long key, unsigned long long q) {
  unsigned c0 = static_cast<unsigned>(q), c1 = static_cast<unsigned>(q >> 32), c2 = 0, c3 = 0;
  unsigned k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long first = pk::multiply_wide(0xD2511F53u, c0), second = pk::multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<unsigned>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned>(second);
    c2 = static_cast<unsigned>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// sqrt(-2 ln u), u = (word + 1/2) 2^-32. The fast logarithm is known to 2^-22, absolutely or of itself, which above u = 0.7 is too little: there f = 1 - u,
// which a float holds to its last bit also near u = 1, and -ln(1 - f) / f - 1 by a polynomial, to 2^-27 of the logarithm up to f = 0.303.
__device__ __forceinline__ float pair_length(float, unsigned word) {
  const float f = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
  float p = 0.4188677668571472f;
  p = fmaf(p, f, -0.034077346324920654f);
  p = fmaf(p, f, 0.21639513969421387f);
  p = fmaf(p, f, 0.19259408116340637f);
  p = fmaf(p, f, 0.2505837678909302f);
  p = fmaf(p, f, 0.3333112299442291f);
  p = fmaf(p, f, 0.5000002980232239f);
  const float near = 2.0f * fmaf(p * f, f, f);
  const float far = -1.3862943611198906f * pk::log2_fast((static_cast<float>(word) + 0.5f) * 0x1p-32f);
  const float twice = f < 0.3f ? near : far;
  return twice * pk::rsqrt_fast(twice);
}
__device__ __forceinline__ double pair_length(double, unsigned word) {
  return sqrt(-2.0 * log((static_cast<double>(word) + 0.5) * 0x1p-32));
}

// Sine and cosine of 2 pi word 2^-32: the nearest quarter turn, and polynomials (Cephes) for the rest within an eighth.
__device__ __forceinline__ void pair_direction(unsigned word, float& sine, float& cosine) {
  const unsigned quarter = (word + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int>(word - (quarter << 30))) * 1.46291807926715968e-9f;  // pi / 2 2^-30
  const float square = x * x;
  float s = fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), c = fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f);
  s = fmaf(fmaf(s, square, -1.6666654611e-1f) * square, x, x);
  c = fmaf(fmaf(c, square, 4.166664568298827e-2f) * square, square, fmaf(-0.5f, square, 1.0f));
  const bool odd = (quarter & 1u) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if ((quarter & 2u) != 0) sine = -sine;
  if (((quarter + 1u) & 2u) != 0) cosine = -cosine;
}
__device__ __forceinline__ void pair_direction(unsigned word, double& sine, double& cosine) {
  sincospi(static_cast<double>(static_cast<int>(word)) * 0x1p-31, &sine, &cosine);
}

// The four numbers of elements 4 q, ..., 4 q + 3 of a sample.
template <class T>
__device__ __forceinline__ void normal_numbers(unsigned long long key, unsigned long long q, T (&n)[4]) {
  const Words words = philox(key, q);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const T length = pair_length(T(0), words.w[2 * pair]);
    T sine, cosine;
    pair_direction(words.w[2 * pair + 1], sine, cosine);
    n[2 * pair] = length * cosine;
    n[2 * pair + 1] = length * sine;
  }
}

// ------------------------------------------------------------------------------------------------------------------ taps, padding

// taps[k] = w_k and slopes[k] = dw_k / dsigma, k = 0, ..., reach: by the block's first warp, a lane has k, k + 32 and k + 64. Ends with a barrier.
template <class T>
__device__ __forceinline__ void make_taps(T sigma, int reach, T* taps, T* slopes) {
  constexpr int EACH = (MOST_TAPS + 31) / 32;
  __syncthreads();
  if (threadIdx.x < 32) {
    T power[EACH], total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int k = threadIdx.x + 32 * i;
      power[i] = 0;
      if (k > reach) continue;
      const T ratio = T(k) / sigma;
      power[i] = exponential(ratio * ratio / T(-2));
      const T both = k == 0 ? power[i] : 2 * power[i];
      total += both;
      squares = fused(both, T(k) * T(k), squares);
    }
    total = warp_sum(total), squares = warp_sum(squares);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int k = threadIdx.x + 32 * i;
      if (k > reach) continue;
      const T weight = power[i] / total;
      taps[k] = weight;
      slopes[k] = weight * (T(k) * T(k) - squares / total) / sigma / sigma / sigma;
    }
  }
  __syncthreads();
}

// The element that stands at position i of an axis with n elements; -1: a zero stands there.
__device__ __forceinline__ int padded_place(int i, int n, WarpBlurPadding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == WarpBlurPadding::zeros) return -1;
  if (padding == WarpBlurPadding::replicate || n == 1) return i < 0 ? 0 : n - 1;
  const int period = 2 * (n - 1);
  i %= period;
  if (i < 0) i += period;
  return i < n ? i : period - i;
}

// -------------------------------------------------------------------------------------------------------------------------- sums

// The block's sums of those values whose bit is set, warps in their order, written by its first threads: value i to column i, value 0 to column `first`.
template <int count, class T>
__device__ __forceinline__ void write_block_sums(const T (&values)[count], unsigned bits, int first, double* target) {
  PK_SHARED(double, of_warp, THREADS / 32, count);
  if constexpr (count == 1) {
    const T sum = warp_sum(values[0]);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][0] = static_cast<double>(sum);
  } else {
    // a lane gives half of its values away and takes its partner's share of the others: in the end EACH lanes have one sum
    constexpr int PLACES = count <= 8 ? 8 : 16, EACH = 32 / PLACES;
    static_assert(count <= PLACES);
    T kept[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; ++i) kept[i] = i < count ? values[i] : T(0);
#pragma unroll
    for (int half = PLACES / 2; half > 0; half /= 2) {
      const bool upper = (threadIdx.x & EACH * half) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const T mine = upper ? kept[i + half] : kept[i], other = upper ? kept[i] : kept[i + half];
        kept[i] = mine + __shfl_xor_sync(ALL, other, EACH * half);
      }
    }
#pragma unroll
    for (int lanes = EACH / 2; lanes > 0; lanes /= 2) kept[0] += __shfl_xor_sync(ALL, kept[0], lanes);
    const int i = threadIdx.x % 32 / EACH;
    if (threadIdx.x % EACH == 0 && i < count) of_warp[threadIdx.x / 32][i] = static_cast<double>(kept[0]);
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i < count && (bits >> i & 1u) != 0) {
    double sum = 0;
    for (int w = 0; w < THREADS / 32; ++w) sum += of_warp[w][i];
    target[i == 0 ? first : i] = sum;
  }
  __syncthreads();
}

// True in all threads of the block that is the last of so many to come here; what the others wrote before is visible then.
__device__ __forceinline__ bool arrives_last(unsigned* count, int64_t blocks) {
  PK_SHARED(int, last);
  if (blocks == 1) {
    __syncthreads();
    return true;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(count, 1u) + 1 == static_cast<unsigned>(blocks);
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// One column of a sample's partial sums [blocks, width], added up in a fixed order by a warp; all lanes have the sum.
__device__ __forceinline__ double column_sum(const double* partial, int64_t blocks, int width, int column) {
  double sum = 0;
  for (int64_t block = threadIdx.x % 32; block < blocks; block += 32) sum += __ldcg(partial + block * width + column);
  return warp_sum(sum);
}

}  // namespace
