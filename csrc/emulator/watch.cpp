// SPDX-License-Identifier: MIT
// The memory watch: bounds, reads before writes, races. Two accesses of one word by different threads, at least one of them a
// plain write, are a race unless something orders them:
//   same block:       a __syncthreads between them, or, within a warp, a chain of __syncwarp (shuffles and votes order nothing);
//   different blocks: the earlier block wrote, called __threadfence, and then did an atomic operation (by the same thread, or
//                     with a __syncthreads in between); the later block did an atomic operation first.
#include "emulator/watch.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <new>
#include <string>
#include <vector>

#include "emulator/memory.h"
#include "emulator/runtime.h"

namespace pk::emulator {
namespace {

struct Access {
  std::uint32_t epoch = 0;   // 0: none
  std::uint32_t time = 0;    // the warp's own clock
  std::uint32_t caller = 0;  // return address, relative to this library
  std::uint16_t thread = 0;
  AccessKind kind = AccessKind::read;
};
struct Cell {
  Access write;
  std::array<Access, 2> reads;  // where possible of two different warps, so that a later writer always meets a foreign one
};
struct WarpClock {
  std::uint32_t now = 1;
  std::uint32_t all_joined = 0;                            // everything before this time is known to every lane
  std::array<std::array<std::uint32_t, 32>, 32> joined{};  // [lane][other]: what `lane` knows of `other`
};
struct BlockRecord {
  std::uint32_t first_epoch = 0;
  std::uint32_t fenced_epoch = 0;         // of its last __threadfence
  std::uint32_t released_epoch = 0;       // what was fenced at its last atomic operation on device memory
  std::uint32_t published_epoch = 0;      // of that operation
  std::vector<std::uint16_t> publishers;  // the threads that did one in that epoch
};

template <typename T>
T* reserve(std::size_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(memory);  // zero pages are valid objects of every type used here
}

// One cell per 4-byte word; a word that was touched in smaller pieces is split into one cell per byte for the rest of the launch.
struct Tables {
  unsigned char* base = region();
  std::uint8_t* alive = reserve<std::uint8_t>(region_bytes);  // 0: nobody's, 1: writable, 2: read-only
  Cell* words = reserve<Cell>(region_bytes / 4);
  Cell* bytes = reserve<Cell>(region_bytes);
  std::uint32_t* split = reserve<std::uint32_t>(region_bytes / 4);  // launch_first_epoch of the launch that split the word
  const char* library = nullptr;
};

Tables& tables() {
  static Tables instance;
  return instance;
}

Tables* ready_tables = nullptr;
std::array<WarpClock, 32> clocks;
std::vector<BlockRecord> blocks;
bool acquired = false;  // the running block has done an atomic operation on device memory

void publish_and_acquire() {
  acquired = true;
  BlockRecord& block = blocks.back();
  if (block.published_epoch != block_state.epoch) block.publishers.clear();
  // A thread runs on until it has to wait, so the atomics of a loop follow each other.
  const auto thread = static_cast<std::uint16_t>(block_state.thread);
  if (block.publishers.empty() || block.publishers.back() != thread) block.publishers.push_back(thread);
  block.published_epoch = block_state.epoch;
  block.released_epoch = block.fenced_epoch;
}

bool known_in_warp(const Access& previous) {
  const unsigned thread = block_state.thread;
  const WarpClock& clock = clocks[thread / 32];
  return previous.time < std::max(clock.all_joined, clock.joined[thread % 32][previous.thread % 32]);
}

bool ordered_before_now(const Access& previous, bool shared) {
  // Shared memory is a new one for every block.
  if (previous.epoch < (shared ? block_state.block_first_epoch : block_state.launch_first_epoch)) return true;
  if (previous.epoch < block_state.block_first_epoch) {
    if (previous.kind == AccessKind::atomic) return acquired;  // the atomics of two blocks meet in one order
    const auto next = std::upper_bound(blocks.begin(), blocks.end(), previous.epoch,
                                       [](std::uint32_t epoch, const BlockRecord& block) { return epoch < block.first_epoch; });
    const BlockRecord& block = *std::prev(next);
    if (!acquired || previous.epoch > block.released_epoch) return false;
    return previous.epoch < block.published_epoch ||
           std::find(block.publishers.begin(), block.publishers.end(), previous.thread) != block.publishers.end();
  }
  if (previous.epoch < block_state.epoch || previous.thread == block_state.thread) return true;
  return previous.thread / 32 == block_state.thread / 32 && known_in_warp(previous);
}

std::string describe(const Access& access) { return describe_caller(ready_tables->library + access.caller); }

std::string describe_actor(const Access& access) {
  return access.epoch < block_state.block_first_epoch ? "a thread of another block" : "thread " + describe_thread(access.thread);
}

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::read: return "read";
    case AccessKind::atomic: return "updated atomically";
    case AccessKind::copy_start:
    case AccessKind::copy_landing: return "copied to";
    default: return "written";
  }
}

[[noreturn]] void report_race(std::size_t offset, const Access& now, const Access& previous) {
  fail("race on " + describe_address(ready_tables->base + offset) + ": " + verb(now.kind) + " at " + describe(now) + ", " +
       verb(previous.kind) + " by " + describe_actor(previous) + " at " + describe(previous) + ", and nothing orders the two");
}

void check_cell(Cell& cell, std::size_t offset, const Access& now, bool shared) {
  const Access& write = cell.write;
  if (shared) {
    const bool fresh = write.epoch >= block_state.block_first_epoch;
    if (fresh && write.kind == AccessKind::copy_start && now.kind != AccessKind::copy_landing) {
      fail(describe_address(ready_tables->base + offset) + " is " + verb(now.kind) + " at " + describe(now) +
           " while an asynchronous copy to it, started by " + describe_actor(write) + " at " + describe(write) +
           ", has not been waited for");
    }
    if (!fresh && (now.kind == AccessKind::read || now.kind == AccessKind::atomic)) {
      fail(describe_address(ready_tables->base + offset) + " is " + verb(now.kind) + " at " + describe(now) +
           " before anything was written there");
    }
  }
  const bool both_atomic = now.kind == AccessKind::atomic && write.kind == AccessKind::atomic;
  if (now.kind != AccessKind::copy_landing && !both_atomic && !ordered_before_now(write, shared)) report_race(offset, now, write);
  if (now.kind == AccessKind::read) {
    std::array<Access, 2>& reads = cell.reads;
    const bool foreign = reads[0].epoch < block_state.block_first_epoch || reads[0].thread / 32 != now.thread / 32;
    if (reads[0].epoch != 0 && reads[0].thread != now.thread && (foreign || reads[1].epoch < block_state.launch_first_epoch)) {
      reads[1] = reads[0];
    }
    reads[0] = now;
    return;
  }
  for (const Access& read : cell.reads) {
    if (!ordered_before_now(read, shared)) report_race(offset, now, read);
  }
  cell.write = now;
}

void check_word(std::size_t word, std::size_t first_byte, std::size_t end_byte, const Access& now, bool shared) {
  Tables& all = *ready_tables;
  const bool whole = end_byte - first_byte == 4;
  const std::uint32_t mark = shared ? block_state.block_first_epoch : block_state.launch_first_epoch;
  const bool is_split = all.split[word] == mark;
  if (whole && !is_split) {
    check_cell(all.words[word], 4 * word, now, shared);
    return;
  }
  if (!is_split) {
    std::fill_n(all.bytes + 4 * word, 4, all.words[word]);
    all.split[word] = mark;
  }
  for (std::size_t byte = first_byte; byte < end_byte; ++byte) check_cell(all.bytes[4 * word + byte], 4 * word + byte, now, shared);
}

}  // namespace

void watch_access(const void* address, std::size_t bytes, AccessKind kind, const void* return_address) {
  if (!block_state.running || bytes == 0) return;
  Tables& all = *ready_tables;
  const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(address) - all.base);
  if (offset >= region_bytes) return;
  const bool writes = kind != AccessKind::read;
  const std::uint8_t first = all.alive[offset];
  if (first == 0 || offset + bytes > region_bytes || all.alive[offset + bytes - 1] == 0) {
    fail("out of bounds: " + std::string(writes ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " +
         describe_address(address) + ", at " + describe_caller(return_address));
  }
  if (writes && first == 2) {
    fail("write to the read-only " + describe_address(address) + ", at " + describe_caller(return_address));
  }
  const std::size_t natural = std::min<std::size_t>(std::bit_floor(bytes), 8);
  if (bytes <= 16 && offset % natural != 0) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes at " + describe_address(address) + ", at " +
         describe_caller(return_address));
  }
  const bool shared = offset < shared_region_bytes;
  if (kind == AccessKind::atomic && !shared) publish_and_acquire();
  Access now;
  now.epoch = block_state.epoch;
  now.time = clocks[block_state.thread / 32].now;
  now.caller = static_cast<std::uint32_t>(static_cast<const char*>(return_address) - all.library);
  now.thread = static_cast<std::uint16_t>(block_state.thread);
  now.kind = kind;
  for (std::size_t position = offset; position < offset + bytes;) {
    const std::size_t word = position / 4;
    const std::size_t end = std::min(4 * word + 4, offset + bytes);
    check_word(word, position - 4 * word, end - 4 * word, now, shared);
    position = end;
  }
}

void watch_launch_started() {
  if (ready_tables == nullptr) {
    ready_tables = &tables();
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&watch_launch_started), &info);
    ready_tables->library = static_cast<const char*>(info.dli_fbase);
  }
  blocks.clear();
}

void watch_block_started() {
  blocks.emplace_back().first_epoch = block_state.block_first_epoch;
  acquired = false;
  for (unsigned warp = 0; warp < (block_state.threads + 31) / 32; ++warp) clocks[warp] = WarpClock{};
}

void watch_fence() {
  if (block_state.running) blocks.back().fenced_epoch = block_state.epoch;
}

void watch_warp_synchronised(unsigned warp, unsigned participants, unsigned lanes) {
  WarpClock& clock = clocks[warp];
  const std::uint32_t time = ++clock.now;
  const unsigned everybody = lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (participants == everybody) {
    clock.all_joined = time;
    return;
  }
  std::array<std::uint32_t, 32> together{};
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (((participants >> lane) & 1u) == 0) continue;
    for (unsigned other = 0; other < lanes; ++other) together[other] = std::max(together[other], clock.joined[lane][other]);
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if ((participants >> lane) & 1u) together[lane] = time;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if ((participants >> lane) & 1u) clock.joined[lane] = together;
  }
}

void watch_set_alive(const void* address, std::size_t bytes, bool writable) {
  Tables& all = tables();
  std::fill_n(all.alive + (static_cast<const unsigned char*>(address) - all.base), bytes, std::uint8_t(writable ? 1 : 2));
}

void watch_set_dead(const void* address, std::size_t bytes) {
  Tables& all = tables();
  std::fill_n(all.alive + (static_cast<const unsigned char*>(address) - all.base), bytes, std::uint8_t{0});
}

}  // namespace pk::emulator

#define PK_HOOK(name, bytes, kind)                                                                               \
  extern "C" void name(void* address) {                                                                          \
    ::pk::emulator::watch_access(address, bytes, ::pk::emulator::AccessKind::kind, __builtin_return_address(0)); \
  }
PK_HOOK(__tsan_read1, 1, read)
PK_HOOK(__tsan_read2, 2, read)
PK_HOOK(__tsan_read4, 4, read)
PK_HOOK(__tsan_read8, 8, read)
PK_HOOK(__tsan_read16, 16, read)
PK_HOOK(__tsan_write1, 1, write)
PK_HOOK(__tsan_write2, 2, write)
PK_HOOK(__tsan_write4, 4, write)
PK_HOOK(__tsan_write8, 8, write)
PK_HOOK(__tsan_write16, 16, write)
extern "C" {
void __tsan_read_range(void* address, std::size_t bytes) {
  ::pk::emulator::watch_access(address, bytes, ::pk::emulator::AccessKind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
  ::pk::emulator::watch_access(address, bytes, ::pk::emulator::AccessKind::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
PK_HOOK(__tsan_unaligned_read2, 2, read)
PK_HOOK(__tsan_unaligned_read4, 4, read)
PK_HOOK(__tsan_unaligned_read8, 8, read)
PK_HOOK(__tsan_unaligned_read16, 16, read)
PK_HOOK(__tsan_unaligned_write2, 2, write)
PK_HOOK(__tsan_unaligned_write4, 4, write)
PK_HOOK(__tsan_unaligned_write8, 8, write)
PK_HOOK(__tsan_unaligned_write16, 16, write)
