// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU from features: scores are made in blocks of rows that stay in L2, and are never stored. The equations stand in
// ops/sinkhorn.h.
//
// An iteration is one matrix product and one exponential an element:
//   e_ij = exp(-C_ij / epsilon + v_j + u_i - log a_i), r_i = sum_j e_ij = p_i / a_i of the iteration before,
//   u_i <- u_i - log r_i, t_j = sum_i (a_i / r_i) e_ij, v_j <- v_j + log b_j - log t_j,
// since exp(u_i + v_j - C_ij / epsilon) is bounded once a half-step has been taken. The first iteration, and any whose sums are too small to
// be trusted, is taken in the log domain instead, with twice the work. Limit: 2 N M D flop an iteration.

#include "ops/cpu/sinkhorn_clouds.h"

namespace {

template <class T>
struct CloudSolver {
  const SinkhornFeatures& p;
  int64_t b;
  Pair<T> pair;
  T lambda_a, lambda_b;
  bool balanced;

  CloudSolver(const SinkhornFeatures& problem, int64_t index, Arena& arena, SinkhornEach each) : p(problem), b(index) {
    pair.layout(p.N, p.M, p.D, arena);
    if (arena.counts_only()) return;
    const T epsilon = static_cast<const T*>(p.epsilon)[b];
    pair.each = each, pair.cosine = p.cosine, pair.epsilon = epsilon, pair.inverse_epsilon = 1 / epsilon;
    balanced = std::isinf(p.rho_a) && std::isinf(p.rho_b);
    lambda_a = std::isinf(p.rho_a) ? T(1) : static_cast<T>(p.rho_a / (p.rho_a + epsilon));
    lambda_b = std::isinf(p.rho_b) ? T(1) : static_cast<T>(p.rho_b / (p.rho_b + epsilon));
    read_masses(pair.x, static_cast<const T*>(p.a) + b * p.N);
    read_masses(pair.y, static_cast<const T*>(p.b) + b * p.M);
    pair.prepare(static_cast<const T*>(p.x) + b * p.N * p.D, static_cast<const T*>(p.y) + b * p.M * p.D);
    const T* const g_init = p.g_init ? static_cast<const T*>(p.g_init) + b * p.M : nullptr;
    for (int64_t j = 0; j < pair.y.padded; ++j)
      pair.y.potential[j] = pair.y.active[j] == T(0) ? -INFINITE<T> : g_init ? g_init[j] * pair.inverse_epsilon : T(0);
    // Steps exchange the two; behind the last point both stay absent.
    for (T* potential : {pair.x.potential, pair.x.scratch}) std::fill(potential, potential + pair.x.padded, -INFINITE<T>);
  }

  static void read_masses(Cloud<T>& cloud, const T* source) {
    copy_padded(cloud.mass, source, cloud.count, cloud.padded, T(0));
    std::copy(cloud.mass, cloud.mass + cloud.padded, cloud.active);
    for (int64_t i = 0; i < cloud.padded; i += LANES<T>) store(cloud.log_mass + i, log_nonnegative(load(cloud.mass + i)));
  }

  // A half-step in the log domain; returns sum of mass |change|.
  double restart(Cloud<T>& rows, const Cloud<T>& columns, T lambda) {
    const int64_t width = Pair<T>::vectors(columns);
    const auto body = [&](int64_t begin, int64_t end, T* products, T*, double* totals) {
      for (int64_t i = begin; i < end; ++i) {
        T* const row = products + (i - begin) * columns.padded;
        if (rows.active[i] == T(0)) continue;
        Vec<T> top = broadcast(-INFINITE<T>), sum{};
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> x = pair.score(columns, load(row + j), rows.bias[i], j);
          store(row + j, x);
          top = x > top ? x : top;
        }
        T highest = reduce_max(top);
        if (highest == -INFINITE<T>) {
          highest = 0;  // nobody there, or NaN
          for (int64_t j = 0; j < columns.count; ++j)
            if (row[j] != row[j]) highest = row[j];
        }
        for (int64_t j = 0; j < width; j += LANES<T>) sum += exp_nonpositive(load(row + j) - highest);
        const T total = reduce_sum(sum), next = total == T(0) ? -INFINITE<T> : lambda * (rows.log_mass[i] - (highest + std::log(total)));
        if (total == T(0))
          rows.active[i] = 0;
        else
          totals[0] += std::abs(next - rows.potential[i]) * rows.mass[i];
        rows.potential[i] = next;
      }
    };
    return pair.over_blocks(rows, columns, body)[0];
  }

  // The row half-step into x.scratch, and the column sums of the plan between the half-steps, relative to v, in partial. False if some sum is too
  // small to be trusted. The error is that of the iteration before.
  bool half_steps(double& error) {
    Cloud<T>&x = pair.x, &y = pair.y;
    const int64_t width = Pair<T>::vectors(y);
    const auto body = [&](int64_t begin, int64_t end, T* products, T* sums, double* totals) {
      T weights[64 + 4] = {};
      for (int64_t i = begin; i < end; ++i) {
        T* const row = products + (i - begin) * y.padded;
        x.scratch[i] = x.potential[i];
        if (x.active[i] == T(0)) continue;
        const T shift = x.potential[i] - x.log_mass[i];
        Vec<T> sum{};
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> e = exp_any<T>(pair.score(y, load(row + j), x.bias[i], j) + shift);
          sum += e;
          store(row + j, e);
        }
        const T r = reduce_sum(sum), log_sum = std::log(r) - shift;
        x.scratch[i] = lambda_a * (x.log_mass[i] - log_sum);
        weights[i - begin] = lambda_a == T(1) ? x.mass[i] / r : std::exp(x.scratch[i] - shift);
        totals[0] += balanced ? std::abs(x.mass[i] * r - x.mass[i]) : std::abs(x.scratch[i] - x.potential[i]) * x.mass[i];
        const bool vanishes = weights[i - begin] < std::numeric_limits<T>::min();  // and what it weighs, which may be large, would be lost
        if (r < TRUSTED_SUM<T> || r > LARGEST_SUM<T> || vanishes) totals[1] += 1;
        totals[2] = std::max(totals[2], static_cast<double>(weights[i - begin]));
      }
      for (int64_t i = 0; i < end - begin; i += ROWS) {
        const T* const rows = products + i * y.padded;
        const int64_t left = end - begin - i;  // rows after the last have weight 0; they may not be there
        const T *const second = rows + (left > 1 ? y.padded : 0), *const third = rows + (left > 2 ? 2 * y.padded : 0);
        const T* const fourth = rows + (left > 3 ? 3 * y.padded : 0);
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> upper = weights[i] * load(rows + j) + weights[i + 1] * load(second + j);
          const Vec<T> lower = weights[i + 2] * load(third + j) + weights[i + 3] * load(fourth + j);
          store(sums + j, load(sums + j) + (upper + lower));
        }
      }
    };
    const std::array<double, 4> totals = pair.over_blocks(x, y, body);
    error = totals[0] + lost_columns();
    T smallest = INFINITE<T>, largest = 0;
    for (int64_t j = 0; j < y.count; ++j)
      if (y.active[j] != T(0)) smallest = std::min(smallest, pair.partial[j]), largest = std::max(largest, pair.partial[j]);
    return totals[1] == 0 && !(smallest < TRUSTED_SUM<T> * std::max(totals[2], 1.0)) && !(largest > LARGEST_SUM<T>);
  }

  double lost_columns() const {
    double lost = 0;
    if (balanced)
      for (int64_t j = 0; j < p.M; ++j) lost += pair.y.mass[j] - pair.y.active[j];
    return lost;
  }

  int64_t iterate(double& error) {
    Cloud<T>&x = pair.x, &y = pair.y;
    for (int64_t t = 1; t <= p.num_iters; ++t) {
      const bool trusted = t > 1 && half_steps(error);
      if (t > 1 && p.tolerance > 0 && (balanced || trusted) && error <= p.tolerance) return t - 1;
      if (!trusted) {
        std::copy(x.potential, x.potential + x.padded, x.scratch);
        const double moved = restart(x, y, lambda_a);
        if (t > 1 && p.tolerance > 0 && !balanced && moved <= p.tolerance) {
          std::swap(x.potential, x.scratch);
          error = moved;
          return t - 1;
        }
        restart(y, x, lambda_b);
        continue;
      }
      std::swap(x.potential, x.scratch);
      for (int64_t j = 0; j < y.padded; j += LANES<T>) {
        const Vec<T> none{}, v = load(y.potential + j), log_sum = log_nonnegative(load(pair.partial + j)) - v;
        store(y.potential + j, load(y.active + j) == none ? broadcast(-INFINITE<T>) : lambda_b * (load(y.log_mass + j) - log_sum));
      }
    }
    const bool trusted = (balanced && p.tolerance == 0) || half_steps(error);
    if (!trusted || (balanced && p.tolerance == 0)) error = INFINITE<double>;
    return p.num_iters;
  }

  // Transport cost, value and marginal error of the potentials.
  std::array<double, 4> measure() {
    Cloud<T>&x = pair.x, &y = pair.y;
    const double epsilon = pair.epsilon;
    const int64_t width = Pair<T>::vectors(y);
    const auto body = [&](int64_t begin, int64_t end, T* products, T* sums, double* totals) {
      for (int64_t i = begin; i < end; ++i) {
        const T* const row = products + (i - begin) * y.padded;
        Vec<T> sum{}, transport{};
        if (x.potential[i] != -INFINITE<T>)
          for (int64_t j = 0; j < width; j += LANES<T>) {
            const Vec<T> negative = pair.negative_cost(y, load(row + j), x.bias[i], j);
            const Vec<T> plan = exp_any<T>((load(y.potential + j) + negative) + x.potential[i]);
            sum += plan;
            transport -= plan * negative;
            store(sums + j, load(sums + j) + plan);
          }
        const double marginal = reduce_sum(sum);
        totals[0] += epsilon * static_cast<double>(reduce_sum(transport));
        totals[2] += std::abs(marginal - x.mass[i]);
        if (marginal != 0) totals[1] += epsilon * (static_cast<double>(x.potential[i]) - 1) * marginal;
        totals[1] += divergence(p.rho_a, marginal, x.mass[i]);
      }
    };
    std::array<double, 4> totals = pair.over_blocks(x, y, body);
    for (int64_t j = 0; j < p.M; ++j) {
      const double marginal = pair.partial[j];
      totals[2] += std::abs(marginal - y.mass[j]);
      if (marginal != 0) totals[1] += epsilon * static_cast<double>(y.potential[j]) * marginal;
      totals[1] += divergence(p.rho_b, marginal, y.mass[j]);
    }
    return totals;
  }

  void solve() {
    double error = 0;
    p.iterations[b] = iterate(error);
    const std::array<double, 4> result = measure();
    T *const f = static_cast<T*>(p.f) + b * p.N, *const g = static_cast<T*>(p.g) + b * p.M;
    double sum_a = 0, sum_b = 0;
    bool lost = false;
    for (int64_t i = 0; i < p.N; ++i) {
      f[i] = pair.epsilon * pair.x.potential[i];
      sum_a += pair.x.mass[i], lost |= pair.x.active[i] != pair.x.mass[i];
    }
    for (int64_t j = 0; j < p.M; ++j) {
      g[j] = pair.epsilon * pair.y.potential[j];
      sum_b += pair.y.mass[j], lost |= pair.y.active[j] != pair.y.mass[j];
    }
    p.feasible[b] = !lost && (!balanced || std::abs(sum_a - sum_b) <= SINKHORN_MASS_TOLERANCE * std::max(sum_a, sum_b));
    static_cast<T*>(p.transport_cost)[b] = static_cast<T>(result[0]);
    static_cast<T*>(p.entropic_value)[b] = static_cast<T>(result[1]);
    if (error == INFINITE<double>) error = balanced ? result[2] : restart(pair.x, pair.y, lambda_a);
    static_cast<T*>(p.marginal_error)[b] = static_cast<T>(error);
  }
};

int64_t forward_scratch(const SinkhornFeatures& p) { return scratch_bytes<CloudSolver>(p); }

void forward(const SinkhornFeatures& p, int64_t b, void* scratch, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) {
    Arena arena(scratch);
    CloudSolver<decltype(zero)>(p, b, arena, each).solve();
  });
}

}  // namespace

namespace protokernels {

extern const SinkhornFeaturesCpu PK_LEVEL_TABLE(sinkhorn_features_cpu);
const SinkhornFeaturesCpu PK_LEVEL_TABLE(sinkhorn_features_cpu) = {most_chunks, forward_scratch, forward};

}  // namespace protokernels
