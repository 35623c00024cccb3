// SPDX-License-Identifier: MIT
// Sinkhorn between features on the GPU: the cost is made anew, tile by tile, in every half-step. The equations stand in ops/sinkhorn.h.
//
// Single precision, up to 128 dimensions (WarpSolver): sinkhorn_features_pass.cuh; on sm_90a sinkhorn_features_hopper.cu. Everything else (general_forward) by pass_kernel:
// a block takes 64 rows and a share of the columns, 128 at a time; products stay in registers as they come from the tensor
// cores, and every thread keeps the log-sum of its part of two rows, the largest of 8 entries taken out at a time. The threads of a row
// meet once, at the end. The last share of a tile to arrive adds them up in their order; their number depends on the shape alone. The last
// tile of a problem looks at the error.

#include "common/simt.cuh"
#include "ops/cuda/sinkhorn_features_solver.cuh"

namespace {

template <class T>
struct ShareSums {
  int shares, columns;         // columns of a share
  T* partial;                  // [B, shares, parts, rows]
  unsigned* tile_arrivals;     // [B, row tiles]; 0 between launches
  unsigned* problem_arrivals;  // [B]
};

template <class T, class Pass>
__global__ void __launch_bounds__(FEATURE_THREADS, sizeof(T) == 4 ? 2 : 1)
    pass_kernel(const Pair<T> pair, const Pass pass, const ShareSums<T> out) {
  using P = Products<T>;
  using Sum = typename Pass::Sum;
  PK_SHARED(FeatureTiles<T>, tiles);
  PK_SHARED(T, gathered, FEATURE_ROWS, P::SHARERS, Sum::PARTS);
  const int row_tiles = (pair.rows.count + FEATURE_ROWS - 1) / FEATURE_ROWS;
  const int64_t b = blockIdx.x / (row_tiles * out.shares);
  const int place = static_cast<int>(blockIdx.x % (row_tiles * out.shares)), share = place % out.shares, tile = place / out.shares;
  if (pass.skip(b)) return;
  const int row0 = tile * FEATURE_ROWS, first = share * out.columns;
  const int last = pair.columns.count - first < out.columns ? pair.columns.count : first + out.columns;
  Sum sums[P::ROWS];
  T row_norm[P::ROWS], row_factor[P::ROWS];
#pragma unroll
  for (int r = 0; r < P::ROWS; ++r) {
    const int i = row0 + P::row(r) < pair.rows.count ? row0 + P::row(r) : pair.rows.count - 1;
    row_norm[r] = pair.rows.norms[b * pair.rows.count + i];
    row_factor[r] = pass.row_factor(b, i);
  }
  for (int column0 = first; column0 < last; column0 += P::COLUMNS) {
    load_columns(tiles, pair, pass, b, column0, last);
    P products = tile_products(tiles, pair, b, row0, column0);
#pragma unroll
    for (int h = 0; h < P::GROUPS; ++h) {
      T norm[GROUP], factor[GROUP];
#pragma unroll
      for (int k = 0; k < GROUP; ++k) norm[k] = tiles.norm[P::column(h, k)], factor[k] = tiles.factor[P::column(h, k)];
#pragma unroll
      for (int r = 0; r < P::ROWS; ++r) {
        T c[GROUP];
#pragma unroll
        for (int k = 0; k < GROUP; ++k) c[k] = pair.cost(products.at(r, h, k), row_norm[r], norm[k]);
        pass.add(sums[r], b, row_factor[r], factor, c);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < P::ROWS; ++r)
#pragma unroll
    for (int k = 0; k < Sum::PARTS; ++k) gathered[P::row(r)][P::sharer()][k] = sums[r].part[k];
  __syncthreads();
  const int row = threadIdx.x, i = row0 + row;
  const bool speaks = row < FEATURE_ROWS && i < pair.rows.count;
  T* const partial = out.partial + b * out.shares * Sum::PARTS * pair.rows.count + i;
  if (speaks) {
    Sum total;
    for (int s = 0; s < P::SHARERS; ++s) merge_parts(total, gathered[row][s]);
#pragma unroll
    for (int k = 0; k < Sum::PARTS; ++k) partial[(static_cast<int64_t>(share) * Sum::PARTS + k) * pair.rows.count] = total.part[k];
  }
  if (!arrives_last(out.tile_arrivals + b * row_tiles + tile, out.shares)) return;
  if (speaks) {
    Sum total;
    for (int s = 0; s < out.shares; ++s) {
      T part[Sum::PARTS];
#pragma unroll
      for (int k = 0; k < Sum::PARTS; ++k) part[k] = partial[(static_cast<int64_t>(s) * Sum::PARTS + k) * pair.rows.count];
      merge_parts(total, part);
    }
    pass.target(b, i, total);
  }
  if constexpr (requires(T* memory) { pass.after_rows(b, memory); }) {
    PK_SHARED(T, shared, STREAM_WARPS);
    if (arrives_last(out.problem_arrivals + b, row_tiles)) pass.after_rows(b, &shared[0]);
  }
}

// What a half-step sums: exponents from the potential of the other side. target() takes the sum of what is a row here.
template <class T, class Op>
struct LogPass : Op {
  __device__ __forceinline__ T row_factor(int64_t b, int) const { return this->p.inverse_epsilon(b); }
  __device__ __forceinline__ void add(LogSum<T>& sum, int64_t, T inverse, const T (&potential)[GROUP], const T (&c)[GROUP]) const {
    T x[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; ++k) x[k] = potential[k] - c[k] * inverse;
    sum.add(x, GROUP);
  }
};

template <class T>
struct RowsPass : LogPass<T, RowsOp<T>> {
  __device__ __forceinline__ T column_factor(int64_t b, int j) const { return this->p.v[b * this->p.M + j]; }
  __device__ __forceinline__ void target(int64_t b, int i, const LogSum<T>& sum) const { this->row(b, i, sum); }
};

template <class T>
struct ColumnsPass : LogPass<T, ColumnsOp<T>> {
  __device__ __forceinline__ T column_factor(int64_t b, int i) const { return this->p.u[b * this->p.N + i]; }
  __device__ __forceinline__ void target(int64_t b, int j, const LogSum<T>& sum) const { this->column(b, j, sum); }
};

template <class T>
struct ValuesPass : ValuesOp<T> {
  __device__ __forceinline__ T row_factor(int64_t b, int i) const { return this->p.u[b * this->p.N + i]; }
  __device__ __forceinline__ T column_factor(int64_t b, int j) const { return this->p.v[b * this->p.M + j]; }
  __device__ __forceinline__ void add(Sums<T, 3>& sum, int64_t b, T u, const T (&v)[GROUP], const T (&c)[GROUP]) const {
    const T inverse = this->p.inverse_epsilon(b);
#pragma unroll
    for (int k = 0; k < GROUP; ++k) {
      const T plan = exponential(u + v[k] - c[k] * inverse);
      if (plan == 0) continue;
      sum.part[0] += plan;
      sum.part[1] += plan * c[k];
      sum.part[2] += plan * (u + v[k] - 1);
    }
  }
  __device__ __forceinline__ void target(int64_t b, int i, const Sums<T, 3>& sum) const { this->row(b, i, sum); }
};

// Shares of the columns, so that few rows fill a GPU too: at least about 512 blocks.
template <class T>
struct Shares {
  int64_t columns, count;
  Shares(int64_t B, int64_t N, int64_t M) {
    constexpr int64_t panel = Products<T>::COLUMNS, wanted_blocks = 512, most = 16;
    const int64_t panels = (M + panel - 1) / panel, tiles = B * ((N + FEATURE_ROWS - 1) / FEATURE_ROWS);
    const int64_t wanted = wanted_blocks / (tiles > 0 ? tiles : 1), bounded = wanted < 1 ? 1 : wanted > most ? most : wanted;
    columns = (panels + bounded - 1) / bounded * panel;
    count = (M + columns - 1) / columns;
  }
};

template <class T>
struct FeaturePasses {
  int64_t B;
  Pair<T> pair;
  T* partial;
  unsigned* arrivals;  // [B], [B, tiles]
  void* stream;
  int status = 0;

  Pair<T> exchanged() const { return {pair.D, pair.cosine, pair.columns, pair.rows}; }
  template <class Pass>
  void run(const Pair<T>& roles, const Pass& pass) {
    const int64_t N = roles.rows.count, M = roles.columns.count, tiles = (N + FEATURE_ROWS - 1) / FEATURE_ROWS;
    const Shares<T> shares(B, N, M);
    const ShareSums<T> sums{static_cast<int>(shares.count), static_cast<int>(shares.columns), partial, arrivals + B, arrivals};
    if (status == 0)
      status = PK_LAUNCH((pass_kernel<T, Pass>), dim3(static_cast<unsigned>(B * tiles * shares.count)), dim3(FEATURE_THREADS), 0, stream,
                         roles, pass, sums);
  }
  void rows(const Solve<T>& p) { run(pair, RowsPass<T>{{{p}}}); }
  void columns(const Solve<T>& p) { run(exchanged(), ColumnsPass<T>{{{p}}}); }
  void values(const Solve<T>& p) { run(pair, ValuesPass<T>{{p}}); }
  template <class Op>
  void problems(const Op& op) {
    if (status == 0) status = PK_LAUNCH((problem_kernel<T, Op>), dim3(static_cast<unsigned>(B)), dim3(STREAM_THREADS), 0, stream, op);
  }
};

// Any type and number of dimensions.
template <class T>
int64_t general_forward(const SinkhornFeatures& p, void* workspace, void* stream, int* status) {
  Pieces pieces(workspace);
  const Solve<T> solve(p, nullptr, pieces);
  T* const x_norms = pieces.take<T>(p.B * p.N);
  T* const y_norms = pieces.take<T>(p.B * p.M);
  const int64_t of_rows = Shares<T>(p.B, p.N, p.M).count * 3 * p.N, of_columns = Shares<T>(p.B, p.M, p.N).count * 2 * p.M;
  T* const partial = pieces.take<T>(p.B * (of_rows > of_columns ? of_rows : of_columns));
  const int64_t longer = p.N > p.M ? p.N : p.M, counters = p.B * (1 + (longer + FEATURE_ROWS - 1) / FEATURE_ROWS);
  unsigned* const arrivals = pieces.take<unsigned>(counters);
  if (status) {
    const T* const x = static_cast<const T*>(p.x);
    const T* const y = static_cast<const T*>(p.y);
    const int D = static_cast<int>(p.D);
    FeaturePasses<T> passes{
        p.B, {D, p.cosine, {static_cast<int>(p.N), x, x_norms}, {static_cast<int>(p.M), y, y_norms}}, partial, arrivals, stream};
    passes.status = pk::memset_async(arrivals, 0, sizeof(unsigned) * static_cast<std::size_t>(counters), stream);
    if (passes.status == 0) passes.status = launch_norms(p.B * p.N, D, p.cosine, x, x_norms, stream);
    if (passes.status == 0) passes.status = launch_norms(p.B * p.M, D, p.cosine, y, y_norms, stream);
    iterate(passes, solve);
    *status = passes.status;
  }
  return pieces.bytes();
}

// The fewest rounds of 396 blocks (three on each of 132 multiprocessors; the number is fixed so that results do not depend on the GPU),
// counted in panels, with what a block costs besides.
struct HalfShares {
  int64_t columns, count;
  HalfShares(int64_t B, int64_t N, int64_t M, int64_t tile_rows, int64_t panel) {
    constexpr int64_t slots = 396, most = 64;
    const int64_t panels = (M + panel - 1) / panel, tiles = B * ((N + tile_rows - 1) / tile_rows);
    int64_t best = -1;
    columns = panels * panel, count = 1;
    for (int64_t wanted = 1; wanted <= most && wanted <= panels; ++wanted) {
      const int64_t each = (panels + wanted - 1) / wanted, shares = (panels + each - 1) / each;
      const int64_t time = (tiles * shares + slots - 1) / slots * (each + 3);
      if (best < 0 || time < best) best = time, columns = each * panel, count = shares;
    }
  }
};

// STEPS times 16 dimensions at most.
template <int STEPS>
struct WarpSolver : SplitSolver {
  using SplitSolver::SplitSolver;
  static constexpr int FRAGMENTS = STEPS == 8 ? 1 : 2;
  static constexpr int64_t rows_of_tile = HALF_ROWS<FRAGMENTS>, panel = PANEL<STEPS>;

  template <Walk walk>
  void half(HalfStep step, int side, const float* before, const float* other, float* after, bool tested) {
    step.side = side, step.rows = side == 0 ? x : y, step.columns = side == 0 ? y : x;
    step.before = before, step.other = other, step.after = after, step.tested = tested;
    const HalfShares shares(p.B, step.rows.count, step.columns.count, rows_of_tile, panel);
    step.shares = static_cast<int>(shares.count), step.share_columns = static_cast<int>(shares.columns);
    const int64_t tiles = (step.rows.count + rows_of_tile - 1) / rows_of_tile;
    constexpr std::size_t bytes = HALF_STAGES * STAGE_UNITS<STEPS> * sizeof(uint4);
    if (status == 0)
      status = PK_LAUNCH_BEHIND((half_kernel<STEPS, FRAGMENTS, walk>), dim3(static_cast<unsigned>(p.B * tiles * shares.count)),
                                dim3(HALF_THREADS), bytes, stream, step);
  }

  int64_t run(void* workspace) {
    Pieces pieces(workspace);
    const int64_t tiles = (longer() + rows_of_tile - 1) / rows_of_tile;
    const int64_t of_rows = HalfShares(p.B, p.N, p.M, rows_of_tile, panel).count * p.N;
    const int64_t of_columns = HalfShares(p.B, p.M, p.N, rows_of_tile, panel).count * p.M;
    HalfStep step = arrange(pieces, STEPS * 4, tiles, p.B * MOST_PARTS * (of_rows > of_columns ? of_rows : of_columns));
    if (!workspace) return pieces.bytes();

    start(step, tiles, split_kernel<STEPS>);
    const Solve<float>& solve = step.p;
    float* const u[2] = {solve.u, solve.u_next};
    for (int t = 0; t < p.num_iters; ++t) {
      step.p.t = t;
      const bool tested = t > 0 && p.tolerance > 0;
      if (t == 0 || !solve.balanced) {
        half<Walk::logs>(step, 0, u[t % 2], solve.v, u[(t + 1) % 2], tested);
        half<Walk::logs>(step, 1, solve.v, u[(t + 1) % 2], solve.v, false);
      } else {
        half<Walk::sums>(step, 0, u[t % 2], solve.v, u[(t + 1) % 2], tested);
        half<Walk::sums>(step, 1, solve.v, u[(t + 1) % 2], solve.v, false);
      }
    }
    finish(step, [&] { half<Walk::values>(step, 0, nullptr, solve.v, nullptr, false); });
    return pieces.bytes();
  }
};

int64_t forward(const SinkhornFeatures& p, void* workspace, void* stream, int* status) {
  if (p.kind == Kind::f64) return general_forward<double>(p, workspace, stream, status);
  if (sinkhorn_features_on_hopper(p)) return sinkhorn_features_hopper(p, workspace, stream, status);
  if (p.D <= 16) return solve_split<WarpSolver<1>>(p, workspace, stream, status);
  if (p.D <= 32) return solve_split<WarpSolver<2>>(p, workspace, stream, status);
  if (p.D <= 64) return solve_split<WarpSolver<4>>(p, workspace, stream, status);
  if (p.D <= 128) return solve_split<WarpSolver<8>>(p, workspace, stream, status);
  return general_forward<float>(p, workspace, stream, status);
}

}  // namespace

namespace protokernels {

int64_t sinkhorn_features_workspace(const SinkhornFeatures& p) { return forward(p, nullptr, nullptr, nullptr); }

int launch_sinkhorn_features(const SinkhornFeatures& p, void* workspace, void* stream) {
  int status = 0;
  if (p.B > 0) forward(p, workspace, stream, &status);
  return status;
}

}  // namespace protokernels
