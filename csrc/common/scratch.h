// SPDX-License-Identifier: MIT
// Memory of one call of a CPU kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace {

// Uninitialised scratch, aligned for full-width vectors.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count) : data(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

}  // namespace
