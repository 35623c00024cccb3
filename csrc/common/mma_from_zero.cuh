// SPDX-License-Identifier: MIT
// d = a b on tensor cores, beside d += a b (common/simt.cuh): the zeros that a sum begins with then need no registers, and no instructions to write them.
#pragma once

#include "common/simt.cuh"

namespace pk {

#if defined(__CUDACC__)
__device__ __forceinline__ void mma_m16n8k16_f16_from_zero(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}
#else
inline void mma_m16n8k16_f16_from_zero(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], PK_EMULATOR_HERE) {
  for (float& sum : d) sum = 0;
  mma_m16n8k16_f16(d, a, b, location);
}
#endif

}  // namespace pk
