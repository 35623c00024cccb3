// SPDX-License-Identifier: MIT
// Prototypes on the CPU: the update from labels, and the table through which ops/prototypes.cpp calls what this file and its headers
// (prototypes_forward.h, prototypes_backward.h) hold. The equations stand in ops/prototypes.h.
// Limit at B = 65536, D = 128, K = 256: 4.3 GFLOP of FMA and 101 MB of traffic.

#include "ops/prototypes.h"

#include <algorithm>

#include "common/cpu_level.h"
#include "ops/cpu/prototypes_backward.h"
#include "ops/cpu/prototypes_forward.h"

namespace {

using namespace protokernels;

// ------------------------------------------------------------------------------------------------------ update from labels

template <class T>
bool accumulate_chunk(const PrototypesAccumulate& p, int64_t first, int64_t last, double* sums, int64_t* counts) {
  Scratch<T> converted(p.D);
  std::fill(sums, sums + p.K * p.D, 0.0);
  std::fill(counts, counts + p.K, int64_t{0});
  for (int64_t i = first; i < last; ++i) {
    const int64_t label = p.labels[i];
    if (label >= p.K) return false;
    if (label < 0) continue;
    if (p.skip_nonfinite) {
      read_row(p.z, p.z_kind, i * p.z_stride, converted.data, p.D);
      if (!is_finite_row(converted.data, p.D)) continue;
    }
    add_row(p.z, p.z_kind, i * p.z_stride, p.D, converted.data, sums + label * p.D);
    ++counts[label];
  }
  return true;
}

void finish_sums(int64_t K, int64_t D, PrototypesChunks chunks, const double* partial_sums, const int64_t* partial_counts, double* sums,
                 int64_t* counts, int64_t first_k, int64_t last_k) {
  std::fill(sums + first_k * D, sums + last_k * D, 0.0);
  std::fill(counts + first_k, counts + last_k, int64_t{0});
  for (int64_t c = 0; c < chunks.count; ++c) {
    for (int64_t i = first_k * D; i < last_k * D; ++i) sums[i] += partial_sums[c * K * D + i];
    for (int64_t k = first_k; k < last_k; ++k) counts[k] += partial_counts[c * K + k];
  }
}

void blend(const PrototypesBlend& p) {
  Scratch<double> row(p.D);
  for (int64_t k = 0; k < p.K; ++k) {
    read_row(p.prototypes, p.kind, k * p.D, row.data, p.D);
    if (p.counts[k] > 0) {
      const double scale = p.new_weight / static_cast<double>(p.counts[k]);
      for (int64_t d = 0; d < p.D; ++d) row.data[d] = scale * p.sums[k * p.D + d] + (1.0 - p.new_weight) * row.data[d];
    }
    write_row(p.updated, p.kind, k * p.D, row.data, p.D);
  }
}

// ------------------------------------------------------------------------------------------------------------------ table

template <class Function>
PK_INLINE auto with_compute_type(bool double_compute, Function function) {
  return double_compute ? function(double{}) : function(float{});
}

int64_t panel_elements(const PrototypesProblem& p) {
  return with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    return p.K * round_up(p.D, LANES<T>);
  });
}

int64_t gradient_elements(const PrototypesProblem& p) {
  return with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    return padded_k<T>(p.K) * round_up(p.D, LANES<T>);
  });
}

void pack_forward(const PrototypesProblem& p, void* panels) {
  with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    Scratch<T> rows(p.K * p.D);
    read_prototypes(p, rows.data);
    pack_groups(rows.data, p.K, p.D, static_cast<T>(inverse_temperature<T>(p) < 0 ? -1 : 1), static_cast<T*>(panels));
  });
}

void pack_backward(const PrototypesProblem& p, void* panels) {
  with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    Scratch<T> rows(p.K * p.D);
    read_prototypes(p, rows.data);
    pack_panels(rows.data, p.D, 1, p.K, p.D, static_cast<T*>(panels));
  });
}

void forward(const PrototypesForward& p, const void* panels, PrototypesChunks chunks, double* partial_sums, int64_t* partial_counts,
             int64_t begin, int64_t end) {
  with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t c = begin; c < end; ++c)
      forward_chunk(p, static_cast<const T*>(panels), c * chunks.rows, std::min(p.B, (c + 1) * chunks.rows),
                    partial_sums ? partial_sums + c * p.K * p.D : nullptr, partial_counts ? partial_counts + c * p.K : nullptr);
  });
}

void backward(const PrototypesBackward& p, const void* panels, PrototypesChunks chunks, void* partial_gradients,
              double* partial_temperature, int64_t begin, int64_t end) {
  [[maybe_unused]] const FlushToZero flush;  // at sharp temperatures small weights meet small gradients
  with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t c = begin; c < end; ++c)
      backward_chunk(p, static_cast<const T*>(panels), c * chunks.rows, std::min(p.B, (c + 1) * chunks.rows),
                     partial_gradients ? static_cast<T*>(partial_gradients) + c * gradient_elements(p) : nullptr, partial_temperature + c);
  });
}

void finish_gradient(const PrototypesBackward& p, PrototypesChunks chunks, const void* partial_gradients, int64_t first_k, int64_t last_k) {
  with_compute_type(p.double_compute, [&](auto zero) {
    using T = decltype(zero);
    finish_gradient_of(p, chunks, static_cast<const T*>(partial_gradients), first_k, last_k);
  });
}

bool accumulate(const PrototypesAccumulate& p, PrototypesChunks chunks, double* partial_sums, int64_t* partial_counts, int64_t begin,
                int64_t end) {
  return with_compute_type(p.z_kind == Kind::f64, [&](auto zero) {
    using T = decltype(zero);
    bool valid = true;
    for (int64_t c = begin; c < end; ++c)
      valid &= accumulate_chunk<T>(p, c * chunks.rows, std::min(p.B, (c + 1) * chunks.rows), partial_sums + c * p.K * p.D,
                                   partial_counts + c * p.K);
    return valid;
  });
}

}  // namespace

namespace protokernels {

extern const PrototypesCpu PK_LEVEL_TABLE(prototypes_cpu);
const PrototypesCpu PK_LEVEL_TABLE(prototypes_cpu) = {PK_STRINGIFY(PROTOKERNELS_LEVEL),
                                                      panel_elements,
                                                      gradient_elements,
                                                      pack_forward,
                                                      pack_backward,
                                                      forward,
                                                      backward,
                                                      finish_gradient,
                                                      accumulate,
                                                      finish_sums,
                                                      blend};

}  // namespace protokernels
