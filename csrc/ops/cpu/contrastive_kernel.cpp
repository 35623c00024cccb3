// SPDX-License-Identifier: MIT
// Contrastive losses on the CPU, forward: statistics and losses. The equations stand in ops/contrastive.h, the order of work in
// ops/contrastive_schedule.h, sums in contrastive_forward.h.
// Limit at A anchors among S vectors of length C: (A S - A^2 / 2) pairs, each 2 C flop and one exponential.

#include "ops/cpu/contrastive_forward.h"

namespace {

PK_INLINE double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == -INFINITE<double> ? high : high + std::log1p(std::exp(low - high));
}

// all: the logarithm of exp(p) + exp(n).
PK_INLINE double loss_of(ContrastiveForm form, double p, double n, double all, double linear, double positives, double negatives) {
  const bool needs_negatives = form == ContrastiveForm::paper || form == ContrastiveForm::negout;
  if (positives == 0 || (needs_negatives && negatives == 0)) return 0;
  if (!needs_negatives && positives + negatives == 1) return p - p;  // nothing to tell apart: 0, not its rounding; still NaN for NaN
  switch (form) {
    case ContrastiveForm::supcon: return all - linear / positives;
    case ContrastiveForm::in: return all - p + std::log(positives);
    case ContrastiveForm::paper: return (n - p) / positives;
    default: return n - linear / positives;
  }
}

PK_INLINE double log_of(double sum) { return sum == 0 ? -INFINITE<double> : std::log2(sum); }

template <class T>
void finish_rows(const ContrastiveForward& f, const ContrastiveGroup& group, const Sums<T>& sums, int64_t begin, int64_t end) {
  T* const statistics = static_cast<T*>(f.statistics);
  for (int64_t i = begin; i < end; ++i) {
    const ContrastiveRange& r = f.ranges[i];
    const bool met = r.self >= group.column_begin && r.self < group.column_end, in_class = r.self >= r.class_begin && r.self < r.class_end;
    const double positives = r.class_end - r.class_begin - in_class;
    const double negatives = group.column_end - group.column_begin - (r.class_end - r.class_begin) - (met && !in_class);
    const T bound = bound_of<T>(f);
    const double centre = centre_of<T>(f), p_top = f.bounded ? bound : sums.p_top[i], n_top = f.bounded ? bound : sums.n_top[i];
    // A loss is that of scores less any number.
    const double base = sums.p[i] == 0 ? n_top : sums.n[i] == 0 ? p_top : std::max(p_top, n_top);
    const double p_rest = log_of(sums.p[i]), n_rest = log_of(sums.n[i]);
    const double p = LN_2 * (p_rest + (p_top - base)), n = LN_2 * (n_rest + (n_top - base));
    const double all = f.bounded ? LN_2 * log_of(sums.p[i] + sums.n[i]) : log_add(p, n);
    const double linear = LN_2 * (sums.linear[i] + positives * (centre - base));
    static_cast<T*>(f.losses)[i] = static_cast<T>(loss_of(f.form, p, n, all, linear, positives, negatives));
    statistics[i] = static_cast<T>(LN_2 * p_rest), statistics[f.R + i] = static_cast<T>(LN_2 * n_rest);
    statistics[2 * f.R + i] = static_cast<T>(LN_2 * (sums.linear[i] + positives * (centre - p_top)));
    statistics[3 * f.R + i] = sums.p[i] == 0 ? T(0) : static_cast<T>(p_top);
    statistics[4 * f.R + i] = sums.n[i] == 0 ? T(0) : static_cast<T>(n_top);
  }
}

template <class T>
void forward_part(const ContrastiveForward& f, const ContrastiveSchedule& schedule, const ContrastivePart& part, void* workspace,
                  void* scratch_memory) {
  Arena shared(workspace), own(scratch_memory);
  const ForwardRoom<T> room(f, schedule, shared);
  ForwardScratch<T> scratch(f, schedule, own);
  T* const panels = room.panels + schedule.panels[part.x_block] * f.C;
  const int64_t rows = part.x_end - part.x_begin;
  if (part.x_turn == 0) {
    pack_strips(static_cast<const T*>(f.rows) + part.x_begin * f.Cp, rows, f.C, f.Cp, Scale<T>::of(f).panels, panels);
    room.sums.clear(part.x_begin, part.x_end);
  }
  if (part.y_block >= 0 && part.y_turn == 0) room.sums.clear(part.y_begin, part.y_end);  // of a crossing group
  scratch.rows.read(part, f.ranges, f.bounded ? bound_of<T>(f) : T(0));
  scratch.down.clear(0, round_up(rows, STRIP<T>));
  const bool across = part.triangle || part.y_block >= 0;
  if (f.bounded)
    across ? sum_part<T, true, true>(f, part, panels, room, scratch) : sum_part<T, true, false>(f, part, panels, room, scratch);
  else
    across ? sum_part<T, false, true>(f, part, panels, room, scratch) : sum_part<T, false, false>(f, part, panels, room, scratch);
  const Sums<T>&down = scratch.down, &sums = room.sums;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = part.x_begin + i;
    sums.linear[row] += down.linear[i];
    if (f.bounded)
      sums.p[row] += down.p[i], sums.n[row] += down.n[i];
    else
      merge_one(sums.p[row], sums.p_top[row], down.p[i], down.p_top[i]), merge_one(sums.n[row], sums.n_top[row], down.n[i], down.n_top[i]);
  }
  if (part.x_last) finish_rows(f, f.groups[part.group], sums, part.x_begin, part.x_end);
  if (part.y_block >= 0 && part.y_last) finish_rows(f, f.groups[part.y_group], sums, part.y_begin, part.y_end);
}

void forward_any(const ContrastiveForward& f, const ContrastiveSchedule& schedule, const ContrastivePart& part, void* workspace,
                 void* scratch) {
  [[maybe_unused]] const FlushToZero flush;  // exponentials far below the largest
  f.double_compute ? forward_part<double>(f, schedule, part, workspace, scratch)
                   : forward_part<float>(f, schedule, part, workspace, scratch);
}

ContrastiveBytes bytes(const ContrastiveForward& f, const ContrastiveSchedule& schedule) {
  Arena shared(nullptr), own(nullptr);
  if (f.double_compute)
    ForwardRoom<double>(f, schedule, shared), ForwardScratch<double>(f, schedule, own);
  else
    ForwardRoom<float>(f, schedule, shared), ForwardScratch<float>(f, schedule, own);
  return {shared.bytes(), own.bytes()};
}

}  // namespace

namespace protokernels {

extern const ContrastiveForwardCpu PK_LEVEL_TABLE(contrastive_forward_cpu);
const ContrastiveForwardCpu PK_LEVEL_TABLE(contrastive_forward_cpu) = {bytes, forward_any};

}  // namespace protokernels
