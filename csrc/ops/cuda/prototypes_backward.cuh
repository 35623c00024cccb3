// SPDX-License-Identifier: MIT
// A warp's share of prototypes_backward.cu: the gradient of sixteen rows' scores, and of the rows from the products with the prototypes.
//
// The products run over prototypes, so what shares a row's scale in prototypes_resident.cuh shares it here: a prototype's scale and factor go to the
// other side, into the gradient of the score, which is then scaled by rows itself. Prototypes and dimensions have changed places: the sixteen k of a
// step and the columns of two fragments are renamed as there, so a lane reads four neighbouring prototypes and ends with four neighbouring dimensions.
#pragma once

#include "common/hopper.cuh"
#include "ops/cuda/prototypes_resident.cuh"

namespace {

template <class Z>
struct Backward {
  int64_t B, tiles;
  int K, D;
  int weights_stride;  // 64, 128 or 256
  int64_t z_stride;
  const Z* z;               // [B, D]
  const float* prototypes;  // [K, D]
  const float* temperature_pointer;
  double temperature;
  bool cosine, k_aligned, z_aligned;  // rows of [B, K], of z: whole pieces of four
  const float* assignment;            // [B, K]
  const float* grad_assignment;       // [B, K]
  const float* grad_entropy;          // [B] or null
  Z* grad_z;                          // [B, D]
  float* weights;                     // [B, weights_stride] or null: gradient of the score, over |z| for cosine
  double* temperature_parts;          // [blocks]: sums of <z, t>
};

// Four values of a row of [B, K], zeros behind its end.
template <bool plain, class Z>
__device__ __forceinline__ void load_scores(const Backward<Z>& p, const float* row, int k, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = 0;
  if (plain || p.k_aligned) {
    if (k < p.K) load_four(row + k, x);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k + i < p.K) x[i] = row[k + i];
  }
}

template <class Z>
__device__ __forceinline__ void load_row(const Backward<Z>& p, const Z* row, int d, float (&x)[4]) {
  if (p.z_aligned && d < p.D) return load_four(row + d, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = d + i < p.D ? static_cast<float>(widen(row[d + i])) : 0.0f;
}

__device__ __forceinline__ void store_value(float* to, float x) { *to = x; }
__device__ __forceinline__ void store_value(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_value(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void store_four(float* to, const float (&x)[4]) { pk::store_vector(to, float4{x[0], x[1], x[2], x[3]}); }
template <class Z>
__device__ __forceinline__ void store_four(Z* to, const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) store_value(to + i, x[i]);
}

// A row's length, by the four lanes that share it.
struct Length {
  Scale scale;
  float factor;  // 1 / |z| of the scaled row, 0 for a zero row; 1 / scale.up where vectors are not normalised
};

template <int F, class Z>
__device__ __forceinline__ Length length_of(const Backward<Z>& p, const Z* row, bool valid) {
  if (!p.cosine) return {{1.0f, 1.0f}, 1.0f};
  float x[F / 2][4];
  unsigned largest = 0;
#pragma unroll
  for (int pair = 0; pair < F / 2; ++pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[pair][i] = 0;
    if (valid) load_row(p, row, pair * 16 + threadIdx.x % 4 * 4, x[pair]);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(x[pair][i]));
  }
  const Scale scale = scale_of(quad_max(largest));
  float squared = 0;
#pragma unroll
  for (int pair = 0; pair < F / 2; ++pair)
#pragma unroll
    for (int i = 0; i < 4; ++i) squared += x[pair][i] * scale.up * (x[pair][i] * scale.up);
  return {scale, inverse_norm(quad_sum(squared), scale)};
}

// The gradient of a row's scores, ds, as four lanes hold it; to weights as well. plain: no gradient of the entropy, aligned rows.
template <int STEPS, bool plain, class Z>
__device__ __forceinline__ void score_gradients(const Backward<Z>& p, int64_t row, float over_length, float (&ds)[STEPS][4]) {
  const int member = threadIdx.x % 4;
  const bool valid = row < p.B;
  const float *const c = p.assignment + (valid ? row : 0) * p.K, *const g = p.grad_assignment + (valid ? row : 0) * p.K;
  float upstream[STEPS][4];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load_scores<plain>(p, c, step * 16 + member * 4, ds[step]);
    load_scores<plain>(p, g, step * 16 + member * 4, upstream[step]);
  }
  float along = 0;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) along += ds[step][i] * upstream[step][i];
  along = quad_sum(along);
  if (!plain && p.grad_entropy) {
    const float upstream_entropy = valid ? p.grad_entropy[row] : 0.0f;
    float entropy = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) entropy -= ds[step][i] > 0 ? ds[step][i] * logf(ds[step][i]) : 0.0f;
    entropy = quad_sum(entropy);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) upstream[step][i] -= upstream_entropy * ((ds[step][i] > 0 ? logf(ds[step][i]) : 0.0f) + entropy);
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ds[step][i] *= upstream[step][i] - along;
    if (p.weights && valid)
      pk::store_vector(p.weights + row * p.weights_stride + step * 16 + member * 4,
                       float4{ds[step][0] * over_length, ds[step][1] * over_length, ds[step][2] * over_length, ds[step][3] * over_length});
  }
}

// The fragments of the left factor for one of a lane's two rows: ds times the prototypes' factors, scaled; returns the scale.
template <int STEPS, int r>
__device__ __forceinline__ Scale split_gradients(float (&ds)[STEPS][4], const float* factor, unsigned (&high)[STEPS][4],
                                                 unsigned (&low)[STEPS][4]) {
  const int member = threadIdx.x % 4;
  unsigned largest = 0;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const float4 of = pk::load_vector<float4>(factor + step * 16 + member * 4);
    ds[step][0] *= of.x, ds[step][1] *= of.y, ds[step][2] *= of.z, ds[step][3] *= of.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, magnitude_bits(ds[step][i]));
  }
  const Scale scale = scale_of(quad_max(largest));
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    split(ds[step][0] * scale.up, ds[step][1] * scale.up, high[step][r], low[step][r]);
    split(ds[step][2] * scale.up, ds[step][3] * scale.up, high[step][r + 2], low[step][r + 2]);
  }
  return scale;
}

// One of a lane's two rows from the products to its gradient; returns <z, t>, the same in four lanes. to_t takes products to t.
template <int F, int r, class Z>
__device__ __forceinline__ float finish_row(const Backward<Z>& p, int64_t row, bool valid, const Length& length, float to_t,
                                            const float (&s)[F][4]) {
  const int member = threadIdx.x % 4;
  const Z* const z = p.z + (valid ? row : 0) * p.z_stride;
  float unit[F / 2][4], along = 0;
#pragma unroll
  for (int pair = 0; pair < F / 2; ++pair) {
    load_row(p, z, pair * 16 + member * 4, unit[pair]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unit[pair][i] = unit[pair][i] * length.scale.up * length.factor;
      along += unit[pair][i] * (s[2 * pair + i / 2][2 * r + i % 2] * to_t);
    }
  }
  along = quad_sum(along);
  if (!valid) return along;
#pragma unroll
  for (int pair = 0; pair < F / 2; ++pair) {
    const int d = pair * 16 + member * 4;
    float gradient[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = s[2 * pair + i / 2][2 * r + i % 2] * to_t;
      gradient[i] = p.cosine ? (t - unit[pair][i] * along) * length.factor * length.scale.up : t;
    }
    Z* const to = p.grad_z + row * p.D + d;
    if (p.D % 4 == 0) {
      if (d < p.D) store_four(to, gradient);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (d + i < p.D) store_value(to + i, gradient[i]);
    }
  }
  return along;
}

}  // namespace
