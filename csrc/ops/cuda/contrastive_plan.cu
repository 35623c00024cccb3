// SPDX-License-Identifier: MIT
// Which vectors meet which, from labels, on the GPU: a group's rows sorted by class, stably. What is written stands in ops/contrastive.h.
//
// The host knows how many rows and groups there are, nothing of the labels: it launches for the largest group and never waits.
//   sort_kernel   a block sorts 2048 rows of a group in shared memory, 8 bits of the label at a time and only as many as the labels of the block
//                 differ in: a few classes are one pass. If that is the whole group, its rows are done.
//   merge_kernel  for larger groups, a block again has the 2048 rows: it finds every class of its own among those of the group's other blocks by
//                 bisection. Classes are looked up, not rows, and several threads share one where there are few.
//   scale_kernel  weights: 1 over the anchors of a set and the number of sets that have any. Both are counted with integer atomics.
// All are limited by latency: each is a few thousand cycles of one block. 4 x 160 x 160 in blocks of 16 is 100 blocks; labels are 0.8 MB.

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
    deep = min(edge[0], kept[0] - at_d * edge[0]), high = min(edge[1], kept[1] - at_h * edge[1]), wide = min(edge[2], kept[2] - at_w * edge[2]);
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
  Chunk* of_chunks;        // [G, chunks]
  int64_t* sorted;         // [R]: places in the order of the chunk
  int* class_of;           // [R]: number of the row's class in the chunk
  int64_t* class_labels;   // [R]: of the classes of a chunk
  int* class_ends;         // [R]

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
    for (int side = 0; side < 6; side += 3)
      numbers[side] = first, numbers[side + 1] = first + anchors, numbers[side + 2] = first + members;
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

__global__ void __launch_bounds__(THREADS) sort_kernel(const Sort p) {
  PK_SHARED(int64_t, labels, CHUNK);
  PK_SHARED(int, numbers, CHUNK);
  PK_SHARED(int, counts, WARPS * DIGITS);  // of a digit in a warp's rows; later where classes begin
  PK_SHARED(int, starts, DIGITS);
  PK_SHARED(int64_t, bounds, 2, WARPS);
  PK_SHARED(int, sums, ROUNDS* WARPS);
  PK_SHARED(int, first_of_role, 3);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = static_cast<int>(blockIdx.x) / p.layout.chunks, chunk = static_cast<int>(blockIdx.x) % p.layout.chunks;
  const Members members(p.layout, group);
  const int begin = chunk * CHUNK, count = max(0, min(CHUNK, members.rows - begin));
  const int rounds = (count + THREADS - 1) / THREADS, own = warp * rounds * 32 + lane;  // a warp's rows lie together

  int64_t mine[ROUNDS], least = INT64_MAX, most = INT64_MIN;
  int number[ROUNDS], rank[ROUNDS];
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int i = own + e * 32;
    number[e] = begin + i;
    mine[e] = e < rounds && i < count ? p.labels[members.place(begin + i)] : 0;
  }
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e)
    if (e < rounds && own + e * 32 < count && p.role(mine[e]) == ANCHOR) least = min(least, mine[e]), most = max(most, mine[e]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    least = min(least, __shfl_xor_sync(ALL, least, step));
    most = max(most, __shfl_xor_sync(ALL, most, step));
  }
  if (lane == 0) bounds[0][warp] = least, bounds[1][warp] = most;
  if (threadIdx.x < 3) first_of_role[threadIdx.x] = count;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) least = min(least, bounds[0][w]), most = max(most, bounds[1][w]);
  const Codes codes(least, most);

  for (int pass = 0; pass < codes.passes; ++pass) {
    for (int i = threadIdx.x; i < WARPS * DIGITS; i += THREADS) counts[i] = 0;
    __syncthreads();
    int digit[ROUNDS];
#pragma unroll
    for (int e = 0; e < ROUNDS; ++e) {
      if (e >= rounds) continue;
      const bool present = own + e * 32 < count;
      digit[e] = present ? codes.digit(mine[e], p.role(mine[e]), pass) : DIGITS;
      const unsigned peers = __match_any_sync(ALL, digit[e]), below = peers & ((1u << lane) - 1);
      const int before = present ? counts[warp * DIGITS + digit[e]] : 0;
      rank[e] = before + __popc(below);
      __syncwarp();
      if (present && below == 0) counts[warp * DIGITS + digit[e]] = before + __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    int total = 0, of_warps[WARPS];
    if (threadIdx.x < DIGITS) {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) of_warps[w] = counts[w * DIGITS + threadIdx.x];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        counts[w * DIGITS + threadIdx.x] = total;
        total += of_warps[w];
      }
    }
    const int upto = warp_prefix(total);
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    if (threadIdx.x < DIGITS) {
      int before = upto - total;
      for (int w = 0; w < warp; ++w) before += sums[w];
      starts[threadIdx.x] = before;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < ROUNDS; ++e) {
      if (e >= rounds || own + e * 32 >= count) continue;
      const int to = starts[digit[e]] + counts[warp * DIGITS + digit[e]] + rank[e];
      labels[to] = mine[e], numbers[to] = number[e];
    }
    __syncthreads();
    if (pass + 1 == codes.passes) break;
#pragma unroll
    for (int e = 0; e < ROUNDS; ++e)
      if (e < rounds && own + e * 32 < count) mine[e] = labels[own + e * 32], number[e] = numbers[own + e * 32];
  }

  // Classes, by the rows where they begin; from here on a thread has the sorted rows threadIdx.x, THREADS + threadIdx.x, ...
  unsigned begins[ROUNDS];
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int i = e * THREADS + threadIdx.x;
    const bool is_first = i < count && (i == 0 || labels[i] != labels[i - 1]);
    begins[e] = __ballot_sync(ALL, is_first);
    if (lane == 0) sums[e * WARPS + warp] = __popc(begins[e]);
    if (is_first && p.role(labels[i]) != ANCHOR) first_of_role[p.role(labels[i])] = i;
  }
  __syncthreads();
  if (warp == 0) {
    const int one = sums[2 * lane], two = sums[2 * lane + 1], upto = warp_prefix(one + two);
    sums[2 * lane] = upto - two, sums[2 * lane + 1] = upto;
  }
  __syncthreads();
  int* const class_begins = counts;
  int of_class[ROUNDS];
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int i = e * THREADS + threadIdx.x, at = e * WARPS + warp;
    of_class[e] = (at > 0 ? sums[at - 1] : 0) + __popc(begins[e] & (0xffffffffu >> (31 - lane))) - 1;
    if (begins[e] >> lane & 1) class_begins[of_class[e]] = i;
  }
  const int classes = sums[ROUNDS * WARPS - 1];
  if (threadIdx.x == 0) class_begins[classes] = count;
  __syncthreads();
  const int anchors = min(first_of_role[BACKGROUND], first_of_role[IGNORED]), present = first_of_role[IGNORED];
  const bool whole = p.layout.chunks == 1;
  int anchor_rows = 0;
  if (threadIdx.x == 0) {
    if (whole)
      p.write_group(group, members.first, anchors, present);
    else
      p.of_chunks[blockIdx.x] = {classes - (anchors < present) - (present < count), anchors, present - anchors, count - present};
  }
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int i = e * THREADS + threadIdx.x, row = members.first + begin + i;
    if (e >= rounds) continue;
    const bool here = i < count;
    const int64_t place = here ? members.place(numbers[i]) : 0;
    const int class_begin = here ? class_begins[of_class[e]] : 0, class_end = here ? class_begins[of_class[e] + 1] : 0;
    if (whole) {
      const Role role = here ? p.role(labels[i]) : IGNORED;
      anchor_rows += p.write(here, row, place, role, members.first + class_begin, members.first + class_end, present);
    } else if (here) {
      p.sorted[row] = place;
      p.class_of[row] = of_class[e];
      if (class_begin == i) {
        const int at = members.first + begin + of_class[e];
        p.class_labels[at] = labels[i], p.class_ends[at] = class_end;
      }
    }
  }
  if (whole) p.count(group, anchor_rows, starts);
}

__global__ void __launch_bounds__(THREADS) merge_kernel(const Sort p) {
  PK_SHARED(int, shifts, CHUNK);  // of a class: what makes a row of the chunk one of the group
  PK_SHARED(int, begins, CHUNK);
  PK_SHARED(int, ends, CHUNK);
  PK_SHARED(int, totals, 2, WARPS);
  PK_SHARED(int, of_warps, WARPS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = p.layout.chunks;
  const int group = static_cast<int>(blockIdx.x) / chunks, chunk = static_cast<int>(blockIdx.x) % chunks;
  const Members members(p.layout, group);
  const int begin = chunk * CHUNK, count = max(0, min(CHUNK, members.rows - begin)), first = members.first + begin;
  const Chunk* const of_chunks = p.of_chunks + static_cast<int64_t>(group) * chunks;
  if (count == 0 && chunk > 0) return;
  int anchors = 0, present = 0;
  for (int k = threadIdx.x; k < chunks; k += THREADS) anchors += of_chunks[k].anchors, present += of_chunks[k].background;
  anchors = __reduce_add_sync(ALL, anchors), present = anchors + __reduce_add_sync(ALL, present);
  if (lane == 0) totals[0][warp] = anchors, totals[1][warp] = present;

  const Chunk own = of_chunks[chunk];
  const int classes = own.classes + (own.background > 0) + (own.ignored > 0);
  int lanes = 32;  // that look up a class together
  while (lanes > 1 && classes * lanes > THREADS) lanes /= 2;
  for (int c0 = 0; c0 < classes; c0 += THREADS / lanes) {
    const int c = c0 + static_cast<int>(threadIdx.x) / lanes, part = threadIdx.x % lanes;
    int less = 0, same = 0, before = 0;
    if (c < classes) {
      const int64_t label = p.class_labels[first + c];
      const Role role = p.role(label);
      for (int k = part; k < chunks; k += lanes) {
        const Chunk other = of_chunks[k];
        int below = other.anchors, equal = other.background;
        if (role == IGNORED) {
          below += other.background, equal = other.ignored;
        } else if (role == ANCHOR) {
          const int64_t* const of_other = p.class_labels + members.first + k * CHUNK;
          const int* const other_ends = p.class_ends + members.first + k * CHUNK;
          int low = 0, high = other.classes;
          while (low < high) {
            const int middle = (low + high) / 2;
            of_other[middle] < label ? low = middle + 1 : high = middle;
          }
          below = low > 0 ? other_ends[low - 1] : 0;
          equal = low < other.classes && of_other[low] == label ? other_ends[low] - below : 0;
        }
        less += below, same += equal, before += k < chunk ? equal : 0;
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      less += __shfl_xor_sync(ALL, less, step);
      same += __shfl_xor_sync(ALL, same, step);
      before += __shfl_xor_sync(ALL, before, step);
    }
    if (part == 0 && c < classes) {
      begins[c] = members.first + less, ends[c] = members.first + less + same;
      shifts[c] = members.first + less + before - (c > 0 ? p.class_ends[first + c - 1] : 0);
    }
  }
  __syncthreads();
  anchors = present = 0;
  int anchor_rows = 0;
  for (int w = 0; w < WARPS; ++w) anchors += totals[0][w], present += totals[1][w];
  if (chunk == 0 && threadIdx.x == 0) p.write_group(group, members.first, anchors, present);
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int i = e * THREADS + threadIdx.x;
    const bool here = i < count;
    const int c = here ? p.class_of[first + i] : 0;
    const int64_t place = here ? p.sorted[first + i] : 0;
    const Role role = c < own.classes ? ANCHOR : c == own.classes && own.background > 0 ? BACKGROUND : IGNORED;
    anchor_rows += p.write(here, here ? shifts[c] + i : 0, place, role, here ? begins[c] : 0, here ? ends[c] : 0, present);
  }
  p.count(group, anchor_rows, of_warps);
}

__global__ void __launch_bounds__(THREADS) scale_kernel(const Sort p) {
  const int group = static_cast<int>(blockIdx.x) / p.layout.chunks, chunk = static_cast<int>(blockIdx.x) % p.layout.chunks;
  const int end = p.groups[group].row_anchor_end, first = p.groups[group].row_begin + chunk * CHUNK;
  const double sets = p.counts[0];
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int row = first + e * THREADS + threadIdx.x;
    if (row >= end || p.weights[row] == 0) continue;
    const int64_t set = p.reduction == 0 ? group : p.reduction == 1 ? 0 : p.order[row] / p.places;
    p.weights[row] = 1 / (static_cast<double>(p.counts[1 + set]) * sets);
  }
}

// What lies in the workspace; without one its size.
int64_t arrange(const ContrastivePlan& p, void* workspace, Sort& out) {
  Layout& layout = out.layout;
  int64_t largest = p.per_image ? 1 : p.N;
  for (int a = 0; a < 3; ++a) {
    const ContrastiveAxis axis = contrastive_axis(p, a);
    layout.kept[a] = static_cast<int>(axis.kept), layout.edge[a] = static_cast<int>(axis.edge < axis.kept ? axis.edge : axis.kept), layout.blocks[a] = static_cast<int>(axis.blocks);
    largest *= layout.edge[a];
  }
  layout.N = static_cast<int>(p.N), layout.per_image = p.per_image;
  layout.steps[0] = p.size[0] * p.size[1] * p.size[2], layout.steps[1] = p.stride[0] * p.size[1] * p.size[2];
  layout.steps[2] = p.stride[1] * p.size[2], layout.steps[3] = p.stride[2];
  layout.chunks = largest > CHUNK ? static_cast<int>((largest + CHUNK - 1) / CHUNK) : 1;
  const int64_t stored = layout.chunks > 1 ? p.R : 0;
  Pieces pieces(workspace);
  out.counts = pieces.take<unsigned>(1 + (p.reduction == 0 ? p.G : p.reduction == 1 ? 1 : p.N));
  out.of_chunks = pieces.take<Chunk>(layout.chunks > 1 ? p.G * layout.chunks : 0);
  out.sorted = pieces.take<int64_t>(stored), out.class_labels = pieces.take<int64_t>(stored);
  out.class_of = pieces.take<int>(stored), out.class_ends = pieces.take<int>(stored);
  return pieces.used();
}

}  // namespace

namespace protokernels {

int64_t contrastive_plan_workspace(const ContrastivePlan& p) {
  Sort ignored;
  return arrange(p, nullptr, ignored);
}

int launch_contrastive_plan(const ContrastivePlan& p, void* workspace, void* stream) {
  if (p.G == 0) return 0;
  Sort launch;
  arrange(p, workspace, launch);
  launch.labels = p.labels;
  launch.has_background = p.has_background, launch.background = p.background;
  launch.has_ignored = p.has_ignored, launch.ignored = p.ignored;
  launch.needs_negatives = p.form == ContrastiveForm::paper || p.form == ContrastiveForm::negout;
  launch.reduction = p.reduction, launch.places = p.size[0] * p.size[1] * p.size[2];
  launch.order = p.order, launch.groups = p.groups, launch.ranges = p.ranges, launch.weights = p.weights;
  const int64_t sets = p.reduction == 0 ? p.G : p.reduction == 1 ? 1 : p.N;
  const dim3 grid(static_cast<unsigned>(p.G * launch.layout.chunks));
  int status = pk::memset_async(launch.counts, 0, sizeof(unsigned) * static_cast<std::size_t>(1 + sets), stream);
  if (status == 0) status = PK_LAUNCH(sort_kernel, grid, dim3(THREADS), 0, stream, launch);
  if (status == 0 && launch.layout.chunks > 1) status = PK_LAUNCH(merge_kernel, grid, dim3(THREADS), 0, stream, launch);
  if (status == 0 && p.R > 0) status = PK_LAUNCH(scale_kernel, grid, dim3(THREADS), 0, stream, launch);
  return status;
}

}  // namespace protokernels
