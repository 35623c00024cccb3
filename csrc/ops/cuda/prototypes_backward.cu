// SPDX-License-Identifier: MIT
// Gradient of the soft assignment on the GPU for K <= 256 and D <= 128: of the rows in prototypes_backward_rows.cuh, whose kernels for float32 are
// compiled here, of the prototypes in prototypes_gradient.cu. The equations stand in ops/prototypes.h.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_backward_rows.cuh"

namespace {

struct Workspace {
  int64_t weights_stride, gradient_parts;
  double* temperatures;
  float *weights, *gradients;
  int64_t bytes;
};

Workspace workspace_of(const PrototypesBackward& p, void* memory) {
  Workspace w{};
  w.weights_stride = p.K <= PANEL ? PANEL : p.K <= 2 * PANEL ? 2 * PANEL : 4 * PANEL;
  w.gradient_parts = p.grad_prototypes ? prototypes_gradient_parts(p.B) : 0;
  w.temperatures = static_cast<double*>(memory);
  w.weights = reinterpret_cast<float*>(w.temperatures + (PROTOTYPES_BACKWARD_BLOCKS + 1) / 2 * 2);
  w.gradients = w.weights + (p.grad_prototypes ? p.B * w.weights_stride : 0);
  w.bytes = reinterpret_cast<char*>(w.gradients + w.gradient_parts * p.K * p.D) - static_cast<char*>(memory);
  return w;
}

int launch_any(const PrototypesBackward& p, const PrototypesBackwardRows& rows, void* stream) {
  switch (p.z_kind) {
    case Kind::f32: return backward_rows<float>(p, rows, stream);
    case Kind::bf16: return launch_prototypes_backward_bfloat16(p, rows, stream);
    default: return launch_prototypes_backward_half(p, rows, stream);
  }
}

}  // namespace

namespace protokernels {

int64_t prototypes_backward_workspace(const PrototypesBackward& p) { return workspace_of(p, nullptr).bytes; }

int launch_prototypes_backward(const PrototypesBackward& p, void* workspace, void* stream) {
  const Workspace w = workspace_of(p, workspace);
  if (p.B > 0)
    if (const int status = launch_any(p, {w.weights, w.weights_stride, w.temperatures}, stream); status != 0) return status;
  return launch_prototypes_gradient(
      p, {w.weights, w.weights_stride, w.gradients, w.gradient_parts, w.temperatures, prototypes_backward_blocks(p.B)}, stream);
}

}  // namespace protokernels
