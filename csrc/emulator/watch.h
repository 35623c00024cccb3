// SPDX-License-Identifier: MIT
// The record of who touched which word last, kept in the watched build only (PK_EMULATOR_WATCHED). Kernels are compiled with
// the compiler's thread-sanitizer instrumentation, which calls a function at every memory access; watch.cpp supplies these
// functions instead of the sanitizer's own library, because it knows CUDA's rules of who waits for whom.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pk::emulator {

enum class AccessKind : std::uint8_t { read, write, atomic, copy_start, copy_landing };

#if defined(PK_EMULATOR_WATCHED)
void watch_access(const void* address, std::size_t bytes, AccessKind kind, const void* return_address);
void watch_launch_started();
void watch_block_started();
void watch_warp_synchronised(unsigned warp, unsigned participants, unsigned lanes);
void watch_fence();  // __threadfence by the running thread
void watch_set_alive(const void* address, std::size_t bytes, bool writable);
void watch_set_dead(const void* address, std::size_t bytes);
#else
inline void watch_access(const void*, std::size_t, AccessKind, const void*) {}
inline void watch_launch_started() {}
inline void watch_block_started() {}
inline void watch_warp_synchronised(unsigned, unsigned, unsigned) {}
inline void watch_fence() {}
inline void watch_set_alive(const void*, std::size_t, bool) {}
inline void watch_set_dead(const void*, std::size_t) {}
#endif

}  // namespace pk::emulator
