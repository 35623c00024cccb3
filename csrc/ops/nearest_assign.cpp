// SPDX-License-Identifier: MIT
// Nearest, the torch side of an iteration of k-means: checks that protect memory, allocation, chunks, registration. On CUDA the operator is put
// together from nearest_search and prototypes_accumulate, in protokernels/ops/nearest.py.
#include <algorithm>
#include <tuple>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "common/torch_utils.h"
#include "ops/nearest.h"

namespace protokernels {

PK_DECLARE_LEVELS(NearestAssignCpu, nearest_assign_cpu);
const NearestAssignCpu& nearest_assign_cpu() { return PK_CHOOSE_LEVEL(nearest_assign_cpu); }

namespace {

constexpr double SERIAL_WORK = 1.5e6;  // about 30 microseconds, in multiply-adds: below it a second thread costs more than it brings

std::tuple<Tensor, Tensor, Tensor, Tensor> assign_cpu(Tensor x_any, Tensor centers_any, bool with_sums, bool with_distances) {
  const Tensor x = with_dense_rows(x_any), centers = torch::stable::contiguous(centers_any);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && centers.dim() == 2 && x.size(1) == centers.size(1) && x.size(1) > 0 && centers.size(0) > 0,
                  "nearest_assign: x [N, D] and centers [K, D], D and K at least 1, do not fit");
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && centers.scalar_type() == type,
                  "nearest_assign: x and centers must both be float32 or both float64");
  NearestAssign p{x.size(0), centers.size(0), x.size(1), x.data_ptr(), x.stride(0), centers.data_ptr(), type == ScalarType::Double,
                  nullptr,   nullptr};
  Tensor labels = empty_beside(x, {p.N}, ScalarType::Long), distances = empty_beside(x, {with_distances ? p.N : 0}, type);
  Tensor sums = empty_beside(x, {with_sums ? p.K : 0, p.D}, ScalarType::Double);
  Tensor counts = empty_beside(x, {with_sums ? p.K : 0}, ScalarType::Long);
  p.labels = static_cast<int64_t*>(labels.data_ptr());
  p.distances = with_distances ? distances.data_ptr() : nullptr;
  const NearestAssignCpu& cpu = nearest_assign_cpu();
  const PrototypesChunks chunks = prototypes_chunks(p.N, p.K, p.D);
  const Tensor packed = empty_beside(x, {cpu.center_elements(p)}, type);
  const Tensor partial_sums = empty_beside(x, {with_sums ? chunks.count * p.K * p.D : 0}, ScalarType::Double);
  const Tensor partial_counts = empty_beside(x, {with_sums ? chunks.count * p.K : 0}, ScalarType::Long);
  double* const sums_data = with_sums ? static_cast<double*>(partial_sums.data_ptr()) : nullptr;
  int64_t* const counts_data = with_sums ? static_cast<int64_t*>(partial_counts.data_ptr()) : nullptr;
  cpu.pack(p, packed.data_ptr());
  const double work = static_cast<double>(p.N) * static_cast<double>(p.K + 8) * static_cast<double>(p.D + 8);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(chunks.count) * SERIAL_WORK / std::max(work, 1.0)));
  if (chunks.count > 0)
    parallel_for(0, chunks.count, grain,
                 [&](int64_t begin, int64_t end) { cpu.assign(p, packed.data_ptr(), chunks, sums_data, counts_data, begin, end); });
  if (with_sums) {
    const double of_one = static_cast<double>(p.D) * static_cast<double>(chunks.count) * 4;
    parallel_for(0, p.K, std::max<int64_t>(1, static_cast<int64_t>(SERIAL_WORK / std::max(of_one, 1.0))), [&](int64_t first, int64_t last) {
      prototypes_cpu().finish_sums(p.K, p.D, chunks, sums_data, counts_data, static_cast<double*>(sums.data_ptr()),
                                   static_cast<int64_t*>(counts.data_ptr()), first, last);
    });
  }
  return {labels, sums, counts, distances};
}

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("nearest_assign", TORCH_BOX(&assign_cpu));
}
