// SPDX-License-Identifier: MIT
// Scores of a warp's 32 queries with 32 rows of the bank at a time, and a block's way through the bank. nearest_kernel.cu says what a score
// is.
//
// Packed rows are fp16; 32 dimensions of 32 rows, a tile in one block of dimensions, are 2 KB side by side. A lane reads 16 bytes at a
// time, eight dimensions of a row, and takes them as its k of two steps of the tensor core, in both factors. The columns of four fragments
// of 8 are renamed so that a lane ends with eight neighbouring rows of the bank: column 2 m + e of fragment f is row 8 m + 2 f + e.
#pragma once

#include "ops/cuda/nearest_rows.cuh"

namespace {

constexpr int SLICE = 8;           // blocks of dimensions that are in shared memory at a time where there are more than two
constexpr int TILE_VECTORS = 128;  // 16-byte pieces of a tile in one block of dimensions

// BLOCKS of dimensions, whose fragments of the queries stay in registers; 0: any number.
template <int BLOCKS>
struct Shape {
  static constexpr int TILES = BLOCKS > 0 ? NEAREST_CHUNK / NEAREST_TILE : 1;  // of a stage
  static constexpr int DEPTH = BLOCKS > 0 ? BLOCKS : SLICE;
  static constexpr int VECTORS = TILES * DEPTH * TILE_VECTORS;  // of a stage
  static constexpr int BYTES = VECTORS * 16 + TILES * NEAREST_TILE * 8;
};

using Scores = float[2][4][4];  // [t][f][2 h + e]: query 16 t + 8 h + group, row 8 member + 2 f + e of the tile
using Left = unsigned[2][2][4];

// Fragments of the warp's queries in a block of dimensions.
__device__ __forceinline__ void load_left(Left& a, const uint4* packed) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint4 v = __ldg(packed + lane + 32 * r);
    a[r / 2][0][r % 2] = v.x, a[r / 2][0][2 + r % 2] = v.y, a[r / 2][1][r % 2] = v.z, a[r / 2][1][2 + r % 2] = v.w;
  }
}

// The bias of two rows and once more the same, 16 bytes, is a fragment of a sum: products are added to it without a move.
__device__ __forceinline__ void begin_scores(Scores& s, const float* bias) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    const float4 b = pk::load_vector<float4>(bias + (4 * member + f) * 4);
#pragma unroll
    for (int t = 0; t < 2; ++t) s[t][f][0] = b.x, s[t][f][1] = b.y, s[t][f][2] = b.z, s[t][f][3] = b.w;
  }
}

// Queries are packed with the opposite sign.
__device__ __forceinline__ void add_products(Scores& s, const Left& a, const uint4* tile) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    const uint4 v = pk::load_vector<uint4>(tile + (group / 2 * 8 + 2 * f + group % 2) * 4 + member);
    const unsigned steps[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int t = 0; t < 2; ++t) pk::mma_m16n8k16_f16(s[t][f], a[t][step], steps[step]);
  }
}

// A block's way through a part of the bank: chunk after chunk, `leap` apart, of each the tiles, of each the slices. The next stage of
// shared memory is filled while this one is read.
template <int BLOCKS>
struct Walk {
  using S = Shape<BLOCKS>;
  static constexpr int TILES_OF_CHUNK = NEAREST_CHUNK / NEAREST_TILE;
  const NearestTask& p;
  unsigned char* const shared;
  const int chunk0, chunks, leap, slices;
  const bool active;           // the others of the block help with copying
  const uint4* const queries;  // of the warp
  Left a[BLOCKS > 0 ? BLOCKS : 1];

  __device__ __forceinline__ Walk(const NearestTask& p_, unsigned char* shared_, int part, int stride, int64_t tile)
      : p(p_),
        shared(shared_),
        chunk0(part * p.part_chunks),
        chunks(min(p.part_chunks, p.chunks - chunk0)),
        leap(stride % chunks),
        slices(BLOCKS > 0 ? 1 : (p.blocks + SLICE - 1) / SLICE),
        active(tile < p.query_tiles),
        queries(static_cast<const uint4*>(p.packed_queries) + tile * p.blocks * TILE_VECTORS) {
    if constexpr (BLOCKS > 0) {
      if (!active) return;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) load_left(a[b], queries + b * TILE_VECTORS);
    }
  }

  // Where the walk is: the first tile of the part that is in a stage, and the slice.
  struct Place {
    int tile, slice;
  };
  __device__ __forceinline__ Place behind(Place at) const {
    if (BLOCKS == 0) {
      if (++at.slice < slices) return at;
      at.slice = 0;
      if (++at.tile % TILES_OF_CHUNK != 0) return at;
      at.tile -= TILES_OF_CHUNK;
    }
    at.tile += leap * TILES_OF_CHUNK;
    if (at.tile >= chunks * TILES_OF_CHUNK) at.tile -= chunks * TILES_OF_CHUNK;
    return at;
  }
  __device__ __forceinline__ int depth(Place at) const { return BLOCKS > 0 ? BLOCKS : min(SLICE, p.blocks - at.slice * SLICE); }

  __device__ __forceinline__ void copy(unsigned char* target, Place at) const {
    const int64_t tile = static_cast<int64_t>(chunk0) * TILES_OF_CHUNK + at.tile;
    const uint4* const source = static_cast<const uint4*>(p.packed_bank) + (tile * p.blocks + at.slice * SLICE) * TILE_VECTORS;
    const int vectors = S::TILES * depth(at) * TILE_VECTORS;
#pragma unroll 2
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) pk::copy_async_16(target + i * 16, source + i);
#pragma unroll 1
    for (int i = threadIdx.x; i < S::TILES * NEAREST_TILE / 2; i += blockDim.x)
      pk::copy_async_16(target + S::VECTORS * 16 + i * 16, p.bias + tile * NEAREST_TILE * 2 + 4 * i);
  }

  // Calls body(scores, tile of the part) for the tiles of the first `visits` chunks.
  template <class Body>
  __device__ __forceinline__ void run(int visits, const Body& body) {
    Place at = {0, 0};
    int buffer = 0;
    Scores s;
    if (visits > 0) copy(shared, at);
    pk::copy_async_commit();
#pragma unroll 1
    for (int left = visits * slices * (TILES_OF_CHUNK / S::TILES); left > 0; --left) {
      const Place next = behind(at);
      if (left > 1) copy(shared + (buffer ^ 1) * S::BYTES, next);
      pk::copy_async_commit();  // perhaps of nothing: what is needed now is one group behind
      pk::copy_async_wait<1>();
      __syncthreads();
      if (active) read_stage(s, shared + buffer * S::BYTES, at, body);
      __syncthreads();
      at = next, buffer ^= 1;
    }
  }

  template <class Body>
  __device__ __forceinline__ void read_stage(Scores& s, const unsigned char* stage, Place at, const Body& body) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(stage);
    const float* const bias = reinterpret_cast<const float*>(stage + S::VECTORS * 16);
    if constexpr (BLOCKS > 0) {
#pragma unroll 1
      for (int t = 0; t < S::TILES; ++t) {
        begin_scores(s, bias + t * NEAREST_TILE * 2);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) add_products(s, a[b], vectors + (t * BLOCKS + b) * TILE_VECTORS);
        body(s, at.tile + t);
      }
    } else {
      const int blocks = depth(at);
      if (at.slice == 0) begin_scores(s, bias);
#pragma unroll 1
      for (int b = 0; b < blocks; ++b) {
        load_left(a[0], queries + (at.slice * SLICE + b) * TILE_VECTORS);
        add_products(s, a[0], vectors + b * TILE_VECTORS);
      }
      if (at.slice + 1 == slices) body(s, at.tile);
    }
  }
};

}  // namespace
