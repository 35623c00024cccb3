// SPDX-License-Identifier: MIT
// Instructions of compute capability 9.0a: barriers in shared memory that threads and the copy engine arrive at, registers that warpgroups (four
// warps) pass on, and products of a warpgroup on the tensor cores: 64 rows at a time, twice the rate of mma.sync, the right factor read from shared
// memory by the tensor cores themselves.
//
//     pk::barrier_start(barrier, arrivals), pk::barriers_started()                       // by one thread; a barrier of the block must follow
//     pk::barrier_arrive(barrier), pk::barrier_expect(barrier, bytes)                    // the phase ends when so many bytes have come, too
//     pk::barrier_wait(barrier, parity), pk::barrier_is_over(barrier, parity)            // the first phase has parity 0
//     pk::fewer_registers<count>(), pk::more_registers<count>()                          // per thread of this warpgroup, from here on
//     pk::publish_to_tensor_cores()    // each thread that wrote a factor, before the barrier behind which others multiply
//     pk::begin_products(); ...; pk::commit_products(); pk::wait_for_products<pending>(); pk::hold(d)      // around the products of d
//
// They exist in code for 9.0a alone. A kernel that uses them has its body under PK_HOPPER and is empty elsewhere, in the emulator too, and static
// shared memory in that body; the host asks pk::warpgroup_products(kernel) before it launches, and has another kernel. Products differ in shape
// and in where their factors lie; those that prototypes takes stand here:
//
//     pk::matrix_descriptor(shared)        // of a factor in shared memory: rows of 128 bytes along k, 16-byte pieces exchanged (swizzled_piece)
//     pk::begin_products(); pk::warpgroup_multiply(d, a, b, add); ... pk::end_products(d)        // d = a b, or d += a b
//
// d [F][4] and a [4] are the fragments of mma_m16n8k16_f16 (common/simt.cuh), of the warp's sixteen rows; b: sixteen k of F * 8 columns.
#pragma once

#include "common/simt.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PK_HOPPER 1
#endif

namespace pk {

#if defined(__CUDACC__)
template <typename... Parameters>
bool warpgroup_products(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.sharedSizeBytes > 0;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

__device__ __forceinline__ void barrier_start(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What barrier_start did is visible to the copy engine.
__device__ __forceinline__ void barriers_started() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  unsigned ended;
  do
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  while (!ended);
}
__device__ __forceinline__ bool barrier_is_over(uint64_t* barrier, unsigned parity) {
  unsigned ended;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(ended)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return ended != 0;
}

template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

__device__ __forceinline__ void publish_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending_groups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending_groups) : "memory");
}
// Nothing that reads or writes these may cross this line.
template <int count>
__device__ __forceinline__ void hold(float (&d)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) asm volatile("" : "+f"(d[k])::"memory");
}
#else
template <typename Kernel>
bool warpgroup_products(Kernel) {
  return false;
}
#endif

#if defined(PK_HOPPER)

// Where piece 0 ... 7 (of 16 bytes) of a row stands in the row's 128 bytes; the factor is 1024-byte aligned.
__device__ __forceinline__ int swizzled_piece(int row, int piece) { return piece ^ row % 8; }

__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared) {
  const uint64_t address = shared_address(shared);
  return address >> 4 | uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;  // eight rows are 1024 bytes; 128-byte swizzle
}

template <int F>
__device__ __forceinline__ void end_products(float (&d)[F][4]) {
  commit_products();
  wait_for_products<0>();
#pragma unroll
  for (int f = 0; f < F; ++f) hold(d[f]);  // read behind the wait
}

#define PK_FRAGMENT(f) "+f"(d[f][0]), "+f"(d[f][1]), "+f"(d[f][2]), "+f"(d[f][3])
__device__ __forceinline__ void warpgroup_multiply(float (&d)[16][4], const unsigned (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : PK_FRAGMENT(0), PK_FRAGMENT(1), PK_FRAGMENT(2), PK_FRAGMENT(3), PK_FRAGMENT(4), PK_FRAGMENT(5), PK_FRAGMENT(6), PK_FRAGMENT(7),
        PK_FRAGMENT(8), PK_FRAGMENT(9), PK_FRAGMENT(10), PK_FRAGMENT(11), PK_FRAGMENT(12), PK_FRAGMENT(13), PK_FRAGMENT(14), PK_FRAGMENT(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[32][4], const unsigned (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, 0;}"
      : PK_FRAGMENT(0), PK_FRAGMENT(1), PK_FRAGMENT(2), PK_FRAGMENT(3), PK_FRAGMENT(4), PK_FRAGMENT(5), PK_FRAGMENT(6), PK_FRAGMENT(7),
        PK_FRAGMENT(8), PK_FRAGMENT(9), PK_FRAGMENT(10), PK_FRAGMENT(11), PK_FRAGMENT(12), PK_FRAGMENT(13), PK_FRAGMENT(14),
        PK_FRAGMENT(15), PK_FRAGMENT(16), PK_FRAGMENT(17), PK_FRAGMENT(18), PK_FRAGMENT(19), PK_FRAGMENT(20), PK_FRAGMENT(21),
        PK_FRAGMENT(22), PK_FRAGMENT(23), PK_FRAGMENT(24), PK_FRAGMENT(25), PK_FRAGMENT(26), PK_FRAGMENT(27), PK_FRAGMENT(28),
        PK_FRAGMENT(29), PK_FRAGMENT(30), PK_FRAGMENT(31)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}
#undef PK_FRAGMENT

#endif

}  // namespace pk
