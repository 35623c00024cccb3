// SPDX-License-Identifier: MIT
// Prototypes on the CPU, backward: one pass over z, c and its gradient in tiles of 64 rows in memory order.
//
// Two products run at 95 % of the peak and are two thirds of the time at 128x256. 64 rows, because each tile reads and writes the whole
// partial gradient: 32 cost 4 % more there, 128 a quarter more at 32x10. Tried without gain: prefetching the next tile.
#pragma once

#include "ops/cpu/prototypes_rows.h"

namespace {

using namespace protokernels;

constexpr int64_t TILE = 64;  // rows at a time; a multiple of TILE_ROWS

template <class T>
PK_INLINE int64_t padded_k(int64_t K) {
  return round_up(K, std::max<int64_t>(LANES<T>, TILE_ROWS));
}

// Reads rows [first, first + rows) of z into tile [TILE, stride]; with cosine they are scaled to unit length. Rows after the last are zero.
template <class T>
PK_INLINE void read_tile(const PrototypesProblem& problem, int64_t first, int64_t rows, T* tile, int64_t stride, double* inverse_norms) {
  for (int64_t r = 0; r < TILE; ++r) {
    T* row = tile + r * stride;
    if (r >= rows) {
      std::memset(row, 0, static_cast<size_t>(stride) * sizeof(T));
      continue;
    }
    read_row(problem.z, problem.z_kind, (first + r) * problem.z_stride, row, problem.D);
    for (int64_t d = problem.D; d < stride; ++d) row[d] = 0;
    inverse_norms[r] = problem.cosine ? inverse_norm(row, problem.D) : 1.0;
    if (problem.cosine) make_unit(row, problem.D, inverse_norms[r]);
  }
}

// ds of one row in place of dc; lanes from K on become zero.
template <class T>
PK_INLINE void softmax_backward_row(const T* c, const T* grad, const T* grad_entropy, int64_t K, int64_t padded, T* out) {
  const T mean = dot(grad, c, K);
  for (int64_t k = 0; k < K; ++k) out[k] = c[k] * (grad[k] - mean);
  for (int64_t k = K; k < padded; ++k) out[k] = 0;
  if (!grad_entropy) return;
  T entropy = 0;
  for (int64_t k = 0; k < K; ++k) entropy -= c[k] == 0 ? T(0) : c[k] * std::log(c[k]);
  for (int64_t k = 0; k < K; ++k) out[k] -= c[k] == 0 ? T(0) : *grad_entropy * c[k] * (std::log(c[k]) + entropy);
}

template <class T>
void backward_chunk(const PrototypesBackward& p, const T* panels, int64_t first, int64_t last, T* gradient, double* temperature_gradient) {
  const int64_t padded = padded_k<T>(p.K), stride = round_up(p.D, LANES<T>);
  const T inverse_t = static_cast<T>(inverse_temperature<T>(p));
  const T* const assignment = static_cast<const T*>(p.assignment);
  const T* const grad_assignment = static_cast<const T*>(p.grad_assignment);
  const T* const grad_entropy = static_cast<const T*>(p.grad_entropy);
  Scratch<T> tile(TILE * stride), ds(TILE * padded), t(TILE * stride);
  double inverse_norms[TILE];
  double temperature_sum = 0;
  const bool as_is = p.z_kind == kind_of<T>, streamed = as_is && worth_streaming(p.grad_z, p.D * static_cast<int64_t>(sizeof(T)), p.B);
  if (gradient) std::fill(gradient, gradient + padded * stride, T(0));
  for (int64_t i = first; i < last; i += TILE) {
    const int64_t rows = std::min(TILE, last - i), whole_rows = round_up(rows, TILE_ROWS);
    read_tile(p, i, rows, tile.data, stride, inverse_norms);
    for (int64_t r = 0; r < whole_rows; ++r) {
      if (r >= rows)
        std::memset(ds.data + r * padded, 0, static_cast<size_t>(padded) * sizeof(T));
      else
        softmax_backward_row(assignment + (i + r) * p.K, grad_assignment + (i + r) * p.K, grad_entropy ? grad_entropy + i + r : nullptr,
                             p.K, padded, ds.data + r * padded);
    }
    multiply_panels(ds.data, padded, panels, whole_rows, p.K, p.D, t.data, stride);
    for (int64_t r = 0; r < rows; ++r) {
      const T* const z = tile.data + r * stride;
      T* const grad = t.data + r * stride;
      const T along = dot(z, grad, p.D);  // = <ds, s> * temperature
      temperature_sum += static_cast<double>(along) * inverse_t;
      const T project = p.cosine ? along : T(0), scale = static_cast<T>(inverse_norms[r] * inverse_t);
      if (streamed) {
        T* const out = static_cast<T*>(p.grad_z) + (i + r) * p.D;
        for (int64_t d = 0; d < p.D; d += LANES<T>) stream(out + d, (load(grad + d) - load(z + d) * project) * scale);
        continue;
      }
      for (int64_t d = 0; d < p.D; ++d) grad[d] = (grad[d] - z[d] * project) * scale;
      write_row(p.grad_z, p.z_kind, (i + r) * p.D, grad, p.D);
    }
    if (gradient) accumulate_outer(ds.data, padded, tile.data, stride, whole_rows, padded, p.D, gradient, stride);
  }
  if (streamed) stream_end();
  *temperature_gradient = -temperature_sum * inverse_t;
}

// Adds the chunks' partial gradients in order and, for cosine, projects them off the prototypes.
template <class T>
void finish_gradient_of(const PrototypesBackward& p, PrototypesChunks chunks, const T* partial, int64_t first_k, int64_t last_k) {
  const int64_t stride = round_up(p.D, LANES<T>), chunk_size = padded_k<T>(p.K) * stride;
  const double inverse_t = inverse_temperature<T>(p);
  Scratch<double> total(p.D);
  Scratch<T> prototype(p.D);
  for (int64_t k = first_k; k < last_k; ++k) {
    std::fill(total.data, total.data + p.D, 0.0);
    for (int64_t c = 0; c < chunks.count; ++c)
      for (int64_t d = 0; d < p.D; ++d) total.data[d] += static_cast<double>(partial[c * chunk_size + k * stride + d]);
    read_row(p.prototypes, p.prototypes_kind, k * p.D, prototype.data, p.D);
    const double norm = p.cosine ? inverse_norm(prototype.data, p.D) : 1.0;
    double along = 0;
    if (p.cosine)
      for (int64_t d = 0; d < p.D; ++d) along += total.data[d] * static_cast<double>(prototype.data[d]) * norm;
    for (int64_t d = 0; d < p.D; ++d)
      prototype.data[d] = static_cast<T>((total.data[d] - along * static_cast<double>(prototype.data[d]) * norm) * norm * inverse_t);
    write_row(p.grad_prototypes, p.prototypes_kind, k * p.D, prototype.data, p.D);
  }
}

}  // namespace
