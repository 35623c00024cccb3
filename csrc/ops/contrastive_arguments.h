// SPDX-License-Identifier: MIT
// The arguments of the contrastive operators: checks that protect memory, and the problems they make for the kernels of either device.
#pragma once

#include <optional>
#include <tuple>

#include "common/torch_utils.h"
#include "ops/contrastive.h"

namespace protokernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

inline ScalarType compute_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

inline const void* checked(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == type;
  int64_t dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, "contrastive: ", name, " must be contiguous, of the shape and the type that fit the vectors");
  return tensor.data_ptr();
}

inline const void* checked(const OptionalTensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  return tensor ? checked(*tensor, name, type, sizes) : nullptr;
}

inline ScalarType vector_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "contrastive: vectors must be float32 or float64");
  return type;
}

inline void fill_problem(ContrastiveProblem& p, const Tensor& rows, const OptionalTensor& columns, const Tensor& groups,
                         const Tensor& ranges, int64_t channels, double temperature, bool unit, int64_t precision) {
  const ScalarType type = vector_type(rows);
  p.double_compute = type == ScalarType::Double;
  STD_TORCH_CHECK(rows.dim() == 2 && (!columns || columns->dim() == 2) && groups.dim() == 2,
                  "contrastive: vectors and groups must be matrices");
  p.R = rows.size(0), p.M = columns ? columns->size(0) : p.R, p.G = groups.size(0), p.C = channels, p.Cp = rows.size(1);
  STD_TORCH_CHECK(channels > 0 && p.Cp == (channels + CONTRASTIVE_ALIGN - 1) / CONTRASTIVE_ALIGN * CONTRASTIVE_ALIGN &&
                      p.R < (int64_t{1} << 31) && p.M < (int64_t{1} << 31) && temperature > 0 && precision >= 0 && precision <= 2,
                  "contrastive: vectors must have their channels rounded up to 16, fewer than 2^31 rows and a positive temperature");
  p.rows = checked(rows, "rows", type, {p.R, p.Cp});
  p.one_set = !columns;
  p.columns = columns ? checked(*columns, "columns", type, {p.M, p.Cp}) : p.rows;
  p.groups = static_cast<const ContrastiveGroup*>(checked(groups, "groups", ScalarType::Int, {p.G, 6}));
  p.ranges = static_cast<const ContrastiveRange*>(checked(ranges, "ranges", ScalarType::Int, {p.R, 3}));
  p.temperature = temperature;
  p.unit = unit;
  p.bounded = unit && 2 / temperature < CONTRASTIVE_BOUND;
  p.precision = static_cast<ContrastivePrecision>(precision);
}

inline ContrastiveForm form_of(int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form <= 3, "contrastive: form must be 0 to 3");
  return static_cast<ContrastiveForm>(form);
}

inline void fill_coefficients(ContrastiveCoefficients& c, const OptionalTensor& grad_losses, const Tensor& statistics, const Tensor& groups,
                              const Tensor& ranges, int64_t form, const OptionalTensor& grad_total, const OptionalTensor& weights,
                              int64_t numbers) {
  const ScalarType type = vector_type(statistics);
  STD_TORCH_CHECK(statistics.dim() == 2 && groups.dim() == 2, "contrastive: statistics and groups must be matrices");
  c.R = statistics.size(1), c.G = groups.size(0), c.form = form_of(form), c.double_compute = type == ScalarType::Double;
  c.statistics = checked(statistics, "statistics", type, {numbers, c.R});
  c.grad_losses = checked(grad_losses, "the gradient of losses", type, {c.R});
  c.grad_total = checked(grad_total, "the gradient of the total", type, {});
  c.weights = static_cast<const double*>(checked(weights, "weights", ScalarType::Double, {c.R}));
  STD_TORCH_CHECK(grad_total.has_value() == weights.has_value() && (grad_losses || grad_total),
                  "contrastive: a gradient of the total comes with weights, and one of the two gradients is needed");
  c.groups = static_cast<const ContrastiveGroup*>(checked(groups, "groups", ScalarType::Int, {c.G, 6}));
  c.ranges = static_cast<const ContrastiveRange*>(checked(ranges, "ranges", ScalarType::Int, {c.R, 3}));
}

inline void fill_losses(ContrastiveBackward& b, const OptionalTensor& row_statistics, const OptionalTensor& row_coefficients,
                        const OptionalTensor& column_statistics, const OptionalTensor& column_coefficients, ScalarType type,
                        int64_t numbers) {
  b.row_statistics = checked(row_statistics, "the rows' statistics", type, {numbers, b.R});
  b.row_coefficients = checked(row_coefficients, "the rows' coefficients", type, {3, b.R});
  b.column_statistics = checked(column_statistics, "the columns' statistics", type, {numbers, b.M});
  b.column_coefficients = checked(column_coefficients, "the columns' coefficients", type, {3, b.M});
  STD_TORCH_CHECK(row_statistics.has_value() == row_coefficients.has_value() &&
                      column_statistics.has_value() == column_coefficients.has_value() && (!b.one_set || row_statistics),
                  "contrastive: statistics and coefficients come together; with one set of vectors they are those of the rows");
  if (b.one_set) b.column_statistics = b.row_statistics, b.column_coefficients = b.row_coefficients;
}

inline void fill_pack(ContrastivePack& p, const Tensor& x, const Tensor& order, bool normalize, bool on_cpu) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && order.dim() == 1,
                  "contrastive: x must be [N, C, P] with at least one channel, order [R]");
  p.R = order.size(0), p.N = x.size(0), p.C = x.size(1), p.P = x.size(2);
  p.Cp = (p.C + CONTRASTIVE_ALIGN - 1) / CONTRASTIVE_ALIGN * CONTRASTIVE_ALIGN;
  p.x_kind = kind_of(x, "x");
  p.double_compute = p.x_kind == Kind::f64;
  p.order = static_cast<const int64_t*>(checked(order, "order", ScalarType::Long, {p.R}));
  p.normalize = normalize;
  if (!on_cpu) return;
  bool fit = true;
  for (int64_t r = 0; r < p.R; ++r) fit &= p.order[r] >= 0 && p.order[r] < p.N * p.P;
  STD_TORCH_CHECK(fit, "contrastive: order points outside of x");
}

// Run: what is done with the problem, on the CPU or the device.
template <class Run>
std::tuple<Tensor, Tensor> pack_by(const Run& run, const Tensor& x, const Tensor& order, bool normalize, bool on_cpu) {
  ContrastivePack p{};
  fill_pack(p, x, order, normalize, on_cpu);
  p.x = x.data_ptr(), p.stride_n = x.stride(0), p.stride_c = x.stride(1), p.stride_p = x.stride(2);
  const Tensor packed = empty_beside(x, {p.R, p.Cp}, compute_type(p.double_compute)),
               norms = empty_beside(x, {p.R}, compute_type(p.double_compute));
  p.packed = packed.data_ptr(), p.norms = norms.data_ptr();
  run(p);
  return {packed, norms};
}

template <class Run>
Tensor unpack_by(const Run& run, const Tensor& grad_packed_any, const Tensor& packed, const Tensor& norms, const Tensor& order,
                 const Tensor& like, bool normalize, bool channels_last, bool on_cpu) {
  const Tensor grad_packed = as_contiguous(grad_packed_any);
  ContrastiveUnpack p{};
  fill_pack(p, like, order, normalize, on_cpu);
  p.grad_packed = checked(grad_packed, "the gradient of packed", compute_type(p.double_compute), {p.R, p.Cp});
  p.packed = const_cast<void*>(checked(packed, "packed", compute_type(p.double_compute), {p.R, p.Cp}));
  p.norms = const_cast<void*>(checked(norms, "norms", compute_type(p.double_compute), {p.R}));
  Tensor memory =
      channels_last ? empty_beside(like, {p.N, p.P, p.C}, like.scalar_type()) : empty_beside(like, {p.N, p.C, p.P}, like.scalar_type());
  if (p.R != p.N * p.P) torch::stable::zero_(memory);
  const Tensor grad_x = channels_last ? torch::stable::transpose(memory, 1, 2) : memory;
  p.grad_x = grad_x.data_ptr(), p.stride_n = grad_x.stride(0), p.stride_c = grad_x.stride(1), p.stride_p = grad_x.stride(2);
  run(p);
  return grad_x;
}

// Images [N, C, ...] and vectors [N, C] as [N, C, P]; a copy only where the axes of the pixels cannot be read as one.
inline Tensor as_vectors(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "contrastive: x must be [N, C] or [N, C, ...]");
  return x.dim() == 2 ? torch::stable::unsqueeze(x, 2) : x.dim() == 3 ? x : torch::stable::flatten(x, 2, -1);
}

// Two views, [N, C] each, one after the other.
inline Tensor stacked(const Tensor& first, const OptionalTensor& second) {
  if (!second) return first;
  const int64_t N = first.size(0), C = first.size(1);
  STD_TORCH_CHECK(first.dim() == 2 && second->dim() == 2 && second->size(0) == N && second->size(1) == C &&
                      second->scalar_type() == first.scalar_type(),
                  "contrastive: both views must be [N, C] and of one type");
  Tensor both = empty_beside(first, {2 * N, C}, first.scalar_type());
  Tensor upper = torch::stable::narrow(both, 0, 0, N), lower = torch::stable::narrow(both, 0, N, N);
  torch::stable::copy_(upper, first), torch::stable::copy_(lower, *second);
  return both;
}

using LossesOfVectors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Pack, Forward: the operators of a device. What a training step calls is one operator forward and one backward, since on small problems torch
// takes longer between operators than the kernels do.
template <class Pack, class Forward>
LossesOfVectors losses_by(const Pack& pack, const Forward& forward, const Tensor& x, const OptionalTensor& second, const Tensor& order,
                          const Tensor& groups, const Tensor& ranges, const Tensor& weights, double temperature, bool normalize,
                          int64_t form, int64_t precision) {
  const Tensor vectors = as_vectors(stacked(x, second));
  const auto [packed, norms] = pack(vectors, order, normalize);
  const auto [total, losses, statistics] =
      forward(packed, std::nullopt, groups, ranges, weights, vectors.size(1), temperature, normalize, form, precision);
  return {total, losses, packed, norms, statistics};
}

template <class Coefficients, class Backward, class Unpack>
Tensor losses_backward_by(const Coefficients& coefficients_of, const Backward& backward, const Unpack& unpack,
                          const OptionalTensor& grad_total, const OptionalTensor& grad_losses, const Tensor& packed, const Tensor& norms,
                          const Tensor& order, const Tensor& groups, const Tensor& ranges, const Tensor& weights, const Tensor& statistics,
                          const Tensor& like, double temperature, bool normalize, int64_t form, int64_t precision, bool channels_last) {
  const OptionalTensor by_loss = grad_losses ? OptionalTensor(as_contiguous(*grad_losses)) : std::nullopt;
  const Tensor coefficients =
      coefficients_of(by_loss, statistics, groups, ranges, form, grad_total, grad_total ? OptionalTensor(weights) : std::nullopt);
  const Tensor vectors = as_vectors(like);
  const Tensor grad_rows = backward(packed, std::nullopt, groups, ranges, statistics, coefficients, statistics, coefficients,
                                    vectors.size(1), temperature, normalize, precision);
  const Tensor grad = unpack(grad_rows, packed, norms, order, vectors, normalize, channels_last);
  return like.dim() == 3 ? grad : torch::stable::view(grad, like.sizes());
}

}  // namespace
}  // namespace protokernels
