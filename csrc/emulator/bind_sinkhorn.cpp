// SPDX-License-Identifier: MIT
// The CUDA kernels of `sinkhorn` on NumPy arrays: launch functions as the torch side calls them, workspace included.

#include "emulator/host.h"
#include "ops/cuda/sinkhorn_launch.h"
#include "ops/sinkhorn.h"

using namespace pk::emulator;
using namespace protokernels;

namespace {

template <typename T>
void forward(const Array& cost_array, const Array& a_array, const Array& b_array, const Array& epsilon_array, const Array& g_init_array,
             int64_t num_iters, double tolerance, double rho_a, double rho_b, const Array& f_array, const Array& g_array,
             const Array& transport_cost_array, const Array& entropic_value_array, const Array& marginal_error_array,
             const Array& iterations_array, const Array& feasible_array, const Array& history_array) {
  const Input<T> cost(cost_array, "cost"), a(a_array, "a"), b(b_array, "b"), epsilon(epsilon_array, "epsilon"),
      g_init(g_init_array, "g_init");
  const Output<T> f(f_array, "f"), g(g_array, "g"), transport_cost(transport_cost_array, "transport_cost"),
      entropic_value(entropic_value_array, "entropic_value"), marginal_error(marginal_error_array, "marginal_error"),
      history(history_array, "history");
  const Output<int64_t> iterations(iterations_array, "iterations");
  const Output<bool> feasible(feasible_array, "feasible");
  SinkhornForward p;
  p.B = cost.shape(0), p.N = cost.shape(1), p.M = cost.shape(2), p.kind = kind_of<T>;
  p.cost = cost.data(), p.a = a.data(), p.b = b.data(), p.epsilon = epsilon.data(), p.g_init = g_init.data();
  p.rho_a = rho_a, p.rho_b = rho_b, p.num_iters = num_iters, p.tolerance = tolerance;
  p.f = f.data(), p.g = g.data(), p.transport_cost = transport_cost.data(), p.entropic_value = entropic_value.data();
  p.marginal_error = marginal_error.data(), p.iterations = iterations.data(), p.feasible = feasible.data(), p.history = history.data();
  const Workspace workspace(sinkhorn_forward_workspace(p));
  check(launch_sinkhorn_forward(p, workspace.data(), nullptr));
}

template <typename T>
void backward(const Array& cost_array, const Array& a_array, const Array& b_array, const Array& epsilon_array, const Array& g_init_array,
              const Array& f_array, const Array& g_array, const Array& iterations_array, const Array& history_array, int64_t num_iters,
              const Array& grad_f_array, const Array& grad_g_array, const Array& grad_transport_cost_array,
              const Array& grad_entropic_value_array, bool implicit, double rho_a, double rho_b, const Array& grad_cost_array,
              const Array& grad_a_array, const Array& grad_b_array, const Array& grad_epsilon_array) {
  const Input<T> cost(cost_array, "cost"), a(a_array, "a"), b(b_array, "b"), epsilon(epsilon_array, "epsilon"),
      g_init(g_init_array, "g_init"), f(f_array, "f"), g(g_array, "g"), history(history_array, "history"), grad_f(grad_f_array, "grad_f"),
      grad_g(grad_g_array, "grad_g"), grad_transport_cost(grad_transport_cost_array, "grad_transport_cost"),
      grad_entropic_value(grad_entropic_value_array, "grad_entropic_value");
  const Input<int64_t> iterations(iterations_array, "iterations");
  const Output<T> grad_cost(grad_cost_array, "grad_cost"), grad_a(grad_a_array, "grad_a"), grad_b(grad_b_array, "grad_b"),
      grad_epsilon(grad_epsilon_array, "grad_epsilon");
  SinkhornBackward p;
  p.B = cost.shape(0), p.N = cost.shape(1), p.M = cost.shape(2), p.kind = kind_of<T>;
  p.cost = cost.data(), p.a = a.data(), p.b = b.data(), p.epsilon = epsilon.data(), p.g_init = g_init.data();
  p.rho_a = rho_a, p.rho_b = rho_b, p.implicit = implicit, p.f = f.data(), p.g = g.data(), p.iterations = iterations.data();
  p.history = history.data(), p.num_iters = num_iters, p.grad_f = grad_f.data(), p.grad_g = grad_g.data();
  p.grad_transport_cost = grad_transport_cost.data(), p.grad_entropic_value = grad_entropic_value.data();
  p.grad_cost = grad_cost.data(), p.grad_a = grad_a.data(), p.grad_b = grad_b.data(), p.grad_epsilon = grad_epsilon.data();
  const Workspace workspace(sinkhorn_backward_workspace(p));
  check(launch_sinkhorn_backward(p, workspace.data(), nullptr));
}

template <typename T>
void plan(const Array& cost_array, const Array& f_array, const Array& g_array, const Array& epsilon_array, const Array& plan_array) {
  const Input<T> cost(cost_array, "cost"), f(f_array, "f"), g(g_array, "g"), epsilon(epsilon_array, "epsilon");
  const Output<T> plan(plan_array, "plan");
  check(launch_sinkhorn_plan(
      {cost.shape(0), cost.shape(1), cost.shape(2), kind_of<T>, cost.data(), f.data(), g.data(), epsilon.data(), plan.data()}, nullptr));
}

template <typename T>
void plan_backward(const Array& grad_plan_array, const Array& plan_array, const Array& cost_array, const Array& f_array,
                   const Array& g_array, const Array& epsilon_array, const Array& grad_cost_array, const Array& grad_f_array,
                   const Array& grad_g_array, const Array& grad_epsilon_array) {
  const Input<T> grad_plan(grad_plan_array, "grad_plan"), plan(plan_array, "plan"), cost(cost_array, "cost"), f(f_array, "f"),
      g(g_array, "g"), epsilon(epsilon_array, "epsilon");
  const Output<T> grad_cost(grad_cost_array, "grad_cost"), grad_f(grad_f_array, "grad_f"), grad_g(grad_g_array, "grad_g"),
      grad_epsilon(grad_epsilon_array, "grad_epsilon");
  const SinkhornPlanBackward p{cost.shape(0),    cost.shape(1), cost.shape(2), kind_of<T>,         grad_plan.data(),
                               plan.data(),      cost.data(),   f.data(),      g.data(),           epsilon.data(),
                               grad_cost.data(), grad_f.data(), grad_g.data(), grad_epsilon.data()};
  const Workspace workspace(sinkhorn_plan_backward_workspace(p));
  check(launch_sinkhorn_plan_backward(p, workspace.data(), nullptr));
}

template <typename T>
void envelope(const Array& cost_array, const Array& f_array, const Array& g_array, const Array& epsilon_array, const Array& gradient_array,
              const Array& grad_cost_array, const Array& grad_epsilon_array) {
  const Input<T> cost(cost_array, "cost"), f(f_array, "f"), g(g_array, "g"), epsilon(epsilon_array, "epsilon"),
      gradient(gradient_array, "grad_entropic_value");
  const Output<T> grad_cost(grad_cost_array, "grad_cost"), grad_epsilon(grad_epsilon_array, "grad_epsilon");
  const SinkhornEnvelope p{cost.shape(0), cost.shape(1),  cost.shape(2),   kind_of<T>,       cost.data(),        f.data(),
                           g.data(),      epsilon.data(), gradient.data(), grad_cost.data(), grad_epsilon.data()};
  const Workspace workspace(sinkhorn_envelope_workspace(p));
  check(launch_sinkhorn_envelope(p, workspace.data(), nullptr));
}

template <typename T>
void features(const Array& x_array, const Array& y_array, const Array& a_array, const Array& b_array, const Array& epsilon_array,
              const Array& g_init_array, bool cosine, int64_t num_iters, double tolerance, double rho_a, double rho_b, const Array& f_array,
              const Array& g_array, const Array& transport_cost_array, const Array& entropic_value_array, const Array& marginal_error_array,
              const Array& iterations_array, const Array& feasible_array) {
  const Input<T> x(x_array, "x"), y(y_array, "y"), a(a_array, "a"), b(b_array, "b"), epsilon(epsilon_array, "epsilon"),
      g_init(g_init_array, "g_init");
  const Output<T> f(f_array, "f"), g(g_array, "g"), transport_cost(transport_cost_array, "transport_cost"),
      entropic_value(entropic_value_array, "entropic_value"), marginal_error(marginal_error_array, "marginal_error");
  const Output<int64_t> iterations(iterations_array, "iterations");
  const Output<bool> feasible(feasible_array, "feasible");
  SinkhornFeatures p;
  p.B = x.shape(0), p.N = x.shape(1), p.M = y.shape(1), p.D = x.shape(2), p.kind = kind_of<T>, p.cosine = cosine;
  p.x = x.data(), p.y = y.data(), p.a = a.data(), p.b = b.data(), p.epsilon = epsilon.data(), p.g_init = g_init.data();
  p.rho_a = rho_a, p.rho_b = rho_b, p.num_iters = num_iters, p.tolerance = tolerance, p.precise = true;
  p.f = f.data(), p.g = g.data(), p.transport_cost = transport_cost.data(), p.entropic_value = entropic_value.data();
  p.marginal_error = marginal_error.data(), p.iterations = iterations.data(), p.feasible = feasible.data();
  const Workspace workspace(sinkhorn_features_workspace(p));
  check(launch_sinkhorn_features(p, workspace.data(), nullptr));
}

template <typename T>
void features_backward(const Array& x_array, const Array& y_array, const Array& f_array, const Array& g_array, const Array& epsilon_array,
                       const Array& gradient_array, bool cosine, const Array& grad_x_array, const Array& grad_y_array,
                       const Array& grad_epsilon_array) {
  const Input<T> x(x_array, "x"), y(y_array, "y"), f(f_array, "f"), g(g_array, "g"), epsilon(epsilon_array, "epsilon"),
      gradient(gradient_array, "grad_entropic_value");
  const Output<T> grad_x(grad_x_array, "grad_x"), grad_y(grad_y_array, "grad_y"), grad_epsilon(grad_epsilon_array, "grad_epsilon");
  const SinkhornFeaturesBackward p{x.shape(0),     x.shape(1),      y.shape(1),    x.shape(2),    kind_of<T>,
                                   cosine,         x.data(),        y.data(),      f.data(),      g.data(),
                                   epsilon.data(), gradient.data(), grad_x.data(), grad_y.data(), grad_epsilon.data()};
  const Workspace workspace(sinkhorn_features_backward_workspace(p));
  check(launch_sinkhorn_features_backward(p, workspace.data(), nullptr));
}

}  // namespace

PK_EMULATOR_MODULE(module) {
  module.def("forward_f32", &forward<float>);
  module.def("forward_f64", &forward<double>);
  module.def("backward_f32", &backward<float>);
  module.def("backward_f64", &backward<double>);
  module.def("plan_f32", &plan<float>);
  module.def("plan_f64", &plan<double>);
  module.def("plan_backward_f32", &plan_backward<float>);
  module.def("plan_backward_f64", &plan_backward<double>);
  module.def("envelope_f32", &envelope<float>);
  module.def("envelope_f64", &envelope<double>);
  module.def("features_f32", &features<float>);
  module.def("features_f64", &features<double>);
  module.def("features_backward_f32", &features_backward<float>);
  module.def("features_backward_f64", &features_backward<double>);
  module.def("tier", [](int64_t N, int64_t M, bool wide, std::size_t shared_limit) {
    return static_cast<int>(sinkhorn_tier(N, M, wide ? Kind::f64 : Kind::f32, shared_limit));
  });
}
