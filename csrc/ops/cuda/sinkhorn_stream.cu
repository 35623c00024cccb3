// SPDX-License-Identifier: MIT
#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_launch.h"
namespace protokernels {
int64_t stream_forward_workspace(const SinkhornForward&) { return 0; }
int launch_stream_forward(const SinkhornForward&, void*, void*) { return 1; }
}
