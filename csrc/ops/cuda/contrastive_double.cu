// SPDX-License-Identifier: MIT
// Contrastive losses on the GPU in float64, forward and backward: a warp per row, no tensor cores and no shared memory. It exists to check
// gradients and to be read beside contrastive_kernel.cu and contrastive_backward.cu, and is limited by reading every vector once per row.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // so many rows of a group

struct Problem {
  int R, M, G, Cp;
  const double* rows;              // [R, Cp]
  const double* columns;           // [M, Cp]
  const ContrastiveGroup* groups;  // [G]
  const ContrastiveRange* ranges;  // [R]
  double inverse_temperature;

  explicit Problem(const ContrastiveProblem& p)
      : R(static_cast<int>(p.R)),
        M(static_cast<int>(p.M)),
        G(static_cast<int>(p.G)),
        Cp(static_cast<int>(p.Cp)),
        rows(static_cast<const double*>(p.rows)),
        columns(static_cast<const double*>(p.columns)),
        groups(p.groups),
        ranges(p.ranges),
        inverse_temperature(1 / p.temperature) {}

  __device__ __forceinline__ double score(int i, int j) const {
    const double* const x = rows + static_cast<int64_t>(i) * Cp;
    const double* const y = columns + static_cast<int64_t>(j) * Cp;
    double sum = 0;
    for (int c = 0; c < Cp; ++c) sum += x[c] * y[c];
    return sum * inverse_temperature;
  }
};

struct LogSum {
  double top = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(double other_top, double other_sum) {
    const double largest = fmax(top, other_top), shift = largest == -INFINITY ? 0.0 : largest;
    sum = sum * exp(top - shift) + other_sum * exp(other_top - shift);
    top = largest;
  }
  __device__ __forceinline__ double of_warp() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(ALL, top, step);
      add(other, __shfl_xor_sync(ALL, sum, step));
    }
    return (top == -INFINITY ? 0.0 : top) + log(sum);
  }
};

__global__ void __launch_bounds__(THREADS) double_forward_kernel(const Problem p, const Results<double> results) {
  const int tile = static_cast<int>(blockIdx.x), lane = threadIdx.x % 32;
  const Rows rows = find_rows<THREADS>(p.groups, p.G, p.R, WARPS, tile);
  const int row = rows.first + static_cast<int>(threadIdx.x) / 32;
  double weighted = 0;
  if (row < rows.end) {
    LogSum p_sum, n_sum;
    double l = 0;
    if (rows.is_anchor(row)) {
      const ContrastiveRange range = range_at(p.ranges, row);
      for (int j = rows.group.column_begin + lane; j < rows.group.column_end; j += 32) {
        if (j == range.self) continue;
        const double s = p.score(row, j);
        if (in_class(range, j)) {
          p_sum.add(s, s == s ? 1.0 : s);  // a NaN lives on in the sum
          l += s;
        } else {
          n_sum.add(s, s == s ? 1.0 : s);
        }
      }
    }
    const double p_log = p_sum.of_warp(), n_log = n_sum.of_warp();
    l = warp_sum(l);
    if (lane == 0) weighted = results.write(row, rows.is_anchor(row), p_log, n_log, l);
  }
  results.add<THREADS>(tile, weighted);
}

// Statistics and coefficients of one side, or null.
struct Losses {
  int count;
  const double* statistics;    // [3, count]
  const double* coefficients;  // [3, count]

  // d / ds of the losses of vector i with the others of its own class or of another.
  __device__ __forceinline__ double weight(int i, double s, bool positive) const {
    if (!statistics) return 0;
    const int64_t at = (positive ? 0 : static_cast<int64_t>(count)) + i;
    const double of_log = coefficients[at], of_sum = positive ? coefficients[2 * static_cast<int64_t>(count) + i] : 0.0;
    return (of_log == 0 ? 0.0 : of_log * exp(s - statistics[at])) + of_sum;
  }
};

// Lanes have the weights of 32 columns, then channels, 128 at a time.
__global__ void __launch_bounds__(THREADS, 2)
    double_backward_kernel(const Problem p, const Losses of_rows, const Losses of_columns, double* grad_rows) {
  const int lane = threadIdx.x % 32;
  const Rows rows = find_rows<THREADS>(p.groups, p.G, p.R, WARPS, static_cast<int>(blockIdx.x));
  const int row = rows.first + static_cast<int>(threadIdx.x) / 32;
  if (row >= rows.end) return;
  const ContrastiveRange range = range_at(p.ranges, row);
  const bool anchor = rows.is_anchor(row) && of_rows.statistics;
  const int begin = rows.group.column_begin;
  const int end = !rows.in_group(row)     ? begin
                  : anchor                ? rows.group.column_end
                  : of_columns.statistics ? rows.group.column_anchor_end
                                          : begin;
  for (int slice = 0; slice < p.Cp; slice += 128) {
    double sum[4] = {};
    for (int j0 = begin; j0 < end; j0 += 32) {
      const int mine = j0 + lane;
      double weight = 0;
      if (mine < end && mine != range.self) {
        const double s = p.score(row, mine);
        const bool positive = in_class(range, mine);
        weight = (anchor ? of_rows.weight(row, s, positive) : 0.0) + of_columns.weight(mine, s, positive);
      }
      for (int k = 0; k < 32 && j0 + k < end; ++k) {
        const double h = __shfl_sync(ALL, weight, k);
        const double* const y = p.columns + static_cast<int64_t>(j0 + k) * p.Cp;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (slice + 32 * i + lane < p.Cp) sum[i] += h * y[slice + 32 * i + lane];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (slice + 32 * i + lane < p.Cp)
        grad_rows[static_cast<int64_t>(row) * p.Cp + slice + 32 * i + lane] = sum[i] * p.inverse_temperature;
  }
}

}  // namespace

namespace protokernels {

int64_t contrastive_double_forward_workspace(const ContrastiveForward& p) {
  Pieces pieces(nullptr);
  pieces.take<unsigned>(1);
  pieces.take<double>(contrastive_tiles(p.R, p.G, WARPS));
  return pieces.bytes();
}

int launch_contrastive_double_forward(const ContrastiveForward& p, void* workspace, void* stream) {
  const int64_t tiles = contrastive_tiles(p.R, p.G, WARPS);
  Pieces pieces(workspace);
  unsigned* const arrivals = pieces.take<unsigned>(1);
  const Results<double> results{static_cast<int>(p.R),
                                static_cast<int>(p.G),
                                static_cast<int>(tiles),
                                p.form,
                                p.groups,
                                p.ranges,
                                p.weights,
                                static_cast<double*>(p.losses),
                                static_cast<double*>(p.statistics),
                                static_cast<double*>(p.total),
                                pieces.take<double>(tiles),
                                arrivals};
  const int status = pk::memset_async(arrivals, 0, sizeof(unsigned), stream);
  if (status != 0) return status;
  return PK_LAUNCH(double_forward_kernel, dim3(static_cast<unsigned>(tiles)), dim3(THREADS), 0, stream, Problem(p), results);
}

int launch_contrastive_double_backward(const ContrastiveBackward& p, void* stream) {
  const int64_t tiles = contrastive_tiles(p.R, p.G, WARPS);
  const Losses of_rows{static_cast<int>(p.R), static_cast<const double*>(p.row_statistics), static_cast<const double*>(p.row_coefficients)};
  const Losses of_columns{static_cast<int>(p.M), static_cast<const double*>(p.column_statistics),
                          static_cast<const double*>(p.column_coefficients)};
  return PK_LAUNCH(double_backward_kernel, dim3(static_cast<unsigned>(tiles)), dim3(THREADS), 0, stream, Problem(p), of_rows, of_columns,
                   static_cast<double*>(p.grad_rows));
}

}  // namespace protokernels
