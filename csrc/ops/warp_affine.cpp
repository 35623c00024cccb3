// SPDX-License-Identifier: MIT
// Affine warps, the torch side on the CPU.
#include <vector>

#include "common/cpu_level.h"
#include "ops/warp_arguments.h"
#include "ops/warp_threads.h"

namespace protokernels {

PK_DECLARE_LEVELS(WarpAffineCpu, warp_affine_cpu);

namespace {

int64_t pixels_of(const WarpAffineProblem& p) { return p.in[0] * p.in[1] * p.in[2] + p.out[0] * p.out[1] * p.out[2]; }

Tensor affine_forward_cpu(Tensor images, Tensor matrix, std::vector<int64_t> size, int64_t padding) {
  const auto run = [&](const WarpAffineForward& f) {
    const WarpAffineCpu& cpu = PK_CHOOSE_LEVEL(warp_affine_cpu);
    for_planes(f.B * f.C, pixels_of(f), cpu.scratch_bytes(f, false), images,
               [&](int64_t first, int64_t last, void* scratch) { cpu.forward(f, first, last, scratch); });
  };
  return affine_forward_by(run, images, matrix, size, padding);
}

template <class T>
void add_up(const WarpAffineBackward& b, const std::vector<double>& partials) {
  const int64_t entries = b.dims * (b.dims + 1);
  T* const out = static_cast<T*>(b.grad_matrix);
  for (int64_t sample = 0; sample < b.B; ++sample)
    for (int64_t k = 0; k < entries; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < b.C; ++c) sum += partials[static_cast<size_t>((sample * b.C + c) * entries + k)];
      out[sample * entries + k] = static_cast<T>(sum);
    }
}

std::tuple<Tensor, Tensor> affine_backward_cpu(Tensor grad, Tensor images, Tensor matrix, int64_t padding, bool need_images,
                                               bool need_matrix) {
  const auto run = [&](const WarpAffineBackward& b) {
    const WarpAffineCpu& cpu = PK_CHOOSE_LEVEL(warp_affine_cpu);
    std::vector<double> partials(b.grad_matrix ? static_cast<size_t>(b.B * b.C * b.dims * (b.dims + 1)) : 0);
    for_planes(b.B * b.C, pixels_of(b), cpu.scratch_bytes(b, true), images, [&](int64_t first, int64_t last, void* scratch) {
      cpu.backward(b, b.grad_matrix ? partials.data() : nullptr, first, last, scratch);
    });
    if (b.grad_matrix) b.double_compute ? add_up<double>(b, partials) : add_up<float>(b, partials);
  };
  return affine_backward_by(run, grad, images, matrix, padding, need_images, need_matrix);
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("warp_affine_forward", TORCH_BOX(&affine_forward_cpu));
  library.impl("warp_affine_backward", TORCH_BOX(&affine_backward_cpu));
}
