// SPDX-License-Identifier: MIT
// Soft assignment on the GPU for 64 < K <= 256 prototypes that fit into shared memory. The equations stand in ops/prototypes.h, the arithmetic in
// prototypes_resident.cuh.
//
// A row's scores no longer fit into the registers of a warp beside what else it needs, and code unrolled over 128 of them outruns the instruction
// cache (on an H200: 83 us instead of what follows). So a warp takes 32 rows and 64 prototypes, SPLIT warps share the rows, and eight warps are a
// group with a tile of its own. A tile goes through four phases: products of the first and of the second half of the dimensions; weights
// exp(score - max) of the warp's columns; the other warps' maxima and sums, and the output. A block has two groups, two phases apart, so that one
// keeps the tensor cores busy while the other does the rest; one barrier of the block ends each phase.
// Limit at B = 65536, D = 128, K = 256 on an H200: fp16 products at the rate of mma.sync, 21 us; memory, 23 us; 4 us to split the prototypes.

#include "ops/cuda/prototypes_resident.cuh"

namespace {

constexpr int F = 8;             // fragments of a warp: 64 prototypes
constexpr int HALVES = 2;        // of 16 rows
constexpr int GROUP_WARPS = 8;
constexpr int THREADS = 2 * GROUP_WARPS * 32;

// What a warp found in its columns of a row.
struct Partial {
  float top, sum, weighted;
  int label;
};

// Weights of a warp's columns in place of the sums of products, relative to the largest; what the other warps need goes to partials.
template <bool with_entropy>
__device__ __forceinline__ void weigh(float (&s)[F][4], const float (&row_factor)[2], const float* factor, const float* bias, int first_column,
                                      Partial* partials, int partial_stride) {
  const int lane = threadIdx.x % 32, member = lane % 4;
  float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int f = 0; f < F; f += 2) {
    const float4 scale = pk::load_vector<float4>(factor + f * 8 + member * 4), shift = pk::load_vector<float4>(bias + f * 8 + member * 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s[f][2 * r] = fmaf(s[f][2 * r], scale.x * row_factor[r], shift.x);
      s[f][2 * r + 1] = fmaf(s[f][2 * r + 1], scale.y * row_factor[r], shift.y);
      s[f + 1][2 * r] = fmaf(s[f + 1][2 * r], scale.z * row_factor[r], shift.z);
      s[f + 1][2 * r + 1] = fmaf(s[f + 1][2 * r + 1], scale.w * row_factor[r], shift.w);
      top[r] = fmaxf(top[r], fmaxf(fmaxf(s[f][2 * r], s[f][2 * r + 1]), fmaxf(s[f + 1][2 * r], s[f + 1][2 * r + 1])));
    }
  }
  float base[2], sum[2] = {}, weighted[2] = {};
  int label[2] = {F * 8, F * 8};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(top[r]);
    base[r] = top[r] == -INFINITY ? 0.0f : top[r];  // no column of this warp has a prototype: weights of zero
  }
#pragma unroll
  for (int f = F - 2; f >= 0; f -= 2)  // downwards: the label that stays is the lowest
#pragma unroll
    for (int h = 1; h >= 0; --h)
#pragma unroll
      for (int i = 3; i >= 0; --i) {
        const int r = i / 2;
        const float shifted = s[f + h][i] - base[r], weight = pk::exp2_fast(shifted);
        if (!(shifted < 0)) label[r] = f * 8 + h * 2 + i % 2;  // the largest, or NaN
        if (with_entropy) weighted[r] += weight * fmaxf(shifted, -1024.0f);
        s[f + h][i] = weight;
        sum[r] += weight;
      }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = quad_sum(sum[r]);
    if (with_entropy) weighted[r] = quad_sum(weighted[r]);
  }
  if (__any_sync(ALL, sum[0] != sum[0] || sum[1] != sum[1])) {  // NaN counts as the largest, as in torch.argmax
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (sum[r] == sum[r]) continue;
      label[r] = F * 8;
#pragma unroll
      for (int f = F - 2; f >= 0; f -= 2)
#pragma unroll
        for (int h = 1; h >= 0; --h)
#pragma unroll
          for (int i = 1; i >= 0; --i)
            if (s[f + h][2 * r + i] != s[f + h][2 * r + i]) label[r] = f * 8 + h * 2 + i;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (label[r] < F * 8) label[r] += member * 4;
    label[r] = quad_min(label[r]) + first_column;
    if (member == 0) partials[(lane / 4 + r * 8) * partial_stride] = {top[r], sum[r], weighted[r], label[r]};
  }
}

// A row from the partials of its warps, as one of them sees it.
struct Whole {
  float sum, entropy, before, mine;  // before: the weights in earlier columns; mine: what takes this warp's weights to those of the row
  int label, owner;                  // owner: the warp in whose columns a drawn label lies
};

template <int SPLIT>
__device__ __forceinline__ Whole combine(const Partial* partials, int split, const float* uniform) {
  float top = -INFINITY, sums[SPLIT], scales[SPLIT];
  Whole row{0, 0, 0, 0, -1, 0};
  bool nan = false;
#pragma unroll
  for (int c = 0; c < SPLIT; ++c) {
    if (partials[c].top > top) top = partials[c].top, row.label = nan ? row.label : partials[c].label;
    if (partials[c].sum != partials[c].sum && !nan) nan = true, row.label = partials[c].label;
  }
  if (row.label < 0) row.label = 0;  // every score is -infinity
  float weighted = 0;
#pragma unroll
  for (int c = 0; c < SPLIT; ++c) {
    const float shift = fmaxf(partials[c].top - top, -1024.0f);
    scales[c] = pk::exp2_fast(partials[c].top - top);
    sums[c] = partials[c].sum * scales[c];
    row.sum += sums[c];
    weighted += scales[c] * (partials[c].weighted + partials[c].sum * shift);
    if (c == split) row.mine = scales[c];
    if (c < split) row.before += sums[c];
  }
  if (nan || !(top > -INFINITY)) row.sum = NAN;
  row.entropy = LN_2 * (log2f(row.sum) - weighted / row.sum);
  if (uniform) {
    const float threshold = row.sum * *uniform;
    float before = 0;
    int last = 0;
    row.owner = -1;
#pragma unroll
    for (int c = 0; c < SPLIT; ++c) {
      before += sums[c];
      if (sums[c] > 0) last = c;
      if (row.owner < 0 && before > threshold) row.owner = c;
    }
    if (row.owner < 0) row.owner = last;
  }
  return row;
}

// resources: dynamic shared 151552 bytes
template <class Z, int SPLIT>
__global__ void __launch_bounds__(THREADS) wide_kernel(const Resident<Z> p) {
  constexpr int TOTAL = SPLIT * F, PAIRS = GROUP_WARPS / SPLIT, ROWS = PAIRS * HALVES * TILE;  // PAIRS: pairs of 16 rows in a tile of the group
  PK_DYNAMIC_SHARED(uint4, fragments);
  const int lane = threadIdx.x % 32, member = lane % 4, group = threadIdx.x / 32 / GROUP_WARPS, warp = threadIdx.x / 32 % GROUP_WARPS;
  const int split = warp % SPLIT, pair = warp / SPLIT;
  float* const factor = reinterpret_cast<float*>(fragments + p.steps * TOTAL * 32);
  float* const bias = factor + TOTAL * 8;
  Partial* const partials = reinterpret_cast<Partial*>(bias + TOTAL * 8) + group * ROWS * SPLIT;  // [ROWS, SPLIT]
  Z* const tile = reinterpret_cast<Z*>(reinterpret_cast<Partial*>(bias + TOTAL * 8) + 2 * ROWS * SPLIT) + group * ROWS * p.stride;
  Z* const rows_of_pair = tile + pair * HALVES * TILE * p.stride;

  const int tiles = static_cast<int>(p.tiles), groups = gridDim.x * 2, first = group * gridDim.x + blockIdx.x;
  const int of_first = (tiles - static_cast<int>(blockIdx.x) + groups - 1) / groups, left = tiles - groups / 2 - static_cast<int>(blockIdx.x);
  const int of_second = left > 0 ? (left + groups - 1) / groups : 0;  // tiles of the block's second group
  const int phases = max(of_first * 4, of_second > 0 ? of_second * 4 + 2 : 0);
  const auto copy = [&](int t) {  // 16 rows of the tile by each of its first warps
    if (t < tiles && warp < ROWS / TILE) copy_tile(p, static_cast<int64_t>(t) * ROWS + warp * TILE, tile + warp * TILE * p.stride);
  };

  copy(first);
  prepare_prototypes<TOTAL>(p, fragments, factor, bias);
  pk::copy_async_wait<0>();
  __syncthreads();

  float s[HALVES][F][4] = {};
  RowPair rows[HALVES];
  for (int phase = 0; phase < phases; ++phase) {
    const int mine = phase - 2 * group, t = first + mine / 4 * groups;
    if (mine >= 0 && t < tiles) {
      if (mine % 4 < 2) {
        const int middle = (p.steps + 1) / 2;
        if (mine % 4 == 0) {
#pragma unroll
          for (int h = 0; h < HALVES; ++h) {
            rows[h] = measure_rows(p, rows_of_pair + h * TILE * p.stride);
#pragma unroll
            for (int f = 0; f < F; ++f)
#pragma unroll
              for (int i = 0; i < 4; ++i) s[h][f][i] = 0;
          }
        }
        multiply<Z, HALVES, F, TOTAL>(p, rows_of_pair, rows, fragments + split * F * 32, s, mine % 4 == 0 ? 0 : middle,
                                      mine % 4 == 0 ? middle : p.steps);
      } else if (mine % 4 == 2) {
        copy(t + groups);
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          Partial* const to = partials + (pair * HALVES + h) * TILE * SPLIT + split;
          if (p.entropy)
            weigh<true>(s[h], rows[h].factor, factor + split * F * 8, bias + split * F * 8, split * F * 8, to, SPLIT);
          else
            weigh<false>(s[h], rows[h].factor, factor + split * F * 8, bias + split * F * 8, split * F * 8, to, SPLIT);
        }
      } else {
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int in_tile = (pair * HALVES + h) * TILE + lane / 4 + r * 8;
            const int64_t row = static_cast<int64_t>(t) * ROWS + in_tile;
            const float* const uniform = p.uniform && row < p.B ? p.uniform + row : nullptr;
            const Whole whole = combine<SPLIT>(partials + in_tile * SPLIT, split, uniform);
            int label = whole.label;
            bool writes = split == 0;
            if (p.uniform) {
              const float threshold = uniform ? whole.sum * *uniform : 0.0f;
              const int drawn = split * F * 8 + draw_label<F>(s[h], r, threshold, whole.before, whole.mine);
              if (whole.sum == whole.sum) label = drawn, writes = split == whole.owner;
            }
            if (row >= p.B) continue;
            if (p.skip_nonfinite && rows[h].up[r] < 0) label = -1;
            write_weights<F>(p.assignment + row * p.K, split * F * 8, p.K, s[h], r, whole.mine / whole.sum);
            if (member == 0 && writes && p.labels) p.labels[row] = label;
            if (member == 0 && split == 0 && p.entropy) p.entropy[row] = whole.entropy;
          }
        pk::copy_async_wait<0>();
      }
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------------------------------ launch

struct Plan {
  bool fits;
  int split, rows;
  int64_t tiles;
  std::size_t bytes;
};

Plan plan_of(const PrototypesForward& p) {
  Plan plan{};
  if (p.double_compute || p.K <= F * 8 || p.K > F * 32 || p.D > 16384) return plan;
  plan.split = p.K <= F * 16 ? 2 : 4;
  plan.rows = GROUP_WARPS / plan.split * HALVES * TILE;
  plan.tiles = (p.B + plan.rows - 1) / plan.rows;
  const int64_t element = p.z_kind == Kind::f32 ? 4 : 2;
  plan.bytes = static_cast<std::size_t>(plan.split * F * (steps_of(p.D) * 512 + 64) +
                                        2 * plan.rows * (plan.split * static_cast<int64_t>(sizeof(Partial)) + stride_of(p.D) * element));
  plan.fits = plan.bytes <= pk::shared_memory_limit() && plan.tiles < (int64_t{1} << 29);  // phases are counted in int
  return plan;
}

template <class Z>
int launch_wide(const PrototypesForward& p, const Plan& plan, void* stream) {
  Resident<Z> resident = resident_of<Z>(p, 1);
  resident.tiles = plan.tiles;
  const int64_t most = pk::multiprocessor_count();
  const dim3 blocks(static_cast<unsigned>(plan.tiles < most ? plan.tiles : most));
  if (plan.split == 2) return PK_LAUNCH((wide_kernel<Z, 2>), blocks, dim3(THREADS), plan.bytes, stream, resident);
  return PK_LAUNCH((wide_kernel<Z, 4>), blocks, dim3(THREADS), plan.bytes, stream, resident);
}

}  // namespace

namespace protokernels {

bool prototypes_wide(const PrototypesForward& p) { return plan_of(p).fits; }

int launch_prototypes_wide(const PrototypesForward& p, void* stream) {
  const Plan plan = plan_of(p);
  switch (p.z_kind) {
    case Kind::f32: return launch_wide<float>(p, plan, stream);
    case Kind::bf16: return launch_wide<__nv_bfloat16>(p, plan, stream);
    default: return launch_wide<__half>(p, plan, stream);
  }
}

}  // namespace protokernels
