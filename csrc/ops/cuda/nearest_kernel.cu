// SPDX-License-Identifier: MIT
// Nearest on the GPU: the filter of ops/nearest.h on tensor cores, ranking of what it leaves, and the launches of the whole.
//
// 1. nearest_pack.cu moves and scales queries and bank and writes them as fp16, which has tf32's 11 bits and twice its speed. Neighbours in
//    few dimensions (D <= 21) are nearer than 11 bits can tell: numbers are split in two, which up to D = 10 costs nothing.
// 2. A warp has 32 queries, their fp16 fragments in registers where D <= 64, and meets the bank 32 rows at a time in chunks that the block
//    copies to shared memory. A score is compared by taking the least of eight neighbouring rows and that with the query's limit; what is
//    within goes to the query's list, which is cut down whenever it has grown by about k, and so is the limit (nearest_candidates.cuh).
//    First limits come from an eighth of the bank: for a small k from the least scores of 16 groups of its rows. Chunks are taken in an
//    order without neighbours, since in a bank sorted by class the nearest rows might come last.
// 3. The warp ranks what is left by float64 distances, all its queries side by side.
// 4. nearest_exact.cu merges parts of the bank, which there are where queries alone would not fill the GPU, and does the rest.
//
// Bounds. X and Y are a row of the bank and a query, moved and scaled by S = 2^e; beta and alpha their lengths; h = |X - Y|^2 / 2, which is
// S^2 d / 2. A score is v = B - X.Y with B = beta^2 / 2 - E(beta), so v is about h - alpha^2 / 2, less E(beta). Its errors:
//   fp16    x becomes x (1 + t) + n, |t| <= 2^-11, |n| <= 2^-25 (below 2^-14): of X.Y at most 2^-10 (1 + 2^-12) alpha beta
//           + 2^-25 (1 + 2^-11) sqrt(D) (alpha + beta) + D 2^-50, by Cauchy and Schwarz. Split, |t| <= 2^-22 and low times low, at most
//           2^-22 alpha beta and some more n, is left out: 3 2^-22 alpha beta, 2^-25 (1 + 2^-10) sqrt(D) (alpha + beta) and D 2^-49
//   sums    products of fp16 numbers are exact. A tensor core adds up to 16 of them and the sum so far after cutting each off at the last
//           of at least 24 bits of the largest, perhaps in several steps of 4 or 8, each cut off again: fewer than 32 cuts of 2^-23 of |B|
//           + 1.004 alpha beta for every 16 packed dimensions, 2^-18 of that
//   d       the definition's own sums: (D + 3) 2^-53 h, h <= alpha^2 + beta^2; |X|^2, the center's differences, B as a float: less than the
//           1 % below
// With alpha beta <= (alpha^2 + beta^2) / 2 they are at most E(alpha) + E(beta), for E(r) = a r^2 / 2 + w r + z and
//   a = 1.01 (2^-10 + steps 2^-17 + (4 D + 16) 2^-53), split 3 2^-22 for 2^-10;   w = 1.01 2^-25 sqrt(D);   z = D 2^-48
// and so   v - E(alpha)  <=  S^2 d / 2 - alpha^2 / 2  <=  v + 2 E(beta) + E(alpha).
// If k rows have v <= V, the k-th smallest d is at most what the right side gives for V and the longest of them, and no row of a smaller or
// equal d has v > V + 2 E(alpha) + 2 E(beta): the limit. There beta <= alpha + sqrt(2 h), and h follows from 2 E(beta) <= 2 a beta^2 +
// w^2 / a + 2 z and beta^2 <= 2 alpha^2 + 4 h:   h (1 - 8 a) <= V + alpha^2 / 2 + E(alpha) + 4 a alpha^2 + w^2 / a + 2 z.
// Cosine: vectors of length 2^14, d = 1 - X.Y / 2^28 to a rounding, B = -E(beta), beta = alpha.
// Rows without finite numbers have B = NaN, which is within no limit.
//
// Limit at N = 60000, M = 10000, D = 32, k = 5 on an H200: 38.4 GFLOP, 62 us of fp16 mma.sync at 620 TFLOP/s. Beside it 68 instructions of
// a warp for 32 x 32 scores, 28 of them for their least, about 45 us, and about as many for the 21 or so rows of the bank that come into a
// query's list one after another.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "common/simt.cuh"
#include "ops/cuda/nearest_candidates.cuh"
#include "ops/cuda/nearest_walk.cuh"

namespace {

constexpr int MOST_WARPS = 8;
constexpr int GROUPS = 4;

// The least score of each of a lane's queries, 8 r + group.
__device__ __forceinline__ void least_scores(const Scores& s, float (&least)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float x[4];
#pragma unroll
    for (int f = 0; f < 4; ++f) x[f] = fminf(s[r / 2][f][r % 2 * 2], s[r / 2][f][r % 2 * 2 + 1]);
    least[r] = fminf(fminf(x[0], x[1]), fminf(x[2], x[3]));
  }
}

// A lane's copies of what concerns its four queries.
struct Watch {
  float limit[4];
  int count[4];

  __device__ __forceinline__ void take(const Own& own) {
    const int group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      limit[r] = __shfl_sync(ALL, own.limit, 8 * r + group);
      count[r] = __shfl_sync(ALL, own.count, 8 * r + group);
    }
  }
  __device__ __forceinline__ void give(Own& own) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int other = __shfl_sync(ALL, count[r], lane % 8 * 4);
      if (lane / 8 == r) own.count = other;
    }
  }
};

// Where a lane lists what it finds. Passed through a shuffle the numbers stay in registers; the compiler would compute them at every use.
struct Desk {
  unsigned quad, before;  // lanes that have the same queries; of them, those before this one
  int at;                 // of the lane's first query, in entries

  __device__ __forceinline__ Desk(int list, bool stay) {
    const int lane = threadIdx.x % 32;
    quad = 15u << (lane & 28), before = quad & ((1u << lane) - 1), at = list + lane / 4;
    if (stay) quad = __shfl_sync(ALL, quad, lane), before = __shfl_sync(ALL, before, lane), at = __shfl_sync(ALL, at, lane);
  }
};

// Lists what is within the limits, after a tile; group: the lane's eight rows. Returns whether a list should be cut down.
__device__ __forceinline__ bool collect(const Scores& s, const float (&least)[4], Watch& watch, uint2* lists, const Desk& desk,
                                        unsigned group, int enough) {
  bool hit[4], within = false;
#pragma unroll
  for (int r = 0; r < 4; ++r) hit[r] = least[r] <= watch.limit[r], within |= hit[r];
  if (!__any_sync(ALL, within)) return false;
  int longest = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const unsigned hits = __ballot_sync(ALL, hit[r]);
    if (hits == 0) continue;
    if (hit[r]) {
      unsigned mask = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) mask |= s[r / 2][i / 2][r % 2 * 2 + i % 2] <= watch.limit[r] ? 1u << i : 0u;
      const int at = watch.count[r] + __popc(hits & desk.before);
      pk::store_vector(lists + desk.at + at * 32 + 8 * r, uint2{__float_as_uint(least[r]), group << 8 | mask});
    }
    watch.count[r] += __popc(hits & desk.quad);
    longest = max(longest, watch.count[r]);
  }
  return __any_sync(ALL, longest > enough);
}

// The least scores of groups of rows, GROUPS in each lane of a quad and so 4 GROUPS for a query, kept where its list will be.
struct FirstScores {
  uint2* const lists;  // from the lane's first on

  __device__ __forceinline__ explicit FirstScores(uint2* lists_) : lists(lists_ + threadIdx.x % 4 * GROUPS * 32 + threadIdx.x % 32 / 4) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int r = 0; r < 4; ++r) put(g, r, INFINITY);
  }
  __device__ __forceinline__ void put(int g, int r, float score) const {
    pk::store_vector(lists + g * 32 + 8 * r, uint2{__float_as_uint(score), 0});
  }
  __device__ __forceinline__ void add(int g, const float (&least)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) put(g, r, fminf(__uint_as_float(lists[g * 32 + 8 * r].x), least[r]));
  }
};

// 128 registers, for two blocks on a multiprocessor; on sm_100 one address waits outside of them from the beginning of the walk to its end.
// resources: spills at most 8 bytes
// resources: dynamic shared 75776 bytes
template <int BLOCKS, bool few>
__global__ void __launch_bounds__(MOST_WARPS * 32, few || BLOCKS == 1 ? 2 : 1)
    filter_kernel(const NearestTask p, const int first_chunks, const int stride) {
  PK_DYNAMIC_SHARED(unsigned char, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = static_cast<int>(blockIdx.x % p.parts);
  const int64_t tile = static_cast<int64_t>(blockIdx.x / p.parts) * p.warps + warp, first_query = tile * NEAREST_TILE;
  if (!trusted(p)) {
    if (first_query + lane < p.N) leave(p, first_query + lane);
    return;
  }
  Walk<BLOCKS> walk(p, shared, part, stride, tile);
  uint2* const all_lists = reinterpret_cast<uint2*>(shared + 2 * Shape<BLOCKS>::BYTES);
  uint2* const lists = all_lists + warp * p.capacity * 32;
  const Desk desk(warp * p.capacity * 32, BLOCKS == 1);  // with more fragments of queries there is no room
  Own own = {__int_as_float(0x7fc00000), 0};
  if (walk.active && p.lengths[first_query + lane] < INFINITY) own.limit = INFINITY;

  if (few) {
    const FirstScores first(lists);
    int turn = 0;
    walk.run(min(first_chunks, walk.chunks), [&](const Scores& s, int) {
      float least[4];
      least_scores(s, least);
      first.add(turn++ % GROUPS, least);
    });
    __syncwarp();
    lower<few>(lists + lane, own, 4 * GROUPS, p, first_query + lane);
    __syncwarp();
  }

#pragma unroll 1
  for (int pass = few ? 1 : 0; pass < 2; ++pass) {
    Watch watch;
    watch.take(own);
    int enough = min(p.capacity - 4, 2 * p.k + 6);
    walk.run(pass == 0 ? min(first_chunks, walk.chunks) : walk.chunks, [&](const Scores& s, int t) {
      float least[4];
      least_scores(s, least);
      if (!collect(s, least, watch, all_lists, desk, static_cast<unsigned>(t * 4 + lane % 4), enough)) return;
      watch.give(own);
      __syncwarp();
      shrink<few>(lists + lane, own, p, first_query + lane);
      __syncwarp();
      enough = min(p.capacity - 4, __reduce_max_sync(ALL, own.count) + p.k + 4);
      watch.take(own);
    });
    watch.give(own);
    __syncwarp();
    shrink<few>(lists + lane, own, p, first_query + lane);
    __syncwarp();
    if (pass == 0) own.count = 0;  // many rows were listed that the limit now leaves out
  }
  if (!walk.active) return;
  double* const distances = reinterpret_cast<double*>(shared) + warp * p.survivors;
  unsigned* const codes = reinterpret_cast<unsigned*>(reinterpret_cast<double*>(shared) + p.warps * p.survivors) + warp * p.survivors;
  rank_candidates(p, lists + lane, own, first_query, part, walk.chunk0 * NEAREST_CHUNK, distances, codes);
}

// ------------------------------------------------------------------------------------------------------------------------ launch

int64_t stage_bytes(int blocks) { return 2 * (blocks == 1 ? Shape<1>::BYTES : blocks == 2 ? Shape<2>::BYTES : Shape<0>::BYTES); }
int64_t list_bytes(const NearestTask& p) { return static_cast<int64_t>(p.capacity) * NEAREST_TILE * static_cast<int64_t>(sizeof(uint2)); }

// Parts of the bank, so that blocks fill the GPU in few full waves; each costs as much as some chunks.
int parts_of(int64_t query_blocks, int chunks, int64_t slots) {
  int best = 1;
  double least = INFINITY;
  for (int parts = 1; parts <= 128 && (parts == 1 || chunks / parts >= 4); ++parts) {
    const double waves = static_cast<double>((query_blocks * parts + slots - 1) / slots);
    const double cost = waves * ((chunks + parts - 1) / parts * 1.125 + 16) + parts / 8.0;
    if (cost < least) least = cost, best = parts;
  }
  return best;
}

void plan(NearestTask& p, const NearestProblem& problem) {
  p.N = problem.N, p.M = static_cast<int>(problem.M), p.D = static_cast<int>(problem.D), p.k = static_cast<int>(problem.k);
  p.queries = problem.queries, p.queries_kind = problem.queries_kind, p.queries_stride = problem.queries_stride;
  p.bank = problem.bank, p.bank_kind = problem.bank_kind, p.bank_stride = problem.bank_stride;
  const auto aligned = [](const void* values, Kind kind, int64_t stride) {
    const uintptr_t bytes = kind == Kind::bf16 || kind == Kind::f16 ? 8 : 16;
    return reinterpret_cast<uintptr_t>(values) % bytes == 0 && stride % 4 == 0;
  };
  p.queries_aligned = aligned(p.queries, p.queries_kind, p.queries_stride);
  p.bank_aligned = aligned(p.bank, p.bank_kind, p.bank_stride);
  p.cosine = problem.cosine, p.double_compute = problem.double_compute;
  p.distances = problem.distances, p.indices = problem.indices;

  const double depth = static_cast<double>(problem.D);
  p.query_tiles = (p.N + NEAREST_TILE - 1) / NEAREST_TILE;
  p.split = 3 * problem.D <= 2 * NEAREST_BLOCK;
  p.blocks = static_cast<int>(((p.split ? 3 : 1) * problem.D + NEAREST_BLOCK - 1) / NEAREST_BLOCK);
  const double rounding = p.split ? 3 * 0x1p-22 : 0x1p-10;
  p.error = {1.01 * (rounding + 2.0 * p.blocks * 0x1p-17 + (4 * depth + 16) * 0x1p-53), 1.01 * 0x1p-25 * std::sqrt(depth), depth * 0x1p-48};
  const auto [a, w, z] = p.error;
  const auto as_float = [](double x) { return static_cast<float>(x); };
  p.bounds = {as_float(a / 2), as_float(w), as_float(z), as_float(4 * a), as_float(w * w / a + 2 * z), as_float(2 / (1 - 8 * a))};
  p.filter = p.D > 0 && p.error.a <= 1.0 / 32;
  p.capacity = p.k <= FEW ? 28 : 2 * p.k + 16;
  const int64_t stages = stage_bytes(p.blocks), limit = static_cast<int64_t>(pk::shared_memory_limit());
  p.warps = MOST_WARPS;
  while (p.warps > 1 && (p.warps / 2 >= p.query_tiles || stages + p.warps * list_bytes(p) > limit)) p.warps /= 2;
  p.survivors = static_cast<int>(stages / p.warps / 12 < 512 ? stages / p.warps / 12 : 512) / 32 * 32;
  p.chunks = static_cast<int>((problem.M + NEAREST_CHUNK - 1) / NEAREST_CHUNK);
  const int64_t query_blocks = (p.query_tiles + p.warps - 1) / p.warps;
  const int64_t together = 2 * (stages + p.warps * list_bytes(p) + 1024) <= limit + 1024 ? 2 : 1;
  p.parts = parts_of(query_blocks, p.chunks, together * pk::multiprocessor_count());
  const int most = 1 << 19;  // chunks of a part: a group of eight rows has 24 bits
  if ((p.chunks + p.parts - 1) / p.parts > most) p.parts = (p.chunks + most - 1) / most;
  p.part_chunks = (p.chunks + p.parts - 1) / p.parts - 1;
  do {  // a last part of fewer than k rows would leave every query to the comparison with the whole bank
    ++p.part_chunks;
    p.parts = (p.chunks + p.part_chunks - 1) / p.part_chunks;
  } while (p.parts > 1 && p.M - int64_t{p.parts - 1} * p.part_chunks * NEAREST_CHUNK < p.k);
}

// Gives out the workspace; returns the bytes of all.
int64_t divide_workspace(NearestTask& p, void* workspace) {
  const uintptr_t start = (reinterpret_cast<uintptr_t>(workspace) + 255) / 256 * 256;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(start + static_cast<uintptr_t>(used));
    used += (bytes + 255) / 256 * 256;
  };
  const int64_t rows = static_cast<int64_t>(p.chunks) * NEAREST_CHUNK, places = p.query_tiles * NEAREST_TILE;
  const int64_t packed = int64_t{64} * p.blocks;
  take(p.state, sizeof(NearestState));
  take(p.center, p.D * int64_t{8});
  take(p.packed_queries, places * packed);
  take(p.lengths, places * 4);
  take(p.packed_bank, rows * packed);
  take(p.bias, rows * 8);
  take(p.flags, p.N * 4);
  take(p.left, p.N * 8);
  take(p.candidates, p.parts > 1 ? p.N * p.parts * p.k * static_cast<int64_t>(sizeof(NearestCandidate)) : 0);
  return used + 256;
}

template <int BLOCKS>
int launch_filter(const NearestTask& p, void* stream) {
  const int64_t blocks = (p.query_tiles + p.warps - 1) / p.warps * p.parts;
  const std::size_t bytes = static_cast<std::size_t>(stage_bytes(p.blocks) + p.warps * list_bytes(p));
  const int first = std::max((p.part_chunks + 7) / 8, p.k <= FEW ? 1 : (2 * p.k + 15) / 16);  // groups of 8 rows, 16 in a chunk
  const auto divisor = [](int x, int y) {
    while (y != 0) x %= y, std::swap(x, y);
    return x;
  };
  // About the golden section of a part, without a common divisor, so that every chunk is met once. The last part may be shorter.
  const int last = p.chunks - (p.parts - 1) * p.part_chunks;
  int stride = static_cast<int>(p.part_chunks * 0.618);
  while (divisor(p.part_chunks, stride) != 1 || divisor(last, stride) != 1) ++stride;
  const dim3 grid(static_cast<unsigned>(blocks)), threads(static_cast<unsigned>(32 * p.warps));
  if (p.k <= FEW) return PK_LAUNCH((filter_kernel<BLOCKS, true>), grid, threads, bytes, stream, p, first, stride);
  return PK_LAUNCH((filter_kernel<BLOCKS, false>), grid, threads, bytes, stream, p, first, stride);
}

}  // namespace

namespace protokernels {

int launch_nearest_filter(const NearestTask& p, void* stream) {
  if (p.blocks == 1) return launch_filter<1>(p, stream);
  if (p.blocks == 2) return launch_filter<2>(p, stream);
  return launch_filter<0>(p, stream);
}

int64_t nearest_workspace(const NearestProblem& problem) {
  NearestTask p{};
  plan(p, problem);
  return divide_workspace(p, nullptr);
}

int launch_nearest(const NearestProblem& problem, void* workspace, void* stream) {
  if (problem.N == 0) return 0;
  NearestTask p{};
  plan(p, problem);
  divide_workspace(p, workspace);
  int status = p.filter ? launch_nearest_pack(p, stream) : 0;
  if (status == 0 && p.filter) status = launch_nearest_filter(p, stream);
  return status == 0 ? launch_nearest_exact(p, stream) : status;
}

}  // namespace protokernels
