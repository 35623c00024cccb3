// SPDX-License-Identifier: MIT
// Soft assignment on the GPU for any K and D, and in float64. The equations stand in ops/prototypes.h. Where the prototypes fit into shared memory,
// prototypes_resident.cu is several times as fast; sums of clusters come from the labels (prototypes_update.cu).
//
// A block takes tiles of 64 rows of z. Scores come from tensor cores as three tf32 products (high x high, high x low, low x high: float32 accuracy),
// 64 x 128 at a time, and wait in shared memory (in the output itself where K is too large) until the row is complete; a warp turns a row into
// softmax, label and entropy. What limits it: every product waits for its operands to come to shared memory.

#include "common/simt.cuh"
#include "ops/cuda/prototypes_sums.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 64;  // rows of z in a tile
constexpr int64_t MAX_BLOCKS = 1 << 20;
constexpr int DEPTH = 32;               // dimensions in shared memory at a time
constexpr int STRIDE = DEPTH + 4;       // 4 group + member: the fragments of a warp touch 32 different banks
constexpr int SCORE_BYTES = 96 * 1024;  // scores of a tile stay in shared memory up to this size, where a block has so much
constexpr int TILE_BYTES = 28 * 1024;   // beside them, rounded up
template <class T>
constexpr int COLUMNS = sizeof(T) == 4 ? 128 : 32;  // prototypes in shared memory at a time

// 1 / |x| of a row shared by a warp, 0 for a vector that counts as zero. Squares add up in float64: no overflow for float rows.
template <class Z>
__device__ __forceinline__ double inverse_norm(const Z* row, int D) {
  double squared = 0;
  for (int d = threadIdx.x % 32; d < D; d += 32) {
    const double x = widen(row[d]);
    squared += x * x;
  }
  squared = warp_sum(squared);
  return squared <= PROTOTYPE_NORM_FLOOR * PROTOTYPE_NORM_FLOOR ? 0.0 : rsqrt(squared);
}

// The parts of a problem a kernel needs, T the compute type.
template <class T, class Z>
struct Assign {
  int64_t B;
  int K, D, tiles_per_block;
  int64_t z_stride;
  const Z* z;           // [B, D]
  const T* prototypes;  // [K, D]
  const T* temperature_pointer;
  double temperature;
  bool cosine, skip_nonfinite, scores_in_shared;
  const float* uniform;  // [B] or null
  T* assignment;         // [B, K]
  int64_t* labels;       // [B] or null
  T* entropy;            // [B] or null
};

// --------------------------------------------------------------------------------------------------------- products of a tile

// A float as the sum of two tf32 numbers.
__device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
  high = pk::to_tf32(x);
  low = pk::to_tf32(x - __uint_as_float(high));
}

// scores [ROWS, columns] of the panel at column0 from the tiles in shared memory; accumulated over the chunks of D in registers.
template <class T>
struct Product;

template <>
struct Product<float> {  // warps 4 x 2, each 16 rows x 64 columns: 8 fragments of 16 x 8
  float sum[8][4] = {};

  __device__ __forceinline__ void add(const float (&z)[ROWS][STRIDE], const float (&q)[COLUMNS<float>][STRIDE], int columns) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const int row = warp % 4 * 16 + group, column0 = warp / 4 * 64;
    for (int k = 0; k < DEPTH; k += 8) {
      unsigned high[4], low[4];
      split(z[row][k + member], high[0], low[0]);
      split(z[row + 8][k + member], high[1], low[1]);
      split(z[row][k + member + 4], high[2], low[2]);
      split(z[row + 8][k + member + 4], high[3], low[3]);
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const int column = column0 + f * 8;
        if (column >= columns) continue;  // the same for the whole warp
        unsigned q_high[2], q_low[2];
        split(q[column + group][k + member], q_high[0], q_low[0]);
        split(q[column + group][k + member + 4], q_high[1], q_low[1]);
        pk::mma_m16n8k8_tf32(sum[f], low, q_high);
        pk::mma_m16n8k8_tf32(sum[f], high, q_low);
        pk::mma_m16n8k8_tf32(sum[f], high, q_high);
      }
    }
  }

  __device__ __forceinline__ void write(float* scores, int64_t stride, int rows, int columns, float scale) const {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int f = 0; f < 8; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp % 4 * 16 + group + i / 2 * 8, column = warp / 4 * 64 + f * 8 + member * 2 + i % 2;
        if (row < rows && column < columns) scores[row * stride + column] = sum[f][i] * scale;
      }
  }
};

template <>
struct Product<double> {  // a thread has 8 columns of a row; double is for checking gradients
  double sum[8] = {};

  __device__ __forceinline__ void add(const double (&z)[ROWS][STRIDE], const double (&q)[COLUMNS<double>][STRIDE], int) {
    const int row = threadIdx.x % ROWS, column = threadIdx.x / ROWS * 8;
    for (int k = 0; k < DEPTH; ++k)
#pragma unroll
      for (int f = 0; f < 8; ++f) sum[f] += z[row][k] * q[column + f][k];
  }

  __device__ __forceinline__ void write(double* scores, int64_t stride, int rows, int columns, double scale) const {
    const int row = threadIdx.x % ROWS, column = threadIdx.x / ROWS * 8;
#pragma unroll
    for (int f = 0; f < 8; ++f)
      if (row < rows && column + f < columns) scores[row * stride + column + f] = sum[f] * scale;
  }
};

// -------------------------------------------------------------------------------------------------------------- one row

template <class T>
struct RowResult {
  T sum, entropy;
  int label;
};

// A warp turns a row of scores into weights exp(s - max) in place; lane l holds the elements l, l + 32, ...
template <class T>
__device__ __forceinline__ RowResult<T> softmax_row(T* scores, int K) {
  const int lane = threadIdx.x % 32;
  T top = lane < K ? scores[lane] : -INFINITY;
  int best = lane < K ? lane : K, first_nan = K;
  for (int k = lane; k < K; k += 32) {
    const T s = scores[k];
    if (s > top) top = s, best = k;
    if (s != s && k < first_nan) first_nan = k;
  }
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(ALL, top, step);
    const int other_best = __shfl_xor_sync(ALL, best, step);
    if (other > top || (other == top && other_best < best) || top != top) top = other, best = other_best;
  }
  first_nan = __reduce_min_sync(ALL, first_nan);
  T sum = 0, weighted = 0;
  for (int k = lane; k < K; k += 32) {
    const T shifted = scores[k] - top, weight = exponential(shifted);
    scores[k] = weight;
    sum += weight;
    if (weight != 0) weighted += weight * shifted;
  }
  sum = warp_sum(sum);
  return {sum, logarithm(sum) - warp_sum(weighted) / sum, first_nan < K ? first_nan : __shfl_sync(ALL, best, 0)};
}

// The first k whose cumulative weight exceeds uniform * sum, by a warp; if rounding leaves none, the last with a weight.
template <class T>
__device__ __forceinline__ int draw_label(const T* weights, int K, T sum, float uniform) {
  const int lane = threadIdx.x % 32;
  const T threshold = sum * static_cast<T>(uniform);
  T before = 0;
  int last = 0;
  for (int k = lane; k - lane < K; k += 32) {
    T cumulative = k < K ? weights[k] : T(0);
    if (cumulative > 0) last = k;
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_up_sync(ALL, cumulative, step);
      if (lane >= step) cumulative += other;
    }
    const unsigned above = __ballot_sync(ALL, k < K && before + cumulative > threshold);
    if (above) return k - lane + __ffs(above) - 1;
    before += __shfl_sync(ALL, cumulative, 31);
  }
  return __reduce_max_sync(ALL, last);
}

// ------------------------------------------------------------------------------------------------------------------ kernels

// resources: spills at most 8 bytes (float64 on sm_100)
// resources: dynamic shared 98304 bytes
template <class T, class Z>
__global__ void __launch_bounds__(THREADS) assign_kernel(const Assign<T, Z> p) {
  PK_SHARED(T, z_tile, ROWS, STRIDE);
  PK_SHARED(T, q_tile, COLUMNS<T>, STRIDE);
  PK_SHARED(T, z_scale, ROWS);
  PK_SHARED(T, q_scale, COLUMNS<T>);
  PK_DYNAMIC_SHARED(T, shared_scores);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const T inverse_t = static_cast<T>(1.0 / (p.temperature_pointer ? static_cast<double>(*p.temperature_pointer) : p.temperature));

  for (int t = 0; t < p.tiles_per_block; ++t) {
    const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * p.tiles_per_block + t) * ROWS;
    if (row0 >= p.B) break;
    const int rows = p.B - row0 < ROWS ? static_cast<int>(p.B - row0) : ROWS;
    const Z* const z = p.z + row0 * p.z_stride;
    T* const scores = p.scores_in_shared ? shared_scores : p.assignment + row0 * p.K;
    for (int r = warp; r < rows; r += WARPS) {
      const double scale = p.cosine ? inverse_norm(z + r * p.z_stride, p.D) : 1.0;
      if (lane == 0) z_scale[r] = static_cast<T>(scale);
    }
    for (int column0 = 0; column0 < p.K; column0 += COLUMNS<T>) {
      const int columns = p.K - column0 < COLUMNS<T> ? p.K - column0 : COLUMNS<T>;
      const T* const q = p.prototypes + static_cast<int64_t>(column0) * p.D;
      for (int c = warp; c < columns; c += WARPS) {
        const double scale = p.cosine ? inverse_norm(q + static_cast<int64_t>(c) * p.D, p.D) : 1.0;
        if (lane == 0) q_scale[c] = static_cast<T>(scale);
      }
      Product<T> product;
      for (int d0 = 0; d0 < p.D; d0 += DEPTH) {
        __syncthreads();
        const int d = d0 + lane;  // DEPTH = 32: a warp reads one row
        for (int r = warp; r < ROWS; r += WARPS)
          z_tile[r][lane] = r < rows && d < p.D ? static_cast<T>(widen(z[r * p.z_stride + d])) * z_scale[r] : T(0);
        for (int c = warp; c < COLUMNS<T>; c += WARPS)
          q_tile[c][lane] = c < columns && d < p.D ? q[static_cast<int64_t>(c) * p.D + d] * q_scale[c] : T(0);
        __syncthreads();
        product.add(z_tile, q_tile, columns);
      }
      product.write(scores + column0, p.K, rows, columns, inverse_t);
      __syncthreads();
    }

    for (int r = warp; r < rows; r += WARPS) {
      T* const s = scores + static_cast<int64_t>(r) * p.K;
      const RowResult<T> row = softmax_row(s, p.K);
      int chosen = p.uniform && row.sum == row.sum ? draw_label(s, p.K, row.sum, p.uniform[row0 + r]) : row.label;
      const T scale = T(1) / row.sum;
      for (int k = lane; k < p.K; k += 32) p.assignment[(row0 + r) * p.K + k] = s[k] * scale;
      if (p.skip_nonfinite && !is_finite_row(z + r * p.z_stride, p.D)) chosen = -1;
      if (lane == 0 && p.entropy) p.entropy[row0 + r] = row.entropy;
      if (lane == 0 && p.labels) p.labels[row0 + r] = chosen;
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------------------------- launch

template <class T, class Z>
int launch_assign(const PrototypesForward& p, void* stream) {
  const int64_t tiles = (p.B + ROWS - 1) / ROWS, blocks = tiles < MAX_BLOCKS ? tiles : MAX_BLOCKS;
  if (blocks == 0) return 0;
  const int64_t score_bytes = ROWS * p.K * static_cast<int64_t>(sizeof(T));
  const bool in_shared = score_bytes <= SCORE_BYTES && score_bytes + TILE_BYTES <= static_cast<int64_t>(pk::shared_memory_limit());
  const Assign<T, Z> assign{p.B,
                            static_cast<int>(p.K),
                            static_cast<int>(p.D),
                            static_cast<int>((tiles + blocks - 1) / blocks),
                            p.z_stride,
                            static_cast<const Z*>(p.z),
                            static_cast<const T*>(p.prototypes),
                            static_cast<const T*>(p.temperature_pointer),
                            p.temperature,
                            p.cosine,
                            p.skip_nonfinite,
                            in_shared,
                            p.uniform,
                            static_cast<T*>(p.assignment),
                            p.labels,
                            static_cast<T*>(p.entropy)};
  return PK_LAUNCH((assign_kernel<T, Z>), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), in_shared ? score_bytes : 0, stream, assign);
}

}  // namespace

namespace protokernels {

int64_t prototypes_forward_workspace(const PrototypesForward& p) {
  if (prototypes_resident(p)) return prototypes_resident_workspace(p);
  return p.sums ? prototypes_sums_workspace(p.B, p.K, p.D) : 0;
}

int launch_prototypes_forward(const PrototypesForward& p, void* workspace, void* stream) {
  const PrototypesBlend blend{p.K, p.D, p.blend_source, p.blend_kind, nullptr, nullptr, p.new_weight, p.updated};
  if (prototypes_resident(p)) return launch_prototypes_resident(p, blend, workspace, stream);
  int status = 0;
  switch (p.z_kind) {
    case Kind::f32: status = launch_assign<float, float>(p, stream); break;
    case Kind::f64: status = launch_assign<double, double>(p, stream); break;
    case Kind::bf16: status = launch_assign<float, __nv_bfloat16>(p, stream); break;
    default: status = launch_assign<float, __half>(p, stream);
  }
  if (status != 0 || !p.sums) return status;
  return launch_prototypes_sums({p.B, p.K, p.D, p.z, p.z_kind, p.z_stride, p.labels, false, p.sums, p.counts}, blend, workspace, stream);
}

}  // namespace protokernels
