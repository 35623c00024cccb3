// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU: the plan, its backward, and the envelope gradient. One pass over the cost each; the equations stand in ops/sinkhorn.h.

#include "ops/cpu/sinkhorn_dense.h"

namespace {

// Row i of (f_i + g_j - C_ij) / epsilon for one problem; -infinity where P is 0.
template <class T>
struct LogPlan {
  const T *cost, *f, *g;  // [N, M], [N], [M]
  int64_t N, M;
  T inverse_epsilon;

  template <class Problem>
  LogPlan(const Problem& p, int64_t b)
      : cost(static_cast<const T*>(p.cost) + b * p.N * p.M),
        f(static_cast<const T*>(p.f) + b * p.N),
        g(static_cast<const T*>(p.g) + b * p.M),
        N(p.N),
        M(p.M),
        inverse_epsilon(1 / static_cast<const T*>(p.epsilon)[b]) {}

  PK_MEMBER Vec<T> at(int64_t i, int64_t j) const {
    const Vec<T> absent = broadcast(-INFINITE<T>), column = load_part(g + j, M - j, M - j, -INFINITE<T>);
    const Vec<T> c = load_part(cost + i * M + j, M - j, (N - i) * M - j, T(0));
    return column == absent || f[i] == -INFINITE<T> ? absent : ((column - c) + f[i]) * inverse_epsilon;
  }
};

void plan(const SinkhornPlan& p, int64_t first_row, int64_t last_row) {
  with_type(p.kind, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t row = first_row; row < last_row;) {
      const int64_t b = row / p.N, before = b * p.N, end = std::min(last_row, before + p.N);
      const LogPlan<T> log_plan(p, b);
      for (; row < end; ++row)
        for (int64_t j = 0; j < p.M; j += LANES<T>)
          store_part(static_cast<T*>(p.plan) + row * p.M + j, exp_any<T>(log_plan.at(row - before, j)), p.M - j);
    }
  });
}

// Column sums of every chunk, and one number of every chunk.
template <class T>
struct Partial {
  SinkhornChunks chunks;
  int64_t stride;
  T* columns;      // [chunks, stride]
  double* totals;  // [chunks]

  Partial(int64_t N, int64_t M, Arena& arena) : chunks(sinkhorn_chunks(N, M)), stride(round_up(M, LANES<T>)) {
    columns = arena.take<T>(chunks.count * stride);
    totals = arena.take<double>(chunks.count);
  }
  double total() const {
    double sum = 0;
    for (int64_t c = 0; c < chunks.count; ++c) sum += totals[c];
    return sum;
  }
};

template <class T>
void backward_of(const SinkhornPlanBackward& p, int64_t b, Arena arena, SinkhornEach each) {
  const Partial<T> partial(p.N, p.M, arena);
  const LogPlan<T> log_plan(p, b);
  const T *const grad = static_cast<const T*>(p.grad_plan) + b * p.N * p.M, *const given = static_cast<const T*>(p.plan) + b * p.N * p.M;
  T *const grad_cost = static_cast<T*>(p.grad_cost) + b * p.N * p.M, *const grad_f = static_cast<T*>(p.grad_f) + b * p.N;
  for_chunks(each, partial.chunks.count, [&](int64_t chunk) {
    T* const columns = partial.columns + chunk * partial.stride;
    std::fill(columns, columns + partial.stride, T(0));
    double total = 0;
    for (int64_t i = chunk * partial.chunks.rows; i < std::min(p.N, (chunk + 1) * partial.chunks.rows); ++i) {
      Vec<T> row{}, weighted{};
      for (int64_t j = 0; j < p.M; j += LANES<T>) {
        const int64_t at = i * p.M + j, left = p.M - j, readable = (p.N - i) * p.M - j;
        const Vec<T> none{}, mass = load_part(given + at, left, readable, T(0));
        const Vec<T> gamma = mass == none ? none : mass * load_part(grad + at, left, readable, T(0)) * log_plan.inverse_epsilon;
        row += gamma;
        weighted += mass == none ? none : gamma * log_plan.at(i, j);
        store(columns + j, load(columns + j) + gamma);
        store_part(grad_cost + at, -gamma, left);
      }
      grad_f[i] = reduce_sum(row);
      total -= reduce_sum(weighted);
    }
    partial.totals[chunk] = total;
  });
  add_chunks(partial.columns, partial.stride, partial.chunks.count);
  std::copy(partial.columns, partial.columns + p.M, static_cast<T*>(p.grad_g) + b * p.M);
  static_cast<T*>(p.grad_epsilon)[b] = static_cast<T>(partial.total());
}

template <class T>
void envelope_of(const SinkhornEnvelope& p, int64_t b, Arena arena, SinkhornEach each) {
  const Partial<T> partial(p.N, p.M, arena);
  const SinkhornChunks chunks = partial.chunks;
  const LogPlan<T> log_plan(p, b);
  const T e = static_cast<const T*>(p.grad_entropic_value)[b];
  T* const grad_cost = static_cast<T*>(p.grad_cost) + b * p.N * p.M;
  for_chunks(each, chunks.count, [&](int64_t chunk) {
    double total = 0;
    for (int64_t i = chunk * chunks.rows; i < std::min(p.N, (chunk + 1) * chunks.rows); ++i) {
      Vec<T> sum{};
      for (int64_t j = 0; j < p.M; j += LANES<T>) {
        const Vec<T> none{}, log_mass = log_plan.at(i, j), mass = exp_any<T>(log_mass);
        sum += mass == none ? none : mass * (log_mass - T(1));
        store_part(grad_cost + i * p.M + j, mass * e, p.M - j);
      }
      total += reduce_sum(sum);
    }
    partial.totals[chunk] = total;
  });
  static_cast<T*>(p.grad_epsilon)[b] = static_cast<T>(e * partial.total());
}

template <class T, class Problem>
int64_t partial_bytes(const Problem& p) {
  Arena arena(nullptr);
  Partial<T>(p.N, p.M, arena);
  return arena.bytes();
}

int64_t backward_scratch(const SinkhornPlanBackward& p) {
  return with_type(p.kind, [&](auto zero) { return partial_bytes<decltype(zero)>(p); });
}

void backward(const SinkhornPlanBackward& p, int64_t b, void* scratch, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) { backward_of<decltype(zero)>(p, b, Arena(scratch), each); });
}

int64_t envelope_scratch(const SinkhornEnvelope& p) {
  return with_type(p.kind, [&](auto zero) { return partial_bytes<decltype(zero)>(p); });
}

void envelope(const SinkhornEnvelope& p, int64_t b, void* scratch, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) { envelope_of<decltype(zero)>(p, b, Arena(scratch), each); });
}

}  // namespace

namespace protokernels {

extern const SinkhornPlanCpu PK_LEVEL_TABLE(sinkhorn_plan_cpu);
const SinkhornPlanCpu PK_LEVEL_TABLE(sinkhorn_plan_cpu) = {plan, backward_scratch, backward, envelope_scratch, envelope};

}  // namespace protokernels
