// SPDX-License-Identifier: MIT
// The CUDA kernels of `nearest` on NumPy arrays: the launch function as the torch side calls it, workspace included.

#include "emulator/host.h"
#include "ops/cuda/nearest_launch.h"
#include "ops/nearest.h"

using namespace pk::emulator;
using namespace protokernels;

namespace {

// Rows of D values, as far apart as the arrays are wide. Returns how many queries the filter left to the comparison with the whole bank.
template <typename Q, typename B>
int64_t search(const Array& queries_array, const Array& bank_array, int64_t D, int64_t k, bool cosine, const Array& distances_array,
               const Array& indices_array) {
  constexpr bool wide = std::is_same_v<Q, double> || std::is_same_v<B, double>;
  const Input<Q> queries(queries_array, "queries");
  const Input<B> bank(bank_array, "bank");
  const Output<std::conditional_t<wide, double, float>> distances(distances_array, "distances");
  const Output<int64_t> indices(indices_array, "indices");
  const NearestProblem p{queries.shape(0), bank.shape(0), D,      k,    queries.data(),   kind_of<Q>,    queries.shape(1), bank.data(),
                         kind_of<B>,       bank.shape(1), cosine, wide, distances.data(), indices.data()};
  const Workspace workspace(nearest_workspace(p));
  check(launch_nearest(p, workspace.data(), nullptr));
  if (p.N == 0 || D == 0) return p.N;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;  // as in nearest_kernel.cu
  return reinterpret_cast<const NearestState*>(start)->left;
}

template <typename Q>
void define(py::module_& module, const std::string& name) {
  module.def((name + "_f32").c_str(), &search<Q, float>);
  module.def((name + "_f64").c_str(), &search<Q, double>);
  module.def((name + "_f16").c_str(), &search<Q, __half>);
  module.def((name + "_bf16").c_str(), &search<Q, __nv_bfloat16>);
}

}  // namespace

PK_EMULATOR_MODULE(module) {
  define<float>(module, "search_f32");
  define<double>(module, "search_f64");
  define<__half>(module, "search_f16");
  define<__nv_bfloat16>(module, "search_bf16");
}
