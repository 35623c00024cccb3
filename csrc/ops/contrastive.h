// SPDX-License-Identifier: MIT
// Contrastive losses over pixels or embeddings (Hu et al. 2021, Eq. 1 and 2; SupCon, Khosla et al. 2020; NT-Xent, Chen et al. 2020), exact,
// without ever storing an N x N matrix.
//
// For a row i (an anchor) and the columns j of its group without itself, split into its own class P and the others N:
//
//   s_ij = <f_i, f_j> / temperature
//   p_i = log sum_P exp s_ij        n_i = log sum_N exp s_ij        l_i = sum_P s_ij                   ("statistics")
//
//   supcon: logaddexp(p, n) - l / |P|    in: logaddexp(p, n) - p + log|P|    paper: (n - p) / |P|    negout: n - l / |P|
//
// A row without positives is no anchor, nor is one without negatives for paper and negout: loss 0. Where a row meets a single positive and nothing
// else, supcon and in are 0 by definition and by computation, without rounding. total = sum_i weight_i loss_i.
//
// Backward, with dp, dn, dl the derivatives by a row's statistics ("coefficients", 0 for a row that is no anchor):
//
//   same class:  H_ij = dp_i exp(s_ij - p_i) + dp_j exp(s_ij - p_j) + dl_i + dl_j
//   others:      H_ij = dn_i exp(s_ij - n_i) + dn_j exp(s_ij - n_j)               df_i = sum_j H_ij f_j / temperature
//
// s is symmetric, so one recomputed tile serves both roles of a pair; with two sets of vectors a column's part is that of its own statistics, if
// it has any. Unit vectors bound s by 1 / temperature: while 2 / temperature < 80 that bound replaces every maximum, and one exponential
// serves all four terms.
//
// Rows lie group by group and inside a group class by class: first the classes that have anchors, then the background, so that anchors are a
// prefix and a row's class is one range of columns. A background row has no statistics and gets its gradient from the anchors alone.
//
// Shapes: vectors [R, Cp] with Cp = C rounded up to 16, zeros behind C. Cost, with S rows in a group and A of them anchors: forward 2 A S C flop and A S
// exponentials (half of that among anchors, by symmetry), backward 4 C (2 A S - A^2) flop. Nothing larger than the vectors is stored: forward
// saves them and a few numbers a row.
#pragma once

#include <cstdint>

#include "common/kind.h"

namespace protokernels {

constexpr double CONTRASTIVE_NORM_FLOOR = 1e-12;
constexpr double CONTRASTIVE_BOUND = 80;   // largest 2 / temperature for which unit vectors need no maximum
constexpr int64_t CONTRASTIVE_ALIGN = 16;  // elements to which a vector's length is rounded up

// Numbers of a row that forward keeps. CUDA: p, n, l. CPU: p, n and l less the tops of p and n (l less that of p for each of its scores),
// then these tops, in units of log 2: the largest scores, or the bound. A logarithm of 1e6 in float32 would be off by up to 3 % of its
// exponential; of a top nothing is lost.
constexpr int64_t CONTRASTIVE_STATISTICS_CPU = 5, CONTRASTIVE_STATISTICS_CUDA = 3;

enum class ContrastiveForm : int { supcon = 0, in = 1, paper = 2, negout = 3 };
enum class ContrastivePrecision : int {
  highest = 0,
  high = 1,
  medium = 2
};  // products on CUDA: as float32; with 11 bits, for raw vectors tf32 or bf16

// Rows [row_begin, row_end) meet columns [column_begin, column_end); the anchors among them come first. Rows and columns outside all groups (ignored
// labels) take no part. With one set of vectors a group's columns are its rows or, crossing, those of the next group, which has the rows of
// this one as its columns (two views that do not meet themselves); rows of such a pair are all anchors in the first group, and all or none
// in the second.
struct ContrastiveGroup {
  int32_t row_begin, row_anchor_end, row_end;
  int32_t column_begin, column_anchor_end, column_end;
};

// Columns of a row's own class, and the column that is the row itself, or -1. The range lies within the group's columns.
struct ContrastiveRange {
  int32_t class_begin, class_end, self;
};

// T is double if double_compute, else float.
struct ContrastiveProblem {
  int64_t R, M, G;                 // rows, columns, groups
  int64_t C, Cp;                   // length of a vector, and as stored
  const void* rows;                // T [R, Cp]
  const void* columns;             // T [M, Cp]; rows if there is one set
  bool one_set;                    // columns are the rows: s is symmetric, and so are the ranges. Two sets may be the same memory
  const ContrastiveGroup* groups;  // [G], in order of their rows
  const ContrastiveRange* ranges;  // [R]
  double temperature;
  bool unit;     // vectors of length 1 or 0
  bool bounded;  // unit, and 2 / temperature < CONTRASTIVE_BOUND
  bool double_compute;
  ContrastivePrecision precision;
};

struct ContrastiveForward : ContrastiveProblem {
  ContrastiveForm form;
  const double* weights;  // [R] or null: no total
  void* losses;           // T [R], 0 for a row that is no anchor
  void* statistics;       // T [3 or 5, R]; p = n = -inf and 0 for rows that are not among the anchors of a group
  void* total;            // T [1]
};

// Coefficients of rows from the derivative by their losses: grad_losses, or grad_total times their weights, or the sum of both.
struct ContrastiveCoefficients {
  int64_t R, G;
  const ContrastiveGroup* groups;
  const ContrastiveRange* ranges;
  const void* grad_losses;  // T [R] or null
  const void* grad_total;   // T [1] or null
  const double* weights;    // [R], with grad_total
  const void* statistics;   // T [3 or 5, R]
  ContrastiveForm form;
  bool double_compute;
  void* coefficients;  // T [3, R]: dp, dn, dl
};

struct ContrastiveBackward : ContrastiveProblem {
  const void* row_statistics;       // T [3 or 5, R], or null with row_coefficients: rows have no losses of their own
  const void* row_coefficients;     // T [3, R]
  const void* column_statistics;    // T [3 or 5, M], those of the rows if there is one set; null: columns have no losses of their own
  const void* column_coefficients;  // T [3, M]
  void* grad_rows;                  // T [R, Cp], zero for rows outside all groups
};

// Vectors from images or embeddings: row r is the vector at position order[r] of x [N, C, P], position = n P + p, divided by its length if normalize
// (no longer than the floor: it counts as zero and gets no gradient). With f the vector and df its gradient, dx = (df - f <f, df>) / |x|;
// positions that are not in order get 0.
struct ContrastivePack {
  int64_t R, N, C, P, Cp;
  const void* x;  // [N, C, P] of x_kind
  Kind x_kind;
  int64_t stride_n, stride_c, stride_p;  // elements
  const int64_t* order;                  // [R], distinct
  bool normalize;
  bool double_compute;
  void* packed;  // T [R, Cp]
  void* norms;   // T [R]: the length, infinity for a vector that counts as zero; 1 without normalize
  const int32_t*
      row_at;  // on the CPU, [N P]: the row of every position, -1 where there is none; null: work goes row by row, else by position
};

struct ContrastiveUnpack : ContrastivePack {  // packed and norms as pack left them; x is not read
  const void* grad_packed;                    // T [R, Cp]
  void* grad_x;                               // [N, C, P] of x_kind, strides as given; zero before the call
};

// Which vectors meet which, from the labels of N maps of size [D, H, W]. Positions on the grid of stride fall into blocks, a block of all maps (or of
// one map, if per_image) is a group; inside it the rows are sorted by class, stably: classes with anchors in ascending order, background, ignored.
// Groups run over blocks in the order of the map and, if per_image, over maps inside a block. Ignored rows have the range (0, 0, -1).
struct ContrastivePlan {
  int64_t N, size[3];
  int64_t block[3], stride[3];  // block counts positions of the map, not of the grid; 0: the whole axis
  bool per_image, drop_remainder;
  bool has_background, has_ignored;
  int64_t background, ignored;
  const int64_t* labels;  // [N, D, H, W]
  ContrastiveForm form;
  int reduction;  // weights: 0: mean over the anchors of a group, then over groups with anchors; 1: over all anchors; 2: of an image, then over images
  int64_t R, G;              // from contrastive_plan_sizes (ops/contrastive_layout.h)
  int64_t* order;            // [R]
  ContrastiveGroup* groups;  // [G]
  ContrastiveRange* ranges;  // [R]
  double* weights;           // [R], 0 for a row that is no anchor
};

// The same for two views of `count` vectors each, stacked, where a vector's class is itself and its partner: all of them meet, partners next to
// each other; or, crossing, only vectors of different views, those of the first view (of both if symmetric) as anchors.
struct ContrastiveViews {
  int64_t count;
  bool crossing, symmetric;
  int64_t* order;            // [2 count]
  ContrastiveGroup* groups;  // [1], crossing [2]
  ContrastiveRange* ranges;  // [2 count]
  double* weights;           // [2 count]: a mean over the anchors
};

// ------------------------------------------------------------------------------------------------- CPU (csrc/ops/cpu)

// One table of each kind per instruction set. What belongs to which part is in ops/contrastive_schedule.h; a part writes the rows of its blocks
// alone, and parts of a block are worked off in order, so that results do not depend on the number of threads.
struct ContrastiveSchedule;
struct ContrastivePart;

struct ContrastivePackCpu {  // of rows [first, last), with row_at of positions
  void (*pack)(const ContrastivePack&, int64_t first, int64_t last);
  void (*unpack)(const ContrastiveUnpack&, int64_t first, int64_t last);
};

struct ContrastiveBytes {
  int64_t workspace, scratch;  // shared, and of every thread
};

struct ContrastiveForwardCpu {
  ContrastiveBytes (*bytes)(const ContrastiveForward&, const ContrastiveSchedule&);
  // Statistics and losses of a block's rows are written with its last part; others keep what they hold.
  void (*part)(const ContrastiveForward&, const ContrastiveSchedule&, const ContrastivePart&, void* workspace, void* scratch);
};

struct ContrastiveBackwardCpu {
  ContrastiveBytes (*bytes)(const ContrastiveBackward&, const ContrastiveSchedule&);
  // Coefficients of columns [first, last), where there are two sets and columns have losses; before all parts.
  void (*prepare)(const ContrastiveBackward&, const ContrastiveSchedule&, void* workspace, int64_t first, int64_t last);
  // Clears the gradients of a block with its first part; rows of no block keep what they hold.
  void (*part)(const ContrastiveBackward&, const ContrastiveSchedule&, const ContrastivePart&, void* workspace, void* scratch);
};

// ---------------------------------------------------------------------------------------------- CUDA (csrc/ops/cuda)

// Each returns a cudaError_t as int; workspace sizes are in bytes and depend on shapes only (groups lie on the device).
int64_t contrastive_plan_workspace(const ContrastivePlan&);
int launch_contrastive_plan(const ContrastivePlan&, void* workspace, void* stream);
int launch_contrastive_views(const ContrastiveViews&, void* stream);
int launch_contrastive_pack(const ContrastivePack&, void* stream);
int launch_contrastive_unpack(const ContrastiveUnpack&, void* stream);
int64_t contrastive_forward_workspace(const ContrastiveForward&);
int launch_contrastive_forward(const ContrastiveForward&, void* workspace, void* stream);
int launch_contrastive_coefficients(const ContrastiveCoefficients&, void* stream);
int64_t contrastive_backward_workspace(const ContrastiveBackward&);
int launch_contrastive_backward(const ContrastiveBackward&, void* workspace, void* stream);

}  // namespace protokernels
