// SPDX-License-Identifier: MIT
// Warps, the torch side on the CPU: planes over threads, sums over a sample's planes in order, registration. Arguments are checked in
// warp_arguments.h; affine warps stand in warp_affine.cpp, CUDA in warp_cuda.cpp.
#include "ops/warp.h"

#include <vector>

#include "common/cpu_level.h"
#include "ops/warp_arguments.h"
#include "ops/warp_threads.h"

namespace protokernels {

PK_DECLARE_LEVELS(WarpCpu, warp_cpu);

namespace {

Tensor forward_cpu(Tensor images, Tensor params, OptionalTensor enabled, OptionalTensor seed, std::vector<int64_t> order,
                   std::vector<int64_t> radius, double sigma_max, double noise_std, double crop_size, double sharpness, int64_t padding) {
  const auto run = [&](const WarpForward& f) {
    const WarpCpu& cpu = PK_CHOOSE_LEVEL(warp_cpu);
    for_planes(f.B * f.C, f.H * f.W, cpu.scratch_bytes(f, false), images,
               [&](int64_t first, int64_t last, void* scratch) { cpu.forward(f, first, last, scratch); });
  };
  return forward_by(run, images, params, enabled, seed, order, radius, sigma_max, noise_std, crop_size, sharpness, padding);
}

template <class T>
void add_up(const WarpBackward& b, const std::vector<double>& partials) {
  T* const out = static_cast<T*>(b.grad_params);
  for (int64_t sample = 0; sample < b.B; ++sample)
    for (int64_t k = 0; k < WARP_PARAMS; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < b.C; ++c) sum += partials[static_cast<size_t>((sample * b.C + c) * WARP_PARAMS + k)];
      out[sample * WARP_PARAMS + k] = static_cast<T>(sum);
    }
}

std::tuple<Tensor, Tensor> backward_cpu(Tensor grad, Tensor images, Tensor params, OptionalTensor enabled, OptionalTensor seed,
                                        std::vector<int64_t> order, std::vector<int64_t> radius, double sigma_max, double noise_std,
                                        double crop_size, double sharpness, int64_t padding, bool need_images, bool need_params) {
  const auto run = [&](const WarpBackward& b) {
    const WarpCpu& cpu = PK_CHOOSE_LEVEL(warp_cpu);
    std::vector<double> partials(b.grad_params ? static_cast<size_t>(b.B * b.C * WARP_PARAMS) : 0);
    for_planes(b.B * b.C, b.H * b.W, cpu.scratch_bytes(b, true), images, [&](int64_t first, int64_t last, void* scratch) {
      cpu.backward(b, b.grad_params ? partials.data() : nullptr, first, last, scratch);
    });
    if (b.grad_params) b.double_compute ? add_up<double>(b, partials) : add_up<float>(b, partials);
  };
  return backward_by(run, grad, images, params, enabled, seed, order, radius, sigma_max, noise_std, crop_size, sharpness, padding,
                     need_images, need_params);
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("warp_forward", TORCH_BOX(&forward_cpu));
  library.impl("warp_backward", TORCH_BOX(&backward_cpu));
}
