// SPDX-License-Identifier: MIT
// How nearest divides a problem on the GPU, what lies in its workspace, and the launches it is made of. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/nearest.h"

namespace protokernels {

constexpr int NEAREST_TILE = 32;    // rows of a tile: queries of a warp; rows of the bank that a warp compares them with at a time
constexpr int NEAREST_CHUNK = 128;  // rows of the bank that are packed, and mostly read, together
constexpr int NEAREST_BLOCK = 32;   // dimensions of a block: 64 bytes of a packed row

// Of the whole problem; zero at the start.
struct NearestState {
  unsigned long long largest;  // the bits, as a double, of the largest finite magnitude of queries and bank
  unsigned left;               // queries that the filter could not decide
  unsigned distrust;           // not 0: there are numbers that the bounds do not hold for
};

// a r^2 / 2 + w r + z: half of what the filter may be wrong by about a vector of length r, in its scaled units (nearest_kernel.cu).
struct NearestError {
  double a, w, z;
};

// The same as the warps of the filter use it.
struct NearestBounds {
  float half_a, w, z;
  float crude_a, crude_z, crude;  // 4 a, w^2 / a + 2 z, 2 / (1 - 8 a)
};

// Everything a kernel needs to know, passed by value.
struct NearestTask {
  int64_t N;
  int M, D, k;
  const void *queries, *bank;
  Kind queries_kind, bank_kind;
  int64_t queries_stride, bank_stride;
  bool queries_aligned, bank_aligned;  // rows can be read four values at a time
  bool cosine, double_compute;
  void* distances;
  int64_t* indices;
  // The plan.
  bool filter;
  int64_t query_tiles;
  bool split;       // numbers are packed as sums of two, in three products
  int blocks;       // of packed dimensions
  int warps;        // of a block of threads of the filter
  int capacity;     // candidates of a query
  int survivors;    // rows of the bank that a warp can rank at a time
  int chunks;       // of the bank
  int parts;        // of the bank
  int part_chunks;  // of a part
  NearestError error;
  NearestBounds bounds;
  // The workspace.
  NearestState* state;
  double* center;                // [D]
  void* packed_queries;          // half [query_tiles, blocks, 32, 32]
  float* lengths;                // [query_tiles * 32]: of the packed queries, rounded up; NaN for those the filter cannot take
  void* packed_bank;             // half [chunks * 4, blocks, 32, 32]
  float* bias;                   // [chunks * 64, 4]: of two rows, twice
  int* flags;                    // [N]: not 0 for queries among `left`
  int64_t* left;                 // [N]
  NearestCandidate* candidates;  // [N, parts, k] if parts > 1
};

// Launches of the parts; each returns a cudaError_t as int.
int launch_nearest_pack(const NearestTask&, void* stream);    // nearest_pack.cu
int launch_nearest_filter(const NearestTask&, void* stream);  // nearest_kernel.cu
int launch_nearest_exact(const NearestTask&, void* stream);   // nearest_exact.cu: what is left, or every query without a filter; merging

}  // namespace protokernels
