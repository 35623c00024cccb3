// SPDX-License-Identifier: MIT
// Ends a block that never ends by itself. Kernels are compiled with -fsanitize-coverage=trace-pc, which calls a function in every
// basic block; watchdog.cpp supplies it and looks at the clock now and then.
#pragma once

namespace pk::emulator {

inline constexpr double default_block_seconds = 30.0;

// Processor time a block may take: neither a busy nor a paused machine makes a healthy kernel fail.
void watchdog_configure(double seconds);
void watchdog_block_started();

}  // namespace pk::emulator
