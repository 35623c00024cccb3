// SPDX-License-Identifier: MIT
// The walk of a block over its segments, and the kernels: a half-step per launch, or all of them in one. What is summed stands in
// sinkhorn_features_hopper.cuh.
#pragma once

#include "ops/cuda/sinkhorn_features_hopper.cuh"

namespace {

// A block's walk over its segments: of the producer, one thread, and of the consumers. LOOP: all half-steps in one launch; no problem stops.
template <int STEPS, int PRODUCTS, Walk walk, bool LOOP>
struct HopperWalk {
  using Shape = HopperShape<STEPS>;
  const HopperPanels<STEPS, PRODUCTS>& panels;
  unsigned* const ready;  // LOOP: counts tiles whose potentials are there
  Ring<Shape::STAGES> ring;

  __device__ __forceinline__ HopperWalk(const HopperPanels<STEPS, PRODUCTS>& memory, unsigned* count) : panels(memory), ready(count) {}
  static __device__ __forceinline__ bool skips(const HalfStep& step, const Segment& segment) {
    return walk != Walk::values && !LOOP && step.p.done[segment.b] != 0;
  }

  // wait(): until the half-step before is done.
  template <class Wait>
  __device__ __forceinline__ void produce(const HalfStep& step, const Deal& deal, const Wait& wait) {
    const int64_t end = deal.before(blockIdx.x + 1);
    int64_t unit = deal.before(blockIdx.x);
    // What does not depend on the half-step before comes first, though its problem may be done.
    Segment segment(deal, unit, end);
    Ring<Shape::STAGES> again = ring;
    int fill = 0;
#pragma unroll 1
    for (; fill < segment.early<Shape::STAGES>(); ++fill, ring.advance()) panels.fetch_vectors(step, segment, fill, ring);
    wait();
#pragma unroll 1
    for (int f = 0; f < fill; ++f, again.advance()) panels.fetch_terms(step, segment, f, again);
    for (;;) {
      const int fills = skips(step, segment) ? 0 : ROW_PANELS + segment.panels;
#pragma unroll 1
      for (; fill < fills; ++fill, ring.advance()) {
        panels.fetch_vectors(step, segment, fill, ring);
        panels.fetch_terms(step, segment, fill, ring);
      }
      unit += segment.panels, fill = 0;
      if (unit == end) return;
      segment = Segment(deal, unit, end);
    }
  }

  // t: full iterations before.
  __device__ __forceinline__ void consume(const HalfStep& step, const Deal& deal, int t) {
    PK_SHARED(float, shared, HOPPER_CONSUMERS / 32, 2);
    const int64_t begin = deal.before(blockIdx.x), end = deal.before(blockIdx.x + 1);
#pragma unroll 1
    for (int64_t unit = begin; unit < end;) {
      const Segment segment(deal, unit, end);
      if (!skips(step, segment)) {
        run(step, deal, t, segment, shared);
      } else if (unit == begin) {
        for (int f = 0; f < segment.early<Shape::STAGES>(); ++f) panels.wait(ring), panels.release(ring);
      }
      unit += segment.panels;
    }
  }

  __device__ __forceinline__ void run(const HalfStep& step, const Deal& deal, int t, const Segment& segment, float (*shared)[2]) {
    // Two operands of 64 rows; while the products of one are under way, the exponentials of the other are taken.
    HopperRows<STEPS, PRODUCTS> rows[2];
    HopperSums<walk> sums[2];
    float products[2][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int half = warp / 4 * 2, row = segment.tile * HOPPER_TILE + half * 64 + warp % 4 * 16 + lane / 4;
    sums[0].start(step, segment.b, row);
    sums[1].start(step, segment.b, row + 64);
    const auto vectors = [&](const Ring<Shape::STAGES>& at) { return panels.panels + at.stage * Shape::PANEL_BYTES; };
#pragma unroll 1
    for (int q = 0; q < ROW_PANELS; ++q) {
      panels.wait(ring);
      if (q == half) rows[0].load(vectors(ring));
      if (q == half + 1) rows[1].load(vectors(ring));
      panels.release(ring);
    }
    const auto add = [&](int m, const Ring<Shape::STAGES>& at, int column) {
      pk::hold(products[m]);
      sums[m].add(step, segment.b, row + m * 64, column, products[m], panels.terms + at.stage * HOPPER_PANEL);
    };
    int left = segment.panels, column = segment.first * HOPPER_PANEL;
    // Two panels at a time; ptxas keeps nothing under way from one turn of a loop to the next.
#pragma unroll 1
    for (; left >= 2; left -= 2, column += 2 * HOPPER_PANEL) {
      Ring<Shape::STAGES> second = ring;
      second.advance();
      panels.wait(ring);
      rows[0].multiply(products[0], vectors(ring));
      rows[1].multiply(products[1], vectors(ring));
      pk::wait_for_products<1>();
      add(0, ring, column);
      panels.wait(second);
      rows[0].multiply(products[0], vectors(second), sums[0].done());
      pk::wait_for_products<1>();
      add(1, ring, column);
      rows[1].multiply(products[1], vectors(second), sums[1].done());
      pk::wait_for_products<1>();
      add(0, second, column + HOPPER_PANEL);
      pk::wait_for_products<0>();
      add(1, second, column + HOPPER_PANEL);
      panels.release(ring);
      panels.release(ring);
    }
    if (left > 0) {
      panels.wait(ring);
      rows[0].multiply(products[0], vectors(ring));
      rows[1].multiply(products[1], vectors(ring));
      pk::wait_for_products<1>();
      add(0, ring, column);
      pk::wait_for_products<0>();
      add(1, ring, column);
      panels.release(ring);
    }
    merge(step, deal, t, segment, sums, shared);
  }

  __device__ __forceinline__ void merge(const HalfStep& step, const Deal& deal, int t, const Segment& segment, HopperSums<walk> (&sums)[2],
                                        float (*shared)[2]) {
    using Total = RowTotal<walk>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t tile = static_cast<int64_t>(segment.b) * deal.tiles + segment.tile;
    const int first = deal.block_of(tile * deal.panels), parts = deal.block_of((tile + 1) * deal.panels - 1) - first + 1;
    float* const partial = step.partial + (first + tile) * MOST_PARTS * HOPPER_TILE;  // [parts, MOST_PARTS, HOPPER_TILE]
    float* const own = partial + static_cast<int64_t>(blockIdx.x - first) * MOST_PARTS * HOPPER_TILE;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Total& total = sums[m].total[h];
        total.merge_neighbour(1);
        total.merge_neighbour(2);
        if (lane % 4 == 0)
#pragma unroll
          for (int k = 0; k < Total::PARTS; ++k)
            __stcg(own + k * HOPPER_TILE + (warp / 4 * 2 + m) * 64 + warp % 4 * 16 + h * 8 + lane / 4, total.part[k]);
      }
    if (!Consumers::is_last(step.tile_arrivals + tile, parts)) return;
    Total total;
#pragma unroll 1
    for (int s = 0; s < parts; s += 8) {
      float part[8][Total::PARTS];
#pragma unroll
      for (int d = 0; d < 8; ++d)
#pragma unroll
        for (int k = 0; k < Total::PARTS; ++k)
          if (s + d < parts) part[d][k] = __ldcg(partial + ((s + d) * MOST_PARTS + k) * HOPPER_TILE + threadIdx.x);
#pragma unroll
      for (int d = 0; d < 8; ++d)
        if (s + d < parts) total.merge(part[d]);
    }
    finish_tile<Consumers>(step, segment.b, segment.tile, deal.tiles, HOPPER_TILE, t, total, shared);
    if constexpr (LOOP) {
      copies_see_writes();
      Consumers::sync();
      if (threadIdx.x == 0) pk::arrive(ready);
    }
  }
};

// ptxas reports the 168 registers of the launch; the consumers have 232.
// resources: dynamic shared 200800 bytes
// resources: spills at most 728 bytes (more than 64 dimensions: the operands alone take 128 registers)
template <int STEPS, int PRODUCTS, Walk walk>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_kernel(const HalfStep step, const Deal deal) {
#if defined(PK_HOPPER)
  PK_DYNAMIC_SHARED(unsigned char, memory);
  const HopperPanels<STEPS, PRODUCTS> panels(memory);
  pk::let_next_begin();
  panels.start();
  HopperWalk<STEPS, PRODUCTS, walk, false> way(panels, nullptr);
  if (threadIdx.x >= HOPPER_CONSUMERS) {
    pk::fewer_registers<40>();
    if (threadIdx.x == HOPPER_CONSUMERS) way.produce(step, deal, [] { pk::wait_for_previous(); });
  } else {
    pk::more_registers<232>();
    pk::wait_for_previous();
    way.consume(step, deal, step.p.t);
  }
#endif
}

// Half-steps of whole iterations after the first, rows and columns by turns, in one launch of blocks that wait for each other: for the
// potentials of a half-step before they take its terms, when vectors are there already.
struct HopperLoop {
  HalfStep steps[4];  // rows and columns of an iteration that is odd, of one that is even
  Deal deals[2];
  int first, halves;  // iteration
  unsigned* ready;    // 0

  __device__ __forceinline__ int place(int half) const { return (first + half / 2) % 2 == 1 ? half % 2 : 2 + half % 2; }
};

// resources: dynamic shared 200800 bytes
// resources: spills at most 288 bytes (as above)
template <int STEPS, int PRODUCTS>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_loop_kernel(const __grid_constant__ HopperLoop loop) {
#if defined(PK_HOPPER)
  PK_DYNAMIC_SHARED(unsigned char, memory);
  const HopperPanels<STEPS, PRODUCTS> panels(memory);
  panels.start();
  HopperWalk<STEPS, PRODUCTS, Walk::sums, true> way(panels, loop.ready);
  if (threadIdx.x >= HOPPER_CONSUMERS) {
    pk::fewer_registers<40>();
    unsigned target = 0;
    if (threadIdx.x == HOPPER_CONSUMERS)
#pragma unroll 1
      for (int half = 0; half < loop.halves; ++half) {
        const Deal& deal = loop.deals[half % 2];
        way.produce(loop.steps[loop.place(half)], deal, [&] {
          pk::wait_for(loop.ready, target);
          copies_see_writes();
        });
        target += static_cast<unsigned>(deal.units / deal.panels);
      }
  } else {
    pk::more_registers<232>();
#pragma unroll 1
    for (int half = 0; half < loop.halves; ++half) way.consume(loop.steps[loop.place(half)], loop.deals[half % 2], loop.first + half / 2);
  }
#endif
}

}  // namespace
