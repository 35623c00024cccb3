// SPDX-License-Identifier: MIT
// Fibers: the threads of one block, switched by hand on one host thread.
#pragma once

#include <cstddef>

namespace pk::emulator {

struct Fiber {
  void* stack_pointer = nullptr;  // saved registers lie on the fiber's own stack
  void* stack_bottom = nullptr;   // lowest address; nullptr for the host's own stack
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's bookkeeping
  void* context = nullptr;     // used where no hand-written switch exists
};

inline constexpr std::size_t maximum_fibers = 1024;

// Makes fiber `index` ready to run `entry`, which must never return, from a clean stack.
void fiber_prepare(Fiber& fiber, std::size_t index, void (*entry)());

// Leaves `from` and continues `to`. With `last` the fiber `from` is finished and never continues.
void fiber_switch(Fiber& from, Fiber& to, bool last);

// Tells `fiber` that it stands for the calling host thread.
void fiber_adopt_host(Fiber& fiber);

// To be called after fibers were left in the middle of their work.
void fibers_abandoned();

// To be called first in a fiber's entry function.
void fiber_entered();

}  // namespace pk::emulator
