// SPDX-License-Identifier: MIT
// Nearest: the k nearest rows of a bank for every query, exactly ranked, without a matrix of all distances.
//
//   sqeuclidean:  d(q, b) = sum_j (q_j - b_j)^2
//   cosine:       d(q, b) = 1 - <q, b> / (|q| |b|), not below 0; 1 where a vector is no longer than 1e-12
//
// Definition of the result. d is the float64 value of these sums over j = 0, 1, ... one after the other, every product rounded before it is
// added; the neighbours are the first k in the order (d, index), NaN behind everything else. So the result is the same bits on every
// processor, for any number of threads and any way of searching.
//
// How it is found. A filter computes s = |b|^2 - 2 <q, b> (cosine: -2 <q^, b^>) in the compute type T from vectors moved by some center, which
// makes them short, and scaled by a power of two, which changes no digit. s + |q|^2 (cosine: s / 2 + 1) is d up to an error of at most e_b + e_q,
//   e_b = 2 c |b|^2,  e_q = 2 c |q|^2  (cosine: 2 c each),   c = 1.01 (u_T (D + 10) + u_64 (2 D + 8)),   u: unit roundoff
// and some underflow. So nothing with s - e_b > (k-th smallest s + e_b so far) + 2 e_q can be a neighbour: k rows before it have a smaller d as
// defined above. What the filter leaves, little more than k rows, is ranked by d itself. Where it leaves too much (thousands of equal rows), or
// numbers are too large to square, the query is compared with the whole bank. On the CPU a long row widens its own bound only; the CUDA kernels have a
// filter of their own, whose bound stands in nearest_kernel.cu.
//
// Shapes: queries [N, D], bank [M, D], 1 <= k <= M. Cost: 2 N M D flop; the bank is read once for every block of queries. Memory beyond the
// outputs: on the CPU what one thread's blocks hold, independent of N and M; on CUDA half-precision copies of both sides. No gradient.
#pragma once

#include <cstdint>

#include "common/kind.h"
#include "ops/prototypes.h"

namespace protokernels {

constexpr double NEAREST_NORM_FLOOR = 1e-12;

// T is double if double_compute, else float. Rows are dense and may have a row stride.
struct NearestProblem {
  int64_t N, M, D, k;
  const void* queries;  // [N, D] of queries_kind
  Kind queries_kind;
  int64_t queries_stride;
  const void* bank;  // [M, D] of bank_kind
  Kind bank_kind;
  int64_t bank_stride;
  bool cosine;
  bool double_compute;
  void* distances;   // T [N, k], ascending
  int64_t* indices;  // [N, k]
};

// ------------------------------------------------------------------------------------------------- CPU (csrc/ops/cpu)

// Candidates a query may hold.
constexpr int64_t nearest_capacity(int64_t k) { return k < 8 ? 32 : 4 * k; }

// A unit of work is a block of queries against a part of the bank. The split changes no result.
struct NearestUnits {
  int64_t block;   // queries
  int64_t blocks;  // of them
  int64_t part;    // rows of the bank
  int64_t parts;   // of them
};
NearestUnits nearest_units(const NearestProblem&, int64_t threads);

// d and index of a candidate; of parts > 1, k for every query and part, to be merged.
struct NearestCandidate {
  double distance;
  int64_t index;
};

struct NearestCpu {
  const char* level;
  // The vector the filter moves to the origin and, behind it, the power of two it multiplies by then: [D + 1] of T. Any will do; a mean and
  // about 1 / length are good.
  void (*find_center)(const NearestProblem&, void* center);
  // Units [begin, end); candidates [N, parts, k] or null: then distances and indices are written.
  void (*search)(const NearestProblem&, NearestUnits, const void* center, NearestCandidate* candidates, int64_t begin, int64_t end);
  // Queries [begin, end): the best k of candidates [N, parts, k].
  void (*merge)(const NearestProblem&, int64_t parts, NearestCandidate* candidates, int64_t begin, int64_t end);
};
const NearestCpu& nearest_cpu();  // the best table this machine can run

// An iteration of k-means: k = 1 against few rows, with the sum of each cluster's rows as prototypes_accumulate takes it, in the same pass. The
// filter's bound here is that of the product itself, for sums that meet no more additions than those over at most 128 columns at a time do,
//   e = c |b| (2 |q| + |b|) + u_64 (D + 8) |q|^2,   c = 1.01 (u_T (min(D, 128) + D / 128 + 10) + u_64 (2 D + 8)):
// a term -2 q_j b_j meets a rounding in each factor, one as a product and as many as there are additions behind it, |b|^2 no more; the 10 leaves enough
// for the rounding of the limit that scores are held against. A center farther than (smallest s) + 2 e is not the nearest.
struct NearestAssign {
  int64_t N, K, D;
  const void* x;  // T [N, D]
  int64_t x_stride;
  const void* centers;  // T [K, D]
  bool double_compute;
  int64_t* labels;  // [N]
  void* distances;  // T [N], from the own center, or null
};

struct NearestAssignCpu {
  int64_t (*center_elements)(const NearestAssign&);  // of T
  void (*pack)(const NearestAssign&, void* packed);
  // Chunks [begin, end) of the rows; partial_sums [chunks, K, D] and partial_counts [chunks, K], or both null.
  void (*assign)(const NearestAssign&, const void* packed, PrototypesChunks, double* partial_sums, int64_t* partial_counts, int64_t begin,
                 int64_t end);
};
const NearestAssignCpu& nearest_assign_cpu();

// A round of k-means++: how far every row would be from its closest center if candidate k became one,
//   closer[k, i] = min(closest[i], sum_j (x_ij - candidate_kj)^2),  totals[k] = sum_i closer[k, i] in float64.
// The sum over j = 0, 1, ... is taken in T, every product rounded before it is added; totals are sums over chunks of rows, in order. So the same
// bits come out on every processor and for any number of threads, and k-means++ draws the same rows. Cost: 3 N K D flop; rows are read once.
constexpr int64_t NEAREST_SEED_ROWS = 1024;  // of a chunk
struct NearestSeed {
  int64_t N, K, D;
  const void* x;  // T [N, D]
  int64_t x_stride;
  const void* candidates;  // T [K, D]
  const void* closest;     // T [N]; infinity where there is no center yet
  bool double_compute;
  void* closer;  // T [K, N]
};

struct NearestSeedCpu {
  void (*seed)(const NearestSeed&, double* partial, int64_t begin, int64_t end);  // chunks [begin, end); partial [chunks, K]
};
const NearestSeedCpu& nearest_seed_cpu();

// ---------------------------------------------------------------------------------------------- CUDA (csrc/ops/cuda)

constexpr int64_t NEAREST_MOST_CUDA =
    64;  // the largest k of the CUDA kernels; protokernels/ops/nearest.py sends larger ones to the reference

// Returns a cudaError_t as int; the workspace is in bytes and depends on shape and device only.
int64_t nearest_workspace(const NearestProblem&);
int launch_nearest(const NearestProblem&, void* workspace, void* stream);

}  // namespace protokernels
