// SPDX-License-Identifier: MIT
// Prototypes, the torch side: checks that protect memory, allocation, the split into chunks, registration.
#include "ops/prototypes.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/cpu_level.h"
#include "common/torch_utils.h"

namespace protokernels {

PK_DECLARE_LEVELS(PrototypesCpu, prototypes_cpu);
const PrototypesCpu& prototypes_cpu() { return PK_CHOOSE_LEVEL(prototypes_cpu); }

// At least 128 and at least K rows a chunk, or clearing and adding up partial sums costs more than filling them. At most 64 chunks while their sums
// fit into 4 MB, else 16, and fewer beyond 64 MB. Never a function of the number of threads.
PrototypesChunks prototypes_chunks(int64_t B, int64_t K, int64_t D) {
  const int64_t bytes = 8 * K * D;
  const int64_t most = std::min(std::clamp<int64_t>((int64_t{4} << 20) / bytes, 16, 64), std::max<int64_t>(1, (int64_t{64} << 20) / bytes));
  const int64_t wanted = std::clamp<int64_t>(B / std::max<int64_t>(128, K), 1, most);
  const int64_t rows = std::max<int64_t>(32, ((B + wanted - 1) / wanted + 31) / 32 * 32);
  return {rows, (B + rows - 1) / rows};
}

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

constexpr double SERIAL_WORK = 1.5e6;  // about 30 microseconds, in multiply-adds: below it a second thread costs more than it brings

// Runs function(begin, end) over the chunks on torch's threads.
template <class Function>
void for_chunks(PrototypesChunks chunks, double work, const Function& function) {
  if (chunks.count == 0) return;
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(chunks.count) * SERIAL_WORK / std::max(work, 1.0)));
  parallel_for(0, chunks.count, grain, function);
}

// Runs function(first_k, last_k) over the prototypes; what it does to one does not depend on the others.
template <class Function>
void for_prototypes(int64_t K, int64_t D, PrototypesChunks chunks, const Function& function) {
  const double work = static_cast<double>(D) * static_cast<double>(chunks.count) * 4;  // of one prototype: memory, not arithmetic
  parallel_for(0, K, std::max<int64_t>(1, static_cast<int64_t>(SERIAL_WORK / std::max(work, 1.0))), function);
}

// What forward and backward share; z, prototypes and temperature must outlive it.
void fill_problem(PrototypesProblem& problem, const Tensor& z, const Tensor& prototypes, const OptionalTensor& temperature_tensor,
                  double temperature, bool cosine) {
  STD_TORCH_CHECK(z.dim() == 2 && prototypes.dim() == 2 && z.size(1) == prototypes.size(1) && prototypes.size(0) > 0 && z.size(1) > 0,
                  "prototypes: z [B, D] and prototypes [K, D] do not fit");
  problem.B = z.size(0);
  problem.K = prototypes.size(0);
  problem.D = z.size(1);
  problem.z = z.data_ptr();
  problem.z_kind = kind_of(z, "z");
  problem.z_stride = z.stride(0);
  problem.prototypes = prototypes.data_ptr();
  problem.prototypes_kind = kind_of(prototypes, "prototypes");
  problem.double_compute = problem.z_kind == Kind::f64 || problem.prototypes_kind == Kind::f64;
  problem.temperature = temperature;
  problem.temperature_pointer = nullptr;
  if (temperature_tensor) {
    STD_TORCH_CHECK(
        temperature_tensor->numel() == 1 && kind_of(*temperature_tensor, "temperature") == (problem.double_compute ? Kind::f64 : Kind::f32),
        "prototypes: temperature must hold one value of the compute type");
    problem.temperature_pointer = temperature_tensor->data_ptr();
  }
  problem.cosine = cosine;
}

[[maybe_unused]] void check_int_sizes(int64_t K, int64_t D) {  // kernels count prototypes and dimensions in int
  STD_TORCH_CHECK(K < (int64_t{1} << 31) && D < (int64_t{1} << 31), "prototypes: K and D must be below 2^31 on CUDA");
}

double multiply_adds(const PrototypesProblem& p) {
  return static_cast<double>(p.B) * static_cast<double>(p.K) * static_cast<double>(p.D) + 800.0 * static_cast<double>(p.B);
}

struct ForwardOutputs {
  Tensor assignment, labels, entropy, sums, counts, updated;
  Outputs tuple() const { return {assignment, labels, entropy, sums, counts, updated}; }
};

ForwardOutputs allocate_forward(PrototypesForward& p, const Tensor& z, const Tensor& prototypes, const OptionalTensor& uniform,
                                bool with_labels, bool with_entropy, bool with_update, double new_weight, bool skip_nonfinite) {
  const ScalarType compute = p.double_compute ? ScalarType::Double : ScalarType::Float;
  const bool labels = with_labels || with_update;
  ForwardOutputs out{empty_beside(z, {p.B, p.K}, compute),
                     empty_beside(z, {labels ? p.B : 0}, ScalarType::Long),
                     empty_beside(z, {with_entropy ? p.B : 0}, compute),
                     empty_beside(z, {with_update ? p.K : 0, p.D}, ScalarType::Double),
                     empty_beside(z, {with_update ? p.K : 0}, ScalarType::Long),
                     empty_beside(z, {with_update ? p.K : 0, p.D}, prototypes.scalar_type())};
  if (uniform)
    STD_TORCH_CHECK(uniform->numel() == p.B && uniform->scalar_type() == ScalarType::Float && uniform->is_contiguous(),
                    "prototypes: uniform must be contiguous float32 [B]");
  p.uniform = data_or_null<const float>(uniform);
  p.skip_nonfinite = skip_nonfinite;
  p.assignment = out.assignment.data_ptr();
  p.labels = labels ? static_cast<int64_t*>(out.labels.data_ptr()) : nullptr;
  p.entropy = with_entropy ? out.entropy.data_ptr() : nullptr;
  p.sums = with_update ? static_cast<double*>(out.sums.data_ptr()) : nullptr;
  p.counts = with_update ? static_cast<int64_t*>(out.counts.data_ptr()) : nullptr;
  p.new_weight = new_weight;
  p.updated = with_update ? out.updated.data_ptr() : nullptr;
  p.blend_source = prototypes.data_ptr();
  p.blend_kind = kind_of(prototypes, "prototypes");
  return out;
}

Outputs forward_cpu(Tensor z_any, Tensor prototypes_any, OptionalTensor temperature_tensor, double temperature, bool cosine,
                    OptionalTensor uniform, bool with_labels, bool with_entropy, bool with_update, double new_weight, bool skip_nonfinite) {
  const Tensor z = with_dense_rows(z_any), prototypes = as_contiguous(prototypes_any);
  PrototypesForward p;
  fill_problem(p, z, prototypes, temperature_tensor, temperature, cosine);
  const ForwardOutputs out =
      allocate_forward(p, z, prototypes, uniform, with_labels, with_entropy, with_update, new_weight, skip_nonfinite);
  const PrototypesCpu& cpu = prototypes_cpu();
  const PrototypesChunks chunks = prototypes_chunks(p.B, p.K, p.D);
  const Tensor panels = empty_beside(z, {cpu.panel_elements(p)}, p.double_compute ? ScalarType::Double : ScalarType::Float);
  const Tensor partial_sums = empty_beside(z, {with_update ? chunks.count * p.K * p.D : 0}, ScalarType::Double);
  const Tensor partial_counts = empty_beside(z, {with_update ? chunks.count * p.K : 0}, ScalarType::Long);
  double* const sums = with_update ? static_cast<double*>(partial_sums.data_ptr()) : nullptr;
  int64_t* const counts = with_update ? static_cast<int64_t*>(partial_counts.data_ptr()) : nullptr;
  cpu.pack_forward(p, panels.data_ptr());
  for_chunks(chunks, multiply_adds(p),
             [&](int64_t begin, int64_t end) { cpu.forward(p, panels.data_ptr(), chunks, sums, counts, begin, end); });
  if (with_update) {
    for_prototypes(p.K, p.D, chunks,
                   [&](int64_t first, int64_t last) { cpu.finish_sums(p.K, p.D, chunks, sums, counts, p.sums, p.counts, first, last); });
    cpu.blend({p.K, p.D, p.blend_source, p.blend_kind, p.sums, p.counts, p.new_weight, p.updated});
  }
  return out.tuple();
}

struct BackwardOutputs {
  Tensor z, prototypes, temperature;
};

BackwardOutputs allocate_backward(PrototypesBackward& p, const Tensor& grad_assignment, const OptionalTensor& grad_entropy,
                                  const Tensor& assignment, const Tensor& z, const Tensor& prototypes, bool with_prototypes) {
  const ScalarType compute = p.double_compute ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* matrix : {&grad_assignment, &assignment})
    STD_TORCH_CHECK(matrix->dim() == 2 && matrix->size(0) == p.B && matrix->size(1) == p.K && matrix->scalar_type() == compute &&
                        matrix->is_contiguous(),
                    "prototypes: assignment and its gradient must be contiguous [B, K] of the compute type");
  if (grad_entropy)
    STD_TORCH_CHECK(grad_entropy->numel() == p.B && grad_entropy->scalar_type() == compute && grad_entropy->is_contiguous(),
                    "prototypes: the gradient of the entropy must be contiguous [B] of the compute type");
  BackwardOutputs out{empty_beside(z, {p.B, p.D}, z.scalar_type()),
                      empty_beside(z, {with_prototypes ? p.K : 0, p.D}, prototypes.scalar_type()), empty_beside(z, {}, compute)};
  p.assignment = assignment.data_ptr();
  p.grad_assignment = grad_assignment.data_ptr();
  p.grad_entropy = data_or_null<const void>(grad_entropy);
  p.grad_z = out.z.data_ptr();
  p.grad_prototypes = with_prototypes ? out.prototypes.data_ptr() : nullptr;
  p.grad_temperature = out.temperature.data_ptr();
  p.grad_prototypes_kind = kind_of(prototypes, "prototypes");
  return out;
}

OptionalTensor dense(const OptionalTensor& tensor) { return tensor ? OptionalTensor(as_contiguous(*tensor)) : tensor; }

std::tuple<Tensor, Tensor, Tensor> backward_cpu(Tensor grad_assignment_any, OptionalTensor grad_entropy_any, Tensor assignment_any,
                                                Tensor z_any, Tensor prototypes_any, OptionalTensor temperature_tensor, double temperature,
                                                bool cosine, bool with_prototypes) {
  const Tensor z = with_dense_rows(z_any), prototypes = as_contiguous(prototypes_any);
  const Tensor assignment = as_contiguous(assignment_any), grad_assignment = as_contiguous(grad_assignment_any);
  const OptionalTensor grad_entropy = dense(grad_entropy_any);
  PrototypesBackward p;
  fill_problem(p, z, prototypes, temperature_tensor, temperature, cosine);
  const BackwardOutputs out = allocate_backward(p, grad_assignment, grad_entropy, assignment, z, prototypes, with_prototypes);
  const ScalarType compute = p.double_compute ? ScalarType::Double : ScalarType::Float;
  const PrototypesCpu& cpu = prototypes_cpu();
  const PrototypesChunks chunks = prototypes_chunks(p.B, p.K, p.D);
  const Tensor panels = empty_beside(z, {cpu.panel_elements(p)}, compute);
  const Tensor gradients = empty_beside(z, {with_prototypes ? chunks.count * cpu.gradient_elements(p) : 0}, compute);
  const Tensor temperatures = empty_beside(z, {chunks.count}, ScalarType::Double);
  double* const partial_temperature = static_cast<double*>(temperatures.data_ptr());
  void* const partial_gradients = with_prototypes ? gradients.data_ptr() : nullptr;
  double grad_temperature = 0;
  cpu.pack_backward(p, panels.data_ptr());
  for_chunks(chunks, 2 * multiply_adds(p), [&](int64_t begin, int64_t end) {
    cpu.backward(p, panels.data_ptr(), chunks, partial_gradients, partial_temperature, begin, end);
  });
  for (int64_t c = 0; c < chunks.count; ++c) grad_temperature += partial_temperature[c];
  if (with_prototypes)
    for_prototypes(p.K, p.D, chunks, [&](int64_t first, int64_t last) { cpu.finish_gradient(p, chunks, partial_gradients, first, last); });
  if (p.double_compute)
    *static_cast<double*>(out.temperature.data_ptr()) = grad_temperature;
  else
    *static_cast<float*>(out.temperature.data_ptr()) = static_cast<float>(grad_temperature);
  return {out.z, out.prototypes, out.temperature};
}

void fill_accumulate(PrototypesAccumulate& p, const Tensor& z, const Tensor& labels, int64_t num_prototypes, bool skip_nonfinite) {
  STD_TORCH_CHECK(z.dim() == 2 && labels.dim() == 1 && z.size(1) > 0 && labels.size(0) == z.size(0) &&
                      labels.scalar_type() == ScalarType::Long && num_prototypes > 0,
                  "prototypes: z [B, D], labels int64 [B] and num_prototypes do not fit");
  p = {
      z.size(0),      num_prototypes, z.size(1), z.data_ptr(), kind_of(z, "z"), z.stride(0), static_cast<const int64_t*>(labels.data_ptr()),
      skip_nonfinite, nullptr,        nullptr};
}

std::tuple<Tensor, Tensor> accumulate_cpu(Tensor z_any, Tensor labels_any, int64_t num_prototypes, bool skip_nonfinite) {
  const Tensor z = with_dense_rows(z_any), labels = as_contiguous(labels_any);
  PrototypesAccumulate p;
  fill_accumulate(p, z, labels, num_prototypes, skip_nonfinite);
  const PrototypesCpu& cpu = prototypes_cpu();
  const PrototypesChunks chunks = prototypes_chunks(p.B, p.K, p.D);
  const Tensor partial_sums = empty_beside(z, {chunks.count * p.K * p.D}, ScalarType::Double);
  const Tensor partial_counts = empty_beside(z, {chunks.count * p.K}, ScalarType::Long);
  Tensor sums = empty_beside(z, {p.K, p.D}, ScalarType::Double), counts = empty_beside(z, {p.K}, ScalarType::Long);
  double* const sums_data = static_cast<double*>(partial_sums.data_ptr());
  int64_t* const counts_data = static_cast<int64_t*>(partial_counts.data_ptr());
  std::atomic<bool> valid{true};
  for_chunks(chunks, 4.0 * static_cast<double>(p.B) * static_cast<double>(p.D), [&](int64_t begin, int64_t end) {
    if (!cpu.accumulate(p, chunks, sums_data, counts_data, begin, end)) valid = false;
  });
  STD_TORCH_CHECK(valid, "prototypes: a label is not below num_prototypes");
  for_prototypes(p.K, p.D, chunks, [&](int64_t first, int64_t last) {
    cpu.finish_sums(p.K, p.D, chunks, sums_data, counts_data, static_cast<double*>(sums.data_ptr()),
                    static_cast<int64_t*>(counts.data_ptr()), first, last);
  });
  return {sums, counts};
}

struct BlendInputs {
  Tensor prototypes, sums, counts, updated;

  BlendInputs(const Tensor& prototypes_any, const Tensor& sums_any, const Tensor& counts_any)
      : prototypes(as_contiguous(prototypes_any)), sums(as_contiguous(sums_any)), counts(as_contiguous(counts_any)) {
    STD_TORCH_CHECK(prototypes.dim() == 2 && sums.dim() == 2 && sums.size(0) == prototypes.size(0) && sums.size(1) == prototypes.size(1) &&
                        counts.numel() == prototypes.size(0) && sums.scalar_type() == ScalarType::Double &&
                        counts.scalar_type() == ScalarType::Long,
                    "prototypes: prototypes [K, D], sums float64 [K, D] and counts int64 [K] do not fit");
    updated = empty_beside(prototypes, {prototypes.size(0), prototypes.size(1)}, prototypes.scalar_type());
  }

  PrototypesBlend problem(double new_weight) const {
    return {prototypes.size(0),
            prototypes.size(1),
            prototypes.data_ptr(),
            kind_of(prototypes, "prototypes"),
            static_cast<const double*>(sums.data_ptr()),
            static_cast<const int64_t*>(counts.data_ptr()),
            new_weight,
            updated.data_ptr()};
  }
};

Tensor blend_cpu(Tensor prototypes, Tensor sums, Tensor counts, double new_weight) {
  const BlendInputs in(prototypes, sums, counts);
  prototypes_cpu().blend(in.problem(new_weight));
  return in.updated;
}

#if defined(PROTOKERNELS_WITH_CUDA)

// Kernels take prototypes in the compute type and z in it or in half precision; anything else is converted here.
Tensor in_compute_type(const Tensor& tensor, bool double_compute, bool keep_half) {
  const ScalarType type = tensor.scalar_type(), compute = double_compute ? ScalarType::Double : ScalarType::Float;
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  return type == compute || (half && keep_half && !double_compute) ? tensor : torch::stable::to(tensor, compute);
}

Outputs forward_cuda(Tensor z_any, Tensor prototypes_any, OptionalTensor temperature_tensor, double temperature, bool cosine,
                     OptionalTensor uniform, bool with_labels, bool with_entropy, bool with_update, double new_weight,
                     bool skip_nonfinite) {
  const torch::stable::accelerator::DeviceGuard guard(z_any.get_device_index());
  const bool wide = z_any.scalar_type() == ScalarType::Double || prototypes_any.scalar_type() == ScalarType::Double;
  const Tensor given = as_contiguous(prototypes_any), prototypes = in_compute_type(given, wide, false);
  const Tensor z = with_dense_rows(in_compute_type(z_any, wide, true));
  PrototypesForward p;
  fill_problem(p, z, prototypes, temperature_tensor, temperature, cosine);
  check_int_sizes(p.K, p.D);
  const ForwardOutputs out = allocate_forward(p, z, given, uniform, with_labels, with_entropy, with_update, new_weight, skip_nonfinite);
  const Tensor workspace = empty_beside(z, {prototypes_forward_workspace(p)}, ScalarType::Byte);
  check_cuda(launch_prototypes_forward(p, workspace.data_ptr(), current_cuda_stream(z)), "prototypes_forward");
  return out.tuple();
}

// For float arithmetic, K <= 256 and D <= 128.
std::tuple<Tensor, Tensor, Tensor> backward_cuda(Tensor grad_assignment_any, OptionalTensor grad_entropy_any, Tensor assignment_any,
                                                 Tensor z_any, Tensor prototypes_any, OptionalTensor temperature_tensor, double temperature,
                                                 bool cosine, bool with_prototypes) {
  const torch::stable::accelerator::DeviceGuard guard(z_any.get_device_index());
  const Tensor z = with_dense_rows(in_compute_type(z_any, false, true)), given = as_contiguous(prototypes_any);
  const Tensor prototypes = in_compute_type(given, false, false);
  const Tensor assignment = as_contiguous(assignment_any), grad_assignment = as_contiguous(grad_assignment_any);
  const OptionalTensor grad_entropy = dense(grad_entropy_any);
  PrototypesBackward p;
  fill_problem(p, z, prototypes, temperature_tensor, temperature, cosine);
  STD_TORCH_CHECK(!p.double_compute && p.K <= 256 && p.D <= 128, "prototypes_backward_resident: float arithmetic, K <= 256 and D <= 128");
  const BackwardOutputs out = allocate_backward(p, grad_assignment, grad_entropy, assignment, z, given, with_prototypes);
  const Tensor workspace = empty_beside(z, {prototypes_backward_workspace(p)}, ScalarType::Byte);
  check_cuda(launch_prototypes_backward(p, workspace.data_ptr(), current_cuda_stream(z)), "prototypes_backward");
  return {out.z, out.prototypes, out.temperature};
}

std::tuple<Tensor, Tensor> accumulate_cuda(Tensor z_any, Tensor labels_any, int64_t num_prototypes, bool skip_nonfinite) {
  const torch::stable::accelerator::DeviceGuard guard(z_any.get_device_index());
  const Tensor z = with_dense_rows(z_any), labels = as_contiguous(labels_any);
  PrototypesAccumulate p;
  fill_accumulate(p, z, labels, num_prototypes, skip_nonfinite);
  check_int_sizes(p.K, p.D);
  Tensor sums = empty_beside(z, {p.K, p.D}, ScalarType::Double), counts = empty_beside(z, {p.K}, ScalarType::Long);
  p.sums = static_cast<double*>(sums.data_ptr());
  p.counts = static_cast<int64_t*>(counts.data_ptr());
  const Tensor workspace = empty_beside(z, {prototypes_accumulate_workspace(p)}, ScalarType::Byte);
  check_cuda(launch_prototypes_accumulate(p, workspace.data_ptr(), current_cuda_stream(z)), "prototypes_accumulate");
  return {sums, counts};
}

Tensor blend_cuda(Tensor prototypes_any, Tensor sums_any, Tensor counts_any, double new_weight) {
  const torch::stable::accelerator::DeviceGuard guard(prototypes_any.get_device_index());
  const BlendInputs in(prototypes_any, sums_any, counts_any);
  check_cuda(launch_prototypes_blend(in.problem(new_weight), current_cuda_stream(in.prototypes)), "prototypes_blend");
  return in.updated;
}

#endif

}  // namespace
}  // namespace protokernels

STABLE_TORCH_LIBRARY_IMPL(protokernels, CPU, library) {
  using namespace protokernels;
  library.impl("prototypes_forward", TORCH_BOX(&forward_cpu));
  library.impl("prototypes_backward", TORCH_BOX(&backward_cpu));
  library.impl("prototypes_backward_resident", TORCH_BOX(&backward_cpu));
  library.impl("prototypes_accumulate", TORCH_BOX(&accumulate_cpu));
  library.impl("prototypes_blend", TORCH_BOX(&blend_cpu));
}

#if defined(PROTOKERNELS_WITH_CUDA)
// prototypes_backward on CUDA stands in protokernels/ops/_prototypes_autograd.py: this where it serves, else two cuBLAS products and torch's softmax.
STABLE_TORCH_LIBRARY_IMPL(protokernels, CUDA, library) {
  using namespace protokernels;
  library.impl("prototypes_forward", TORCH_BOX(&forward_cuda));
  library.impl("prototypes_backward_resident", TORCH_BOX(&backward_cuda));
  library.impl("prototypes_accumulate", TORCH_BOX(&accumulate_cuda));
  library.impl("prototypes_blend", TORCH_BOX(&blend_cuda));
}
#endif
