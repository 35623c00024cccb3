// SPDX-License-Identifier: MIT
// The CUDA kernels of `contrastive` on NumPy arrays: launch functions as the torch side calls them, workspace included.
#include <limits>
#include <vector>

#include "emulator/host.h"
#include "ops/contrastive.h"
#include "ops/cuda/contrastive_launch.h"

using namespace pk::emulator;
using namespace protokernels;
using Array = py::object;

namespace {

template <typename T>
constexpr Kind kind_of = std::is_same_v<T, float>    ? Kind::f32
                         : std::is_same_v<T, double> ? Kind::f64
                         : std::is_same_v<T, __half> ? Kind::f16
                                                     : Kind::bf16;

// A workspace in poisoned device memory, as torch's empty() would hand it out.
struct Workspace {
  explicit Workspace(int64_t bytes)
      : array(py::array_t<double>(std::vector<py::ssize_t>{static_cast<py::ssize_t>(bytes / 8 + 1)})), buffer(poison(array), "workspace") {}
  static py::array poison(py::array_t<double>& values) {
    for (py::ssize_t i = 0; i < values.size(); ++i) values.mutable_data()[i] = std::numeric_limits<double>::quiet_NaN();
    return values;
  }
  void* data() const { return buffer.data(); }
  py::array_t<double> array;
  Output<double> buffer;
};

// What forward and backward have in common. Columns are None where they are the rows.
template <typename T>
struct ProblemInputs {
  const Input<T> rows, columns;
  const Input<int32_t> groups, ranges;

  ProblemInputs(const Array& rows_array, const Array& columns_array, const Array& groups_array, const Array& ranges_array)
      : rows(rows_array, "rows"), columns(columns_array, "columns"), groups(groups_array, "groups"), ranges(ranges_array, "ranges") {}
  void fill(ContrastiveProblem& p, int64_t C, double temperature, bool bounded, int precision) const {
    p.R = rows.shape(0), p.M = columns.data() ? columns.shape(0) : p.R, p.G = groups.shape(0), p.C = C, p.Cp = rows.shape(1);
    p.rows = rows.data(), p.columns = columns.data() ? columns.data() : rows.data();
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

std::vector<int64_t> numbers(const ContrastiveGrid& grid) { return {grid.tiles, grid.shares, grid.slices}; }

}  // namespace

PK_EMULATOR_MODULE(module) {
  module.def("forward_f32", &forward<float>);
  module.def("forward_f64", &forward<double>);
  module.def("forward_grid", [](int64_t R, int64_t M, int64_t G, int64_t Cp) { return numbers(contrastive_forward_grid(R, M, G, Cp)); });
  module.def("backward_grid", [](int64_t R, int64_t M, int64_t G, int64_t Cp) { return numbers(contrastive_backward_grid(R, M, G, Cp)); });
}
