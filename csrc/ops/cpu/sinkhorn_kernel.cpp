// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU: the iterations. The equations stand in ops/sinkhorn.h.
//
// They run on scales around an absorbed kernel matrix (sinkhorn_dense.h): one multiply-add for the row sum and one for the column sum of an
// element, in a single read of the matrix, which is what bounds them: L1 and L2 for small problems, memory for large ones. The first row
// half-step is taken in the log domain, so that every row has an entry near its mass. Later ones go back there when a sum is too small to be
// trusted, and scales that grow are absorbed into the centers: the range of the cost does not matter.
//
// What pays, in builds compared by hand. Two Cascade Lake cores (AVX-512): column sums in registers, for rows of up to 16 vectors, while the next
// rows meet v: 16 x 196 x 196 with 100 iterations in 4.0 ms, 5.6 with them in memory; the first half-step by blocks of rows: 128 x 31 x 31 with 5
// iterations on one of them in .60 ms, .77 row by row. One Zen 3 core (AVX2, registers for eight vectors): four rows of 49 columns in 60 cycles, 115
// with the sums in memory and the next rows only after the scale of these. Two Zen 5 cores: without flushing subnormal products to zero 196 x 196 at
// epsilon = .005 took half as long again as at .1; damped rows go through the logarithm 16 at a time, 1.2 ms, with four at a time 2.2.
//
// Old and new in turn in one process, one Zen 4 core (AVX-512), an iteration of 49 x 49: 205 ns; 178 with v in registers and the last column as a
// tail; 149 where sums and scales are compared with bounds lane by lane, their extremes found only where that does not do; 142 without filling and
// adding up what a single chunk does not need; of 300 x 300 5.5 us, 5.0 with the pass over long rows as a function of its own. Tried without gain: sixteen problems in the lanes of a vector, 160 ns, for every element of K
// comes from L1 twice and no v stays in a register; half vectors in the sums over lanes.

#include "ops/cpu/sinkhorn_report.h"

namespace {

template <class T>
struct Solver {
  const SinkhornForward& p;
  int64_t b;
  Cost<T> cost;
  SinkhornEach each;
  SinkhornChunks chunks;
  int64_t rows, stride;  // N and M, rounded up to whole vectors
  T epsilon, lambda_a, lambda_b;
  bool balanced, any_lost = false, looks_at_error;
  Tail<T> tail;
  T *kernel, *partial, *column_max;                                              // [rows, stride], [chunks, stride], [stride]
  T *mass_a, *active_a, *log_a, *row_center, *row_scale, *next_scale, *row_sum;  // [rows]; active: 0 where infeasible
  T *mass_b, *active_b, *log_b, *column_center, *column_scale;                   // [stride]
  Report<T>* reports;                                                            // [chunks]

  Solver(const SinkhornForward& problem, int64_t index, Arena& arena, SinkhornEach runner) : p(problem), b(index), each(runner) {
    chunks = sinkhorn_chunks(p.N, p.M);
    rows = round_up(p.N, 16), stride = round_up(p.M, LANES<T>);
    kernel = arena.take<T>(rows * stride);
    tail = Tail<T>(p.M, rows, arena);
    partial = arena.take<T>((chunks.count + 1) * stride);
    for (T** piece : {&mass_a, &active_a, &log_a, &row_center, &row_scale, &next_scale, &row_sum}) *piece = arena.take<T>(rows + 16);
    for (T** piece : {&mass_b, &active_b, &log_b, &column_center, &column_scale}) *piece = arena.take<T>(stride);
    reports = arena.take<Report<T>>(chunks.count);
    if (arena.counts_only()) return;
    column_max = partial + chunks.count * stride;
    epsilon = static_cast<const T*>(p.epsilon)[b];
    cost = {static_cast<const T*>(p.cost) + b * p.N * p.M, p.N, p.M, 1 / epsilon};
    balanced = std::isinf(p.rho_a) && std::isinf(p.rho_b), looks_at_error = p.tolerance > 0;
    lambda_a = std::isinf(p.rho_a) ? T(1) : static_cast<T>(p.rho_a / (p.rho_a + epsilon));
    lambda_b = std::isinf(p.rho_b) ? T(1) : static_cast<T>(p.rho_b / (p.rho_b + epsilon));
    copy_padded(mass_a, static_cast<const T*>(p.a) + b * p.N, p.N, rows + 16, T(0));
    copy_padded(mass_b, static_cast<const T*>(p.b) + b * p.M, p.M, stride, T(0));
    std::copy(mass_a, mass_a + rows + 16, active_a);
    std::copy(mass_b, mass_b + stride, active_b);
    for (int64_t i = 0; i < rows; i += LANES<T>) store(log_a + i, log_nonnegative(load(mass_a + i)));
    const T* const g_init = p.g_init ? static_cast<const T*>(p.g_init) + b * p.M : nullptr;
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> mass = load(mass_b + j);
      const Vec<T> start = g_init ? load_part(g_init + j, p.M - j, p.M - j, T(0)) * cost.inverse_epsilon : Vec<T>{};
      store(log_b + j, log_nonnegative(mass));
      store(column_center + j, mass > T(0) || mass != mass ? start : broadcast(-INFINITE<T>));
      store(column_scale + j, broadcast(T(1)));
    }
    for (T* piece : {row_center, row_scale, next_scale, row_sum}) std::fill(piece, piece + rows + 16, T(0));
    std::fill(row_scale, row_scale + p.N, T(1));  // u = 0 before the first iteration
  }

  template <class Body>
  Report<T> over_chunks(Body body) {
    if (chunks.count == 1) {
      Report<T> only;
      body(0, p.N, partial, only);
      return only;
    }
    for_chunks(each, chunks.count, [&](int64_t c) {
      reports[c] = Report<T>{};
      body(c * chunks.rows, std::min(p.N, (c + 1) * chunks.rows), partial + c * stride, reports[c]);
    });
    Report<T> total;
    for (int64_t c = 0; c < chunks.count; ++c) total.merge(reports[c]);
    return total;
  }

  // ------------------------------------------------------------------------------------------------------- log domain

  // A row half-step from v = column_center; K is left centered at it, partial at its column sums.
  Report<T> restart_rows() {
    return over_chunks([&](int64_t begin, int64_t end, T* sums, Report<T>& mine) {
      std::fill(sums, sums + stride, T(0));
      const int64_t last = end == p.N ? rows : end;
      for (int64_t i = begin; i < last; i += LANES<T>) restart_block(i, sums, mine);
      tail.copy(kernel, stride, begin, last);
    });
  }

  // LANES rows, whose sums and logarithms are worked out side by side: a short row would wait for its own longer than for all the rest.
  PK_MEMBER void restart_block(int64_t first, T* sums, Report<T>& mine) {
    const Cost<T> costs = cost;  // copies: what is written might be a member, for all the compiler knows
    const T* const columns = column_center;
    const int64_t width = stride;
    T *const block = kernel + first * width, *const active = active_a + first;
    const Vec<T> none{}, lowest = broadcast(-INFINITE<T>);
    alignas(64) T lanes[LANES<T> * LANES<T>], of_rows[LANES<T>];
    for (int row = 0; row < LANES<T>; ++row) {
      Vec<T> top = lowest;
      if (active[row] != T(0))
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> x = costs.score(first + row, j, columns);
          top = x > top ? x : top;
        }
      store(lanes + row * LANES<T>, top);
    }
    store(of_rows, reduce_each<T>(lanes, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; }));
    for (int row = 0; row < LANES<T>; ++row)
      if (of_rows[row] == -INFINITE<T> && active[row] != T(0)) {
        if (costs.has_nan(first + row, columns))
          of_rows[row] = 0;  // then the sum is NaN, and the row
        else
          active[row] = 0;
      }
    for (int row = 0; row < LANES<T>; ++row) {
      Vec<T> sum{};
      if (active[row] == T(0))
        std::fill_n(block + row * width, width, T(0));
      else
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> e = exp_nonpositive(costs.score(first + row, j, columns) - of_rows[row]);
          sum += e;
          store(block + row * width + j, e);
        }
      store(lanes + row * LANES<T>, sum);
    }
    const Vec<T> mass = load(active), highest = load(of_rows), total = reduce_each<T>(lanes, [](Vec<T> a, Vec<T> b) { return a + b; });
    const Vec<T> u = mass == none ? lowest : lambda_a * (load(log_a + first) - (highest + log_nonnegative(total)));
    const Vec<T> factor = mass == none ? none : lambda_a == T(1) ? mass / total : exp_any<T>(u + highest);
    store(of_rows, factor);
    for (int row = 0; row < LANES<T>; row += 2) {
      T *const even = block + row * width, *const odd = even + width;
      const Vec<T> of_even = broadcast(of_rows[row]), of_odd = broadcast(of_rows[row + 1]);
      for (int64_t j = 0; j < width; j += LANES<T>) {
        const Vec<T> upper = load(even + j) * of_even, lower = load(odd + j) * of_odd;
        store(even + j, upper), store(odd + j, lower);
        store(sums + j, load(sums + j) + (upper + lower));
      }
    }
    if (!balanced) {
      const Vec<T> moved = absolute<T>(u - (load(row_center + first) + log_nonnegative(load(row_scale + first)))) * mass;
      mine.error += reduce_sum(mass == none ? none : moved);
    }
    store(row_center + first, u);
    store(row_scale + first, mass == none ? none : broadcast(T(1)));
    if (reduce_max(mass) != T(0)) mine.smallest_scale = mine.largest_scale = 1;
    mine.ordinary = false;
  }

  // A column half-step from u = row_center; K is left as it was.
  void restart_columns() {
    over_chunks([&](int64_t begin, int64_t end, T* top, Report<T>&) {
      std::fill(top, top + stride, -INFINITE<T>);
      for (int64_t i = begin; i < end; ++i)
        if (active_a[i] != T(0))
          for (int64_t j = 0; j < stride; j += LANES<T>) {
            const Vec<T> x = row_center[i] - cost.at(i, j, INFINITE<T>) * cost.inverse_epsilon, best = load(top + j);
            store(top + j, x > best ? x : best);
          }
    });
    for (int64_t j = 0; j < stride; ++j) {
      T top = partial[j];
      for (int64_t c = 1; c < chunks.count; ++c) top = std::max(top, partial[c * stride + j]);
      column_max[j] = top == -INFINITE<T> ? T(0) : top;
    }
    over_chunks([&](int64_t begin, int64_t end, T* sums, Report<T>&) {
      std::fill(sums, sums + stride, T(0));
      for (int64_t i = begin; i < end; ++i)
        if (active_a[i] != T(0))
          for (int64_t j = 0; j < stride; j += LANES<T>) {
            const Vec<T> x = row_center[i] - cost.at(i, j, INFINITE<T>) * cost.inverse_epsilon;
            store(sums + j, load(sums + j) + exp_nonpositive(x - load(column_max + j)));
          }
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> sum = load(partial + j), none{};
      const Vec<T> active = sum == none ? none : load(active_b + j);
      const Vec<T> v = lambda_b * (load(log_b + j) - (load(column_max + j) + log_nonnegative(sum)));
      for (int lane = 0; lane < LANES<T>; ++lane) any_lost |= active[lane] != active_b[j + lane];
      store(active_b + j, active);
      store(column_center + j, active == none ? broadcast(-INFINITE<T>) : v);
      store(column_scale + j, broadcast(T(1)));
    }
  }

  void absorb_rows() { absorb(row_center, row_scale, active_a, rows); }
  void absorb_columns() { absorb(column_center, column_scale, active_b, stride); }
  void recenter() {
    over_chunks([&](int64_t begin, int64_t end, T*, Report<T>&) {
      const int64_t last = end == p.N ? rows : end;
      fill_kernel(cost, row_center, column_center, kernel, stride, begin, last);
      tail.copy(kernel, stride, begin, last);
    });
  }

  // ------------------------------------------------------------------------------------------------------- scales

  // A row half-step into next_scale, and the column sums under it. The error is that of the iteration before: the row sums' distance from the
  // masses, or, unbalanced, the change of u.
  Report<T> scale_rows() {
    Report<T> report = over_chunks([&](int64_t begin, int64_t end, T* sums, Report<T>& mine) {
      if (balanced)
        scale_chunk(begin, round_up(end, ROWS), sums, mine);
      else
        damp_chunk(begin, end, sums, mine);
    });
    if (!report.ordinary) report.merge(extremes_of(row_sum, next_scale, active_a, rows));
    return report;
  }

  void scale_chunk(int64_t begin, int64_t end, T* sums, Report<T>& mine) {
    const T* const active = active_a;  // what is written might be a member, for all the compiler knows
    T *const scales = next_scale, *const found = row_sum;
    auto finish = [=](int64_t i, Four<T> r) __attribute__((always_inline)) {
      const Four<T> none{}, mass = load_four(active + i), scale = mass == none ? none : mass / r;
      store_four(found + i, r), store_four(scales + i, scale);
      return scale;
    };
    fused_rows(kernel, stride, tail, begin, end, column_scale, sums, finish);
    const Vec<T> none{};
    Ordinary<T> seen;
    for (int64_t i = begin; i < end; i += LANES<T>) seen.meet(load(row_sum + i), load(next_scale + i), load(active_a + i) != none);
    mine.ordinary = seen.is_so();
    if (!looks_at_error) return;
    Vec<T> error{};
    for (int64_t i = begin; i < end; i += LANES<T>) error += absolute<T>(load(row_scale + i) * load(row_sum + i) - load(mass_a + i));
    mine.error += reduce_sum(error);
  }

  // Blocks of 16 rows: u = lambda (log a - log sum) needs logarithms, which four at a time would cost four times as much.
  void damp_chunk(int64_t begin, int64_t end, T* sums, Report<T>& mine) {
    std::fill(sums, sums + stride, T(0));
    const Vec<T> none{};
    Vec<T> error{};
    Ordinary<T> seen;
    for (int64_t block = begin; block < end; block += 16) {
      const int64_t last = std::min(round_up(end, ROWS), block + 16);
      for (int64_t i = block; i < last; i += ROWS) store_four(next_scale + i, four_sums(kernel + i * stride, stride, column_scale));
      for (int64_t i = block; i < last; i += LANES<T>) {
        const Vec<T> r = load(next_scale + i), active = load(active_a + i), center = load(row_center + i);
        const Vec<T> log_scale = lambda_a * (load(log_a + i) + center - log_nonnegative(r)) - center;
        const Vec<T> scale = active == none ? none : exp_any<T>(log_scale);
        if (looks_at_error) {
          const Vec<T> moved = absolute<T>(log_scale - log_nonnegative(load(row_scale + i))) * load(mass_a + i);
          error += active == none ? none : moved;
        }
        seen.meet(r, scale, active != none);
        store(row_sum + i, r), store(next_scale + i, scale);
      }
      for (int64_t i = block; i < last; i += ROWS) add_four(kernel + i * stride, stride, load_four(next_scale + i), sums);
    }
    mine.error += reduce_sum(error);
    mine.ordinary = seen.is_so();
  }

  // A column half-step from the column sums in partial. Returns whether it was an ordinary one.
  bool scale_columns() {
    add_chunks(partial, stride, chunks.count);
    const Vec<T> none{};
    Ordinary<T> seen;
    for (int64_t j = 0; j < stride; j += LANES<T>) {
      const Vec<T> sum = load(partial + j), active = load(active_b + j), center = load(column_center + j);
      Vec<T> scale = active / sum;
      if (lambda_b != T(1)) scale = exp_any<T>(lambda_b * (load(log_b + j) + center - log_nonnegative(sum)) - center);
      scale = active == none ? none : scale;
      seen.meet(sum, scale, active != none);
      store(column_scale + j, scale);
    }
    return seen.is_so();
  }

  // Returns the number of iterations whose result stands in centers and scales. The error is what the row pass after them finds; infinite if it
  // has to be measured.
  int64_t iterate(double& error) {
    for (int64_t t = 1; t <= p.num_iters; ++t) {
      Report<T> rows_now;
      bool trusted = false;
      if (t > 1) {
        rows_now = scale_rows();
        trusted = trusts(rows_now);
        error = rows_now.error + lost_columns();
        if (p.tolerance > 0 && (balanced || trusted) && error <= p.tolerance) return t - 1;
      }
      if (trusted) {
        std::swap(row_scale, next_scale);
      } else {
        if (t > 1) absorb_columns();
        const bool looks = t > 1 && !balanced && p.tolerance > 0;  // a change of u is wrong by as much as u: that of the log domain counts
        if (looks) absorb_rows(), std::copy(row_center, row_center + rows, row_sum);
        rows_now = restart_rows();
        if (looks && rows_now.error <= p.tolerance) {
          std::copy(row_sum, row_sum + rows, row_center);
          error = rows_now.error;
          return t - 1;
        }
      }
      if (!scale_columns() || !rows_now.ordinary) settle(rows_now);
      if (p.history) save(t - 1);
    }
    error = INFINITE<double>;
    if (balanced && p.tolerance > 0) error = scale_rows().error + lost_columns();
    if (balanced) return p.num_iters;
    looks_at_error = true;
    const Report<T> next = scale_rows();
    if (trusts(next)) error = next.error;
    return p.num_iters;
  }

  bool trusts(const Report<T>& row_half_step) const {
    return row_half_step.ordinary || row_half_step.trusted(extremes_of(column_scale, column_scale, active_b, stride).largest_scale);
  }

  // After a half-step that is not ordinary: back to the log domain where the columns' cannot be trusted; what is out of range is absorbed.
  void settle(const Report<T>& row_half_step) {
    const Report<T> of_rows = row_half_step.ordinary ? extremes_of(row_scale, row_scale, active_a, rows) : row_half_step;
    const Report<T> of_columns = extremes_of(partial, column_scale, active_b, stride);
    const bool trusted = of_columns.trusted(of_rows.largest_scale);
    if (trusted && of_columns.in_range() && of_rows.in_range()) return;
    absorb_rows();
    if (!trusted)
      restart_columns();
    else
      absorb_columns();
    recenter();
  }

  double lost_columns() const {
    double lost = 0;
    if (balanced && any_lost)
      for (int64_t j = 0; j < p.M; ++j) lost += mass_b[j] - active_b[j];
    return lost;
  }

  // (u, v) of this iteration.
  void save(int64_t t) const {
    T* const out = static_cast<T*>(p.history) + (b * p.num_iters + t) * (p.N + p.M);
    for (int64_t i = 0; i < p.N; i += LANES<T>) store_part(out + i, load(row_center + i) + log_nonnegative(load(row_scale + i)), p.N - i);
    for (int64_t j = 0; j < p.M; j += LANES<T>)
      store_part(out + p.N + j, load(column_center + j) + log_nonnegative(load(column_scale + j)), p.M - j);
  }

  // ------------------------------------------------------------------------------------------------------- results

  PK_MEMBER void measure_block(int64_t first, int64_t count, T* sums, Report<T>& mine) const {
    const Cost<T> costs = cost;  // copies: what is written might be a member, for all the compiler knows
    const T *const columns = column_center, *const centers = row_center + first;
    const int64_t width = stride;
    alignas(64) T sums_of_lanes[LANES<T> * LANES<T>], moved_of_lanes[LANES<T> * LANES<T>];
    for (int row = 0; row < LANES<T>; ++row) {
      Vec<T> sum{}, transport{};
      if (centers[row] != -INFINITE<T>)
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> plan = exp_any<T>(centers[row] + costs.score(first + row, j, columns));
          sum += plan;
          transport += plan == T(0) ? Vec<T>{} : plan * costs.at(first + row, j, T(0));
          store(sums + j, load(sums + j) + plan);
        }
      store(sums_of_lanes + row * LANES<T>, sum), store(moved_of_lanes + row * LANES<T>, transport);
    }
    const auto add = [](Vec<T> a, Vec<T> b) { return a + b; };
    const Vec<T> marginals = reduce_each<T>(sums_of_lanes, add), moved = reduce_each<T>(moved_of_lanes, add);
    for (int row = 0; row < count; ++row) {
      const double marginal = marginals[row], mass = mass_a[first + row];
      mine.transport += moved[row];
      mine.mass += marginal;
      mine.error += std::abs(marginal - mass);
      if (marginal != 0) mine.value += static_cast<double>(epsilon) * centers[row] * marginal;
      mine.value += divergence(p.rho_a, marginal, mass);
    }
  }

  // Row and column sums of P from the potentials themselves, as a reader of f and g would find them.
  Report<T> measure() {
    Report<T> total = over_chunks([&](int64_t begin, int64_t end, T* sums, Report<T>& mine) {
      std::fill(sums, sums + stride, T(0));
      for (int64_t i = begin; i < end; i += LANES<T>) measure_block(i, std::min<int64_t>(LANES<T>, end - i), sums, mine);
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < p.M; ++j) {
      const double marginal = partial[j];
      total.error += std::abs(marginal - mass_b[j]);
      if (marginal != 0) total.value += static_cast<double>(epsilon) * column_center[j] * marginal;
      total.value += divergence(p.rho_b, marginal, mass_b[j]);
    }
    total.value -= static_cast<double>(epsilon) * total.mass;
    return total;
  }

  bool is_feasible() const {
    double sum_a = 0, sum_b = 0;
    bool lost = false;
    for (int64_t i = 0; i < p.N; ++i) sum_a += mass_a[i], lost |= active_a[i] != mass_a[i];
    for (int64_t j = 0; j < p.M; ++j) sum_b += mass_b[j], lost |= active_b[j] != mass_b[j];
    return !lost && (!balanced || std::abs(sum_a - sum_b) <= SINKHORN_MASS_TOLERANCE * std::max(sum_a, sum_b));
  }

  void solve() {
    double error;
    p.iterations[b] = iterate(error);
    absorb_rows();
    absorb_columns();
    const Report<T> result = measure();
    T *const f = static_cast<T*>(p.f) + b * p.N, *const g = static_cast<T*>(p.g) + b * p.M;
    for (int64_t i = 0; i < p.N; ++i) f[i] = epsilon * row_center[i];
    for (int64_t j = 0; j < p.M; ++j) g[j] = epsilon * column_center[j];
    static_cast<T*>(p.transport_cost)[b] = static_cast<T>(result.transport);
    static_cast<T*>(p.entropic_value)[b] = static_cast<T>(result.value);
    p.feasible[b] = is_feasible();
    if (error == INFINITE<double>) error = balanced ? result.error : restart_rows().error;
    static_cast<T*>(p.marginal_error)[b] = static_cast<T>(error);
  }
};

int64_t forward_scratch(const SinkhornForward& p) {
  return with_type(p.kind, [&](auto zero) {
    Arena arena(nullptr);
    Solver<decltype(zero)>(p, 0, arena, nullptr);
    return arena.bytes();
  });
}

void forward(const SinkhornForward& p, int64_t b, void* scratch, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) {
    Arena arena(scratch);
    Solver<decltype(zero)>(p, b, arena, each).solve();
  });
}

}  // namespace

namespace protokernels {

extern const SinkhornCpu PK_LEVEL_TABLE(sinkhorn_cpu);
const SinkhornCpu PK_LEVEL_TABLE(sinkhorn_cpu) = {PK_STRINGIFY(PROTOKERNELS_LEVEL), forward_scratch, forward};

}  // namespace protokernels
