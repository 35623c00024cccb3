// SPDX-License-Identifier: MIT
// How the CPU works through the pairs of vectors: blocks of rows meet blocks of columns, a pair of blocks is a part, and tasks of one or more parts
// go to the threads as those get free.
//
// With one set of vectors every unordered pair is visited once and serves both of its vectors: products 2 C flop a pair forward and 6 C backward,
// one exponential each. Two parts of a block must then not run at once. They take turns: a part waits until the parts that come before
// it in the order of its blocks are done. The order pairs blocks as a tournament does, so that neighbours in it share no block and
// waiting is rare; it depends on shapes and groups only, so sums are added up in one order whatever the number of threads, and no
// partial results are kept. Tasks are handed out in order: the first unfinished one never waits, so the rest cannot wait forever.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/contrastive.h"

namespace protokernels {

constexpr int64_t CONTRASTIVE_PAD = 32;  // rows to which the packed panels of a block are padded: two of the widest vectors

// x: rows of the problem, each in a lane of its own; y: its columns.
struct ContrastivePart {
  int32_t group, y_group;  // of x, and of y as rows
  int32_t x_begin, x_end;
  int32_t y_begin, y_end;
  int32_t x_block, y_block;  // y_block -1: nothing is added to the columns
  int32_t x_turn, y_turn;    // parts of that block that come before
  bool x_last, y_last;       // no part of that block comes after
  bool triangle;             // x and y are the same rows, and pairs x < y are visited
};

struct ContrastiveSchedule {
  std::vector<ContrastivePart> parts;
  std::vector<int32_t> tasks{0};  // task t holds parts [tasks[t], tasks[t + 1])
  std::vector<int64_t> panels;    // where the panels of a block begin, in rows
  int64_t panel_rows = 0;
  int64_t most_x = 0, most_y = 0;  // rows of the largest block on either side
  double work = 0;                 // multiply-adds
};

// Statistics and losses.
ContrastiveSchedule contrastive_forward_schedule(const ContrastiveProblem&);
// Gradient of the rows, with losses of rows and of columns or of one of them.
ContrastiveSchedule contrastive_backward_schedule(const ContrastiveProblem&, bool row_losses, bool column_losses);

}  // namespace protokernels
