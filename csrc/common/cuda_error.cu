// SPDX-License-Identifier: MIT
#include <cuda_runtime.h>

namespace protokernels {

const char* cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace protokernels
