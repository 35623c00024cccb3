// SPDX-License-Identifier: MIT
// A warp's candidates: for each of its 32 queries a list in shared memory of groups of eight neighbouring rows of the bank. An entry holds
// the least score among them and which of them were within the limit. Lane q looks after the list of query q; entry e of it lies at [e][q].
#pragma once

#include "ops/cuda/nearest_rows.cuh"

namespace {

constexpr int FEW = 8;  // neighbours up to which selection is done in registers

struct Entry {
  float least;
  unsigned code;  // group of the part << 8 | mask of its rows
};
__device__ __forceinline__ Entry entry_at(const uint2* list, int e) {
  const uint2 v = pk::load_vector<uint2>(list + e * 32);
  return {__uint_as_float(v.x), v.y};
}

// What a lane knows of its query.
struct Own {
  float limit;  // of scores; NaN: no candidates any more, the filter cannot decide this query
  int count;    // entries
};

// No row among the nearest k has a greater score than this, if k rows have scores of at most `score` (nearest_kernel.cu). The last 1 % of
// NearestError is for rounding here.
__device__ __forceinline__ float limit_of(const NearestTask& p, float score, float length) {
  if (!(score < INFINITY)) return INFINITY;
  const NearestBounds& e = p.bounds;
  const float own = (e.half_a * length + e.w) * length + e.z;
  float reach = length;  // of the k rows: at least their lengths
  if (!p.cosine) {
    const float height = fmaxf(score + length * length * 0.5f + own, 0.0f);
    reach += sqrtf((height + e.crude_a * length * length + e.crude_z) * e.crude) * (1 + 0x1p-20f);
  }
  return score + 2 * own + 2 * ((e.half_a * reach + e.w) * reach + e.z);
}

__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_ordered_bits(unsigned bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }

// The k-th least score of a list, or a little more; infinity where there are fewer.
template <bool few>
__device__ __forceinline__ float kth_score(const uint2* list, int count, int k) {
  if (count < k) return INFINITY;
  if constexpr (few) {
    float best[FEW];  // ascending; the first FEW - k are below everything
#pragma unroll
    for (int i = 0; i < FEW; ++i) best[i] = i < FEW - k ? -INFINITY : INFINITY;
    for (int e = 0; e < count; ++e) {
      float next = entry_at(list, e).least;
#pragma unroll
      for (int i = 0; i < FEW; ++i) {
        const float less = fminf(best[i], next);
        next = fmaxf(best[i], next);
        best[i] = less;
      }
    }
    return best[FEW - 1];
  } else {
    unsigned found = 0;  // bit by bit, the greatest prefix that fewer than k scores are below
    for (int bit = 31; bit >= 12; --bit) {
      const unsigned next = found | 1u << bit;
      int below = 0;
      for (int e = 0; e < count; ++e) below += ordered_bits(entry_at(list, e).least) < next;
      if (below < k) found = next;
    }
    return of_ordered_bits(found | 0xfffu);
  }
}

// Lowers the limit to what the best k of a list's `count` scores allow.
template <bool few>
__device__ __forceinline__ void lower(const uint2* list, Own& own, int count, const NearestTask& p, int64_t query) {
  if (own.limit == own.limit) own.limit = fminf(own.limit, limit_of(p, kth_score<few>(list, count, p.k), p.lengths[query]));
}

// Takes from a list what the best k in it rule out, and lowers the limit accordingly. Between two __syncwarp().
template <bool few>
__device__ __forceinline__ void shrink(uint2* list, Own& own, const NearestTask& p, int64_t query) {
  lower<few>(list, own, own.count, p, query);
  int kept = 0;
  for (int e = 0; e < own.count; ++e) {
    const uint2 entry = pk::load_vector<uint2>(list + e * 32);
    if (__uint_as_float(entry.x) <= own.limit) pk::store_vector(list + 32 * kept++, entry);
  }
  own.count = kept;
  if (kept > p.capacity - 4) own.limit = __int_as_float(0x7fc00000), own.count = 0;  // too many rows too close to each other
}

// Distances and ranks of what is left of 32 queries from first_query on, as many of them at a time as there is room for. row0: the first of
// the part.
__device__ __forceinline__ void rank_candidates(const NearestTask& p, const uint2* list, const Own& own, int64_t first_query, int part,
                                                int row0, double* distances, unsigned* codes) {
  const int lane = threadIdx.x % 32;
  const bool valid = first_query + lane < p.N;
  int rows = 0;
  for (int e = 0; e < own.count; ++e) rows += __popc(entry_at(list, e).code & 0xffu);
  const bool decided = own.limit == own.limit && rows >= p.k && rows <= p.survivors;
  if (valid && !decided) leave(p, first_query + lane);
  if (!valid || !decided) rows = 0;

  int behind = rows;  // the end of the query's rows if all lay side by side
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL, behind, step);
    if (lane >= step) behind += other;
  }
  const int total = __shfl_sync(ALL, behind, 31), before = behind - rows;
  for (int done = 0; done < total;) {
    const bool now = before >= done && behind <= done + p.survivors;
    const int last = 31 - __clz(static_cast<int>(__ballot_sync(ALL, now)));
    const int end = __shfl_sync(ALL, behind, last), count = end - done;
    if (now && rows > 0) {
      int at = before - done;
      for (int e = 0; e < own.count; ++e) {
        const unsigned code = entry_at(list, e).code;
        for (unsigned mask = code & 0xffu; mask != 0; mask &= mask - 1)
          codes[at++] = ((code >> 8) * 8 + static_cast<unsigned>(__ffs(static_cast<int>(mask)) - 1)) << 5 | static_cast<unsigned>(lane);
      }
    }
    __syncwarp();
    for (int i = lane; i < count; i += 32)
      distances[i] = exact_distance(p, first_query + (codes[i] & 31u), row0 + static_cast<int>(codes[i] >> 5));
    __syncwarp();
    for (int i0 = 0; i0 < count; i0 += 32) {
      const int i = i0 + lane;
      const unsigned code = codes[min(i, count - 1)];
      const int query = static_cast<int>(code & 31u), row = row0 + static_cast<int>(code >> 5);
      const int from = __shfl_sync(ALL, before, query) - done, to = __shfl_sync(ALL, behind, query) - done;
      if (i >= count) continue;
      const double distance = distances[i];
      int rank = 0;
      for (int o = from; o < to; ++o) rank += nearer(distances[o], row0 + static_cast<int>(codes[o] >> 5), distance, row);
      if (rank >= p.k) continue;
      if (p.parts == 1)
        write_neighbour(p, first_query + query, rank, distance, row);
      else
        p.candidates[((first_query + query) * p.parts + part) * p.k + rank] = {distance, row};
    }
    __syncwarp();
    done = end;
  }
}

}  // namespace
