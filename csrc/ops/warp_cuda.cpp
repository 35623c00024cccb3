// SPDX-License-Identifier: MIT
// Warps and affine warps, the torch side on CUDA.
#if defined(PROTOKERNELS_WITH_CUDA)

#include <vector>

#include "ops/warp_arguments.h"

namespace protokernels {
namespace {

// Launches with workspace and stream, on the device of `like`.
template <class Problem, class Bytes, class Launch>
void launch_on(const Tensor& like, const Problem& problem, const Bytes& bytes, const Launch& launch, const char* what) {
  const Tensor workspace = empty_beside(like, {bytes(problem)}, ScalarType::Byte);
  check_cuda(launch(problem, workspace.data_ptr(), current_cuda_stream(like)), what);
}

Tensor forward_cuda(Tensor images, Tensor params, OptionalTensor enabled, OptionalTensor seed, std::vector<int64_t> order,
                    std::vector<int64_t> radius, double sigma_max, double noise_std, double crop_size, double sharpness, int64_t padding) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const auto run = [&](const WarpForward& f) { launch_on(images, f, warp_forward_workspace, launch_warp_forward, "warp_forward"); };
  return forward_by(run, images, params, enabled, seed, order, radius, sigma_max, noise_std, crop_size, sharpness, padding);
}

std::tuple<Tensor, Tensor> backward_cuda(Tensor grad, Tensor images, Tensor params, OptionalTensor enabled, OptionalTensor seed,
                                         std::vector<int64_t> order, std::vector<int64_t> radius, double sigma_max, double noise_std,
                                         double crop_size, double sharpness, int64_t padding, bool need_images, bool need_params) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const auto run = [&](const WarpBackward& b) { launch_on(images, b, warp_backward_workspace, launch_warp_backward, "warp_backward"); };
  return backward_by(run, grad, images, params, enabled, seed, order, radius, sigma_max, noise_std, crop_size, sharpness, padding,
                     need_images, need_params);
}

Tensor affine_forward_cuda(Tensor images, Tensor matrix, std::vector<int64_t> size, int64_t padding) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const auto run = [&](const WarpAffineForward& f) {
    launch_on(images, f, warp_affine_forward_workspace, launch_warp_affine_forward, "warp_affine_forward");
  };
  return affine_forward_by(run, images, matrix, size, padding);
}

std::tuple<Tensor, Tensor> affine_backward_cuda(Tensor grad, Tensor images, Tensor matrix, int64_t padding, bool need_images,
                                                bool need_matrix) {
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  const auto run = [&](const WarpAffineBackward& b) {
    launch_on(images, b, warp_affine_backward_workspace, launch_warp_affine_backward, "warp_affine_backward");
  };
  return affine_backward_by(run, grad, images, matrix, padding, need_images, need_matrix);
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("warp_forward", TORCH_BOX(&forward_cuda));
  library.impl("warp_backward", TORCH_BOX(&backward_cuda));
  library.impl("warp_affine_forward", TORCH_BOX(&affine_forward_cuda));
  library.impl("warp_affine_backward", TORCH_BOX(&affine_backward_cuda));
}
#endif
