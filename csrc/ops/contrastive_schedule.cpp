// SPDX-License-Identifier: MIT
#include "ops/contrastive_schedule.h"

#include <algorithm>

namespace protokernels {

namespace {

constexpr double EXPONENTIAL = 12;           // what a pair costs beside its products, in multiply-adds
constexpr double SMALLEST_SHARE = 2e6;       // multiply-adds a group must have to be spread over threads
constexpr int64_t SHARES = 48;               // a group with less than this part of all work stays with one thread
constexpr int64_t STEP = 96, MOST = 960;     // rows in a block: a multiple of every register tile
constexpr int64_t BLOCK_ELEMENTS = 1 << 16;  // of vectors in a block: 256 KB, which L2 holds

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows [begin, end) cut into blocks.
struct Cut {
  int64_t begin, end, step;
  int64_t count() const { return (end - begin + step - 1) / step; }
  int64_t first(int64_t block) const { return begin + block * step; }
  int64_t last(int64_t block) const { return std::min(end, begin + (block + 1) * step); }
};

int64_t most_rows(int64_t C) { return std::clamp(BLOCK_ELEMENTS / C / STEP * STEP, STEP, MOST); }

// A group for one thread is cut for the caches only; one for all threads into enough blocks that each finds work.
Cut cut(int64_t begin, int64_t end, int64_t C, bool spread) {
  const int64_t rows = end - begin, most = most_rows(C);
  if (!spread) return {begin, end, most};
  if (rows < 4 * STEP) return {begin, end, std::max<int64_t>(32, round_up((rows + 3) / 4, 32))};
  return {begin, end, std::clamp(round_up(rows / 40, STEP), STEP, most)};
}

class Builder {
 public:
  Builder(const ContrastiveProblem& problem, bool backward) : p(problem), symmetric(problem.one_set), backward_(backward) {
    const double products = !backward ? 1 : symmetric ? 3 : 2;
    pair_cost = products * static_cast<double>(p.C) + EXPONENTIAL;
  }

  ContrastiveSchedule build(bool row_losses, bool column_losses) {
    std::vector<double> costs(static_cast<size_t>(p.G));
    for (int64_t g = 0; g < p.G; ++g) out.work += costs[g] = pair_cost * pairs(p.groups[g], row_losses, column_losses);
    const double least = std::max(SMALLEST_SHARE, out.work / SHARES);
    for (int64_t g = 0; g < p.G; ++g) {
      if (costs[g] == 0) continue;
      spread = costs[g] >= least;
      group = static_cast<int32_t>(g);
      if (symmetric && crossing(p.groups[g]))
        crossing_sets(p.groups[g]);
      else if (symmetric)
        one_set(p.groups[g]);
      else
        two_sets(p.groups[g], row_losses, column_losses);
      if (!spread) end_task();
    }
    return std::move(out);
  }

 private:
  static double count(int32_t begin, int32_t end) { return static_cast<double>(end) - begin; }

  double pairs(const ContrastiveGroup& g, bool row_losses, bool column_losses) const {
    const double rows = count(g.row_begin, g.row_end), anchors = count(g.row_begin, g.row_anchor_end);
    if (symmetric && crossing(g))
      return g.column_begin < g.row_begin ? 0 : rows * count(g.column_begin, g.column_end);  // the mirror image is done
    if (symmetric) return anchors == 0 ? 0 : anchors * (anchors + 1) / 2 + anchors * (rows - anchors);
    const double columns = count(g.column_begin, g.column_end), column_anchors = count(g.column_begin, g.column_anchor_end);
    const double with_all = row_losses ? anchors * columns : 0,
                 with_anchors = column_losses ? (rows - (row_losses ? anchors : 0)) * column_anchors : 0;
    return with_all + with_anchors;
  }

  // Anchors meet each other and then the background. A group's anchors are the panels of all its parts.
  void one_set(const ContrastiveGroup& g) {
    const Cut anchors = cut(g.row_begin, g.row_anchor_end, p.C, spread), others = cut(g.row_anchor_end, g.row_end, p.C, spread);
    const int64_t n = anchors.count(), m = others.count(), first = new_blocks(anchors, true);
    const int64_t first_other = backward_ ? new_blocks(others, false) : -1;
    for (int64_t i = 0; i < n; ++i) add(anchors, i, anchors, i, first + i, first + i);
    const int64_t even = n + n % 2;
    for (int64_t round = 0; round + 1 < even; ++round)  // the circle method: the last one stays, the others move on
      for (int64_t k = 0; k < even / 2; ++k) {
        const int64_t a = k == 0 ? even - 1 : (round + k) % (even - 1), b = (round + even - 1 - k) % (even - 1);
        if (a < n && b < n) add(anchors, std::min(a, b), anchors, std::max(a, b), first + std::min(a, b), first + std::max(a, b));
      }
    const int64_t places = std::max(n, m);
    for (int64_t round = 0; m > 0 && round < places; ++round)
      for (int64_t a = 0; a < n; ++a) {
        const int64_t b = (a + round) % places;
        if (b < m) add(anchors, a, others, b, first + a, backward_ ? first_other + b : -1);
      }
  }

  static bool crossing(const ContrastiveGroup& g) { return g.row_begin != g.column_begin; }

  // Rows meet the rows of the next group, and serve them if those are anchors.
  void crossing_sets(const ContrastiveGroup& g) {
    const Cut rows = cut(g.row_begin, g.row_end, p.C, spread), columns = cut(g.column_begin, g.column_end, p.C, spread);
    const int64_t n = rows.count(), m = columns.count(), places = std::max(n, m), first = new_blocks(rows, true);
    const bool both = backward_ || g.column_anchor_end > g.column_begin;
    const int64_t first_column = both ? new_blocks(columns, false) : -1;
    for (int64_t round = 0; round < places; ++round)
      for (int64_t a = 0; a < n; ++a) {
        const int64_t b = (a + round) % places;
        if (b >= m) continue;
        add(rows, a, columns, b, first + a, both ? first_column + b : -1);
        out.parts.back().y_group = group + 1;
      }
  }

  // A block of rows is a task: only it is written.
  void two_sets(const ContrastiveGroup& g, bool row_losses, bool column_losses) {
    const Cut everyone = cut(g.column_begin, g.column_end, p.C, false), anchors = cut(g.column_begin, g.column_anchor_end, p.C, false);
    const auto blocks = [&](int32_t begin, int32_t end, const Cut& columns) {
      const Cut rows = cut(begin, end, p.C, spread);
      const int64_t first = new_blocks(rows, true);
      for (int64_t i = 0; i < rows.count(); ++i) {
        for (int64_t j = 0; j < columns.count(); ++j) add(rows, i, columns, j, first + i, -1);
        if (spread) end_task();
      }
    };
    if (row_losses) blocks(g.row_begin, g.row_anchor_end, everyone);
    if (column_losses) blocks(row_losses ? g.row_anchor_end : g.row_begin, g.row_end, anchors);
  }

  int64_t new_blocks(const Cut& cut, bool panels) {
    const int64_t first = static_cast<int64_t>(out.panels.size());
    for (int64_t i = 0; i < cut.count(); ++i) {
      out.panels.push_back(out.panel_rows);
      if (panels) out.panel_rows += round_up(cut.last(i) - cut.first(i), CONTRASTIVE_PAD);
    }
    turns.resize(out.panels.size(), 0);
    latest.resize(out.panels.size(), -1);
    return first;
  }

  void add(const Cut& x, int64_t i, const Cut& y, int64_t j, int64_t x_block, int64_t y_block) {
    ContrastivePart part{};
    part.group = part.y_group = group;
    part.x_begin = static_cast<int32_t>(x.first(i)), part.x_end = static_cast<int32_t>(x.last(i));
    part.y_begin = static_cast<int32_t>(y.first(j)), part.y_end = static_cast<int32_t>(y.last(j));
    part.triangle = x_block == y_block;
    part.x_last = part.y_last = true;
    part.x_block = static_cast<int32_t>(x_block), part.y_block = part.triangle ? -1 : static_cast<int32_t>(y_block);
    part.x_turn = touch(part.x_block);
    part.y_turn = part.y_block < 0 ? 0 : touch(part.y_block);
    out.most_x = std::max<int64_t>(out.most_x, part.x_end - part.x_begin);
    out.most_y = std::max<int64_t>(out.most_y, part.y_end - part.y_begin);
    out.parts.push_back(part);
    if (spread && symmetric) end_task();
  }

  // The part to come is the block's last until another comes.
  int32_t touch(int32_t block) {
    if (latest[block] >= 0) {
      ContrastivePart& before = out.parts[latest[block]];
      (before.x_block == block ? before.x_last : before.y_last) = false;
    }
    latest[block] = static_cast<int32_t>(out.parts.size());
    return turns[block]++;
  }

  void end_task() {
    if (out.tasks.back() < static_cast<int32_t>(out.parts.size())) out.tasks.push_back(static_cast<int32_t>(out.parts.size()));
  }

  const ContrastiveProblem& p;
  const bool symmetric, backward_;
  double pair_cost;
  bool spread = false;
  int32_t group = 0;
  std::vector<int32_t> turns, latest;
  ContrastiveSchedule out;
};

}  // namespace

ContrastiveSchedule contrastive_forward_schedule(const ContrastiveProblem& p) { return Builder(p, false).build(true, false); }

ContrastiveSchedule contrastive_backward_schedule(const ContrastiveProblem& p, bool row_losses, bool column_losses) {
  return Builder(p, true).build(row_losses, column_losses);
}

}  // namespace protokernels
