// SPDX-License-Identifier: MIT
// Sinkhorn on the CPU: the gradient at the fixed point. The equations stand in ops/sinkhorn.h.
//
// One side is eliminated: (diag(q) - P^T diag(1/p) P) y = h_columns - P^T (h_rows / p), x = (h_rows - P y) / p. The matrix is a graph Laplacian:
// semidefinite, with one null vector a connected component. Up to DIRECT entries of the shorter side it is factored, in double, and every
// pivot that is nothing but rounding is left out. Beyond that conjugate residuals run on the fused pass of the iterations; as many steps as that
// factor takes are enough at a large epsilon, at a small one they would be thousands: up to FACTORED entries it is factored then after all.
// One problem on one Cascade Lake core (AVX-512), with conjugate gradients, ms at epsilon .5 / .01, unit vectors: 512 x 512 3 / 15, by them alone
// 3 / 61 to 76; 1024 x 1024 10 / 125 to 156, 10 / 310 to 501.

#include "common/rows.h"
#include "ops/cpu/sinkhorn_dense.h"

namespace {

constexpr int64_t DIRECT = 256;
constexpr int64_t FACTORED = 1024;
constexpr int64_t BLOCK = 64;             // rows of P that enter the factored matrix together, and columns of its factor
constexpr double SMALLEST_PIVOT = 1e-12;  // relative to the diagonal
constexpr int64_t MOST_STEPS = 2000;      // of the conjugate residuals; a fourth of FACTORED entries take as long as the factor

template <class T>
struct Implicit {
  const SinkhornBackward& p;
  Cost<T> cost;
  SinkhornEach each;
  SinkhornChunks chunks;
  int64_t b, rows, stride, small, padded, pitch;  // small: of the side that is solved for, where it may be factored
  T epsilon, grad_transport = 0, grad_value = 0;
  double dropped = 0;  // from the right side's rows, times their masses, and added to its columns
  const T *f, *g, *grad_f, *grad_g;
  T *plan, *partial, *u, *v, *inverse_rows, *direction;    // [rows, stride], [chunks, stride], [rows], [stride], [rows], [stride]
  double *p_sum, *x, *row_side, *q_sum, *y, *column_side;  // [rows] and [stride]
  double *residual, *search, *product, *search_product;    // [stride]: z, its search direction, L of both
  double* totals;                                          // [chunks, 2]
  double *wide_partial, *matrix, *block;                   // [chunks, stride], [padded, pitch], [BLOCK, pitch]

  Implicit(const SinkhornBackward& problem, int64_t index, Arena& arena, SinkhornEach runner) : p(problem), each(runner), b(index) {
    chunks = sinkhorn_chunks(p.N, p.M);
    rows = round_up(p.N, 16), stride = round_up(p.M, LANES<T>);
    small = std::min(p.N, p.M) <= FACTORED ? std::min(p.N, p.M) : 0;
    padded = round_up(small, 2 * LANES<double> > TILE_ROWS ? 2 * LANES<double> : TILE_ROWS);
    pitch = padded + LANES<double>;  // rows of a power of two would fall on one another in the cache
    plan = arena.take<T>(rows * stride);
    partial = arena.take<T>(chunks.count * stride);
    for (T** piece : {&u, &inverse_rows}) *piece = arena.take<T>(rows);
    for (T** piece : {&v, &direction}) *piece = arena.take<T>(stride);
    for (double** piece : {&p_sum, &x, &row_side}) *piece = arena.take<double>(rows);
    for (double** piece : {&q_sum, &y, &column_side, &residual, &search, &product, &search_product}) *piece = arena.take<double>(stride);
    totals = arena.take<double>(chunks.count * 2);
    wide_partial = arena.take<double>(chunks.count * stride);
    matrix = arena.take<double>(padded * pitch);
    block = arena.take<double>(BLOCK * pitch);
    if (arena.counts_only()) return;
    epsilon = static_cast<const T*>(p.epsilon)[b];
    cost = {static_cast<const T*>(p.cost) + b * p.N * p.M, p.N, p.M, 1 / epsilon};
    if (p.grad_transport_cost) grad_transport = static_cast<const T*>(p.grad_transport_cost)[b];
    if (p.grad_entropic_value) grad_value = static_cast<const T*>(p.grad_entropic_value)[b];
    f = static_cast<const T*>(p.f) + b * p.N, g = static_cast<const T*>(p.g) + b * p.M;
    grad_f = p.grad_f ? static_cast<const T*>(p.grad_f) + b * p.N : nullptr;
    grad_g = p.grad_g ? static_cast<const T*>(p.grad_g) + b * p.M : nullptr;
    for (int64_t i = 0; i < rows; ++i) u[i] = i < p.N ? f[i] * cost.inverse_epsilon : -INFINITE<T>;
    for (int64_t j = 0; j < stride; ++j) v[j] = j < p.M ? g[j] * cost.inverse_epsilon : -INFINITE<T>;
  }

  template <class Body>
  void over_chunks(Body body) {
    for_chunks(each, chunks.count, [&](int64_t c) {
      totals[2 * c] = totals[2 * c + 1] = 0;
      body(c * chunks.rows, std::min(p.N, (c + 1) * chunks.rows), partial + c * stride, totals + 2 * c);
    });
  }

  // P, its marginals, and the right side.
  void begin() {
    for (double* piece : {p_sum, row_side}) std::fill(piece, piece + rows, 0.0);
    over_chunks([&](int64_t first, int64_t last, T* sums, double*) {
      std::fill(sums, sums + stride, T(0));
      fill_kernel(cost, u, v, plan, stride, first, last == p.N ? rows : last);
      for (int64_t i = first; i < last; ++i) {
        Vec<T> transport{};
        if (grad_transport != T(0))
          for (int64_t j = 0; j < stride; j += LANES<T>) {
            const Vec<T> mass = load(plan + i * stride + j), none{}, moved = mass == none ? none : mass * cost.at(i, j, T(0));
            transport += moved;
            store(sums + j, load(sums + j) + moved);
          }
        row_side[i] = grad_transport * reduce_sum(transport) + (grad_f && u[i] != -INFINITE<T> ? epsilon * grad_f[i] : T(0));
      }
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; ++j)
      column_side[j] = grad_transport * partial[j] + (grad_g && v[j] != -INFINITE<T> ? epsilon * grad_g[j] : T(0));
    // In double, or the matrix would lose its null vector, and with it the digits of what is nearly one.
    std::fill(x, x + rows, 1.0), std::fill(y, y + stride, 1.0);
    times(y, p_sum);
    times_transposed(x, q_sum);
    // Only what is orthogonal to (1, -1) can be met: the rest would shift f against g. The part of the transport cost is, but for rounding.
    // Every entry loses as much as its mass says: beside a light one the rounding of the sums would be large.
    double excess = 0, mass = 0;
    for (int64_t i = 0; i < p.N; ++i)
      if (p_sum[i] > 0) excess += grad_f ? static_cast<double>(epsilon) * grad_f[i] : 0.0, mass += p_sum[i];
    for (int64_t j = 0; j < p.M; ++j)
      if (q_sum[j] > 0) excess -= grad_g ? static_cast<double>(epsilon) * grad_g[j] : 0.0, mass += q_sum[j];
    dropped = mass > 0 ? excess / mass : 0.0;
    for (int64_t i = 0; i < rows; ++i) row_side[i] = p_sum[i] > 0 ? row_side[i] - dropped * p_sum[i] : p_sum[i];
    for (int64_t j = 0; j < stride; ++j) column_side[j] = q_sum[j] > 0 ? column_side[j] + dropped * q_sum[j] : q_sum[j];
  }

  // result = P^T (rows), or P (columns), in double.
  void times_transposed(const double* of_rows, double* result) {
    over_chunks([&](int64_t first, int64_t last, T* sums, double*) {
      double* const mine = wide_partial + (sums - partial);
      std::fill(mine, mine + stride, 0.0);
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < stride; j += LANES<double>)
          store(mine + j, load(mine + j) + of_rows[i] * load_double(plan + i * stride + j));
    });
    add_chunks(wide_partial, stride, chunks.count);
    std::copy(wide_partial, wide_partial + stride, result);
  }
  void times(const double* of_columns, double* result) {
    over_chunks([&](int64_t first, int64_t last, T*, double*) {
      for (int64_t i = first; i < last; ++i) {
        Vec<double> sum{};
        for (int64_t j = 0; j < stride; j += LANES<double>) sum += load_double(plan + i * stride + j) * load(of_columns + j);
        result[i] = reduce_sum(sum);
      }
    });
  }

  // ------------------------------------------------------------------------------------------------------- direct

  // diag(weight) - Z^T Z, lower tiles, where Z is P with its rows scaled by 1 / sqrt(p), or P^T by 1 / sqrt(q).
  void build(bool columns) {
    const double *const kept = columns ? q_sum : p_sum, *const gone = columns ? p_sum : q_sum;
    const int64_t others = columns ? p.N : p.M;
    std::fill(matrix, matrix + padded * pitch, 0.0);
    for (int64_t begin = 0; begin < others; begin += BLOCK) {
      const int64_t count = std::min(BLOCK, others - begin);
      for (int64_t i = 0; i < count; ++i) {
        const double scale = gone[begin + i] > 0 ? 1 / std::sqrt(gone[begin + i]) : 0.0;
        double* const row = block + i * pitch;
        if (columns)
          for (int64_t j = 0; j < small; ++j) row[j] = scale * static_cast<double>(plan[(begin + i) * stride + j]);
        else
          for (int64_t j = 0; j < small; ++j) row[j] = scale * static_cast<double>(plan[j * stride + begin + i]);
        std::fill(row + small, row + padded, 0.0);
      }
      add_products(0, block, 1, pitch, count);
    }
    for (int64_t i = 0; i < small; ++i) {
      for (int64_t j = 0; j <= i; ++j) matrix[i * pitch + j] = -matrix[i * pitch + j];
      matrix[i * pitch + i] += kept[i];
    }
  }

  // Lower tiles of the matrix from row and column begin on += A B, with B the first rows of block and A [rows, depth] given by its strides.
  void add_products(int64_t begin, const double* a, int64_t a_row, int64_t a_depth, int64_t depth) {
    constexpr int64_t width = 2 * LANES<double>;
    for_chunks(each, (padded - begin) / width, [&](int64_t tile) {
      const int64_t j = begin + tile * width;
      for (int64_t i = j / TILE_ROWS * TILE_ROWS; i < padded; i += TILE_ROWS)
        tile_product<double, 2>(a + i * a_row, a_row, a_depth, block + j, pitch, depth, matrix + i * pitch + j, pitch, true);
    });
  }

  // Row i of the factor in columns [begin, end): those before them have been taken off.
  void factor_row(int64_t i, int64_t begin, int64_t end) {
    double* const row = matrix + i * pitch;
    for (int64_t j = begin; j < end; ++j)
      row[j] = (row[j] - dot(row + begin, matrix + j * pitch + begin, j - begin)) * matrix[j * pitch + j];
  }

  // Cholesky's factor in place, BLOCK columns at a time, with the inverse of every pivot in its place. 0 stands for a pivot that is lost, and
  // for that of the heaviest entry, which stays at 0: beside a light one all others would nearly have a null vector left.
  void factor(const double* kept) {
    const int64_t heaviest = std::max_element(kept, kept + small) - kept;
    for (int64_t begin = 0; begin < small; begin += BLOCK) {
      const int64_t end = std::min(small, begin + BLOCK);
      for (int64_t i = begin; i < end; ++i) {
        factor_row(i, begin, i);
        double* const row = matrix + i * pitch;
        const double pivot = row[i] - dot(row + begin, row + begin, i - begin);
        row[i] = i == heaviest || pivot <= SMALLEST_PIVOT * kept[i] ? 0.0 : 1 / std::sqrt(pivot);
      }
      if (end == small) break;
      for_chunks(each, (small - end + BLOCK - 1) / BLOCK, [&](int64_t part) {
        for (int64_t i = end + part * BLOCK; i < std::min(small, end + (part + 1) * BLOCK); ++i) factor_row(i, begin, end);
      });
      for (int64_t d = 0; d < BLOCK; ++d)
        for (int64_t j = end; j < padded; ++j) block[d * pitch + j] = j < small ? -matrix[j * pitch + begin + d] : 0.0;
      add_products(end, matrix + begin, pitch, 1, BLOCK);
    }
  }

  // Solves matrix z = side in place.
  void solve_factored(const double* kept, double* side) {
    factor(kept);
    for (int64_t i = 0; i < small; ++i) {
      const double* const row = matrix + i * pitch;
      side[i] = (side[i] - dot(row, static_cast<const double*>(side), i)) * row[i];
    }
    for (int64_t i = small - 1; i >= 0; --i) {
      const double* const row = matrix + i * pitch;
      side[i] *= row[i];
      for (int64_t j = 0; j < i; ++j) side[j] -= row[j] * side[i];
    }
  }

  void solve_directly() {
    const bool columns = p.M <= p.N;
    double *const kept = columns ? q_sum : p_sum, *const gone = columns ? p_sum : q_sum;
    double *const solved = columns ? y : x, *const other = columns ? x : y;
    const double *const kept_side = columns ? column_side : row_side, *const gone_side = columns ? row_side : column_side;
    const int64_t others = columns ? p.N : p.M;
    build(columns);
    for (int64_t i = 0; i < others; ++i) other[i] = gone[i] > 0 ? gone_side[i] / gone[i] : gone[i];
    std::fill(other + others, other + (columns ? rows : stride), 0.0);
    if (columns)
      times_transposed(other, solved);
    else
      times(other, solved);
    for (int64_t j = 0; j < small; ++j) solved[j] = kept_side[j] - solved[j];
    std::fill(solved + small, solved + (columns ? stride : rows), 0.0);
    solve_factored(kept, solved);
    if (columns)
      times(solved, other);
    else
      times_transposed(solved, other);
    for (int64_t i = 0; i < others; ++i) other[i] = gone[i] > 0 ? (gone_side[i] - other[i]) / gone[i] : gone[i];
  }

  // ------------------------------------------------------------------------------------------------------- conjugate residuals

  // product = q z - P^T (P z / p) in one pass over P.
  void apply(const double* z) {
    for (int64_t j = 0; j < stride; ++j) direction[j] = static_cast<T>(z[j]);
    over_chunks([&](int64_t first, int64_t last, T* sums, double*) {
      auto finish = [&](int64_t i, Four<T> r) __attribute__((always_inline)) { return r * load_four(inverse_rows + i); };
      fused_rows_long(plan, stride, first, round_up(last, ROWS), direction, sums, finish);  // short rows are solved directly
    });
    add_chunks(partial, stride, chunks.count);
    for (int64_t j = 0; j < stride; ++j) product[j] = q_sum[j] * static_cast<double>(direction[j]) - partial[j];
  }

  // Whether that met the right side, but for what it has along null vectors. Conjugate gradients would run away with that; here L z alone counts, of
  // the matrix L and the scaled residual z. It is to be small without the scale, in which light entries outweigh all others.
  bool solve_iteratively(int64_t most_steps) {
    const double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-13, rounding = sizeof(T) == 4 ? 1e-6 : 2e-15;
    for (int64_t i = 0; i < rows; ++i) {
      inverse_rows[i] = p_sum[i] > 0 ? static_cast<T>(1 / p_sum[i]) : T(0);
      x[i] = p_sum[i] > 0 ? row_side[i] / p_sum[i] : p_sum[i];
    }
    times_transposed(x, residual);
    for (int64_t j = 0; j < stride; ++j) {
      residual[j] = q_sum[j] > 0 ? (column_side[j] - residual[j]) / q_sum[j] : 0.0;
      search[j] = search_product[j] = y[j] = 0;
    }
    double before = 0, start = 0;
    bool met = false;
    for (int64_t step = 0; step < most_steps; ++step) {
      apply(residual);
      double energy = 0, scale = 0, size = 0, curvature = 0;
      for (int64_t j = 0; j < p.M; ++j)
        energy += residual[j] * product[j], scale += residual[j] * (q_sum[j] * residual[j]), size += std::abs(product[j]);
      if (step == 0) start = size;
      met = !(size > tolerance * start) || !(energy > rounding * scale);
      if (met) break;
      const double keep = step == 0 ? 0.0 : energy / before;
      for (int64_t j = 0; j < p.M; ++j) {
        search[j] = residual[j] + keep * search[j], search_product[j] = product[j] + keep * search_product[j];
        if (q_sum[j] > 0) curvature += search_product[j] * (search_product[j] / q_sum[j]);
      }
      if (!(curvature > 0)) break;  // it has vanished in the type
      const double length = energy / curvature;
      for (int64_t j = 0; j < p.M; ++j)
        if (q_sum[j] > 0) y[j] += length * search[j], residual[j] -= length * (search_product[j] / q_sum[j]);
      before = energy;
    }
    if (!met && most_steps < MOST_STEPS) return false;
    times(y, x);
    for (int64_t i = 0; i < rows; ++i) x[i] = p_sum[i] > 0 ? (row_side[i] - x[i]) / p_sum[i] : p_sum[i];
    return true;
  }

  // ------------------------------------------------------------------------------------------------------- result

  // Of all solutions the one with sum p x = sum q y: what is to be taken from x and added to y. Without the masses it would be as large as x of
  // a light entry, and the others would not survive it.
  double shift() const {
    double excess = 0, mass = 0;
    for (int64_t i = 0; i < p.N; ++i)
      if (p_sum[i] > 0) excess += p_sum[i] * x[i], mass += p_sum[i];
    for (int64_t j = 0; j < p.M; ++j)
      if (q_sum[j] > 0) excess -= q_sum[j] * y[j], mass += q_sum[j];
    return mass > 0 ? excess / mass : 0.0;
  }

  // C_bar = P (tc (1 - C / epsilon) + e + (x_i + y_j) / epsilon). M_bar has the row sums -epsilon f_bar, but for what was dropped, and likewise
  // column sums: in epsilon_bar C becomes C - f - g = -epsilon log P, and large terms that cancel are gone.
  void end() {
    for (int64_t j = 0; j < stride; ++j) direction[j] = static_cast<T>(j < p.M ? y[j] : 0.0);
    over_chunks([&](int64_t first, int64_t last, T*, double* total) {
      for (int64_t i = first; i < last; ++i) {
        Vec<T> weighted{}, entropy{};
        const T mine = static_cast<T>(x[i]);
        for (int64_t j = 0; j < stride; j += LANES<T>) {
          const Vec<T> none{}, mass = load(plan + i * stride + j), c = cost.at(i, j, T(0));
          const Vec<T> m = mass == none ? none : mass * (grad_transport * c - (mine + load(direction + j)));
          const Vec<T> log_mass = u[i] + cost.score(i, j, v);
          weighted -= mass == none ? none : m * log_mass;
          entropy += mass == none ? none : mass * (log_mass - T(1));
          const Vec<T> direct = mass * (grad_transport + grad_value);
          store_part(static_cast<T*>(p.grad_cost) + (b * p.N + i) * p.M + j, direct - m * cost.inverse_epsilon, p.M - j);
        }
        total[0] += reduce_sum(weighted);
        total[1] += reduce_sum(entropy);
      }
    });
    double grad_epsilon = 0;
    for (int64_t c = 0; c < chunks.count; ++c)
      grad_epsilon += totals[2 * c] / epsilon + static_cast<double>(grad_value) * totals[2 * c + 1];
    const double between = shift();
    T *const grad_a = static_cast<T*>(p.grad_a) + b * p.N, *const grad_b = static_cast<T*>(p.grad_b) + b * p.M;
    for (int64_t i = 0; i < p.N; ++i) {
      const bool absent = u[i] == -INFINITE<T>;
      grad_a[i] = absent ? T(0) : static_cast<T>(x[i] - (p_sum[i] > 0 ? between : 0.0) + static_cast<double>(grad_value) * f[i]);
      if (p_sum[i] > 0) grad_epsilon += dropped * p_sum[i] * u[i] / epsilon;
    }
    for (int64_t j = 0; j < p.M; ++j) {
      const bool absent = v[j] == -INFINITE<T>;
      grad_b[j] = absent ? T(0) : static_cast<T>(y[j] + (q_sum[j] > 0 ? between : 0.0) + static_cast<double>(grad_value) * g[j]);
      if (q_sum[j] > 0) grad_epsilon -= dropped * q_sum[j] * v[j] / epsilon;
    }
    static_cast<T*>(p.grad_epsilon)[b] = static_cast<T>(grad_epsilon);
  }

  void run() {
    begin();
    const bool direct = small > 0 && small <= DIRECT;
    if (direct || !solve_iteratively(small > 0 ? small / 4 : MOST_STEPS)) solve_directly();
    end();
  }
};

int64_t scratch(const SinkhornBackward& p) {
  return with_type(p.kind, [&](auto zero) {
    Arena arena(nullptr);
    Implicit<decltype(zero)>(p, 0, arena, nullptr);
    return arena.bytes();
  });
}

void backward(const SinkhornBackward& p, int64_t b, void* memory, SinkhornEach each) {
  with_type(p.kind, [&](auto zero) {
    Arena arena(memory);
    Implicit<decltype(zero)>(p, b, arena, each).run();
  });
}

}  // namespace

namespace protokernels {

extern const SinkhornImplicitCpu PK_LEVEL_TABLE(sinkhorn_implicit_cpu);
const SinkhornImplicitCpu PK_LEVEL_TABLE(sinkhorn_implicit_cpu) = {scratch, backward};

}  // namespace protokernels
