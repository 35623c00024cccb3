// SPDX-License-Identifier: MIT
#include "common/torch_utils.h"

// Absent from a CPU torch and found through libtorch.so on a CUDA one; hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace protokernels {

void* current_cuda_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "protokernels: this torch has no CUDA support; install a CUDA build of torch");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

#if defined(PROTOKERNELS_WITH_CUDA)
const char* cuda_error_text(int status);  // common/cuda_error.cu

void check_cuda(int status, const char* what) {
  STD_TORCH_CHECK(status == 0, what, ": CUDA error ", status, ": ", cuda_error_text(status));
}
#endif

}  // namespace protokernels
