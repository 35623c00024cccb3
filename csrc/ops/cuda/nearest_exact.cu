// SPDX-License-Identifier: MIT
// Nearest on the GPU, beside the filter: the best of a query's parts of the bank, and queries that are compared with the whole bank,
// because there is no filter or because it could not decide them.

#include "common/simt.cuh"
#include "ops/cuda/nearest_rows.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int MOST = static_cast<int>(NEAREST_MOST_CUDA);
constexpr int LISTS = 4;  // parts a lane looks after: 128 at most

// A warp for every query: k times the nearest of the first ones of its parts, each of which is sorted.
__global__ void __launch_bounds__(THREADS) merge_kernel(const NearestTask p) {
  const int lane = threadIdx.x % 32;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (query >= p.N || p.flags[query] != 0) return;
  const NearestCandidate* const own = p.candidates + query * p.parts * p.k;
  double distance[LISTS];
  int index[LISTS], taken[LISTS] = {};
  const auto read = [&](int i) {
    const int part = lane + 32 * i;
    const bool there = part < p.parts && taken[i] < p.k;
    const NearestCandidate* const from = own + part * p.k + taken[i];
    distance[i] = there ? from->distance : __longlong_as_double(0x7ff8000000000000ll);
    index[i] = there ? static_cast<int>(from->index) : 0x7fffffff;
  };
#pragma unroll
  for (int i = 0; i < LISTS; ++i) read(i);
  for (int rank = 0; rank < p.k; ++rank) {
    double best = distance[0];
    int best_index = index[0];
#pragma unroll
    for (int i = 1; i < LISTS; ++i)
      if (nearer(distance[i], index[i], best, best_index)) best = distance[i], best_index = index[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(ALL, best, step);
      const int other_index = __shfl_xor_sync(ALL, best_index, step);
      if (nearer(other, other_index, best, best_index)) best = other, best_index = other_index;
    }
    if (lane == 0) write_neighbour(p, query, rank, best, best_index);
#pragma unroll
    for (int i = 0; i < LISTS; ++i)
      if (index[i] == best_index) ++taken[i], read(i);
  }
}

// A block for every query: the nearest so far, sorted, and the rows among the next THREADS that come before the last of them.
__global__ void __launch_bounds__(THREADS, 4) whole_bank_kernel(const NearestTask p) {
  PK_SHARED(double, distances, 2, MOST);
  PK_SHARED(int, indices, 2, MOST);
  PK_SHARED(double, new_distances, THREADS);
  PK_SHARED(int, new_indices, THREADS);
  PK_SHARED(int, count);
  const int64_t queries = p.filter ? static_cast<int64_t>(p.state->left) : p.N;
  for (int64_t i = blockIdx.x; i < queries; i += gridDim.x) {
    const int64_t query = p.filter ? p.left[i] : i;
    int kept = 0, now = 0;
    for (int64_t first = 0; first < p.M; first += THREADS) {
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
      const int64_t place = first + threadIdx.x;
      const int row = static_cast<int>(place);
      bool passes = place < p.M;
      double distance = 0;
      if (passes) {
        distance = exact_distance(p, query, row);
        passes = kept < p.k || nearer(distance, row, distances[now][kept - 1], indices[now][kept - 1]);
      }
      if (passes) {
        const int at = atomicAdd(&count, 1);
        new_distances[at] = distance;
        new_indices[at] = row;
      }
      __syncthreads();
      const int added = count;
      if (added > 0) {
        const int most = min(kept + added, p.k);
        for (int e = threadIdx.x; e < kept + added; e += THREADS) {
          const double mine = e < kept ? distances[now][e] : new_distances[e - kept];
          const int mine_index = e < kept ? indices[now][e] : new_indices[e - kept];
          int rank = 0;
          for (int o = 0; o < kept; ++o) rank += nearer(distances[now][o], indices[now][o], mine, mine_index);
          for (int o = 0; o < added; ++o) rank += nearer(new_distances[o], new_indices[o], mine, mine_index);
          if (rank < most) distances[now ^ 1][rank] = mine, indices[now ^ 1][rank] = mine_index;
        }
        kept = most;
        now ^= 1;
      }
      __syncthreads();
    }
    for (int rank = threadIdx.x; rank < p.k; rank += THREADS) write_neighbour(p, query, rank, distances[now][rank], indices[now][rank]);
    __syncthreads();
  }
}

}  // namespace

namespace protokernels {

int launch_nearest_exact(const NearestTask& p, void* stream) {
  if (p.filter && p.parts > 1) {
    const int64_t blocks = (p.N + THREADS / 32 - 1) / (THREADS / 32);
    const int status = PK_LAUNCH((merge_kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, p);
    if (status != 0) return status;
  }
  const int64_t most = 4 * static_cast<int64_t>(pk::multiprocessor_count());
  return PK_LAUNCH((whole_bank_kernel), dim3(static_cast<unsigned>(p.N < most ? p.N : most)), dim3(THREADS), 0, stream, p);
}

}  // namespace protokernels
