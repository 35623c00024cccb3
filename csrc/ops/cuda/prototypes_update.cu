// SPDX-License-Identifier: MIT
// Prototypes on the GPU from labels: sums and counts of the clusters, and the blend. The equations stand in ops/prototypes.h.
//
// sums_kernel: a block takes a chunk of rows, 16 dimensions and 256 clusters. It sorts its rows by label (a counting sort: stable, so rows of one
// cluster keep their order), cuts the sorted rows into 128 equal segments, and four threads walk along each: rows are read once, whatever the sizes
// of the clusters. A run that lies within a segment is written at once; where it goes on in the next, the segment that holds its beginning adds up
// the pieces in order. float64, no atomics, an order that depends on the shape and the labels only.
// finish_kernel: adds up chunks in order and blends; a single chunk does so itself.
// Limit: z is read once (33.5 MB at B = 65536, D = 128: 8 us from memory, 6 us from L2), after the sort of a chunk, about 2 us.
// Measured on an H200: 26 us, and 20 us at B = 2048, where eight blocks do it; mostly waiting for rows.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_sums.cuh"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4096;              // sorted at a time
constexpr int PER_WARP = ROWS / WARPS;  // rows
constexpr int CLUSTERS = 256;           // of a block
constexpr int SLICE = 16;               // dimensions of a block
constexpr int LANES = SLICE / 4;        // threads on a row
constexpr int SEGMENTS = THREADS / LANES;
template <class V>
constexpr int AHEAD = sizeof(V) == 4 ? 8 : 4;  // rows of a segment on their way at a time
constexpr int MAX_CHUNKS = 1024;

__device__ __forceinline__ double read_kind(const void* base, Kind kind, int64_t i) {
  switch (kind) {
    case Kind::f32: return static_cast<const float*>(base)[i];
    case Kind::f64: return static_cast<const double*>(base)[i];
    case Kind::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
    default: return __half2float(static_cast<const __half*>(base)[i]);
  }
}

__device__ __forceinline__ void write_kind(void* base, Kind kind, int64_t i, double value) {
  switch (kind) {
    case Kind::f32: static_cast<float*>(base)[i] = static_cast<float>(value); break;
    case Kind::f64: static_cast<double*>(base)[i] = value; break;
    case Kind::bf16: static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(static_cast<float>(value)); break;
    default: static_cast<__half*>(base)[i] = __float2half_rn(static_cast<float>(value));
  }
}

__device__ __forceinline__ void blend_element(const PrototypesBlend& p, int64_t i, double sum, int64_t count) {
  const double old = read_kind(p.prototypes, p.kind, i);
  write_kind(p.updated, p.kind, i, count > 0 ? p.new_weight / static_cast<double>(count) * sum + (1.0 - p.new_weight) * old : old);
}

// ------------------------------------------------------------------------------------------------------------ sums of a chunk

template <class Z>
struct Sums {
  int64_t B, K, D, rows_per_chunk, z_stride;
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

// Writes or adds four sums of a cluster.
template <class Z>
__device__ __forceinline__ void put(const Sums<Z>& p, int64_t chunk, int64_t k, int64_t d, const double (&sum)[4], int count, bool first) {
  double* const to = p.sums + (chunk * p.K + k) * p.D + d;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (d + i >= p.D) continue;
    to[i] = first ? sum[i] : to[i] + sum[i];
    if (p.alone && p.blend.updated) blend_element(p.blend, k * p.D + d + i, sum[i], count);
  }
}

template <class Z>
__global__ void __launch_bounds__(THREADS) sums_kernel(const Sums<Z> p) {
  using V = decltype(widen(Z()));
  PK_SHARED(double, heads, SEGMENTS, SLICE);  // sums of a run that began in an earlier segment
  PK_SHARED(unsigned, entries, ROWS);
  PK_SHARED(int, begins, CLUSTERS + 1);
  PK_SHARED(int, warp_totals, CLUSTERS / 32);
  int* const ranks = reinterpret_cast<int*>(&heads[0][0]);  // [WARPS, CLUSTERS]: rows of a cluster seen by a warp; done with before heads are
  static_assert(sizeof(int) * WARPS * CLUSTERS <= sizeof(double) * SEGMENTS * SLICE);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t slices = (p.D + SLICE - 1) / SLICE, ranges = (p.K + CLUSTERS - 1) / CLUSTERS, block = blockIdx.x;
  const int64_t chunk = block / slices / ranges, k0 = block / slices % ranges * CLUSTERS, d0 = block % slices * SLICE;
  const int clusters = p.K - k0 < CLUSTERS ? static_cast<int>(p.K - k0) : CLUSTERS;
  const int64_t chunk_begin = chunk * p.rows_per_chunk;
  const int64_t chunk_end = p.B - chunk_begin < p.rows_per_chunk ? p.B : chunk_begin + p.rows_per_chunk;
  const int segment = thread / LANES, part = thread % LANES * 4;  // part: the first of this thread's dimensions in the slice
  const int64_t d = d0 + part;
  int64_t total = 0;

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
    if (thread < CLUSTERS)
      for (int w = 0; w < WARPS; ++w) {
        const int count = ranks[w * CLUSTERS + thread];
        ranks[w * CLUSTERS + thread] = members;
        members += count;
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
    // 4. A segment: runs that begin and end in it are done; one from before goes to heads; one that goes on stays in sum.
    const int kept = begins[CLUSTERS], length = (kept + SEGMENTS - 1) / SEGMENTS;
    const int begin = segment * length < kept ? segment * length : kept, end = begin + length < kept ? begin + length : kept;
    const Z* const z = p.z + row0 * p.z_stride + d;
    double sum[4] = {};
    int current = begin < end ? cluster_of(entries[begin]) : -1;
    for (int i0 = begin; i0 < end; i0 += AHEAD<V>) {
      V x[AHEAD<V>][4];
#pragma unroll
      for (int i = 0; i < AHEAD<V>; ++i) {
        if (i0 + i >= end) continue;
        const Z* const from = z + row_of(entries[i0 + i]) * p.z_stride;
        if (p.aligned && d < p.D) {
          load_four(from, x[i]);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[i][j] = d + j < p.D ? widen(from[j]) : V(0);
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD<V>; ++i) {
        if (i0 + i >= end) continue;
        const int next = cluster_of(entries[i0 + i]);
        if (next != current) {
          if (begins[current] < begin)
            for (int j = 0; j < 4; ++j) heads[segment][part + j] = sum[j];
          else
            put(p, chunk, k0 + current, d, sum, begins[current + 1] - begins[current], first);
          for (int j = 0; j < 4; ++j) sum[j] = 0;
          current = next;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(x[i][j]);
      }
    }
    const bool from_before = begin < end && begins[current] < begin;
    if (from_before)
      for (int j = 0; j < 4; ++j) heads[segment][part + j] = sum[j];
    __syncthreads();
    // 5. The last run of a segment, with its pieces in the segments after it; clusters without members.
    if (begin < end && !from_before) {
      for (int s = segment + 1; s * length < begins[current + 1]; ++s)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += heads[s][part + j];
      put(p, chunk, k0 + current, d, sum, begins[current + 1] - begins[current], first);
    }
    if (first)
      for (int c = segment; c < clusters; c += SEGMENTS)
        if (begins[c] == begins[c + 1]) {
          const double none[4] = {};
          put(p, chunk, k0 + c, d, none, 0, true);
        }
    __syncthreads();
  }
  if (d0 == 0 && thread < clusters) {
    if (p.alone)
      p.counts[k0 + thread] = total;
    else
      p.part_counts[chunk * p.K + k0 + thread] = static_cast<int>(total);
  }
}

// ------------------------------------------------------------------------------------------------------------ sums of the parts

constexpr int ELEMENTS = 32;   // of [K, D] in a block
constexpr int MAX_GROUPS = 32;  // of threads, each with a share of the parts

__global__ void __launch_bounds__(ELEMENTS* MAX_GROUPS)
    finish_kernel(const PrototypesParts parts, const PrototypesBlend p, double* sums, int64_t* counts) {
  PK_SHARED(double, group_sum, MAX_GROUPS, ELEMENTS);
  PK_SHARED(int64_t, group_count, MAX_GROUPS, ELEMENTS);
  const int element = threadIdx.x % ELEMENTS, group = threadIdx.x / ELEMENTS, groups = blockDim.x / ELEMENTS;
  const int64_t size = p.K * p.D, i = static_cast<int64_t>(blockIdx.x) * ELEMENTS + element, k = i / p.D;
  const int64_t share = (parts.parts + groups - 1) / groups, begin = group * share;
  const int64_t end = begin + share < parts.parts ? begin + share : parts.parts;
  double sum = 0;
  int64_t count = 0;
  if (i < size) {
#pragma unroll 8
    for (int64_t b = begin; b < end; ++b) {
      sum += parts.sums[b * size + i];
      count += parts.counts[b * p.K + k];
    }
  }
  group_sum[group][element] = sum;
  group_count[group][element] = count;
  __syncthreads();
  if (group > 0 || i >= size) return;
  for (int g = 1; g < groups; ++g) sum += group_sum[g][element], count += group_count[g][element];
  sums[i] = sum;
  if (i % p.D == 0) counts[k] = count;
  if (p.updated) blend_element(p, i, sum, count);
}

constexpr int BLEND_THREADS = 256;

__global__ void __launch_bounds__(BLEND_THREADS) blend_kernel(PrototypesBlend p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * BLEND_THREADS + threadIdx.x;
  if (i < p.K * p.D) blend_element(p, i, p.sums[i], p.counts[i / p.D]);
}

// Labels [B] with -1 for rows that hold NaN or infinity; one warp per row.
template <class Z>
__global__ void __launch_bounds__(BLEND_THREADS)
    finite_labels_kernel(int64_t B, int D, const Z* z, int64_t z_stride, const int64_t* labels, int64_t* kept) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (BLEND_THREADS / 32) + threadIdx.x / 32;
  if (row >= B) return;
  const bool finite = is_finite_row(z + row * z_stride, D);
  if (threadIdx.x % 32 == 0) kept[row] = finite ? labels[row] : -1;
}

// ----------------------------------------------------------------------------------------------------------------------- launch

struct Chunks {
  int64_t count, rows;
};

// About 128 blocks, for they do not depend on the GPU; but no more parts than there are rows for: B / 8 K of them are a quarter of z.
Chunks chunks_of(int64_t B, int64_t K, int64_t D) {
  const int64_t blocks = (D + SLICE - 1) / SLICE * ((K + CLUSTERS - 1) / CLUSTERS);
  const int64_t wanted = (128 + blocks - 1) / blocks, needed = (B + ROWS - 1) / ROWS, limit = B / (8 * K);
  int64_t count = wanted > needed ? wanted : needed;
  if (count > limit) count = limit;
  if (count > MAX_CHUNKS) count = MAX_CHUNKS;
  if (count < 1) count = 1;
  const int64_t rows = B > 0 ? (B + count - 1) / count : 1;
  return {B > 0 ? (B + rows - 1) / rows : 1, rows};
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
                     static_cast<const Z*>(p.z),
                     p.labels,
                     p.D % 4 == 0 && aligned_rows(p.z, p.z_stride, p.D, sizeof(Z), piece),
                     alone,
                     alone ? p.sums : part_sums,
                     part_counts,
                     p.counts,
                     blend};
  const int64_t blocks = chunks.count * ((p.D + SLICE - 1) / SLICE) * ((p.K + CLUSTERS - 1) / CLUSTERS);
  const int status = PK_LAUNCH((sums_kernel<Z>), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, sums);
  return status != 0 || alone ? status : launch_prototypes_finish({chunks.count, part_sums, part_counts}, blend, p.sums, p.counts, stream);
}

template <class Z>
int accumulate(const PrototypesAccumulate& p, void* workspace, void* stream) {
  PrototypesAccumulate finite = p;
  if (p.skip_nonfinite && p.B > 0) {
    int64_t* const kept = static_cast<int64_t*>(workspace);
    workspace = kept + (p.B + 1) / 2 * 2;
    finite.labels = kept;
    const dim3 blocks(static_cast<unsigned>((p.B * 32 + BLEND_THREADS - 1) / BLEND_THREADS));
    const int status = PK_LAUNCH((finite_labels_kernel<Z>), blocks, dim3(BLEND_THREADS), 0, stream, p.B, static_cast<int>(p.D),
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

int launch_prototypes_finish(const PrototypesParts& parts, const PrototypesBlend& blend, double* sums, int64_t* counts, void* stream) {
  int groups = 8;
  while (groups < MAX_GROUPS && groups * 8 < parts.parts) groups *= 2;
  const dim3 blocks(static_cast<unsigned>((blend.K * blend.D + ELEMENTS - 1) / ELEMENTS));
  return PK_LAUNCH(finish_kernel, blocks, dim3(ELEMENTS * groups), 0, stream, parts, blend, sums, counts);
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

int launch_prototypes_blend(const PrototypesBlend& p, void* stream) {
  const dim3 blocks(static_cast<unsigned>((p.K * p.D + BLEND_THREADS - 1) / BLEND_THREADS));
  return PK_LAUNCH(blend_kernel, blocks, dim3(BLEND_THREADS), 0, stream, p);
}

}  // namespace protokernels
