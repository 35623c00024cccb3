// SPDX-License-Identifier: MIT
// An iteration of a streamed Sinkhorn that reads the cost once, in single precision, for up to 8192 columns.
//
// A block has a chunk of the rows. A team of threads, 4, 8 or 16 columns each, takes 4 or 2 rows at a time: exponentials with the potentials
// from before, e_ij = exp(u_i + v_j - C_ij / epsilon), stay in registers while their row sums go round; then the new row potentials are
// known and (new / old factor)_i e_ij is added to the column sums at once. Chunks are added up in their order.
//
// e is an entry of a plan whose column sums are the masses: never large, and not too small in sum. Where that does not hold (the first
// iteration, and row factors outside [1e-13, 1e10]) the largest exponent of a row is taken out first; a column whose sum is outside
// [1e-16, 1e16] gets its log-sum from the cost. The number of chunks depends on the shape of a problem alone.
//
// Limit at 4096 x 4096 on an H200: latency. An iteration takes 21 us in resident_kernel, of which 4 us are exponentials and 7 us the part of
// the cost that comes through the L2 cache; 16 warps of a multiprocessor issue in 37 % of the cycles (Nsight Compute).
#pragma once

#include "ops/cuda/sinkhorn_stream_solve.cuh"

namespace {

constexpr int FUSED_THREADS = 512, FUSED_WARPS = FUSED_THREADS / 32;
constexpr int MOST_CHUNK_ROWS = 64;
constexpr int COLUMNS_PER_BLOCK = 32;
constexpr int64_t MOST_FUSED_COLUMNS = 8192;
constexpr int64_t SHARED_BESIDE = 19456;  // of a block, beside the rows that stay in shared memory
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

template <int TEAM_, int E_>
struct FusedShape {
  static constexpr int TEAM = TEAM_, E = E_, R = E_ == 16 ? 2 : 4;
  static constexpr int TEAMS = FUSED_THREADS / TEAM_, WARPS = TEAM_ / 32, LANES = 32 / R;  // LANES look after a row
};

inline int64_t fused_chunk_rows(int64_t N) { return N < 512 ? 8 : N < 1024 ? 16 : N < 8192 ? 32 : MOST_CHUNK_ROWS; }

struct FusedStep {
  Solve<float> p;
  const float* cost;  // [B, N, M]
  int chunk_rows, chunks;
  bool aligned;    // rows begin on 16 bytes
  float* partial;  // [B, chunks, M]
  float* errors;   // [B, chunks]

  // u after t iterations, [B, N]
  __device__ __forceinline__ float* u(int t) const { return t % 2 ? p.u_next : p.u; }
  __device__ __forceinline__ bool tested(int t) const { return p.tolerance > 0 && t > 0; }
};

struct FusedShared {
  float sums[2][FUSED_WARPS][4];
  float tops[FUSED_WARPS][4];
  float mass[MOST_CHUNK_ROWS], u[MOST_CHUNK_ROWS], u_next[MOST_CHUNK_ROWS];
  float total[MOST_CHUNK_ROWS], shift[MOST_CHUNK_ROWS];  // of the exponentials of a row; what they are multiplied by, log2
  int stray[MOST_CHUNK_ROWS];
  float errors[FUSED_WARPS];
  union {
    float teams[FUSED_THREADS * 8];
    float columns[2][FUSED_WARPS][COLUMNS_PER_BLOCK + 1];
  };
};

static_assert(sizeof(FusedShared) <= SHARED_BESIDE);

// Sums over the warp of `count` values; lane l returns that of values[l / (32 / count)].
template <int count>
__device__ __forceinline__ float reduce_values(const float (&values)[count]) {
  const int lane = threadIdx.x % 32;
  float one;
  if constexpr (count == 4) {
    const float first = (lane & 16 ? values[2] : values[0]) + __shfl_xor_sync(ALL, lane & 16 ? values[0] : values[2], 16);
    const float second = (lane & 16 ? values[3] : values[1]) + __shfl_xor_sync(ALL, lane & 16 ? values[1] : values[3], 16);
    one = (lane & 8 ? second : first) + __shfl_xor_sync(ALL, lane & 8 ? first : second, 8);
  } else {
    static_assert(count == 2);
    one = (lane & 16 ? values[1] : values[0]) + __shfl_xor_sync(ALL, lane & 16 ? values[0] : values[1], 16);
    one += __shfl_xor_sync(ALL, one, 8);
  }
  one += __shfl_xor_sync(ALL, one, 4);
  one += __shfl_xor_sync(ALL, one, 2);
  return one + __shfl_xor_sync(ALL, one, 1);
}

// One block at its chunk: what the single launches and the resident kernel share.
template <class S>
struct FusedBlock {
  const FusedStep& step;
  FusedShared& shared;
  const float* costs;     // of the chunk, [rows, M]
  const float* resident;  // the first rows of the chunk, [resident_rows, M]; in shared memory
  int resident_rows;
  int b, chunk, rows;
  const int lane, warp, thread, team;
  float scale;

  __device__ __forceinline__ FusedBlock(const FusedStep& all, FusedShared& memory, const float* kept, int kept_rows)
      : step(all),
        shared(memory),
        resident(kept),
        resident_rows(kept_rows),
        b(static_cast<int>(blockIdx.x / all.chunks)),
        chunk(static_cast<int>(blockIdx.x % all.chunks)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        thread(threadIdx.x % S::TEAM),
        team(threadIdx.x / S::TEAM),
        scale(LOG2_E * all.p.inverse_epsilon(blockIdx.x / all.chunks)) {
    const int left = all.p.N - chunk * all.chunk_rows;
    rows = left < all.chunk_rows ? left : all.chunk_rows;
    costs = all.cost + row_at(0) * all.p.M;
  }
  __device__ __forceinline__ int column(int k) const { return (k / 4 * S::TEAM + thread) * 4 + k % 4; }
  __device__ __forceinline__ int64_t row_at(int row) const { return static_cast<int64_t>(b) * step.p.N + chunk * step.chunk_rows + row; }

  // Potentials and masses of the chunk's rows; a barrier must follow.
  __device__ __forceinline__ void load_rows(int t) {
    const int row = threadIdx.x;
    if (row >= MOST_CHUNK_ROWS) return;
    shared.mass[row] = row < rows ? step.p.a[row_at(row)] : 0.0f;
    shared.u[row] = row < rows && t > 0 ? step.u(t)[row_at(row)] : -INFINITY;
    shared.stray[row] = 0;
  }
  __device__ __forceinline__ void load_columns(float (&v)[S::E]) const {
#pragma unroll
    for (int k = 0; k < S::E; ++k)
      v[k] = column(k) < step.p.M ? __ldcg(step.p.v + static_cast<int64_t>(b) * step.p.M + column(k)) * LOG2_E : -INFINITY;
  }
  __device__ __forceinline__ void load_costs(int first, float (&c)[S::R][S::E]) const {
    const int M = step.p.M;
#pragma unroll
    for (int r = 0; r < S::R; ++r) {
      const int row = first + r;
      const float* const from = (row < resident_rows ? resident : costs) + row * M;
#pragma unroll
      for (int q = 0; q < S::E / 4; ++q) {
        const int j = column(4 * q);
        float4 values{INFINITY, INFINITY, INFINITY, INFINITY};
        if (row < rows && j < M) {
          if (step.aligned) {
            values = pk::load_vector<float4>(from + j);
          } else {
            values.x = from[j];
            if (j + 1 < M) values.y = from[j + 1];
            if (j + 2 < M) values.z = from[j + 2];
            if (j + 3 < M) values.w = from[j + 3];
          }
        }
        c[r][4 * q] = values.x, c[r][4 * q + 1] = values.y, c[r][4 * q + 2] = values.z, c[r][4 * q + 3] = values.w;
      }
    }
  }

  // All rows, or those that strayed. SAFE: the largest exponent of a row is taken out.
  template <bool SAFE>
  __device__ __forceinline__ void sweep(const float (&v)[S::E], float (&sums)[S::E], bool only_strays) {
    constexpr int R = S::R, E = S::E;
    const Solve<float>& p = step.p;
    const int groups = (rows + S::TEAMS * R - 1) / (S::TEAMS * R), own = lane / S::LANES, sub = lane % S::LANES;
    float c[R][E];
    constexpr bool AHEAD = E <= 8 && !SAFE;  // there are registers for the next rows
    if (AHEAD) load_costs(team * R, c);
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      const int first = (g * S::TEAMS + team) * R, row = first + own;
      float sum[R], next[R][E], shift[R];
      if (!AHEAD) load_costs(first, c);
#pragma unroll
      for (int r = 0; r < R; ++r) shift[r] = SAFE || first + r >= rows ? 0.0f : shared.u[first + r] * LOG2_E;
      if constexpr (SAFE) {
        float top[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          top[r] = -INFINITY;
#pragma unroll
          for (int k = 0; k < E; ++k) top[r] = larger(top[r], __fmaf_rn(-c[r][k], scale, v[k]));
          top[r] = warp_larger(top[r]);
          if (lane == 0) shared.tops[warp][r] = top[r];
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < R; ++r) {
          top[r] = warp_larger(lane < S::WARPS ? shared.tops[team * S::WARPS + lane][r] : -INFINITY);
          shift[r] = top[r] == -INFINITY ? 0.0f : -top[r];
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        sum[r] = 0;
#pragma unroll
        for (int k = 0; k < E; ++k) {
          // SAFE: as in the maximum, to the bit, so that the largest entry is 1 whatever the size of the costs
          const float x = SAFE ? __fmaf_rn(-c[r][k], scale, v[k]) + shift[r] : __fmaf_rn(-c[r][k], scale, v[k] + shift[r]);
          c[r][k] = pk::exp2_fast(x);
          sum[r] += c[r][k];
        }
      }
      if (AHEAD) load_costs(g + 1 < groups ? first + S::TEAMS * R : rows, next);
      const float of_warp = reduce_values(sum);
      auto& exchange = shared.sums[g % 2];
      if (sub == 0) exchange[warp][own] = of_warp;
      __syncthreads();
      float total = 0;
#pragma unroll
      for (int w = 0; w < S::WARPS; w += S::LANES)
        if (w + sub < S::WARPS) total += exchange[team * S::WARPS + w + sub][own];
#pragma unroll
      for (int lanes = S::LANES / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(ALL, total, lanes);

      float mine = shift[0];
#pragma unroll
      for (int r = 1; r < R; ++r)
        if (own == r) mine = shift[r];
      float factor = 0;
      if (row < rows && (!only_strays || shared.stray[row] != 0)) {
        const float mass = shared.mass[row];
        factor = mass == 0 || (SAFE && total == 0) ? 0.0f : quotient(mass, total);
        if (!p.balanced && factor != 0) {
          const float after = p.half_step(b, 0, mass, logarithm(total) - mine * LN_2);
          factor = pk::exp2_fast(after * LOG2_E - mine);
        }
        const bool strays = !SAFE && mass != 0 && !(total >= 1e-13f && total <= 1e13f && factor >= 1e-13f && factor <= 1e10f);
        if (strays)
          factor = 0;
        else if (factor > 1e10f)
          factor = NAN;  // what got lost beside the largest entry counts in the column sums: they are made again
        if (sub == 0 && warp % S::WARPS == 0) {
          if (!SAFE) shared.stray[row] = strays;
          shared.total[row] = total, shared.shift[row] = mine;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float of_row = __shfl_sync(ALL, factor, r * S::LANES);
        if (of_row != 0) {
#pragma unroll
          for (int k = 0; k < E; ++k) sums[k] += of_row * c[r][k];
        }
#pragma unroll
        for (int k = 0; AHEAD && k < E; ++k) c[r][k] = next[r][k];
      }
    }
  }

  // The rows of the chunk: u_next, the chunk's column sums, its part of the error.
  __device__ __forceinline__ void run_rows(int t) {
    const bool first = t == 0;
    float v[S::E], sums[S::E] = {};
    load_columns(v);
    if (first)
      sweep<true>(v, sums, false);
    else
      sweep<false>(v, sums, false);
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    const bool strays = !first && row < rows && shared.stray[row] != 0;
    if (!first && __syncthreads_or(strays)) {
      sweep<true>(v, sums, true);
      __syncthreads();
    }
    float error = 0;
    if (row < rows) {
      const float mass = shared.mass[row], before = shared.u[row], total = shared.total[row];
      const float u = step.p.half_step(b, 0, mass, total == 0 ? -INFINITY : logarithm(total) - shared.shift[row] * LN_2);
      if (before == -INFINITY)
        error = step.p.balanced ? mass : 0.0f;
      else if (!step.p.balanced)
        error = mass * magnitude(before - u);
      else
        error = first || strays ? mass * magnitude(exponential(before - u) - 1) : magnitude(total - mass);
      shared.u_next[row] = u;
      step.u(t + 1)[row_at(row)] = u;
      if (step.p.history) step.p.kept(b, t)[chunk * step.chunk_rows + row] = u;
    }
    float* const partial = step.partial + (static_cast<int64_t>(b) * step.chunks + chunk) * step.p.M;
    if constexpr (S::TEAMS > 1) {
#pragma unroll
      for (int k = 0; k < S::E; ++k) shared.teams[team * S::TEAM * S::E + column(k)] = sums[k];
      __syncthreads();
      for (int j = threadIdx.x; j < S::TEAM * S::E && j < step.p.M; j += FUSED_THREADS) {
        float total = shared.teams[j];
#pragma unroll
        for (int other = 1; other < S::TEAMS; ++other) total += shared.teams[other * S::TEAM * S::E + j];
        __stcg(partial + j, total);
      }
    } else {
#pragma unroll
      for (int k = 0; k < S::E; ++k)
        if (column(k) < step.p.M) __stcg(partial + column(k), sums[k]);
    }
    if (!step.tested(t)) return;
    error = warp_sum(error);
    if (lane == 0) shared.errors[warp] = error;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0;
    for (int w = 0; w < FUSED_WARPS; ++w) total += shared.errors[w];
    __stcg(step.errors + static_cast<int64_t>(b) * step.chunks + chunk, total);
  }
};

// Whether the iterate before is the result; the same in every block, from the errors of the chunks, which stay as they are once a problem
// is done. leads: this block says so.
__device__ __forceinline__ bool fused_stops(const FusedStep& step, int t, int64_t b, bool leads) {
  if (!step.tested(t)) return false;
  float error = 0;
  for (int c = threadIdx.x % 32; c < step.chunks; c += 32) error += __ldcg(step.errors + b * step.chunks + c);
  error = warp_sum(error);
  if (!(error <= step.p.tolerance)) return false;
  if (leads && threadIdx.x == 0 && step.p.done[b] == 0) {
    step.p.done[b] = 1;
    step.p.marginal_error[b] = error;
    step.p.iterations[b] = t;
  }
  return true;
}

// New potentials of 32 columns from the chunks' sums, by a block.
__device__ __forceinline__ void run_columns(const FusedStep& step, int t, FusedShared& shared, int64_t b, int panel) {
  const Solve<float>& p = step.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = panel * COLUMNS_PER_BLOCK + lane;
  const int64_t at = b * p.M + j;
  const bool speaks = warp == 0 && j < p.M;
  const float mass = speaks ? p.b[at] : 0.0f, before = speaks ? __ldcg(p.v + at) : 0.0f;
  float sum = 0;
  if (j < p.M) {
#pragma unroll 8
    for (int c = warp; c < step.chunks; c += FUSED_WARPS) sum += __ldcg(step.partial + (b * step.chunks + c) * p.M + j);
  }
  __syncthreads();
  shared.columns[0][warp][lane] = sum;
  __syncthreads();
  float log_sum = -INFINITY;
  bool strays = false;
  if (speaks) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < FUSED_WARPS; ++w) total += shared.columns[0][w][lane];
    strays = mass != 0 && !(total >= 1e-16f && total <= 1e16f && before != -INFINITY);
    log_sum = logarithm(total) - before;
  }
  if (__syncthreads_or(strays)) {
    LogSum<float> exact;
    const float inverse = p.inverse_epsilon(b);
#pragma unroll 1
    for (int i = warp; i < p.N && j < p.M; i += FUSED_WARPS)
      exact.merge(__ldcg(step.u(t + 1) + b * p.N + i) - step.cost[(b * p.N + i) * p.M + j] * inverse, 1);
    shared.columns[0][warp][lane] = exact.part[0], shared.columns[1][warp][lane] = exact.part[1];
    __syncthreads();
    if (warp == 0) {
      LogSum<float> total;
#pragma unroll 1
      for (int w = 0; w < FUSED_WARPS; ++w) total.merge(shared.columns[0][w][lane], shared.columns[1][w][lane]);
      log_sum = total.value();
    }
  }
  if (!speaks) return;
  const float v = p.half_step(b, 1, mass, log_sum);
  __stcg(p.v + at, v);
  if (p.history) p.kept(b, t)[p.N + j] = v;
}

}  // namespace
