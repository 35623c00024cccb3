// SPDX-License-Identifier: MIT
// The implicit gradient of Sinkhorn on the GPU, problems that fit one multiprocessor: one block, one launch. The equations stand in
// ops/sinkhorn.h.
//
// Rows are eliminated: (diag(q) - P^T diag(1 / p) P) y = c - P^T (r / p), a graph Laplacian L, solved by conjugate residuals scaled with
// diag(q). Its product is the Sinkhorn iteration's: P z by warps, divided by p, back through P^T, with P read once. Every warp keeps the
// vectors over the columns and takes the inner products itself, so that the exchange of column sums is the only barrier.
// L has a null vector for every part of the plan that touches no other. What the right side has along them, by rounding or because a loss
// shifts the parts against each other, cannot be met: conjugate gradients would run away with it, conjugate residuals see L z alone. They
// end where L z is small beside what it was, without the scale: in the scaled norm light entries outweigh all others.
// Limit on an H200 (measured, with conjugate gradients): latency; 64 x 49 x 49: 17 us, 16 x 196 x 196: 121 us.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_adjoint.cuh"

namespace {

template <class T>
struct Multiplier {              // of a row
  T inverse_marginal, right, x;  // 1 / p_i, 0 for a row without mass; right side; solution
};

template <class S>
struct Solver {
  using T = typename S::T;
  using Row = Multiplier<T>;
  const Backward<T>& p;
  Tile<S, Row> tile;
  Rows<S, Row> rows;
  const T epsilon;
  T epsilon_bar;
  T v[S::E], marginal[S::E], y[S::E], right[S::E];

  __device__ __forceinline__ Solver(const Backward<T>& problem, T* dynamic, Exchange<S, Row>& exchange)
      : p(problem),
        tile(p.N, p.M, p.cost + blockIdx.x * static_cast<int64_t>(p.N) * p.M, p.epsilon[blockIdx.x], dynamic, &exchange),
        rows(exchange),
        epsilon(p.epsilon[blockIdx.x]),
        epsilon_bar(0) {}

  __device__ __forceinline__ T u_of(int batch) const {
    const int i = tile.own_row(batch);
    return i < p.N ? p.f[static_cast<int64_t>(blockIdx.x) * p.N + i] / epsilon : -T(INFINITY);
  }
  __device__ __forceinline__ bool speaks(int batch) const { return tile.lane < SLOTS && tile.own_row(batch) < p.N; }

  // P, its marginals, both right sides and what the potentials give to epsilon.
  __device__ __forceinline__ void begin() {
    const T tc = p.transport_gradient();
    T ones[S::E], unused = 0;
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const int j = tile.column(e);
      v[e] = j < p.M ? p.g[static_cast<int64_t>(blockIdx.x) * p.M + j] / epsilon : -T(INFINITY);
      ones[e] = 1, marginal[e] = 0, right[e] = 0;
    }
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T u = u_of(batch);
      const int i = tile.own_row(batch);
      tile.build(batch, u, v);
      const T sum = tile.times_columns(ones);
      T transported[SLOTS];
      tile.add_rows(T(1), marginal);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        transported[s] = 0;
#pragma unroll
        for (int e = 0; e < S::E; ++e) {
          const T gamma = tile.k[s][e] != 0 ? tile.k[s][e] * tc * tile.cost_at(tile.row(batch, s), e) : T(0);
          transported[s] += gamma;
          right[e] += gamma;
        }
      }
      Row row{sum != 0 ? T(1) / sum : T(0), reduce_slots(transported), T(0)};
      if (i < p.N && sum != 0) {
        row.right += epsilon * p.row_gradient(i);
        if (speaks(batch)) epsilon_bar += p.row_gradient(i) * u;
      }
      rows.set(batch, row);
    }
    tile.template combine<false>(marginal, unused, false);
    tile.template combine<false>(right, unused, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      const int j = tile.column(e);
      if (marginal[e] == 0 || j >= p.M) continue;
      right[e] += epsilon * p.column_gradient(j);
      if (tile.warp == 0) epsilon_bar += p.column_gradient(j) * v[e];
    }
  }

  // sums over the columns; the same bits in every warp
  __device__ __forceinline__ T columns_dot(const T (&first)[S::E], const T (&second)[S::E]) const {
    T sum = 0;
#pragma unroll
    for (int e = 0; e < S::E; ++e) sum += first[e] * second[e];
    return warp_sum(sum);
  }
  // Of the rows and of the columns together.
  __device__ __forceinline__ T mass(T (&sums)[S::W]) const {
    T of_rows = 0, ones[S::E];
#pragma unroll
    for (int e = 0; e < S::E; ++e) ones[e] = 1;
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const T inverse = rows.get(batch).inverse_marginal;
      of_rows += speaks(batch) && inverse != 0 ? T(1) / inverse : T(0);
    }
    return block_sum<S>(of_rows, sums) + columns_dot(marginal, ones);
  }

  // The right sides lose what makes their sums differ, every entry as its mass: beside a light one the rounding of the sums would be large.
  // c - P^T (r / p) is left in y's place for the solver.
  __device__ __forceinline__ void reduce(T (&sums)[S::W], T (&schur)[S::E]) {
    T of_rows = 0, ones[S::E], unused = 0;
#pragma unroll
    for (int e = 0; e < S::E; ++e) ones[e] = 1, schur[e] = 0;
    for (int batch = 0; batch < S::BATCHES; ++batch) of_rows += speaks(batch) ? rows.get(batch).right : T(0);
    const T excess = (block_sum<S>(of_rows, sums) - columns_dot(right, ones)) / mass(sums);
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      Row row = rows.get(batch);
      if (row.inverse_marginal != 0) row.right -= excess / row.inverse_marginal;
      rows.set(batch, row);
      tile.fetch(batch);
      tile.add_rows(row.right * row.inverse_marginal, schur);
    }
    tile.template combine<false>(schur, unused, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) {
      right[e] += marginal[e] != 0 ? excess * marginal[e] : T(0);
      schur[e] = right[e] - schur[e];
    }
  }

  __device__ __forceinline__ void multiply(const T (&d)[S::E], T (&result)[S::E]) {
    T unused = 0;
#pragma unroll
    for (int e = 0; e < S::E; ++e) result[e] = 0;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      tile.fetch(batch);
      tile.add_rows(rows.get(batch).inverse_marginal * tile.times_columns(d), result);
    }
    tile.template combine<false>(result, unused, false);
#pragma unroll
    for (int e = 0; e < S::E; ++e) result[e] = marginal[e] * d[e] - result[e];
  }

  // y from the right side that comes in. z: the scaled residual.
  __device__ __forceinline__ void conjugate_residuals(T (&z)[S::E]) {
    constexpr T tolerance = sizeof(T) == 4 ? T(1e-7) : T(3e-15), rounding = sizeof(T) == 4 ? T(1e-6) : T(2e-15);
    T d[S::E], of_z[S::E], of_d[S::E], before = 0, start = 0;  // the latter two vectors: L z, L d
#pragma unroll
    for (int e = 0; e < S::E; ++e) z[e] = over_marginal(z, e), y[e] = 0, d[e] = 0, of_d[e] = 0;
    const int most = 2 * p.M + 32;
    for (int step = 0; step < most; ++step) {
      multiply(z, of_z);
      T scaled[S::E], size = 0;
#pragma unroll
      for (int e = 0; e < S::E; ++e) scaled[e] = marginal[e] * z[e], size += magnitude(of_z[e]);
      size = warp_sum(size);
      const T energy = columns_dot(z, of_z);
      if (step == 0) start = size;
      // Energy that is the rounding of its two terms: what is left of z is between parts that do not touch.
      if (!(size > tolerance * start) || !(energy > rounding * columns_dot(z, scaled))) break;
      const T keep = step == 0 ? T(0) : energy / before;
#pragma unroll
      for (int e = 0; e < S::E; ++e) {
        d[e] = z[e] + keep * d[e], of_d[e] = of_z[e] + keep * of_d[e];
        scaled[e] = over_marginal(of_d, e);
      }
      const T curvature = columns_dot(of_d, scaled);
      if (!(curvature > 0)) break;  // it has vanished in the type
      const T length = energy / curvature;
#pragma unroll
      for (int e = 0; e < S::E; ++e) y[e] += length * d[e], z[e] -= length * scaled[e];
      before = energy;
    }
  }
  __device__ __forceinline__ T over_marginal(const T (&x)[S::E], int e) const { return marginal[e] != 0 ? x[e] / marginal[e] : T(0); }

  // x = (r - P y) / p. Returns what x gains and y loses to have equal sums, weighted with the masses: x of a light entry may be so large
  // that the others would not survive its share.
  __device__ __forceinline__ T center(T (&sums)[S::W]) {
    T of_rows = 0;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      Row row = rows.get(batch);
      tile.fetch(batch);
      const T left = row.right - tile.times_columns(y);
      row.x = left * row.inverse_marginal;
      rows.set(batch, row);
      if (speaks(batch)) of_rows += left;
    }
    return (columns_dot(marginal, y) - block_sum<S>(of_rows, sums)) / mass(sums);
  }

  __device__ __forceinline__ void finish(T shift, T (&sums)[S::W]) {
    const T tc = p.transport_gradient(), entropic = p.entropic_gradient();
    const int64_t problem = blockIdx.x;
#pragma unroll 1
    for (int batch = 0; batch < S::BATCHES; ++batch) {
      const Row row = rows.get(batch);
      const T u = u_of(batch);
      tile.fetch(batch);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const T of_row = __shfl_sync(ALL, u, s), x = __shfl_sync(ALL, row.x, s);
#pragma unroll
        for (int e = 0; e < S::E; ++e) {
          const int i = tile.row(batch, s), j = tile.column(e);
          if (i >= p.N || j >= p.M) continue;
          const T plan = tile.k[s][e], c = tile.cost_at(i, e);
          T gradient = 0;
          if (plan != 0) {
            const T m = plan * (tc * c - x - y[e]);
            gradient = (tc + entropic) * plan - m * tile.inverse_epsilon;
            epsilon_bar += m * c * tile.inverse_epsilon * tile.inverse_epsilon;
            epsilon_bar += entropic * plan * (of_row + v[e] - c * tile.inverse_epsilon - 1);
          }
          p.grad_cost[(problem * p.N + i) * p.M + j] = gradient;
        }
      }
      if (speaks(batch))
        p.grad_a[problem * p.N + tile.own_row(batch)] = row.inverse_marginal != 0 ? row.x + shift + entropic * u * epsilon : T(0);
    }
#pragma unroll
    for (int e = 0; e < S::E; ++e)
      if (tile.warp == 0 && tile.column(e) < p.M)
        p.grad_b[problem * p.M + tile.column(e)] = marginal[e] != 0 ? y[e] - shift + entropic * v[e] * epsilon : T(0);
    const T total = block_sum<S>(epsilon_bar, sums);
    if (threadIdx.x == 0) p.grad_epsilon[problem] = total;
  }
};

// resources: dynamic shared 147456 bytes
template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) implicit_kernel(const Backward<typename S::T> p) {
  using T = typename S::T;
  using Shared = Exchange<S, Multiplier<T>>;
  PK_DYNAMIC_SHARED(T, dynamic);
  PK_SHARED(Shared, exchange);
  PK_SHARED(T, sums, S::W);
  Solver<S> solver(p, dynamic, exchange);
  T schur[S::E];
  solver.begin();
  solver.reduce(sums, schur);
  solver.conjugate_residuals(schur);
  const T shift = solver.center(sums);
  solver.finish(shift, sums);
}

struct LaunchImplicit {
  const SinkhornBackward& p;
  void* stream;

  // 16 warps would leave too few registers.
  int operator()(Shape<float, 4, 16, 1, true>) const { return (*this)(Shape<float, 4, 8, 2, false>()); }
  template <class S>
  int operator()(S) const {
    const Backward<typename S::T> backward(p);
    return PK_LAUNCH((implicit_kernel<S>), dim3(static_cast<unsigned>(p.B)), dim3(S::THREADS), S::dynamic_bytes(p.N, p.M), stream,
                     backward);
  }
  int operator()() const { return 0; }  // never: the caller has looked at the tier
};

}  // namespace

namespace protokernels {

int launch_on_chip_implicit(const SinkhornBackward& p, void* stream) {
  return with_shape(sinkhorn_tier(p.N, p.M, p.kind, pk::shared_memory_limit()), p.kind, LaunchImplicit{p, stream});
}

}  // namespace protokernels
