// SPDX-License-Identifier: MIT
#include "emulator/fiber.h"

// A switch written by hand saves six registers; ucontext, for other processors, also asks the kernel for the signal mask.
#if defined(__x86_64__) && !defined(PK_EMULATOR_UCONTEXT)
#define PK_HAND_WRITTEN_SWITCH
#endif

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(PK_HAND_WRITTEN_SWITCH)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pk::emulator {
namespace {

constexpr std::size_t page_bytes = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t stack_bytes = 64 * page_bytes;
#else
constexpr std::size_t stack_bytes = 32 * page_bytes;
#endif
// The lowest page of every stack is never touched by a healthy kernel; it is kept unreadable so that an overflow stops the process.
constexpr std::size_t slot_bytes = stack_bytes + page_bytes;

char* stack_slot(std::size_t index) {
  static char* pool = [] {
    void* memory = mmap(nullptr, slot_bytes * maximum_fibers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (std::size_t i = 0; i < maximum_fibers; ++i) {
      mprotect(static_cast<char*>(memory) + i * slot_bytes, page_bytes, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return pool + index * slot_bytes + page_bytes;
}

}  // namespace

#if defined(PK_HAND_WRITTEN_SWITCH)

extern "C" void pk_emulator_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.hidden pk_emulator_switch
.globl pk_emulator_switch
.type pk_emulator_switch, @function
pk_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pk_emulator_switch, .-pk_emulator_switch
)");

#endif

void fiber_prepare(Fiber& fiber, std::size_t index, void (*entry)()) {
  char* bottom = stack_slot(index);
  fiber.stack_bottom = bottom;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
  // Stacks start at different cache lines: at equal distances of whole pages all threads would fight for one cache set.
  const std::size_t colour = (index % 61) * 64;
#if defined(PK_HAND_WRITTEN_SWITCH)
  auto** top = reinterpret_cast<void**>(bottom + stack_bytes - 64 - colour);
  *--top = nullptr;  // the return address of `entry`; also puts the stack where a called function expects it
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  if (fiber.context == nullptr) fiber.context = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = stack_bytes - colour;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

void fiber_adopt_host(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &fiber.stack_bottom, &fiber.stack_bytes);
  pthread_attr_destroy(&attributes);
#endif
  (void)fiber;
}

void fibers_abandoned() {
#if defined(__SANITIZE_ADDRESS__)
  for (std::size_t i = 0; i < maximum_fibers; ++i) __asan_unpoison_memory_region(stack_slot(i), stack_bytes);
#endif
}

void fiber_entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void fiber_switch(Fiber& from, Fiber& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
  (void)last;
#if defined(PK_HAND_WRITTEN_SWITCH)
  pk_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  if (from.context == nullptr) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace pk::emulator
