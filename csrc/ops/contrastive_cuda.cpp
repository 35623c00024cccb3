// SPDX-License-Identifier: MIT
// Contrastive losses, the torch side on CUDA. What lies on the device is not looked at: order, groups and ranges are those of contrastive_plan
// or contrastive_views.
#if defined(PROTOKERNELS_WITH_CUDA)

#include "ops/contrastive_arguments.h"
#include "ops/contrastive_plan_arguments.h"

namespace protokernels {
namespace {

PlanTensors plan_cuda(Tensor labels, IntList block, IntList stride, bool per_image, bool drop_remainder,
                      std::optional<int64_t> background_label, std::optional<int64_t> ignore_index, int64_t form, int64_t reduction) {
  const torch::stable::accelerator::DeviceGuard guard(labels.get_device_index());
  PlanArguments arguments(labels, block, stride, per_image, drop_remainder, background_label, ignore_index, form, reduction);
  const Tensor workspace = empty_beside(labels, {contrastive_plan_workspace(arguments.plan)}, ScalarType::Byte);
  check_cuda(launch_contrastive_plan(arguments.plan, workspace.data_ptr(), current_cuda_stream(labels)), "contrastive_plan");
  return arguments.tensors();
}

PlanTensors views_cuda(Tensor beside, int64_t count, bool crossing, bool symmetric) {
  const torch::stable::accelerator::DeviceGuard guard(beside.get_device_index());
  ViewsArguments arguments(beside, count, crossing, symmetric);
  check_cuda(launch_contrastive_views(arguments.views, current_cuda_stream(beside)), "contrastive_views");
  return arguments.tensors();
}

std::tuple<Tensor, Tensor> pack_cuda(Tensor x, Tensor order, bool normalize) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto run = [&](const ContrastivePack& p) { check_cuda(launch_contrastive_pack(p, current_cuda_stream(x)), "contrastive_pack"); };
  return pack_by(run, x, order, normalize, false);
}

Tensor unpack_cuda(Tensor grad_packed, Tensor packed, Tensor norms, Tensor order, Tensor like, bool normalize, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  const auto run = [&](const ContrastiveUnpack& p) {
    check_cuda(launch_contrastive_unpack(p, current_cuda_stream(packed)), "contrastive_unpack");
  };
  return unpack_by(run, grad_packed, packed, norms, order, like, normalize, channels_last, false);
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(Tensor rows, OptionalTensor columns, Tensor groups, Tensor ranges, OptionalTensor weights,
                                                int64_t channels, double temperature, bool unit, int64_t form, int64_t precision) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  ContrastiveForward f{};
  fill_problem(f, rows, columns, groups, ranges, channels, temperature, unit, precision);
  f.form = form_of(form);
  f.weights = static_cast<const double*>(checked(weights, "weights", ScalarType::Double, {f.R}));
  Tensor total = empty_beside(rows, {}, rows.scalar_type());
  const Tensor losses = empty_beside(rows, {f.R}, rows.scalar_type()), statistics = empty_beside(rows, {3, f.R}, rows.scalar_type());
  if (!f.weights) torch::stable::zero_(total);  // also where there are no rows: an empty tensor has no memory
  f.losses = losses.data_ptr(), f.statistics = statistics.data_ptr(), f.total = total.data_ptr();
  const Tensor workspace = empty_beside(rows, {contrastive_forward_workspace(f)}, ScalarType::Byte);
  check_cuda(launch_contrastive_forward(f, workspace.data_ptr(), current_cuda_stream(rows)), "contrastive_forward");
  return {total, losses, statistics};
}

Tensor coefficients_cuda(OptionalTensor grad_losses, Tensor statistics, Tensor groups, Tensor ranges, int64_t form,
                         OptionalTensor grad_total, OptionalTensor weights) {
  const torch::stable::accelerator::DeviceGuard guard(statistics.get_device_index());
  ContrastiveCoefficients c{};
  fill_coefficients(c, grad_losses, statistics, groups, ranges, form, grad_total, weights, CONTRASTIVE_STATISTICS_CUDA);
  const Tensor out = empty_beside(statistics, {3, c.R}, statistics.scalar_type());
  c.coefficients = out.data_ptr();
  check_cuda(launch_contrastive_coefficients(c, current_cuda_stream(statistics)), "contrastive_coefficients");
  return out;
}

Tensor backward_cuda(Tensor rows, OptionalTensor columns, Tensor groups, Tensor ranges, OptionalTensor row_statistics,
                     OptionalTensor row_coefficients, OptionalTensor column_statistics, OptionalTensor column_coefficients,
                     int64_t channels, double temperature, bool unit, int64_t precision) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  ContrastiveBackward b{};
  fill_problem(b, rows, columns, groups, ranges, channels, temperature, unit, precision);
  fill_losses(b, row_statistics, row_coefficients, column_statistics, column_coefficients, rows.scalar_type(), CONTRASTIVE_STATISTICS_CUDA);
  const Tensor grad_rows = empty_beside(rows, {b.R, b.Cp}, rows.scalar_type());
  b.grad_rows = grad_rows.data_ptr();
  const Tensor workspace = empty_beside(rows, {contrastive_backward_workspace(b)}, ScalarType::Byte);
  check_cuda(launch_contrastive_backward(b, workspace.data_ptr(), current_cuda_stream(rows)), "contrastive_backward");
  return grad_rows;
}

LossesOfVectors losses_cuda(Tensor x, OptionalTensor second, Tensor order, Tensor groups, Tensor ranges, Tensor weights, double temperature,
                            bool normalize, int64_t form, int64_t precision) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return losses_by(pack_cuda, forward_cuda, x, second, order, groups, ranges, weights, temperature, normalize, form, precision);
}

Tensor losses_backward_cuda(OptionalTensor grad_total, OptionalTensor grad_losses, Tensor packed, Tensor norms, Tensor order, Tensor groups,
                            Tensor ranges, Tensor weights, Tensor statistics, Tensor like, Tensor, double temperature, bool normalize,
                            int64_t form, int64_t precision, bool channels_last) {
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  return losses_backward_by(coefficients_cuda, backward_cuda, unpack_cuda, grad_total, grad_losses, packed, norms, order, groups, ranges,
                            weights, statistics, like, temperature, normalize, form, precision, channels_last);
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("contrastive_plan", TORCH_BOX(&plan_cuda));
  library.impl("contrastive_views", TORCH_BOX(&views_cuda));
  library.impl("contrastive_pack", TORCH_BOX(&pack_cuda));
  library.impl("contrastive_unpack", TORCH_BOX(&unpack_cuda));
  library.impl("contrastive_forward", TORCH_BOX(&forward_cuda));
  library.impl("contrastive_backward", TORCH_BOX(&backward_cuda));
  library.impl("contrastive_losses", TORCH_BOX(&losses_cuda));
  library.impl("contrastive_losses_backward", TORCH_BOX(&losses_backward_cuda));
}
#endif
