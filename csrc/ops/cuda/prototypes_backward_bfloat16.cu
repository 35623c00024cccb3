// SPDX-License-Identifier: MIT
// The kernels of prototypes_backward_rows.cuh for rows of bfloat16.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_backward_rows.cuh"

namespace protokernels {

int launch_prototypes_backward_bfloat16(const PrototypesBackward& p, const PrototypesBackwardRows& rows, void* stream) {
  return backward_rows<__nv_bfloat16>(p, rows, stream);
}

}  // namespace protokernels
