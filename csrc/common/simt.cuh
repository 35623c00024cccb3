// SPDX-License-Identifier: MIT
// The names a kernel may use. A kernel file includes this header, its op header and headers that include no more, nothing else, so that the
// same source is compiled by nvcc for a GPU and by g++ for the emulator (csrc/emulator), where every memory access is watched.
//
// Shared memory is declared through macros; the result behaves as a plain array (or pointer) in both worlds:
//
//     PK_SHARED(float, tile, 32, 33);          // __shared__ float tile[32][33], 16-byte aligned
//     PK_SHARED(int, count);                   // __shared__ int count
//     PK_DYNAMIC_SHARED(float, scratch);       // float* scratch: the dynamic shared memory, 128-byte aligned
//
// Host side:
//
//     int status = PK_LAUNCH((kernel<float, 4>), grid, block, dynamic_shared_bytes, stream, arguments...);   // 0 = success
//     pk::multiprocessor_count(), pk::shared_memory_limit()      // of the current device
//     pk::memset_async(pointer, byte, count, stream), PK_SET_CONSTANT(symbol, host_pointer, bytes, stream)
//
// Device side, beyond the CUDA names:
//
//     float4 v = pk::load_vector<float4>(pointer);   pk::store_vector(pointer, v);     // aligned, in global or shared memory
//     pk::copy_async_16(shared, global, valid); pk::copy_async_commit(); pk::copy_async_wait<pending_groups>();
//     pk::to_tf32(x), pk::pack_bf16(low, high), pk::pack_f16(low, high), pk::unpack_f16(bits)      // float2: low, high
//     pk::mma_m16n8k8_tf32(d, a, b), pk::mma_m16n8k16_bf16(d, a, b), pk::mma_m16n8k16_f16(d, a, b)
//     pk::reciprocal_fast(x)                                // 1 / x in one instruction: to 2^-23, and denormals are 0
//     pk::exp2_fast(x)                                      // 2^x in one instruction: to 2^-22, and 0 below 2^-126
//     pk::log2_fast(x), pk::rsqrt_fast(x)                   // likewise, of normal numbers: to 2^-22, absolutely or of itself; 1 / sqrt(x)
//     pk::multiply_wide(a, b)                               // all 64 bits of a product of 32-bit numbers, in one instruction
//
// A kernel launched behind another on the same stream may begin before that one ends (compute capability 9.0; elsewhere it waits):
//
//     PK_LAUNCH_BEHIND((kernel), grid, block, dynamic_shared_bytes, stream, arguments...)
//     pk::let_next_begin()       // device: the launch behind this one may begin; nothing it reads before its wait may be written from here on
//     pk::wait_for_previous()    // device: all launches before this one have ended and what they wrote is visible
//
// Where PK_BLOCKS_WAIT is defined (a GPU, not the emulator) blocks of one launch may wait for each other:
//
//     int blocks = pk::blocks_together(kernel, threads, dynamic_shared_bytes)     // host: so many are on the device at once
//     int status = pk::launch_together(kernel, grid, block, dynamic_shared_bytes, stream, arguments...)   // all at once, or an error
//     pk::arrive(count); pk::wait_for(count, target)                              // by one thread, between two __syncthreads()
//
// Fragments, with group = lane / 4 and member = lane % 4 (PTX ISA, "Matrix fragments for mma"):
//     D, C [16, 8]:        d[0..3] = (group, 2 member), (group, 2 member + 1), (group + 8, 2 member), (group + 8, 2 member + 1)
//     A [16, 8]  tf32:     a[0..3] = (group, member), (group + 8, member), (group, member + 4), (group + 8, member + 4)
//     B [8, 8]   tf32:     b[0..1] = (member, group), (member + 4, group)
//     A [16, 16] bf16, f16: a[0..3] = pairs at (group, 2 member), (group + 8, 2 member), (group, 2 member + 8), (group + 8, 2 member + 8)
//     B [16, 8]  bf16, f16: b[0..1] = pairs at (2 member, group), (2 member + 8, group); a pair runs along k, low half first
#pragma once

#include <cstddef>
#include <cstdint>

namespace pk {

template <typename T, unsigned... extents>
struct Array {
  using type = T;
};
template <typename T, unsigned first, unsigned... rest>
struct Array<T, first, rest...> {
  using type = typename Array<T, rest...>::type[first];
};
template <typename T, unsigned... extents>
using array_of = typename Array<T, extents...>::type;

}  // namespace pk

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "protokernels: kernels need compute capability 8.0 or later; remove the older entries from the architecture list"
#endif

#define PK_SHARED(type, name, ...) __shared__ __align__(16)::pk::array_of<type __VA_OPT__(, ) __VA_ARGS__> name
#define PK_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char pk_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pk_dynamic_shared)
#define PK_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::pk::launch(kernel, grid, block, dynamic_shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define PK_LAUNCH_BEHIND(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::pk::launch_behind(kernel, grid, block, dynamic_shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define PK_SET_CONSTANT(symbol, host_pointer, bytes, stream) \
  static_cast<int>(cudaMemcpyToSymbolAsync(symbol, host_pointer, bytes, 0, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)))

namespace pk {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void* stream, Arguments&&... arguments) {
  // Above 48 KB, static and dynamic together, a kernel must opt in; static arrays stay well under 32 KB here.
  if (dynamic_shared_bytes > 16 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return static_cast<int>(error);
    }
  }
  kernel<<<grid, block, dynamic_shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return static_cast<int>(cudaGetLastError());
}

template <typename... Parameters, typename... Arguments>
int launch_behind(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void* stream,
                  Arguments&&... arguments) {
  if (dynamic_shared_bytes > 16 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return static_cast<int>(error);
    }
  }
  int device = 0, capability = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = capability >= 9 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}
#define PK_BLOCKS_WAIT 1
template <typename... Parameters>
int blocks_together(void (*kernel)(Parameters...), int threads, std::size_t dynamic_shared_bytes) {
  int device = 0, multiprocessors = 0, each = 0, cooperative = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  const void* const code = reinterpret_cast<const void*>(kernel);
  const int bytes = static_cast<int>(dynamic_shared_bytes);
  if (!cooperative || cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, code, threads, dynamic_shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return each * multiprocessors;
}
template <typename... Parameters, typename... Arguments>
int launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void* stream,
                    Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline std::size_t shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int memset_async(void* pointer, int byte, std::size_t count, void* stream) {
  return static_cast<int>(cudaMemsetAsync(pointer, byte, count, static_cast<cudaStream_t>(stream)));
}

template <typename Vector, typename T>
__device__ __forceinline__ Vector load_vector(const T* pointer) {
  return *reinterpret_cast<const Vector*>(pointer);
}
template <typename Vector, typename T>
__device__ __forceinline__ void store_vector(T* pointer, const Vector& value) {
  *reinterpret_cast<Vector*>(pointer) = value;
}

// Asynchronous copies global -> shared; where valid is false the source is not touched and zeros are written.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending_groups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
}

// Round to nearest, ties away from zero, to the 10 stored mantissa bits of tf32.
__device__ __forceinline__ unsigned to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ unsigned pack_f16(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ float2 unpack_f16(unsigned bits) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }

__device__ __forceinline__ float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float log2_fast(float x) {
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(x));
  return logarithm;
}
__device__ __forceinline__ float rsqrt_fast(float x) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
__device__ __forceinline__ unsigned long long multiply_wide(unsigned a, unsigned b) {
  unsigned long long product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What the block wrote before its barrier is visible to whoever waits.
__device__ __forceinline__ void arrive(unsigned* count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
__device__ __forceinline__ void wait_for(const unsigned* count, unsigned target) {
  unsigned arrived;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(count) : "memory");
  while (arrived < target);
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float reciprocal;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// d += a b, all 32 lanes of the warp together.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace pk

#else

#include "emulator/device.h"

#endif
