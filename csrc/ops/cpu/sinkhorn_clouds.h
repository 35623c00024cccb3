// SPDX-License-Identifier: MIT
// Two clouds of points, and the blocks of scores between them that the Sinkhorn kernels from features work on.
//
//   -C_ij / epsilon = scale <x_i, y_j> + bias_i + bias_j
#pragma once

#include <array>
#include <new>

#include "common/rows.h"
#include "ops/cpu/sinkhorn_dense.h"

namespace {

constexpr int64_t BLOCK_BYTES = 512 << 10;  // of scores: half of L2

template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data;
};

SinkhornChunks chunks_of(int64_t rows, int64_t others) {
  const int64_t wanted = std::clamp<int64_t>(rows * others >> 15, 1, 16);
  const int64_t size = round_up((rows + wanted - 1) / wanted, 16);
  return {size, (rows + size - 1) / size};
}

int64_t most_chunks(int64_t N, int64_t M) { return std::max(chunks_of(N, M).count, chunks_of(M, N).count); }

// One of the two clouds. Absent points are zero, whatever the input holds; their potential is -infinity.
template <class T>
struct Cloud {
  int64_t count, padded, D;
  T *points, *panels, *bias, *potential, *mass, *active, *log_mass, *inverse_norm;  // [padded, D], packed [D, count], [padded] ...
  T* scratch;                                                                       // [padded]

  void layout(int64_t points_count, int64_t dimensions, Arena& arena) {
    count = points_count, padded = round_up(count, 16), D = dimensions;
    points = arena.take<T>(padded * D);
    panels = arena.take<T>(padded * D);
    for (T** piece : {&bias, &potential, &mass, &active, &log_mass, &inverse_norm, &scratch}) *piece = arena.take<T>(padded);
  }

  // Adds up the present points, for the center.
  double add_to(double* center) const {
    double present = 0;
    for (int64_t i = 0; i < count; ++i)
      if (active[i] != T(0)) {
        for (int64_t d = 0; d < D; ++d) center[d] += points[i * D + d];
        present += 1;
      }
    return present;
  }

  void read(const T* source) {
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t d = 0; d < D; ++d) points[i * D + d] = i < count && active[i] != T(0) ? source[i * D + d] : T(0);
  }

  // Squared: distances do not change when the center moves to the origin, and lose fewer digits there. Cosine: unit vectors.
  void prepare(bool cosine, const double* center, T inverse_epsilon) {
    for (int64_t i = 0; i < padded; ++i) {
      T* const x = points + i * D;
      const bool present = i < count && active[i] != T(0);
      if (!cosine && present)
        for (int64_t d = 0; d < D; ++d) x[d] = static_cast<T>(x[d] - center[d]);
      const double squared = squared_norm(x, D);
      const bool zero = squared <= SINKHORN_NORM_FLOOR * SINKHORN_NORM_FLOOR;
      const double inverse = zero ? 0.0 : 1 / std::sqrt(squared);  // subnormal in float for a length near the end of its range
      inverse_norm[i] = static_cast<T>(inverse);
      if (cosine)
        for (int64_t d = 0; d < D; ++d) x[d] = static_cast<T>(x[d] * inverse);
      bias[i] = cosine ? -inverse_epsilon / 2 : static_cast<T>(-squared * inverse_epsilon);
    }
    pack_panels(points, 1, D, D, count, panels);
  }
};

template <class T>
struct Pair {
  SinkhornEach each;
  bool cosine;
  T epsilon, inverse_epsilon;
  Cloud<T> x, y;
  T* partial;      // [chunks, padded]
  double* totals;  // [chunks, 4]
  double* center;  // [D]

  void layout(int64_t N, int64_t M, int64_t D, Arena& arena) {
    x.layout(N, D, arena), y.layout(M, D, arena);
    partial = arena.take<T>(most_chunks(N, M) * std::max(x.padded, y.padded));
    totals = arena.take<double>(4 * most_chunks(N, M));
    center = arena.take<double>(D);
  }

  void prepare(const T* x_source, const T* y_source) {
    x.read(x_source), y.read(y_source);
    std::fill(center, center + x.D, 0.0);
    const double present = x.add_to(center) + y.add_to(center);
    for (int64_t d = 0; d < x.D; ++d) center[d] /= std::max(present, 1.0);
    x.prepare(cosine, center, inverse_epsilon), y.prepare(cosine, center, inverse_epsilon);
  }

  static int64_t block_rows(const Cloud<T>& columns) {
    const int64_t fitting = BLOCK_BYTES / static_cast<int64_t>(sizeof(T)) / columns.padded;
    return std::clamp<int64_t>(fitting / TILE_ROWS * TILE_ROWS, TILE_ROWS, 64);
  }

  // body(first row, end, products [end - first, columns.padded], column sums of the chunk, totals of the chunk [4]) for every block of rows;
  // the sums are added up into partial, the totals into the result.
  template <class Body>
  std::array<double, 4> over_blocks(const Cloud<T>& rows, const Cloud<T>& columns, Body body) {
    const SinkhornChunks chunks = chunks_of(rows.count, columns.count);
    for_chunks(each, chunks.count, [&](int64_t c) {
      const int64_t block = block_rows(columns), last = std::min(rows.count, (c + 1) * chunks.rows);
      Buffer<T> products(block * columns.padded), tile(block * rows.D);
      T* const sums = partial + c * columns.padded;
      std::fill(sums, sums + columns.padded, T(0));
      std::fill(totals + 4 * c, totals + 4 * c + 4, 0.0);
      const T scale = (cosine ? 1 : 2) * inverse_epsilon;
      for (int64_t i = c * chunks.rows; i < last; i += block) {
        const int64_t end = std::min(last, i + block), height = round_up(end - i, TILE_ROWS);
        for (int64_t k = 0; k < height * rows.D; ++k) tile.data[k] = k < (end - i) * rows.D ? scale * rows.points[i * rows.D + k] : T(0);
        multiply_panels(tile.data, rows.D, columns.panels, height, rows.D, columns.count, products.data, columns.padded);
        body(i, end, products.data, sums, totals + 4 * c);
      }
    });
    add_chunks(partial, columns.padded, chunks.count);
    std::array<double, 4> total{};
    for (int64_t c = 0; c < chunks.count; ++c)
      for (int k = 0; k < 4; ++k) total[k] += totals[4 * c + k];
    return total;
  }

  // -C_ij / epsilon from the product, and with v_j, which is -infinity where there is no point.
  PK_MEMBER Vec<T> negative_cost(const Cloud<T>& columns, Vec<T> product, T row_bias, int64_t j) const {
    const Vec<T> none{}, negative = product + (row_bias + load(columns.bias + j));
    return !cosine && negative > none ? none : negative;
  }
  PK_MEMBER Vec<T> score(const Cloud<T>& columns, Vec<T> product, T row_bias, int64_t j) const {
    return load(columns.potential + j) + negative_cost(columns, product, row_bias, j);
  }

  static int64_t vectors(const Cloud<T>& cloud) { return round_up(cloud.count, LANES<T>); }
};

template <template <class> class Worker, class Problem>
int64_t scratch_bytes(const Problem& p) {
  return with_type(p.kind, [&](auto zero) {
    Arena arena(nullptr);
    Worker<decltype(zero)>(p, 0, arena, nullptr);
    return arena.bytes();
  });
}

}  // namespace
