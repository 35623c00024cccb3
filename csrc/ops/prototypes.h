// SPDX-License-Identifier: MIT
// Prototypes: soft assignment and moving-average update (VAESim, Ferrante et al. 2023, Eq. 1 and Algorithm 2).
//
//   s_ik = <z_i, q_k> / temperature   (cosine: unit vectors; a vector no longer than 1e-12 counts as zero)
//   c_i  = softmax_k(s_ik)            H_i = -sum_k c_ik log c_ik            label_i = argmax_k s_ik, or drawn from c_i
//   q_k <- w * mean{z_i : label_i = k} + (1 - w) * q_k   if the cluster has members
//
// Backward, with dc, dH upstream:
//   ds = c * (dc - <dc, c>) - dH c (log c + H)
//   dot:     dz = ds q / temperature                    dq = ds^T z / temperature
//   cosine:  t = ds q^ / temperature, dz = (t - z^ <z^, t>) / |z|          likewise for q from ds^T z^
//   d temperature = -sum_i <z_i, t_i> / temperature       (<z_i, t_i> = <ds_i, s_i>: nothing else has to be kept)
//
// Shapes: z [B, D], prototypes [K, D]. Cost: 2 B K D flop forward, twice that backward; z is read once, c written once.
// Forward saves c (an output anyway); backward recomputes norms. Sums of clusters run in float64 over a chunking that depends on the
// shape only, and are added up in order: the result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/kind.h"

namespace protokernels {

constexpr double PROTOTYPE_NORM_FLOOR = 1e-12;

// Compute type T is double if double_compute, else float. Rows are dense; z may have a row stride.
struct PrototypesProblem {
  int64_t B, K, D;
  const void* z;  // [B, D] of z_kind
  Kind z_kind;
  int64_t z_stride;
  const void* prototypes;  // [K, D] of prototypes_kind, contiguous
  Kind prototypes_kind;
  const void* temperature_pointer;  // T[1] on the device, or null: then the number below
  double temperature;
  bool cosine;
  bool double_compute;
};

struct PrototypesForward : PrototypesProblem {
  const float* uniform;  // [B] in [0, 1): labels are drawn from c; null: argmax
  bool skip_nonfinite;   // label -1 for rows with NaN or infinity
  void* assignment;      // T [B, K]
  int64_t* labels;       // [B] or null
  void* entropy;         // T [B] or null
  double* sums;          // [K, D] or null: no update
  int64_t* counts;       // [K]
  double new_weight;
  const void* blend_source;  // [K, D] of blend_kind: the prototypes before they were converted to T, if they were
  Kind blend_kind;
  void* updated;  // [K, D] of blend_kind
};

struct PrototypesBackward : PrototypesProblem {
  const void* assignment;       // T [B, K]
  const void* grad_assignment;  // T [B, K]
  const void* grad_entropy;     // T [B] or null
  void* grad_z;                 // [B, D] of z_kind
  void* grad_prototypes;        // [K, D] of grad_prototypes_kind, or null
  void* grad_temperature;       // T [1]; CUDA
  Kind grad_prototypes_kind;    // CUDA, whose prototypes are of T
};

struct PrototypesAccumulate {
  int64_t B, K, D;
  const void* z;  // [B, D]
  Kind z_kind;
  int64_t z_stride;
  const int64_t* labels;  // [B]; negative: ignored
  bool skip_nonfinite;
  double* sums;     // [K, D]
  int64_t* counts;  // [K]
};

struct PrototypesBlend {
  int64_t K, D;
  const void* prototypes;  // [K, D] of kind
  Kind kind;
  const double* sums;     // [K, D]
  const int64_t* counts;  // [K]
  double new_weight;
  void* updated;  // [K, D] of kind
};

// ------------------------------------------------------------------------------------------------- CPU (csrc/ops/cpu)

// Rows are cut into chunks by shape alone; a chunk is the unit of work and of summation.
struct PrototypesChunks {
  int64_t rows, count;
};
PrototypesChunks prototypes_chunks(int64_t B, int64_t K, int64_t D);

// One table per instruction set. Work on rows goes by chunks [begin, end) with private partial sums; adding those up goes by prototypes, each
// by one thread in the order of the chunks.
struct PrototypesCpu {
  const char* level;
  int64_t (*panel_elements)(const PrototypesProblem&);     // packed prototypes, elements of T
  int64_t (*gradient_elements)(const PrototypesProblem&);  // partial prototype gradient of a chunk, elements of T
  void (*pack_forward)(const PrototypesProblem&, void* panels);
  void (*pack_backward)(const PrototypesProblem&, void* panels);
  void (*forward)(const PrototypesForward&, const void* panels, PrototypesChunks, double* partial_sums, int64_t* partial_counts,
                  int64_t begin, int64_t end);
  void (*backward)(const PrototypesBackward&, const void* panels, PrototypesChunks, void* partial_gradients, double* partial_temperature,
                   int64_t begin, int64_t end);
  void (*finish_gradient)(const PrototypesBackward&, PrototypesChunks, const void* partial_gradients, int64_t first_k, int64_t last_k);
  bool (*accumulate)(const PrototypesAccumulate&, PrototypesChunks, double* partial_sums, int64_t* partial_counts, int64_t begin,
                     int64_t end);
  void (*finish_sums)(int64_t K, int64_t D, PrototypesChunks, const double* partial_sums, const int64_t* partial_counts, double* sums,
                      int64_t* counts, int64_t first_k, int64_t last_k);
  void (*blend)(const PrototypesBlend&);
};
const PrototypesCpu& prototypes_cpu();  // the best table this machine can run

// ---------------------------------------------------------------------------------------------- CUDA (csrc/ops/cuda)

// Each returns a cudaError_t as int; workspace sizes are in bytes and depend on the shape only. Prototypes are of T, z of T or of half precision.
int64_t prototypes_forward_workspace(const PrototypesForward&);
int launch_prototypes_forward(const PrototypesForward&, void* workspace, void* stream);
int64_t prototypes_backward_workspace(const PrototypesBackward&);  // K <= 256, D <= 128, float
int launch_prototypes_backward(const PrototypesBackward&, void* workspace, void* stream);
int64_t prototypes_accumulate_workspace(const PrototypesAccumulate&);
int launch_prototypes_accumulate(const PrototypesAccumulate&, void* workspace, void* stream);
int launch_prototypes_blend(const PrototypesBlend&, void* stream);

}  // namespace protokernels
