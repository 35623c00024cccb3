// SPDX-License-Identifier: MIT
// Sinkhorn: entropic optimal transport, batched, in the log domain (Cuturi 2013; unbalanced: Chizat et al. 2018).
//
//   u_i <- lambda_a (log a_i - log sum_j exp(v_j - C_ij / epsilon))        rows first, from v = g_init / epsilon, or 0
//   v_j <- lambda_b (log b_j - log sum_i exp(u_i - C_ij / epsilon))        columns last: their marginal is exact
//   f = epsilon u, g = epsilon v, P_ij = exp((f_i + g_j - C_ij) / epsilon), p = P 1, q = P^T 1
//   lambda = rho / (rho + epsilon), which is 1 for rho = infinity (balanced)
//   transport cost <P, C>; entropic value <P, C> + epsilon sum P (log P - 1), which is <f, p> + <g, q> - epsilon sum P;
//   unbalanced adds rho_a KL(p | a) + rho_b KL(q | b), KL(p | q) = sum p log(p / q) - p + q
//
// Degenerate: v starts at -infinity where b_j = 0. A sum over nothing (no mass, all pairs forbidden by C = +infinity) gives the potential
// -infinity and a row or column of P that is 0; where that entry had mass, the problem is not feasible. Products with P = 0 are 0.
//
// Unrolled backward, from t = the last iteration down to 1 (papers: K2), S and R being softmaxes over the rows and over the columns:
//   Gamma = P (tc C + e (C + epsilon log P + rho_a log(p_i / a_i) + rho_b log(q_j / b_j)))     tc, e: gradients of the two values
//   M_bar = Gamma, u_bar = Gamma 1 + epsilon f_bar, v_bar = Gamma^T 1 + epsilon g_bar
//   w = lambda_b v_bar: log b_bar += w, M_bar -= S w, u_bar -= S w, S_ij = exp(u^t_i - C_ij / epsilon - LSE_j)
//   z = lambda_a u_bar: log a_bar += z, M_bar -= R z, v_bar = -R^T z, u_bar = 0, R_ij = exp(v^(t-1)_j - C_ij / epsilon - LSE_i)
//   C_bar = -M_bar / epsilon + (tc + e) P, a_bar = log a_bar / a + e rho_a (1 - p / a), likewise b_bar (rho: unbalanced only),
//   epsilon_bar = sum M_bar C / epsilon^2 + f_bar . u + g_bar . v + e sum P (log P - 1)
//                 - sum v^0_bar v^0 / epsilon - sum over t of (v_bar . v / (rho_b + epsilon) + u_bar . u / (rho_a + epsilon))
// Implicit backward (balanced), Gamma without e:
//   [diag(p) P; P^T diag(q)] [x; y] = [Gamma 1 + epsilon f_bar; Gamma^T 1 + epsilon g_bar], M_bar = Gamma - P (x_i + y_j), a_bar = x, b_bar = y
//   Shifting f against g changes nothing: the right side loses s p in its rows and -s q in its columns, with
//   s = (sum of rows - sum of columns) / (sum p + sum q). Of the solutions the one with sum p x = sum q y is taken. This is what a
//   pseudo-inverse does once the diagonal is scaled to 1; light entries, whose x may be 1e10 and more, leave the others as they are.
//   e adds the envelope: C_bar += e P, a_bar += e f, b_bar += e g, epsilon_bar += e sum P (log P - 1).
//
// Shapes: C [B, N, M], a [B, N], b [B, M], epsilon [B]. Cost of an iteration: 4 flop and one read of a kernel matrix element; the exponential is
// taken when that matrix is made, not in the loop. Forward saves f, g and, for the unrolled gradient, u^t and v^t of every iteration.
#pragma once

#include <cstdint>

#include "common/kind.h"

namespace protokernels {

constexpr double SINKHORN_NORM_FLOOR = 1e-12;     // cosine: a shorter vector counts as zero
constexpr double SINKHORN_MASS_TOLERANCE = 1e-4;  // balanced masses that differ more, relative to the larger, are not feasible

// Everything floating is of kind, f32 or f64, and contiguous.
struct SinkhornProblem {
  int64_t B, N, M;
  Kind kind;
  const void* cost;     // [B, N, M]; +infinity: forbidden
  const void* a;        // [B, N]
  const void* b;        // [B, M]
  const void* epsilon;  // [B]
  const void* g_init;   // [B, M] or null: 0
  double rho_a, rho_b;  // infinity: balanced
};

struct SinkhornForward : SinkhornProblem {
  int64_t num_iters;
  double tolerance;      // 0: all iterations run
  void* f;               // [B, N]
  void* g;               // [B, M]
  void* transport_cost;  // [B]
  void* entropic_value;  // [B]
  void* marginal_error;  // [B]: |P 1 - a|_1 + |P^T 1 - b|_1, or, where a rho is finite, sum_i a_i |u_i - u_i of one more half-step|
  int64_t* iterations;   // [B]
  bool* feasible;        // [B]
  void* history;         // [B, num_iters, N + M]: (u, v) after every iteration; or null
};

struct SinkhornBackward : SinkhornProblem {
  bool implicit;
  const void* f;                    // [B, N]
  const void* g;                    // [B, M]
  const int64_t* iterations;        // [B]
  const void* history;              // [B, num_iters, N + M], or null: implicit
  int64_t num_iters;                // rows of the history of one problem
  const void* grad_f;               // [B, N] or null
  const void* grad_g;               // [B, M] or null
  const void* grad_transport_cost;  // [B] or null
  const void* grad_entropic_value;  // [B] or null
  void* grad_cost;                  // [B, N, M]
  void* grad_a;                     // [B, N]
  void* grad_b;                     // [B, M]
  void* grad_epsilon;               // [B]
};

// P from the potentials.
struct SinkhornPlan {
  int64_t B, N, M;
  Kind kind;
  const void* cost;     // [B, N, M]
  const void* f;        // [B, N]
  const void* g;        // [B, M]
  const void* epsilon;  // [B]
  void* plan;           // [B, N, M]
};

// Gamma = grad_plan P: grad_cost = -Gamma / epsilon, grad_f = Gamma 1 / epsilon, grad_g = Gamma^T 1 / epsilon,
// grad_epsilon = -sum Gamma log P / epsilon.
struct SinkhornPlanBackward {
  int64_t B, N, M;
  Kind kind;
  const void* grad_plan;  // [B, N, M]
  const void* plan;       // [B, N, M]
  const void* cost;       // [B, N, M]
  const void* f;          // [B, N]
  const void* g;          // [B, M]
  const void* epsilon;    // [B]
  void* grad_cost;        // [B, N, M]
  void* grad_f;           // [B, N]
  void* grad_g;           // [B, M]
  void* grad_epsilon;     // [B]
};

// The entropic value alone: grad_cost = e P, grad_epsilon = e sum P (log P - 1).
struct SinkhornEnvelope {
  int64_t B, N, M;
  Kind kind;
  const void* cost;                 // [B, N, M]
  const void* f;                    // [B, N]
  const void* g;                    // [B, M]
  const void* epsilon;              // [B]
  const void* grad_entropic_value;  // [B]
  void* grad_cost;                  // [B, N, M]
  void* grad_epsilon;               // [B]
};

// C_ij = |x_i - y_j|^2 as |x|^2 + |y|^2 - 2 <x, y>, not below 0; or 1 - cos(x_i, y_j). Never stored: memory is linear in N + M.
struct SinkhornFeatures {
  int64_t B, N, M, D;
  Kind kind;
  bool cosine;
  const void* x;        // [B, N, D]
  const void* y;        // [B, M, D]
  const void* a;        // [B, N]
  const void* b;        // [B, M]
  const void* epsilon;  // [B]
  const void* g_init;   // [B, M] or null: 0
  double rho_a, rho_b;
  int64_t num_iters;
  double tolerance;
  bool precise;          // false: products of 11 bits where that is faster, but in the last iteration
  void* f;               // [B, N]
  void* g;               // [B, M]
  void* transport_cost;  // [B]
  void* entropic_value;  // [B]
  void* marginal_error;  // [B]
  int64_t* iterations;   // [B]
  bool* feasible;        // [B]
};

// squared: grad_x_i = 2 e (p_i x_i - sum_j P_ij y_j); cosine: t_i = -e sum_j P_ij y^_j, grad_x_i = (t_i - x^_i <x^_i, t_i>) / |x_i|; likewise
// for y with P^T. grad_epsilon = e sum P (log P - 1).
struct SinkhornFeaturesBackward {
  int64_t B, N, M, D;
  Kind kind;
  bool cosine;
  const void* x;                    // [B, N, D]
  const void* y;                    // [B, M, D]
  const void* f;                    // [B, N]
  const void* g;                    // [B, M]
  const void* epsilon;              // [B]
  const void* grad_entropic_value;  // [B] or null: all gradients are 0
  void* grad_x;                     // [B, N, D]
  void* grad_y;                     // [B, M, D]
  void* grad_epsilon;               // [B]
};

// ------------------------------------------------------------------------------------------------- CPU (csrc/ops/cpu)

// Rows of one problem are cut into chunks by shape alone; a chunk is the unit of work and of summation. rows is a multiple of 8.
struct SinkhornChunks {
  int64_t rows, count;
};
SinkhornChunks sinkhorn_chunks(int64_t N, int64_t M);

// Runs body(context, chunk) for every chunk below count, in any order and on any thread. A null pointer stands for a plain loop.
using SinkhornEach = void (*)(int64_t count, void (*body)(void* context, int64_t chunk), void* context);

// One table per instruction set and file; every function but plan does one problem b, with scratch of the given number of bytes, 64-aligned.
struct SinkhornCpu {
  const char* level;
  int64_t (*forward_scratch)(const SinkhornForward&);
  void (*forward)(const SinkhornForward&, int64_t b, void* scratch, SinkhornEach);
};

struct SinkhornPlanCpu {
  void (*plan)(const SinkhornPlan&, int64_t first_row, int64_t last_row);  // of B N rows
  int64_t (*backward_scratch)(const SinkhornPlanBackward&);
  void (*backward)(const SinkhornPlanBackward&, int64_t b, void* scratch, SinkhornEach);
  int64_t (*envelope_scratch)(const SinkhornEnvelope&);
  void (*envelope)(const SinkhornEnvelope&, int64_t b, void* scratch, SinkhornEach);
};

struct SinkhornUnrolledCpu {
  int64_t (*scratch)(const SinkhornBackward&);
  void (*backward)(const SinkhornBackward&, int64_t b, void* scratch, SinkhornEach);
};

struct SinkhornImplicitCpu {
  int64_t (*scratch)(const SinkhornBackward&);
  void (*backward)(const SinkhornBackward&, int64_t b, void* scratch, SinkhornEach);
};

struct SinkhornFeaturesCpu {
  int64_t (*chunks)(int64_t N, int64_t M);
  int64_t (*forward_scratch)(const SinkhornFeatures&);
  void (*forward)(const SinkhornFeatures&, int64_t b, void* scratch, SinkhornEach);
};

struct SinkhornFeaturesGradientCpu {
  int64_t (*scratch)(const SinkhornFeaturesBackward&);
  void (*backward)(const SinkhornFeaturesBackward&, int64_t b, void* scratch, SinkhornEach);
};

// ---------------------------------------------------------------------------------------------- CUDA (csrc/ops/cuda)

// Each returns a cudaError_t as int. Workspaces are in bytes and depend on the shape only; N, M and D are below 2^31, B N M is not.
int64_t sinkhorn_forward_workspace(const SinkhornForward&);
int launch_sinkhorn_forward(const SinkhornForward&, void* workspace, void* stream);
int64_t sinkhorn_backward_workspace(const SinkhornBackward&);
int launch_sinkhorn_backward(const SinkhornBackward&, void* workspace, void* stream);
int launch_sinkhorn_plan(const SinkhornPlan&, void* stream);
int64_t sinkhorn_plan_backward_workspace(const SinkhornPlanBackward&);
int launch_sinkhorn_plan_backward(const SinkhornPlanBackward&, void* workspace, void* stream);
int64_t sinkhorn_envelope_workspace(const SinkhornEnvelope&);
int launch_sinkhorn_envelope(const SinkhornEnvelope&, void* workspace, void* stream);
int64_t sinkhorn_features_workspace(const SinkhornFeatures&);
int launch_sinkhorn_features(const SinkhornFeatures&, void* workspace, void* stream);
int64_t sinkhorn_features_backward_workspace(const SinkhornFeaturesBackward&);
int launch_sinkhorn_features_backward(const SinkhornFeaturesBackward&, void* workspace, void* stream);

}  // namespace protokernels
