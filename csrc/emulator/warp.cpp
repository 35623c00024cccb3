// SPDX-License-Identifier: MIT
#include "emulator/warp.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string>

#include "emulator/half.h"

namespace pk::emulator {
namespace {

constexpr unsigned lanes = 32;

struct ShuffleOperand {
  std::uint64_t value;
  unsigned source;
  std::uint64_t result;
};

struct VoteOperand {
  bool predicate;
  Vote result;
};

struct MatchOperand {
  std::uint64_t value;
  unsigned result;
};

struct ReduceOperand {
  unsigned value, result;
};

struct MatrixOperand {
  float* d;
  const unsigned* a;
  const unsigned* b;
};

template <typename Function>
void for_each_lane(unsigned participants, Function function) {
  for (unsigned rest = participants; rest != 0; rest &= rest - 1) function(static_cast<unsigned>(std::countr_zero(rest)));
}

void combine_shuffle(unsigned participants, void* const* operands) {
  for_each_lane(participants, [&](unsigned lane) {
    auto& mine = *static_cast<ShuffleOperand*>(operands[lane]);
    // A value from a lane that does not take part is undefined: NaN.
    mine.result = ((participants >> mine.source) & 1u) ? static_cast<ShuffleOperand*>(operands[mine.source])->value : ~std::uint64_t{0};
  });
}

void combine_vote(unsigned participants, void* const* operands) {
  unsigned ballot = 0;
  for_each_lane(participants, [&](unsigned lane) {
    if (static_cast<VoteOperand*>(operands[lane])->predicate) ballot |= 1u << lane;
  });
  for_each_lane(participants, [&](unsigned lane) { static_cast<VoteOperand*>(operands[lane])->result = {ballot, participants}; });
}

void combine_match(unsigned participants, void* const* operands) {
  for_each_lane(participants, [&](unsigned lane) {
    auto& mine = *static_cast<MatchOperand*>(operands[lane]);
    mine.result = 0;
    for_each_lane(participants, [&](unsigned other) {
      if (static_cast<MatchOperand*>(operands[other])->value == mine.value) mine.result |= 1u << other;
    });
  });
}

constexpr unsigned apply(Reduction kind, unsigned x, unsigned y) {
  switch (kind) {
    case Reduction::add: return x + y;
    case Reduction::min_signed: return static_cast<unsigned>(std::min(static_cast<int>(x), static_cast<int>(y)));
    case Reduction::max_signed: return static_cast<unsigned>(std::max(static_cast<int>(x), static_cast<int>(y)));
    case Reduction::min_unsigned: return std::min(x, y);
    case Reduction::max_unsigned: return std::max(x, y);
    case Reduction::bit_and: return x & y;
    case Reduction::bit_or: return x | y;
    default: return x ^ y;
  }
}

template <Reduction kind>
void combine_reduce(unsigned participants, void* const* operands) {
  bool first = true;
  unsigned result = 0;
  for_each_lane(participants, [&](unsigned lane) {
    const unsigned value = static_cast<ReduceOperand*>(operands[lane])->value;
    result = first ? value : apply(kind, result, value);
    first = false;
  });
  for_each_lane(participants, [&](unsigned lane) { static_cast<ReduceOperand*>(operands[lane])->result = result; });
}

// d [16, 8] += a [16, depth] b [depth, 8]; products exact, the sum in float64, one rounding at the end.
template <unsigned depth, typename ReadA, typename ReadB>
void multiply(unsigned participants, void* const* operands, const char* name, ReadA read_a, ReadB read_b) {
  if (participants != ~0u) fail(std::string(name) + ": all 32 lanes of the warp must take part");
  std::array<std::array<double, depth>, 16> a{};
  std::array<std::array<double, depth>, 8> b{};
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const auto& operand = *static_cast<MatrixOperand*>(operands[lane]);
    read_a(lane / 4, lane % 4, operand.a, a);
    read_b(lane / 4, lane % 4, operand.b, b);
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    float* d = static_cast<MatrixOperand*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) {
      const auto& row = a[lane / 4 + 8 * (i / 2)];
      const auto& column = b[2 * (lane % 4) + i % 2];
      double sum = d[i];
      for (unsigned k = 0; k < depth; ++k) sum += row[k] * column[k];
      d[i] = static_cast<float>(sum);
    }
  }
}

// The tensor core reads the upper 19 bits of a tf32 operand and ignores the rest.
double tf32_value(unsigned bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

void combine_mma_tf32(unsigned participants, void* const* operands) {
  multiply<8>(
      participants, operands, "mma_m16n8k8_tf32",
      [](unsigned group, unsigned member, const unsigned* bits, auto& a) {
        a[group][member] = tf32_value(bits[0]);
        a[group + 8][member] = tf32_value(bits[1]);
        a[group][member + 4] = tf32_value(bits[2]);
        a[group + 8][member + 4] = tf32_value(bits[3]);
      },
      [](unsigned group, unsigned member, const unsigned* bits, auto& b) {
        b[group][member] = tf32_value(bits[0]);
        b[group][member + 4] = tf32_value(bits[1]);
      });
}

double low_bf16(unsigned bits) { return bfloat16_bits_to_float(static_cast<std::uint16_t>(bits & 0xffffu)); }
double high_bf16(unsigned bits) { return bfloat16_bits_to_float(static_cast<std::uint16_t>(bits >> 16)); }

double low_f16(unsigned bits) { return half_bits_to_float(static_cast<std::uint16_t>(bits & 0xffffu)); }
double high_f16(unsigned bits) { return half_bits_to_float(static_cast<std::uint16_t>(bits >> 16)); }

template <double (*low)(unsigned), double (*high)(unsigned)>
void combine_mma_16(unsigned participants, void* const* operands) {
  multiply<16>(
      participants, operands, "mma_m16n8k16",
      [](unsigned group, unsigned member, const unsigned* bits, auto& a) {
        for (unsigned i = 0; i < 4; ++i) {
          auto& row = a[group + 8 * (i % 2)];
          const unsigned column = 2 * member + 8 * (i / 2);
          row[column] = low(bits[i]);
          row[column + 1] = high(bits[i]);
        }
      },
      [](unsigned group, unsigned member, const unsigned* bits, auto& b) {
        for (unsigned i = 0; i < 2; ++i) {
          b[group][2 * member + 8 * i] = low(bits[i]);
          b[group][2 * member + 8 * i + 1] = high(bits[i]);
        }
      });
}

}  // namespace

std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t bits, int argument, int width, const Location& location) {
  static constexpr std::array names{"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = names[static_cast<std::size_t>(kind)];
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(std::string(name) + " at " + describe_location(location.file_name(), location.line()) +
         ": width must be a power of two up to 32; got " + std::to_string(width));
  }
  const unsigned lane = lane_index();
  const unsigned segment_mask = static_cast<unsigned>(width) - 1;
  const unsigned first = lane & ~segment_mask;
  const unsigned last = first | segment_mask;
  unsigned source = lane;
  switch (kind) {
    case Shuffle::index: source = first | (static_cast<unsigned>(argument) & segment_mask); break;
    case Shuffle::up: source = lane - first < static_cast<unsigned>(argument) ? lane : lane - argument; break;
    case Shuffle::down: source = last - lane < static_cast<unsigned>(argument) ? lane : lane + argument; break;
    case Shuffle::exclusive_or: {
      const unsigned partner = lane ^ (static_cast<unsigned>(argument) & 31u);
      source = partner > last ? lane : partner;
      break;
    }
  }
  ShuffleOperand operand{bits, source, 0};
  warp_collective(mask, &operand, combine_shuffle, name, location);
  return operand.result;
}

Vote vote(unsigned mask, bool predicate, const char* name, const Location& location) {
  VoteOperand operand{predicate, {}};
  warp_collective(mask, &operand, combine_vote, name, location);
  return operand.result;
}

unsigned match_any(unsigned mask, std::uint64_t bits, const Location& location) {
  MatchOperand operand{bits, 0};
  warp_collective(mask, &operand, combine_match, "__match_any_sync", location);
  return operand.result;
}

unsigned reduce(Reduction kind, unsigned mask, unsigned value, const Location& location) {
  static constexpr std::array<Combine, 8> combines{combine_reduce<Reduction::add>,          combine_reduce<Reduction::min_signed>,
                                                   combine_reduce<Reduction::max_signed>,   combine_reduce<Reduction::min_unsigned>,
                                                   combine_reduce<Reduction::max_unsigned>, combine_reduce<Reduction::bit_and>,
                                                   combine_reduce<Reduction::bit_or>,       combine_reduce<Reduction::bit_xor>};
  ReduceOperand operand{value, 0};
  warp_collective(mask, &operand, combines[static_cast<std::size_t>(kind)], "__reduce_*_sync", location);
  return operand.result;
}

void mma_tf32(float* d, const unsigned* a, const unsigned* b, const Location& location) {
  MatrixOperand operand{d, a, b};
  warp_collective(~0u, &operand, combine_mma_tf32, "mma_m16n8k8_tf32", location);
}

void mma_bf16(float* d, const unsigned* a, const unsigned* b, const Location& location) {
  MatrixOperand operand{d, a, b};
  warp_collective(~0u, &operand, combine_mma_16<low_bf16, high_bf16>, "mma_m16n8k16_bf16", location);
}

void mma_f16(float* d, const unsigned* a, const unsigned* b, const Location& location) {
  MatrixOperand operand{d, a, b};
  warp_collective(~0u, &operand, combine_mma_16<low_f16, high_f16>, "mma_m16n8k16_f16", location);
}

}  // namespace pk::emulator
