// SPDX-License-Identifier: MIT
// Warp-wide CUDA functions under their CUDA names.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "emulator/runtime.h"

namespace pk::emulator {

enum class Shuffle { index, up, down, exclusive_or };
enum class Reduction { add, min_signed, max_signed, min_unsigned, max_unsigned, bit_and, bit_or, bit_xor };

std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t bits, int argument, int width, const Location& location);
struct Vote {
  unsigned ballot, participants;
};
Vote vote(unsigned mask, bool predicate, const char* name, const Location& location);
unsigned match_any(unsigned mask, std::uint64_t bits, const Location& location);
unsigned reduce(Reduction kind, unsigned mask, unsigned value, const Location& location);
void mma_tf32(float* d, const unsigned* a, const unsigned* b, const Location& location);
void mma_bf16(float* d, const unsigned* a, const unsigned* b, const Location& location);
void mma_f16(float* d, const unsigned* a, const unsigned* b, const Location& location);

template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "shuffles and matches move at most 64 bits");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace pk::emulator

#define PK_EMULATOR_HERE ::pk::emulator::Location location = ::pk::emulator::Location::current()

inline void __syncwarp(unsigned mask = 0xffffffffu, PK_EMULATOR_HERE) {
  ::pk::emulator::warp_collective(mask, nullptr, ::pk::emulator::combine_nothing, "__syncwarp", location);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PK_EMULATOR_HERE) {
  namespace e = ::pk::emulator;
  return e::from_bits<T>(e::shuffle(e::Shuffle::index, mask, e::to_bits(value), source, width, location));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PK_EMULATOR_HERE) {
  namespace e = ::pk::emulator;
  return e::from_bits<T>(e::shuffle(e::Shuffle::up, mask, e::to_bits(value), static_cast<int>(delta), width, location));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PK_EMULATOR_HERE) {
  namespace e = ::pk::emulator;
  return e::from_bits<T>(e::shuffle(e::Shuffle::down, mask, e::to_bits(value), static_cast<int>(delta), width, location));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, PK_EMULATOR_HERE) {
  namespace e = ::pk::emulator;
  return e::from_bits<T>(e::shuffle(e::Shuffle::exclusive_or, mask, e::to_bits(value), lane_mask, width, location));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PK_EMULATOR_HERE) {
  return ::pk::emulator::vote(mask, predicate != 0, "__ballot_sync", location).ballot;
}
inline int __any_sync(unsigned mask, int predicate, PK_EMULATOR_HERE) {
  return ::pk::emulator::vote(mask, predicate != 0, "__any_sync", location).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, PK_EMULATOR_HERE) {
  const ::pk::emulator::Vote result = ::pk::emulator::vote(mask, predicate != 0, "__all_sync", location);
  return result.ballot == result.participants;
}
// CUDA promises no more than the caller itself, so no more is given.
inline unsigned __activemask() { return 1u << ::pk::emulator::lane_index(); }

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, PK_EMULATOR_HERE) {
  return ::pk::emulator::match_any(mask, ::pk::emulator::to_bits(value), location);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::add, mask, value, location);
}
inline int __reduce_add_sync(unsigned mask, int value, PK_EMULATOR_HERE) {
  return static_cast<int>(::pk::emulator::reduce(::pk::emulator::Reduction::add, mask, static_cast<unsigned>(value), location));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::min_unsigned, mask, value, location);
}
inline int __reduce_min_sync(unsigned mask, int value, PK_EMULATOR_HERE) {
  return static_cast<int>(::pk::emulator::reduce(::pk::emulator::Reduction::min_signed, mask, static_cast<unsigned>(value), location));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::max_unsigned, mask, value, location);
}
inline int __reduce_max_sync(unsigned mask, int value, PK_EMULATOR_HERE) {
  return static_cast<int>(::pk::emulator::reduce(::pk::emulator::Reduction::max_signed, mask, static_cast<unsigned>(value), location));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::bit_and, mask, value, location);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::bit_or, mask, value, location);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, PK_EMULATOR_HERE) {
  return ::pk::emulator::reduce(::pk::emulator::Reduction::bit_xor, mask, value, location);
}

namespace pk {

inline unsigned to_tf32(float value) {
  const auto bits = std::bit_cast<unsigned>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (bits + 0x1000u) & 0xffffe000u;
}
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], PK_EMULATOR_HERE) {
  emulator::mma_tf32(d, a, b, location);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], PK_EMULATOR_HERE) {
  emulator::mma_bf16(d, a, b, location);
}
inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], PK_EMULATOR_HERE) {
  emulator::mma_f16(d, a, b, location);
}

}  // namespace pk
