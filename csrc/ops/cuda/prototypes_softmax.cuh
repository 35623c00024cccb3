// SPDX-License-Identifier: MIT
// What follows the products of prototypes_resident.cuh: softmax, labels, entropy, and their way to memory.
#pragma once

#include "ops/cuda/prototypes_resident.cuh"

namespace {

constexpr float LN_2 = 0.6931471805599453f;

// What lane / 4 and lane / 4 + 8 know of their rows after the softmax; s[f][2 r + i] then holds exp(score - max).
struct Softmax {
  float sum[2], entropy[2];
  int label[2];
};

// s: sums of products on entry; row factors carry log2(e) / temperature.
template <int F, bool with_entropy>
__device__ __forceinline__ Softmax softmax_rows(float (&s)[F][4], const float (&row_factor)[2], const float* factor, const float* bias) {
  const int member = threadIdx.x % 4;
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int f = 0; f < F; f += 2) {
    const float4 scale = pk::load_vector<float4>(factor + f * 8 + member * 4), shift = pk::load_vector<float4>(bias + f * 8 + member * 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s[f][2 * r] = fmaf(s[f][2 * r], scale.x * row_factor[r], shift.x);
      s[f][2 * r + 1] = fmaf(s[f][2 * r + 1], scale.y * row_factor[r], shift.y);
      s[f + 1][2 * r] = fmaf(s[f + 1][2 * r], scale.z * row_factor[r], shift.z);
      s[f + 1][2 * r + 1] = fmaf(s[f + 1][2 * r + 1], scale.w * row_factor[r], shift.w);
      top[r] = fmaxf(top[r], fmaxf(fmaxf(s[f][2 * r], s[f][2 * r + 1]), fmaxf(s[f + 1][2 * r], s[f + 1][2 * r + 1])));
    }
  }
  Softmax result;
  float weighted[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(top[r]);
    result.sum[r] = 0;
    result.label[r] = F * 8;
  }
#pragma unroll
  for (int f = F - 2; f >= 0; f -= 2) {  // downwards: the label that stays is the lowest
#pragma unroll
    for (int h = 1; h >= 0; --h)
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        const int r = i / 2;
        const float shifted = s[f + h][i] - top[r], weight = pk::exp2_fast(shifted);
        if (shifted == 0) result.label[r] = f * 8 + h * 2 + i % 2;
        if (with_entropy) weighted[r] += weight * fmaxf(shifted, -1024.0f);
        s[f + h][i] = weight;
        result.sum[r] += weight;
      }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) result.sum[r] = quad_sum(result.sum[r]);
  if (__any_sync(ALL, result.sum[0] != result.sum[0] || result.sum[1] != result.sum[1])) {  // NaN counts as the largest, as in torch.argmax
#pragma unroll
    for (int f = F - 2; f >= 0; f -= 2) {
#pragma unroll
      for (int h = 1; h >= 0; --h)
#pragma unroll
        for (int i = 3; i >= 0; --i)
          if (s[f + h][i] != s[f + h][i]) result.label[i / 2] = f * 8 + h * 2 + i % 2;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool nan = false;  // labels of numbers do not count in a row with NaN
#pragma unroll
      for (int f = 0; f < F; ++f) nan |= s[f][2 * r] != s[f][2 * r] || s[f][2 * r + 1] != s[f][2 * r + 1];
      if (result.sum[r] != result.sum[r] && !nan) result.label[r] = F * 8;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (result.label[r] < F * 8) result.label[r] += member * 4;
    result.label[r] = quad_min(result.label[r]);
    result.entropy[r] = with_entropy ? LN_2 * (log2f(result.sum[r]) - quad_sum(weighted[r]) / result.sum[r]) : 0.0f;
  }
  return result;
}

// The first k whose cumulative weight exceeds threshold; if rounding leaves none, the last with a weight. r: which of the lane's rows.
template <int F, int r>
__device__ __forceinline__ int draw_label(const float (&s)[F][4], float threshold) {
  const int member = threadIdx.x % 4;
  int chosen = F * 8, last = 0;
  float before = 0;
#pragma unroll
  for (int f = 0; f < F; f += 2) {
    const float weights[4] = {s[f][2 * r], s[f][2 * r + 1], s[f + 1][2 * r], s[f + 1][2 * r + 1]};
    float inclusive = (weights[0] + weights[1]) + (weights[2] + weights[3]);
    float other = __shfl_up_sync(ALL, inclusive, 1, 4);
    if (member >= 1) inclusive += other;
    other = __shfl_up_sync(ALL, inclusive, 2, 4);
    if (member >= 2) inclusive += other;
    other = __shfl_up_sync(ALL, inclusive, 1, 4);
    float cumulative = before + (member > 0 ? other : 0.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cumulative += weights[i];
      if (weights[i] > 0) {
        last = f * 8 + member * 4 + i;
        if (cumulative > threshold) chosen = min(chosen, last);
      }
    }
    before += __shfl_sync(ALL, inclusive, 3, 4);
  }
  chosen = quad_min(chosen);
  last = max(last, __shfl_xor_sync(ALL, last, 1));
  last = max(last, __shfl_xor_sync(ALL, last, 2));
  return chosen < F * 8 ? chosen : last;
}

template <int F, bool whole>
__device__ __forceinline__ void write_weights(float* to, int K, const float (&s)[F][4], int r, float scale) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int f = 0; f < F; f += 2) {
    const int k = f * 8 + member * 4;
    const float4 c = {s[f][2 * r] * scale, s[f][2 * r + 1] * scale, s[f + 1][2 * r] * scale, s[f + 1][2 * r + 1] * scale};
    if (whole || K % 4 == 0) {
      if (k < K) __stcs(reinterpret_cast<float4*>(to + k), c);
    } else if (K % 2 == 0) {
      if (k < K) __stcs(reinterpret_cast<float2*>(to + k), float2{c.x, c.y});
      if (k + 2 < K) __stcs(reinterpret_cast<float2*>(to + k + 2), float2{c.z, c.w});
    } else {
      if (k < K) to[k] = c.x;
      if (k + 1 < K) to[k + 1] = c.y;
      if (k + 2 < K) to[k + 2] = c.z;
      if (k + 3 < K) to[k + 3] = c.w;
    }
  }
}

// What a warp does with the scores of its rows row0 ... row0 + 15: softmax, labels (-1: the row does not count), entropy, and all of it written.
// to_log2: log2(e) / temperature. plain: no entropy, nothing drawn, K a multiple of four. Without the code for
// these a tile of rows took 50 in place of 66 us at 65536 x 128 x 256 on an H200.
template <class Z, int F, bool plain>
__device__ __forceinline__ void finish_rows(const Resident<Z>& p, int64_t row0, const RowPair& rows, const float* factor, const float* bias,
                                            float to_log2, float (&s)[F][4], int (&label)[2]) {
  const int lane = threadIdx.x % 32, member = lane % 4;
  const float row_factor[2] = {rows.factor[0] * to_log2, rows.factor[1] * to_log2};
  const Softmax softmax = softmax_rows<F, !plain>(s, row_factor, factor, bias);
  label[0] = softmax.label[0], label[1] = softmax.label[1];
  if (!plain && p.uniform) {
    const int64_t row = row0 + lane / 4;
    const int first = draw_label<F, 0>(s, softmax.sum[0] * (row < p.B ? p.uniform[row] : 0.0f));
    const int second = draw_label<F, 1>(s, softmax.sum[1] * (row + 8 < p.B ? p.uniform[row + 8] : 0.0f));
    if (softmax.sum[0] == softmax.sum[0]) label[0] = first;
    if (softmax.sum[1] == softmax.sum[1]) label[1] = second;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = row0 + lane / 4 + r * 8;
    if (row >= p.B || (p.skip_nonfinite && !rows.finite[r])) label[r] = -1;
    if (row >= p.B) continue;
    write_weights<F, plain>(p.assignment + row * p.K, p.K, s, r, 1.0f / softmax.sum[r]);
    if (member == 0 && p.labels) p.labels[row] = label[r];
    if (!plain && member == 0 && p.entropy) p.entropy[row] = softmax.entropy[r];
  }
}

}  // namespace
