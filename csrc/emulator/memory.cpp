// SPDX-License-Identifier: MIT
#include "emulator/memory.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <vector>

#include "emulator/runtime.h"
#include "emulator/watch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pk::emulator {
namespace {

constexpr std::size_t shared_gap = 256;
constexpr std::size_t device_gap = 4096;
constexpr std::size_t static_shared_limit = 48 * 1024;
constexpr unsigned char poison = 0xff;  // NaN in float64, float32, float16 and bfloat16; -1 as an integer

struct SharedVariable {
  const void* key;
  const char* name;
  std::size_t offset, bytes;
};
struct Buffer {
  std::string name;
  std::size_t bytes;
  void* allocation;
};
struct PendingCopy {
  void* shared;
  const void* global;
  std::size_t bytes;
  bool valid;
  unsigned group;
  const void* return_address;
};
struct ThreadCopies {
  std::vector<PendingCopy> pending;
  unsigned committed = 0;
};

std::vector<SharedVariable> shared_variables;  // the first one is the dynamic shared memory
std::size_t static_shared_bytes = 0;
std::map<const unsigned char*, Buffer> buffers;
std::size_t device_used = 0;
std::array<ThreadCopies, 1024> copies;

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void start_shared(const SharedVariable& variable) {
  unsigned char* memory = region() + variable.offset;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, variable.bytes);
#endif
  std::memset(memory, poison, variable.bytes);
  watch_set_alive(memory, variable.bytes, true);
}

void add_shared(const void* key, const char* name, std::size_t bytes, std::size_t alignment) {
  const std::size_t end = shared_variables.empty() ? 0 : shared_variables.back().offset + shared_variables.back().bytes;
  shared_variables.push_back({key, name, round_up(end + shared_gap, std::max<std::size_t>(alignment, 16)), bytes});
  start_shared(shared_variables.back());
}

void check_shared_size(const char* name) {
  const std::size_t dynamic_bytes = shared_variables.front().bytes;
  if (static_shared_bytes > static_shared_limit) {
    fail("declares " + std::to_string(static_shared_bytes) + " bytes of static shared memory (with '" + name +
         "'); at most 49152 are possible, use PK_DYNAMIC_SHARED");
  }
  if (static_shared_bytes + dynamic_bytes > architecture().shared_bytes_per_block) {
    fail("needs " + std::to_string(static_shared_bytes) + " static and " + std::to_string(dynamic_bytes) +
         " dynamic bytes of shared memory; " + architecture().name + " has " + std::to_string(architecture().shared_bytes_per_block) +
         " per block");
  }
}

bool inside_shared(const void* pointer, std::size_t bytes) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  return std::any_of(shared_variables.begin(), shared_variables.end(), [&](const SharedVariable& variable) {
    return address >= region() + variable.offset && address + bytes <= region() + variable.offset + variable.bytes;
  });
}

}  // namespace

unsigned char* region() {
  static unsigned char* memory = [] {
#if defined(__SANITIZE_ADDRESS__)
    constexpr std::size_t bytes = shared_region_bytes;  // buffers come from malloc, which the sanitizer guards
#else
    constexpr std::size_t bytes = region_bytes;
#endif
    void* reserved = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(reserved);
  }();
  return memory;
}

void* shared_variable(const void* key, const char* name, std::size_t bytes, std::size_t alignment) {
  for (const SharedVariable& variable : shared_variables) {
    if (variable.key == key) return region() + variable.offset;
  }
  static_shared_bytes = round_up(static_shared_bytes, 16) + bytes;
  add_shared(key, name, bytes, alignment);
  check_shared_size(name);
  return region() + shared_variables.back().offset;
}

void* dynamic_shared() { return region() + shared_variables.front().offset; }

void memory_launch_start(std::size_t dynamic_shared_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(region(), shared_region_bytes);
#endif
  for (const SharedVariable& variable : shared_variables) watch_set_dead(region() + variable.offset, variable.bytes);
  shared_variables.clear();
  static_shared_bytes = 0;
  add_shared(&shared_variables, "dynamic shared memory", dynamic_shared_bytes, 128);
}

void memory_block_start() {
  for (const SharedVariable& variable : shared_variables) start_shared(variable);
}

void memory_thread_finished(unsigned thread) {
  copies[thread].pending.clear();
  copies[thread].committed = 0;
}

void memory_launch_abandoned() {
  for (unsigned thread = 0; thread < copies.size(); ++thread) memory_thread_finished(thread);
}

void check_vector_access(const void* pointer, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0) return;
  fail("misaligned " + std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe_address(pointer) + ", at " +
       describe_caller(__builtin_return_address(0)));
}

void copy_async(void* shared, const void* global, std::size_t bytes, bool valid) {
  const void* caller = __builtin_return_address(0);
  if (reinterpret_cast<std::uintptr_t>(shared) % bytes != 0 || (valid && reinterpret_cast<std::uintptr_t>(global) % bytes != 0)) {
    fail("misaligned asynchronous copy of " + std::to_string(bytes) + " bytes from " + describe_address(global) + " to " +
         describe_address(shared) + ", at " + describe_caller(caller));
  }
  if (!inside_shared(shared, bytes)) {
    fail("asynchronous copy of " + std::to_string(bytes) + " bytes to " + describe_address(shared) +
         ", which is not shared memory of this kernel, at " + describe_caller(caller));
  }
  if (valid) {
    watch_access(global, bytes, AccessKind::read, caller);
    // Touched here so that the sanitizer build names this line.
    const auto* source = static_cast<const volatile unsigned char*>(global);
    (void)source[0];
    (void)source[bytes - 1];
  }
  watch_access(shared, bytes, AccessKind::copy_start, caller);
  std::memset(shared, poison, bytes);
  ThreadCopies& mine = copies[block_state.thread];
  mine.pending.push_back({shared, global, bytes, valid, mine.committed, caller});
}

void copy_async_commit() { ++copies[block_state.thread].committed; }

void copy_async_wait(unsigned pending_groups) {
  ThreadCopies& mine = copies[block_state.thread];
  std::size_t landed = 0;
  while (landed < mine.pending.size() && mine.pending[landed].group + pending_groups < mine.committed) {
    const PendingCopy& copy = mine.pending[landed++];
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
      std::memset(copy.shared, 0, copy.bytes);
    }
    watch_access(copy.shared, copy.bytes, AccessKind::copy_landing, copy.return_address);
  }
  mine.pending.erase(mine.pending.begin(), mine.pending.begin() + static_cast<std::ptrdiff_t>(landed));
}

void* device_allocate(const std::string& name, std::size_t bytes, std::size_t offset_bytes, bool writable) {
#if defined(__SANITIZE_ADDRESS__)
  void* allocation = nullptr;
  if (posix_memalign(&allocation, 256, offset_bytes + bytes) != 0) throw std::bad_alloc();
  __asan_poison_memory_region(allocation, offset_bytes);
  unsigned char* memory = static_cast<unsigned char*>(allocation) + offset_bytes;
#else
  void* allocation = nullptr;
  // A far stride past the end should not reach the next buffer, so the gap grows with the buffer.
  const std::size_t begin = round_up(shared_region_bytes + device_used + std::max(device_gap, bytes), 256);
  if (begin + offset_bytes + bytes + device_gap > region_bytes) {
    throw std::runtime_error("emulator: buffer '" + name + "' of " + std::to_string(bytes) +
                             " bytes does not fit; the emulated device has 256 MiB, gaps included; use a smaller problem");
  }
  unsigned char* memory = region() + begin + offset_bytes;
  device_used = begin + offset_bytes + bytes - shared_region_bytes;
#endif
  buffers[memory] = {name, bytes, allocation};
  watch_set_alive(memory, bytes, writable);
  return memory;
}

void device_free(void* pointer) {
  const auto found = buffers.find(static_cast<unsigned char*>(pointer));
  if (found == buffers.end()) return;
  watch_set_dead(pointer, found->second.bytes);
#if defined(__SANITIZE_ADDRESS__)
  const std::size_t offset = static_cast<unsigned char*>(pointer) - static_cast<unsigned char*>(found->second.allocation);
  __asan_unpoison_memory_region(found->second.allocation, offset);
  std::free(found->second.allocation);
#endif
  buffers.erase(found);
  if (buffers.empty()) device_used = 0;
}

std::string describe_address(const void* pointer) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  const auto place = [&](const std::string& name, const unsigned char* begin, std::size_t bytes) {
    if (address < begin) return std::to_string(begin - address) + " bytes before " + name;
    const auto offset = static_cast<std::size_t>(address - begin);
    if (offset < bytes) return name + " + " + std::to_string(offset) + " bytes";
    return std::to_string(offset - bytes) + " bytes past the end of " + name + " (" + std::to_string(bytes) + " bytes)";
  };
  // The owner is the object that holds the address, else the nearest one below it, else the first one above.
  if (address >= region() && address < region() + shared_region_bytes && !shared_variables.empty()) {
    const SharedVariable* owner = &shared_variables.front();
    for (const SharedVariable& variable : shared_variables) {
      if (variable.bytes > 0 && address >= region() + variable.offset) owner = &variable;
    }
    return place("shared '" + std::string(owner->name) + "'", region() + owner->offset, owner->bytes);
  }
  if (buffers.empty()) return "an unknown address";
  auto next = buffers.upper_bound(address);
  if (next != buffers.begin()) --next;
  return place("buffer '" + next->second.name + "'", next->first, next->second.bytes);
}

std::string describe_caller(const void* return_address) {
  Dl_info info{};
  if (dladdr(return_address, &info) == 0 || info.dli_fname == nullptr) return "an unknown line";
  const auto offset = static_cast<const char*>(return_address) - static_cast<const char*>(info.dli_fbase) - 1;
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#tx 2>/dev/null", info.dli_fname, offset);
  std::string best = "an unknown line";
  if (FILE* pipe = popen(command, "r")) {
    char line[2048];
    // Innermost first: skip the emulator's own inlined helpers.
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      std::string text(line);
      text.erase(std::find_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == ' '; }), text.end());
      if (text.empty() || text[0] == '?') continue;
      const bool helper = text.find("emulator/device") != std::string::npos || text.find("emulator/warp") != std::string::npos;
      best = text;
      if (!helper) break;
    }
    pclose(pipe);
  }
  const std::size_t root = best.rfind("csrc/");
  return root == std::string::npos ? best : best.substr(root);
}

}  // namespace pk::emulator
