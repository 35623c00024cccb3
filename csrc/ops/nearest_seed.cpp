// SPDX-License-Identifier: MIT
// Nearest, the torch side of a round of k-means++: checks that protect memory, allocation, chunks, registration. On CUDA the operator is
// the reference, see protokernels/ops/nearest.py.
#include <algorithm>
#include <tuple>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/torch_utils.h"
#include "ops/nearest.h"

namespace protokernels {

PK_DECLARE_LEVELS(NearestSeedCpu, nearest_seed_cpu);
const NearestSeedCpu& nearest_seed_cpu() { return PK_CHOOSE_LEVEL(nearest_seed_cpu); }

namespace {

constexpr double SERIAL_WORK = 1.5e6;  // about 30 microseconds, in multiply-adds: below it a second thread costs more than it brings

std::tuple<Tensor, Tensor> seed_cpu(Tensor x_any, Tensor candidates_any, Tensor closest_any) {
  const Tensor x = with_dense_rows(x_any), candidates = torch::stable::contiguous(candidates_any);
  const Tensor closest = torch::stable::contiguous(closest_any);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && candidates.dim() == 2 && closest.dim() == 1 && x.size(1) == candidates.size(1) && x.size(1) > 0 &&
                      closest.size(0) == x.size(0),
                  "nearest_seed: x [N, D], candidates [K, D], D at least 1, and closest [N] do not fit");
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::Double) && candidates.scalar_type() == type && closest.scalar_type() == type,
      "nearest_seed: x, candidates and closest must all be float32 or all float64");
  const int64_t N = x.size(0), K = candidates.size(0), D = x.size(1);
  const Tensor closer = empty_beside(x, {K, N}, type), totals = empty_beside(x, {K}, ScalarType::Double);
  const NearestSeed p{
      N, K, D, x.data_ptr(), x.stride(0), candidates.data_ptr(), closest.data_ptr(), type == ScalarType::Double, closer.data_ptr()};
  const int64_t chunks = (N + NEAREST_SEED_ROWS - 1) / NEAREST_SEED_ROWS;
  const Tensor partial = empty_beside(x, {chunks, K}, ScalarType::Double);
  double* const parts = static_cast<double*>(partial.data_ptr());
  const double of_one = static_cast<double>(NEAREST_SEED_ROWS) * static_cast<double>(K + 1) * static_cast<double>(D + 1);
  const NearestSeedCpu& cpu = nearest_seed_cpu();
  if (chunks > 0)
    parallel_for(0, chunks, std::max<int64_t>(1, static_cast<int64_t>(SERIAL_WORK / of_one)),
                 [&](int64_t begin, int64_t end) { cpu.seed(p, parts, begin, end); });
  double* const sums = static_cast<double*>(totals.data_ptr());
  std::fill(sums, sums + K, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t k = 0; k < K; ++k) sums[k] += parts[chunk * K + k];
  return {closer, totals};
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("nearest_seed", TORCH_BOX(&seed_cpu));
}
