// SPDX-License-Identifier: MIT
// One block of memory handed out piece by piece.
#pragma once

#include <cstdint>

namespace {

// Consecutive pieces of a block, each on a boundary of so many bytes as the block itself. Without a block it only counts.
template <int64_t BOUNDARY>
class PiecesOn {
 public:
  explicit PiecesOn(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* const piece = block_ ? block_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + BOUNDARY - 1) / BOUNDARY * BOUNDARY;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }
  bool counts_only() const { return !block_; }

 private:
  char* block_;
  int64_t bytes_ = 0;
};

using Arena = PiecesOn<64>;    // on the CPU: lines of its cache
using Pieces = PiecesOn<256>;  // on a GPU: as its allocator aligns

}  // namespace
