// SPDX-License-Identifier: MIT
// Prototypes on the GPU from labels: sums and counts of the clusters. The equations stand in ops/prototypes.h.
//
// sums_kernel: a block takes a chunk of rows, up to 128 dimensions, and of up to 256 clusters those that hold its share of the chunk's rows. It sorts
// the chunk's rows by label (a counting sort: stable, so rows of one cluster keep their order), cuts the rows of its clusters into equal segments, and
// up to 32 threads walk along each, a row at a time: rows are read once, whole. A run that lies within a segment is written at once; where it goes on
// in the next, the segment that holds its beginning adds up the pieces in order. float64, no atomics, an order that depends on the shape and the
// labels only. A cluster has one block of a chunk: where it holds nearly all of 65536 rows, this block reads what eight blocks read otherwise.
// prototypes_finish.cu adds up chunks and blends; a single chunk does so itself.
// Limit: z is read once (33.5 MB at B = 65536, D = 128: 8 us from memory, 6 us from L2), after the sort of a chunk, about 2 us.
// Measured on an H200: 26 us, of which about 7 wait for rows and most of the rest is the sort's chain of short waits; 16 us at B = 2048;
// about 50 us where one cluster has 99 % of 65536 rows.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_sums.cuh"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4096;              // sorted at a time
constexpr int PER_WARP = ROWS / WARPS;  // rows
constexpr int CLUSTERS = 256;           // of a block
constexpr int MAX_LANES = 32;           // threads on a row, four dimensions each
template <class V>
constexpr int AHEAD = sizeof(V) == 8 ? 8 : 16;  // rows of a segment on their way at a time
constexpr int MAX_CHUNKS = 1024;
constexpr int MAX_PARTS = 16;  // of a chunk's clusters

// ------------------------------------------------------------------------------------------------------------ sums of a chunk

template <class Z>
struct Sums {
  int64_t B, K, D, rows_per_chunk, z_stride;
  int parts;              // blocks that share the clusters of a chunk
  const Z* z;             // [B, D]
  const int64_t* labels;  // [B]
  bool aligned, alone;    // alone: one chunk of at most ROWS rows; its sums are the sums
  double* sums;           // [chunks, K, D]
  int* part_counts;       // [chunks, K]
  int64_t* counts;        // [K] if alone
  PrototypesBlend blend;  // updated: null, or blended if alone
};

// The sorted rows of a chunk: entries hold the cluster (from the first of the block on) and the row (from the first of the chunk on).
struct Sorted {
  const unsigned* entries;  // [begins[CLUSTERS]]
  const int* begins;        // [CLUSTERS + 1]
};
__device__ __forceinline__ int cluster_of(unsigned entry) { return static_cast<int>(entry >> 16); }
__device__ __forceinline__ int row_of(unsigned entry) { return static_cast<int>(entry & 0xffffu); }

// Exclusive sums over the CLUSTERS values at totals, into begins; all threads call.
__device__ __forceinline__ void exclusive_sums(int mine, int (&warp_totals)[CLUSTERS / 32], int (&begins)[CLUSTERS + 1]) {
  const int thread = threadIdx.x, lane = thread % 32;
  int inclusive = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (thread < CLUSTERS && lane == 31) warp_totals[thread / 32] = inclusive;
  __syncthreads();
  if (thread < CLUSTERS) {
    int before = 0;
    for (int w = 0; w < thread / 32; ++w) before += warp_totals[w];
    begins[thread + 1] = before + inclusive;
    if (thread == 0) begins[0] = 0;
  }
  __syncthreads();
}

// The clusters of a chunk's blocks follow each other, each with about as many rows: block `part` begins with the first cluster that begins at or
// behind its share of the rows.
__device__ __forceinline__ int first_cluster_of(const int (&begins)[CLUSTERS + 1], int parts, int part) {
  if (part == 0) return 0;
  if (part == parts) return CLUSTERS;
  const int share = static_cast<int>(static_cast<int64_t>(begins[CLUSTERS]) * part / parts);
  int low = 0, high = CLUSTERS;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (begins[middle] < share)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Writes or adds four sums of a cluster.
template <class Z>
__device__ __forceinline__ void put(const Sums<Z>& p, int64_t chunk, int64_t k, int64_t d, const double (&sum)[4], bool first) {
  double* const to = p.sums + (chunk * p.K + k) * p.D + d;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (d + i < p.D) to[i] = first ? sum[i] : to[i] + sum[i];
}

// Four values of a row from dimension d on, zeros behind the last.
template <class Z, class V>
__device__ __forceinline__ void load_row(const Sums<Z>& p, const Z* from, int64_t d, V (&x)[4]) {
  if (p.aligned) {
    if (d < p.D) load_four(from, x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (d + j < p.D) x[j] = widen(from[j]);
  }
}

// resources: spills at most 44 bytes (128 dimensions; 8 on sm_90)
template <class Z, int LANES>
__global__ void __launch_bounds__(THREADS) sums_kernel(const Sums<Z> p) {
  using V = decltype(widen(Z()));
  constexpr int SLICE = LANES * 4;  // dimensions of a block
  constexpr int SEGMENTS = THREADS / LANES;
  PK_SHARED(double, heads, SEGMENTS, SLICE);  // sums of a run that began in an earlier segment
  PK_SHARED(unsigned, entries, ROWS);
  PK_SHARED(int, begins, CLUSTERS + 1);
  PK_SHARED(int, warp_totals, CLUSTERS / 32);
  int* const ranks =
      reinterpret_cast<int*>(&heads[0][0]);  // [WARPS, CLUSTERS]: rows of a cluster seen by a warp; done with before heads are
  static_assert(sizeof(int) * WARPS * CLUSTERS <= sizeof(double) * SEGMENTS * SLICE);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t slices = (p.D + SLICE - 1) / SLICE, ranges = (p.K + CLUSTERS - 1) / CLUSTERS, block = blockIdx.x / p.parts;
  const int64_t chunk = block / slices / ranges, k0 = block / slices % ranges * CLUSTERS, d0 = block % slices * SLICE;
  const int own = static_cast<int>(blockIdx.x % p.parts);
  const int clusters = p.K - k0 < CLUSTERS ? static_cast<int>(p.K - k0) : CLUSTERS;
  const int64_t chunk_begin = chunk * p.rows_per_chunk;
  const int64_t chunk_end = p.B - chunk_begin < p.rows_per_chunk ? p.B : chunk_begin + p.rows_per_chunk;
  const int segment = thread / LANES, part = thread % LANES * 4;  // part: the first of this thread's dimensions in the slice
  const int64_t d = d0 + part;
  int64_t total = 0;
  pk::let_next_begin();
  pk::wait_for_previous();

  bool first = true;
  for (int64_t row0 = chunk_begin; first || row0 < chunk_end; row0 += ROWS, first = false) {
    const int rows = chunk_end - row0 < ROWS ? static_cast<int>(chunk_end - row0) : ROWS;
    // 1. Each warp counts its rows by cluster; a row's rank among those of its warp and cluster.
    int cluster[PER_WARP / 32], rank[PER_WARP / 32];
#pragma unroll
    for (int i = 0; i < PER_WARP / 32; ++i) {
      const int r = warp * PER_WARP + i * 32 + lane;
      const int64_t label = r < rows ? p.labels[row0 + r] : -1;
      if (label >= p.K) __trap();  // as torch's own device-side assertions
      cluster[i] = label >= k0 && label < k0 + clusters ? static_cast<int>(label - k0) : -1;
    }
    for (int i = thread; i < WARPS * CLUSTERS; i += THREADS) ranks[i] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER_WARP / 32; ++i) {
      const unsigned same = __match_any_sync(ALL, cluster[i]);
      int* const seen = ranks + warp * CLUSTERS + cluster[i];
      const int before = cluster[i] >= 0 ? *seen : 0;
      __syncwarp();
      const unsigned below = same & ((1u << lane) - 1);
      rank[i] = before + __popc(below);
      if (cluster[i] >= 0 && below == 0) *seen = before + __popc(same);
      __syncwarp();
    }
    __syncthreads();
    // 2. Where each cluster, and in it each warp, begins.
    int members = 0;
    if (thread < CLUSTERS) {
      int count[WARPS];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) count[w] = ranks[w * CLUSTERS + thread];
#pragma unroll
      for (int w = 0; w < WARPS; ++w) ranks[w * CLUSTERS + thread] = members, members += count[w];
    }
    total += members;
    exclusive_sums(members, warp_totals, begins);
    // 3. The sorted rows.
#pragma unroll
    for (int i = 0; i < PER_WARP / 32; ++i)
      if (cluster[i] >= 0)
        entries[begins[cluster[i]] + ranks[warp * CLUSTERS + cluster[i]] + rank[i]] =
            static_cast<unsigned>(cluster[i]) << 16 | static_cast<unsigned>(warp * PER_WARP + i * 32 + lane);
    __syncthreads();
    // 4. The sorted rows of the block's clusters, and the segment of them: runs that begin and end in it are done; one from before goes to heads;
    // one that goes on stays in sum.
    const int first_cluster = first_cluster_of(begins, p.parts, own), last_cluster = first_cluster_of(begins, p.parts, own + 1);
    const int from_row = begins[first_cluster], kept = begins[last_cluster] - from_row, length = (kept + SEGMENTS - 1) / SEGMENTS;
    const int begin = from_row + (segment * length < kept ? segment * length : kept);
    const int end = begin + length < from_row + kept ? begin + length : from_row + kept;
    const Z* const z = p.z + row0 * p.z_stride + d;
    double sum[4] = {};
    int current = -1;
    bool from_before = false;
#pragma unroll 1
    for (int i = begin; i < end;) {
      current = cluster_of(entries[i]);
      from_before = begins[current] < begin;
      const int stop = begins[current + 1] < end ? begins[current + 1] : end;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = 0;
#pragma unroll 1
      for (; i < stop; i += AHEAD<V>) {
        V x[AHEAD<V>][4];
#pragma unroll
        for (int a = 0; a < AHEAD<V>; ++a) {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[a][j] = 0;
          if (i + a < stop) load_row(p, z + row_of(entries[i + a]) * p.z_stride, d, x[a]);
        }
#pragma unroll
        for (int a = 0; a < AHEAD<V>; ++a)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(x[a][j]);
      }
      i = stop;
      if (from_before)
        for (int j = 0; j < 4; ++j) heads[segment][part + j] = sum[j];
      else if (stop < end)
        put(p, chunk, k0 + current, d, sum, first);
    }
    __syncthreads();
    // 5. The last run of a segment, with its pieces in the segments after it; clusters without members.
    if (begin < end && !from_before) {
      for (int s = segment + 1; from_row + s * length < begins[current + 1]; ++s)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += heads[s][part + j];
      put(p, chunk, k0 + current, d, sum, first);
    }
    if (first)
      for (int c = first_cluster + segment; c < last_cluster && c < clusters; c += SEGMENTS)
        if (begins[c] == begins[c + 1]) {
          const double none[4] = {};
          put(p, chunk, k0 + c, d, none, true);
        }
    __syncthreads();
    if (p.alone && p.blend.updated)
      for (int c = first_cluster + segment; c < last_cluster && c < clusters; c += SEGMENTS)
        for (int64_t i = (k0 + c) * p.D + d, j = 0; j < 4 && d + j < p.D; ++j, ++i)
          blend_element(p.blend, i, read_kind(p.blend.prototypes, p.blend.kind, i), p.sums[i], begins[c + 1] - begins[c]);
  }
  if (d0 == 0 && own == 0 && thread < clusters) {
    if (p.alone)
      p.counts[k0 + thread] = total;
    else
      p.part_counts[chunk * p.K + k0 + thread] = static_cast<int>(total);
  }
}

constexpr int ROW_THREADS = 256;

// Labels [B] with -1 for rows that hold NaN or infinity; one warp per row.
template <class Z>
__global__ void __launch_bounds__(ROW_THREADS)
    finite_labels_kernel(int64_t B, int D, const Z* z, int64_t z_stride, const int64_t* labels, int64_t* kept) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (ROW_THREADS / 32) + threadIdx.x / 32;
  if (row >= B) return;
  const bool finite = is_finite_row(z + row * z_stride, D);
  if (threadIdx.x % 32 == 0) kept[row] = finite ? labels[row] : -1;
}

// ----------------------------------------------------------------------------------------------------------------------- launch

struct Chunks {
  int64_t count, rows, parts;
  int lanes;
};

// About 128 blocks, for they do not depend on the GPU; but no more chunks than there are rows for: B / 8 K of them are a quarter of z.
Chunks chunks_of(int64_t B, int64_t K, int64_t D) {
  const int lanes = D <= 32 ? 8 : D <= 64 ? 16 : MAX_LANES;
  const int64_t blocks = (D + lanes * 4 - 1) / (lanes * 4) * ((K + CLUSTERS - 1) / CLUSTERS);
  const int64_t most_parts = K < 32 ? 1 : K < 16 * MAX_PARTS ? K / 16 : MAX_PARTS;
  const int64_t wanted = (128 + blocks * most_parts - 1) / (blocks * most_parts), needed = (B + ROWS - 1) / ROWS, limit = B / (8 * K);
  int64_t count = wanted > needed ? wanted : needed;
  if (count > limit) count = limit;
  if (count > MAX_CHUNKS) count = MAX_CHUNKS;
  if (count < 1) count = 1;
  const int64_t rows = B > 0 ? (B + count - 1) / count : 1;
  count = B > 0 ? (B + rows - 1) / rows : 1;
  const int64_t parts = rows > ROWS ? 1 : (128 + blocks * count - 1) / (blocks * count);  // of a chunk that is sorted at once
  return {count, rows, parts < most_parts ? parts : most_parts, lanes};
}

template <class Z>
int launch_sums(const Chunks& chunks, const Sums<Z>& sums, void* stream) {
  const int64_t slices = (sums.D + chunks.lanes * 4 - 1) / (chunks.lanes * 4), ranges = (sums.K + CLUSTERS - 1) / CLUSTERS;
  const dim3 blocks(static_cast<unsigned>(chunks.count * slices * ranges * chunks.parts));
  if (chunks.lanes == 8) return PK_LAUNCH_BEHIND((sums_kernel<Z, 8>), blocks, dim3(THREADS), 0, stream, sums);
  if (chunks.lanes == 16) return PK_LAUNCH_BEHIND((sums_kernel<Z, 16>), blocks, dim3(THREADS), 0, stream, sums);
  return PK_LAUNCH_BEHIND((sums_kernel<Z, MAX_LANES>), blocks, dim3(THREADS), 0, stream, sums);
}

template <class Z>
int sums_of(const PrototypesAccumulate& p, const PrototypesBlend& blend, void* workspace, void* stream) {
  const Chunks chunks = chunks_of(p.B, p.K, p.D);
  const bool alone = chunks.count == 1 && chunks.rows <= ROWS;
  double* const part_sums = static_cast<double*>(workspace);
  int* const part_counts = reinterpret_cast<int*>(part_sums + chunks.count * p.K * p.D);
  constexpr int64_t piece = sizeof(Z) == 2 ? 8 : 16;
  const Sums<Z> sums{p.B,
                     p.K,
                     p.D,
                     chunks.rows,
                     p.z_stride,
                     static_cast<int>(chunks.parts),
                     static_cast<const Z*>(p.z),
                     p.labels,
                     p.D % 4 == 0 && aligned_rows(p.z, p.z_stride, p.D, sizeof(Z), piece),
                     alone,
                     alone ? p.sums : part_sums,
                     part_counts,
                     p.counts,
                     blend};
  const int status = launch_sums(chunks, sums, stream);
  return status != 0 || alone ? status : launch_prototypes_finish({chunks.count, part_sums, part_counts}, blend, p.sums, p.counts, stream);
}

template <class Z>
int accumulate(const PrototypesAccumulate& p, void* workspace, void* stream) {
  PrototypesAccumulate finite = p;
  if (p.skip_nonfinite && p.B > 0) {
    int64_t* const kept = static_cast<int64_t*>(workspace);
    workspace = kept + (p.B + 1) / 2 * 2;
    finite.labels = kept;
    const dim3 blocks(static_cast<unsigned>((p.B * 32 + ROW_THREADS - 1) / ROW_THREADS));
    const int status = PK_LAUNCH((finite_labels_kernel<Z>), blocks, dim3(ROW_THREADS), 0, stream, p.B, static_cast<int>(p.D),
                                 static_cast<const Z*>(p.z), p.z_stride, p.labels, kept);
    if (status != 0) return status;
  }
  return sums_of<Z>(finite, {p.K, p.D, nullptr, Kind::f32, nullptr, nullptr, 0.0, nullptr}, workspace, stream);
}

}  // namespace

namespace protokernels {

int64_t prototypes_sums_workspace(int64_t B, int64_t K, int64_t D) {
  const int64_t count = chunks_of(B, K, D).count;
  return count * K * (D * static_cast<int64_t>(sizeof(double)) + static_cast<int64_t>(sizeof(int))) + 16;
}

int launch_prototypes_sums(const PrototypesAccumulate& p, const PrototypesBlend& blend, void* workspace, void* stream) {
  switch (p.z_kind) {
    case Kind::f32: return sums_of<float>(p, blend, workspace, stream);
    case Kind::f64: return sums_of<double>(p, blend, workspace, stream);
    case Kind::bf16: return sums_of<__nv_bfloat16>(p, blend, workspace, stream);
    default: return sums_of<__half>(p, blend, workspace, stream);
  }
}

int64_t prototypes_accumulate_workspace(const PrototypesAccumulate& p) {
  return prototypes_sums_workspace(p.B, p.K, p.D) + (p.skip_nonfinite ? (p.B + 1) / 2 * 2 * static_cast<int64_t>(sizeof(int64_t)) : 0);
}

int launch_prototypes_accumulate(const PrototypesAccumulate& p, void* workspace, void* stream) {
  switch (p.z_kind) {
    case Kind::f32: return accumulate<float>(p, workspace, stream);
    case Kind::f64: return accumulate<double>(p, workspace, stream);
    case Kind::bf16: return accumulate<__nv_bfloat16>(p, workspace, stream);
    default: return accumulate<__half>(p, workspace, stream);
  }
}

}  // namespace protokernels
