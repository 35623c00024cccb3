// SPDX-License-Identifier: MIT
// What the CUDA kernels of prototypes share: types of z, reductions of a warp, the blend, and the launches that make sums of clusters
// (prototypes_update.cu, prototypes_finish.cu).
#pragma once

#include "common/arithmetic.cuh"
#include "common/simt.cuh"
#include "ops/prototypes.h"

namespace protokernels {

// The parts a kernel left of the sums: float64 [parts, K, D] and their counts [parts, K].
struct PrototypesParts {
  int64_t parts;
  const double* sums;
  const int* counts;
};

// Adds up the parts in order, blends if blend.updated is not null. Writes sums [K, D] and counts [K].
int launch_prototypes_finish(const PrototypesParts&, const PrototypesBlend& blend, double* sums, int64_t* counts, void* stream);

// Sums and counts of the clusters from labels, then the blend if there is somewhere to put it; skip_nonfinite is ignored (labels say it already).
int64_t prototypes_sums_workspace(int64_t B, int64_t K, int64_t D);
int launch_prototypes_sums(const PrototypesAccumulate&, const PrototypesBlend& blend, void* workspace, void* stream);

// Forward where the prototypes stay in shared memory (prototypes_resident.cu), sums and blend included; the first says whether they do.
bool prototypes_resident(const PrototypesForward&);
int64_t prototypes_resident_workspace(const PrototypesForward&);
int launch_prototypes_resident(const PrototypesForward&, const PrototypesBlend& blend, void* workspace, void* stream);

// Its rows and labels by the tensor cores of compute capability 9.0 (prototypes_warpgroup.cu); the first says whether this device and shape have them.
bool prototypes_warpgroup(const PrototypesForward&);
int launch_prototypes_warpgroup(const PrototypesForward&, void* stream);

}  // namespace protokernels

namespace {

using namespace protokernels;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Four values that lie side by side, 16-byte aligned (8-byte for half precision).
__device__ __forceinline__ void load_four(const float* from, float (&x)[4]) {
  const float4 v = pk::load_vector<float4>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ __forceinline__ void load_four(const double* from, double (&x)[4]) {
  const double2 v = pk::load_vector<double2>(from), w = pk::load_vector<double2>(from + 2);
  x[0] = v.x, x[1] = v.y, x[2] = w.x, x[3] = w.y;
}
__device__ __forceinline__ void load_four(const __nv_bfloat16* from, float (&x)[4]) {
  const uint2 v = pk::load_vector<uint2>(from);
  x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
  x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
}
__device__ __forceinline__ float half_at(unsigned pair, int shift) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> shift)));
}
__device__ __forceinline__ void load_four(const __half* from, float (&x)[4]) {
  const uint2 v = pk::load_vector<uint2>(from);
  x[0] = half_at(v.x, 0), x[1] = half_at(v.x, 16), x[2] = half_at(v.y, 0), x[3] = half_at(v.y, 16);
}

// Whether rows of D values from z on can be read in pieces of so many bytes.
inline bool aligned_rows(const void* z, int64_t z_stride, int64_t D, int64_t element, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(z) % bytes == 0 && z_stride * element % bytes == 0 && D * element % bytes == 0;
}

template <class Z>
__device__ __forceinline__ bool is_finite_row(const Z* row, int D) {
  bool finite = true;
  for (int d = threadIdx.x % 32; d < D; d += 32) finite &= widen(row[d]) * 0 == 0;
  return __all_sync(ALL, finite);
}

__device__ __forceinline__ double read_kind(const void* base, Kind kind, int64_t i) {
  switch (kind) {
    case Kind::f32: return static_cast<const float*>(base)[i];
    case Kind::f64: return static_cast<const double*>(base)[i];
    case Kind::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
    default: return __half2float(static_cast<const __half*>(base)[i]);
  }
}

__device__ __forceinline__ void write_kind(void* base, Kind kind, int64_t i, double value) {
  switch (kind) {
    case Kind::f32: static_cast<float*>(base)[i] = static_cast<float>(value); break;
    case Kind::f64: static_cast<double*>(base)[i] = value; break;
    case Kind::bf16: static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(static_cast<float>(value)); break;
    default: static_cast<__half*>(base)[i] = __float2half_rn(static_cast<float>(value));
  }
}

__device__ __forceinline__ void blend_element(const PrototypesBlend& p, int64_t i, double old, double sum, int64_t count) {
  write_kind(p.updated, p.kind, i, count > 0 ? p.new_weight / static_cast<double>(count) * sum + (1.0 - p.new_weight) * old : old);
}

}  // namespace
