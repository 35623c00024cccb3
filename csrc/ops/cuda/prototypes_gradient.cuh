// SPDX-License-Identifier: MIT
// What the parts of the gradient of the soft assignment have of each other: prototypes_backward.cu begins with the gradient of the rows
// (prototypes_backward_rows.cuh), which leaves what the gradient of the prototypes is made of (prototypes_gradient.cu).
#pragma once

#include "ops/cuda/prototypes_sums.cuh"

namespace protokernels {

constexpr int PROTOTYPES_BACKWARD_GROUP = 64;    // rows that four warps take at a time
constexpr int PROTOTYPES_BACKWARD_BLOCKS = 132;  // at most: a constant, so that the order of summation does not depend on the GPU

inline int64_t prototypes_backward_blocks(int64_t B) {
  const int64_t tiles = (B + PROTOTYPES_BACKWARD_GROUP - 1) / PROTOTYPES_BACKWARD_GROUP;
  return tiles < PROTOTYPES_BACKWARD_BLOCKS ? tiles : PROTOTYPES_BACKWARD_BLOCKS;
}

// Where the gradient of the rows leaves what the others need.
struct PrototypesBackwardRows {
  float* weights;  // [B, weights_stride]
  int64_t weights_stride;
  double* temperatures;  // [blocks]
};

// B > 0.
int launch_prototypes_backward_bfloat16(const PrototypesBackward&, const PrototypesBackwardRows&, void* stream);
int launch_prototypes_backward_half(const PrototypesBackward&, const PrototypesBackwardRows&, void* stream);

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
