// SPDX-License-Identifier: MIT
// Products by warpgroups of compute capability 9.0 (sm_90a) where PK_HOPPER is defined, both factors in shared memory or one in registers. Tiles,
// swizzle and accumulators are those of contrastive_hopper.cuh.
#pragma once

#include "common/hopper.cuh"
#include "ops/cuda/contrastive_rows.cuh"

namespace {
namespace hopper {

constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64, CHANNELS = 128;
constexpr int PANEL_CHANNELS = 64, VECTOR_BYTES = 2 * PANEL_CHANNELS;  // of one panel
constexpr int SWIZZLE_BYTES = 1024;
using Accumulator = float[CHANNELS / 2];

#if defined(PK_HOPPER)

__device__ __forceinline__ void synchronize_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP_THREADS) : "memory");
}

// The lower half of a descriptor of a swizzled tile, in which addresses count 16 bytes. leading: bytes from panel to panel where channels are n, else
// not used. The upper half is the same for all: groups of 8 vectors, and the swizzle. Uniform, as instructions take it from a uniform register.
__device__ __forceinline__ unsigned descriptor(unsigned address, int leading) {
  return __shfl_sync(ALL, (address >> 4 & 0x3fff) | static_cast<unsigned>(leading >> 4) << 16, 0);
}
constexpr int UPPER = 8 * VECTOR_BYTES >> 4 | 1 << 30;

#define PK_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define PK_16(c, i) PK_4(c, i), PK_4(c, i + 4), PK_4(c, i + 8), PK_4(c, i + 12)
#define PK_32(c) PK_16(c, 0), PK_16(c, 16)
#define PK_64(c) PK_16(c, 0), PK_16(c, 16), PK_16(c, 32), PK_16(c, 48)
#define PK_NAMES_32                                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31"
#define PK_NAMES_64                                                                                                                      \
  PK_NAMES_32                                                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
  "%58, %59, %60, %61, %62, %63"
#define PK_MULTIPLY_32(adds, descriptors)                               \
  "{.reg .pred p; .reg .b64 x, y; " descriptors " setp.ne.b32 p, " adds \
  ", 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PK_NAMES_32 "}, "
#define PK_MULTIPLY_64(adds, descriptors)                               \
  "{.reg .pred p; .reg .b64 x, y; " descriptors " setp.ne.b32 p, " adds \
  ", 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PK_NAMES_64 "}, "

// d = x y or d += x y over one step of 16 channels; x and y are descriptors.
template <bool adds>
__device__ __forceinline__ void multiply(float (&d)[32], unsigned x, unsigned y) {
  if constexpr (adds)
    asm volatile(PK_MULTIPLY_32("1", "mov.b64 x, {%32, %34}; mov.b64 y, {%33, %34};") "x, y, p, 1, 1, 0, 0;}"
                 : PK_32("+f")
                 : "r"(x), "r"(y), "n"(UPPER)
                 : "memory");
  else
    asm volatile(PK_MULTIPLY_32("0", "mov.b64 x, {%32, %34}; mov.b64 y, {%33, %34};") "x, y, p, 1, 1, 0, 0;}"
                 : PK_32("=f")
                 : "r"(x), "r"(y), "n"(UPPER)
                 : "memory");
}
template <bool adds>
__device__ __forceinline__ void multiply(float (&d)[64], unsigned x, unsigned y) {
  if constexpr (adds)
    asm volatile(PK_MULTIPLY_64("1", "mov.b64 x, {%64, %66}; mov.b64 y, {%65, %66};") "x, y, p, 1, 1, 0, 0;}"
                 : PK_64("+f")
                 : "r"(x), "r"(y), "n"(UPPER)
                 : "memory");
  else
    asm volatile(PK_MULTIPLY_64("0", "mov.b64 x, {%64, %66}; mov.b64 y, {%65, %66};") "x, y, p, 1, 1, 0, 0;}"
                 : PK_64("=f")
                 : "r"(x), "r"(y), "n"(UPPER)
                 : "memory");
}
// d = h y or d += h y over one step of 16 vectors.
template <bool adds>
__device__ __forceinline__ void multiply_weights(Accumulator& d, const unsigned (&h)[4], unsigned y) {
  if constexpr (adds)
    asm volatile(PK_MULTIPLY_64("1", "mov.b64 y, {%68, %69};") "{%64, %65, %66, %67}, y, p, 1, 1, 1;}"
                 : PK_64("+f")
                 : "r"(h[0]), "r"(h[1]), "r"(h[2]), "r"(h[3]), "r"(y), "n"(UPPER)
                 : "memory");
  else
    asm volatile(PK_MULTIPLY_64("0", "mov.b64 y, {%68, %69};") "{%64, %65, %66, %67}, y, p, 1, 1, 1;}"
                 : PK_64("=f")
                 : "r"(h[0]), "r"(h[1]), "r"(h[2]), "r"(h[3]), "r"(y), "n"(UPPER)
                 : "memory");
}

#undef PK_4
#undef PK_16
#undef PK_32
#undef PK_64
#undef PK_NAMES_32
#undef PK_NAMES_64
#undef PK_MULTIPLY_32
#undef PK_MULTIPLY_64

#endif

}  // namespace hopper
}  // namespace
