// SPDX-License-Identifier: MIT
// Which kernels serve a problem and how its work is cut up, by shapes alone. Known to the host side and its tests.
#pragma once

#include <cstdint>

#include "ops/contrastive.h"

namespace protokernels {

// By the length of a vector: up to 16, 64, 128, or slices of 128. A block has so many rows.
enum class ContrastiveWidth { narrow, middle, wide, sliced };

constexpr ContrastiveWidth contrastive_width(int64_t Cp) {
  return Cp <= 16    ? ContrastiveWidth::narrow
         : Cp <= 64  ? ContrastiveWidth::middle
         : Cp <= 128 ? ContrastiveWidth::wide
                     : ContrastiveWidth::sliced;
}
constexpr int64_t contrastive_rows(ContrastiveWidth width) { return width < ContrastiveWidth::wide ? 64 : 128; }

// From 65 channels on (contrastive_units.cuh is about fewer). A tile is a block's rows. The tiles of group g begin with number row_begin / rows + g,
// so that a tile is found without a list of tiles and without the host knowing the groups; of two numbers for a group's last rows one has none, and its block leaves at once.
// The columns of a tile are cut into shares where rows alone do not fill a GPU, its channels into slices.
struct ContrastiveGrid {
  int64_t tiles, shares, slices;
  constexpr int64_t blocks() const { return tiles * shares * slices; }
};

constexpr int64_t contrastive_tiles(int64_t R, int64_t G, int64_t rows) { return R / rows + (G > 0 ? G : 1); }

// So many that there are `blocks` blocks, but none of fewer than `columns` columns.
constexpr int64_t contrastive_shares(int64_t R, int64_t M, int64_t G, int64_t rows, int64_t blocks, int64_t columns) {
  constexpr int64_t most = 16;
  const int64_t tiles = (R + rows - 1) / rows, of_group = M / (G > 0 ? G : 1) / columns;
  const int64_t wanted = tiles > 0 ? (blocks + tiles - 1) / tiles : 1, possible = of_group < most ? of_group : most;
  const int64_t shares = wanted < possible ? wanted : possible;
  return shares > 1 ? shares : 1;
}

// Anchors alone have work here, perhaps a small part of the rows: more blocks than a GPU holds at once.
constexpr ContrastiveGrid contrastive_forward_grid(int64_t R, int64_t M, int64_t G, int64_t /*Cp*/) {
  const int64_t rows = contrastive_rows(ContrastiveWidth::wide);
  const int64_t fill = contrastive_shares(R, M, G, rows, 512, 256);
  const int64_t balance = contrastive_shares(R, M, G, rows, 4096, 4096);  // a few long blocks would end at different times
  return {contrastive_tiles(R, G, rows), fill > balance ? fill : balance, 1};
}

// Every share leaves a gradient of its rows to be added up.
constexpr ContrastiveGrid contrastive_backward_grid(int64_t R, int64_t M, int64_t G, int64_t Cp) {
  const int64_t rows = contrastive_rows(ContrastiveWidth::wide), slice = 128, slices = (Cp + slice - 1) / slice, blocks = 256;
  return {contrastive_tiles(R, G, rows), contrastive_shares(R, M, G, rows, blocks / slices > 0 ? blocks / slices : 1, 256), slices};
}

// The kernels of contrastive_hopper.cuh, forward and backward: blocks of 192 rows, of 128 where vectors have two parts, one on a multiprocessor. As
// many shares as end first on 132 of these, as H100 and H200 have; a share costs about as much as 256 columns beside its own.
constexpr int64_t contrastive_hopper_rows(bool two) { return two ? 128 : 192; }

constexpr ContrastiveGrid contrastive_hopper_grid(int64_t R, int64_t M, int64_t G, bool two) {
  constexpr int64_t most = 16, multiprocessors = 132, step = 128, beside = 2;
  const int64_t rows = contrastive_hopper_rows(two), tiles = (R + rows - 1) / rows, of_group = M / (G > 0 ? G : 1);
  int64_t best = 1, best_time = 0;
  for (int64_t shares = 1; shares <= most && (shares == 1 || of_group >= 2 * step * shares); ++shares) {
    const int64_t rounds = (tiles * shares + multiprocessors - 1) / multiprocessors,
                  steps = (of_group + shares * step - 1) / (shares * step);
    const int64_t time = rounds * (steps + beside);
    if (shares == 1 || time < best_time) best = shares, best_time = time;
  }
  return {contrastive_tiles(R, G, rows), best, 1};
}

// Of vectors of up to 64 channels (contrastive_local_*.cu); rows R > 0.
int64_t contrastive_local_forward_workspace(const ContrastiveForward&);
int launch_contrastive_local_forward(const ContrastiveForward&, void* workspace, void* stream);
int64_t contrastive_local_backward_workspace(const ContrastiveBackward&);
int launch_contrastive_local_backward(const ContrastiveBackward&, void* workspace, void* stream);

// In double: a warp per row, no tensor cores (contrastive_double.cu).
int64_t contrastive_double_forward_workspace(const ContrastiveForward&);
int launch_contrastive_double_forward(const ContrastiveForward&, void* workspace, void* stream);
int launch_contrastive_double_backward(const ContrastiveBackward&, void* stream);

}  // namespace protokernels
