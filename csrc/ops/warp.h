// SPDX-License-Identifier: MIT
// Differentiable transformations of images (Ruppli et al. 2022, Table 1) in any order, with a parameter vector per sample, and general affine warps.
//
// Pixel (x, y) of a plane of H x W, l the sample's parameter of the stage:
//
//   blur    sigma = |sigma_max l|, w_k ~ exp(-k^2 / 2 sigma^2) over |k| <= radius, sum 1; separable. sigma < 1e-3: the identity, and no derivative
//           padding: reflect (no edge repeated, iterated: any size), replicate, zeros
//   noise   O = X + noise_std l n, n standard normal, a function of the sample's seed and the element's index in the sample alone (below)
//   crop    O = X m, m = min(S(k (half_x - |x + .5 - l_x W|)), S(k (half_y - |y + .5 - l_y H|))), S the sigmoid, k the sharpness
//   hflip   O(x) = (1 - l) X(x) + l X(W - 1 - x)           vflip: likewise along y
//   rotate  O(x) = X(R(2 pi l)(x - c) + c), R = [[cos, -sin], [sin, cos]], c = ((W - 1) / 2, (H - 1) / 2); bilinear, 0 outside
//
// Backward, G the gradient by a stage's output, X its input:
//
//   blur    dX: the adjoint filter and padding; dl = sigma_max sign(l) sum G (K'_y K_x + K_y K'_x) X, w'_k = w_k (k^2 - sum w k^2) / sigma^3
//   noise   dX = G; dl = noise_std sum G n
//   crop    dX = G m; dl_x = sum G X m (1 - m) k sign(x + .5 - l_x W) W over the pixels where the x term is the smaller (ties: x), dl_y the others
//   flip    dX = (1 - l) G + l mirror G; dl = sum G (mirror X - X)
//   rotate  dX: the adjoint; a pixel receives from the 3 x 3 outputs around the turned-back pixel at most (a rotation does not scale);
//           dl = 2 pi sum G (dO/dsx (-sin dx - cos dy) + dO/dsy (cos dx - sin dy)), (dx, dy) = pixel - c
//
// The angle is reduced before sine and cosine, l - round(l), so that quarter turns of square images are exact. A parameter that is not finite makes
// its sample NaN, where the stage is on; no coordinate becomes an integer before it is known to be one.
//
// Noise: Philox4x32-10 with key (seed low 32 bits, seed high) and counter (q low, q high, 0, 0), q = i / 4, i the index in the sample [C, H, W]. With the
// words w0..w3: u1 = (w0 + .5) 2^-32, u2 = w1 2^-32, n_0 = sqrt(-2 ln u1) cos(2 pi u2), n_1 = ... sin; n_2 and n_3 from w2 and w3; element i has
// n_(i mod 4).
//
// Affine: O(x) = X(A (x - c_out) + c_in + t), c = (size - 1) / 2, linear over 2^dims taps; dX the adjoint, dA = sum g (x - c_out)^T, dt = sum g, g the
// gradient by the source coordinate; none through a coordinate that border or reflection has clamped, as in grid_sample (align_corners).
//
// Cost of the default order, per pixel: forward 2 (2 radius + 1) multiply-adds of blur, about 25 of the noise (half a Philox block and logarithm,
// sine and cosine for two elements), 10 of crop, flips and rotation; backward three times that. Images, gradient in, image and gradient out are all
// that needs memory's bandwidth: 8 bytes forward, 12 backward. Forward saves its arguments; backward recomputes what its stages need.
#pragma once

#include <cstdint>

#include "common/kind.h"

namespace protokernels {

constexpr int WARP_STAGES = 6;
constexpr int WARP_PARAMS = 7;
constexpr double WARP_LEAST_SIGMA = 1e-3;  // below: no blur
constexpr int64_t WARP_MOST_RADIUS = 64;   // largest radius of the blur

enum class WarpStage : int { blur = 0, noise = 1, crop = 2, hflip = 3, vflip = 4, rotate = 5 };
enum class WarpBlurPadding : int { reflect = 0, replicate = 1, zeros = 2 };
enum class WarpAffinePadding : int { zeros = 0, border = 1, reflection = 2 };

// Column of params that holds a stage's (first) parameter: blur, noise, crop x, crop y, hflip, vflip, rotate.
constexpr int WARP_COLUMN[WARP_STAGES] = {0, 1, 2, 4, 5, 6};

// T is double if double_compute (images of f64), else float. Everything is contiguous; no size is zero.
struct WarpProblem {
  int64_t B, C, H, W;
  const void* images;  // [B, C, H, W] of kind
  Kind kind;
  bool double_compute;
  const void* params;            // T [B, 7]
  const int32_t* enabled;        // [B], bit k: stage k is on for the sample; on CUDA null: all are
  const int64_t* seed;           // [B]; on CUDA null: 0 for all
  int stages;                    // entries of order
  WarpStage order[WARP_STAGES];  // distinct, in the order applied
  int64_t radius_y, radius_x;    // of the blur, 0: this axis is left alone
  double sigma_max, noise_std;
  double crop_half_y, crop_half_x;  // pixels
  double sharpness;
  WarpBlurPadding padding;
};

struct WarpForward : WarpProblem {
  void* output;  // [B, C, H, W] of kind
};

struct WarpBackward : WarpProblem {
  const void* grad;   // [B, C, H, W] of kind: by the output
  void* grad_images;  // [B, C, H, W] of kind, or null
  void* grad_params;  // T [B, 7], or null; 0 for stages that are off
};

struct WarpAffineProblem {
  int64_t B, C;
  int dims;            // 2 or 3
  int64_t in[3];       // D, H, W of images; D = 1 if dims is 2
  int64_t out[3];      // D, H, W of the output
  const void* images;  // [B, C, D, H, W] of kind
  Kind kind;
  bool double_compute;
  const void* matrix;  // T [B, dims, dims + 1]: [A | t], coordinates in the order x, y, z
  WarpAffinePadding padding;
};

struct WarpAffineForward : WarpAffineProblem {
  void* output;  // [B, C, D, H, W] of kind
};

struct WarpAffineBackward : WarpAffineProblem {
  const void* grad;   // of kind, shape of the output
  void* grad_images;  // of kind, shape of images, or null
  void* grad_matrix;  // T [B, dims, dims + 1], or null
};

// ------------------------------------------------------------------------------------------------- CPU (csrc/ops/cpu)

// One table per instruction set. The unit of work is a plane, b C + c; it belongs to one thread. Its parts of the parameters' gradients are written
// to a row of partials, and those of a sample's planes are added up in order: any number of threads gives the same bits.
struct WarpCpu {
  int64_t (*scratch_bytes)(const WarpProblem&, bool backward);  // of every thread
  void (*forward)(const WarpForward&, int64_t first_plane, int64_t last_plane, void* scratch);
  void (*backward)(const WarpBackward&, double* partials /* [B C, 7] or null */, int64_t first_plane, int64_t last_plane, void* scratch);
};

// The unit is a sample's channel too; partials [B C, dims (dims + 1)].
struct WarpAffineCpu {
  int64_t (*scratch_bytes)(const WarpAffineProblem&, bool backward);
  void (*forward)(const WarpAffineForward&, int64_t first, int64_t last, void* scratch);
  void (*backward)(const WarpAffineBackward&, double* partials, int64_t first, int64_t last, void* scratch);
};

// ---------------------------------------------------------------------------------------------- CUDA (csrc/ops/cuda)

// Each returns a cudaError_t as int; workspace sizes are in bytes and depend on shapes, the order and what is asked for only.
int64_t warp_forward_workspace(const WarpForward&);
int launch_warp_forward(const WarpForward&, void* workspace, void* stream);
int64_t warp_backward_workspace(const WarpBackward&);
int launch_warp_backward(const WarpBackward&, void* workspace, void* stream);
int64_t warp_affine_forward_workspace(const WarpAffineForward&);
int launch_warp_affine_forward(const WarpAffineForward&, void* workspace, void* stream);
int64_t warp_affine_backward_workspace(const WarpAffineBackward&);
int launch_warp_affine_backward(const WarpAffineBackward&, void* workspace, void* stream);

}  // namespace protokernels
