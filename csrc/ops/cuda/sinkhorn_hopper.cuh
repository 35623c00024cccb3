// SPDX-License-Identifier: MIT
// Instructions of sm_90a beyond common/hopper.cuh: copies by the copy engine, barriers of part of a block, products by a warpgroup (wgmma). Only
// the GPU has these; the emulator never sees this file.
//
// A tile for wgmma is 64 halves wide (128 bytes a row), its 16-byte pieces exchanged within groups of 8 rows: piece c of row r lies at
// place c ^ (r % 8) ("128-byte swizzle"). It starts at a multiple of 1024 bytes. 16 halves further along a row are 32 bytes.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"

namespace {

// Global -> shared by the copy engine; both on 16 bytes, as is the count.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(pk::shared_address(shared)),
               "l"(global), "r"(bytes), "r"(pk::shared_address(barrier))
               : "memory");
}

// Between what threads have written and copies by the copy engine, on both sides.
__device__ __forceinline__ void copies_see_writes() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Four 8 x 8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&d)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The lower half of a tile's descriptor; the upper one is always the same. 16 bytes further on is 1 more.
__device__ __forceinline__ unsigned tile_descriptor(unsigned address) { return (address >> 4 & 0x3FFF) | 1u << 16; }

// The first THREADS threads of a block.
template <int THREADS_>
struct PartOfBlock {
  static constexpr int THREADS = THREADS_;
  static __device__ __forceinline__ void sync() { asm volatile("barrier.cta.sync 1, %0;" ::"n"(THREADS) : "memory"); }
  static __device__ __forceinline__ bool any(bool x) {
    unsigned one;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.pred q, 1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(one)
                 : "r"(static_cast<unsigned>(x)), "n"(THREADS)
                 : "memory");
    return one != 0;
  }
  // As arrives_last.
  static __device__ __forceinline__ bool is_last(unsigned* count, int64_t blocks) {
    PK_SHARED(int, last);
    sync();
    if (threadIdx.x == 0) {
      unsigned before;
      asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
      last = before + 1 == blocks;
      if (last) *count = 0;
    }
    sync();
    return last;
  }
};

// d [64, 64] += a [64, 16] b [16, 64]; d and a as the fragments of mma.m16n8k16, warp w of the group at rows 16 w. add = 0: d is not read.
__device__ __forceinline__ void wgmma_m64n64k16_f16(float (&d)[32], const unsigned (&a)[4], unsigned b, int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 tile;\nsetp.ne.b32 p, %37, 0;\nmov.b64 tile, {%36, 0x40000040};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, tile, p, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),
        "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));
}

}  // namespace
