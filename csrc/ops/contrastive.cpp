// SPDX-License-Identifier: MIT
// Contrastive losses, the torch side: checks that protect memory, allocation, parts over threads, registration. The plan stands in
// contrastive_plan.cpp.
#include "ops/contrastive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <tuple>

#include "common/cpu_level.h"
#include "common/torch_utils.h"
#include "ops/contrastive_schedule.h"

namespace protokernels {

PK_DECLARE_LEVELS(ContrastivePackCpu, contrastive_pack_cpu);
PK_DECLARE_LEVELS(ContrastiveForwardCpu, contrastive_forward_cpu);
PK_DECLARE_LEVELS(ContrastiveBackwardCpu, contrastive_backward_cpu);

namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr double SERIAL_WORK = 2.5e6;       // about 50 microseconds, in multiply-adds: below it a second thread costs more than it brings
constexpr double SERIAL_NUMBERS = 1 << 16;  // numbers to move, likewise

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
    torch::stable::parallel_for(0, workers, 1, work_off);
}

int64_t workers_for(const ContrastiveSchedule& schedule) {
  const int64_t tasks = static_cast<int64_t>(schedule.tasks.size()) - 1;
  return schedule.work < SERIAL_WORK ? 1 : std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(tasks, 1));
}

template <class Function>
void for_rows(int64_t rows, int64_t numbers_each, const Function& function) {
  const int64_t grain = std::max<int64_t>(16, static_cast<int64_t>(SERIAL_NUMBERS) / std::max<int64_t>(numbers_each, 1));
  torch::stable::parallel_for(0, rows, grain, function);
}

// ------------------------------------------------------------------------------------------------------------ arguments

ScalarType compute_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

const void* checked(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == type;
  int64_t dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, "contrastive: ", name, " must be contiguous, of the shape and the type that fit the vectors");
  return tensor.data_ptr();
}

const void* checked(const OptionalTensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  return tensor ? checked(*tensor, name, type, sizes) : nullptr;
}

ScalarType vector_type(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "contrastive: vectors must be float32 or float64");
  return type;
}

// On the CPU groups and ranges are looked at, for kernels trust them.
void check_plan(const ContrastiveProblem& p) {
  int32_t before = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    const ContrastiveGroup& group = p.groups[g];
    const bool rows = before <= group.row_begin && group.row_begin <= group.row_anchor_end && group.row_anchor_end <= group.row_end && group.row_end <= p.R;
    const bool columns = 0 <= group.column_begin && group.column_begin <= group.column_anchor_end && group.column_anchor_end <= group.column_end &&
                         group.column_end <= p.M;
    const bool equal = group.row_begin == group.column_begin && group.row_anchor_end == group.column_anchor_end && group.row_end == group.column_end;
    STD_TORCH_CHECK(rows && columns && (!p.one_set || equal), "contrastive: group ", g, " does not lie within the rows and columns, in order");
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

void fill_problem(ContrastiveProblem& p, const Tensor& rows, const OptionalTensor& columns, const Tensor& groups, const Tensor& ranges,
                  int64_t channels, double temperature, bool unit, int64_t precision) {
  const ScalarType type = vector_type(rows);
  p.double_compute = type == ScalarType::Double;
  STD_TORCH_CHECK(rows.dim() == 2 && (!columns || columns->dim() == 2) && groups.dim() == 2, "contrastive: vectors and groups must be matrices");
  p.R = rows.size(0), p.M = columns ? columns->size(0) : p.R, p.G = groups.size(0), p.C = channels, p.Cp = rows.size(1);
  STD_TORCH_CHECK(channels > 0 && p.Cp == (channels + CONTRASTIVE_ALIGN - 1) / CONTRASTIVE_ALIGN * CONTRASTIVE_ALIGN && p.R < (int64_t{1} << 31) &&
                      p.M < (int64_t{1} << 31) && temperature > 0 && precision >= 0 && precision <= 2,
                  "contrastive: vectors must have their channels rounded up to 16, fewer than 2^31 rows and a positive temperature");
  p.rows = checked(rows, "rows", type, {p.R, p.Cp});
  p.one_set = !columns;
  p.columns = columns ? checked(*columns, "columns", type, {p.M, p.Cp}) : p.rows;
  p.groups = static_cast<const ContrastiveGroup*>(checked(groups, "groups", ScalarType::Int, {p.G, 6}));
  p.ranges = static_cast<const ContrastiveRange*>(checked(ranges, "ranges", ScalarType::Int, {p.R, 3}));
  p.temperature = temperature;
  p.bounded = unit && 2 / temperature < CONTRASTIVE_BOUND;
  p.precision = static_cast<ContrastivePrecision>(precision);
}

ContrastiveForm form_of(int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form <= 3, "contrastive: form must be 0 to 3");
  return static_cast<ContrastiveForm>(form);
}

// ------------------------------------------------------------------------------------------------------ pack and unpack

void fill_pack(ContrastivePack& p, const Tensor& x, const Tensor& order, bool normalize, bool on_cpu) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && order.dim() == 1, "contrastive: x must be [N, C, P] with at least one channel, order [R]");
  p.R = order.size(0), p.N = x.size(0), p.C = x.size(1), p.P = x.size(2);
  p.Cp = (p.C + CONTRASTIVE_ALIGN - 1) / CONTRASTIVE_ALIGN * CONTRASTIVE_ALIGN;
  p.x_kind = kind_of(x, "x");
  p.double_compute = p.x_kind == Kind::f64;
  p.order = static_cast<const int64_t*>(checked(order, "order", ScalarType::Long, {p.R}));
  p.normalize = normalize;
  if (!on_cpu) return;
  bool fit = true;
  for (int64_t r = 0; r < p.R; ++r) fit &= p.order[r] >= 0 && p.order[r] < p.N * p.P;
  STD_TORCH_CHECK(fit, "contrastive: order points outside of x");
}

std::tuple<Tensor, Tensor> pack_cpu(Tensor x, Tensor order, bool normalize) {
  ContrastivePack p{};
  fill_pack(p, x, order, normalize, true);
  p.x = x.data_ptr(), p.stride_n = x.stride(0), p.stride_c = x.stride(1), p.stride_p = x.stride(2);
  const Tensor packed = empty_beside(x, {p.R, p.Cp}, compute_type(p.double_compute)), norms = empty_beside(x, {p.R}, compute_type(p.double_compute));
  p.packed = packed.data_ptr(), p.norms = norms.data_ptr();
  const ContrastivePackCpu& cpu = PK_CHOOSE_LEVEL(contrastive_pack_cpu);
  for_rows(p.R, 2 * p.C, [&](int64_t begin, int64_t end) { cpu.pack(p, begin, end); });
  return {packed, norms};
}

Tensor unpack_cpu(Tensor grad_packed_any, Tensor packed, Tensor norms, Tensor order, Tensor like, bool normalize, bool channels_last) {
  const Tensor grad_packed = torch::stable::contiguous(grad_packed_any);
  ContrastiveUnpack p{};
  fill_pack(p, like, order, normalize, true);
  p.grad_packed = checked(grad_packed, "the gradient of packed", compute_type(p.double_compute), {p.R, p.Cp});
  p.packed = const_cast<void*>(checked(packed, "packed", compute_type(p.double_compute), {p.R, p.Cp}));
  p.norms = const_cast<void*>(checked(norms, "norms", compute_type(p.double_compute), {p.R}));
  Tensor memory = channels_last ? empty_beside(like, {p.N, p.P, p.C}, like.scalar_type()) : empty_beside(like, {p.N, p.C, p.P}, like.scalar_type());
  if (p.R != p.N * p.P) torch::stable::zero_(memory);
  const Tensor grad_x = channels_last ? torch::stable::transpose(memory, 1, 2) : memory;
  p.grad_x = grad_x.data_ptr(), p.stride_n = grad_x.stride(0), p.stride_c = grad_x.stride(1), p.stride_p = grad_x.stride(2);
  const ContrastivePackCpu& cpu = PK_CHOOSE_LEVEL(contrastive_pack_cpu);
  for_rows(p.R, 3 * p.C, [&](int64_t begin, int64_t end) { cpu.unpack(p, begin, end); });
  return grad_x;
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
  const Tensor statistics = empty_beside(rows, {3, f.R}, rows.scalar_type());
  f.losses = losses.data_ptr(), f.statistics = statistics.data_ptr(), f.total = total.data_ptr();
  const ContrastiveForwardCpu& cpu = PK_CHOOSE_LEVEL(contrastive_forward_cpu);
  const ContrastiveSchedule schedule = contrastive_forward_schedule(f);
  const ContrastiveBytes bytes = cpu.bytes(f, schedule);
  const int64_t workers = workers_for(schedule);
  const Tensor workspace = empty_beside(rows, {bytes.workspace}, ScalarType::Byte), scratch = empty_beside(rows, {workers * bytes.scratch}, ScalarType::Byte);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    T *const loss = static_cast<T*>(f.losses), *const statistic = static_cast<T*>(f.statistics);
    std::fill(loss, loss + f.R, T(0));
    std::fill(statistic, statistic + 2 * f.R, -std::numeric_limits<T>::infinity());
    std::fill(statistic + 2 * f.R, statistic + 3 * f.R, T(0));
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

double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == -std::numeric_limits<double>::infinity() ? high : high + std::log1p(std::exp(low - high));
}

// Derivatives by p, n and l of a row whose loss has the derivative g.
std::tuple<double, double, double> derivatives(ContrastiveForm form, double g, double p, double n, double positives) {
  const double all = log_add(p, n);
  switch (form) {
    case ContrastiveForm::supcon: return {g * std::exp(p - all), g * std::exp(n - all), -g / positives};
    case ContrastiveForm::in: return {-g * std::exp(n - all), g * std::exp(n - all), 0.0};
    case ContrastiveForm::paper: return {-g / positives, g / positives, 0.0};
    default: return {0.0, g, -g / positives};
  }
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
    const auto [dp, dn, dl] = derivatives(c.form, static_cast<const T*>(c.grad_losses)[r], statistics[r], statistics[c.R + r],
                                          static_cast<double>(positives));
    out[r] = static_cast<T>(dp), out[c.R + r] = static_cast<T>(dn), out[2 * c.R + r] = static_cast<T>(dl);
  }
}

Tensor coefficients_cpu(Tensor grad_losses, Tensor statistics, Tensor groups, Tensor ranges, int64_t form) {
  const ScalarType type = vector_type(statistics);
  ContrastiveCoefficients c{};
  STD_TORCH_CHECK(statistics.dim() == 2 && groups.dim() == 2, "contrastive: statistics must be [3, R], groups [G, 6]");
  c.R = statistics.size(1), c.G = groups.size(0), c.form = form_of(form), c.double_compute = type == ScalarType::Double;
  c.statistics = checked(statistics, "statistics", type, {3, c.R});
  c.grad_losses = checked(grad_losses, "the gradient of losses", type, {c.R});
  c.groups = static_cast<const ContrastiveGroup*>(checked(groups, "groups", ScalarType::Int, {c.G, 6}));
  c.ranges = static_cast<const ContrastiveRange*>(checked(ranges, "ranges", ScalarType::Int, {c.R, 3}));
  for (int64_t g = 0; g < c.G; ++g)
    STD_TORCH_CHECK(0 <= c.groups[g].row_begin && c.groups[g].row_anchor_end <= c.R, "contrastive: group ", g, " does not lie within the rows");
  Tensor out = empty_beside(statistics, {3, c.R}, type);
  torch::stable::zero_(out);
  c.coefficients = out.data_ptr();
  torch::stable::parallel_for(0, c.G, std::max<int64_t>(1, c.G * 1024 / std::max<int64_t>(c.R, 1)), [&](int64_t begin, int64_t end) {
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
  b.row_statistics = checked(row_statistics, "the rows' statistics", type, {3, b.R});
  b.row_coefficients = checked(row_coefficients, "the rows' coefficients", type, {3, b.R});
  b.column_statistics = checked(column_statistics, "the columns' statistics", type, {3, b.M});
  b.column_coefficients = checked(column_coefficients, "the columns' coefficients", type, {3, b.M});
  STD_TORCH_CHECK(row_statistics.has_value() == row_coefficients.has_value() && column_statistics.has_value() == column_coefficients.has_value() &&
                      (columns || row_statistics),
                  "contrastive: statistics and coefficients come together; with one set of vectors they are those of the rows");
  if (!columns) b.column_statistics = b.row_statistics, b.column_coefficients = b.row_coefficients;
  const Tensor grad_rows = empty_beside(rows, {b.R, b.Cp}, type);
  b.grad_rows = grad_rows.data_ptr();
  const ContrastiveBackwardCpu& cpu = PK_CHOOSE_LEVEL(contrastive_backward_cpu);
  const ContrastiveSchedule schedule = contrastive_backward_schedule(b, b.row_statistics, b.column_statistics);
  const ContrastiveBytes bytes = cpu.bytes(b, schedule);
  const int64_t workers = workers_for(schedule);
  const Tensor workspace = empty_beside(rows, {bytes.workspace}, ScalarType::Byte), scratch = empty_beside(rows, {workers * bytes.scratch}, ScalarType::Byte);
  clear_the_rest(b, schedule);
  if (columns && b.column_statistics)
    for_rows(b.M, 20, [&](int64_t begin, int64_t end) { cpu.prepare(b, schedule, workspace.data_ptr(), begin, end); });
  for_parts(schedule, workers, [&](const ContrastivePart& part, int64_t worker) {
    cpu.part(b, schedule, part, workspace.data_ptr(), static_cast<char*>(scratch.data_ptr()) + worker * bytes.scratch);
  });
  return grad_rows;
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("contrastive_pack", TORCH_BOX(&pack_cpu));
  library.impl("contrastive_unpack", TORCH_BOX(&unpack_cpu));
  library.impl("contrastive_forward", TORCH_BOX(&forward_cpu));
  library.impl("contrastive_coefficients", TORCH_BOX(&coefficients_cpu));
  library.impl("contrastive_backward", TORCH_BOX(&backward_cpu));
}
