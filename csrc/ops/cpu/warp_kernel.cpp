// SPDX-License-Identifier: MIT
// The stages of a warp on the CPU, one plane at a time: a few passes over it (blur, everything that acts on a row and its mirror, rotation), each from
// the last one's plane to the next, all in the second-level cache. The backward pass runs the same passes again for the inputs that gradients
// of parameters need, then walks back; a plane has one owner, so sums have one order.
//
// What limits it, per pixel: the blur's 26 multiply-adds, half a Philox block with its logarithm, sine and cosine, and a rotation's four taps, which are
// loads and shuffles rather than arithmetic; backward the four read-modify-writes of the rotation's adjoint too.
#include "ops/cpu/warp_blur.h"
#include "ops/cpu/warp_points.h"
#include "ops/cpu/warp_sample.h"

namespace {

constexpr int MOST_PASSES = 5;  // points, blur, points, rotation, points

bool has(const WarpProblem& p, WarpStage stage) { return std::find(p.order, p.order + p.stages, stage) != p.order + p.stages; }

int most_passes(const WarpProblem& p) {
  Passes all;
  for (int k = 0; k < p.stages; ++k) all.add(p.order[k]);
  return all.count;
}

// Memory for one plane at a time. Planes are inputs of the passes behind the first; a rotation needs one even for the first.
template <class T>
struct Room {
  BlurRoom<T> blur;
  PointsRoom<T> points;
  Plane<T> input[MOST_PASSES], gradient[2];
  T* row;

  Room(const WarpProblem& p, bool backward, Arena& arena)
      : blur(p, arena), points(p, arena), row(take_row<T>(arena, p.W)) {
    const int passes = most_passes(p), planes = backward ? std::max(passes, 1) : std::min(std::max(passes, 1), 2);
    for (int k = 0; k < planes; ++k) input[k] = Plane<T>(arena, p.H, p.W);
    for (int k = 0; backward && k < 2; ++k) gradient[k] = Plane<T>(arena, p.H, p.W);
    for (int k = planes; k < MOST_PASSES; ++k) input[k] = input[k % planes];
    if (!arena.block || !has(p, WarpStage::rotate)) return;
    for (int k = 0; k < planes; ++k) input[k].clear_margin();
  }
};

// Columns of R(2 pi l): the angle is reduced in quarters, so that quarter turns are exact.
struct Rotation {
  double cosine, sine;

  explicit Rotation(double turns) {
    const double rest = turns - std::round(turns), quarters = std::round(4 * rest), angle = 6.283185307179586 * (rest - quarters / 4);
    const double c = std::cos(angle), s = std::sin(angle);
    switch (static_cast<int>(quarters) & 3) {
      case 0: cosine = c, sine = s; break;
      case 1: cosine = -s, sine = c; break;
      case 2: cosine = -c, sine = -s; break;
      default: cosine = s, sine = -c;
    }
  }

  template <class T>
  Course<T, 2> course(const WarpProblem& p, int64_t y) const {
    const double cx = 0.5 * static_cast<double>(p.W - 1), cy = 0.5 * static_cast<double>(p.H - 1), dy = static_cast<double>(y) - cy;
    return {{static_cast<T>(cosine), static_cast<T>(sine)}, {static_cast<T>(cx - sine * dy), static_cast<T>(cy + cosine * dy)}, static_cast<T>(cx)};
  }
};

template <class T>
Source<T, 2> source_of(const Plane<T>& plane) {
  return {plane.origin, {plane.W, plane.H}, {1, plane.stride}};
}

// What a pass reads as a plane: the plane itself, or a copy of an image's rows.
template <class T>
void import(const Rows& in, const Plane<T>& plane) {
  if (in.base == plane.origin) return;
  for (int64_t y = 0; y < plane.H; ++y) in.read(y, plane.row(y));
}

template <class T>
void rotate_forward(const WarpProblem& p, const Plane<T>& in, double turns, T* row, const Rows& out) {
  const Rotation rotation(turns);
  for (int64_t y = 0; y < p.H; ++y) {
    sample_row<WarpAffinePadding::zeros, T, 2>(source_of(in), rotation.course<T>(p, y), p.W, row);
    out.write(y, row);
  }
}

// in: for the sum, which may be null; out: cleared here, or null.
template <class T>
void rotate_backward(const WarpProblem& p, const Plane<T>& in, double turns, T* row, const Rows& grad, const Plane<T>& out, Sum<T>* sum) {
  const Rotation rotation(turns);
  const double cy = 0.5 * static_cast<double>(p.H - 1);
  const Source<T, 2> target = source_of(out), source = sum ? source_of(in) : Source<T, 2>{nullptr, {p.W, p.H}, {1, out.stride}};
  if (target.origin) out.clear();
  for (int64_t y = 0; y < p.H; ++y) {
    Sum<T> parts[4];
    grad.read(y, row);
    sample_row_back<WarpAffinePadding::zeros, T, 2>(source, target, rotation.course<T>(p, y), p.W, row, parts);
    if (!sum) continue;
    // dR / d angle applied to (dx, dy): (-sin dx - cos dy, cos dx - sin dy).
    const double dy = static_cast<double>(y) - cy, c = rotation.cosine, s = rotation.sine;
    sum->add(parts[1], -s), sum->add(parts[0], -c * dy), sum->add(parts[3], c), sum->add(parts[2], -s * dy);
  }
}

template <class T>
void fill(const Rows& out, int64_t H, T* row, T value) {
  std::fill_n(row, out.W, value);
  for (int64_t y = 0; y < H; ++y) out.write(y, row);
}

template <class T>
void run_pass(const WarpProblem& p, Room<T>& room, const Sample& sample, const Pass& pass, int64_t plane, const Rows& in, const Plane<T>& copy,
              const Rows& out) {
  if (pass.kind == Pass::Kind::blur) {
    Blur<T>(p, room.blur, sample.sigma).forward(in, out);
  } else if (pass.kind == Pass::Kind::points) {
    Points<T>(p, room.points, pass, sample, plane).forward(in, out);
  } else {
    import(in, copy);
    rotate_forward(p, copy, sample.param[6], room.row, out);
  }
}

template <class T>
void forward_plane(const WarpForward& f, Room<T>& room, int64_t plane) {
  const Sample sample(f, plane / f.C);
  const Rows image = rows_of(f.images, f.kind, plane, f.H, f.W), output = rows_of(f.output, f.kind, plane, f.H, f.W);
  if (sample.is_void) return fill(output, f.H, room.row, std::numeric_limits<T>::quiet_NaN());
  const int passes = sample.passes.count;
  for (int k = 0; k < passes; ++k)
    run_pass(f, room, sample, sample.passes.pass[k], plane, k ? room.input[k].rows() : image, room.input[k],
             k + 1 < passes ? room.input[k + 1].rows() : output);
  for (int64_t y = 0; passes == 0 && y < f.H; ++y) image.read(y, room.row), output.write(y, room.row);
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
    run_pass(b, room, sample, passes.pass[k], plane, k ? room.input[k].rows() : image, room.input[k], room.input[k + 1].rows());
  Rows now = grad;
  int turn = 0;  // now is not in room.gradient[turn]
  for (int k = passes.count - 1; k >= 0; --k) {
    const Pass& pass = passes.pass[k];
    const bool first = k == 0, goes_on = !first || b.grad_images;
    const Rows in = first ? image : room.input[k].rows(), out = first ? grad_image : room.gradient[turn].rows();
    const Rows* const target = goes_on ? &out : nullptr;
    if (pass.kind == Pass::Kind::points) {
      Points<T>(b, room.points, pass, sample, plane).backward(now, in, target, wanted);
    } else if (pass.kind == Pass::Kind::blur) {
      Plane<T> gradient = room.gradient[turn ^ 1];
      import(now, gradient);
      Blur<T>(b, room.blur, sample.sigma).backward(gradient, in, target, wanted);
    } else {
      if (partials) import(in, room.input[k]);
      const Plane<T> none, scattered = goes_on ? room.gradient[turn] : none;
      rotate_backward(b, room.input[k], sample.param[6], room.row, now, scattered, wanted ? &sums[6] : nullptr);
      for (int64_t y = 0; first && goes_on && y < b.H; ++y) grad_image.write(y, scattered.row(y));
    }
    now = out, turn ^= 1;
  }
  for (int64_t y = 0; passes.count == 0 && b.grad_images && y < b.H; ++y) grad.read(y, room.row), grad_image.write(y, room.row);
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
    Arena arena{nullptr};
    Room<decltype(zero)>(p, backward, arena);
    return arena.bytes;
  });
}

void forward(const WarpForward& f, int64_t first_plane, int64_t last_plane, void* scratch) {
  with_compute_type(f, [&](auto zero) {
    Arena arena{static_cast<char*>(scratch)};
    Room<decltype(zero)> room(f, false, arena);
    for (int64_t plane = first_plane; plane < last_plane; ++plane) forward_plane(f, room, plane);
  });
}

void backward(const WarpBackward& b, double* partials, int64_t first_plane, int64_t last_plane, void* scratch) {
  with_compute_type(b, [&](auto zero) {
    Arena arena{static_cast<char*>(scratch)};
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
