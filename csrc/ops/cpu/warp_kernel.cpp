// SPDX-License-Identifier: MIT
// The stages of a warp on the CPU, one plane at a time: a few passes over it (blur, everything that acts on a row and its mirror, rotation), each from
// the last one's plane to the next, all in the second-level cache. The backward pass runs the same passes again for the inputs that gradients
// of parameters need, then walks back; a plane has one owner, so sums have one order.
//
// What limits it, per pixel: the blur's 26 multiply-adds, half a Philox block with its logarithm, sine and cosine, and a rotation's four taps, which are
// loads and shuffles rather than arithmetic; backward the four read-modify-writes of the rotation's adjoint too.
#include "ops/cpu/warp_blur.h"
#include "ops/cpu/warp_points.h"
#include "ops/cpu/warp_rotate.h"

namespace {

constexpr int MOST_PASSES = 5;  // points, blur, points, rotation, points

int most_passes(const WarpProblem& p) {
  Passes all;
  for (int k = 0; k < p.stages; ++k) all.add(p.order[k]);
  return all.count;
}

constexpr int SPARE = MOST_PASSES + 1;

// Memory for one plane at a time. plane[k] holds the input of pass k, the first one only a copy of the image for a rotation; there is one more, and a spare.
// The fewer are in use, the more of them stay in the cache: forward uses two in turn, and a blur in between takes what is free.
template <class T>
struct Room {
  BlurRoom<T> blur;
  PointsRoom<T> points;
  Cells<T> cells;
  Plane<T> plane[SPARE + 1];
  bool has_margin[SPARE + 1] = {};
  int different;
  T* row;

  Room(const WarpProblem& p, bool backward, Arena& arena)
      : blur(p, arena),
        points(p, arena),
        cells(arena, p, backward && std::count(p.order, p.order + p.stages, WarpStage::rotate)),
        different(backward ? most_passes(p) + 1 : 2),
        row(take_row<T>(arena, p.W)) {
    for (int k = 0; k < SPARE; ++k) plane[k] = k < different ? Plane<T>(arena, p.H, p.W) : plane[k - different];
    plane[SPARE] = Plane<T>(arena, p.H, p.W);
  }
  bool& margin(int k) { return has_margin[k == SPARE ? k : k % different]; }
  // Zeros around plane[k], for sampling: a blur along x writes beyond its rows, everything else leaves them.
  const Plane<T>& with_margin(int k) {
    if (!margin(k)) plane[k].clear_margin();
    margin(k) = true;
    return plane[k];
  }
};

// What a pass reads as a plane: the plane itself, or a copy of an image's rows.
template <class T>
void import(const Rows& in, const Plane<T>& plane) {
  if (in.base == plane.origin) return;
  for (int64_t y = 0; y < plane.H; ++y) in.copy(y, plane.row(y));
}

template <class T>
void fill(const Rows& out, int64_t H, T* row, T value) {
  std::fill_n(row, out.W, value);
  for (int64_t y = 0; y < H; ++y) out.write(y, row);
}

// Pass k of the sample, from `in`, which is plane[k] or the image, to `out`.
template <class T>
void run_pass(const WarpProblem& p, Room<T>& room, const Sample& sample, int k, int64_t plane, const Rows& in, const Rows& out) {
  const Pass& pass = sample.passes.pass[k];
  if (pass.kind == Pass::Kind::blur) {
    const int across = k ? SPARE : 0;
    room.margin(across) = false;
    Blur<T>(p, room.blur, sample.sigma).forward(in, room.plane[across], out);
  } else if (pass.kind == Pass::Kind::points) {
    Points<T>(p, room.points, pass, sample, plane).forward(in, out);
  } else {
    const Plane<T>& source = room.with_margin(k);
    import(in, source);
    rotate_forward(p, source, sample.param[6], room.row, out);
  }
}

template <class T>
void forward_plane(const WarpForward& f, Room<T>& room, int64_t plane) {
  const Sample sample(f, plane / f.C);
  const Rows image = rows_of(f.images, f.kind, plane, f.H, f.W), output = rows_of(f.output, f.kind, plane, f.H, f.W);
  if (sample.is_void) return fill(output, f.H, room.row, std::numeric_limits<T>::quiet_NaN());
  const int passes = sample.passes.count;
  for (int k = 0; k < passes; ++k)
    run_pass(f, room, sample, k, plane, k ? room.plane[k].rows() : image, k + 1 < passes ? room.plane[k + 1].rows() : output);
  for (int64_t y = 0; passes == 0 && y < f.H; ++y) image.copy(y, room.row), output.write(y, room.row);
}

// partials: of the plane, or null.
template <class T>
void backward_plane(const WarpBackward& b, Room<T>& room, int64_t plane, double* partials) {
  const Sample sample(b, plane / b.C);
  const Rows image = rows_of(b.images, b.kind, plane, b.H, b.W), grad = rows_of(b.grad, b.kind, plane, b.H, b.W);
  const Rows grad_image = rows_of(b.grad_images, b.kind, plane, b.H, b.W);
  if (sample.is_void) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int k = 0; partials && k < WARP_PARAMS; ++k) partials[k] = sample.used >> k & 1 ? nan : 0;
    if (b.grad_images) fill(grad_image, b.H, room.row, static_cast<T>(nan));
    return;
  }
  const Passes& passes = sample.passes;
  PointSums<T> sums;
  Sum<T>* const wanted = partials ? sums : nullptr;
  for (int k = 0; partials && k + 1 < passes.count; ++k)
    run_pass(b, room, sample, k, plane, k ? room.plane[k].rows() : image, room.plane[k + 1].rows());
  Rows now = grad;
  for (int k = passes.count - 1; k >= 0; --k) {
    const Pass& pass = passes.pass[k];
    const bool first = k == 0, goes_on = !first || b.grad_images;
    const int next = k + 1 < passes.count ? k + 1 : SPARE;  // the input of the pass just dealt with is not needed any more
    const int before = k + 2 < passes.count ? k + 2 : k + 2 == passes.count ? SPARE : k + 1;  // now, or where it is copied
    const Rows in = first ? image : room.plane[k].rows(), out = first ? grad_image : room.plane[next].rows();
    const Rows* const target = goes_on ? &out : nullptr;
    if (pass.kind == Pass::Kind::points) {
      Points<T>(b, room.points, pass, sample, plane, wanted).backward(now, in, target, wanted);
    } else if (pass.kind == Pass::Kind::blur) {
      import(now, room.plane[before]);
      Blur<T>(b, room.blur, sample.sigma).backward(room.plane[before], in, target, wanted);
    } else {
      if (wanted) import(in, room.with_margin(k));
      rotate_backward(b, room.plane[k], room.cells, sample.param[6], room.row, now, target, wanted ? &sums[6] : nullptr);
    }
    now = out;
  }
  for (int64_t y = 0; passes.count == 0 && b.grad_images && y < b.H; ++y) grad.copy(y, room.row), grad_image.write(y, room.row);
  if (!partials) return;
  const double of_sigma = sums[0].total(), sign = b.sigma_max * sample.param[0] < 0 ? -1 : 1;
  for (int k = 1; k < WARP_PARAMS; ++k) partials[k] = sums[k].total();
  partials[0] = of_sigma * b.sigma_max * sign;
  partials[1] *= b.noise_std;
  partials[6] *= 6.283185307179586;
}

template <class Function>
auto with_compute_type(const WarpProblem& p, const Function& function) {
  return p.double_compute ? function(double{}) : function(float{});
}

int64_t scratch_bytes(const WarpProblem& p, bool backward) {
  return with_compute_type(p, [&](auto zero) {
    Arena arena(nullptr);
    Room<decltype(zero)>(p, backward, arena);
    return arena.bytes();
  });
}

void forward(const WarpForward& f, int64_t first_plane, int64_t last_plane, void* scratch) {
  with_compute_type(f, [&](auto zero) {
    Arena arena(scratch);
    Room<decltype(zero)> room(f, false, arena);
    for (int64_t plane = first_plane; plane < last_plane; ++plane) forward_plane(f, room, plane);
  });
}

void backward(const WarpBackward& b, double* partials, int64_t first_plane, int64_t last_plane, void* scratch) {
  [[maybe_unused]] const FlushToZero flush;  // the tails of a crop meet small gradients
  with_compute_type(b, [&](auto zero) {
    Arena arena(scratch);
    Room<decltype(zero)> room(b, true, arena);
    for (int64_t plane = first_plane; plane < last_plane; ++plane)
      backward_plane(b, room, plane, partials ? partials + plane * WARP_PARAMS : nullptr);
  });
}

}  // namespace

namespace protokernels {

extern const WarpCpu PK_LEVEL_TABLE(warp_cpu);
const WarpCpu PK_LEVEL_TABLE(warp_cpu) = {scratch_bytes, forward, backward};

}  // namespace protokernels
