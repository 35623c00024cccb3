// SPDX-License-Identifier: MIT
// Nearest on the GPU: queries and bank as the filter reads them (nearest_kernel.cu): moved by a center, scaled by a power of two, fp16.
// Two passes over the inputs, limited by reading them: the largest magnitude, and beside it the center; then the rows.
//
// Squared Euclidean. The center is a mean of some rows of the bank in every dimension, so not longer in any dimension than the largest
// magnitude, and no moved number exceeds twice that: the scale takes it below 2^15. The moved numbers are differences in float64. Cosine:
// rows become 2^14 times unit vectors.
//
// Split (few dimensions): a number is the sum of two fp16 numbers, high + low, and a row of D is packed as 3 D dimensions: queries high,
// high, low; the bank high, low, high. Their product is all of that of the sums but low times low.

#include "common/simt.cuh"
#include "ops/cuda/nearest_rows.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int SAMPLE = 512;  // rows of the bank, at most, whose mean is the center
constexpr double UNIT = 0x1p14;
constexpr double LARGE_SQUARE = 0x1p1000;

__device__ __forceinline__ bool is_finite(double x) { return __dadd_rn(x, -x) == 0; }

// Columns 32 c ... of the center, by a block: the median of eight means, which a few very long rows do not move.
__device__ __forceinline__ void find_center(const NearestTask& p, int c) {
  constexpr int SLICES = THREADS / 32;
  PK_SHARED(double, means, SLICES, 32);
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, column = c * 32 + lane;
  const int step = (p.M - 1) / SAMPLE + 1;
  double sum = 0;
  int count = 0;
  if (column < p.D) {
#pragma unroll 4
    for (int64_t row = static_cast<int64_t>(slice) * step; row < p.M; row += static_cast<int64_t>(SLICES) * step) {
      const double x = read_one(p.bank, p.bank_kind, row * p.bank_stride + column);
      if (is_finite(x)) sum += x, ++count;
    }
  }
  means[slice][lane] = sum / count;  // NaN without numbers
  __syncthreads();
  if (slice > 0 || column >= p.D) return;
  int found = 0;
  for (int i = 0; i < SLICES; ++i) found += is_finite(means[i][lane]);
  double center = 0;
  for (int i = 0; i < SLICES; ++i) {
    const double mean = means[i][lane];
    int before = 0;
    for (int o = 0; o < SLICES; ++o) before += means[o][lane] < mean || (means[o][lane] == mean && o < i);
    if (is_finite(mean) && before == (found - 1) / 2) center = mean;
  }
  p.center[column] = center;
}

// The largest finite magnitude in rows first, first + step, ... (or, if they lie without gaps, of all their values), by a warp.
__device__ __forceinline__ double largest_of(const void* values, Kind kind, int64_t stride, int64_t rows, int D, int64_t first,
                                             int64_t step) {
  const int lane = threadIdx.x % 32;
  double largest = 0;
  const auto look = [&](int64_t at) {
    const double x = fabs(read_one(values, kind, at));
    if (is_finite(x) && x > largest) largest = x;
  };
  if (stride == D) {
#pragma unroll 4
    for (int64_t at = first * 32 + lane; at < rows * D; at += step * 32) look(at);
  } else {
    for (int64_t row = first; row < rows; row += step)
      for (int column = lane; column < D; column += 32) look(row * stride + column);
  }
  return largest;
}

__global__ void __launch_bounds__(THREADS) measure_kernel(const NearestTask p) {
  const unsigned of_center = static_cast<unsigned>(p.D + 31) / 32;
  if (blockIdx.x < of_center) return find_center(p, static_cast<int>(blockIdx.x));
  const int64_t warp = static_cast<int64_t>(blockIdx.x - of_center) * (THREADS / 32) + threadIdx.x / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x - of_center) * (THREADS / 32);
  double largest = largest_of(p.queries, p.queries_kind, p.queries_stride, p.N, p.D, warp, warps);
  largest = max(largest, largest_of(p.bank, p.bank_kind, p.bank_stride, p.M, p.D, warp, warps));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(ALL, largest, step));
  if (threadIdx.x % 32 == 0 && largest > 0) atomicMax(&p.state->largest, static_cast<unsigned long long>(__double_as_longlong(largest)));
}

__device__ __forceinline__ double quad_sum(double x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

__device__ __forceinline__ unsigned pair(double x, double y) { return pk::pack_f16(static_cast<float>(x), static_cast<float>(y)); }

__device__ __forceinline__ double nearest_half(double x) {
  return static_cast<double>(pk::unpack_f16(pk::pack_f16(static_cast<float>(x), 0.0f)).x);
}

// Four threads to a row: thread `member` has columns 8 member ... 8 member + 7 of every block. Rows behind the last are zeros.
__global__ void __launch_bounds__(THREADS, 4) pack_kernel(const NearestTask p) {
  const int member = threadIdx.x % 4;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (THREADS / 4) + threadIdx.x / 4;
  const int64_t query_places = p.query_tiles * NEAREST_TILE;
  const bool of_queries = place < query_places;
  const int64_t row = of_queries ? place : place - query_places;
  const bool there = row < (of_queries ? p.N : p.M);
  const bool padded = row < (of_queries ? query_places : static_cast<int64_t>(p.chunks) * NEAREST_CHUNK);
  const void* const values = of_queries ? p.queries : p.bank;
  const Kind kind = of_queries ? p.queries_kind : p.bank_kind;
  const int64_t from = row * (of_queries ? p.queries_stride : p.bank_stride);
  const bool aligned = of_queries ? p.queries_aligned : p.bank_aligned;
  const auto read = [&](int block, double (&x)[8]) {
    const int column = block * NEAREST_BLOCK + member * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      double four[4];
      read_four(values, kind, from + column + half * 4, there ? p.D - column - half * 4 : 0, aligned, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[half * 4 + i] = four[i];
    }
  };

  double scale = 1;
  bool usable = true;  // its numbers are finite and, squared, in range
  if (p.cosine) {
    double square = 0;
    bool finite = true;
    for (int block = 0; block * NEAREST_BLOCK < p.D; ++block) {
      double x[8];
      read(block, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) square += x[i] * x[i], finite &= is_finite(x[i]);
    }
    square = quad_sum(square);
    finite = quad_sum(finite ? 0.0 : 1.0) == 0;
    const double norm = sqrt(square);
    scale = norm > NEAREST_NORM_FLOOR ? UNIT / norm : 0.0;
    // Whether a row is as short as zero, or too long, is decided by sums in another order than the definition's: no risk near the line.
    const bool doubtful = finite && (square > LARGE_SQUARE || fabs(norm - NEAREST_NORM_FLOOR) <= 1e-6 * NEAREST_NORM_FLOOR);
    usable = finite && !doubtful;
    if (of_queries) usable &= scale > 0;  // all rows are at distance 1 from zero, even those that hold no numbers
    if (doubtful && !of_queries && there && member == 0) atomicExch(&p.state->distrust, 1u);
  } else {
    const int exponent = min(max(13 - largest_exponent(*p.state), -500), 400);
    scale = __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
  }

  if (of_queries) scale = -scale;  // the filter subtracts products
  uint4* const packed = static_cast<uint4*>(of_queries ? p.packed_queries : p.packed_bank) + row / NEAREST_TILE * p.blocks * 128;
  double square = 0;
  for (int block = 0; block < p.blocks; ++block) {
    double x[8];
    if (!p.split) read(block, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int packed_column = block * NEAREST_BLOCK + member * 8 + i, repeat = p.split ? packed_column / p.D : 0;
      const int column = packed_column - repeat * p.D;
      if (p.split) x[i] = there && repeat < 3 ? read_one(values, kind, from + column) : 0.0;
      if (!p.cosine && there && repeat < 3 && column < p.D) x[i] -= p.center[column];
      x[i] *= scale;
      if (repeat == 0) square += x[i] * x[i];
      if (repeat == (of_queries ? 2 : 1)) x[i] -= nearest_half(x[i]);
    }
    if (padded)
      pk::store_vector(packed + block * 128 + row % NEAREST_TILE * 4 + member,
                       uint4{pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])});
  }
  square = quad_sum(square);
  usable &= is_finite(square);
  if (member != 0 || !padded) return;
  const double nan = __longlong_as_double(0x7ff8000000000000ll);
  const double length = sqrt(square);
  if (of_queries) {
    p.lengths[row] = static_cast<float>(there && usable ? length * (1 + 0x1p-20) : nan);
    if (there) p.flags[row] = 0;
  } else {
    const NearestError& e = p.error;
    const double error = (e.a / 2 * length + e.w) * length + e.z;
    float* const bias = p.bias + row / 2 * 4 + row % 2;
    bias[0] = bias[2] = static_cast<float>(there && usable ? (p.cosine ? 0.0 : square / 2) - error : nan);
  }
}

}  // namespace

namespace protokernels {

int launch_nearest_pack(const NearestTask& p, void* stream) {
  int status = pk::memset_async(p.state, 0, sizeof(NearestState), stream);
  if (status == 0 && !p.cosine) {
    const int64_t wanted = (p.N + p.M) * p.D / (THREADS * 8) + 1, most = 4 * static_cast<int64_t>(pk::multiprocessor_count());
    const int64_t blocks = (p.D + 31) / 32 + (wanted < most ? wanted : most);
    status = PK_LAUNCH((measure_kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, p);
  }
  if (status != 0) return status;
  const int64_t places = p.query_tiles * NEAREST_TILE + static_cast<int64_t>(p.chunks) * NEAREST_CHUNK;
  const int64_t blocks = (places + THREADS / 4 - 1) / (THREADS / 4);
  return PK_LAUNCH((pack_kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, p);
}

}  // namespace protokernels
