// SPDX-License-Identifier: MIT
#include "common/torch_utils.h"

#include <sys/mman.h>

#include <algorithm>
#include <string>

// Absent from a CPU torch and found through libtorch.so on a CUDA one; hence weak.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace protokernels {

static std::string as_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  constexpr uintptr_t huge_page = uintptr_t{2} << 20;
  constexpr size_t most_dimensions = 5;
  STD_TORCH_CHECK(sizes.size() <= most_dimensions, "protokernels: at most five dimensions");
  int64_t strides[most_dimensions], stride = 1;
  for (size_t k = sizes.size(); k-- > 0; stride *= std::max<int64_t>(sizes.begin()[k], 1)) strides[k] = stride;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;  // by the C function: new_empty of the stable headers looks its operator up by name, in every call
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device_type,
                                                        like.get_device_index(), &handle);
  STD_TORCH_CHECK(error == 0, "protokernels: there is no memory for a tensor of shape ", as_text(sizes));
  Tensor tensor(handle);
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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

#if defined(PROTOKERNELS_WITH_CUDA)
const char* cuda_error_text(int status);  // common/cuda_error.cu

void check_cuda(int status, const char* what) {
  STD_TORCH_CHECK(status == 0, what, ": CUDA error ", status, ": ", cuda_error_text(status));
}
#endif

}  // namespace protokernels
