// SPDX-License-Identifier: MIT
// The memory of the emulated device: shared memory of the running block, device buffers, asynchronous copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pk::emulator {

// One reserved region: shared memory first, then the device buffers, with gaps that belong to nobody.
inline constexpr std::size_t shared_region_bytes = std::size_t{1} << 19;
inline constexpr std::size_t device_region_bytes = std::size_t{1} << 28;
inline constexpr std::size_t region_bytes = shared_region_bytes + device_region_bytes;
unsigned char* region();

// Called by kernels. A shared variable is known by the address of a static object that its declaration owns.
void* shared_variable(const void* key, const char* name, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();
void check_vector_access(const void* pointer, std::size_t bytes, const char* what);
void copy_async(void* shared, const void* global, std::size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(unsigned pending_groups);

// Called by the scheduler.
void memory_launch_start(std::size_t dynamic_shared_bytes);
void memory_block_start();
void memory_thread_finished(unsigned thread);
void memory_launch_abandoned();

// Called by the host side. Buffers start `offset_bytes` after a 256-byte boundary.
void* device_allocate(const std::string& name, std::size_t bytes, std::size_t offset_bytes, bool writable);
void device_free(void* pointer);

// "shared 'tile' + 12 bytes", "buffer 'scores' + 4 bytes", "8 bytes past the end of buffer 'scores' (64 bytes)", ...
std::string describe_address(const void* address);
// "csrc/ops/cuda/x.cu:41" for a return address inside a kernel.
std::string describe_caller(const void* return_address);

}  // namespace pk::emulator
