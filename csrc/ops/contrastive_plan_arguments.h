// SPDX-License-Identifier: MIT
// The arguments of contrastive_plan and contrastive_views, checked, and the tensors they fill, on either device.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/torch_utils.h"
#include "ops/contrastive.h"
#include "ops/contrastive_layout.h"

namespace protokernels {
namespace {

using IntList = std::vector<int64_t>;
using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct PlanOutputs {
  Tensor order, groups, ranges, weights;

  PlanOutputs(const Tensor& beside, int64_t rows, int64_t group_count)
      : order(empty_beside(beside, {rows}, ScalarType::Long)),
        groups(empty_beside(beside, {group_count, 6}, ScalarType::Int)),
        ranges(empty_beside(beside, {rows, 3}, ScalarType::Int)),
        weights(empty_beside(beside, {rows}, ScalarType::Double)) {}
  template <class Target>
  void give_to(Target& target) const {
    target.order = static_cast<int64_t*>(order.data_ptr()), target.groups = static_cast<ContrastiveGroup*>(groups.data_ptr());
    target.ranges = static_cast<ContrastiveRange*>(ranges.data_ptr()), target.weights = static_cast<double*>(weights.data_ptr());
  }
  PlanTensors tensors() const { return {order, groups, ranges, weights}; }
};

struct PlanArguments {
  Tensor labels;
  ContrastivePlan plan{};
  std::optional<PlanOutputs> outputs;

  PlanArguments(const Tensor& labels_any, const IntList& block, const IntList& stride, bool per_image, bool drop_remainder,
                std::optional<int64_t> background_label, std::optional<int64_t> ignore_index, int64_t form, int64_t reduction)
      : labels(labels_any) {
    STD_TORCH_CHECK(labels_any.dim() == 4 && labels_any.scalar_type() == ScalarType::Long && block.size() == 3 && stride.size() == 3 &&
                        form >= 0 && form <= 3 && reduction >= 0 && reduction <= 2,
                    "contrastive: labels must be int64 [N, D, H, W], block and stride have one number for each axis");
    labels = as_contiguous(labels_any);
    ContrastivePlan& p = plan;
    p.N = labels.size(0);
    for (int a = 0; a < 3; ++a) {
      STD_TORCH_CHECK(block[a] >= 0 && stride[a] >= 1, "contrastive: block must not be negative, stride must be positive");
      p.size[a] = labels.size(1 + a), p.block[a] = block[a], p.stride[a] = stride[a];
    }
    p.per_image = per_image, p.drop_remainder = drop_remainder;
    p.has_background = background_label.has_value(), p.background = background_label.value_or(0);
    p.has_ignored = ignore_index.has_value(), p.ignored = ignore_index.value_or(0);
    p.labels = static_cast<const int64_t*>(labels.data_ptr());
    p.form = static_cast<ContrastiveForm>(form), p.reduction = static_cast<int>(reduction);
    contrastive_plan_sizes(p);
    STD_TORCH_CHECK(p.R < (int64_t{1} << 31) && p.G < (int64_t{1} << 31), "contrastive: rows must be fewer than 2^31; got ", p.R);
    outputs.emplace(labels, p.R, p.G);
    outputs->give_to(p);
  }
  PlanTensors tensors() const { return outputs->tensors(); }
};

struct ViewsArguments {
  ContrastiveViews views{};
  std::optional<PlanOutputs> outputs;

  ViewsArguments(const Tensor& beside, int64_t count, bool crossing, bool symmetric) {
    STD_TORCH_CHECK(count >= 0 && count < (int64_t{1} << 30), "contrastive: the vectors of a view must be fewer than 2^30; got ", count);
    views.count = count, views.crossing = crossing, views.symmetric = symmetric;
    outputs.emplace(beside, 2 * count, crossing ? 2 : 1);
    outputs->give_to(views);
  }
  PlanTensors tensors() const { return outputs->tensors(); }
};

}  // namespace
}  // namespace protokernels
