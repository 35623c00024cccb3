// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU from features: the envelope gradient of the entropic value, block by block. The equations stand in ops/sinkhorn.h.
//
// Each cloud gathers the points of the other under the plan; the plan is made twice, once a cloud, which costs less than keeping partial sums of
// [M, D] for every chunk of rows, and needs no order. Limit: 8 N M D flop.

#include "ops/cpu/sinkhorn_clouds.h"

namespace {

constexpr int64_t DEPTH = 512;  // of the products with the plan: their panels stay in L2

template <class T>
struct CloudGradient {
  const SinkhornFeaturesBackward& p;
  int64_t b;
  Pair<T> pair;
  T* value_panels;  // packed [points, D]

  CloudGradient(const SinkhornFeaturesBackward& problem, int64_t index, Arena& arena, SinkhornEach each) : p(problem), b(index) {
    pair.layout(p.N, p.M, p.D, arena);
    value_panels = arena.take<T>(std::max(pair.x.padded, pair.y.padded) * round_up(p.D, LANES<T>));
    if (arena.counts_only()) return;
    const T epsilon = static_cast<const T*>(p.epsilon)[b];
    pair.each = each, pair.cosine = p.cosine, pair.epsilon = epsilon, pair.inverse_epsilon = 1 / epsilon;
    read_potentials(pair.x, static_cast<const T*>(p.f) + b * p.N);
    read_potentials(pair.y, static_cast<const T*>(p.g) + b * p.M);
    pair.prepare(static_cast<const T*>(p.x) + b * p.N * p.D, static_cast<const T*>(p.y) + b * p.M * p.D);
  }

  void read_potentials(Cloud<T>& cloud, const T* source) {
    for (int64_t i = 0; i < cloud.padded; ++i) {
      cloud.potential[i] = i < cloud.count ? source[i] * pair.inverse_epsilon : -INFINITE<T>;
      cloud.active[i] = cloud.potential[i] == -INFINITE<T> ? T(0) : T(1);
    }
  }

  // Gradient of the points of one cloud: P times the points of the other. Returns sum P (log P - 1).
  double gather(const Cloud<T>& rows, const Cloud<T>& columns, T grad, T* out) {
    const int64_t width = Pair<T>::vectors(columns), D_padded = round_up(p.D, LANES<T>);
    pack_panels(columns.points, p.D, 1, columns.count, p.D, value_panels);
    const auto body = [&](int64_t begin, int64_t end, T* products, T*, double* totals) {
      const int64_t height = round_up(end - begin, TILE_ROWS);
      Buffer<T> gathered(height * D_padded), marginal(height);
      for (int64_t i = begin; i < begin + height; ++i) {
        T* const row = products + (i - begin) * columns.padded;
        Vec<T> sum{}, entropy{};
        const bool present = i < end && rows.active[i] != T(0);
        for (int64_t j = 0; j < width; j += LANES<T>) {
          const Vec<T> none{}, log_plan = present ? pair.score(columns, load(row + j), rows.bias[i], j) + rows.potential[i] : none;
          const Vec<T> plan = present ? exp_any<T>(log_plan) : none;
          sum += plan;
          entropy += plan == none ? none : plan * (log_plan - T(1));
          store(row + j, plan);
        }
        marginal.data[i - begin] = reduce_sum(sum);
        totals[0] += reduce_sum(entropy);
      }
      for (int64_t k = 0; k < columns.count; k += DEPTH)
        for (int64_t d = 0; d < D_padded; d += 2 * LANES<T>) {
          const bool narrow = D_padded - d < 2 * LANES<T>;
          const int64_t panel = narrow ? LANES<T> : 2 * LANES<T>, depth = std::min(DEPTH, columns.count - k);
          const T* const values = value_panels + d * columns.count + k * panel;
          for (int64_t i = 0; i < height; i += TILE_ROWS) {
            const T* const plan = products + i * columns.padded + k;
            T* const sums = gathered.data + i * D_padded + d;
            if (narrow)
              tile_product<T, 1>(plan, columns.padded, 1, values, panel, depth, sums, D_padded, k > 0);
            else
              tile_product<T, 2>(plan, columns.padded, 1, values, panel, depth, sums, D_padded, k > 0);
          }
        }
      for (int64_t i = begin; i < end; ++i)
        write_gradient(rows, i, grad, marginal.data[i - begin], gathered.data + (i - begin) * D_padded, out + i * p.D);
    };
    return pair.over_blocks(rows, columns, body)[0];
  }

  void write_gradient(const Cloud<T>& rows, int64_t i, T grad, T marginal, const T* gathered, T* out) const {
    const T* const x = rows.points + i * p.D;
    T along = 0;
    if (pair.cosine)
      for (int64_t d = 0; d < p.D; ++d) along += x[d] * gathered[d];
    for (int64_t d = 0; d < p.D; ++d)
      out[d] = pair.cosine ? -grad * rows.inverse_norm[i] * (gathered[d] - along * x[d]) : 2 * grad * (marginal * x[d] - gathered[d]);
  }

  void run() {
    T *const grad_x = static_cast<T*>(p.grad_x) + b * p.N * p.D, *const grad_y = static_cast<T*>(p.grad_y) + b * p.M * p.D;
    T& grad_epsilon = static_cast<T*>(p.grad_epsilon)[b];
    if (p.grad_entropic_value == nullptr) {
      std::fill(grad_x, grad_x + p.N * p.D, T(0)), std::fill(grad_y, grad_y + p.M * p.D, T(0));
      grad_epsilon = 0;
      return;
    }
    const T grad = static_cast<const T*>(p.grad_entropic_value)[b];
    grad_epsilon = static_cast<T>(grad * gather(pair.x, pair.y, grad, grad_x));
    gather(pair.y, pair.x, grad, grad_y);
  }
};

int64_t backward_scratch(const SinkhornFeaturesBackward& p) { return scratch_bytes<CloudGradient>(p); }

void backward(const SinkhornFeaturesBackward& p, int64_t b, void* scratch, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) {
    Arena arena(scratch);
    CloudGradient<decltype(zero)>(p, b, arena, each).run();
  });
}

}  // namespace

namespace protokernels {

extern const SinkhornFeaturesGradientCpu PK_LEVEL_TABLE(sinkhorn_features_gradient_cpu);
const SinkhornFeaturesGradientCpu PK_LEVEL_TABLE(sinkhorn_features_gradient_cpu) = {backward_scratch, backward};

}  // namespace protokernels
