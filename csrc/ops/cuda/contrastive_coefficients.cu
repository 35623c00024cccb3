// SPDX-License-Identifier: MIT
// The derivative of losses by the statistics of rows, on the GPU. The equations stand in ops/contrastive.h.

#include "common/simt.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {

constexpr int COEFFICIENT_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(COEFFICIENT_THREADS) coefficients_kernel(const ContrastiveCoefficients p) {
  pk::let_next_begin();
  pk::wait_for_previous();
  const int64_t R = p.R, row = static_cast<int64_t>(blockIdx.x) * COEFFICIENT_THREADS + threadIdx.x;
  if (row >= R) return;
  const T* const statistics = static_cast<const T*>(p.statistics);
  T* const out = static_cast<T*>(p.coefficients);
  const ContrastiveForm form = p.form;
  const ContrastiveRange* const ranges = p.ranges;
  const T p_log = statistics[row], n = statistics[R + row], l = statistics[2 * R + row];
  T g = p.grad_losses ? static_cast<const T*>(p.grad_losses)[row] : T(0);
  if (p.grad_total) g += static_cast<T>(static_cast<double>(*static_cast<const T*>(p.grad_total)) * p.weights[row]);
  const ContrastiveRange range = range_at(ranges, static_cast<int>(row));
  const bool anchor = p_log != -T(INFINITY) || l != 0;  // where all scores of its class are -infinity, so is their sum
  const int positives = anchor ? positives_of(range) : 0;
  const bool others = anchor && meets_others(p.groups, static_cast<int>(p.G), static_cast<int>(row), range, n);
  T dp = 0, dn = 0, dl = 0;
  if (has_loss(form, positives, others) && !is_certain(positives, others)) {
    const T count = static_cast<T>(positives);
    // exp(p) and exp(n) as shares of their sum
    const T of_n = n == -T(INFINITY) ? T(0) : T(1) / (T(1) + exponential(p_log - n)), of_p = T(1) / (T(1) + exponential(n - p_log));
    switch (form) {
      case ContrastiveForm::supcon: dp = g * of_p, dn = g * of_n, dl = -g / count; break;
      case ContrastiveForm::in: dp = -g * of_n, dn = g * of_n; break;
      case ContrastiveForm::paper: dp = -g / count, dn = g / count; break;
      default: dn = g, dl = -g / count;
    }
  }
  out[row] = dp, out[R + row] = dn, out[2 * R + row] = dl;
}

template <class T>
int coefficients(const ContrastiveCoefficients& p, void* stream) {
  const unsigned blocks = static_cast<unsigned>((p.R + COEFFICIENT_THREADS - 1) / COEFFICIENT_THREADS);
  return PK_LAUNCH_BEHIND((coefficients_kernel<T>), dim3(blocks), dim3(COEFFICIENT_THREADS), 0, stream, p);
}

}  // namespace

namespace protokernels {

int launch_contrastive_coefficients(const ContrastiveCoefficients& p, void* stream) {
  if (p.R == 0) return 0;
  return p.double_compute ? coefficients<double>(p, stream) : coefficients<float>(p, stream);
}

}  // namespace protokernels
