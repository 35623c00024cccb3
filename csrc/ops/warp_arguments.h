// SPDX-License-Identifier: MIT
// The arguments of the warp operators: checks that protect memory, and the problems they make for the kernels of either device.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/torch_utils.h"
#include "ops/warp.h"

namespace protokernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int32_t ALL_STAGES = (1 << WARP_STAGES) - 1;
constexpr int64_t MOST_PIXELS = int64_t{1} << 30;  // of a plane or a volume, and of a side

inline double product(int64_t a, int64_t b, int64_t c) { return static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c); }

// Whether a plane or a volume has fewer, and its copy inside the CPU kernels, with two pixels more on every side and rows of whole vectors, can be
// counted in 32 bits.
inline bool is_countable(int64_t depth, int64_t height, int64_t width, bool volume) {
  constexpr double most = static_cast<double>(MOST_PIXELS);
  return product(depth, height, width) < most && product(volume ? depth + 4 : 1, height + 4, (width + 4 + 15) / 16 * 16) < 2 * most;
}

inline const void* checked(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == type;
  int64_t dimension = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(dimension++) == size;
  STD_TORCH_CHECK(fits, "warp: ", name, " must be contiguous, of the shape and the type that fit the images");
  return tensor.data_ptr();
}

inline ScalarType compute_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

inline Tensor nothing_beside(const Tensor& like, ScalarType type) { return empty_beside(like, {0}, type); }

// Whether there are no pixels: then no kernel runs.
inline bool is_empty(const WarpProblem& p) { return p.B == 0 || p.C == 0 || p.H == 0 || p.W == 0; }

inline void fill_problem(WarpProblem& p, const Tensor& images, const Tensor& params, const OptionalTensor& enabled,
                         const OptionalTensor& seed, const std::vector<int64_t>& order, const std::vector<int64_t>& radius,
                         double sigma_max, double noise_std, double crop_size, double sharpness, int64_t padding) {
  STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous(), "warp: images must be contiguous [B, C, H, W]");
  p.B = images.size(0), p.C = images.size(1), p.H = images.size(2), p.W = images.size(3);
  STD_TORCH_CHECK(std::max(p.H, p.W) < MOST_PIXELS && is_countable(1, p.H, p.W, false),
                  "warp: a plane must have fewer than 2^30 pixels, and fewer rows where these are short");
  p.images = images.data_ptr(), p.kind = kind_of(images, "images"), p.double_compute = p.kind == Kind::f64;
  p.params = checked(params, "params", compute_type(p.double_compute), {p.B, WARP_PARAMS});
  p.enabled = enabled ? static_cast<const int32_t*>(checked(*enabled, "enabled", ScalarType::Int, {p.B})) : nullptr;
  p.seed = seed ? static_cast<const int64_t*>(checked(*seed, "seed", ScalarType::Long, {p.B})) : nullptr;
  STD_TORCH_CHECK(order.size() <= WARP_STAGES, "warp: order must name a stage once at most");
  uint32_t seen = 0;
  for (const int64_t stage : order) {
    STD_TORCH_CHECK(stage >= 0 && stage < WARP_STAGES && !(seen >> stage & 1), "warp: order must name stages 0 to 5, each once at most");
    seen |= 1u << stage;
    p.order[p.stages++] = static_cast<WarpStage>(stage);
  }
  const bool reach = radius.size() == 2 && std::min(radius[0], radius[1]) >= 0 && std::max(radius[0], radius[1]) <= WARP_MOST_RADIUS;
  STD_TORCH_CHECK(reach && padding >= 0 && padding <= 2, "warp: radius must be two of 0 to 64 and padding 0 to 2");
  p.radius_y = radius[0], p.radius_x = radius[1], p.sigma_max = sigma_max, p.noise_std = noise_std;
  p.crop_half_y = static_cast<double>(p.H) * crop_size / 2, p.crop_half_x = static_cast<double>(p.W) * crop_size / 2;
  p.sharpness = sharpness;
  p.padding = static_cast<WarpBlurPadding>(padding);
}

// What is given for every sample, or the same number for all; that needs no tensor on CUDA.
template <class T>
OptionalTensor of_samples(const OptionalTensor& given, const Tensor& images, ScalarType type, T number) {
  if (given || !images.is_cpu()) return given;
  const Tensor same = empty_beside(images, {images.size(0)}, type);
  std::fill_n(static_cast<T*>(same.data_ptr()), images.size(0), number);
  return same;
}

// Run: what is done with the problem, on the CPU or the device. Without enabled all stages are on, without seed it is 0.
template <class Run>
Tensor forward_by(const Run& run, const Tensor& images, const Tensor& params, const OptionalTensor& enabled, const OptionalTensor& seed,
                  const std::vector<int64_t>& order, const std::vector<int64_t>& radius, double sigma_max, double noise_std,
                  double crop_size, double sharpness, int64_t padding) {
  WarpForward f{};
  const OptionalTensor on = of_samples(enabled, images, ScalarType::Int, ALL_STAGES),
                       keys = of_samples(seed, images, ScalarType::Long, int64_t{0});
  fill_problem(f, images, params, on, keys, order, radius, sigma_max, noise_std, crop_size, sharpness, padding);
  const Tensor output = empty_beside(images, {f.B, f.C, f.H, f.W}, images.scalar_type());
  f.output = output.data_ptr();
  if (!is_empty(f)) run(f);
  return output;
}

template <class Run>
std::tuple<Tensor, Tensor> backward_by(const Run& run, const Tensor& grad, const Tensor& images, const Tensor& params,
                                       const OptionalTensor& enabled, const OptionalTensor& seed, const std::vector<int64_t>& order,
                                       const std::vector<int64_t>& radius, double sigma_max, double noise_std, double crop_size,
                                       double sharpness, int64_t padding, bool need_images, bool need_params) {
  WarpBackward b{};
  const OptionalTensor on = of_samples(enabled, images, ScalarType::Int, ALL_STAGES),
                       keys = of_samples(seed, images, ScalarType::Long, int64_t{0});
  fill_problem(b, images, params, on, keys, order, radius, sigma_max, noise_std, crop_size, sharpness, padding);
  b.grad = checked(grad, "the gradient", images.scalar_type(), {b.B, b.C, b.H, b.W});
  Tensor grad_images =
             need_images ? empty_beside(images, {b.B, b.C, b.H, b.W}, images.scalar_type()) : nothing_beside(images, images.scalar_type()),
         grad_params =
             need_params ? empty_beside(images, {b.B, WARP_PARAMS}, params.scalar_type()) : nothing_beside(images, params.scalar_type());
  b.grad_images = need_images ? grad_images.data_ptr() : nullptr, b.grad_params = need_params ? grad_params.data_ptr() : nullptr;
  if (is_empty(b))
    torch::stable::zero_(grad_params);
  else if (need_images || need_params)
    run(b);
  return {grad_images, grad_params};
}

// ------------------------------------------------------------------------------------------------------------ affine

// out: sizes of the output, D, H, W or H, W.
inline void fill_affine(WarpAffineProblem& p, const Tensor& images, const Tensor& matrix, const int64_t* out, int64_t out_dims,
                        int64_t padding) {
  p.dims = static_cast<int>(images.dim()) - 2;
  STD_TORCH_CHECK((p.dims == 2 || p.dims == 3) && images.is_contiguous() && out_dims == p.dims && padding >= 0 && padding <= 2,
                  "warp: images must be contiguous [B, C, H, W] or [B, C, D, H, W], size two or three numbers, padding 0 to 2");
  p.B = images.size(0), p.C = images.size(1);
  for (int k = 0; k < 3; ++k) {
    const int axis = k - (3 - p.dims);
    p.in[k] = axis < 0 ? 1 : images.size(axis + 2), p.out[k] = axis < 0 ? 1 : out[axis];
    STD_TORCH_CHECK(p.out[k] >= 0 && p.in[k] < MOST_PIXELS && p.out[k] < MOST_PIXELS, "warp: a side must have fewer than 2^30 pixels");
  }
  const bool countable = is_countable(p.in[0], p.in[1], p.in[2], p.dims == 3);
  STD_TORCH_CHECK(countable && product(p.out[0], p.out[1], p.out[2]) < static_cast<double>(MOST_PIXELS),
                  "warp: an image or volume must have fewer than 2^30 pixels, and fewer rows where these are short");
  p.images = images.data_ptr(), p.kind = kind_of(images, "images"), p.double_compute = p.kind == Kind::f64;
  p.matrix = checked(matrix, "matrix", compute_type(p.double_compute), {p.B, p.dims, p.dims + 1});
  p.padding = static_cast<WarpAffinePadding>(padding);
}

inline bool has_no_pixels(const WarpAffineProblem& p) {
  return p.B == 0 || p.C == 0 || std::min({p.in[0], p.in[1], p.in[2], p.out[0], p.out[1], p.out[2]}) == 0;
}

inline Tensor empty_images(const Tensor& like, const WarpAffineProblem& p, const int64_t (&size)[3]) {
  return p.dims == 2 ? empty_beside(like, {p.B, p.C, size[1], size[2]}, like.scalar_type())
                     : empty_beside(like, {p.B, p.C, size[0], size[1], size[2]}, like.scalar_type());
}

template <class Run>
Tensor affine_forward_by(const Run& run, const Tensor& images, const Tensor& matrix, const std::vector<int64_t>& size, int64_t padding) {
  WarpAffineForward f{};
  fill_affine(f, images, matrix, size.data(), static_cast<int64_t>(size.size()), padding);
  Tensor output = empty_images(images, f, f.out);
  f.output = output.data_ptr();
  if (has_no_pixels(f))
    torch::stable::zero_(output);
  else
    run(f);
  return output;
}

template <class Run>
std::tuple<Tensor, Tensor> affine_backward_by(const Run& run, const Tensor& grad, const Tensor& images, const Tensor& matrix,
                                              int64_t padding, bool need_images, bool need_matrix) {
  WarpAffineBackward b{};
  STD_TORCH_CHECK(grad.dim() == images.dim() && grad.dim() >= 4 && grad.dim() <= 5, "warp: the gradient must have the images' dimensions");
  const int64_t sides[3] = {grad.size(2), grad.size(3), grad.dim() == 5 ? grad.size(4) : 1};
  fill_affine(b, images, matrix, sides, grad.dim() - 2, padding);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.scalar_type() == images.scalar_type() && grad.size(0) == b.B && grad.size(1) == b.C,
                  "warp: the gradient must be contiguous and have the images' batch, channels and type");
  b.grad = grad.data_ptr();
  Tensor grad_images = need_images ? empty_images(images, b, b.in) : nothing_beside(images, images.scalar_type()),
         grad_matrix = need_matrix ? empty_beside(images, {b.B, b.dims, b.dims + 1}, matrix.scalar_type())
                                   : nothing_beside(images, matrix.scalar_type());
  b.grad_images = need_images ? grad_images.data_ptr() : nullptr, b.grad_matrix = need_matrix ? grad_matrix.data_ptr() : nullptr;
  if (has_no_pixels(b))
    torch::stable::zero_(grad_images), torch::stable::zero_(grad_matrix);
  else if (need_images || need_matrix)
    run(b);
  return {grad_images, grad_matrix};
}

}  // namespace
}  // namespace protokernels
