// SPDX-License-Identifier: MIT
// What the kernels of contrastive that plan have in common: where a group's rows lie, what is written for a row, labels as digits.
#pragma once

#include "common/simt.cuh"
#include "ops/contrastive_layout.h"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32, ROUNDS = 4, CHUNK = THREADS * ROUNDS;
constexpr int DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS;

enum Role : int { ANCHOR = 0, BACKGROUND = 1, IGNORED = 2 };

// What a block of a larger group leaves for the others: classes with anchors, and rows of each role.
struct Chunk {
  int classes, anchors, background, ignored;
};

struct Layout {
  int kept[3], edge[3], blocks[3];  // ContrastiveAxis
  int64_t steps[4];                 // in the labels, from a map to the next and from a place on the grid to the next along every axis
  int N;
  bool per_image;
  int chunks;  // of the largest group
};

// A group: its first row, its rows, and where they lie.
struct Members {
  int first, rows, wide, high, deep;
  int64_t origin, step_n, step_d, step_h, step_w;

  __device__ __forceinline__ Members(const Layout& layout, int group)
      : step_n(layout.steps[0]), step_d(layout.steps[1]), step_h(layout.steps[2]), step_w(layout.steps[3]) {
    const int *const kept = layout.kept, *const edge = layout.edge, *const blocks = layout.blocks;
    const int block = layout.per_image ? group / layout.N : group, image = layout.per_image ? group - block * layout.N : 0;
    const int lines = block / blocks[2], at_w = block - lines * blocks[2], at_d = lines / blocks[1], at_h = lines - at_d * blocks[1];
    deep = min(edge[0], kept[0] - at_d * edge[0]), high = min(edge[1], kept[1] - at_h * edge[1]),
    wide = min(edge[2], kept[2] - at_w * edge[2]);
    // Rows before: those of whole layers of blocks, then rows of blocks, and so on.
    const int before = at_d * edge[0] * kept[1] * kept[2] + deep * at_h * edge[1] * kept[2] + deep * high * at_w * edge[2];
    first = before * layout.N + image * deep * high * wide, rows = (layout.per_image ? 1 : layout.N) * deep * high * wide;
    origin = image * step_n + at_d * edge[0] * step_d + at_h * edge[1] * step_h + at_w * edge[2] * step_w;
  }
  // Where the group's row number q before sorting lies.
  __device__ __forceinline__ int64_t place(int q) const {
    const int line = q / wide, layer = line / high, n = layer / deep;
    return origin + n * step_n + (layer - n * deep) * step_d + (line - layer * high) * step_h + (q - line * wide) * step_w;
  }
};

struct Sort {
  Layout layout;
  const int64_t* labels;
  bool has_background, has_ignored, needs_negatives;
  int64_t background, ignored;
  int reduction;
  int64_t places;  // of a map
  int64_t* order;
  ContrastiveGroup* groups;
  ContrastiveRange* ranges;
  double* weights;
  unsigned* counts;  // [1 + sets], 0 before the launch: sets that have anchors, then the anchors of each
  // Of groups with more than one chunk, all in the order of rows:
  Chunk* of_chunks;       // [G, chunks]
  int64_t* sorted;        // [R]: places in the order of the chunk
  int* class_of;          // [R]: number of the row's class in the chunk
  int64_t* class_labels;  // [R]: of the classes of a chunk
  int* class_ends;        // [R]

  __device__ __forceinline__ Role role(int64_t label) const {
    return has_ignored && label == ignored ? IGNORED : has_background && label == background ? BACKGROUND : ANCHOR;
  }
  __device__ __forceinline__ void add(int64_t set, int anchors) const {
    if (atomicAdd(counts + 1 + set, static_cast<unsigned>(anchors)) == 0) atomicAdd(counts, 1u);
  }
  // By a whole warp, each lane a row that is there or not; returns the warp's anchors, unless they are counted by image.
  __device__ __forceinline__ int write(bool present, int row, int64_t place, Role role, int class_begin, int class_end, int members) const {
    const int own = class_end - class_begin;
    const bool anchor = present && role == ANCHOR && own > 1 && (!needs_negatives || own < members);
    if (present) {
      order[row] = place;
      ranges[row].class_begin = role == IGNORED ? 0 : class_begin;
      ranges[row].class_end = role == IGNORED ? 0 : class_end;
      ranges[row].self = role == IGNORED ? -1 : row;
      weights[row] = anchor ? 1 : 0;
    }
    unsigned left = __ballot_sync(ALL, anchor);
    if (reduction != 2) return __popc(left);
    const int lane = threadIdx.x % 32, image = anchor ? static_cast<int>(place / places) : -1;
    while (left) {
      const int leader = __ffs(static_cast<int>(left)) - 1, of_leader = __shfl_sync(ALL, image, leader);
      const unsigned same = __ballot_sync(ALL, image == of_leader);
      if (lane == leader) add(of_leader, __popc(same));
      left &= ~same;
    }
    return 0;
  }
  // By the block, once: the anchors of each warp.
  __device__ __forceinline__ void count(int group, int of_warp, int* of_warps) const {
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const int anchors = __reduce_add_sync(ALL, threadIdx.x < WARPS ? of_warps[threadIdx.x] : 0);
    if (threadIdx.x == 0 && anchors > 0) add(reduction == 0 ? group : 0, anchors);
  }
  __device__ __forceinline__ void write_group(int group, int first, int anchors, int members) const {
    int* const numbers = &groups[group].row_begin;
    for (int side = 0; side < 6; side += 3) numbers[side] = first, numbers[side + 1] = first + anchors, numbers[side + 2] = first + members;
  }
};

// Sums over a warp's lanes up to its own.
__device__ __forceinline__ int warp_prefix(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Numbers in the order of roles and labels: those of anchors from the least on, then two more. Labels that fill all 64 bits leave no room for these
// and are sorted by role afterwards.
struct Codes {
  uint64_t least, span;
  int passes;
  bool full;

  __device__ __forceinline__ Codes(int64_t least_label, int64_t most_label) {
    const bool none = least_label > most_label;
    least = none ? 0 : static_cast<uint64_t>(least_label);
    span = none ? 0 : static_cast<uint64_t>(most_label) - least;
    full = span > ~uint64_t{0} - 2;
    passes = full ? 64 / DIGIT_BITS + 1 : (64 - __clzll(static_cast<long long>(span + 2)) + DIGIT_BITS - 1) / DIGIT_BITS;
  }
  __device__ __forceinline__ int digit(int64_t label, Role role, int pass) const {
    if (full && pass == 64 / DIGIT_BITS) return role;
    const uint64_t of_label = static_cast<uint64_t>(label) - least, code = full || role == ANCHOR ? of_label : span + role;
    return static_cast<int>(code >> pass * DIGIT_BITS) & (DIGITS - 1);
  }
};

}  // namespace
