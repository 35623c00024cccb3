// SPDX-License-Identifier: MIT
// The rotation by tiles, and its adjoint. A rectangle of the tile reads, turned, a rectangle that stands aslant; the upright box around that
// one is copied to shared memory in rows, zeros beyond the plane, and read there: straight from memory 32 pixels along a slanting line would be 20 accesses.
#pragma once

#include "ops/cuda/warp_tile.cuh"

namespace {

// A tile is 36 pixels from corner to corner; rounding and the pixel after take up to three more. Rows lie 10 banks apart, columns 1 and diagonals 9 and
// 11: in few directions do many of a warp's pixels share a bank.
static_assert(TILE_W * TILE_W + TILE_H * TILE_H <= 36 * 36 && BOXES == 4 * BOX_SIDE * BOX_W);

template <class T>
struct Turn {
  T cosine, sine, center_x, center_y;
  bool on;

  // Where the output pixel (dx, dy) from the centre reads: source_x(dx, row_x(dy)), source_y(dx, row_y(dy)). Forward and backward use these alone: a
  // coordinate beside a whole number then falls on the same side of it in both.
  __device__ __forceinline__ T row_x(T dy) const { return fused(-sine, dy, center_x); }
  __device__ __forceinline__ T row_y(T dy) const { return fused(cosine, dy, center_y); }
  __device__ __forceinline__ T source_x(T dx, T row) const { return fused(cosine, dx, row); }
  __device__ __forceinline__ T source_y(T dx, T row) const { return fused(sine, dx, row); }
};

template <class T>
__device__ __forceinline__ Turn<T> turn_of_sample(const Program& p, int64_t sample) {
  Turn<T> turn;
  turn.on = (p.on(sample) >> static_cast<int>(WarpStage::rotate) & 1) != 0;
  const T turns = static_cast<const T*>(p.params)[sample * WARP_PARAMS + WARP_COLUMN[static_cast<int>(WarpStage::rotate)]];
  sine_cosine_pi(2 * (turns - rounded(turns)), turn.sine, turn.cosine);
  turn.center_x = T(p.W - 1) / 2, turn.center_y = T(p.H - 1) / 2;
  return turn;
}

// Each mirror image belongs to 64 threads, two warps.
struct Quarter {
  int t, thread;
  int x, y;  // corner of the mirror image in the plane

  __device__ __forceinline__ explicit Quarter(const Tile& tile)
      : t(threadIdx.x / 64),
        thread(threadIdx.x % 64),
        x(t & 1 ? tile.W - tile.x0 - tile.w : tile.x0),
        y(t & 2 ? tile.H - tile.y0 - tile.h : tile.y0) {}
};

// Columns first_x, ... and rows first_y, ... of the plane.
struct Box {
  int first_x, first_y, w, h;
};

// Copies the box of the thread's mirror image; the caller's barrier ends it.
template <class T, bool mixed>
__device__ __forceinline__ void load_box(const Array& source, const Tile& tile, const Quarter& quarter, const Box& box, T* boxes) {
  constexpr int COLUMNS_AT_ONCE = BOX_SIDE / 8;
  const int column = quarter.thread % 8;
  T* target = boxes + (quarter.t * BOX_SIDE + quarter.thread / 8) * BOX_W + column;
  bool inside[COLUMNS_AT_ONCE];
#pragma unroll
  for (int i = 0; i < COLUMNS_AT_ONCE; ++i)
    inside[i] = column + 8 * i < box.w && static_cast<unsigned>(box.first_x + column + 8 * i) < static_cast<unsigned>(tile.W);
#pragma unroll 2
  for (int row = quarter.thread / 8; row < box.h; row += 8, target += 8 * BOX_W) {
    const int y = box.first_y + row;
    const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(tile.H);
    const int at = tile.at(box.first_x + column, y);
    T v[COLUMNS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < COLUMNS_AT_ONCE; ++i) v[i] = row_inside && inside[i] ? load<T, mixed>(source, at + 8 * i) : T(0);
#pragma unroll
    for (int i = 0; i < COLUMNS_AT_ONCE; ++i) target[8 * i] = v[i];
  }
}

// ----------------------------------------------------------------------------------------------------------------------- forward

// Calls take(orbit, values) with the values of the tile after the rotation; what take writes at VALUE_AT is read behind a barrier. Bilinear, every
// tap outside is 0.
template <class T, bool mixed, class Take>
__device__ __forceinline__ void rotate_tile(const Tile& tile, const Turn<T>& turn, const Array& source, T* shared, const Take& take) {
  PK_SHARED(int, corner, 4, 2);
  const Quarter quarter(tile);
  {
    // the middle of the mirror image, and how far what it reads lies from the middle's source
    const T half_x = T(tile.w - 1) / 2, half_y = T(tile.h - 1) / 2;
    const T dx = T(quarter.x) + half_x - turn.center_x, dy = T(quarter.y) + half_y - turn.center_y;
    const T x = turn.source_x(dx, turn.row_x(dy)), y = turn.source_y(dx, turn.row_y(dy));
    const T reach_x = magnitude(turn.cosine) * half_x + magnitude(turn.sine) * half_y + T(0.125);
    const T reach_y = magnitude(turn.sine) * half_x + magnitude(turn.cosine) * half_y + T(0.125);
    const T low_x = floored(x - reach_x), low_y = floored(y - reach_y);
    const Box box{static_cast<int>(low_x), static_cast<int>(low_y), min(static_cast<int>(x + reach_x - low_x) + 2, BOX_SIDE),
                  min(static_cast<int>(y + reach_y - low_y) + 2, BOX_SIDE)};
    if (quarter.thread == 0) corner[quarter.t][0] = box.first_x, corner[quarter.t][1] = box.first_y;
    load_box<T, mixed>(source, tile, quarter, box, shared + FORWARD_BOX_AT);
  }
  __syncthreads();
  for_orbits(tile, [&](const Orbit& orbit) {
    T v[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const T dx = T(orbit.x(t)) - turn.center_x, dy = T(orbit.y(t)) - turn.center_y;
      const T x = turn.source_x(dx, turn.row_x(dy)), y = turn.source_y(dx, turn.row_y(dy));
      const T low_x = floored(x), low_y = floored(y), ax = x - low_x, ay = y - low_y;
      // in the box unless rounding exceeds an eighth of a pixel, which takes an image of some 500 000 pixels across
      const unsigned column = min(static_cast<unsigned>(static_cast<int>(low_x) - corner[t][0]), BOX_SIDE - 2u);
      const unsigned row = min(static_cast<unsigned>(static_cast<int>(low_y) - corner[t][1]), BOX_SIDE - 2u);
      const T* const q = shared + FORWARD_BOX_AT + (t * BOX_SIDE + row) * BOX_W + column;
      v[t] = (1 - ay) * ((1 - ax) * q[0] + ax * q[1]) + ay * ((1 - ax) * q[BOX_W] + ax * q[BOX_W + 1]);
    }
    take(orbit, v);
  });
}

// ---------------------------------------------------------------------------------------------------------------------- backward
//
// A cell is the square between four pixels. An output belongs to the cell that holds its source, and gives each corner g times its weight. Turned back, a
// cell fits a square of side sqrt 2, so that its outputs are among 2 x 2. What they give to the corners follows from six sums over them, with the
// place (a_x, a_y) of the source in the cell: g, g a_x, g a_y, g a_x a_y and, for the angle, g a_x^2 and g a_y^2.
//
// The angle in radians moves a source by (-(s_y - c_y), s_x - c_x), and
//
//   dO/ds_x = (1 - a_y) (q01 - q00) + a_y (q11 - q10),   dO/ds_y = (1 - a_x) (q10 - q00) + a_x (q11 - q01).
//
// Sorted by the corner q, the sum of g dO/dangle has a factor for each, and a pixel's derivative is the sum of those that it has in its four cells.

template <class T>
struct Corners {
  T grad[4], derivative[4];  // 0 upper left, 1 upper right, 2 lower left, 3 lower right
};

// Of the box, for cells: outputs are counted from its corner.
template <class T>
struct CellFrame {
  T middle_x, middle_y;  // of the mirror image's cells, from their middle: where turning back puts it in the box
  T from_x, from_y;      // the box's corner from the plane's centre
  T cc, ss, cs;          // products of cosine and sine
  const T* box;
};

// The cell with upper left pixel (px, py) whose middle is (x, y) from the middle of all.
template <class T>
__device__ __forceinline__ Corners<T> corners_of_cell(const Turn<T>& turn, const CellFrame<T>& frame, T x, T y, T px, T py) {
  const int column = static_cast<int>(fused(turn.cosine, x, fused(turn.sine, y, frame.middle_x)));
  const int row = static_cast<int>(fused(turn.cosine, y, fused(-turn.sine, x, frame.middle_y)));
  const T* const g = frame.box + row * BOX_W + column;
  const T dx = T(column) + frame.from_x, dy = T(row) + frame.from_y;
  T ax = 0, ay = 0, v[2][2];  // the place of the first candidate in the cell; what lies there, by rows
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const T row_x = turn.row_x(j == 0 ? dy : dy + 1), row_y = turn.row_y(j == 0 ? dy : dy + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T sx = turn.source_x(i == 0 ? dx : dx + 1, row_x), sy = turn.source_y(i == 0 ? dx : dx + 1, row_y);
      const T value = g[j * BOX_W + i];
      v[j][i] = sx >= px && sx < px + 1 && sy >= py && sy < py + 1 ? value : T(0);
      if (i == 0 && j == 0) ax = sx - px, ay = sy - py;
    }
  }
  // The others lie from the first at (cosine, sine), (-sine, cosine) and their sum; first the moments of that.
  const T right_of = v[0][1] + v[1][1], below = v[1][0] + v[1][1], both = v[1][1], sum = v[0][0] + v[0][1] + below;
  const T way_x = fused(turn.cosine, right_of, -turn.sine * below), way_y = fused(turn.sine, right_of, turn.cosine * below);
  const T way_xx = fused(frame.cc, right_of, fused(frame.ss, below, -2 * frame.cs * both));
  const T way_yy = fused(frame.ss, right_of, fused(frame.cc, below, 2 * frame.cs * both));
  const T way_xy = fused(frame.cs, right_of - below, (frame.cc - frame.ss) * both);
  const T sum_x = fused(ax, sum, way_x), sum_y = fused(ay, sum, way_y);
  const T sum_xx = fused(ax, sum_x + way_x, way_xx), sum_yy = fused(ay, sum_y + way_y, way_yy);
  const T sum_xy = fused(ax, sum_y, fused(ay, way_x, way_xy));
  Corners<T> corners;
  corners.grad[3] = sum_xy;
  corners.grad[2] = sum_y - sum_xy;
  corners.grad[1] = sum_x - sum_xy;
  corners.grad[0] = sum - sum_x - corners.grad[2];
  const T cx = px - turn.center_x, cy = py - turn.center_y;
  const T lower = fused(cy, sum_y, sum_yy), upper = fused(cy, sum, sum_y) - lower;  // sums of g a_y (s_y - c_y) and g (1 - a_y) (s_y - c_y)
  const T right = fused(cx, sum_x, sum_xx), left = fused(cx, sum, sum_x) - right;
  corners.derivative[0] = upper - left;
  corners.derivative[1] = -upper - right;
  corners.derivative[2] = lower + left;
  corners.derivative[3] = right - lower;
  return corners;
}

// The gradients by the tile's pixels before the rotation, at GRAD_AT, and the derivatives of their parts of the sum by the angle, at DERIVATIVE_AT.
// A lane has a column of a mirror image and eight of its rows, or four where a warp holds two rows; what a cell gives to the right goes to the next lane.
template <class T, bool mixed>
__device__ __forceinline__ void adjoint_rotate_tile(const Tile& tile, const Turn<T>& turn, const Array& grad, T* shared) {
  const Quarter quarter(tile);
  CellFrame<T> frame;
  {
    // the middle of the cells, turned back, and how far the middles of cells lie from it
    const T half_x = T(tile.w) / 2, half_y = T(tile.h) / 2;
    const T dx = T(quarter.x) - T(0.5) + half_x - turn.center_x, dy = T(quarter.y) - T(0.5) + half_y - turn.center_y;
    const T x = turn.cosine * dx + turn.sine * dy + turn.center_x, y = turn.cosine * dy - turn.sine * dx + turn.center_y;
    const T reach_x = magnitude(turn.cosine) * half_x + magnitude(turn.sine) * half_y + T(0.0625);
    const T reach_y = magnitude(turn.sine) * half_x + magnitude(turn.cosine) * half_y + T(0.0625);
    const T low_x = floored(x - reach_x), low_y = floored(y - reach_y);
    frame.middle_x = x - low_x, frame.middle_y = y - low_y;
    frame.from_x = low_x - turn.center_x, frame.from_y = low_y - turn.center_y;
    frame.cc = turn.cosine * turn.cosine, frame.ss = turn.sine * turn.sine, frame.cs = turn.cosine * turn.sine;
    frame.box = shared + BOX_AT + quarter.t * BOX_SIDE * BOX_W;
    const Box box{static_cast<int>(low_x), static_cast<int>(low_y), min(static_cast<int>(frame.middle_x + reach_x) + 2, BOX_SIDE),
                  min(static_cast<int>(frame.middle_y + reach_y) + 2, BOX_SIDE)};
    load_box<T, mixed>(grad, tile, quarter, box, shared + BOX_AT);
  }
  __syncthreads();
  const int lanes = tile.lanes(), most = lanes * TILE_H / 64, lane = threadIdx.x & (lanes - 1);
  const int first = (lanes == TILE_W ? quarter.thread / TILE_W : quarter.thread / (TILE_W / 2)) * most;
  const int rows = min(most, tile.h - (lanes == TILE_W ? first : first & ~most));  // of the warp's first lane; the others have no more
  if (rows > 0) {
    const int column = min(lane, tile.w - 1);
    const T half_x = T(tile.w) / 2, half_y = T(tile.h) / 2, last_y = T(tile.h) - half_y;
    const auto place_of = [&](int at_column, int at_row) {
      return (quarter.t * TILE_H + (quarter.t & 2 ? tile.h - 1 - at_row : at_row)) * VALUE_W +
             (quarter.t & 1 ? tile.w - 1 - at_column : at_column);
    };
    T* target = shared + GRAD_AT + place_of(lane, first - 1);
    const int step = quarter.t & 2 ? -VALUE_W : VALUE_W;
    const T x = T(column) + 1 - half_x, px = T(quarter.x + column);
    T y = T(min(first, tile.h)) - half_y,
      py = T(quarter.y + first - 1);                 // no further than the box: of the warp's lower rows there may be fewer
    T upper_grad[2] = {}, upper_derivative[2] = {};  // what the cells above give downwards: to the lane's pixel, to the next one
#pragma unroll 1
    for (int k = 0; k <= rows; ++k) {
      const Corners<T> c = corners_of_cell(turn, frame, x, y, px, py);
      if (k > 0) {
        T left_grad = __shfl_up_sync(ALL, c.grad[1] + upper_grad[1], 1);
        T left_derivative = __shfl_up_sync(ALL, c.derivative[1] + upper_derivative[1], 1);
        if (lane == 0) left_grad = left_derivative = 0;
        if (lane < tile.w && first - 1 + k < tile.h) {
          target[0] = c.grad[0] + upper_grad[0] + left_grad;
          target[DERIVATIVE_AT - GRAD_AT] = c.derivative[0] + upper_derivative[0] + left_derivative;
        }
      }
      target += step;
      y = y + 1 < last_y ? y + 1 : last_y, py += 1;
      upper_grad[0] = c.grad[2], upper_grad[1] = c.grad[3];
      upper_derivative[0] = c.derivative[2], upper_derivative[1] = c.derivative[3];
    }
    // What the left edge's cells give to the first column: lane k has the one beside row first - 1 + k.
    const int row = min(first - 1 + lane, tile.h - 1);
    const Corners<T> c = corners_of_cell(turn, frame, -half_x, T(row) + 1 - half_y, T(quarter.x - 1), T(quarter.y + row));
    const T edge_grad = c.grad[1] + __shfl_up_sync(ALL, c.grad[3], 1);
    const T edge_derivative = c.derivative[1] + __shfl_up_sync(ALL, c.derivative[3], 1);
    __syncwarp();
    if (lane >= 1 && lane <= most && first - 1 + lane < tile.h) {
      T* const edge = shared + GRAD_AT + place_of(0, row);
      edge[0] += edge_grad;
      edge[DERIVATIVE_AT - GRAD_AT] += edge_derivative;
    }
  }
  __syncthreads();
}

}  // namespace
