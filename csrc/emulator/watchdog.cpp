// SPDX-License-Identifier: MIT
#include "emulator/watchdog.h"

#include <cstdio>
#include <ctime>
#include <stdexcept>
#include <string>

#include "emulator/memory.h"
#include "emulator/runtime.h"

namespace pk::emulator {
namespace {

constexpr unsigned calls_between_looks = 1u << 16;  // about a millisecond

double limit = default_block_seconds;
double started = -1.0;  // processor time at the block's first look at the clock; negative: not looked yet
unsigned calls_left = calls_between_looks;

double processor_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

std::string in_seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds);
  return text;
}

[[gnu::noinline]] void look_at_the_clock(const void* caller) {
  calls_left = calls_between_looks;
  if (!block_state.running) return;  // host code beside the kernel
  const double now = processor_seconds();
  if (started < 0) started = now;
  if (now - started <= limit) return;
  fail("does not end: the block has computed for " + in_seconds(limit) + " and this thread is at " + describe_caller(caller) +
       ". Threads are not pre-empted and blocks run one after another, so polling for what another thread or block will write never ends; "
       "use a barrier, or let the last block to arrive do the rest. A slow kernel needs a smaller problem or configure(block_seconds=...)" +
       describe_threads());
}

}  // namespace

void watchdog_configure(double seconds) {
  if (!(seconds > 0)) throw std::invalid_argument("configure: block_seconds must be positive; got " + std::to_string(seconds));
  limit = seconds;
}

void watchdog_block_started() {
  started = -1.0;
  calls_left = calls_between_looks;
}

}  // namespace pk::emulator

extern "C" void __sanitizer_cov_trace_pc() {
  if (--::pk::emulator::calls_left == 0) ::pk::emulator::look_at_the_clock(__builtin_return_address(0));
}
