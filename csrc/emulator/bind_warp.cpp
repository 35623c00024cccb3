// SPDX-License-Identifier: MIT
// The CUDA kernels of `warp` on NumPy arrays: launch functions as the torch side calls them, workspace included.
#include <vector>

#include "emulator/host.h"
#include "ops/warp.h"

using namespace pk::emulator;
using namespace protokernels;

namespace {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Options {
  std::vector<int> order, radius;
  double sigma_max, noise_std;
  std::vector<double> half;
  double sharpness;
  int padding;
};

template <typename T>
struct Inputs {
  Input<T> images;
  Input<Compute<T>> params;
  Input<int32_t> enabled;
  Input<int64_t> seed;

  Inputs(const Array& images_, const Array& params_, const Array& enabled_, const Array& seed_)
      : images(images_, "images"), params(params_, "params"), enabled(enabled_, "enabled"), seed(seed_, "seed") {}

  void fill(WarpProblem& p, const Options& options) const {
    p.B = images.shape(0), p.C = images.shape(1), p.H = images.shape(2), p.W = images.shape(3);
    p.images = images.data();
    p.kind = kind_of<T>;
    p.double_compute = std::is_same_v<T, double>;
    p.params = params.data();
    p.enabled = enabled.shape(0) > 0 ? enabled.data() : nullptr;
    p.seed = seed.shape(0) > 0 ? seed.data() : nullptr;
    p.stages = static_cast<int>(options.order.size());
    for (int i = 0; i < p.stages; ++i) p.order[i] = static_cast<WarpStage>(options.order[i]);
    p.radius_y = options.radius[0], p.radius_x = options.radius[1];
    p.sigma_max = options.sigma_max, p.noise_std = options.noise_std, p.sharpness = options.sharpness;
    p.crop_half_y = options.half[0], p.crop_half_x = options.half[1];
    p.padding = static_cast<WarpBlurPadding>(options.padding);
  }
};

template <typename T>
void forward(const Array& images, const Array& params, const Array& enabled, const Array& seed, const Options& options,
             const Array& output_array) {
  const Inputs<T> in(images, params, enabled, seed);
  const Output<T> output(output_array, "output");
  WarpForward p{};
  in.fill(p, options);
  p.output = output.data();
  const Workspace workspace(warp_forward_workspace(p));
  check(launch_warp_forward(p, workspace.data(), nullptr));
}

template <typename T>
void backward(const Array& grad_array, const Array& images, const Array& params, const Array& enabled, const Array& seed,
              const Options& options, const Array& grad_images_array, const Array& grad_params_array) {
  const Inputs<T> in(images, params, enabled, seed);
  const Input<T> grad(grad_array, "grad");
  const Output<T> grad_images(grad_images_array, "grad_images");
  const Output<Compute<T>> grad_params(grad_params_array, "grad_params");
  WarpBackward p{};
  in.fill(p, options);
  p.grad = grad.data(), p.grad_images = grad_images.data(), p.grad_params = grad_params.data();
  const Workspace workspace(warp_backward_workspace(p));
  check(launch_warp_backward(p, workspace.data(), nullptr));
}

template <typename T>
void fill_affine(WarpAffineProblem& p, const Input<T>& images, const Input<Compute<T>>& matrix, const std::vector<int64_t>& size,
                 int padding) {
  p.B = images.shape(0), p.C = images.shape(1);
  p.dims = static_cast<int>(matrix.shape(1));
  p.in[0] = p.out[0] = 1;
  for (int i = 0; i < p.dims; ++i) p.in[3 - p.dims + i] = images.shape(2 + i), p.out[3 - p.dims + i] = size[static_cast<std::size_t>(i)];
  p.images = images.data();
  p.kind = kind_of<T>;
  p.double_compute = std::is_same_v<T, double>;
  p.matrix = matrix.data();
  p.padding = static_cast<WarpAffinePadding>(padding);
}

template <typename T>
void affine_forward(const Array& images_array, const Array& matrix_array, const std::vector<int64_t>& size, int padding,
                    const Array& output_array) {
  const Input<T> images(images_array, "images");
  const Input<Compute<T>> matrix(matrix_array, "matrix");
  const Output<T> output(output_array, "output");
  WarpAffineForward p{};
  fill_affine<T>(p, images, matrix, size, padding);
  p.output = output.data();
  const Workspace workspace(warp_affine_forward_workspace(p));
  check(launch_warp_affine_forward(p, workspace.data(), nullptr));
}

template <typename T>
void affine_backward(const Array& grad_array, const Array& images_array, const Array& matrix_array, const std::vector<int64_t>& size,
                     int padding, const Array& grad_images_array, const Array& grad_matrix_array) {
  const Input<T> grad(grad_array, "grad"), images(images_array, "images");
  const Input<Compute<T>> matrix(matrix_array, "matrix");
  const Output<T> grad_images(grad_images_array, "grad_images");
  const Output<Compute<T>> grad_matrix(grad_matrix_array, "grad_matrix");
  WarpAffineBackward p{};
  fill_affine<T>(p, images, matrix, size, padding);
  p.grad = grad.data(), p.grad_images = grad_images.data(), p.grad_matrix = grad_matrix.data();
  const Workspace workspace(warp_affine_backward_workspace(p));
  check(launch_warp_affine_backward(p, workspace.data(), nullptr));
}

template <typename T>
void bind_kind(py::module_& module, const std::string& kind) {
  module.def(("forward_" + kind).c_str(), &forward<T>);
  module.def(("backward_" + kind).c_str(), &backward<T>);
  module.def(("affine_forward_" + kind).c_str(), &affine_forward<T>);
  module.def(("affine_backward_" + kind).c_str(), &affine_backward<T>);
}

}  // namespace

PK_EMULATOR_MODULE(module) {
  py::class_<Options>(module, "Options")
      .def(py::init<std::vector<int>, std::vector<int>, double, double, std::vector<double>, double, int>(), py::arg("order"),
           py::arg("radius"), py::arg("sigma_max"), py::arg("noise_std"), py::arg("half"), py::arg("sharpness"), py::arg("padding"));
  bind_kind<float>(module, "f32");
  bind_kind<double>(module, "f64");
  bind_kind<__half>(module, "f16");
  bind_kind<__nv_bfloat16>(module, "bf16");
}
