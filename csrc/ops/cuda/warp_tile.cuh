// SPDX-License-Identifier: MIT
// The tile of a block, its pixels in shared memory, and the blur of both axes with its adjoint.
//
// A tile is a rectangle of the plane's upper left quarter together with its mirror images in the other three: a pixel and the three that flips mix it
// with belong to one thread. All four rectangles are addressed from their own corner of the plane; a symmetric filter does not see the
// difference, and no tile comes within a radius of its far edge, so that paddings fold back at the near edge only.
#pragma once

#include "ops/cuda/warp_program.cuh"

namespace {

constexpr int RAW_W = TILE_W + 2 * REACH, RAW_H = TILE_H + 2 * REACH;
constexpr int MIDDLE_W = TILE_W + 4;  // with RAW_W: runs of 8 floats in two rows lie in different banks
constexpr int VALUE_W = TILE_W;       // a warp has a row
constexpr int RUN = 8;                // outputs a thread makes at a time, from RUN + 2 REACH inputs in registers
static_assert(TILE_W == 32 && TILE_H == 2 * RUN && THREADS == 4 * TILE_H / RUN * TILE_W && TILE_W % RUN == 0);

constexpr int VALUES = 4 * TILE_H * VALUE_W, RAWS = 4 * RAW_H * RAW_W, MIDDLES = 4 * RAW_H * MIDDLE_W;
// The box of one mirror image, from which a rotation reads (warp_turn.cuh).
constexpr int BOX_SIDE = 40, BOX_W = BOX_SIDE + 2, BOXES = 4 * BOX_SIDE * BOX_W;
// Elements of T in dynamic shared memory: the values of the tile and its noise; raw pixels lie there before either is made, and behind them rows that
// are filtered. Boxes for values lie behind these, for gradients in their place. In the backward kernel gradients and derivatives by the parameter
// of the stage behind come before, and rows filtered with slopes after.
constexpr int GRAD_AT = -2 * VALUES, DERIVATIVE_AT = -VALUES, VALUE_AT = 0, NOISE_AT = VALUES, MIDDLE_AT = RAWS,
              SLOPE_MIDDLE_AT = MIDDLE_AT + MIDDLES;
constexpr int FORWARD_BOX_AT = VALUES, BOX_AT = 0;
static_assert(SLOPE_MIDDLE_AT + MIDDLES - GRAD_AT == BLUR_ELEMENTS && 2 * VALUES <= MIDDLE_AT && MIDDLE_AT % 4 == 0 &&
              SLOPE_MIDDLE_AT % 4 == 0);

// What the steps of a launch need. Passes of a backward program take the place of the backward kernel.
inline std::size_t shared_bytes(const Program& p, bool backward, std::size_t element) {
  int elements = VALUES;
  for (int i = p.first; i < p.last; ++i) {
    const Step& s = p.step[i];
    int here = 0;
    for (int k = 0; k < s.stages; ++k)
      if (s.stage[k] == WarpStage::noise) here = MIDDLE_AT;
    if (s.reader == Reader::rotate && element == 4 && FORWARD_BOX_AT + BOXES > here) here = FORWARD_BOX_AT + BOXES;
    if (s.reader == Reader::blur && MIDDLE_AT + MIDDLES > here) here = MIDDLE_AT + MIDDLES;
    if (s.gradient && s.adjoint == Reader::rotate && BOX_AT + BOXES > here) here = BOX_AT + BOXES;
    if (s.gradient && s.adjoint == Reader::blur) here = SLOPE_MIDDLE_AT + MIDDLES;
    if (here > elements) elements = here;
  }
  return static_cast<std::size_t>(elements - (backward ? GRAD_AT : 0)) * element;
}

struct Tile {
  int64_t sample, channel, first;  // first element of the plane in [B, C, H, W]
  int x0, y0, w, h;                // in the upper left quarter
  int W, H;

  // Lanes that a row takes: two rows to a warp where they are short.
  __device__ __forceinline__ int lanes() const { return w <= TILE_W / 2 ? TILE_W / 2 : TILE_W; }
  // Rows that whole runs of outputs take, and so the lines that are filtered.
  __device__ __forceinline__ int lines() const { return (h + RUN - 1) / RUN * RUN + 2 * REACH; }
  // Mirror image t: bit 0 along x, bit 1 along y.
  __device__ __forceinline__ int x(int t, int column) const { return t & 1 ? W - 1 - x0 - column : x0 + column; }
  __device__ __forceinline__ int y(int t, int row) const { return t & 2 ? H - 1 - y0 - row : y0 + row; }
  // In the plane, which has fewer than 2^30 pixels; of a place outside it is no more than a number.
  __device__ __forceinline__ int at(int px, int py) const { return static_cast<int>(static_cast<unsigned>(py) * W + px); }
};

__device__ __forceinline__ Tile tile_of_block(const Program& p) {
  // the grid has B C tiles_y tiles_x blocks: 32 bits hold them
  const unsigned plane = p.tiles.quotient(blockIdx.x), tile = blockIdx.x - plane * p.tiles.divisor, sample = p.channels.quotient(plane);
  const unsigned tile_row = p.tile_columns.quotient(tile), tile_column = tile - tile_row * p.tile_columns.divisor;
  const int x0 = static_cast<int>(tile_column * TILE_W), y0 = static_cast<int>(tile_row * TILE_H);
  return {sample, plane - sample * p.channels.divisor, static_cast<int64_t>(plane) * p.H * p.W, x0,
          y0,     min(TILE_W, (p.W + 1) / 2 - x0),     min(TILE_H, (p.H + 1) / 2 - y0),         p.W,
          p.H};
}

// Pixels of the tile and reach_y, reach_x around them, as the padding gives them; zeros where no tap may see anything. A thread has a column, the same of
// the four mirror images; the last warp has none and does `meanwhile` instead. Ends with a barrier.
template <class T, bool mixed, class Meanwhile>
__device__ __forceinline__ void load_raw(const Array& source, const Tile& tile, int reach_y, int reach_x, WarpBlurPadding padding, T* raw,
                                         const Meanwhile& meanwhile) {
  constexpr int PLACES = RAW_H * RAW_W, LINES_AT_ONCE = THREADS / RAW_W, ROUNDS = (RAW_H + LINES_AT_ONCE - 1) / LINES_AT_ONCE;
  static_assert(LINES_AT_ONCE * RAW_W <= THREADS - 32);
  const int column = threadIdx.x % RAW_W, first = threadIdx.x / RAW_W;
  if (threadIdx.x >= THREADS - 32) meanwhile();
  if (first < LINES_AT_ONCE) {
    // places before the near edge: mirrored, moved to it, or none
    const int mirror = padding == WarpBlurPadding::reflect ? -1 : 0;
    const bool cut = padding == WarpBlurPadding::zeros;
    const int first_x = max(REACH - reach_x, cut ? REACH - tile.x0 : 0), first_y = max(REACH - reach_y, cut ? REACH - tile.y0 : 0);
    const unsigned columns = REACH + tile.w + reach_x - first_x, lines = REACH + tile.h + reach_y - first_y;
    const bool seen_x = static_cast<unsigned>(column - first_x) < columns;
    const int from_x = tile.x0 + column - REACH, x = max(from_x, mirror * from_x);
    const int far_x = tile.W - 1 - x, last = (tile.H - 1) * tile.W;
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      const int line = first + k * LINES_AT_ONCE, from_y = tile.y0 + line - REACH, y = max(from_y, mirror * from_y);
      const int near = y * tile.W, far = last - near;
      T v[4] = {};
      if (seen_x && static_cast<unsigned>(line - first_y) < lines) {
        v[0] = load<T, mixed>(source, near + x), v[1] = load<T, mixed>(source, near + far_x);
        v[2] = load<T, mixed>(source, far + x), v[3] = load<T, mixed>(source, far + far_x);
      }
      if (line < RAW_H) {
#pragma unroll
        for (int t = 0; t < 4; ++t) raw[t * PLACES + line * RAW_W + column] = v[t];
      }
    }
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void read_run(const T* shared, int stride, T (&in)[RUN + 2 * REACH]) {
#pragma unroll
  for (int i = 0; i < RUN + 2 * REACH; ++i) in[i] = shared[i * stride];
}
// Along a row, by vectors of 16 bytes.
__device__ __forceinline__ void read_row(const float* shared, float (&in)[RUN + 2 * REACH]) {
#pragma unroll
  for (int i = 0; i < RUN + 2 * REACH; i += 4) {
    const float4 v = pk::load_vector<float4>(shared + i);
    in[i] = v.x, in[i + 1] = v.y, in[i + 2] = v.z, in[i + 3] = v.w;
  }
}
__device__ __forceinline__ void read_row(const double* shared, double (&in)[RUN + 2 * REACH]) {
#pragma unroll
  for (int i = 0; i < RUN + 2 * REACH; i += 2) {
    const double2 v = pk::load_vector<double2>(shared + i);
    in[i] = v.x, in[i + 1] = v.y;
  }
}
template <int count>
__device__ __forceinline__ void write_row(float* shared, const float (&out)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) pk::store_vector(shared + i, float4{out[i], out[i + 1], out[i + 2], out[i + 3]});
}
template <int count>
__device__ __forceinline__ void write_row(double* shared, const double (&out)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 2) pk::store_vector(shared + i, double2{out[i], out[i + 1]});
}

// out[i] += sum_k taps[|k|] in[REACH + i + k], |k| <= REACH.
template <class T>
__device__ __forceinline__ void filter(const T (&in)[RUN + 2 * REACH], const T (&taps)[REACH + 1], T (&out)[RUN]) {
#pragma unroll
  for (int i = 0; i < RUN; ++i) {
#pragma unroll
    for (int k = 0; k <= 2 * REACH; ++k) out[i] = fused(taps[k < REACH ? REACH - k : k - REACH], in[i + k], out[i]);
  }
}

// What the adjoint of the padding adds at the plane's edge, of which the run is the first: outputs that would lie outside fall back on it.
template <class T>
__device__ __forceinline__ void fold(const T (&in)[RUN + 2 * REACH], const T (&taps)[REACH + 1], WarpBlurPadding padding, T (&out)[RUN]) {
  if (padding == WarpBlurPadding::reflect) {  // pixel i stands at -i too
#pragma unroll
    for (int i = 1; i <= REACH; ++i)
#pragma unroll
      for (int u = 0; u <= REACH - i; ++u) out[i] = fused(taps[u + i], in[REACH + u], out[i]);
  } else if (padding == WarpBlurPadding::replicate) {  // pixel 0 stands at -1, -2, ... too
    T tail = 0;
#pragma unroll
    for (int u = REACH - 1; u >= 0; --u) {
      tail += taps[u + 1];
      out[0] = fused(tail, in[REACH + u], out[0]);
    }
  }
}

template <class T>
__device__ __forceinline__ void read_taps(const T* shared, T (&taps)[REACH + 1]) {
#pragma unroll
  for (int k = 0; k <= REACH; ++k) taps[k] = shared[k];
}

// Filters the rows of raw into middle; an axis that is not blurred multiplies by `alone`. Ends with a barrier. adjoint: with fold.
template <class T, bool adjoint>
__device__ __forceinline__ void filter_rows(const T* raw, const Tile& tile, int reach, WarpBlurPadding padding, const T* shared_taps,
                                            T alone, T* middle) {
  T taps[REACH + 1];
  read_taps(shared_taps, taps);
  for (int e = threadIdx.x; e < 4 * RAW_H * (TILE_W / RUN); e += THREADS) {
    const int run = e % (TILE_W / RUN), line = e / (TILE_W / RUN);
    if (run * RUN >= tile.w || line % RAW_H >= tile.lines()) continue;
    T in[RUN + 2 * REACH], out[RUN] = {};
    read_row(raw + line * RAW_W + run * RUN, in);
    if (reach == 0) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) out[i] = alone * in[REACH + i];
    } else {
      filter(in, taps, out);
      if (adjoint && tile.x0 == 0 && run == 0) fold(in, taps, padding, out);
    }
    write_row(middle + line * MIDDLE_W + run * RUN, out);
  }
  __syncthreads();
}

// A thread's run of a column of middle: it makes RUN outputs from row `row` of mirror image t on.
struct ColumnRun {
  int t, row, column;
  __device__ __forceinline__ ColumnRun()
      : t(threadIdx.x / (2 * TILE_W)), row(threadIdx.x / TILE_W % 2 * RUN), column(threadIdx.x % TILE_W) {}
};

template <class T, bool adjoint>
__device__ __forceinline__ void filter_column(const T* middle, const ColumnRun& run, const Tile& tile, int reach, WarpBlurPadding padding,
                                              const T (&taps)[REACH + 1], T alone, T (&out)[RUN]) {
  if (run.column >= tile.w || run.row >= tile.h) return;
  T in[RUN + 2 * REACH];
  read_run(middle + (run.t * RAW_H + run.row) * MIDDLE_W + run.column, MIDDLE_W, in);
  if (reach == 0) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) out[i] = fused(alone, in[REACH + i], out[i]);
    return;
  }
  filter(in, taps, out);
  if (adjoint && tile.y0 == 0 && run.row == 0) fold(in, taps, padding, out);
}

template <class T>
__device__ __forceinline__ void write_column(T* values, const ColumnRun& run, const Tile& tile, const T (&out)[RUN]) {
  if (run.column >= tile.w) return;
#pragma unroll
  for (int i = 0; i < RUN; ++i)
    if (run.row + i < tile.h) values[(run.t * TILE_H + run.row + i) * VALUE_W + run.column] = out[i];
}

// Taps of a sample in shared memory. Below the least sigma, and where the blur is off, both radii are 0: the identity, to the bit.
template <class T>
struct Taps {
  const T* weight;
  const T* slope;  // d weight / d sigma
  int reach_y, reach_x;

  __device__ __forceinline__ bool is_identity() const { return reach_y == 0 && reach_x == 0; }
};

template <class T>
__device__ __forceinline__ T sigma_of_sample(const Program& p, int64_t sample) {
  const bool on = (p.on(sample) >> static_cast<int>(WarpStage::blur) & 1) != 0;
  const T level = static_cast<const T*>(p.params)[sample * WARP_PARAMS];
  return on ? magnitude(static_cast<T>(p.sigma_max) * level) : T(0);
}

template <class T>
__device__ __forceinline__ Taps<T> taps_of_sample(const Program& p, int64_t sample, int radius_y, int radius_x) {
  PK_SHARED(T, weight, MOST_TAPS);
  PK_SHARED(T, slope, MOST_TAPS);
  const T sigma = sigma_of_sample<T>(p, sample);
  if (sigma < T(WARP_LEAST_SIGMA)) return {weight, slope, 0, 0};
  make_taps(sigma, max(radius_y, radius_x), weight, slope);
  return {weight, slope, radius_y, radius_x};
}

// Of the blur by tiles: the taps' table is in shared memory, weights, then slopes, zeros beyond the radius.
constexpr int SLOPES_AT = REACH + 1, TAPS = 2 * (REACH + 1);

struct Reach {
  int y, x;
  __device__ __forceinline__ bool is_identity() const { return y == 0 && x == 0; }
};

template <class T>
__device__ __forceinline__ Reach reach_of_tiles(const Program& p, T sigma) {
  return sigma < T(WARP_LEAST_SIGMA) ? Reach{0, 0} : Reach{p.radius_y, p.radius_x};
}

// By one warp; the caller's barrier ends it. Eight lanes hold the taps, the other lanes the same.
template <class T>
__device__ __forceinline__ void make_tile_taps(const Program& p, T sigma, T* taps) {
  static_assert(REACH < 8);
  const int k = threadIdx.x % 8;
  const T inverse = T(1) / (sigma < T(WARP_LEAST_SIGMA) ? T(1) : sigma), ratio = T(k) * inverse, square = T(k) * T(k);
  const T power = k <= max(p.radius_y, p.radius_x) ? exponential(ratio * ratio * T(-0.5)) : T(0);
  T total = k == 0 ? power : 2 * power, squares = total * square;
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) {
    total += __shfl_xor_sync(ALL, total, lanes);
    squares += __shfl_xor_sync(ALL, squares, lanes);
  }
  const T share = T(1) / total, weight = power * share;
  if (threadIdx.x % 32 <= REACH) {
    taps[k] = weight;
    taps[SLOPES_AT + k] = weight * (square - squares * share) * inverse * inverse * inverse;
  }
}

// The same inputs with weights and slopes: out and slope_out, from the sums of the two inputs that have a tap. An axis that is not blurred has the weight
// 1 and the slope 0. at_edge: with what the padding's adjoint adds.
template <class T>
__device__ __forceinline__ void filter_twice(const T (&in)[RUN + 2 * REACH], const T (&weight)[REACH + 1], const T (&slope)[REACH + 1],
                                             int reach, WarpBlurPadding padding, bool at_edge, T (&out)[RUN], T (&slope_out)[RUN]) {
  if (reach == 0) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) out[i] = in[REACH + i];
    return;
  }
#pragma unroll
  for (int i = 0; i < RUN; ++i) {
    out[i] = weight[0] * in[REACH + i], slope_out[i] = slope[0] * in[REACH + i];
#pragma unroll
    for (int k = 1; k <= REACH; ++k) {
      const T pair = in[REACH + i - k] + in[REACH + i + k];
      out[i] = fused(weight[k], pair, out[i]), slope_out[i] = fused(slope[k], pair, slope_out[i]);
    }
  }
  if (at_edge) {
    fold(in, weight, padding, out);
    fold(in, slope, padding, slope_out);
  }
}

// The adjoint along rows, from raw; without a slope_middle with the weights only. Ends with a barrier.
template <class T>
__device__ __forceinline__ void filter_rows_twice(const T* raw, const Tile& tile, const T (&weight)[REACH + 1], const T (&slope)[REACH + 1],
                                                  int reach, WarpBlurPadding padding, T* middle, T* slope_middle) {
#pragma unroll 1
  for (int e = threadIdx.x; e < 4 * RAW_H * (TILE_W / RUN); e += THREADS) {
    const int run = e % (TILE_W / RUN), line = e / (TILE_W / RUN);
    if (run * RUN >= tile.w || line % RAW_H >= tile.lines()) continue;
    T in[RUN + 2 * REACH], out[RUN] = {}, slope_out[RUN] = {};
    read_row(raw + line * RAW_W + run * RUN, in);
    filter_twice(in, weight, slope, reach, padding, tile.x0 == 0 && run == 0, out, slope_out);
    write_row(middle + line * MIDDLE_W + run * RUN, out);
    if (slope_middle) write_row(slope_middle + line * MIDDLE_W + run * RUN, slope_out);
  }
  __syncthreads();
}

// The adjoint along a thread's run of a column, and its derivative by sigma if slopes.
template <class T>
__device__ __forceinline__ void filter_column_twice(const T* shared, const ColumnRun& run, const Tile& tile, const T (&weight)[REACH + 1],
                                                    const T (&slope)[REACH + 1], int reach, WarpBlurPadding padding, bool slopes,
                                                    T (&out)[RUN], T (&by_sigma)[RUN]) {
  if (run.column >= tile.w || run.row >= tile.h) return;
  const int at = (run.t * RAW_H + run.row) * MIDDLE_W + run.column;
  const bool at_edge = tile.y0 == 0 && run.row == 0;
  T in[RUN + 2 * REACH];
  read_run(shared + MIDDLE_AT + at, MIDDLE_W, in);
  filter_twice(in, weight, slope, reach, padding, at_edge, out, by_sigma);
  if (!slopes) return;
  read_run(shared + SLOPE_MIDDLE_AT + at, MIDDLE_W, in);
  if (reach == 0) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) by_sigma[i] += in[REACH + i];
    return;
  }
  filter(in, weight, by_sigma);
  if (at_edge) fold(in, weight, padding, by_sigma);
}

}  // namespace
