// SPDX-License-Identifier: MIT
// Affine warps on the CPU: an image or volume is copied into one with a margin of zeros, and every row of the output is a straight course through it.
// Backward scatters into such a copy; it has one owner, so that its sums have one order.
#include "ops/cpu/warp_sample.h"

namespace {

// D planes with a margin; a volume has zero planes before and behind it too.
template <class T, int DIMS>
struct Volume {
  int64_t size[3], row, plane, before;
  T *memory, *origin;

  Volume(Arena& arena, const int64_t (&sizes)[3]) : size{sizes[0], sizes[1], sizes[2]} {
    row = round_up(size[2] + 2 * MARGIN, LANES<T>), plane = (size[1] + 2 * MARGIN) * row;
    before = LANES<T> + MARGIN * row + (DIMS == 3 ? MARGIN * plane : 0);
    memory = arena.take<T>(elements());
    origin = memory ? memory + before : nullptr;
  }
  int64_t elements() const { return (size[0] + (DIMS == 3 ? 2 * MARGIN : 0)) * plane + 2 * LANES<T>; }
  T* at(int64_t z, int64_t y) const { return origin + z * plane + y * row; }
  void clear() const { std::fill_n(memory, elements(), T(0)); }
  Source<T, DIMS> source(bool wanted = true) const {
    Source<T, DIMS> s;
    s.origin = wanted ? origin : nullptr;
    s.size[0] = size[2], s.size[1] = size[1], s.stride[0] = 1, s.stride[1] = row;
    if constexpr (DIMS == 3) s.size[2] = size[0], s.stride[2] = plane;
    return s;
  }
};

template <class T, int DIMS>
struct AffineRoom {
  Volume<T, DIMS> images, gradient;
  T* row;

  AffineRoom(const WarpAffineProblem& p, bool backward, Arena& arena)
      : images(arena, p.in), gradient(backward ? Volume<T, DIMS>(arena, p.in) : images), row(take_row<T>(arena, p.out[2])) {
    if (!arena.counts_only()) images.clear();
  }
};

// The matrix of a sample, and the course of an output row.
template <class T, int DIMS>
struct Map {
  double entry[DIMS][DIMS + 1];
  bool is_finite = true;
  const WarpAffineProblem& p;

  Map(const WarpAffineProblem& problem, int64_t b) : p(problem) {
    for (int i = 0; i < DIMS; ++i)
      for (int j = 0; j <= DIMS; ++j) {
        entry[i][j] = static_cast<const T*>(p.matrix)[(b * DIMS + i) * (DIMS + 1) + j];
        is_finite &= std::isfinite(entry[i][j]);
      }
  }
  static double center(int64_t size) { return 0.5 * static_cast<double>(size - 1); }
  double dy(int64_t y) const { return static_cast<double>(y) - center(p.out[1]); }
  double dz(int64_t z) const { return static_cast<double>(z) - center(p.out[0]); }

  Course<T, DIMS> course(int64_t z, int64_t y) const {
    Course<T, DIMS> c;
    c.center = static_cast<T>(center(p.out[2]));
    for (int i = 0; i < DIMS; ++i) {
      double start = center(p.in[2 - i]) + entry[i][DIMS] + entry[i][1] * dy(y);
      if constexpr (DIMS == 3) start += entry[i][2] * dz(z);
      c.step[i] = static_cast<T>(entry[i][0]), c.start[i] = static_cast<T>(start);
    }
    return c;
  }
};

template <class Function>
void with_padding(WarpAffinePadding padding, const Function& function) {
  if (padding == WarpAffinePadding::zeros)
    function(std::integral_constant<WarpAffinePadding, WarpAffinePadding::zeros>{});
  else if (padding == WarpAffinePadding::border)
    function(std::integral_constant<WarpAffinePadding, WarpAffinePadding::border>{});
  else
    function(std::integral_constant<WarpAffinePadding, WarpAffinePadding::reflection>{});
}

// Rows of all planes of a unit, counted together.
Rows rows_of_unit(const void* tensor, Kind kind, int64_t unit, const int64_t (&size)[3]) {
  return {const_cast<void*>(tensor), kind, unit * size[0] * size[1] * size[2], size[2], size[2], false};
}

template <class T, int DIMS>
void import(const WarpAffineProblem& p, int64_t unit, const Volume<T, DIMS>& volume) {
  const Rows in = rows_of_unit(p.images, p.kind, unit, p.in);
  for (int64_t z = 0; z < p.in[0]; ++z)
    for (int64_t y = 0; y < p.in[1]; ++y) in.copy(z * p.in[1] + y, volume.at(z, y));
}

template <class T>
void fill_rows(const Rows& out, int64_t rows, T* row, T value) {
  std::fill_n(row, out.W, value);
  for (int64_t y = 0; y < rows; ++y) out.write(y, row);
}

template <class T, int DIMS>
void forward_unit(const WarpAffineForward& f, const AffineRoom<T, DIMS>& room, int64_t unit) {
  const Map<T, DIMS> map(f, unit / f.C);
  const Rows out = rows_of_unit(f.output, f.kind, unit, f.out);
  if (!map.is_finite) return fill_rows(out, f.out[0] * f.out[1], room.row, std::numeric_limits<T>::quiet_NaN());
  import(f, unit, room.images);
  with_padding(f.padding, [&](auto padding) {
    for (int64_t z = 0; z < f.out[0]; ++z)
      for (int64_t y = 0; y < f.out[1]; ++y) {
        sample_row<padding.value, T, DIMS>(room.images.source(), map.course(z, y), 0, f.out[2], room.row);
        out.write(z * f.out[1] + y, room.row);
      }
  });
}

template <class T, int DIMS>
void backward_unit(const WarpAffineBackward& b, const AffineRoom<T, DIMS>& room, int64_t unit, double* partials) {
  const Map<T, DIMS> map(b, unit / b.C);
  const Rows grad = rows_of_unit(b.grad, b.kind, unit, b.out), grad_images = rows_of_unit(b.grad_images, b.kind, unit, b.in);
  if (!map.is_finite) {
    for (int k = 0; partials && k < DIMS * (DIMS + 1); ++k) partials[k] = std::numeric_limits<double>::quiet_NaN();
    if (b.grad_images) fill_rows(grad_images, b.in[0] * b.in[1], room.gradient.at(0, 0), std::numeric_limits<T>::quiet_NaN());
    return;
  }
  if (partials) import(b, unit, room.images);
  if (b.grad_images) room.gradient.clear();
  Sum<T> sums[DIMS][DIMS + 1];
  with_padding(b.padding, [&](auto padding) {
    for (int64_t z = 0; z < b.out[0]; ++z)
      for (int64_t y = 0; y < b.out[1]; ++y) {
        const T* const g = grad.read(z * b.out[1] + y, room.row);
        const auto take = [&](const Vec<T>(&v)[2 * DIMS]) {
          for (int i = 0; i < DIMS; ++i) {
            sums[i][0].add(v[2 * i + 1]), sums[i][1].add(v[2 * i], map.dy(y)), sums[i][DIMS].add(v[2 * i]);
            if constexpr (DIMS == 3) sums[i][2].add(v[2 * i], map.dz(z));
          }
        };
        const auto terms = [](Vec<T>(&v)[2 * DIMS], Vec<T> dx, const Vec<T>(&by)[DIMS]) {
          for (int i = 0; i < DIMS; ++i) v[2 * i] = by[i], v[2 * i + 1] = by[i] * dx;
        };
        sample_row_back<padding.value, T, DIMS, 2 * DIMS>(room.images.source(partials), room.gradient.source(b.grad_images),
                                                          map.course(z, y), b.out[2], g, terms, take);
      }
  });
  for (int i = 0; partials && i < DIMS; ++i)
    for (int j = 0; j <= DIMS; ++j) partials[i * (DIMS + 1) + j] = sums[i][j].total();
  for (int64_t z = 0; b.grad_images && z < b.in[0]; ++z)
    for (int64_t y = 0; y < b.in[1]; ++y) grad_images.write(z * b.in[1] + y, room.gradient.at(z, y));
}

// function(zero of the compute type, dims as a constant)
template <class Function>
void with_types(const WarpAffineProblem& p, const Function& function) {
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  if (p.double_compute)
    p.dims == 2 ? function(double{}, two) : function(double{}, three);
  else
    p.dims == 2 ? function(float{}, two) : function(float{}, three);
}

int64_t scratch_bytes(const WarpAffineProblem& p, bool backward) {
  Arena arena(nullptr);
  with_types(p, [&](auto zero, auto dims) { AffineRoom<decltype(zero), dims.value>(p, backward, arena); });
  return arena.bytes();
}

void forward(const WarpAffineForward& f, int64_t first, int64_t last, void* scratch) {
  with_types(f, [&](auto zero, auto dims) {
    Arena arena(scratch);
    const AffineRoom<decltype(zero), dims.value> room(f, false, arena);
    for (int64_t unit = first; unit < last; ++unit) forward_unit(f, room, unit);
  });
}

void backward(const WarpAffineBackward& b, double* partials, int64_t first, int64_t last, void* scratch) {
  with_types(b, [&](auto zero, auto dims) {
    Arena arena(scratch);
    const AffineRoom<decltype(zero), dims.value> room(b, true, arena);
    for (int64_t unit = first; unit < last; ++unit)
      backward_unit(b, room, unit, partials ? partials + unit * b.dims * (b.dims + 1) : nullptr);
  });
}

}  // namespace

namespace protokernels {

extern const WarpAffineCpu PK_LEVEL_TABLE(warp_affine_cpu);
const WarpAffineCpu PK_LEVEL_TABLE(warp_affine_cpu) = {scratch_bytes, forward, backward};

}  // namespace protokernels
