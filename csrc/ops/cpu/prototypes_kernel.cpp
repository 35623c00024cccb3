// SPDX-License-Identifier: MIT
// Prototypes on the CPU: one pass over z in tiles of 32 rows. The equations stand in ops/prototypes.h.
//
// A tile of z is normalised into L1, multiplied with the packed prototypes by an 8 x 2-vector register tile, and its rows are turned into
// softmax, argmax, entropy and label while they are still there; the members are then added to the chunk's float64 sums.
// Limit at B = 65536, D = 128, K = 256: 4.3 GFLOP of FMA and 101 MB of traffic.

#include "ops/prototypes.h"

#include <algorithm>
#include <limits>
#include <new>
#include <type_traits>

#include "common/cpu_level.h"
#include "common/tile_product.h"

namespace {

using namespace protokernels;

constexpr int64_t TILE = 32;  // rows of z at a time; a multiple of TILE_ROWS

// Uninitialised scratch, aligned for full-width vectors.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count) : data(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

template <class T>
PK_INLINE int64_t padded_k(int64_t K) {
  return round_up(K, std::max<int64_t>(LANES<T>, TILE_ROWS));
}

template <class T>
PK_INLINE double inverse_temperature(const PrototypesProblem& problem) {
  return 1.0 /
         (problem.temperature_pointer ? static_cast<double>(*static_cast<const T*>(problem.temperature_pointer)) : problem.temperature);
}

// 1 / |x|, or 0 for a vector that counts as zero; NaN passes through.
template <class T>
PK_INLINE double inverse_norm(const T* x, int64_t D) {
  const double squared = squared_norm(x, D);
  return squared <= PROTOTYPE_NORM_FLOOR * PROTOTYPE_NORM_FLOOR ? 0.0 : 1.0 / std::sqrt(squared);
}

template <class T>
PK_INLINE bool is_finite_row(const T* x, int64_t D) {
  T sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += x[d] * T(0);
  return sum == T(0);
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
    if (!problem.cosine) continue;
    const T scale = static_cast<T>(inverse_norms[r]);
    for (int64_t d = 0; d < problem.D; ++d) row[d] *= scale;
  }
}

// The prototypes as T, unit length for cosine: [K, D].
template <class T>
PK_INLINE void read_prototypes(const PrototypesProblem& problem, T* out) {
  for (int64_t k = 0; k < problem.K; ++k) {
    T* row = out + k * problem.D;
    read_row(problem.prototypes, problem.prototypes_kind, k * problem.D, row, problem.D);
    if (!problem.cosine) continue;
    const T scale = static_cast<T>(inverse_norm(row, problem.D));
    for (int64_t d = 0; d < problem.D; ++d) row[d] *= scale;
  }
}

// ---------------------------------------------------------------------------------------------------------------- forward

template <class T>
struct RowResult {
  T sum, entropy;
  int64_t label;
};

// Softmax of one row of scores in place, not yet divided by its sum. Lanes from K to padded are ignored.
template <class T>
PK_INLINE RowResult<T> softmax_row(T* s, int64_t K, int64_t padded, T inverse_t, bool with_entropy) {
  const Vec<T> lowest = broadcast(-std::numeric_limits<T>::infinity());
  const Index<T> end = Index<T>{} + static_cast<int>(K);
  Index<T> number = lane_numbers<T>(), best_number = number;
  Vec<T> best = lowest;
  for (int64_t k = 0; k < padded; k += LANES<T>) {
    const Vec<T> v = number < end ? load(s + k) * inverse_t : lowest;  // blended in, not stored before: the load would wait for the stores
    store(s + k, v);
    best_number = v > best ? number : best_number;
    best = v > best ? v : best;
    number += LANES<T>;
  }
  const T top = reduce_max(best);
  const Index<T> candidates = best == top ? best_number : Index<T>{} + std::numeric_limits<int32_t>::max();
  RowResult<T> result{0, 0, static_cast<int64_t>(reduce_min(candidates))};

  Vec<T> sum{}, weighted{};
  for (int64_t k = 0; k < padded; k += LANES<T>) {
    const Vec<T> shifted = load(s + k) - top;
    const Vec<T> e = exp_nonpositive(shifted);
    sum += e;
    if (with_entropy) weighted += e == T(0) ? Vec<T>{} : e * shifted;
    store(s + k, e);
  }
  result.sum = reduce_sum(sum);
  if (with_entropy) result.entropy = std::log(result.sum) - reduce_sum(weighted) / result.sum;
  return result;
}

// The first lane that is NaN: what torch's argmax calls the largest.
template <class T>
PK_INLINE int64_t first_nan(const T* s, int64_t K) {
  for (int64_t k = 0; k < K; ++k)
    if (s[k] != s[k]) return k;
  return 0;
}

// The first k whose cumulative weight exceeds uniform * sum; if rounding leaves none, the last with a weight.
template <class T>
PK_INLINE int64_t draw_label(const T* weights, int64_t K, T sum, float uniform) {
  const T threshold = sum * static_cast<T>(uniform);
  T cumulative = 0;
  int64_t last = 0;
  for (int64_t k = 0; k < K; ++k) {
    cumulative += weights[k];
    if (weights[k] > 0) last = k;
    if (cumulative > threshold) return k;
  }
  return last;
}

// c = weights / sum. Whole vectors run over the end of the row into the next one, which is written later; never past limit.
template <class T>
PK_INLINE void write_assignment(const T* weights, T sum, int64_t K, T* out, const T* limit) {
  const T scale = T(1) / sum;
  int64_t k = 0;
  for (; k < K && out + k + LANES<T> <= limit; k += LANES<T>) store(out + k, load(weights + k) * scale);
  for (; k < K; ++k) out[k] = weights[k] * scale;
}

template <class T>
PK_INLINE void add_row(const void* z, Kind kind, int64_t offset, int64_t D, T* converted, double* sum) {
  const T* row = converted;
  if (kind == (std::is_same_v<T, float> ? Kind::f32 : Kind::f64))
    row = static_cast<const T*>(z) + offset;
  else
    read_row(z, kind, offset, converted, D);
  for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<double>(row[d]);
}

template <class T>
void forward_chunk(const PrototypesForward& p, const T* panels, int64_t first, int64_t last, double* sums, int64_t* counts) {
  const int64_t padded = padded_k<T>(p.K);
  const T inverse_t = static_cast<T>(inverse_temperature<T>(p));
  Scratch<T> tile(TILE * p.D), scores(TILE * padded), converted(p.D);
  double inverse_norms[TILE];
  T* const assignment = static_cast<T*>(p.assignment);
  const T* const limit = assignment + last * p.K;
  if (sums) std::fill(sums, sums + p.K * p.D, 0.0), std::fill(counts, counts + p.K, int64_t{0});
  for (int64_t i = first; i < last; i += TILE) {
    const int64_t rows = std::min(TILE, last - i);
    read_tile(p, i, rows, tile.data, p.D, inverse_norms);
    multiply_panels(tile.data, p.D, panels, round_up(rows, TILE_ROWS), p.D, p.K, scores.data, padded);
    for (int64_t r = 0; r < rows; ++r) {
      T* const s = scores.data + r * padded;
      RowResult<T> row = softmax_row(s, p.K, padded, inverse_t, p.entropy != nullptr);
      const bool is_nan = row.sum != row.sum;
      if (is_nan) row.label = first_nan(s, p.K);
      if (p.uniform && !is_nan) row.label = draw_label(s, p.K, row.sum, p.uniform[i + r]);
      write_assignment(s, row.sum, p.K, assignment + (i + r) * p.K, limit);
      if (p.entropy) static_cast<T*>(p.entropy)[i + r] = row.entropy;
      if (p.skip_nonfinite && !is_finite_row(tile.data + r * p.D, p.D)) row.label = -1;
      if (p.labels) p.labels[i + r] = row.label;
      if (!sums || row.label < 0) continue;
      add_row(p.z, p.z_kind, (i + r) * p.z_stride, p.D, converted.data, sums + row.label * p.D);
      ++counts[row.label];
    }
  }
}

// --------------------------------------------------------------------------------------------------------------- backward

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
      const T project = p.cosine ? along : T(0), scale = static_cast<T>(inverse_norms[r]) * inverse_t;
      for (int64_t d = 0; d < p.D; ++d) grad[d] = (grad[d] - z[d] * project) * scale;
      write_row(p.grad_z, p.z_kind, (i + r) * p.D, grad, p.D);
    }
    if (gradient) accumulate_outer(ds.data, padded, tile.data, stride, whole_rows, padded, p.D, gradient, stride);
  }
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
    return std::max(p.D * round_up(p.K, LANES<T>), p.K * round_up(p.D, LANES<T>));
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
    pack_panels(rows.data, 1, p.D, p.D, p.K, static_cast<T*>(panels));
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
