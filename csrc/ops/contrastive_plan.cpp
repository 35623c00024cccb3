// SPDX-License-Identifier: MIT
// Which vectors meet which, from labels, on the CPU: a group's rows in the order of the maps, then sorted by class, stably. A group is the unit of
// work; labels that lie close together are counted, others are compared.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "common/torch_utils.h"
#include "ops/contrastive.h"
#include "ops/contrastive_plan_arguments.h"

namespace protokernels {

namespace {

enum Role : uint8_t { anchor, background, ignored };

struct Key {
  Role role;
  int64_t label;
  bool operator==(const Key& other) const { return role == other.role && label == other.label; }
  bool operator<(const Key& other) const { return role != other.role ? role < other.role : label < other.label; }
};

// What sorting a group needs; kept from group to group.
struct Sorter {
  std::vector<int64_t> places, sorted;
  std::vector<int64_t> counts;
  std::vector<int32_t> numbers;

  static Key key_of(const ContrastivePlan& p, int64_t label) {
    const Role role = p.has_ignored && label == p.ignored ? ignored : p.has_background && label == p.background ? background : anchor;
    return {role, label};
  }

  // places, sorted by class.
  void sort(const ContrastivePlan& p) {
    const size_t rows = places.size();
    sorted.resize(rows);
    if (rows == 0) return;
    int64_t least = p.labels[places[0]], most = least;
    for (const int64_t place : places) least = std::min(least, p.labels[place]), most = std::max(most, p.labels[place]);
    const uint64_t span = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
    if (span < std::max<uint64_t>(256, 4 * rows))
      by_counting(p, least, static_cast<int64_t>(span) + 1);
    else
      by_comparing(p);
  }

  void by_counting(const ContrastivePlan& p, int64_t least, int64_t labels) {
    counts.assign(static_cast<size_t>(labels), 0);
    for (const int64_t place : places) ++counts[static_cast<size_t>(p.labels[place] - least)];
    int64_t next = 0;
    for (const Role role : {anchor, background, ignored})
      for (int64_t l = 0; l < labels; ++l)
        if (counts[l] > 0 && key_of(p, least + l).role == role && !placed(l)) {
          const int64_t rows = counts[l];
          counts[l] = -1 - next;  // where the class begins; negative: done
          next += rows;
        }
    for (const int64_t place : places) sorted[static_cast<size_t>(-1 - counts[static_cast<size_t>(p.labels[place] - least)]--)] = place;
  }
  bool placed(int64_t l) const { return counts[l] < 0; }

  void by_comparing(const ContrastivePlan& p) {
    numbers.resize(places.size());
    std::iota(numbers.begin(), numbers.end(), 0);
    std::stable_sort(numbers.begin(), numbers.end(),
                     [&](int32_t a, int32_t b) { return key_of(p, p.labels[places[a]]) < key_of(p, p.labels[places[b]]); });
    for (size_t i = 0; i < places.size(); ++i) sorted[i] = places[static_cast<size_t>(numbers[i])];
  }
};

class Planner {
 public:
  explicit Planner(const ContrastivePlan& plan) : p(plan) {
    for (int a = 0; a < 3; ++a) axis[a] = contrastive_axis(p, a);
  }

  // Rows before a group: those of whole layers of blocks, then rows of blocks, and so on.
  int64_t rows_before(int64_t group) const {
    const int64_t maps = p.per_image ? 1 : p.N, image = p.per_image ? group % p.N : 0, block = p.per_image ? group / p.N : group;
    const int64_t w = block % axis[2].blocks, h = block / axis[2].blocks % axis[1].blocks, d = block / axis[2].blocks / axis[1].blocks;
    const int64_t deep = length(0, d), high = length(1, h), wide = length(2, w);
    const int64_t before =
        d * axis[0].edge * axis[1].kept * axis[2].kept + deep * h * axis[1].edge * axis[2].kept + deep * high * w * axis[2].edge;
    return before * p.N + image * maps * deep * high * wide;
  }

  void fill(int64_t group, Sorter& sorter) const {
    const int64_t image = p.per_image ? group % p.N : 0, block = p.per_image ? group / p.N : group;
    const int64_t at[3] = {block / axis[2].blocks / axis[1].blocks, block / axis[2].blocks % axis[1].blocks, block % axis[2].blocks};
    int64_t begin[3], end[3];
    for (int a = 0; a < 3; ++a) begin[a] = at[a] * axis[a].edge, end[a] = begin[a] + length(a, at[a]);
    sorter.places.clear();
    for (int64_t n = image; n < (p.per_image ? image + 1 : p.N); ++n)
      for (int64_t d = begin[0]; d < end[0]; ++d)
        for (int64_t h = begin[1]; h < end[1]; ++h) {
          const int64_t line = ((n * p.size[0] + d * p.stride[0]) * p.size[1] + h * p.stride[1]) * p.size[2];
          for (int64_t w = begin[2]; w < end[2]; ++w) sorter.places.push_back(line + w * p.stride[2]);
        }
    sorter.sort(p);
    write(group, rows_before(group), sorter.sorted);
  }

 private:
  int64_t length(int a, int64_t block) const { return std::min(axis[a].edge, axis[a].kept - block * axis[a].edge); }

  // Rows of the group from first on, and 1 as the weight of an anchor.
  void write(int64_t group, int64_t first, const std::vector<int64_t>& places) const {
    const int64_t rows = static_cast<int64_t>(places.size());
    int64_t role_end[3] = {0, 0, 0};
    for (int64_t i = 0; i < rows;) {
      const int64_t label = p.labels[places[i]];
      const Role role = Sorter::key_of(p, label).role;
      int64_t end = i + 1;
      while (end < rows && p.labels[places[end]] == label) ++end;
      for (int64_t r = i; r < end; ++r) {
        p.order[first + r] = places[r];
        const auto row = [&](int64_t x) { return static_cast<int32_t>(first + x); };
        p.ranges[first + r] = role == ignored ? ContrastiveRange{0, 0, -1} : ContrastiveRange{row(i), row(end), row(r)};
        p.weights[first + r] = role == anchor && end - i > 1 ? 1 : 0;
      }
      role_end[role] = end;
      i = end;
    }
    const int64_t anchors = role_end[anchor], members = std::max(anchors, role_end[background]);
    const bool needs_negatives = p.form == ContrastiveForm::paper || p.form == ContrastiveForm::negout;
    if (needs_negatives && members > 0 && p.labels[places[0]] == p.labels[places[members - 1]])
      std::fill(p.weights + first, p.weights + first + rows, 0.0);
    const auto row = [&](int64_t x) { return static_cast<int32_t>(first + x); };
    p.groups[group] = {row(0), row(anchors), row(members), row(0), row(anchors), row(members)};
  }

  const ContrastivePlan& p;
  ContrastiveAxis axis[3];
};

// Weights from 1 at every anchor: a mean over the anchors of a set, then over the sets that have any.
void weigh(const ContrastivePlan& p) {
  const int64_t places = p.size[0] * p.size[1] * p.size[2], sets = p.reduction == 0 ? p.G : p.reduction == 1 ? 1 : p.N;
  std::vector<int64_t> counts(static_cast<size_t>(sets), 0);
  const auto each = [&](const auto& use) {
    for (int64_t g = 0; g < p.G; ++g)
      for (int64_t r = p.groups[g].row_begin; r < p.groups[g].row_anchor_end; ++r)
        if (p.weights[r] != 0) use(static_cast<size_t>(p.reduction == 0 ? g : p.reduction == 1 ? 0 : p.order[r] / places), r);
  };
  each([&](size_t set, int64_t) { ++counts[set]; });
  int64_t filled = 0;
  for (const int64_t count : counts) filled += count > 0;
  each([&](size_t set, int64_t r) { p.weights[r] = 1 / (static_cast<double>(counts[set]) * static_cast<double>(filled)); });
}

PlanTensors plan_cpu(Tensor labels, IntList block, IntList stride, bool per_image, bool drop_remainder,
                     std::optional<int64_t> background_label, std::optional<int64_t> ignore_index, int64_t form, int64_t reduction) {
  PlanArguments arguments(labels, block, stride, per_image, drop_remainder, background_label, ignore_index, form, reduction);
  const ContrastivePlan& p = arguments.plan;
  const Planner planner(p);
  constexpr int64_t serial_rows = 8192;  // about 50 microseconds
  const int64_t grain = p.R == 0 ? 1 : std::max<int64_t>(1, p.G * serial_rows / p.R);
  parallel_for(0, p.G, grain, [&](int64_t begin, int64_t end) {
    Sorter sorter;
    for (int64_t g = begin; g < end; ++g) planner.fill(g, sorter);
  });
  weigh(p);
  return arguments.tensors();
}

PlanTensors views_cpu(Tensor beside, int64_t count, bool crossing, bool symmetric) {
  ViewsArguments arguments(beside, count, crossing, symmetric);
  const ContrastiveViews& v = arguments.views;
  const int32_t n = static_cast<int32_t>(count), anchors = crossing && !symmetric ? n : 2 * n;
  if (crossing) {
    v.groups[0] = {0, n, n, n, anchors, 2 * n};
    v.groups[1] = {n, anchors, 2 * n, 0, n, n};
  } else {
    v.groups[0] = {0, 2 * n, 2 * n, 0, 2 * n, 2 * n};
  }
  for (int32_t r = 0; r < 2 * n; ++r) {
    v.order[r] = crossing ? r : r % 2 * n + r / 2;
    const int32_t partner = r < n ? r + n : r - n, pair = r / 2 * 2;
    v.ranges[r] = crossing ? ContrastiveRange{partner, partner + 1, r} : ContrastiveRange{pair, pair + 2, r};
    v.weights[r] = r < anchors ? 1.0 / anchors : 0.0;
  }
  return arguments.tensors();
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("contrastive_plan", TORCH_BOX(&plan_cpu));
  library.impl("contrastive_views", TORCH_BOX(&views_cpu));
}
