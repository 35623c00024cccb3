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
#include "ops/cuda/contrastive_plan.cuh"

namespace {

__global__ void __launch_bounds__(THREADS) sort_kernel(const Sort p) {
  pk::let_next_begin();
  pk::wait_for_previous();
  PK_SHARED(int64_t, labels, CHUNK);
  PK_SHARED(int, numbers, CHUNK);
  PK_SHARED(int, counts, WARPS* DIGITS);  // of a digit in a warp's rows; later where classes begin
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
  pk::let_next_begin();
  pk::wait_for_previous();
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
  pk::let_next_begin();
  pk::wait_for_previous();
  const int group = static_cast<int>(blockIdx.x) / p.layout.chunks, chunk = static_cast<int>(blockIdx.x) % p.layout.chunks;
  const int64_t end = p.groups[group].row_anchor_end;  // a smaller group's chunks may begin beyond 2^31
  const int64_t first = int64_t{p.groups[group].row_begin} + chunk * CHUNK;
  const double sets = p.counts[0];
#pragma unroll
  for (int e = 0; e < ROUNDS; ++e) {
    const int64_t row = first + e * THREADS + threadIdx.x;
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
    layout.kept[a] = static_cast<int>(axis.kept), layout.edge[a] = static_cast<int>(axis.edge < axis.kept ? axis.edge : axis.kept),
    layout.blocks[a] = static_cast<int>(axis.blocks);
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
  return pieces.bytes();
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
  if (status == 0 && launch.layout.chunks > 1) status = PK_LAUNCH_BEHIND(merge_kernel, grid, dim3(THREADS), 0, stream, launch);
  if (status == 0 && p.R > 0) status = PK_LAUNCH_BEHIND(scale_kernel, grid, dim3(THREADS), 0, stream, launch);
  return status;
}

}  // namespace protokernels
