// SPDX-License-Identifier: MIT
// What prototypes_backward.cu leaves for the gradient of the prototypes (prototypes_gradient.cu).
#pragma once

#include "ops/cuda/prototypes_sums.cuh"

namespace protokernels {

struct PrototypesGradientParts {
  const float* weights;  // [B, weights_stride]: gradient of the score, over |z| for cosine
  int64_t weights_stride;
  float* gradients;  // [parts, K, D]: workspace
  int64_t parts;
  const double* temperatures;  // [temperature_parts]: sums of <z, t>
  int64_t temperature_parts;
};

int64_t prototypes_gradient_parts(int64_t B);

// The gradients of the prototypes, if asked for, and of the temperature.
int launch_prototypes_gradient(const PrototypesBackward&, const PrototypesGradientParts&, void* stream);

}  // namespace protokernels
