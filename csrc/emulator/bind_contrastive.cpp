// SPDX-License-Identifier: MIT
// The CUDA kernels of `contrastive` on NumPy arrays: launch functions as the torch side calls them, workspace included.
#include <vector>

#include "emulator/host.h"
#include "ops/contrastive.h"
#include "ops/contrastive_layout.h"
#include "ops/cuda/contrastive_launch.h"

using namespace pk::emulator;
using namespace protokernels;

namespace {

// What forward and backward have in common. Columns are None where they are the rows.
template <typename T>
struct ProblemInputs {
  const Input<T> rows, columns;
  const Input<int32_t> groups, ranges;

  ProblemInputs(const Array& rows_array, const Array& columns_array, const Array& groups_array, const Array& ranges_array)
      : rows(rows_array, "rows"), columns(columns_array, "columns"), groups(groups_array, "groups"), ranges(ranges_array, "ranges") {}
  void fill(ContrastiveProblem& p, int64_t C, double temperature, bool bounded, int precision) const {
    p.R = rows.shape(0), p.M = columns.data() ? columns.shape(0) : p.R, p.G = groups.shape(0), p.C = C, p.Cp = rows.shape(1);
    p.rows = rows.data(), p.columns = columns.data() ? columns.data() : rows.data(), p.one_set = columns.data() == nullptr;
    p.groups = reinterpret_cast<const ContrastiveGroup*>(groups.data());
    p.ranges = reinterpret_cast<const ContrastiveRange*>(ranges.data());
    p.temperature = temperature, p.bounded = bounded, p.double_compute = std::is_same_v<T, double>;
    p.precision = static_cast<ContrastivePrecision>(precision);
  }
};

template <typename T>
void forward(const Array& rows, const Array& columns, const Array& groups, const Array& ranges, const Array& weights_array, int64_t C,
             double temperature, bool bounded, int form, int precision, const Array& losses_array, const Array& statistics_array,
             const Array& total_array) {
  const ProblemInputs<T> inputs(rows, columns, groups, ranges);
  const Input<double> weights(weights_array, "weights");
  const Output<T> losses(losses_array, "losses"), statistics(statistics_array, "statistics"), total(total_array, "total");
  ContrastiveForward p;
  inputs.fill(p, C, temperature, bounded, precision);
  p.form = static_cast<ContrastiveForm>(form), p.weights = weights.data();
  p.losses = losses.data(), p.statistics = statistics.data(), p.total = total.data();
  const Workspace workspace(contrastive_forward_workspace(p));
  check(launch_contrastive_forward(p, workspace.data(), nullptr));
}

// With weights, grad_losses is the gradient of the total, [1].
template <typename T>
void coefficients(const Array& grad_losses_array, const Array& statistics_array, const Array& groups_array, const Array& ranges_array,
                  int form, const Array& coefficients_array, const Array& weights_array) {
  const Input<T> grad_losses(grad_losses_array, "grad_losses"), statistics(statistics_array, "statistics");
  const Input<double> weights(weights_array, "weights");
  const Input<int32_t> groups(groups_array, "groups"), ranges(ranges_array, "ranges");
  const Output<T> coefficients(coefficients_array, "coefficients");
  ContrastiveCoefficients p{};
  p.R = grad_losses.shape(0), p.G = groups.shape(0), p.groups = reinterpret_cast<const ContrastiveGroup*>(groups.data());
  p.ranges = reinterpret_cast<const ContrastiveRange*>(ranges.data()), p.statistics = statistics.data();
  p.form = static_cast<ContrastiveForm>(form), p.double_compute = std::is_same_v<T, double>, p.coefficients = coefficients.data();
  p.grad_losses = weights.data() ? nullptr : grad_losses.data();
  p.grad_total = weights.data() ? grad_losses.data() : nullptr, p.weights = weights.data();
  if (weights.data()) p.R = weights.shape(0);
  check(launch_contrastive_coefficients(p, nullptr));
}

template <typename T>
void backward(const Array& rows, const Array& columns, const Array& groups, const Array& ranges, const Array& row_statistics_array,
              const Array& row_coefficients_array, const Array& column_statistics_array, const Array& column_coefficients_array, int64_t C,
              double temperature, bool bounded, int precision, const Array& grad_rows_array) {
  const ProblemInputs<T> inputs(rows, columns, groups, ranges);
  const Input<T> row_statistics(row_statistics_array, "row_statistics"), row_coefficients(row_coefficients_array, "row_coefficients"),
      column_statistics(column_statistics_array, "column_statistics"),
      column_coefficients(column_coefficients_array, "column_coefficients");
  const Output<T> grad_rows(grad_rows_array, "grad_rows");
  ContrastiveBackward p;
  inputs.fill(p, C, temperature, bounded, precision);
  const bool one_set = columns.is_none();
  p.row_statistics = row_statistics.data(), p.row_coefficients = row_coefficients.data();
  p.column_statistics = one_set ? row_statistics.data() : column_statistics.data();
  p.column_coefficients = one_set ? row_coefficients.data() : column_coefficients.data();
  p.grad_rows = grad_rows.data();
  const Workspace workspace(contrastive_backward_workspace(p));
  check(launch_contrastive_backward(p, workspace.data(), nullptr));
}

// x [N, C, P] lies in a larger array; its first element and strides are given.
void fill(ContrastivePack& p, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, const Input<int64_t>& order,
          int64_t Cp, bool normalize) {
  p.R = order.shape(0), p.N = shape.at(0), p.C = shape.at(1), p.P = shape.at(2), p.Cp = Cp, p.order = order.data(), p.normalize = normalize;
  p.stride_n = strides.at(0), p.stride_c = strides.at(1), p.stride_p = strides.at(2);
}

template <typename T, typename X>
void pack(const Array& x_array, int64_t first, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
          const Array& order_array, bool normalize, const Array& packed_array, const Array& norms_array) {
  const Input<X> x(x_array, "x");
  const Input<int64_t> order(order_array, "order");
  const Output<T> packed(packed_array, "packed"), norms(norms_array, "norms");
  ContrastivePack p;
  fill(p, shape, strides, order, packed.shape(1), normalize);
  p.x = x.data() + first, p.x_kind = kind_of<X>, p.double_compute = std::is_same_v<T, double>;
  p.packed = packed.data(), p.norms = norms.data();
  check(launch_contrastive_pack(p, nullptr));
}

template <typename T, typename X>
void unpack(const Array& grad_packed_array, const Array& packed_array, const Array& norms_array, const Array& order_array,
            const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, bool normalize, int64_t first,
            const Array& grad_x_array) {
  const Input<T> grad_packed(grad_packed_array, "grad_packed"), packed(packed_array, "packed"), norms(norms_array, "norms");
  const Input<int64_t> order(order_array, "order");
  const Output<X> grad_x(grad_x_array, "grad_x");
  ContrastiveUnpack p;
  fill(p, shape, strides, order, packed.shape(1), normalize);
  p.x = nullptr, p.x_kind = kind_of<X>, p.double_compute = std::is_same_v<T, double>;
  p.packed = const_cast<T*>(packed.data()), p.norms = const_cast<T*>(norms.data());
  p.grad_packed = grad_packed.data(), p.grad_x = grad_x.data() + first;
  check(launch_contrastive_unpack(p, nullptr));
}

// The numbers of a plan: labels [N, D, H, W]; background and ignored are lists, empty for none.
void plan(const Array& labels_array, const std::vector<int64_t>& block, const std::vector<int64_t>& stride, bool per_image,
          bool drop_remainder, const std::vector<int64_t>& background, const std::vector<int64_t>& ignored, int form, int reduction,
          const Array& order_array, const Array& groups_array, const Array& ranges_array, const Array& weights_array) {
  const Input<int64_t> labels(labels_array, "labels");
  const Output<int64_t> order(order_array, "order");
  const Output<int32_t> groups(groups_array, "groups"), ranges(ranges_array, "ranges");
  const Output<double> weights(weights_array, "weights");
  ContrastivePlan p{};
  p.N = labels.shape(0);
  for (int a = 0; a < 3; ++a) p.size[a] = labels.shape(1 + a), p.block[a] = block.at(a), p.stride[a] = stride.at(a);
  p.per_image = per_image, p.drop_remainder = drop_remainder;
  p.has_background = !background.empty(), p.background = background.empty() ? 0 : background[0];
  p.has_ignored = !ignored.empty(), p.ignored = ignored.empty() ? 0 : ignored[0];
  p.labels = labels.data(), p.form = static_cast<ContrastiveForm>(form), p.reduction = reduction;
  contrastive_plan_sizes(p);
  p.order = order.data(), p.groups = reinterpret_cast<ContrastiveGroup*>(groups.data());
  p.ranges = reinterpret_cast<ContrastiveRange*>(ranges.data()), p.weights = weights.data();
  const Workspace workspace(contrastive_plan_workspace(p));
  check(launch_contrastive_plan(p, workspace.data(), nullptr));
}

void views(int64_t count, bool crossing, bool symmetric, const Array& order_array, const Array& groups_array, const Array& ranges_array,
           const Array& weights_array) {
  const Output<int64_t> order(order_array, "order");
  const Output<int32_t> groups(groups_array, "groups"), ranges(ranges_array, "ranges");
  const Output<double> weights(weights_array, "weights");
  check(launch_contrastive_views({count, crossing, symmetric, order.data(), reinterpret_cast<ContrastiveGroup*>(groups.data()),
                                  reinterpret_cast<ContrastiveRange*>(ranges.data()), weights.data()},
                                 nullptr));
}

std::vector<int64_t> numbers(const ContrastiveGrid& grid) { return {grid.tiles, grid.shares, grid.slices}; }

}  // namespace

PK_EMULATOR_MODULE(module) {
  module.def("plan", &plan);
  module.def("views", &views);
  module.def("forward_f32", &forward<float>);
  module.def("forward_f64", &forward<double>);
  module.def("coefficients_f32", &coefficients<float>, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
             py::arg() = py::none());
  module.def("coefficients_f64", &coefficients<double>, py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
             py::arg() = py::none());
  module.def("backward_f32", &backward<float>);
  module.def("backward_f64", &backward<double>);
  module.def("pack_f32", &pack<float, float>);
  module.def("pack_f64", &pack<double, double>);
  module.def("pack_f16", &pack<float, __half>);
  module.def("pack_bf16", &pack<float, __nv_bfloat16>);
  module.def("unpack_f32", &unpack<float, float>);
  module.def("unpack_f64", &unpack<double, double>);
  module.def("unpack_f16", &unpack<float, __half>);
  module.def("unpack_bf16", &unpack<float, __nv_bfloat16>);
  module.def("forward_grid", [](int64_t R, int64_t M, int64_t G, int64_t Cp) { return numbers(contrastive_forward_grid(R, M, G, Cp)); });
  module.def("backward_grid", [](int64_t R, int64_t M, int64_t G, int64_t Cp) { return numbers(contrastive_backward_grid(R, M, G, Cp)); });
}
