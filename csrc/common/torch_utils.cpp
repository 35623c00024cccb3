// SPDX-License-Identifier: MIT
#include "common/torch_utils.h"

#include <sys/mman.h>

// Absent from a CPU torch and found through libtorch.so on a CUDA one; hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace protokernels {

Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  Tensor tensor = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
#if defined(MADV_HUGEPAGE)
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (bytes >= 2 * huge_page && tensor.is_cpu()) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + huge_page - 1) & ~(huge_page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + bytes) & ~(huge_page - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return tensor;
}

void* current_cuda_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "protokernels: this torch has no CUDA support; install a CUDA build of torch");
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
