// SPDX-License-Identifier: MIT
// Rows of any kind, the distance as ops/nearest.h defines it, and the order of neighbours.
#pragma once

#include "common/arithmetic.cuh"
#include "common/simt.cuh"
#include "ops/cuda/nearest_launch.h"

namespace {

using namespace protokernels;

__device__ __forceinline__ double half_at(unsigned pair, int shift) {
  return static_cast<double>(__half2float(__ushort_as_half(static_cast<unsigned short>(pair >> shift))));
}
__device__ __forceinline__ double bfloat_of(unsigned bits) { return static_cast<double>(__uint_as_float(bits)); }

__device__ __forceinline__ double read_one(const void* values, Kind kind, int64_t at) {
  switch (kind) {
    case Kind::f32: return static_cast<double>(static_cast<const float*>(values)[at]);
    case Kind::f64: return static_cast<const double*>(values)[at];
    case Kind::bf16: return static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(values)[at]));
    default: return static_cast<double>(__half2float(static_cast<const __half*>(values)[at]));
  }
}

// Values at, ..., at + 3, of them `have`; zeros behind. aligned: all four can be read at once.
__device__ __forceinline__ void read_four(const void* values, Kind kind, int64_t at, int have, bool aligned, double (&x)[4]) {
  if (!aligned || have < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < have ? read_one(values, kind, at + i) : 0.0;
    return;
  }
  if (kind == Kind::f32) {
    const float4 v = pk::load_vector<float4>(static_cast<const float*>(values) + at);
    x[0] = static_cast<double>(v.x), x[1] = static_cast<double>(v.y), x[2] = static_cast<double>(v.z), x[3] = static_cast<double>(v.w);
  } else if (kind == Kind::f64) {
    const double2 v = pk::load_vector<double2>(static_cast<const double*>(values) + at);
    const double2 w = pk::load_vector<double2>(static_cast<const double*>(values) + at + 2);
    x[0] = v.x, x[1] = v.y, x[2] = w.x, x[3] = w.y;
  } else {
    const uint2 v = pk::load_vector<uint2>(static_cast<const unsigned short*>(values) + at);
    if (kind == Kind::bf16) {
      x[0] = bfloat_of(v.x << 16), x[1] = bfloat_of(v.x & 0xffff0000u), x[2] = bfloat_of(v.y << 16), x[3] = bfloat_of(v.y & 0xffff0000u);
    } else {
      x[0] = half_at(v.x, 0), x[1] = half_at(v.x, 16), x[2] = half_at(v.y, 0), x[3] = half_at(v.y, 16);
    }
  }
}

// total + x y, the product rounded before it is added.
__device__ __forceinline__ double add_product(double total, double x, double y) { return __dadd_rn(total, __dmul_rn(x, y)); }

// The distance of a query and a row of the bank. One thread: the sums are made one after the other.
__device__ __forceinline__ double exact_distance(const NearestTask& p, int64_t query, int row) {
  const int64_t q0 = query * p.queries_stride, b0 = row * p.bank_stride;
  double total = 0, query_square = 0, bank_square = 0;
#pragma unroll 2
  for (int j = 0; j < p.D; j += 4) {
    double q[4], b[4];
    read_four(p.queries, p.queries_kind, q0 + j, p.D - j, p.queries_aligned, q);
    read_four(p.bank, p.bank_kind, b0 + j, p.D - j, p.bank_aligned, b);
    if (p.cosine) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total = add_product(total, q[i], b[i]);
        query_square = add_product(query_square, q[i], q[i]);
        bank_square = add_product(bank_square, b[i], b[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const double difference = __dadd_rn(q[i], -b[i]);
        total = add_product(total, difference, difference);
      }
    }
  }
  if (!p.cosine) return total;
  const double query_norm = sqrt(query_square), bank_norm = sqrt(bank_square);
  const bool zero = query_norm <= NEAREST_NORM_FLOOR || bank_norm <= NEAREST_NORM_FLOOR;
  const double distance = __dadd_rn(1.0, -(zero ? 0.0 : total / __dmul_rn(query_norm, bank_norm)));
  return distance < 0.0 ? 0.0 : distance;
}

// The order of neighbours: by distance, NaN last, equal ones by index.
__device__ __forceinline__ bool nearer(double x, int x_index, double y, int y_index) {
  const bool x_nan = x != x, y_nan = y != y;
  if (x_nan || y_nan) return x_nan == y_nan ? x_index < y_index : y_nan;
  return x != y ? x < y : x_index < y_index;
}

__device__ __forceinline__ void write_neighbour(const NearestTask& p, int64_t query, int rank, double distance, int index) {
  const int64_t at = query * p.k + rank;
  if (p.double_compute)
    static_cast<double*>(p.distances)[at] = distance;
  else
    static_cast<float*>(p.distances)[at] = static_cast<float>(distance);
  p.indices[at] = index;
}

// Puts a query among those that are compared with the whole bank.
__device__ __forceinline__ void leave(const NearestTask& p, int64_t query) {
  if (atomicExch(&p.flags[query], 1) == 0) p.left[atomicAdd(&p.state->left, 1u)] = query;
}

// The scale of the filter is 2^exponent: it takes twice the largest magnitude below 2^15. Numbers beyond 2^480 could overflow when squared;
// the limit below zero keeps the scaled squares of the definition's own underflow (2^-1075) out of sight.
__device__ __forceinline__ int largest_exponent(const NearestState& state) { return static_cast<int>(state.largest >> 52) - 1023; }
__device__ __forceinline__ bool trusted(const NearestTask& p) {
  return p.state->distrust == 0 && (p.cosine || largest_exponent(*p.state) < 480);
}

}  // namespace
