// SPDX-License-Identifier: MIT
// The table of contents: every operator of the package with its schema, and the module that Python imports.
#include <Python.h>

#include "common/cpu_level.h"
#include "common/torch_utils.h"

#ifndef PROTOKERNELS_CUDA_ARCH_LIST
#define PROTOKERNELS_CUDA_ARCH_LIST ""
#endif

namespace {

std::string build_info() {
  std::string info =
      "{\"torch\": \"" PROTOKERNELS_TORCH_VERSION "\", \"compiler\": \"" PROTOKERNELS_COMPILER
      "\", \"cuda_compiler\": \"" PROTOKERNELS_CUDA_COMPILER "\", \"cuda_archs\": \"" PROTOKERNELS_CUDA_ARCH_LIST "\", \"cpu_level\": \"";
  return info + protokernels::cpu_level_name(protokernels::cpu_level()) + "\"}";
}

}  // namespace

STABLE_TORCH_LIBRARY(protokernels, library) {
  // What this file was built with, and the instruction set chosen on this machine, as JSON.
  library.def("build_info() -> str");

  // Prototypes (ops/prototypes.h): soft assignment c [B, K] with labels, entropy, per-cluster sums and counts and the blended prototypes, each
  // empty unless asked for; its backward; sums and counts from given labels; the blend alone.
  library.def(
      "prototypes_forward(Tensor z, Tensor prototypes, Tensor? temperature_tensor, float temperature, bool cosine, Tensor? uniform, "
      "bool with_labels, bool with_entropy, bool with_update, float new_weight, bool skip_nonfinite) "
      "-> (Tensor assignment, Tensor labels, Tensor entropy, Tensor sums, Tensor counts, Tensor updated)");
  library.def(
      "prototypes_backward(Tensor grad_assignment, Tensor? grad_entropy, Tensor assignment, Tensor z, Tensor prototypes, "
      "Tensor? temperature_tensor, float temperature, bool cosine, bool with_prototypes) "
      "-> (Tensor grad_z, Tensor grad_prototypes, Tensor grad_temperature)");
  library.def(
      "prototypes_backward_resident(Tensor grad_assignment, Tensor? grad_entropy, Tensor assignment, Tensor z, Tensor prototypes, "
      "Tensor? temperature_tensor, float temperature, bool cosine, bool with_prototypes) "
      "-> (Tensor grad_z, Tensor grad_prototypes, Tensor grad_temperature)");
  library.def("prototypes_accumulate(Tensor z, Tensor labels, int num_prototypes, bool skip_nonfinite) -> (Tensor sums, Tensor counts)");
  library.def("prototypes_blend(Tensor prototypes, Tensor sums, Tensor counts, float new_weight) -> Tensor");

  // Sinkhorn (ops/sinkhorn.h): potentials, values and diagnostics of B transport problems, with the potentials of every iteration if asked for; its
  // unrolled or implicit backward; the plan and its backward; the envelope gradient of the entropic value; the same from features, whose cost
  // is never stored. On the CPU also whether masses are finite, not negative and, if asked for, of equal totals.
  library.def("sinkhorn_masses_fit(Tensor a, Tensor b, bool balanced) -> bool");
  library.def(
      "sinkhorn_forward(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor? g_init, int num_iters, float tol, float rho_a, float "
      "rho_b, "
      "bool save_history) -> (Tensor f, Tensor g, Tensor transport_cost, Tensor entropic_value, Tensor marginal_error, Tensor iterations, "
      "Tensor feasible, Tensor history)");
  library.def(
      "sinkhorn_backward(Tensor cost, Tensor a, Tensor b, Tensor epsilon, Tensor? g_init, Tensor f, Tensor g, Tensor iterations, "
      "Tensor history, Tensor? grad_f, Tensor? grad_g, Tensor? grad_transport_cost, Tensor? grad_entropic_value, bool implicit, "
      "float rho_a, float rho_b) -> (Tensor grad_cost, Tensor grad_a, Tensor grad_b, Tensor grad_epsilon)");
  library.def("sinkhorn_plan(Tensor cost, Tensor f, Tensor g, Tensor epsilon) -> Tensor");
  library.def(
      "sinkhorn_plan_backward(Tensor grad_plan, Tensor plan, Tensor cost, Tensor f, Tensor g, Tensor epsilon) "
      "-> (Tensor grad_cost, Tensor grad_f, Tensor grad_g, Tensor grad_epsilon)");
  library.def(
      "sinkhorn_envelope_backward(Tensor cost, Tensor f, Tensor g, Tensor epsilon, Tensor grad_entropic_value) "
      "-> (Tensor grad_cost, Tensor grad_epsilon)");
  library.def(
      "sinkhorn_features_forward(Tensor x, Tensor y, Tensor a, Tensor b, Tensor epsilon, Tensor? g_init, bool cosine, int num_iters, "
      "float tol, float rho_a, float rho_b, int precision) -> (Tensor f, Tensor g, Tensor transport_cost, Tensor entropic_value, "
      "Tensor marginal_error, Tensor iterations, Tensor feasible)");
  library.def(
      "sinkhorn_features_backward(Tensor x, Tensor y, Tensor f, Tensor g, Tensor epsilon, Tensor? grad_entropic_value, bool cosine) "
      "-> (Tensor grad_x, Tensor grad_y, Tensor grad_epsilon)");

  // Contrastive losses (ops/contrastive.h): which pixels meet which, from their labels; the same for two views stacked; vectors out of images
  // and their gradient back; losses with the statistics of every row; the gradient of the vectors. The last two are all of these in one,
  // for one set of vectors or two views, one after the other; `losses` is there for autograd, which follows it from a gradient to what it is of.
  library.def(
      "contrastive_plan(Tensor labels, int[] block, int[] stride, bool per_image, bool drop_remainder, int? background, int? ignore_index, "
      "int form, int reduction) -> (Tensor order, Tensor groups, Tensor ranges, Tensor weights)");
  library.def(
      "contrastive_views(Tensor beside, int count, bool crossing, bool symmetric) "
      "-> (Tensor order, Tensor groups, Tensor ranges, Tensor weights)");
  library.def("contrastive_pack(Tensor x, Tensor order, bool normalize) -> (Tensor packed, Tensor norms)");
  library.def(
      "contrastive_unpack(Tensor grad_packed, Tensor packed, Tensor norms, Tensor order, Tensor like, bool normalize, bool "
      "channels_last) -> Tensor");
  library.def(
      "contrastive_forward(Tensor rows, Tensor? columns, Tensor groups, Tensor ranges, Tensor? weights, int channels, float temperature, "
      "bool unit, int form, int precision) -> (Tensor total, Tensor losses, Tensor statistics)");
  library.def(
      "contrastive_backward(Tensor rows, Tensor? columns, Tensor groups, Tensor ranges, Tensor? row_statistics, Tensor? row_coefficients, "
      "Tensor? column_statistics, Tensor? column_coefficients, int channels, float temperature, bool unit, int precision) "
      "-> Tensor grad_rows");
  library.def(
      "contrastive_losses(Tensor x, Tensor? second, Tensor order, Tensor groups, Tensor ranges, Tensor weights, float temperature, bool "
      "normalize, int form, int precision) -> (Tensor total, Tensor losses, Tensor packed, Tensor norms, Tensor statistics)");
  library.def(
      "contrastive_losses_backward(Tensor? grad_total, Tensor? grad_losses, Tensor packed, Tensor norms, Tensor order, Tensor groups, "
      "Tensor "
      "ranges, Tensor weights, Tensor statistics, Tensor like, Tensor losses, float temperature, bool normalize, int form, int precision, "
      "bool channels_last) -> Tensor grad");

  // Warps (ops/warp.h): blur, noise, soft crop, flips and rotation of images in any order, with gradients by images and parameters; affine warps of
  // images and volumes.
  library.def(
      "warp_forward(Tensor images, Tensor params, Tensor? enabled, Tensor? seed, int[] order, int[] radius, float sigma_max, float "
      "noise_std, float crop_size, float sharpness, int padding) -> Tensor");
  library.def(
      "warp_backward(Tensor grad, Tensor images, Tensor params, Tensor? enabled, Tensor? seed, int[] order, int[] radius, float sigma_max, "
      "float noise_std, float crop_size, float sharpness, int padding, bool need_images, bool need_params) "
      "-> (Tensor grad_images, Tensor grad_params)");
  library.def("warp_affine_forward(Tensor images, Tensor matrix, SymInt[] size, int padding) -> Tensor");
  library.def(
      "warp_affine_backward(Tensor grad, Tensor images, Tensor matrix, int padding, bool need_images, bool need_matrix) "
      "-> (Tensor grad_images, Tensor grad_matrix)");

  // Nearest (ops/nearest.h): the k nearest rows of a bank for every query, with their distances; the nearest center of every row with the sums and
  // counts of the clusters and the rows' distances, each empty unless asked for; the rows' distances if a candidate became a center, and their sum.
  library.def("nearest_search(Tensor queries, Tensor bank, int k, bool cosine) -> (Tensor distances, Tensor indices)");
  library.def(
      "nearest_assign(Tensor x, Tensor centers, bool with_sums, bool with_distances) "
      "-> (Tensor labels, Tensor sums, Tensor counts, Tensor distances)");
  library.def("nearest_seed(Tensor x, Tensor candidates, Tensor closest) -> (Tensor closer, Tensor totals)");
}

STABLE_TORCH_LIBRARY_IMPL(protokernels, CompositeExplicitAutograd, library) { library.impl("build_info", TORCH_BOX(&build_info)); }

// `import protokernels._C` works too; the operators are registered when the file is loaded.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Native kernels of protokernels.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
