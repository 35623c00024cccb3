// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU: the exact gradient of the iterations as they ran. The equations stand in ops/sinkhorn.h.
//
// Both softmaxes of an iteration are products of one kernel matrix with a row and a column vector,
//   S = K alpha beta, R = K gamma delta, K_ij = exp(row_center_i + column_center_j - C_ij / epsilon),
// so an iteration is one fused pass (sinkhorn_dense.h) without exponentials, and M_bar -= S w + R z is K times a matrix of rank two. The
// vectors of up to SEGMENT iterations are kept and applied in one matrix product. K is made anew when the potentials have left its range; an
// iteration that has no common K for its two halves (the first one, when epsilon is small) is done with exponentials.

#include "ops/cpu/sinkhorn_dense.h"

namespace {

constexpr int64_t SEGMENT = 64;

// Products of a row and a column factor up to exp(this) keep what K flushed to zero below exp(-27) of a softmax.
template <class T>
constexpr T LOG_RANGE = sizeof(T) == 4 ? T(60) : T(650);

// Potentials beyond this are rounded by 8e-6 and more (float). The softmaxes that they give miss the sum 1 by as much, and what should cancel
// does not, and grows from iteration to iteration. Beyond it softmaxes are divided by their sums, at the price of a second pass.
template <class T>
constexpr T LARGE_POTENTIAL = sizeof(T) == 4 ? T(128) : T(6e10);

template <class T>
struct Unrolled {
  const SinkhornBackward& p;
  Cost<T> cost;
  SinkhornEach each;
  SinkhornChunks chunks;
  int64_t b, rows, stride, steps = 0, iterations;
  T epsilon, lambda_a, lambda_b, grad_transport = 0, grad_value = 0;
  bool normalizes = false;
  const T *history, *grad_f, *grad_g;
  Tail<T> tail;
  T *kernel, *partial, *grad_cost;                                                            // [rows, stride], [chunks, stride], [N, M]
  T *log_a, *inverse_a, *row_center, *u, *u_last, *alpha, *gamma, *u_bar, *log_a_bar, *mass;  // [rows]
  T *log_b, *inverse_b, *column_center, *v, *v_last, *v_before, *beta, *delta, *v_bar, *log_b_bar, *weight;  // [stride]
  T *row_factors, *column_factors;  // [2 SEGMENT, rows], [2 SEGMENT, stride]
  double* totals;                   // [chunks]
  double grad_epsilon = 0;

  Unrolled(const SinkhornBackward& problem, int64_t index, Arena& arena, SinkhornEach runner) : p(problem), each(runner), b(index) {
    chunks = sinkhorn_chunks(p.N, p.M);
    rows = round_up(p.N, 16), stride = round_up(p.M, LANES<T>);
    const int64_t segment = std::min(SEGMENT, p.num_iters);
    kernel = arena.take<T>(rows * stride);
    tail = Tail<T>(p.M, rows, arena);
    partial = arena.take<T>(chunks.count * stride);
    for (T** piece : {&log_a, &inverse_a, &row_center, &u, &u_last, &alpha, &gamma, &u_bar, &log_a_bar, &mass})
      *piece = arena.take<T>(rows);
    for (T** piece : {&log_b, &inverse_b, &column_center, &v, &v_last, &v_before, &beta, &delta, &v_bar, &log_b_bar, &weight})
      *piece = arena.take<T>(stride);
    row_factors = arena.take<T>(2 * segment * rows);
    column_factors = arena.take<T>(2 * segment * stride);
    totals = arena.take<double>(chunks.count);
    if (arena.counts_only()) return;
    iterations = std::clamp<int64_t>(p.iterations[b], 1, p.num_iters);
    epsilon = static_cast<const T*>(p.epsilon)[b];
    cost = {static_cast<const T*>(p.cost) + b * p.N * p.M, p.N, p.M, 1 / epsilon};
    lambda_a = std::isinf(p.rho_a) ? T(1) : static_cast<T>(p.rho_a / (p.rho_a + epsilon));
    lambda_b = std::isinf(p.rho_b) ? T(1) : static_cast<T>(p.rho_b / (p.rho_b + epsilon));
    if (p.grad_transport_cost) grad_transport = static_cast<const T*>(p.grad_transport_cost)[b];
    if (p.grad_entropic_value) grad_value = static_cast<const T*>(p.grad_entropic_value)[b];
    history = static_cast<const T*>(p.history) + b * p.num_iters * (p.N + p.M);
    grad_f = p.grad_f ? static_cast<const T*>(p.grad_f) + b * p.N : nullptr;
    grad_g = p.grad_g ? static_cast<const T*>(p.grad_g) + b * p.M : nullptr;
    grad_cost = static_cast<T*>(p.grad_cost) + b * p.N * p.M;
    copy_padded(mass, static_cast<const T*>(p.a) + b * p.N, p.N, rows, T(0));
    read_log(mass, rows, log_a, inverse_a);
    copy_padded(weight, static_cast<const T*>(p.b) + b * p.M, p.M, stride, T(0));
    read_log(weight, stride, log_b, inverse_b);
  }

  static void read_log(const T* masses, int64_t count, T* log, T* inverse) {
    for (int64_t i = 0; i < count; i += LANES<T>) {
      const Vec<T> m = load(masses + i), none{};
      store(log + i, log_nonnegative(m));
      store(inverse + i, m == none ? none : T(1) / m);
    }
  }

  // (u, v) of iteration t, and v of the one before; -infinity in the padding.
  void read_iteration(int64_t t) {
    const T* const now = history + (t - 1) * (p.N + p.M);
    copy_padded(u, now, p.N, rows, -INFINITE<T>);
    copy_padded(v, now + p.N, p.M, stride, -INFINITE<T>);
    if (t > 1) {
      copy_padded(v_before, now - p.M, p.M, stride, -INFINITE<T>);
      return;
    }
    const T* const g_init = p.g_init ? static_cast<const T*>(p.g_init) + b * p.M : nullptr;
    for (int64_t j = 0; j < stride; ++j)
      v_before[j] = inverse_b[j] == T(0) ? -INFINITE<T> : g_init ? g_init[j] * cost.inverse_epsilon : T(0);
  }

  template <class Body>
  double over_chunks(Body body) {
    for_chunks(each, chunks.count,
               [&](int64_t c) { totals[c] = body(c * chunks.rows, std::min(p.N, (c + 1) * chunks.rows), partial + c * stride); });
    double total = 0;
    for (int64_t c = 0; c < chunks.count; ++c) total += totals[c];
    return total;
  }

  // ------------------------------------------------------------------------------------------------------- beginning and end

  // Gradients of epsilon are sums over M_bar C of large terms that cancel. Every iteration leaves M_bar the row sums -epsilon f_bar + z (1/lambda_a - 1)
  // and column sums likewise, so C may be replaced by C - f - g = -epsilon log P, and u^t by u^t - u: nothing large is left.
  //
  // Gamma - epsilon (tc + e) P into grad_cost, Gamma's sums into u_bar and v_bar. C + epsilon log P is f + g, and after a column half-step
  // rho_b log(q / b) is -g.
  void begin() {
    const T both = grad_transport + grad_value, column_part = std::isinf(p.rho_b) ? grad_value : T(0);
    grad_epsilon += over_chunks([&](int64_t first, int64_t last, T* sums) {
      std::fill(sums, sums + stride, T(0));
      double total = 0;
      for (int64_t i = first; i < last; ++i) {
        T* const out = grad_cost + i * p.M;
        if (u[i] == -INFINITE<T>) {  // absent, whatever the cost says there
          std::fill(out, out + p.M, T(0));
          u_bar[i] = 0;
          continue;
        }
        Vec<T> row{}, direct{};
        T row_part = grad_value * u[i] * epsilon;
        if (!std::isinf(p.rho_a) && grad_value != T(0)) {
          const T marginal = row_sum(i);
          row_part += grad_value * static_cast<T>(p.rho_a) * (std::log(marginal) - log_a[i]);
          log_a_bar[i] = grad_value * static_cast<T>(p.rho_a) * (mass[i] - marginal);
        }
        for (int64_t j = 0; j < stride; j += LANES<T>) {
          const Vec<T> none{}, log_plan = u[i] + cost.score(i, j, v), plan = exp_any<T>(log_plan), c = cost.at(i, j, T(0));
          const Vec<T> rest = row_part + column_part * epsilon * load(v + j);
          const Vec<T> gamma_ij = plan == none ? none : plan * (grad_transport * c + rest);
          direct -= plan == none ? none : plan * (grad_transport * log_plan + grad_value);
          row += gamma_ij;
          store(sums + j, load(sums + j) + gamma_ij);
          store_part(out + j, gamma_ij - plan * (both * epsilon), p.M - j);
        }
        u_bar[i] = reduce_sum(row) + (grad_f ? epsilon * grad_f[i] : T(0));
        total += reduce_sum(direct);
      }
      return total;
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; ++j) {
      const bool absent = v[j] == -INFINITE<T>;
      v_bar[j] = absent ? T(0) : partial[j] + (grad_g ? epsilon * grad_g[j] : T(0));
      log_b_bar[j] = 0;
      if (!std::isinf(p.rho_b) && !absent)
        log_b_bar[j] = grad_value * static_cast<T>(p.rho_b) * weight[j] * (1 - std::exp(-v[j] * epsilon / static_cast<T>(p.rho_b)));
    }
  }

  T row_sum(int64_t i) const {
    Vec<T> sum{};
    for (int64_t j = 0; j < stride; j += LANES<T>) sum += exp_any<T>(u[i] + cost.score(i, j, v));
    return reduce_sum(sum);
  }

  void end() {
    grad_epsilon += over_chunks([&](int64_t first, int64_t last, T*) {
      double total = 0;
      for (int64_t i = first; i < last; ++i) {
        Vec<T> sum{};
        for (int64_t j = 0; j < p.M; j += LANES<T>) {
          T* const out = grad_cost + i * p.M + j;
          const Vec<T> none{}, m = load_part(out, p.M - j, p.M - j, T(0)), scaled = m * cost.inverse_epsilon;
          sum += m == none ? none : scaled * (u_last[i] + cost.score(i, j, v_last));
          store_part(out, -scaled, p.M - j);
        }
        total -= reduce_sum(sum);
      }
      return total;
    });
    for (int64_t j = 0; j < p.M; ++j)  // what is left of v_bar belongs to v before the first iteration
      if (v_last[j] != -INFINITE<T>) grad_epsilon += static_cast<double>(v_bar[j]) * (v_last[j] - v_before[j]) * cost.inverse_epsilon;
    T *const grad_a = static_cast<T*>(p.grad_a) + b * p.N, *const grad_b = static_cast<T*>(p.grad_b) + b * p.M;
    for (int64_t i = 0; i < p.N; ++i) grad_a[i] = log_a_bar[i] * inverse_a[i];
    for (int64_t j = 0; j < p.M; ++j) grad_b[j] = log_b_bar[j] * inverse_b[j];
    static_cast<T*>(p.grad_epsilon)[b] = static_cast<T>(grad_epsilon);
  }

  // ------------------------------------------------------------------------------------------------------- iterations

  // exp(exponent), 0 where the entry is absent; the largest exponent is remembered.
  PK_MEMBER Vec<T> factor(Vec<T> exponent, Vec<T> present, Vec<T>& largest) const {
    const auto absent = present == -INFINITE<T>;
    const Vec<T> e = absent ? present : exponent;
    largest = e > largest ? e : largest;
    return exp_any<T>(e);
  }

  // The four factors of the iteration that was read, for the K at hand; false if they leave its range.
  bool factors() {
    const Vec<T> lowest = broadcast(-INFINITE<T>), none{};
    Vec<T> top_alpha = lowest, top_beta = lowest, top_gamma = lowest, top_delta = lowest;
    for (int64_t i = 0; i < rows; i += LANES<T>) {
      const Vec<T> potential = load(u + i), center = load(row_center + i), log_mass = load(log_a + i);
      const Vec<T> present = center > lowest || center != center ? potential : lowest;
      const Vec<T> a = factor(potential - center, present, top_alpha);
      store(alpha + i, a);
      store(gamma + i, lambda_a == T(1) ? a * load(inverse_a + i) : factor(potential / lambda_a - log_mass - center, present, top_gamma));
      if (lambda_a == T(1)) top_gamma = a > none && potential - center - log_mass > top_gamma ? potential - center - log_mass : top_gamma;
    }
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> potential = load(v + j), center = load(column_center + j);
      const Vec<T> present = center > lowest || center != center ? potential : lowest;
      store(beta + j, factor(potential / lambda_b - load(log_b + j) - center, present, top_beta));
      store(delta + j, factor(load(v_before + j) - center, present == lowest ? lowest : load(v_before + j), top_delta));
    }
    const T first = reduce_max(top_alpha) + reduce_max(top_beta), second = reduce_max(top_gamma) + reduce_max(top_delta);
    const Vec<T> rows_top = top_alpha > top_gamma ? top_alpha : top_gamma, columns_top = top_beta > top_delta ? top_beta : top_delta;
    const T one = std::max(reduce_max(rows_top), reduce_max(columns_top));  // beside one that is too large the other would be 0
    return !(first > LOG_RANGE<T>) && !(second > LOG_RANGE<T>) && !(one > LOG_RANGE<T>);
  }

  // The softmaxes of these factors divided by their sums.
  void normalize_factors() {
    over_chunks([&](int64_t first, int64_t last, T* sums) {
      auto finish = [&](int64_t i, Four<T> sum) __attribute__((always_inline)) {
        const Four<T> none{};
        store_four(gamma + i, sum == none ? none : T(1) / sum);
        return load_four(alpha + i);
      };
      fused_rows(kernel, stride, tail, first, round_up(last, ROWS), delta, sums, finish);
      return 0.0;
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; j += LANES<T>) store(beta + j, inverse_sum(load(partial + j)));
  }

  PK_MEMBER static Vec<T> inverse_sum(Vec<T> sum) {
    const Vec<T> none{};
    return sum == none ? none : T(1) / sum;
  }

  // K becomes S of the iteration that was read.
  void recenter() {
    std::copy(u, u + rows, row_center);
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> potential = load(v + j), lowest = broadcast(-INFINITE<T>);
      store(column_center + j, potential == lowest ? lowest : potential / lambda_b - load(log_b + j));
    }
    over_chunks([&](int64_t first, int64_t last, T*) {
      const int64_t end = last == p.N ? rows : last;
      fill_kernel(cost, row_center, column_center, kernel, stride, first, end);
      tail.copy(kernel, stride, first, end);
      return 0.0;
    });
  }

  // grad_cost -= K * (row factors)^T (column factors).
  void apply_segment() {
    if (steps == 0) return;
    over_chunks([&](int64_t first, int64_t last, T*) {
      alignas(64) T tile[TILE_ROWS * 2 * LANES<T>];
      for (int64_t j0 = 0; j0 < stride; j0 += 2 * LANES<T>) {
        const int64_t width = std::min<int64_t>(2 * LANES<T>, stride - j0);
        for (int64_t i0 = first; i0 < last; i0 += TILE_ROWS) {
          if (width == LANES<T>)
            tile_product<T, 1>(row_factors + i0, 1, rows, column_factors + j0, stride, 2 * steps, tile, width, false);
          else
            tile_product<T, 2>(row_factors + i0, 1, rows, column_factors + j0, stride, 2 * steps, tile, width, false);
          for (int64_t i = i0; i < std::min(last, i0 + TILE_ROWS); ++i)
            for (int64_t j = j0; j < std::min(p.M, j0 + width); j += LANES<T>) {
              T* const out = grad_cost + i * p.M + j;
              const Vec<T> change = load(kernel + i * stride + j) * load(tile + (i - i0) * width + j - j0);
              store_part(out, load_part(out, p.M - j, p.M - j, T(0)) - change, p.M - j);
            }
        }
      }
      return 0.0;
    });
    steps = 0;
  }

  // w = lambda_b v_bar, the start of an iteration's backward.
  void column_gradients() {
    double damping = 0;
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> w = lambda_b * load(v_bar + j);
      store(weight + j, w);
      store(log_b_bar + j, load(log_b_bar + j) + w);
    }
    if (lambda_b != T(1))
      for (int64_t j = 0; j < p.M; ++j)
        if (v[j] != -INFINITE<T>) damping += static_cast<double>(weight[j]) * (v_last[j] - v[j]);
    if (lambda_b != T(1)) grad_epsilon += damping / p.rho_b;
  }

  // z_i from what S w left of u_bar.
  PK_MEMBER T row_gradient(int64_t i, T spent, double& damping) {
    const T z = lambda_a * (u_bar[i] - spent);
    u_bar[i] = 0;
    log_a_bar[i] += z;
    if (lambda_a != T(1) && u[i] != -INFINITE<T>) damping += static_cast<double>(z) * (u_last[i] - u[i]) / p.rho_a;
    return z;
  }

  void scaled_iteration() {
    T *const x = row_factors + 2 * steps * rows, *const y = column_factors + 2 * steps * stride;
    std::copy(alpha, alpha + rows, x);
    for (int64_t j = 0; j < stride; j += LANES<T>) store(y + j, load(beta + j) * load(weight + j));
    std::copy(delta, delta + stride, y + stride);
    grad_epsilon += over_chunks([&](int64_t first, int64_t last, T* sums) {
      double damping = 0;
      auto finish = [&](int64_t i, Four<T> r) __attribute__((always_inline)) {
        Four<T> scale;
        if (lambda_a == T(1)) {
          const Four<T> z = load_four(u_bar + i) - load_four(alpha + i) * r;
          store_four(u_bar + i, Four<T>{});
          store_four(log_a_bar + i, load_four(log_a_bar + i) + z);
          scale = z * load_four(gamma + i);
        } else {
          for (int k = 0; k < ROWS; ++k) scale[k] = row_gradient(i + k, alpha[i + k] * r[k], damping) * gamma[i + k];
        }
        store_four(x + rows + i, scale);
        return scale;
      };
      fused_rows(kernel, stride, tail, first, round_up(last, ROWS), y, sums, finish);
      return damping;
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; j += LANES<T>) store(v_bar + j, -(load(delta + j) * load(partial + j)));
    ++steps;
  }

  void exponential_iteration() {
    for (int64_t j = 0; j < stride; ++j) beta[j] = v[j] == -INFINITE<T> ? -INFINITE<T> : v[j] / lambda_b - log_b[j];
    if (normalizes) {
      over_chunks([&](int64_t first, int64_t last, T* sums) {
        std::fill(sums, sums + stride, T(0));
        for (int64_t i = first; i < last; ++i)
          for (int64_t j = 0; u[i] != -INFINITE<T> && j < stride; j += LANES<T>)
            store(sums + j, load(sums + j) + exp_any<T>(u[i] + cost.score(i, j, beta)));
        return 0.0;
      });
      add_chunks(partial, stride, chunks.count);
      for (int64_t j = 0; j < stride; j += LANES<T>) store(weight + j, load(weight + j) * inverse_sum(load(partial + j)));
    }
    grad_epsilon += over_chunks([&](int64_t first, int64_t last, T* sums) {
      std::fill(sums, sums + stride, T(0));
      double damping = 0;
      for (int64_t i = first; i < last; ++i) {
        if (u[i] == -INFINITE<T>) continue;
        Vec<T> spent{};
        for (int64_t j = 0; j < stride; j += LANES<T>) {
          T* const out = grad_cost + i * p.M + j;
          const Vec<T> change = exp_any<T>(u[i] + cost.score(i, j, beta)) * load(weight + j);
          spent += change;
          store_part(out, load_part(out, p.M - j, p.M - j, T(0)) - change, p.M - j);
        }
        const T center = u[i] / lambda_a - log_a[i];
        T z = row_gradient(i, reduce_sum(spent), damping);
        if (normalizes) {
          Vec<T> sum{};
          for (int64_t j = 0; j < stride; j += LANES<T>) sum += exp_any<T>(center + cost.score(i, j, v_before));
          const T total = reduce_sum(sum);
          z = total == T(0) ? T(0) : z / total;
        }
        for (int64_t j = 0; j < stride; j += LANES<T>) {
          T* const out = grad_cost + i * p.M + j;
          const Vec<T> change = exp_any<T>(center + cost.score(i, j, v_before)) * z;
          store(sums + j, load(sums + j) + change);
          store_part(out, load_part(out, p.M - j, p.M - j, T(0)) - change, p.M - j);
        }
      }
      return damping;
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; j += LANES<T>) store(v_bar + j, -load(partial + j));
  }

  // |potential|, of those that are there.
  static T largest(const T* potentials, int64_t count) {
    T most = 0;
    for (int64_t i = 0; i < count; ++i)
      if (potentials[i] != -INFINITE<T>) most = std::max(most, std::abs(potentials[i]));
    return most;
  }

  void run() {
    for (T* piece : {u_bar, log_a_bar, row_center}) std::fill(piece, piece + rows, T(0));
    std::fill(column_center, column_center + stride, T(0));
    read_iteration(iterations);
    std::copy(u, u + rows, u_last);
    std::copy(v, v + stride, v_last);
    begin();
    normalizes = largest(u, rows) > LARGE_POTENTIAL<T> || largest(v, stride) > LARGE_POTENTIAL<T>;
    bool made = false;
    for (int64_t t = iterations; t >= 1; --t) {
      if (t < iterations) read_iteration(t);
      column_gradients();
      if (steps == SEGMENT) apply_segment();
      bool fits = made && factors();
      if (!fits) {
        apply_segment();
        recenter();
        made = true;
        fits = factors();
      }
      if (fits && normalizes) normalize_factors();
      if (fits)
        scaled_iteration();
      else
        exponential_iteration();
    }
    apply_segment();
    end();
  }
};

int64_t scratch(const SinkhornBackward& p) {
  return with_type(p.kind, [&](auto zero) {
    Arena arena(nullptr);
    Unrolled<decltype(zero)>(p, 0, arena, nullptr);
    return arena.bytes();
  });
}

void backward(const SinkhornBackward& p, int64_t b, void* memory, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) {
    Arena arena(memory);
    Unrolled<decltype(zero)>(p, b, arena, each).run();
  });
}

}  // namespace

namespace protokernels {

extern const SinkhornUnrolledCpu PK_LEVEL_TABLE(sinkhorn_unrolled_cpu);
const SinkhornUnrolledCpu PK_LEVEL_TABLE(sinkhorn_unrolled_cpu) = {scratch, backward};

}  // namespace protokernels
