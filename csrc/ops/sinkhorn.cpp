// SPDX-License-Identifier: MIT
// Sinkhorn, the torch side: checks that protect memory, allocation, problems and chunks over threads, registration.
#include "ops/sinkhorn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/cpu_level.h"
#include "common/torch_utils.h"

namespace protokernels {

// 2^17 elements a chunk: 15 microseconds, several times what handing it to a thread costs. At most 16, whose column sums one thread adds up.
SinkhornChunks sinkhorn_chunks(int64_t N, int64_t M) {
  const int64_t wanted = std::clamp<int64_t>(N * M >> 17, 1, 16);
  const int64_t rows = ((N + wanted - 1) / wanted + 15) / 16 * 16;
  return {rows, (N + rows - 1) / rows};
}

namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr double SERIAL_WORK =
    1e5;  // about 30 microseconds, in elements of an iteration: below it a second thread costs more than it brings

}  // namespace

PK_DECLARE_LEVELS(SinkhornCpu, sinkhorn_cpu);
PK_DECLARE_LEVELS(SinkhornPlanCpu, sinkhorn_plan_cpu);
PK_DECLARE_LEVELS(SinkhornUnrolledCpu, sinkhorn_unrolled_cpu);
PK_DECLARE_LEVELS(SinkhornImplicitCpu, sinkhorn_implicit_cpu);
PK_DECLARE_LEVELS(SinkhornFeaturesCpu, sinkhorn_features_cpu);
PK_DECLARE_LEVELS(SinkhornFeaturesGradientCpu, sinkhorn_features_gradient_cpu);

namespace {

// ------------------------------------------------------------------------------------------------------------ threads

void each_on_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
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

const void* checked(const Tensor& tensor, const char* name, Kind kind, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && kind_of(tensor, name) == kind;
  int64_t dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, "sinkhorn: ", name, " must be contiguous, of the shape and the floating-point type that fit the cost");
  return tensor.data_ptr();
}

const void* checked(const OptionalTensor& tensor, const char* name, Kind kind, std::initializer_list<int64_t> sizes) {
  return tensor ? checked(*tensor, name, kind, sizes) : nullptr;
}

Kind native_kind(const Tensor& tensor, const char* name) {
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

ScalarType scalar_type(Kind kind) { return kind == Kind::f64 ? ScalarType::Double : ScalarType::Float; }

double elements(int64_t N, int64_t M) { return static_cast<double>(N) * static_cast<double>(M); }

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

// ------------------------------------------------------------------------------------------------------------ masses

// NaN or infinite if one of them is negative or not finite.
template <class T>
double total_of(const T* masses, int64_t count) {
  double sums[4] = {};  // four chains: one would wait for itself
  bool negative = false;
  for (int64_t i = 0; i < count; ++i) {
    sums[i % 4] += static_cast<double>(masses[i]);
    negative |= !(masses[i] >= 0);
  }
  return negative ? std::numeric_limits<double>::quiet_NaN() : (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// In one pass what in PyTorch takes a dozen operators, which cost more than many a problem. Says no rather than yes where rounding decides.
bool masses_fit(Tensor a, Tensor b, bool balanced) {
  const Kind kind = kind_of(a, "a");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && (kind == Kind::f32 || kind == Kind::f64),
                  "sinkhorn: masses must be float32 or float64 of two dimensions");
  checked(a, "a", kind, {a.size(0), a.size(1)}), checked(b, "b", kind, {a.size(0), b.size(1)});
  const auto fit = [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = a.size(1), M = b.size(1);
    for (int64_t i = 0; i < a.size(0); ++i) {
      const double rows = total_of(static_cast<const T*>(a.data_ptr()) + i * N, N);
      const double columns = total_of(static_cast<const T*>(b.data_ptr()) + i * M, M);
      if (!std::isfinite(rows) || !std::isfinite(columns)) return false;
      if (balanced && std::abs(rows - columns) > 0.99 * SINKHORN_MASS_TOLERANCE * std::max(rows, columns)) return false;
    }
    return true;
  };
  return kind == Kind::f64 ? fit(double{}) : fit(float{});
}

// ------------------------------------------------------------------------------------------------------------ dense

template <bool ON_CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor cost, Tensor a, Tensor b, Tensor epsilon,
                                                                                   OptionalTensor g_init, int64_t num_iters,
                                                                                   double tolerance, double rho_a, double rho_b,
                                                                                   bool save_history) {
  const Guard<ON_CUDA> guard(cost);
  SinkhornForward p;
  fill_shape(p, cost);
  fill_measures(p, a, b, epsilon, g_init, rho_a, rho_b);
  const Solution out(p, cost, num_iters, tolerance);
  const Tensor history =
      save_history ? empty_beside(cost, {p.B, num_iters, p.N + p.M}, scalar_type(p.kind)) : empty_beside(cost, {0}, scalar_type(p.kind));
  p.history = save_history ? history.data_ptr() : nullptr;
  if constexpr (!ON_CUDA) {
    const SinkhornCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_cpu);
    for_problems(cost, p.B, sinkhorn_chunks(p.N, p.M).count, elements(p.N, p.M) * static_cast<double>(num_iters + 4),
                 cpu.forward_scratch(p), [&](int64_t i, void* scratch, SinkhornEach each) { cpu.forward(p, i, scratch, each); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, cost, sinkhorn_forward_workspace(p), launch_sinkhorn_forward, "sinkhorn_forward");
#endif
  }
  return {out.f, out.g, out.transport_cost, out.entropic_value, out.marginal_error, out.iterations, out.feasible, history};
}

template <bool ON_CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor cost, Tensor a, Tensor b, Tensor epsilon, OptionalTensor g_init, Tensor f,
                                                    Tensor g, Tensor iterations, Tensor history, OptionalTensor grad_f,
                                                    OptionalTensor grad_g, OptionalTensor grad_transport_cost,
                                                    OptionalTensor grad_entropic_value, bool implicit, double rho_a, double rho_b) {
  const Guard<ON_CUDA> guard(cost);
  SinkhornBackward p;
  fill_shape(p, cost);
  fill_measures(p, a, b, epsilon, g_init, rho_a, rho_b);
  fill_potentials(p, f, g, epsilon);
  STD_TORCH_CHECK(iterations.numel() == p.B && iterations.scalar_type() == ScalarType::Long && iterations.is_contiguous(),
                  "sinkhorn: iterations must be contiguous int64 [B]");
  p.iterations = static_cast<const int64_t*>(iterations.data_ptr());
  p.implicit = implicit;
  p.num_iters = 0, p.history = nullptr;
  if (implicit) {
    STD_TORCH_CHECK(std::isinf(rho_a) && std::isinf(rho_b), "sinkhorn: the implicit gradient is for balanced problems");
  } else {
    STD_TORCH_CHECK(history.dim() == 3, "sinkhorn: the unrolled gradient needs the history");
    p.num_iters = history.size(1);
    p.history = checked(history, "history", p.kind, {p.B, p.num_iters, p.N + p.M});
  }
  p.grad_f = checked(grad_f, "grad_f", p.kind, {p.B, p.N});
  p.grad_g = checked(grad_g, "grad_g", p.kind, {p.B, p.M});
  p.grad_transport_cost = checked(grad_transport_cost, "grad_transport_cost", p.kind, {p.B});
  p.grad_entropic_value = checked(grad_entropic_value, "grad_entropic_value", p.kind, {p.B});
  const Tensor grad_cost = empty_beside(cost, {p.B, p.N, p.M}, scalar_type(p.kind));
  const Tensor grad_a = empty_beside(cost, {p.B, p.N}, scalar_type(p.kind)), grad_b = empty_beside(cost, {p.B, p.M}, scalar_type(p.kind));
  const Tensor grad_epsilon = empty_beside(cost, {p.B}, scalar_type(p.kind));
  p.grad_cost = grad_cost.data_ptr(), p.grad_a = grad_a.data_ptr(), p.grad_b = grad_b.data_ptr(), p.grad_epsilon = grad_epsilon.data_ptr();
  if constexpr (!ON_CUDA) {
    const int64_t chunks = sinkhorn_chunks(p.N, p.M).count;
    if (implicit) {
      const SinkhornImplicitCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_implicit_cpu);
      for_problems(cost, p.B, chunks, elements(p.N, p.M) * 100, cpu.scratch(p),
                   [&](int64_t i, void* scratch, SinkhornEach each) { cpu.backward(p, i, scratch, each); });
    } else {
      const SinkhornUnrolledCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_unrolled_cpu);
      for_problems(cost, p.B, chunks, elements(p.N, p.M) * static_cast<double>(p.num_iters + 4), cpu.scratch(p),
                   [&](int64_t i, void* scratch, SinkhornEach each) { cpu.backward(p, i, scratch, each); });
    }
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, cost, sinkhorn_backward_workspace(p), launch_sinkhorn_backward, "sinkhorn_backward");
#endif
  }
  return {grad_cost, grad_a, grad_b, grad_epsilon};
}

template <bool ON_CUDA>
Tensor plan(Tensor cost, Tensor f, Tensor g, Tensor epsilon) {
  const Guard<ON_CUDA> guard(cost);
  SinkhornPlan p;
  fill_shape(p, cost);
  fill_potentials(p, f, g, epsilon);
  const Tensor out = empty_beside(cost, {p.B, p.N, p.M}, scalar_type(p.kind));
  p.plan = out.data_ptr();
  if constexpr (!ON_CUDA) {
    const SinkhornPlanCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_plan_cpu);
    parallel_for(0, p.B * p.N, std::max<int64_t>(1, static_cast<int64_t>(SERIAL_WORK) / p.M),
                                [&](int64_t begin, int64_t end) { cpu.plan(p, begin, end); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    check_cuda(launch_sinkhorn_plan(p, current_cuda_stream(cost)), "sinkhorn_plan");
#endif
  }
  return out;
}

template <bool ON_CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_backward(Tensor grad_plan, Tensor plan, Tensor cost, Tensor f, Tensor g, Tensor epsilon) {
  const Guard<ON_CUDA> guard(cost);
  SinkhornPlanBackward p;
  fill_shape(p, cost);
  fill_potentials(p, f, g, epsilon);
  p.grad_plan = checked(grad_plan, "grad_plan", p.kind, {p.B, p.N, p.M});
  p.plan = checked(plan, "plan", p.kind, {p.B, p.N, p.M});
  const Tensor grad_cost = empty_beside(cost, {p.B, p.N, p.M}, scalar_type(p.kind));
  const Tensor grad_f = empty_beside(cost, {p.B, p.N}, scalar_type(p.kind)), grad_g = empty_beside(cost, {p.B, p.M}, scalar_type(p.kind));
  const Tensor grad_epsilon = empty_beside(cost, {p.B}, scalar_type(p.kind));
  p.grad_cost = grad_cost.data_ptr(), p.grad_f = grad_f.data_ptr(), p.grad_g = grad_g.data_ptr(), p.grad_epsilon = grad_epsilon.data_ptr();
  if constexpr (!ON_CUDA) {
    const SinkhornPlanCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_plan_cpu);
    for_problems(cost, p.B, sinkhorn_chunks(p.N, p.M).count, elements(p.N, p.M) * 4, cpu.backward_scratch(p),
                 [&](int64_t i, void* scratch, SinkhornEach each) { cpu.backward(p, i, scratch, each); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, cost, sinkhorn_plan_backward_workspace(p), launch_sinkhorn_plan_backward, "sinkhorn_plan_backward");
#endif
  }
  return {grad_cost, grad_f, grad_g, grad_epsilon};
}

template <bool ON_CUDA>
std::tuple<Tensor, Tensor> envelope_backward(Tensor cost, Tensor f, Tensor g, Tensor epsilon, Tensor grad_entropic_value) {
  const Guard<ON_CUDA> guard(cost);
  SinkhornEnvelope p;
  fill_shape(p, cost);
  fill_potentials(p, f, g, epsilon);
  p.grad_entropic_value = checked(grad_entropic_value, "grad_entropic_value", p.kind, {p.B});
  const Tensor grad_cost = empty_beside(cost, {p.B, p.N, p.M}, scalar_type(p.kind));
  const Tensor grad_epsilon = empty_beside(cost, {p.B}, scalar_type(p.kind));
  p.grad_cost = grad_cost.data_ptr(), p.grad_epsilon = grad_epsilon.data_ptr();
  if constexpr (!ON_CUDA) {
    const SinkhornPlanCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_plan_cpu);
    for_problems(cost, p.B, sinkhorn_chunks(p.N, p.M).count, elements(p.N, p.M) * 4, cpu.envelope_scratch(p),
                 [&](int64_t i, void* scratch, SinkhornEach each) { cpu.envelope(p, i, scratch, each); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, cost, sinkhorn_envelope_workspace(p), launch_sinkhorn_envelope, "sinkhorn_envelope_backward");
#endif
  }
  return {grad_cost, grad_epsilon};
}

// ------------------------------------------------------------------------------------------------------------ features

template <class Problem>
void fill_features(Problem& p, const Tensor& x, const Tensor& y, bool cosine) {
  p.kind = native_kind(x, "x");
  STD_TORCH_CHECK(y.dim() == 3, "sinkhorn: y must have three dimensions");
  p.B = x.size(0), p.N = x.size(1), p.M = y.size(1), p.D = x.size(2);
  STD_TORCH_CHECK(p.N > 0 && p.M > 0 && p.D > 0 && std::max({p.N, p.M, p.D}) < (int64_t{1} << 31),
                  "sinkhorn: x and y must have rows and dimensions");
  p.x = checked(x, "x", p.kind, {p.B, p.N, p.D});
  p.y = checked(y, "y", p.kind, {p.B, p.M, p.D});
  p.cosine = cosine;
}

template <bool ON_CUDA>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> features_forward(Tensor x, Tensor y, Tensor a, Tensor b, Tensor epsilon,
                                                                                    OptionalTensor g_init, bool cosine, int64_t num_iters,
                                                                                    double tolerance, double rho_a, double rho_b,
                                                                                    int64_t precision) {
  const Guard<ON_CUDA> guard(x);
  SinkhornFeatures p;
  fill_features(p, x, y, cosine);
  p.precise = precision == 0;
  fill_measures(p, a, b, epsilon, g_init, rho_a, rho_b);
  const Solution out(p, x, num_iters, tolerance);
  if constexpr (!ON_CUDA) {
    const SinkhornFeaturesCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_features_cpu);
    const double work = elements(p.N, p.M) * static_cast<double>(num_iters + 4) * (4 + static_cast<double>(p.D) / 4);
    for_problems(x, p.B, cpu.chunks(p.N, p.M), work, cpu.forward_scratch(p),
                 [&](int64_t i, void* scratch, SinkhornEach each) { cpu.forward(p, i, scratch, each); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, x, sinkhorn_features_workspace(p), launch_sinkhorn_features, "sinkhorn_features_forward");
#endif
  }
  return {out.f, out.g, out.transport_cost, out.entropic_value, out.marginal_error, out.iterations, out.feasible};
}

template <bool ON_CUDA>
std::tuple<Tensor, Tensor, Tensor> features_backward(Tensor x, Tensor y, Tensor f, Tensor g, Tensor epsilon,
                                                     OptionalTensor grad_entropic_value, bool cosine) {
  const Guard<ON_CUDA> guard(x);
  SinkhornFeaturesBackward p;
  fill_features(p, x, y, cosine);
  fill_potentials(p, f, g, epsilon);
  p.grad_entropic_value = checked(grad_entropic_value, "grad_entropic_value", p.kind, {p.B});
  const Tensor grad_x = empty_beside(x, {p.B, p.N, p.D}, scalar_type(p.kind)),
               grad_y = empty_beside(x, {p.B, p.M, p.D}, scalar_type(p.kind));
  const Tensor grad_epsilon = empty_beside(x, {p.B}, scalar_type(p.kind));
  p.grad_x = grad_x.data_ptr(), p.grad_y = grad_y.data_ptr(), p.grad_epsilon = grad_epsilon.data_ptr();
  if constexpr (!ON_CUDA) {
    const SinkhornFeaturesGradientCpu& cpu = PK_CHOOSE_LEVEL(sinkhorn_features_gradient_cpu);
    const int64_t chunks = PK_CHOOSE_LEVEL(sinkhorn_features_cpu).chunks(p.N, p.M);
    for_problems(x, p.B, chunks, elements(p.N, p.M) * (4 + static_cast<double>(p.D)), cpu.scratch(p),
                 [&](int64_t i, void* scratch, SinkhornEach each) { cpu.backward(p, i, scratch, each); });
  } else {
#if defined(PROTOKERNELS_WITH_CUDA)
    launch(p, x, sinkhorn_features_backward_workspace(p), launch_sinkhorn_features_backward, "sinkhorn_features_backward");
#endif
  }
  return {grad_x, grad_y, grad_epsilon};
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("sinkhorn_masses_fit", TORCH_BOX(&masses_fit));
  library.impl("sinkhorn_forward", TORCH_BOX(&forward<false>));
  library.impl("sinkhorn_backward", TORCH_BOX(&backward<false>));
  library.impl("sinkhorn_plan", TORCH_BOX(&plan<false>));
  library.impl("sinkhorn_plan_backward", TORCH_BOX(&plan_backward<false>));
  library.impl("sinkhorn_envelope_backward", TORCH_BOX(&envelope_backward<false>));
  library.impl("sinkhorn_features_forward", TORCH_BOX(&features_forward<false>));
  library.impl("sinkhorn_features_backward", TORCH_BOX(&features_backward<false>));
}

#if defined(PROTOKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("sinkhorn_forward", TORCH_BOX(&forward<true>));
  library.impl("sinkhorn_backward", TORCH_BOX(&backward<true>));
  library.impl("sinkhorn_plan", TORCH_BOX(&plan<true>));
  library.impl("sinkhorn_plan_backward", TORCH_BOX(&plan_backward<true>));
  library.impl("sinkhorn_envelope_backward", TORCH_BOX(&envelope_backward<true>));
  library.impl("sinkhorn_features_forward", TORCH_BOX(&features_forward<true>));
  library.impl("sinkhorn_features_backward", TORCH_BOX(&features_backward<true>));
}
#endif
