// SPDX-License-Identifier: MIT
// Sinkhorn from features, the torch side: arguments, allocation, problems and chunks over threads, registration.
#include <algorithm>
#include <tuple>

#include "common/cpu_level.h"
#include "ops/sinkhorn_arguments.h"

namespace protokernels {

PK_DECLARE_LEVELS(SinkhornFeaturesCpu, sinkhorn_features_cpu);
PK_DECLARE_LEVELS(SinkhornFeaturesGradientCpu, sinkhorn_features_gradient_cpu);

namespace {

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
  library.impl("sinkhorn_features_forward", TORCH_BOX(&features_forward<false>));
  library.impl("sinkhorn_features_backward", TORCH_BOX(&features_backward<false>));
}

#if defined(PROTOKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("sinkhorn_features_forward", TORCH_BOX(&features_forward<true>));
  library.impl("sinkhorn_features_backward", TORCH_BOX(&features_backward<true>));
}
#endif
