// SPDX-License-Identifier: MIT
// What csrc/common/simt.cuh offers a kernel, when g++ compiles it for the emulator.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator/atomics.h"
#include "emulator/half.h"
#include "emulator/memory.h"
#include "emulator/runtime.h"
#include "emulator/vector_types.h"
#include "emulator/warp.h"

// Keywords. A raw __shared__ would be one array for all blocks that nobody watches, hence the macros of simt.cuh.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ declare_shared_memory_with_PK_SHARED_or_PK_DYNAMIC_SHARED

#define threadIdx (::pk::emulator::thread_index())
#define blockIdx (::pk::emulator::block_index())
#define blockDim (::pk::emulator::block_extent())
#define gridDim (::pk::emulator::grid_extent())
inline constexpr int warpSize = 32;

#define PK_SHARED(type, name, ...)                                                                             \
  auto& name = *static_cast<::pk::array_of<type __VA_OPT__(, ) __VA_ARGS__>*>(::pk::emulator::shared_variable( \
      [] {                                                                                                     \
        static char key;                                                                                       \
        return &key;                                                                                           \
      }(),                                                                                                     \
      #name, sizeof(::pk::array_of<type __VA_OPT__(, ) __VA_ARGS__>), alignof(type)))
#define PK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::pk::emulator::dynamic_shared())
#define PK_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  ::pk::launch(#kernel, kernel, grid, block, dynamic_shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define PK_LAUNCH_BEHIND PK_LAUNCH  // one launch after the other
#define PK_SET_CONSTANT(symbol, host_pointer, bytes, stream) (std::memcpy(&(symbol), host_pointer, bytes), 0)

// Barriers and fences.
inline void __syncthreads(PK_EMULATOR_HERE) { ::pk::emulator::block_barrier(false, "__syncthreads", location); }
inline int __syncthreads_count(int predicate, PK_EMULATOR_HERE) {
  return ::pk::emulator::block_barrier(predicate != 0, "__syncthreads_count", location);
}
inline int __syncthreads_or(int predicate, PK_EMULATOR_HERE) {
  return ::pk::emulator::block_barrier(predicate != 0, "__syncthreads_or", location) != 0;
}
inline int __syncthreads_and(int predicate, PK_EMULATOR_HERE) {
  return ::pk::emulator::block_barrier(predicate == 0, "__syncthreads_and", location) == 0;
}
inline void __threadfence() { ::pk::emulator::fence(); }
inline void __threadfence_system() { ::pk::emulator::fence(); }
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { ::pk::emulator::fail("__trap"); }

// Loads and stores with a cache hint.
namespace pk::emulator {
template <typename T>
inline void check_natural_alignment(const T* pointer, const char* what) {
  if constexpr (sizeof(T) > 4) check_vector_access(pointer, alignof(T), what);
}
template <typename T>
inline T hinted_load(const T* pointer) {
  check_natural_alignment(pointer, "load");
  return *pointer;
}
template <typename T>
inline void hinted_store(T* pointer, const T& value) {
  check_natural_alignment(pointer, "store");
  *pointer = value;
}
}  // namespace pk::emulator
template <typename T>
T __ldg(const T* pointer) {
  return ::pk::emulator::hinted_load(pointer);
}
template <typename T>
T __ldcg(const T* pointer) {
  return ::pk::emulator::hinted_load(pointer);
}
template <typename T>
T __ldca(const T* pointer) {
  return ::pk::emulator::hinted_load(pointer);
}
template <typename T>
T __ldcs(const T* pointer) {
  return ::pk::emulator::hinted_load(pointer);
}
template <typename T>
void __stcg(T* pointer, T value) {
  ::pk::emulator::hinted_store(pointer, value);
}
template <typename T>
void __stcs(T* pointer, T value) {
  ::pk::emulator::hinted_store(pointer, value);
}

// Bits.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  x = ((x >> 1) & 0x55555555u) | ((x & 0x55555555u) << 1);
  x = ((x >> 2) & 0x33333333u) | ((x & 0x33333333u) << 2);
  x = ((x >> 4) & 0x0f0f0f0fu) | ((x & 0x0f0f0f0fu) << 4);
  return __builtin_bswap32(x);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((static_cast<unsigned long long>(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Arithmetic. The C library already owns names such as __expf, so these are macros; here they are as exact as expf.
#define __expf(x) (::expf(x))
#define __exp2f(x) (::exp2f(x))
#define __logf(x) (::logf(x))
#define __log2f(x) (::log2f(x))
#define __log10f(x) (::log10f(x))
#define __powf(x, y) (::powf(x, y))
#define __sinf(x) (::sinf(x))
#define __cosf(x) (::cosf(x))
#define __tanf(x) (::tanf(x))
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return ::fmaf(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return ::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return ::sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / ::sqrt(static_cast<double>(x))); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / ::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(::nearbyintf(x)); }
inline long long __double2ll_rn(double x) { return static_cast<long long>(::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(::floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(::ceilf(x)); }

// Sine and cosine of pi x, exact at multiples of a half.
inline void sincospi(double x, double* sine, double* cosine) {
  const double turned = x - 2 * ::rint(x / 2), quarter = ::rint(2 * turned), rest = 3.14159265358979323846 * (turned - quarter / 2);
  const double s = ::sin(rest), c = ::cos(rest);
  const int quadrant = quarter == quarter ? static_cast<int>(quarter) & 3 : 0;
  *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
  *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}
inline void sincospif(float x, float* sine, float* cosine) {
  double s, c;
  sincospi(static_cast<double>(x), &s, &c);
  *sine = static_cast<float>(s);
  *cosine = static_cast<float>(c);
}

#define PK_MIN_MAX(type)                                    \
  inline type min(type x, type y) { return y < x ? y : x; } \
  inline type max(type x, type y) { return x < y ? y : x; }
PK_MIN_MAX(int)
PK_MIN_MAX(unsigned)
PK_MIN_MAX(long)
PK_MIN_MAX(unsigned long)
PK_MIN_MAX(long long)
PK_MIN_MAX(unsigned long long)
#undef PK_MIN_MAX
inline float min(float x, float y) { return ::fminf(x, y); }
inline float max(float x, float y) { return ::fmaxf(x, y); }
inline double min(double x, double y) { return ::fmin(x, y); }
inline double max(double x, double y) { return ::fmax(x, y); }

namespace pk {

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, void*,
           Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> values;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto invoke = [](const void* context) {
    const auto& [function, values] = *static_cast<const Call*>(context);
    std::apply(function, values);
  };
  return emulator::launch(name, invoke, &call, grid, block, dynamic_shared_bytes);
}

inline int multiprocessor_count() { return emulator::architecture().multiprocessors; }
inline std::size_t shared_memory_limit() { return emulator::architecture().shared_bytes_per_block; }
inline int memset_async(void* pointer, int byte, std::size_t count, void*) {
  std::memset(pointer, byte, count);
  return 0;
}

inline void let_next_begin() {}
inline void wait_for_previous() {}

template <typename Vector, typename T>
inline Vector load_vector(const T* pointer) {
  emulator::check_vector_access(pointer, alignof(Vector), "load");
  return *reinterpret_cast<const Vector*>(pointer);
}
template <typename Vector, typename T>
inline void store_vector(T* pointer, const Vector& value) {
  emulator::check_vector_access(pointer, alignof(Vector), "store");
  *reinterpret_cast<Vector*>(pointer) = value;
}

inline void copy_async_16(void* shared, const void* global, bool valid = true) { emulator::copy_async(shared, global, 16, valid); }
inline void copy_async_8(void* shared, const void* global, bool valid = true) { emulator::copy_async(shared, global, 8, valid); }
inline void copy_async_4(void* shared, const void* global, bool valid = true) { emulator::copy_async(shared, global, 4, valid); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int pending_groups>
inline void copy_async_wait() {
  emulator::copy_async_wait(pending_groups);
}

// Denormal arguments and results count as zero, as in the hardware's instruction.
inline float log2_fast(float x) { return ::log2f(x); }
inline float rsqrt_fast(float x) { return rsqrtf(x); }
inline unsigned long long multiply_wide(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b; }
inline float exp2_fast(float x) {
  if (::fabsf(x) < 0x1p-126f) return 1.0f;
  const float power = ::exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline float reciprocal_fast(float x) {
  const float reciprocal = 1.0f / (::fabsf(x) < 0x1p-126f ? ::copysignf(0.0f, x) : x);
  return ::fabsf(reciprocal) < 0x1p-126f ? ::copysignf(0.0f, reciprocal) : reciprocal;
}

inline float2 unpack_f16(unsigned bits) {
  return {emulator::half_bits_to_float(static_cast<std::uint16_t>(bits)),
          emulator::half_bits_to_float(static_cast<std::uint16_t>(bits >> 16))};
}
inline unsigned pack_bf16(float low, float high) {
  return emulator::float_to_bfloat16_bits(low) | static_cast<unsigned>(emulator::float_to_bfloat16_bits(high)) << 16;
}
inline unsigned pack_f16(float low, float high) {
  return emulator::float_to_half_bits(low) | static_cast<unsigned>(emulator::float_to_half_bits(high)) << 16;
}

}  // namespace pk
