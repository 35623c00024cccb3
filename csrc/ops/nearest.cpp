// SPDX-License-Identifier: MIT
// Nearest, the torch side: checks that protect memory, allocation, the split into units, registration.
#include "ops/nearest.h"

#include <algorithm>
#include <tuple>

#include "common/cpu_level.h"
#include "common/torch_utils.h"

namespace protokernels {

PK_DECLARE_LEVELS(NearestCpu, nearest_cpu);
const NearestCpu& nearest_cpu() { return PK_CHOOSE_LEVEL(nearest_cpu); }

// Blocks of up to 512 queries, so that reading and moving a row of the bank costs little beside its products, in about a megabyte with
// their candidates; no longer than gives every thread several. With fewer blocks than threads, the bank is cut as well.
NearestUnits nearest_units(const NearestProblem& p, int64_t threads) {
  const int64_t bytes = (p.D + 3 * nearest_capacity(p.k)) * (p.double_compute ? 8 : 4);
  const int64_t fitting = std::clamp<int64_t>((int64_t{1} << 20) / bytes, 1, 512), shared = p.N / (4 * threads);
  NearestUnits units;
  units.block = std::max<int64_t>(1, std::min(fitting, shared) / 32) * 32;
  units.blocks = (p.N + units.block - 1) / units.block;
  const int64_t wanted = units.blocks > 0 ? 2 * threads / units.blocks : 1;
  const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.M / 2048));
  units.part = std::min<int64_t>((p.M + parts - 1) / parts, int64_t{1} << 30);  // rows are counted in int32 inside
  units.parts = (p.M + units.part - 1) / units.part;
  return units;
}

namespace {

constexpr double SERIAL_WORK = 1.5e6;  // about 30 microseconds, in multiply-adds: below it a second thread costs more than it brings

struct Outputs {
  Tensor distances, indices;
};

// queries, bank and the outputs must outlive it.
Outputs fill_problem(NearestProblem& p, const Tensor& queries, const Tensor& bank, int64_t k, bool cosine) {
  STD_TORCH_CHECK(queries.dim() == 2 && bank.dim() == 2 && queries.size(1) == bank.size(1) && k >= 1 && k <= bank.size(0),
                  "nearest_search: queries [N, D], bank [M, D] and k in 1..M do not fit");
  p.N = queries.size(0);
  p.M = bank.size(0);
  p.D = bank.size(1);
  p.k = k;
  p.queries = queries.data_ptr();
  p.queries_kind = kind_of(queries, "queries");
  p.queries_stride = queries.stride(0);
  p.bank = bank.data_ptr();
  p.bank_kind = kind_of(bank, "bank");
  p.bank_stride = bank.stride(0);
  p.cosine = cosine;
  p.double_compute = p.queries_kind == Kind::f64 || p.bank_kind == Kind::f64;
  Outputs out{empty_beside(queries, {p.N, k}, p.double_compute ? ScalarType::Double : ScalarType::Float),
              empty_beside(queries, {p.N, k}, ScalarType::Long)};
  p.distances = out.distances.data_ptr();
  p.indices = static_cast<int64_t*>(out.indices.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> search_cpu(Tensor queries_any, Tensor bank_any, int64_t k, bool cosine) {
  const Tensor queries = with_dense_rows(queries_any), bank = with_dense_rows(bank_any);
  NearestProblem p;
  const Outputs out = fill_problem(p, queries, bank, k, cosine);
  const NearestCpu& cpu = nearest_cpu();
  const double work = static_cast<double>(p.N) * static_cast<double>(p.M) * static_cast<double>(p.D + 8);
  const int64_t threads = work < SERIAL_WORK ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  const NearestUnits units = nearest_units(p, threads);
  const Tensor center = empty_beside(queries, {p.D + 1}, p.double_compute ? ScalarType::Double : ScalarType::Float);
  const Tensor merging = empty_beside(
      queries, {units.parts > 1 ? p.N * units.parts * k * static_cast<int64_t>(sizeof(NearestCandidate) / sizeof(int64_t)) : 0},
      ScalarType::Long);
  NearestCandidate* const candidates = units.parts > 1 ? reinterpret_cast<NearestCandidate*>(merging.data_ptr()) : nullptr;
  cpu.find_center(p, center.data_ptr());
  const auto search = [&](int64_t begin, int64_t end) { cpu.search(p, units, center.data_ptr(), candidates, begin, end); };
  const auto merge = [&](int64_t begin, int64_t end) { cpu.merge(p, units.parts, candidates, begin, end); };
  const int64_t count = units.blocks * units.parts;
  if (threads == 1) {
    search(0, count);
    if (candidates) merge(0, p.N);
  } else {
    parallel_for(0, count, 1, search);
    if (candidates) parallel_for(0, p.N, std::max<int64_t>(1, 20000 / (units.parts * k)), merge);
  }
  return {out.distances, out.indices};
}

#if defined(PROTOKERNELS_WITH_CUDA)

std::tuple<Tensor, Tensor> search_cuda(Tensor queries_any, Tensor bank_any, int64_t k, bool cosine) {
  const torch::stable::accelerator::DeviceGuard guard(queries_any.get_device_index());
  const Tensor queries = with_dense_rows(queries_any), bank = with_dense_rows(bank_any);
  STD_TORCH_CHECK(k <= NEAREST_MOST_CUDA, "nearest_search: k is at most ", NEAREST_MOST_CUDA, " on CUDA");
  NearestProblem p;
  const Outputs out = fill_problem(p, queries, bank, k, cosine);
  STD_TORCH_CHECK(p.M < (int64_t{1} << 31) && p.D < (int64_t{1} << 31), "nearest_search: M and D must be below 2^31 on CUDA");
  const Tensor workspace = empty_beside(queries, {nearest_workspace(p)}, ScalarType::Byte);
  check_cuda(launch_nearest(p, workspace.data_ptr(), current_cuda_stream(queries)), "nearest_search");
  return {out.distances, out.indices};
}

#endif

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("nearest_search", TORCH_BOX(&search_cpu));
}

#if defined(PROTOKERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("nearest_search", TORCH_BOX(&search_cuda));
}
#endif
