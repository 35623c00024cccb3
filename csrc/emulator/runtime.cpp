// SPDX-License-Identifier: MIT
// The scheduler: blocks one after another, the threads of a block as fibers, both in an order drawn from the seed.
// Seed 0 keeps the natural order.
#include "emulator/runtime.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/memory.h"
#include "emulator/watch.h"
#include "emulator/watchdog.h"

namespace pk::emulator {

BlockState block_state;

namespace {

constexpr unsigned warp_lanes = 32;
constexpr std::array<Architecture, 4> architectures{{
    {"sm_80", 108, 163 * 1024},
    {"sm_89", 142, 99 * 1024},
    {"sm_90", 132, 227 * 1024},
    {"sm_100", 148, 227 * 1024},
}};

enum class State : std::uint8_t { ready, barrier, collective, finished };

struct Thread {
  Fiber fiber;
  uint3 index{};
  State state = State::ready;
  const char* operation = nullptr;  // the barrier or collective waited at, or the last one passed
  const char* file = nullptr;
  unsigned line = 0;
  unsigned mask = 0;
  void* operand = nullptr;
  Combine combine = nullptr;
};

struct Launch {
  std::string kernel;
  Invoke invoke = nullptr;
  const void* context = nullptr;
  dim3 grid, block;
  uint3 block_index{};
  Fiber host;
  std::array<Thread, maximum_fibers> threads;
  // Ready threads, as a ring: every thread is in it at most once.
  std::array<std::uint16_t, 2 * maximum_fibers> ring{};
  unsigned head = 0, tail = 0;
  unsigned finished = 0, at_barrier = 0;
  int predicate_sum = 0, predicate_result = 0;
  bool failed = false;
  std::string report;
};

Launch state;
const Architecture* current_architecture = &architectures[0];
std::uint64_t current_seed = 0;
std::uint64_t generator = 0;
std::size_t current_element_offset = 0;

constexpr unsigned ring_mask = 2 * maximum_fibers - 1;
void push_back(unsigned thread) { state.ring[state.tail++ & ring_mask] = static_cast<std::uint16_t>(thread); }
void push_front(unsigned thread) { state.ring[--state.head & ring_mask] = static_cast<std::uint16_t>(thread); }
bool ring_empty() { return state.head == state.tail; }

Thread& current() { return state.threads[block_state.thread]; }

// Leaves the running thread for the next ready one, or for the host when none is left.
void run_next(bool last) {
  Thread& from = current();
  if (ring_empty()) {
    fiber_switch(from.fiber, state.host, last);
  } else {
    const unsigned next = state.ring[state.head++ & ring_mask];
    if (next == block_state.thread) return;
    block_state.thread = next;
    fiber_switch(from.fiber, state.threads[next].fiber, last);
  }
}

// All threads of the block become ready. Three styles: warp after warp with mixed lanes, all mixed, last thread first.
void release_all() {
  const unsigned count = block_state.threads;
  state.head = state.tail = 0;
  if (current_seed == 0) {
    for (unsigned i = 0; i < count; ++i) push_back(i);
    return;
  }
  static std::array<std::uint16_t, maximum_fibers> order;
  const std::uint64_t style = draw() % 4;
  if (style == 3) {
    for (unsigned i = count; i-- > 0;) push_back(i);
    return;
  }
  if (style == 2) {
    std::iota(order.begin(), order.begin() + count, std::uint16_t{0});
    for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
    for (unsigned i = 0; i < count; ++i) push_back(order[i]);
    return;
  }
  const unsigned warps = (count + warp_lanes - 1) / warp_lanes;
  std::iota(order.begin(), order.begin() + warps, std::uint16_t{0});
  for (unsigned i = warps; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  for (unsigned i = 0; i < warps; ++i) {
    const std::uint64_t bits = draw();
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
      const unsigned thread = order[i] * warp_lanes + ((lane * (2 * (bits >> 8) + 1) + bits) % warp_lanes);
      if (thread < count) push_back(thread);
    }
  }
}

// Runs the collective that `lane`'s warp waits for, if everybody it needs has come.
bool try_collective(unsigned warp, unsigned lane) {
  const unsigned first = warp * warp_lanes;
  const unsigned lanes = std::min(warp_lanes, block_state.threads - first);
  const Thread& caller = state.threads[first + lane];
  unsigned participants = 0;
  std::array<void*, warp_lanes> operands{};
  for (unsigned i = 0; i < lanes; ++i) {
    const Thread& other = state.threads[first + i];
    if (((caller.mask >> i) & 1u) == 0 || other.state == State::finished) continue;
    if (other.state != State::collective || other.mask != caller.mask || other.combine != caller.combine) return false;
    participants |= 1u << i;
    operands[i] = other.operand;
  }
  caller.combine(participants, operands.data());
  if (caller.combine == combine_nothing) watch_warp_synchronised(warp, participants, lanes);
  const std::uint64_t bits = current_seed == 0 ? 0 : draw();
  const bool at_front = current_seed == 0 || ((bits >> 40) & 1) != 0;
  const unsigned multiplier = 2 * static_cast<unsigned>(bits >> 8) + 1;
  for (unsigned i = 0; i < warp_lanes; ++i) {
    const unsigned step = current_seed == 0 && at_front ? warp_lanes - 1 - i : i;  // pushing to the front reverses
    const unsigned index = (step * multiplier + static_cast<unsigned>(bits)) % warp_lanes;
    if (((participants >> index) & 1u) == 0) continue;
    state.threads[first + index].state = State::ready;
    at_front ? push_front(first + index) : push_back(first + index);
  }
  return true;
}

void thread_main() {
  fiber_entered();
  state.invoke(state.context);
  Thread& self = current();
  self.state = State::finished;
  ++state.finished;
  memory_thread_finished(block_state.thread);
  // Lanes that waited only for this one may go on.
  const unsigned warp = block_state.thread / warp_lanes;
  const unsigned first = warp * warp_lanes;
  for (unsigned i = 0; i < warp_lanes && first + i < block_state.threads; ++i) {
    if (state.threads[first + i].state == State::collective) try_collective(warp, i);
  }
  run_next(true);
  __builtin_unreachable();
}

// Runs until no thread is ready; the host decides what that means.
void run_ready() {
  while (!ring_empty() && !state.failed) {
    block_state.thread = state.ring[state.head++ & ring_mask];
    block_state.running = true;
    fiber_switch(state.host, current().fiber, false);
    block_state.running = false;
  }
}

void report_outside_fiber(const std::string& message) {
  state.failed = true;
  state.report = "kernel " + state.kernel + ", block (" + std::to_string(state.block_index.x) + ", " + std::to_string(state.block_index.y) +
                 ", " + std::to_string(state.block_index.z) + "), seed " + std::to_string(current_seed) + ": " + message;
}

// True when all waiting threads wait in the same barrier and nobody has left.
bool barrier_complete() {
  if (state.finished != 0 || state.at_barrier != block_state.threads) return false;
  const Thread& first = state.threads[0];
  return std::all_of(state.threads.begin(), state.threads.begin() + block_state.threads, [&](const Thread& thread) {
    return thread.line == first.line && std::strcmp(thread.operation, first.operation) == 0 && std::strcmp(thread.file, first.file) == 0;
  });
}

void run_block() {
  memory_block_start();
  block_state.block_first_epoch = ++block_state.epoch;
  watch_block_started();
  watchdog_block_started();
  state.finished = state.at_barrier = 0;
  state.predicate_sum = 0;
  for (unsigned i = 0; i < block_state.threads; ++i) {
    Thread& thread = state.threads[i];
    fiber_prepare(thread.fiber, i, thread_main);
    thread.index = {i % state.block.x, i / state.block.x % state.block.y, i / (state.block.x * state.block.y)};
    thread.state = State::ready;
    thread.file = nullptr;
  }
  release_all();
  while (true) {
    run_ready();
    if (state.failed || state.finished == block_state.threads) return;
    if (!barrier_complete()) {
      report_outside_fiber("deadlock: the threads of the block do not meet in one barrier" + describe_threads());
      return;
    }
    ++block_state.epoch;
    state.predicate_result = std::exchange(state.predicate_sum, 0);
    state.at_barrier = 0;
    for (unsigned i = 0; i < block_state.threads; ++i) state.threads[i].state = State::ready;
    release_all();
  }
}

}  // namespace

std::uint64_t draw() {
  generator ^= generator << 13;
  generator ^= generator >> 7;
  generator ^= generator << 17;
  return generator >> 3;
}

uint3 thread_index() noexcept { return current().index; }
uint3 block_index() noexcept { return state.block_index; }
uint3 block_extent() noexcept { return {state.block.x, state.block.y, state.block.z}; }
uint3 grid_extent() noexcept { return {state.grid.x, state.grid.y, state.grid.z}; }
unsigned lane_index() noexcept { return block_state.thread % warp_lanes; }
const Architecture& architecture() { return *current_architecture; }
std::size_t element_offset() { return current_element_offset; }

int block_barrier(bool predicate, const char* name, const Location& location) {
  Thread& self = current();
  self.state = State::barrier;
  self.operation = name;
  self.file = location.file_name();
  self.line = location.line();
  state.predicate_sum += predicate ? 1 : 0;
  ++state.at_barrier;
  run_next(false);
  return state.predicate_result;
}

void combine_nothing(unsigned, void* const*) {}

void warp_collective(unsigned mask, void* operand, Combine combine, const char* name, const Location& location) {
  Thread& self = current();
  self.operation = name;
  self.file = location.file_name();
  self.line = location.line();
  if (((mask >> lane_index()) & 1u) == 0) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    fail(std::string(name) + " at " + describe_location(self.file, self.line) + ": mask " + text + " does not name the calling lane " +
         std::to_string(lane_index()));
  }
  self.state = State::collective;
  self.mask = mask;
  self.operand = operand;
  self.combine = combine;
  try_collective(block_state.thread / warp_lanes, lane_index());
  run_next(false);
}

void fail(const std::string& message) {
  if (!block_state.running) throw std::runtime_error(message);
  report_outside_fiber("thread " + describe_thread(block_state.thread) + ": " + message);
  fiber_switch(current().fiber, state.host, false);
  __builtin_unreachable();
}

std::string describe_thread(unsigned thread) {
  const uint3 index = state.threads[thread].index;
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string describe_location(const char* file, unsigned line) { return std::string(file) + ":" + std::to_string(line); }

std::string describe_threads() {
  struct Group {
    unsigned count = 0;
    unsigned first = 0;
  };
  std::map<std::string, Group> groups;
  for (unsigned i = 0; i < block_state.threads; ++i) {
    if (block_state.running && i == block_state.thread) continue;
    const Thread& thread = state.threads[i];
    const std::string where =
        thread.file == nullptr ? "" : std::string(thread.operation) + " at " + describe_location(thread.file, thread.line);
    std::string what;
    if (thread.state == State::finished) {
      what = "returned" + (where.empty() ? " without reaching a barrier" : ", last seen in " + where);
    } else if (thread.state == State::ready) {
      what = where.empty() ? "have passed no barrier and are free to run" : "are free to run on after " + where;
    } else {
      what = "wait in " + where;
      if (thread.state == State::collective) {
        char mask[16];
        std::snprintf(mask, sizeof mask, "0x%08x", thread.mask);
        what += std::string(" with mask ") + mask;
      }
    }
    Group& group = groups[what];
    if (group.count++ == 0) group.first = i;
  }
  std::string text;
  for (const auto& [what, group] : groups) {
    text += "\n  " + std::to_string(group.count) + " threads " + what + " (first: thread " + describe_thread(group.first) + ")";
  }
  return text;
}

int launch(const char* kernel, Invoke invoke, const void* context, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes) {
  // A template instance comes as "(name<arguments>)".
  state.kernel = kernel;
  std::erase_if(state.kernel, [](char c) { return c == '(' || c == ')'; });
  const auto refuse = [&](int error, const std::string& message) {
    state.report = "kernel " + state.kernel + ": " + message;
    return error;
  };
  const std::size_t threads = static_cast<std::size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > maximum_fibers || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return refuse(error_invalid_configuration, "a block of (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                                                   std::to_string(block.z) + ") threads; expected 1 to 1024 threads, at most 64 along z");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse(error_invalid_configuration, "a grid of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                                                   std::to_string(grid.z) +
                                                   ") blocks; expected 1 to 2147483647 along x, 1 to 65535 along y and z");
  }
  if (dynamic_shared_bytes > architecture().shared_bytes_per_block) {
    return refuse(error_invalid_value, std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory; " + architecture().name +
                                           " has " + std::to_string(architecture().shared_bytes_per_block) + " per block");
  }
  state.invoke = invoke;
  state.context = context;
  state.grid = grid;
  state.block = block;
  state.failed = false;
  state.report.clear();
  block_state.threads = static_cast<unsigned>(threads);
  block_state.launch_first_epoch = block_state.epoch + 1;
  fiber_adopt_host(state.host);
  watch_launch_started();
  memory_launch_start(dynamic_shared_bytes);

  const std::size_t blocks = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
  std::vector<std::size_t> order(blocks);
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (current_seed != 0) {
    for (std::size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  }
  for (const std::size_t i : order) {
    state.block_index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
    if (state.failed) {
      fibers_abandoned();
      memory_launch_abandoned();
      return error_launch_failure;
    }
  }
  return 0;
}

void configure(std::uint64_t seed, const std::string& architecture_name, std::size_t offset, double block_seconds) {
  const auto found = std::find_if(architectures.begin(), architectures.end(),
                                  [&](const Architecture& candidate) { return architecture_name == candidate.name; });
  if (found == architectures.end()) {
    std::string known;
    for (const Architecture& candidate : architectures) known += std::string(known.empty() ? "" : ", ") + candidate.name;
    throw std::invalid_argument("configure: architecture must be one of " + known + "; got " + architecture_name);
  }
  watchdog_configure(block_seconds);
  current_architecture = &*found;
  current_seed = seed;
  generator = seed * 0x9e3779b97f4a7c15ull + 0x1234567ull;
  if (generator == 0) generator = 1;
  current_element_offset = offset;
}

std::string take_report() { return std::exchange(state.report, std::string()); }

}  // namespace pk::emulator
