// SPDX-License-Identifier: MIT
// Sinkhorn, the torch side: arguments, masses, allocation, problems and chunks over threads, registration.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/cpu_level.h"
#include "ops/sinkhorn_arguments.h"

namespace protokernels {

// 2^17 elements a chunk: 15 microseconds, several times what handing it to a thread costs. At most 16, whose column sums one thread adds up.
SinkhornChunks sinkhorn_chunks(int64_t N, int64_t M) {
  const int64_t wanted = std::clamp<int64_t>(N * M >> 17, 1, 16);
  const int64_t rows = ((N + wanted - 1) / wanted + 15) / 16 * 16;
  return {rows, (N + rows - 1) / rows};
}

PK_DECLARE_LEVELS(SinkhornCpu, sinkhorn_cpu);
PK_DECLARE_LEVELS(SinkhornPlanCpu, sinkhorn_plan_cpu);
PK_DECLARE_LEVELS(SinkhornUnrolledCpu, sinkhorn_unrolled_cpu);
PK_DECLARE_LEVELS(SinkhornImplicitCpu, sinkhorn_implicit_cpu);

namespace {

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
}

#if defined(PROTOKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("sinkhorn_forward", TORCH_BOX(&forward<true>));
  library.impl("sinkhorn_backward", TORCH_BOX(&backward<true>));
  library.impl("sinkhorn_plan", TORCH_BOX(&plan<true>));
  library.impl("sinkhorn_plan_backward", TORCH_BOX(&plan_backward<true>));
  library.impl("sinkhorn_envelope_backward", TORCH_BOX(&envelope_backward<true>));
}
#endif
