// SPDX-License-Identifier: MIT
// Contrastive losses, the torch side on the CPU: allocation, parts over threads, registration. Arguments are checked in contrastive_arguments.h;
// the plan stands in contrastive_plan.cpp, CUDA in contrastive_cuda.cpp.
#include "ops/contrastive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numbers>
#include <thread>
#include <tuple>

#include "common/cpu_level.h"
#include "common/torch_utils.h"
#include "ops/contrastive_arguments.h"
#include "ops/contrastive_schedule.h"

namespace protokernels {

PK_DECLARE_LEVELS(ContrastivePackCpu, contrastive_pack_cpu);
PK_DECLARE_LEVELS(ContrastiveForwardCpu, contrastive_forward_cpu);
PK_DECLARE_LEVELS(ContrastiveBackwardCpu, contrastive_backward_cpu);

namespace {

constexpr double SERIAL_WORK = 2.5e6;       // about 50 microseconds, in multiply-adds: below it a second thread costs more than it brings
constexpr double SERIAL_NUMBERS = 1 << 18;  // numbers to move, likewise

// ------------------------------------------------------------------------------------------------------------ threads

// Runs function(part, worker) over the parts of a schedule: tasks in order to the threads as those get free, parts of a block one after the other.
template <class Function>
void for_parts(const ContrastiveSchedule& schedule, int64_t workers, const Function& function) {
  const int64_t tasks = static_cast<int64_t>(schedule.tasks.size()) - 1;
  const std::unique_ptr<std::atomic<int32_t>[]> turns(new std::atomic<int32_t>[schedule.panels.size()]());
  std::atomic<int64_t> next{0};
  const auto wait = [&](int32_t block, int32_t turn) {
    for (int64_t tries = 0; block >= 0 && turns[block].load(std::memory_order_acquire) != turn; ++tries)
      if (tries > 1000) std::this_thread::yield();
  };
  const auto pass_on = [&](int32_t block, int32_t turn) {
    if (block >= 0) turns[block].store(turn + 1, std::memory_order_release);
  };
  const auto work_off = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++)
        for (int64_t k = schedule.tasks[task]; k < schedule.tasks[task + 1]; ++k) {
          const ContrastivePart& part = schedule.parts[k];
          wait(part.x_block, part.x_turn), wait(part.y_block, part.y_turn);
          function(part, worker);
          pass_on(part.x_block, part.x_turn), pass_on(part.y_block, part.y_turn);
        }
  };
  if (workers == 1)
    work_off(0, 1);
  else
    parallel_for(0, workers, 1, work_off);
}

int64_t workers_for(const ContrastiveSchedule& schedule) {
  const int64_t tasks = static_cast<int64_t>(schedule.tasks.size()) - 1;
  return schedule.work < SERIAL_WORK ? 1 : std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(tasks, 1));
}

template <class Function>
void for_rows(int64_t rows, int64_t numbers_each, const Function& function) {
  const int64_t grain = std::max<int64_t>(16, static_cast<int64_t>(SERIAL_NUMBERS) / std::max<int64_t>(numbers_each, 1));
  parallel_for(0, rows, grain, function);
}

// ------------------------------------------------------------------------------------------------------------ arguments

bool mirrors(const ContrastiveGroup& a, const ContrastiveGroup& b) {
  return a.row_begin == b.column_begin && a.row_anchor_end == b.column_anchor_end && a.row_end == b.column_end;
}

// One after the other, each with the rows of the other as its columns.
bool crosses(const ContrastiveGroup& first, const ContrastiveGroup& second) {
  return mirrors(first, second) && mirrors(second, first) && first.row_end <= second.row_begin && first.row_anchor_end == first.row_end &&
         (second.row_anchor_end == second.row_begin || second.row_anchor_end == second.row_end);
}

// On the CPU groups and ranges are looked at, for kernels trust them.
void check_plan(const ContrastiveProblem& p) {
  int32_t before = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    const ContrastiveGroup& group = p.groups[g];
    const bool rows = before <= group.row_begin && group.row_begin <= group.row_anchor_end && group.row_anchor_end <= group.row_end &&
                      group.row_end <= p.R;
    const bool columns = 0 <= group.column_begin && group.column_begin <= group.column_anchor_end &&
                         group.column_anchor_end <= group.column_end && group.column_end <= p.M;
    const bool one_set =
        mirrors(group, group) || (g + 1 < p.G && crosses(group, p.groups[g + 1])) || (g > 0 && crosses(p.groups[g - 1], group));
    STD_TORCH_CHECK(rows && columns && (!p.one_set || one_set), "contrastive: group ", g,
                    " does not lie within the rows and columns, in order");
    bool fit = true;
    for (int64_t r = group.row_begin; r < group.row_end; ++r) {
      const ContrastiveRange& range = p.ranges[r];
      fit &= group.column_begin <= range.class_begin && range.class_begin <= range.class_end && range.class_end <= group.column_end;
      fit &= p.one_set ? range.self == r : -1 <= range.self && range.self < p.M;
    }
    STD_TORCH_CHECK(fit, "contrastive: the range of a row in group ", g, " does not lie within the columns of its group");
    before = group.row_end;
  }
}

// ------------------------------------------------------------------------------------------------------ pack and unpack

// Maps whose planes have their pixels side by side and of which most are taken, every pixel once, go in their own order: row_at, the inverse of
// order, lies in what is returned.
OptionalTensor row_of_each(ContrastivePack& p, const Tensor& order) {
  const int64_t positions = p.N * p.P;
  const bool planes = p.C > 1 && p.stride_c != 1 && p.stride_p == 1 && p.P >= 16;
  if (!planes || p.R > positions || 2 * p.R < positions || positions > std::numeric_limits<int32_t>::max()) return std::nullopt;
  const Tensor memory = empty_beside(order, {positions}, ScalarType::Int);
  int32_t* const row_at = static_cast<int32_t*>(memory.data_ptr());
  std::fill(row_at, row_at + positions, -1);
  for (int64_t r = 0; r < p.R; ++r) {
    if (row_at[p.order[r]] >= 0) return std::nullopt;
    row_at[p.order[r]] = static_cast<int32_t>(r);
  }
  p.row_at = row_at;
  return memory;
}

// numbers: that are moved for every row or position.
template <class Problem, class Kernel>
void for_vectors(Problem p, const Tensor& order, int64_t numbers, const Kernel& kernel) {
  const OptionalTensor memory = row_of_each(p, order);
  for_rows(p.row_at ? p.N * p.P : p.R, numbers, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor> pack_cpu(Tensor x, Tensor order, bool normalize) {
  const auto run = [&](const ContrastivePack& p) { for_vectors(p, order, 2 * p.C, PK_CHOOSE_LEVEL(contrastive_pack_cpu).pack); };
  return pack_by(run, x, order, normalize, true);
}

Tensor unpack_cpu(Tensor grad_packed, Tensor packed, Tensor norms, Tensor order, Tensor like, bool normalize, bool channels_last) {
  const auto run = [&](const ContrastiveUnpack& p) { for_vectors(p, order, 3 * p.C, PK_CHOOSE_LEVEL(contrastive_pack_cpu).unpack); };
  return unpack_by(run, grad_packed, packed, norms, order, like, normalize, channels_last, true);
}

// ------------------------------------------------------------------------------------------------------------ forward

std::tuple<Tensor, Tensor, Tensor> forward_cpu(Tensor rows, OptionalTensor columns, Tensor groups, Tensor ranges, OptionalTensor weights,
                                               int64_t channels, double temperature, bool unit, int64_t form, int64_t precision) {
  ContrastiveForward f{};
  fill_problem(f, rows, columns, groups, ranges, channels, temperature, unit, precision);
  check_plan(f);
  f.form = form_of(form);
  f.weights = static_cast<const double*>(checked(weights, "weights", ScalarType::Double, {f.R}));
  const Tensor total = empty_beside(rows, {}, rows.scalar_type()), losses = empty_beside(rows, {f.R}, rows.scalar_type());
  const Tensor statistics = empty_beside(rows, {CONTRASTIVE_STATISTICS_CPU, f.R}, rows.scalar_type());
  f.losses = losses.data_ptr(), f.statistics = statistics.data_ptr(), f.total = total.data_ptr();
  const ContrastiveForwardCpu& cpu = PK_CHOOSE_LEVEL(contrastive_forward_cpu);
  const ContrastiveSchedule schedule = contrastive_forward_schedule(f);
  const ContrastiveBytes bytes = cpu.bytes(f, schedule);
  const int64_t workers = workers_for(schedule);
  const Tensor workspace = empty_beside(rows, {bytes.workspace}, ScalarType::Byte),
               scratch = empty_beside(rows, {workers * bytes.scratch}, ScalarType::Byte);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    T *const loss = static_cast<T*>(f.losses), *const statistic = static_cast<T*>(f.statistics);
    std::fill(loss, loss + f.R, T(0));
    std::fill(statistic, statistic + 2 * f.R, -std::numeric_limits<T>::infinity());
    std::fill(statistic + 2 * f.R, statistic + CONTRASTIVE_STATISTICS_CPU * f.R, T(0));
    for_parts(schedule, workers, [&](const ContrastivePart& part, int64_t worker) {
      cpu.part(f, schedule, part, workspace.data_ptr(), static_cast<char*>(scratch.data_ptr()) + worker * bytes.scratch);
    });
    double sum = 0;
    for (int64_t r = 0; f.weights && r < f.R; ++r) sum += f.weights[r] * static_cast<double>(loss[r]);
    *static_cast<T*>(f.total) = static_cast<T>(sum);
  };
  f.double_compute ? with_type(double{}) : with_type(float{});
  return {total, losses, statistics};
}

// ------------------------------------------------------------------------------------------------------------ backward

// Derivatives by p, n and l of a row whose loss has the derivative g; above = p - n.
std::tuple<double, double, double> derivatives(ContrastiveForm form, double g, double above, double positives) {
  if (form == ContrastiveForm::paper) return {-g / positives, g / positives, 0.0};
  if (form == ContrastiveForm::negout) return {0.0, g, -g / positives};
  const double small = std::exp(-std::abs(above)), larger = 1 / (1 + small), smaller = small * larger;  // parts of exp(p) + exp(n)
  const double of_n = above > 0 ? smaller : larger, of_p = above > 0 ? larger : smaller;
  if (form == ContrastiveForm::supcon) return {g * of_p, g * of_n, -g / positives};
  return {-g * of_n, g * of_n, 0.0};
}

template <class T>
void coefficients_of_group(const ContrastiveCoefficients& c, const ContrastiveGroup& group) {
  const T* const statistics = static_cast<const T*>(c.statistics);
  T* const out = static_cast<T*>(c.coefficients);
  const bool needs_negatives = c.form == ContrastiveForm::paper || c.form == ContrastiveForm::negout;
  for (int64_t r = group.row_begin; r < group.row_anchor_end; ++r) {
    const ContrastiveRange& range = c.ranges[r];
    const bool met = range.self >= group.column_begin && range.self < group.column_end;
    const bool in_class = range.self >= range.class_begin && range.self < range.class_end;
    const int64_t positives = range.class_end - range.class_begin - in_class;
    const int64_t negatives = group.column_end - group.column_begin - (range.class_end - range.class_begin) - (met && !in_class);
    if (positives <= 0 || (needs_negatives && negatives <= 0) || positives + negatives == 1) continue;
    T g = c.grad_losses ? static_cast<const T*>(c.grad_losses)[r] : T(0);
    if (c.grad_total) g += static_cast<T>(static_cast<double>(*static_cast<const T*>(c.grad_total)) * c.weights[r]);
    const auto of_row = [&](int64_t k) { return static_cast<double>(statistics[k * c.R + r]); };
    const double above = (of_row(0) - of_row(1)) + (of_row(3) - of_row(4)) * std::numbers::ln2;
    const auto [dp, dn, dl] = derivatives(c.form, g, above, static_cast<double>(positives));
    out[r] = static_cast<T>(dp), out[c.R + r] = static_cast<T>(dn), out[2 * c.R + r] = static_cast<T>(dl);
  }
}

Tensor coefficients_cpu(OptionalTensor grad_losses, Tensor statistics, Tensor groups, Tensor ranges, int64_t form,
                        OptionalTensor grad_total, OptionalTensor weights) {
  ContrastiveCoefficients c{};
  fill_coefficients(c, grad_losses, statistics, groups, ranges, form, grad_total, weights, CONTRASTIVE_STATISTICS_CPU);
  for (int64_t g = 0; g < c.G; ++g)
    STD_TORCH_CHECK(0 <= c.groups[g].row_begin && c.groups[g].row_anchor_end <= c.R, "contrastive: group ", g,
                    " does not lie within the rows");
  const Tensor out = empty_beside(statistics, {3, c.R}, statistics.scalar_type());
  c.coefficients = out.data_ptr();
  if (c.R > 0) std::memset(c.coefficients, 0, static_cast<size_t>(3 * c.R) * (c.double_compute ? 8 : 4));
  parallel_for(0, c.G, std::max<int64_t>(1, c.G * 1024 / std::max<int64_t>(c.R, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      c.double_compute ? coefficients_of_group<double>(c, c.groups[g]) : coefficients_of_group<float>(c, c.groups[g]);
  });
  return out;
}

// Clears the rows of grad_rows that belong to no block of the schedule.
void clear_the_rest(const ContrastiveBackward& b, const ContrastiveSchedule& schedule) {
  std::vector<std::pair<int64_t, int64_t>> covered;
  for (const ContrastivePart& part : schedule.parts) {
    if (part.x_turn == 0) covered.emplace_back(part.x_begin, part.x_end);
    if (part.y_block >= 0 && part.y_turn == 0) covered.emplace_back(part.y_begin, part.y_end);
  }
  covered.emplace_back(b.R, b.R);
  std::sort(covered.begin(), covered.end());
  const int64_t row_bytes = b.Cp * (b.double_compute ? 8 : 4);
  int64_t done = 0;
  for (const auto& [begin, end] : covered) {
    if (begin > done) std::memset(static_cast<char*>(b.grad_rows) + done * row_bytes, 0, static_cast<size_t>((begin - done) * row_bytes));
    done = std::max(done, end);
  }
}

Tensor backward_cpu(Tensor rows, OptionalTensor columns, Tensor groups, Tensor ranges, OptionalTensor row_statistics,
                    OptionalTensor row_coefficients, OptionalTensor column_statistics, OptionalTensor column_coefficients, int64_t channels,
                    double temperature, bool unit, int64_t precision) {
  ContrastiveBackward b{};
  fill_problem(b, rows, columns, groups, ranges, channels, temperature, unit, precision);
  check_plan(b);
  const ScalarType type = rows.scalar_type();
  fill_losses(b, row_statistics, row_coefficients, column_statistics, column_coefficients, type, CONTRASTIVE_STATISTICS_CPU);
  const Tensor grad_rows = empty_beside(rows, {b.R, b.Cp}, type);
  b.grad_rows = grad_rows.data_ptr();
  const ContrastiveBackwardCpu& cpu = PK_CHOOSE_LEVEL(contrastive_backward_cpu);
  const ContrastiveSchedule schedule = contrastive_backward_schedule(b, b.row_statistics, b.column_statistics);
  const ContrastiveBytes bytes = cpu.bytes(b, schedule);
  const int64_t workers = workers_for(schedule);
  const Tensor workspace = empty_beside(rows, {bytes.workspace}, ScalarType::Byte),
               scratch = empty_beside(rows, {workers * bytes.scratch}, ScalarType::Byte);
  clear_the_rest(b, schedule);
  if (columns && b.column_statistics)
    for_rows(b.M, 20, [&](int64_t begin, int64_t end) { cpu.prepare(b, schedule, workspace.data_ptr(), begin, end); });
  for_parts(schedule, workers, [&](const ContrastivePart& part, int64_t worker) {
    cpu.part(b, schedule, part, workspace.data_ptr(), static_cast<char*>(scratch.data_ptr()) + worker * bytes.scratch);
  });
  return grad_rows;
}

LossesOfVectors losses_cpu(Tensor x, OptionalTensor second, Tensor order, Tensor groups, Tensor ranges, Tensor weights, double temperature,
                           bool normalize, int64_t form, int64_t precision) {
  return losses_by(pack_cpu, forward_cpu, x, second, order, groups, ranges, weights, temperature, normalize, form, precision);
}

Tensor losses_backward_cpu(OptionalTensor grad_total, OptionalTensor grad_losses, Tensor packed, Tensor norms, Tensor order, Tensor groups,
                           Tensor ranges, Tensor weights, Tensor statistics, Tensor like, Tensor, double temperature, bool normalize,
                           int64_t form, int64_t precision, bool channels_last) {
  return losses_backward_by(coefficients_cpu, backward_cpu, unpack_cpu, grad_total, grad_losses, packed, norms, order, groups, ranges,
                            weights, statistics, like, temperature, normalize, form, precision, channels_last);
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("contrastive_pack", TORCH_BOX(&pack_cpu));
  library.impl("contrastive_unpack", TORCH_BOX(&unpack_cpu));
  library.impl("contrastive_forward", TORCH_BOX(&forward_cpu));
  library.impl("contrastive_backward", TORCH_BOX(&backward_cpu));
  library.impl("contrastive_losses", TORCH_BOX(&losses_cpu));
  library.impl("contrastive_losses_backward", TORCH_BOX(&losses_backward_cpu));
}
