// SPDX-License-Identifier: MIT
// Which kernels serve a problem: by its shape, its type and the shared memory of a block. Known to the host side and its tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/sinkhorn.h"

namespace protokernels {

enum class SinkhornTier {
  side_32,   // up to 32 x 32, float: 4 warps, K in registers
  side_64,   // up to 64 x 64: 8 warps, K in registers
  side_128,  // up to 128 x 128, float: 16 warps, K in registers
  shared,    // up to 256 x 256 where K and the exchange between the warps fit in shared memory, float: 8 warps
  stream,    // anything larger: the cost is read in every half-step
};

constexpr int64_t SINKHORN_EXCHANGE_BYTES = 16 * 1024;  // at most, beside K: partial column sums and rows

constexpr SinkhornTier sinkhorn_tier(int64_t N, int64_t M, Kind kind, std::size_t shared_limit) {
  const int64_t side = N > M ? N : M;
  if (side <= 32 && kind == Kind::f32) return SinkhornTier::side_32;
  if (side <= 64) return SinkhornTier::side_64;
  if (kind == Kind::f64) return SinkhornTier::stream;
  if (side <= 128) return SinkhornTier::side_128;
  const int64_t bytes = N * M * static_cast<int64_t>(sizeof(float)) + SINKHORN_EXCHANGE_BYTES;
  return side <= 256 && bytes <= static_cast<int64_t>(shared_limit) ? SinkhornTier::shared : SinkhornTier::stream;
}

// Balanced problems in float whose kernel fits the registers of a block; the wide ones from sm_90 on, known by its shared memory.
constexpr int64_t SINKHORN_SCALED_NARROW = 128, SINKHORN_SCALED_WIDE = 208;
constexpr bool sinkhorn_scaled(int64_t N, int64_t M, Kind kind, bool balanced, std::size_t shared_limit) {
  const int64_t side = shared_limit > 200 * 1024 ? SINKHORN_SCALED_WIDE : SINKHORN_SCALED_NARROW;
  return kind == Kind::f32 && balanced && N <= side && M <= side;
}
int launch_scaled_forward(const SinkhornForward&, void* stream);  // sinkhorn_scaled.cu
constexpr int64_t SINKHORN_SCALED_UNROLLED_SIDE = 64;
int launch_scaled_unrolled(const SinkhornBackward&, void* stream);   // sinkhorn_scaled_unrolled.cu
int launch_on_chip_implicit(const SinkhornBackward&, void* stream);  // sinkhorn_implicit.cu

// Between features on sm_90a (sinkhorn_features_hopper.cu): whether it runs this; the bytes of the workspace, and with one the launches.
bool sinkhorn_features_on_hopper(const SinkhornFeatures&);
int64_t sinkhorn_features_hopper(const SinkhornFeatures&, void* workspace, void* stream, int* status);

// The streaming kernels (sinkhorn_stream*.cu).
int64_t stream_forward_workspace(const SinkhornForward&);
int launch_stream_forward(const SinkhornForward&, void* workspace, void* stream);
int64_t stream_backward_workspace(const SinkhornBackward&);
int launch_stream_backward(const SinkhornBackward&, void* workspace, void* stream);
int64_t stream_implicit_workspace(const SinkhornBackward&);
int launch_stream_implicit(const SinkhornBackward&, void* workspace, void* stream);

}  // namespace protokernels
