// SPDX-License-Identifier: MIT
// The unrolled gradient of balanced Sinkhorn in float on the GPU, problems of up to 64 x 64: one block, one launch. The equations stand in
// ops/sinkhorn.h.
//
// With K = exp(alpha_i + beta_j - C_ij / eps), held as in the forward kernel by rows and by columns, the two softmaxes of an iteration are
// S = K sr_i sc_j and R = K rr_i rc_j: four exponentials per row and column, two products and two operations per entry on the gradient of
// C / eps, which stays K times what has been added up since K was made. Where a factor would leave exp(+-30) K is made anew from the
// potentials of the softmax that needs it; whether one does is known an iteration ahead and decided in barriers that are there anyway.
// Limit on an H200 (measured): latency. 64 x 49 x 49, 100 iterations: 80 us.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_adjoint.cuh"
#include "ops/cuda/sinkhorn_scaled.cuh"

namespace {

constexpr float FAR = 30.0f;

// What the history holds for the own row and the own column; -infinity: absent.
struct Potential {
  float u, v;
};

template <class Layout>
struct Shared {
  typename Layout::Shared layout;
  float before[2][Layout::LINES];  // rc, of even and of odd iterations
  float sums[Layout::THREADS / 32];
};

template <class Layout>
struct Back {
  static constexpr int ENTRIES = 4 * Layout::CHUNKS;
  const Backward<float>& p;
  Shared<Layout>& shared;
  Layout layout;
  const int64_t problem;
  const int steps, i, j;  // i, j: the own row and column
  const float epsilon;
  const bool has_row, has_column;
  float log_a, log_b, alpha, beta, u_bar, v_bar, a_bar, b_bar, epsilon_bar;
  float kept[ENTRIES], added[ENTRIES];  // of the own row: M_bar = kept - K added

  __device__ __forceinline__ Back(const Backward<float>& arguments, Shared<Layout>& memory)
      : p(arguments),
        shared(memory),
        layout(memory.layout, p.N, p.M, p.cost, p.epsilon[blockIdx.x]),
        problem(blockIdx.x),
        steps(static_cast<int>(p.iterations[problem])),
        i(layout.own_row),
        j(layout.own_column),
        epsilon(p.epsilon[problem]),
        has_row(i < p.N),
        has_column(j < p.M),
        log_a(0),
        log_b(0),
        a_bar(0),
        b_bar(0),
        epsilon_bar(0) {
    if (has_row) log_a = logf(p.a[problem * p.N + i]);
    if (has_column) log_b = logf(p.b[problem * p.M + j]);
  }
  // After iteration t; at t = -1 before the first.
  __device__ __forceinline__ Potential at(int t) const {
    const float* const line = p.history + (problem * p.num_iters + t) * (p.N + p.M);
    if (t >= 0) return {has_row ? line[i] : -INFINITY, has_column ? line[p.N + j] : -INFINITY};
    const bool present = has_column && alive(log_b);
    return {-INFINITY, !present ? -INFINITY : p.g_init ? p.g_init[problem * p.M + j] / epsilon : 0.0f};
  }
  static __device__ __forceinline__ bool far(float potential, float log_mass, float base) {
    return alive(potential) && !(fabsf(potential - log_mass - base) <= FAR);
  }
  __device__ __forceinline__ void build(float of_row, float of_column) {
    layout.put_column_base(of_column);
    layout.put_row_base(of_row);
    layout.fill();
    layout.exponentiate();
    __syncthreads();
  }
  // K from the potentials; what was added up for the one before goes to kept.
  __device__ __forceinline__ void renew(float u, float v) {
#pragma unroll
    for (int x = 0; x < ENTRIES; ++x) kept[x] -= layout.by_rows[0][x] * added[x], added[x] = 0;
    alpha = alive(u) ? u - log_a : -INFINITY, beta = alive(v) ? v - log_b : -INFINITY;
    build(alpha, beta);
  }

  // Gamma and its sums, and what the potentials give to epsilon.
  __device__ __forceinline__ void begin(const Potential& last) {
    const float tc = p.transport_gradient(), entropic = p.entropic_gradient();
    const auto gamma = [&](float plan, float u, float v, float c) {
      return plan == 0 ? 0.0f : plan * (tc * c + entropic * epsilon * (u + v));
    };
    build(last.u, last.v);
#pragma unroll
    for (int x = 0; x < ENTRIES; ++x) {
      const int other = layout.across(x / 4) + x % 4;
      const float plan = layout.by_rows[0][x], c = shared.layout.cost[i * Layout::STRIDE + other], v = shared.layout.column_base[other];
      if (plan != 0) epsilon_bar += entropic * plan * (scaled(v, c, layout.inverse_epsilon) + last.u - 1);
      layout.by_rows[0][x] = kept[x] = gamma(plan, last.u, v, c);
      layout.by_columns[0][x] =
          gamma(layout.by_columns[0][x], shared.layout.row_base[other], last.v, shared.layout.cost[other * Layout::STRIDE + i]);
      added[x] = 0;
    }
    layout.put_row(1.0f);
    layout.put_column(1.0f);
    u_bar = layout.row_product(), v_bar = layout.column_product();
    if (has_row && alive(last.u)) {
      u_bar += epsilon * p.row_gradient(i);
      if (layout.speaks_for_row()) epsilon_bar += p.row_gradient(i) * last.u;
    }
    if (has_column && alive(last.v)) {
      v_bar += epsilon * p.column_gradient(j);
      if (layout.speaks_for_column()) epsilon_bar += p.column_gradient(j) * last.v;
    }
  }

  // added += x s_j, s by columns in shared memory.
  __device__ __forceinline__ void add(float x, const float* s) {
#pragma unroll
    for (int t = 0; t < Layout::CHUNKS; ++t) {
      const float4 y = pk::load_vector<float4>(s + layout.across(t));
      added[4 * t] += x * y.x, added[4 * t + 1] += x * y.y, added[4 * t + 2] += x * y.z, added[4 * t + 3] += x * y.w;
    }
  }
  // One iteration back, on a K that suits its S. Returns whether the next one needs another.
  __device__ __forceinline__ bool step(int t, const Potential& now, const Potential& next) {
    float* const before = shared.before[t % 2];
    const bool row_alive = alive(now.u), column_alive = alive(now.v), both = column_alive && alive(next.v);
    float rc = both ? expf(next.v - beta) : 0.0f;
    b_bar += column_alive ? v_bar : 0.0f;
    if (layout.part == 0) {
      shared.layout.column_weight[j] = column_alive ? expf(now.v - log_b - beta) * v_bar : 0.0f;
      before[j] = rc;
    }
    const bool far_for_r = __syncthreads_or(both && far(next.v, log_b, beta));
    const float sr = row_alive ? expf(now.u - alpha) : 0.0f, product = layout.row_product(), z = row_alive ? u_bar - sr * product : 0.0f;
    a_bar += z, u_bar = 0;
    add(sr, shared.layout.column_weight);
    if (far_for_r) {
      renew(now.u, both ? next.v : -INFINITY);
      rc = both ? expf(next.v - beta) : 0.0f;
      if (layout.part == 0) before[j] = rc;
    }
    const float y = row_alive ? expf(now.u - log_a - alpha) * z : 0.0f;
    if (layout.part == 0) shared.layout.row_weight[i] = y;
    const bool far_for_s = __syncthreads_or(t > 0 && (far(next.u, log_a, alpha) || far(next.v, log_b, beta)));
    v_bar = -rc * layout.column_product();
    add(y, before);
    return far_for_s;
  }

  __device__ __forceinline__ void finish(const Potential& last, const Potential& start) {
    const float values = p.transport_gradient() + p.entropic_gradient(), inverse = layout.inverse_epsilon;
    if (p.g_init && layout.speaks_for_column() && alive(start.v)) epsilon_bar -= v_bar * start.v * inverse;
    layout.put_column_base(last.v);
#pragma unroll
    for (int x = 0; x < ENTRIES; ++x) {  // through the place of the costs, to be written in order
      const int other = layout.across(x / 4) + x % 4;
      float& place = shared.layout.cost[i * Layout::STRIDE + other];
      const float m = kept[x] - layout.by_rows[0][x] * added[x], c = place;
      if (m != 0) epsilon_bar += m * c * inverse * inverse;
      place = values * expf(scaled(shared.layout.column_base[other], c, inverse) + last.u) - m * inverse;
    }
    __syncthreads();
    for (int row = threadIdx.x / 32; row < p.N; row += Layout::THREADS / 32)
      for (int column = threadIdx.x % 32; column < p.M; column += 32)
        p.grad_cost[(problem * p.N + row) * p.M + column] = shared.layout.cost[row * Layout::STRIDE + column];
    if (layout.speaks_for_row()) p.grad_a[problem * p.N + i] = alive(last.u) ? a_bar / p.a[problem * p.N + i] : 0.0f;
    if (layout.speaks_for_column()) p.grad_b[problem * p.M + j] = alive(last.v) ? b_bar / p.b[problem * p.M + j] : 0.0f;
    epsilon_bar = warp_sum(epsilon_bar);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = epsilon_bar;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total = 0;
    for (int w = 0; w < Layout::THREADS / 32; ++w) total += shared.sums[w];
    p.grad_epsilon[problem] = total;
  }
};

template <class Layout>
__global__ void __launch_bounds__(Layout::THREADS, 1) scaled_unrolled_kernel(const Backward<float> p) {
  PK_SHARED(Shared<Layout>, shared);
  Back<Layout> back(p, shared);
  const Potential last = back.at(back.steps - 1);
  Potential now = last, next = back.at(back.steps - 2), second = back.at(back.steps > 2 ? back.steps - 3 : -1);
  back.begin(last);
  bool far = true;
#pragma unroll 1
  for (int t = back.steps - 1; t >= 0; --t) {
    const Potential third = back.at(t > 2 ? t - 3 : -1);  // on its way for three iterations
    if (far) back.renew(now.u, now.v);
    far = back.step(t, now, next);
    if (t == 0) break;
    now = next, next = second, second = third;
  }
  back.finish(last, next);
}

template <class Layout>
int walk_back(const SinkhornBackward& p, void* stream) {
  return PK_LAUNCH((scaled_unrolled_kernel<Layout>), dim3(static_cast<unsigned>(p.B)), dim3(Layout::THREADS), 0, stream,
                   Backward<float>(p));
}

}  // namespace

namespace protokernels {

int launch_scaled_unrolled(const SinkhornBackward& p, void* stream) {
  const int64_t side = p.N > p.M ? p.N : p.M;
  if (side <= 32) return walk_back<Twice<32, 32, 1, 1>>(p, stream);
  if (side <= 56) return walk_back<Twice<64, 56, 1, 2>>(p, stream);
  return walk_back<Twice<64, 64, 1, 2>>(p, stream);
}

}  // namespace protokernels
