// SPDX-License-Identifier: MIT
// The CUDA kernels of `prototypes` on NumPy arrays: launch functions as the torch side calls them, workspace included.

#include "emulator/host.h"
#include "ops/prototypes.h"

using namespace pk::emulator;
using namespace protokernels;

namespace {

template <typename T, typename Z>
void forward(const Array& z_array, int64_t rows, int64_t z_stride, const Array& prototypes_array, const Array& temperature_array,
             double temperature, bool cosine, const Array& uniform_array, bool skip_nonfinite, const Array& assignment_array,
             const Array& labels_array, const Array& entropy_array, const Array& sums_array, const Array& counts_array, double new_weight,
             const Array& updated_array) {
  const Input<Z> z(z_array, "z");
  const Input<T> prototypes(prototypes_array, "prototypes"), temperature_pointer(temperature_array, "temperature");
  const Input<float> uniform(uniform_array, "uniform");
  const Output<T> assignment(assignment_array, "assignment"), entropy(entropy_array, "entropy"), updated(updated_array, "updated");
  const Output<int64_t> labels(labels_array, "labels"), counts(counts_array, "counts");
  const Output<double> sums(sums_array, "sums");
  PrototypesForward p;
  p.B = rows;
  p.K = prototypes.shape(0);
  p.D = prototypes.shape(1);
  p.z = z.data();
  p.z_kind = kind_of<Z>;
  p.z_stride = z_stride;
  p.prototypes = prototypes.data();
  p.prototypes_kind = kind_of<T>;
  p.temperature_pointer = temperature_pointer.data();
  p.temperature = temperature;
  p.cosine = cosine;
  p.double_compute = std::is_same_v<T, double>;
  p.uniform = uniform.data();
  p.skip_nonfinite = skip_nonfinite;
  p.assignment = assignment.data();
  p.labels = labels.data();
  p.entropy = entropy.data();
  p.sums = sums.data();
  p.counts = counts.data();
  p.new_weight = new_weight;
  p.blend_source = prototypes.data();
  p.blend_kind = kind_of<T>;
  p.updated = updated.data();
  const Workspace workspace(prototypes_forward_workspace(p));
  check(launch_prototypes_forward(p, workspace.data(), nullptr));
}

template <typename Z>
void backward(const Array& grad_assignment_array, const Array& grad_entropy_array, const Array& assignment_array, const Array& z_array,
              int64_t rows, int64_t z_stride, const Array& prototypes_array, double temperature, bool cosine, const Array& grad_z_array,
              const Array& grad_prototypes_array, const Array& grad_temperature_array) {
  const Input<float> grad_assignment(grad_assignment_array, "grad_assignment"), grad_entropy(grad_entropy_array, "grad_entropy");
  const Input<float> assignment(assignment_array, "assignment"), prototypes(prototypes_array, "prototypes");
  const Input<Z> z(z_array, "z");
  const Output<Z> grad_z(grad_z_array, "grad_z");
  const Output<float> grad_prototypes(grad_prototypes_array, "grad_prototypes"),
      grad_temperature(grad_temperature_array, "grad_temperature");
  PrototypesBackward p{};
  p.B = rows;
  p.K = prototypes.shape(0);
  p.D = prototypes.shape(1);
  p.z = z.data();
  p.z_kind = kind_of<Z>;
  p.z_stride = z_stride;
  p.prototypes = prototypes.data();
  p.prototypes_kind = Kind::f32;
  p.temperature = temperature;
  p.cosine = cosine;
  p.assignment = assignment.data();
  p.grad_assignment = grad_assignment.data();
  p.grad_entropy = grad_entropy.data();
  p.grad_z = grad_z.data();
  p.grad_prototypes = grad_prototypes.data();
  p.grad_temperature = grad_temperature.data();
  p.grad_prototypes_kind = Kind::f32;
  const Workspace workspace(prototypes_backward_workspace(p));
  check(launch_prototypes_backward(p, workspace.data(), nullptr));
}

template <typename Z>
void accumulate(const Array& z_array, const Array& labels_array, int64_t z_stride, int64_t D, bool skip_nonfinite, const Array& sums_array,
                const Array& counts_array) {
  const Input<Z> z(z_array, "z");
  const Input<int64_t> labels(labels_array, "labels");
  const Output<double> sums(sums_array, "sums");
  const Output<int64_t> counts(counts_array, "counts");
  const PrototypesAccumulate p{labels.size(), counts.size(),  D,           z.data(),     kind_of<Z>, z_stride,
                               labels.data(), skip_nonfinite, sums.data(), counts.data()};
  const Workspace workspace(prototypes_accumulate_workspace(p));
  check(launch_prototypes_accumulate(p, workspace.data(), nullptr));
}

template <typename T>
void blend(const Array& prototypes_array, const Array& sums_array, const Array& counts_array, double new_weight,
           const Array& updated_array) {
  const Input<T> prototypes(prototypes_array, "prototypes");
  const Input<double> sums(sums_array, "sums");
  const Input<int64_t> counts(counts_array, "counts");
  const Output<T> updated(updated_array, "updated");
  const PrototypesBlend p{prototypes.shape(0), prototypes.shape(1), prototypes.data(), kind_of<T>,
                          sums.data(),         counts.data(),       new_weight,        updated.data()};
  check(launch_prototypes_blend(p, nullptr));
}

}  // namespace

PK_EMULATOR_MODULE(module) {
  module.def("forward_f32", &forward<float, float>);
  module.def("forward_f64", &forward<double, double>);
  module.def("forward_f16", &forward<float, __half>);
  module.def("forward_bf16", &forward<float, __nv_bfloat16>);
  module.def("backward_f32", &backward<float>);
  module.def("backward_f16", &backward<__half>);
  module.def("backward_bf16", &backward<__nv_bfloat16>);
  module.def("accumulate_f32", &accumulate<float>);
  module.def("accumulate_f64", &accumulate<double>);
  module.def("accumulate_f16", &accumulate<__half>);
  module.def("accumulate_bf16", &accumulate<__nv_bfloat16>);
  module.def("blend_f32", &blend<float>);
  module.def("blend_f64", &blend<double>);
  module.def("blend_f16", &blend<__half>);
  module.def("blend_bf16", &blend<__nv_bfloat16>);
}
