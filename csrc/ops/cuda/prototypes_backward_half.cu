// SPDX-License-Identifier: MIT
// The kernels of prototypes_backward_rows.cuh for rows of float16.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_backward_rows.cuh"

namespace protokernels {

int launch_prototypes_backward_half(const PrototypesBackward& p, const PrototypesBackwardRows& rows, void* stream) {
  return backward_rows<__half>(p, rows, stream);
}

}  // namespace protokernels
