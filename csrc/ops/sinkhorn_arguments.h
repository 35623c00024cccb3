// SPDX-License-Identifier: MIT
// What the Sinkhorn operators share: problems and chunks over threads, checks that protect memory, and the problems they make for the kernels
// of either device.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>

#include "common/torch_utils.h"
#include "ops/sinkhorn.h"

namespace protokernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr double SERIAL_WORK =
    1e5;  // about 30 microseconds, in elements of an iteration: below it a second thread costs more than it brings

// ------------------------------------------------------------------------------------------------------------ threads

inline void each_on_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(context, chunk);
  });
}

// Runs function(b, scratch, each) for every problem. Whole problems go to the threads as those get free; what is left over from an even
// division, and few large problems, are worked on by all threads together, chunk by chunk. Either gives the same bits.
template <class Function>
void for_problems(const Tensor& like, int64_t B, int64_t chunks, double work, int64_t scratch_bytes, const Function& function) {
  const int64_t threads = work * static_cast<double>(B) < SERIAL_WORK ? 1 : torch::stable::get_num_threads();
  const int64_t workers = std::max<int64_t>(1, std::min(threads, B)), whole = chunks > 1 && threads > 1 ? B / threads * threads : B;
  const Tensor scratch = empty_beside(like, {workers * scratch_bytes}, ScalarType::Byte);
  char* const bytes = static_cast<char*>(scratch.data_ptr());
  std::atomic<int64_t> next{0};
  const auto work_off = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t b = next++; b < whole; b = next++) function(b, bytes + worker * scratch_bytes, nullptr);
  };
  if (workers == 1 && whole == B)
    work_off(0, 1);
  else if (whole > 0)
    parallel_for(0, workers, 1, work_off);
  for (int64_t b = whole; b < B; ++b) function(b, bytes, each_on_threads);
}

// ------------------------------------------------------------------------------------------------------------ arguments

inline const void* checked(const Tensor& tensor, const char* name, Kind kind, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && kind_of(tensor, name) == kind;
  int64_t dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, "sinkhorn: ", name, " must be contiguous, of the shape and the floating-point type that fit the cost");
  return tensor.data_ptr();
}

inline const void* checked(const OptionalTensor& tensor, const char* name, Kind kind, std::initializer_list<int64_t> sizes) {
  return tensor ? checked(*tensor, name, kind, sizes) : nullptr;
}

inline Kind native_kind(const Tensor& tensor, const char* name) {
  const Kind kind = kind_of(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 3 && (kind == Kind::f32 || kind == Kind::f64), "sinkhorn: ", name,
                  " must be float32 or float64 of three dimensions");
  return kind;
}

template <class Problem>
void fill_shape(Problem& p, const Tensor& cost) {
  p.kind = native_kind(cost, "cost");
  p.B = cost.size(0), p.N = cost.size(1), p.M = cost.size(2);
  STD_TORCH_CHECK(p.N > 0 && p.M > 0 && p.N < (int64_t{1} << 31) && p.M < (int64_t{1} << 31), "sinkhorn: cost must have rows and columns");
  p.cost = checked(cost, "cost", p.kind, {p.B, p.N, p.M});
}

template <class Problem>
void fill_potentials(Problem& p, const Tensor& f, const Tensor& g, const Tensor& epsilon) {
  p.f = checked(f, "f", p.kind, {p.B, p.N});
  p.g = checked(g, "g", p.kind, {p.B, p.M});
  p.epsilon = checked(epsilon, "epsilon", p.kind, {p.B});
}

template <class Problem>
void fill_measures(Problem& p, const Tensor& a, const Tensor& b, const Tensor& epsilon, const OptionalTensor& g_init, double rho_a,
                   double rho_b) {
  p.a = checked(a, "a", p.kind, {p.B, p.N});
  p.b = checked(b, "b", p.kind, {p.B, p.M});
  p.epsilon = checked(epsilon, "epsilon", p.kind, {p.B});
  p.g_init = checked(g_init, "g_init", p.kind, {p.B, p.M});
  p.rho_a = rho_a, p.rho_b = rho_b;
}

inline ScalarType scalar_type(Kind kind) { return kind == Kind::f64 ? ScalarType::Double : ScalarType::Float; }

inline double elements(int64_t N, int64_t M) { return static_cast<double>(N) * static_cast<double>(M); }

struct Solution {
  Tensor f, g, transport_cost, entropic_value, marginal_error, iterations, feasible;

  template <class Problem>
  Solution(Problem& p, const Tensor& like, int64_t num_iters, double tolerance)
      : f(empty_beside(like, {p.B, p.N}, scalar_type(p.kind))),
        g(empty_beside(like, {p.B, p.M}, scalar_type(p.kind))),
        transport_cost(empty_beside(like, {p.B}, scalar_type(p.kind))),
        entropic_value(empty_beside(like, {p.B}, scalar_type(p.kind))),
        marginal_error(empty_beside(like, {p.B}, scalar_type(p.kind))),
        iterations(empty_beside(like, {p.B}, ScalarType::Long)),
        feasible(empty_beside(like, {p.B}, ScalarType::Bool)) {
    STD_TORCH_CHECK(num_iters > 0, "sinkhorn: num_iters must be positive");
    p.num_iters = num_iters, p.tolerance = tolerance;
    p.f = f.data_ptr(), p.g = g.data_ptr();
    p.transport_cost = transport_cost.data_ptr(), p.entropic_value = entropic_value.data_ptr();
    p.marginal_error = marginal_error.data_ptr();
    p.iterations = static_cast<int64_t*>(iterations.data_ptr()), p.feasible = static_cast<bool*>(feasible.data_ptr());
  }
};

// What a CUDA call is wrapped in; a CPU call needs nothing.
template <bool ON_CUDA>
struct Guard {
  explicit Guard(const Tensor&) {}
};
#if defined(PROTOKERNELS_WITH_CUDA)
template <>
struct Guard<true> {
  torch::stable::accelerator::DeviceGuard guard;
  explicit Guard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
};

template <class Problem>
void launch(const Problem& p, const Tensor& like, int64_t workspace_bytes, int (*launcher)(const Problem&, void*, void*),
            const char* what) {
  const Tensor workspace = empty_beside(like, {workspace_bytes}, ScalarType::Byte);
  check_cuda(launcher(p, workspace.data_ptr(), current_cuda_stream(like)), what);
}
#endif

}  // namespace
}  // namespace protokernels
