// SPDX-License-Identifier: MIT
// What the emulated kernels need from the emulator: the thread's place, barriers, warp collectives, and a way to fail.
// Everything here is compiled without instrumentation, so that only the kernels' own memory accesses are watched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "emulator/vector_types.h"

namespace pk::emulator {

using Location = std::source_location;

// A block's threads do not change place, so the compiler may keep the values.
[[gnu::const]] uint3 thread_index() noexcept;
[[gnu::const]] uint3 block_index() noexcept;
[[gnu::const]] uint3 block_extent() noexcept;
[[gnu::const]] uint3 grid_extent() noexcept;
[[gnu::const]] unsigned lane_index() noexcept;

// Block barriers. Returns how many threads passed a true predicate.
int block_barrier(bool predicate, const char* name, const Location& location);

// A warp-wide operation: once all living lanes of `mask` have called it with the same mask and the same `combine`, `combine`
// runs once with the operands of the participating lanes (the others are nullptr), then the lanes go on in a drawn order.
using Combine = void (*)(unsigned participants, void* const* operands);
void warp_collective(unsigned mask, void* operand, Combine combine, const char* name, const Location& location);
void combine_nothing(unsigned participants, void* const* operands);  // __syncwarp: the one collective that orders memory

// Stops the launch; the message reaches Python as EmulatorError.
[[noreturn]] void fail(const std::string& message);
std::string describe_thread(unsigned thread);
std::string describe_location(const char* file, unsigned line);
std::string describe_threads();  // where the block's threads are, the running one left out

// Launches.
using Invoke = void (*)(const void* context);
int launch(const char* kernel, Invoke invoke, const void* context, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes);

struct Architecture {
  const char* name;
  int multiprocessors;
  std::size_t shared_bytes_per_block;  // with opt-in
};
const Architecture& architecture();

// Errors with CUDA's numbers.
inline constexpr int error_invalid_value = 1;
inline constexpr int error_invalid_configuration = 9;
inline constexpr int error_launch_failure = 719;

// Host side.
void configure(std::uint64_t seed, const std::string& architecture_name, std::size_t element_offset, double block_seconds);
std::size_t element_offset();
std::string take_report();

// The running block, for the memory side.
struct BlockState {
  std::uint32_t epoch = 0;  // grows at every block barrier and every block start, over all launches
  std::uint32_t launch_first_epoch = 1;
  std::uint32_t block_first_epoch = 1;
  unsigned thread = 0;  // running thread
  unsigned threads = 0;
  bool running = false;  // a kernel's code is being executed
};
extern BlockState block_state;

std::uint64_t draw();  // the seed's next number

}  // namespace pk::emulator
