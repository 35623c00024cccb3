// SPDX-License-Identifier: MIT
#include "emulator/atomics.h"

#include <algorithm>

#include "emulator/memory.h"
#include "emulator/watch.h"

namespace {

using Wide = unsigned long long;

template <typename T, typename Function>
[[gnu::always_inline]] inline T update(T* address, Function function) {
  pk::emulator::check_vector_access(address, sizeof(T), "atomic operation");
  pk::emulator::watch_access(address, sizeof(T), pk::emulator::AccessKind::atomic, __builtin_return_address(0));
  const T previous = *address;
  *address = function(previous);
  return previous;
}

}  // namespace

#define PK_ATOMIC(name, type, expression)                                     \
  type name(type* address, type value) {                                      \
    return update(address, [value](type old) -> type { return expression; }); \
  }

PK_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
PK_ATOMIC(atomicAdd, unsigned, old + value)
PK_ATOMIC(atomicAdd, Wide, old + value)
PK_ATOMIC(atomicAdd, float, old + value)
PK_ATOMIC(atomicAdd, double, old + value)
PK_ATOMIC(atomicExch, int, (static_cast<void>(old), value))
PK_ATOMIC(atomicExch, unsigned, (static_cast<void>(old), value))
PK_ATOMIC(atomicExch, Wide, (static_cast<void>(old), value))
PK_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
PK_ATOMIC(atomicMax, int, std::max(old, value))
PK_ATOMIC(atomicMax, unsigned, std::max(old, value))
PK_ATOMIC(atomicMax, Wide, std::max(old, value))
PK_ATOMIC(atomicMin, int, std::min(old, value))
PK_ATOMIC(atomicMin, unsigned, std::min(old, value))
PK_ATOMIC(atomicMin, Wide, std::min(old, value))
PK_ATOMIC(atomicAnd, int, old& value)
PK_ATOMIC(atomicAnd, unsigned, old& value)
PK_ATOMIC(atomicAnd, Wide, old& value)
PK_ATOMIC(atomicOr, int, old | value)
PK_ATOMIC(atomicOr, unsigned, old | value)
PK_ATOMIC(atomicOr, Wide, old | value)
PK_ATOMIC(atomicXor, int, old ^ value)
PK_ATOMIC(atomicXor, unsigned, old ^ value)

int atomicCAS(int* address, int compare, int value) {
  return update(address, [=](int old) { return old == compare ? value : old; });
}
unsigned atomicCAS(unsigned* address, unsigned compare, unsigned value) {
  return update(address, [=](unsigned old) { return old == compare ? value : old; });
}
Wide atomicCAS(Wide* address, Wide compare, Wide value) {
  return update(address, [=](Wide old) { return old == compare ? value : old; });
}

void pk::emulator::fence() { watch_fence(); }
