// SPDX-License-Identifier: MIT
// The half-steps of sinkhorn_features_pass.cuh on sm_90a: the same sums, products by wgmma.
//
// A block has two warpgroups, 128 rows each, in registers as two operands of 64, and a producer, one thread that has the copy engine bring
// panels of 64 columns, up to STAGES ahead. A warpgroup has the products of one operand with a panel under way while it takes the
// exponentials of the other's: tensor cores and exponentials run side by side. 256 rows share a panel because panels come from the L2 cache:
// at 128 rows its bandwidth would be the limit. Rows are loaded as panels, too.
//
// Work is cut evenly: all pairs (tile of 256 rows, panel), tile by tile, are dealt out to at most 132 blocks, one per multiprocessor (the
// number is fixed so that results do not depend on the GPU). A block's part of a tile is a segment; the last one of a tile to end adds
// them up in their order.
//
// Measured on an H200, D = 64: 100 iterations take 3.7 ms at 4096 points and 15.8 ms at 10240 (half_kernel: 4.6 and 24.9), with one product
// 3.0 and 11.5. A panel takes 1.4 us with three products, of which 0.8 us are products at the full rate, and 1.0 us with one, of which 0.5 us
// are exponentials: the times add up as if both warpgroups multiplied at the same time and took exponentials at the same time. A half-step
// costs 6 us besides: 1.3 us until the first product, 1.1 us for the sums to be written and counted, 0.8 us to read them, 1 us to finish the
// rows, the rest to begin the next.
#pragma once

#include "ops/cuda/sinkhorn_features_pass.cuh"
#include "ops/cuda/sinkhorn_hopper.cuh"

namespace {

constexpr int HOPPER_CONSUMERS = 256, HOPPER_THREADS = HOPPER_CONSUMERS + 128;
constexpr int HOPPER_TILE = 256, HOPPER_PANEL = 64, ROW_PANELS = HOPPER_TILE / HOPPER_PANEL;
constexpr int64_t HOPPER_BLOCKS = 132;
using Consumers = PartOfBlock<HOPPER_CONSUMERS>;

template <int STEPS>
struct HopperShape {
  static constexpr int ATOMS = STEPS > 4 ? 2 : 1;  // of 64 dimensions
  static constexpr int ATOM_BYTES = HOPPER_PANEL * 128, PANEL_BYTES = 2 * ATOMS * ATOM_BYTES, TERM_BYTES = HOPPER_PANEL * sizeof(float2);
  static constexpr int STAGES = ATOMS == 1 ? 8 : 6;
  static constexpr int BYTES = STAGES * (PANEL_BYTES + TERM_BYTES + 2 * sizeof(uint64_t)) + 1024;
};

// Panels of 64 vectors: per atom the high halves, then per atom the low halves, as tiles for wgmma. A warp per vector.
template <int STEPS>
__global__ void __launch_bounds__(STREAM_THREADS)
    hopper_split_kernel(int64_t total, int D, bool cosine, const SplitSide side, float* norms) {
  constexpr int ATOMS = HopperShape<STEPS>::ATOMS, PIECES = ATOMS * 8;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * STREAM_WARPS + threadIdx.x / 32;
  if (at >= total) return;
  const int64_t b = at / side.padded, i = at % side.padded;
  const int lane = threadIdx.x % 32;
  const bool there = i < side.count;
  const float* const x = side.vectors + (b * side.count + (there ? i : 0)) * D;
  const Scaling scaling(x, there ? D : 0, cosine);
  if (lane < 2 * PIECES) {
    const int piece = lane % PIECES, row = static_cast<int>(i % HOPPER_PANEL);
    unsigned packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float v[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int d = piece * 8 + k * 2 + h;
        v[h] = there && d < D ? x[d] * scaling.factor : 0.0f;
        if (lane >= PIECES) v[h] = rest_of_half(v[h]);
      }
      packed[k] = pack_halves(v[0], v[1]);
    }
    const int64_t panel = at / HOPPER_PANEL * 2 * ATOMS;
    const int atom = lane / 8;  // of the high halves, then of the low
    pk::store_vector(side.split + ((panel + atom) * HOPPER_PANEL + row) * 8 + (piece % 8 ^ row % 8),
                     uint4{packed[0], packed[1], packed[2], packed[3]});
  }
  if (lane != 0) return;
  side.terms[at] = float2{-INFINITY, 1.0f / scaling.power};
  if (there) norms[b * side.count + i] = scaling.norm;
}

// Where a fill of the ring lies, and which of its turns it is.
template <int STAGES>
struct Ring {
  int stage = 0;
  unsigned turn = 0;  // parity

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, turn ^= 1;
  }
};

// Units are pairs (tile, panel), tile by tile.
struct Deal {
  int64_t units;
  int tiles, panels;  // of a problem

  __device__ __forceinline__ int64_t before(int64_t block) const { return block * units / gridDim.x; }
  __device__ __forceinline__ int block_of(int64_t unit) const { return static_cast<int>(((unit + 1) * gridDim.x - 1) / units); }
};
struct Segment {
  int b, tile, first, panels;

  __device__ __forceinline__ Segment(const Deal& deal, int64_t unit, int64_t end) {
    const int64_t all = unit / deal.panels, left = end - unit;
    b = static_cast<int>(all / deal.tiles), tile = static_cast<int>(all % deal.tiles), first = static_cast<int>(unit % deal.panels);
    panels = left < deal.panels - first ? static_cast<int>(left) : deal.panels - first;
  }
  template <int STAGES>
  __device__ __forceinline__ int early() const {
    return ROW_PANELS + panels < STAGES ? ROW_PANELS + panels : STAGES;
  }
};

template <int STEPS, int PRODUCTS>
struct HopperPanels {
  using Shape = HopperShape<STEPS>;
  unsigned char* panels;   // [STAGES, PANEL_BYTES]
  float2* terms;           // [STAGES, HOPPER_PANEL]
  uint64_t *full, *empty;  // [STAGES]

  __device__ __forceinline__ explicit HopperPanels(unsigned char* memory) {
    panels = memory + (1024 - pk::shared_address(memory) % 1024) % 1024;
    terms = reinterpret_cast<float2*>(panels + Shape::STAGES * Shape::PANEL_BYTES);
    full = reinterpret_cast<uint64_t*>(terms + Shape::STAGES * HOPPER_PANEL);
    empty = full + Shape::STAGES;
  }
  __device__ __forceinline__ void start() const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < Shape::STAGES; ++s) pk::barrier_start(full + s, 1), pk::barrier_start(empty + s, HOPPER_CONSUMERS / 32);
      pk::barriers_started();
    }
    __syncthreads();
  }
  // Fills 0 to ROW_PANELS - 1 of a segment are its rows.
  __device__ __forceinline__ void fetch_vectors(const HalfStep& step, const Segment& segment, int fill,
                                                const Ring<Shape::STAGES>& ring) const {
    constexpr unsigned bytes = PRODUCTS == 1 ? Shape::PANEL_BYTES / 2 : Shape::PANEL_BYTES;
    const bool of_rows = fill < ROW_PANELS;
    const SplitSide& side = of_rows ? step.rows : step.columns;
    const int wanted = of_rows ? segment.tile * ROW_PANELS + fill : segment.first + fill - ROW_PANELS, count = side.padded / HOPPER_PANEL;
    const int64_t panel = static_cast<int64_t>(segment.b) * count + (wanted < count ? wanted : count - 1);
    pk::barrier_wait(empty + ring.stage, ring.turn ^ 1);
    pk::barrier_expect(full + ring.stage, of_rows ? bytes : bytes + Shape::TERM_BYTES);
    copy_bulk(panels + ring.stage * Shape::PANEL_BYTES, reinterpret_cast<const unsigned char*>(side.split) + panel * Shape::PANEL_BYTES,
              bytes, full + ring.stage);
  }
  __device__ __forceinline__ void fetch_terms(const HalfStep& step, const Segment& segment, int fill,
                                              const Ring<Shape::STAGES>& ring) const {
    if (fill < ROW_PANELS) return;
    const int64_t first = static_cast<int64_t>(segment.b) * step.columns.padded + (segment.first + fill - ROW_PANELS) * HOPPER_PANEL;
    copy_bulk(terms + ring.stage * HOPPER_PANEL, step.columns.terms + first, Shape::TERM_BYTES, full + ring.stage);
  }
  __device__ __forceinline__ void wait(const Ring<Shape::STAGES>& ring) const { pk::barrier_wait(full + ring.stage, ring.turn); }
  __device__ __forceinline__ void release(Ring<Shape::STAGES>& ring) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) pk::barrier_arrive(empty + ring.stage);
    ring.advance();
  }
};

// 64 rows of a warpgroup as an operand in registers.
template <int STEPS, int PRODUCTS>
struct HopperRows {
  using Shape = HopperShape<STEPS>;
  unsigned high[STEPS][4], low[PRODUCTS == 1 ? 1 : STEPS][4];

  __device__ __forceinline__ void load(const unsigned char* panel) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const unsigned address = pk::shared_address(panel) + row * 128;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const unsigned place = address + s / 4 * Shape::ATOM_BYTES + ((s % 4 * 2 + lane / 16) ^ row % 8) * 16;
      load_matrices(high[s], place);
      if constexpr (PRODUCTS == 3) load_matrices(low[s], place + Shape::ATOMS * Shape::ATOM_BYTES);
    }
  }
  // Begins the products with a panel. after: never negative; what it comes from is done before, not in between.
  __device__ __forceinline__ void multiply(float (&d)[32], const unsigned char* panel, float after = 0) const {
    const unsigned first = tile_descriptor(pk::shared_address(panel)) + (after < 0 ? 1 : 0);
    pk::hold(d);
    pk::begin_products();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const unsigned of_high = first + (s / 4 * Shape::ATOM_BYTES + s % 4 * 32) / 16;
      if constexpr (PRODUCTS == 3) {
        wgmma_m64n64k16_f16(d, low[s], of_high, s > 0);
        wgmma_m64n64k16_f16(d, high[s], of_high + Shape::ATOMS * Shape::ATOM_BYTES / 16, 1);
      }
      wgmma_m64n64k16_f16(d, high[s], of_high, PRODUCTS == 3 || s > 0);
    }
    pk::commit_products();
  }
};

// What a thread knows of its 2 rows of an operand, and what it adds up.
template <Walk walk>
struct HopperSums {
  float bias[2], factor[2];
  RowTotal<walk> total[2];

  __device__ __forceinline__ float done() const { return fminf(total[0].part[walk == Walk::logs], total[1].part[walk == Walk::logs]); }
  // row: the first; the other one is 8 further on.
  __device__ __forceinline__ void start(const HalfStep& step, int64_t b, int row) {
    const float scale = step.scale(b);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = row + h * 8 < step.rows.count ? row + h * 8 : step.rows.count - 1;
      const float2 of_row = __ldcg(step.rows.terms + b * step.rows.padded + i);  // another block may have written it in this launch
      const float norm = step.cosine ? 0.0f : step.rows.norms[b * step.rows.count + i];
      bias[h] = (walk == Walk::logs ? -scale * norm : of_row.x) - (step.cosine ? scale : 0.0f);
      factor[h] = (step.cosine ? scale : 2 * scale) * of_row.y;
      total[h] = RowTotal<walk>();
    }
  }
  __device__ __forceinline__ void add(const HalfStep& step, int64_t b, int row, int column, const float (&products)[32],
                                      const float2* panel_terms) {
    const int member = threadIdx.x % 4;
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const float4 pair = pk::load_vector<float4>(reinterpret_cast<const float4*>(panel_terms) + f * 4 + member);
      const float column_bias[2] = {pair.x, pair.z}, column_scale[2] = {pair.y, pair.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[2], product[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          product[k] = column_scale[k] * products[f * 4 + h * 2 + k];
          x[k] = factor[h] * product[k] + (bias[h] + column_bias[k]);
        }
        if constexpr (walk != Walk::values)
          total[h].add(x);
        else
          add_values(step, b, row + h * 8, column + f * 8 + member * 2, x, product, total[h]);
      }
    }
  }
};

}  // namespace
