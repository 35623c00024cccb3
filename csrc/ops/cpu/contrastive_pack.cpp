// SPDX-License-Identifier: MIT
// Vectors out of images or embeddings and gradients back into them, on the CPU. Limit: memory, every number read and written once.
//
// LANES rows go together, as squares transposed in registers where the channels of a vector lie in planes. Rows that are neighbours in the map,
// which most are after a stable sort by class, are read and written by the vector.

#include <algorithm>
#include <cmath>

#include "common/cpu_level.h"
#include "common/tile_product.h"
#include "common/transpose.h"
#include "ops/contrastive.h"

#define PK_MEMBER inline __attribute__((always_inline))

namespace {

using namespace protokernels;

// Half precision as a number of its own, so that conversions read like any other.
struct Bf16 {
  uint16_t bits;
  operator float() const { return from_bf16(bits); }
  static Bf16 of(float x) { return {to_bf16(x)}; }
};

template <class E, class T>
PK_INLINE E converted(T x) {
  if constexpr (std::is_same_v<E, Bf16>)
    return Bf16::of(static_cast<float>(x));
  else
    return static_cast<E>(x);
}

template <class Function>
PK_INLINE void with_kind(Kind kind, const Function& function) {
  switch (kind) {
    case Kind::f32: return function(float{});
    case Kind::f64: return function(double{});
    case Kind::bf16: return function(Bf16{});
    default: return function(_Float16{});
  }
}

constexpr int64_t AHEAD = 32;  // rows from the one at work to the one that memory is asked for: planes are read across, which it does not see coming

// Where a row lies in x. Rows in turn mostly come from the same map, which spares a division.
struct Finder {
  const ContrastivePack& p;
  int64_t begin = 0, end = 0, base = 0;  // places of the map, and what to add to their offset in it

  explicit Finder(const ContrastivePack& pack) : p(pack) {}
  PK_MEMBER int64_t offset(int64_t row) {
    const int64_t place = p.order[row];
    if (place < begin || place >= end) {
      const int64_t n = place / p.P;
      begin = n * p.P, end = begin + p.P, base = n * p.stride_n;
    }
    return base + (place - begin) * p.stride_p;
  }
};

// Where LANES rows lie in x; those past the end repeat the last one.
template <class T>
struct Places {
  int64_t offset[LANES<T>];
  int64_t count;
  int64_t first_run;  // so many, and then the rest, lie one behind the other in memory; 0: in more than two pieces
  bool surrounded;    // whole vectors from the first and up to the last row lie within x

  Places(const ContrastivePack& p, Finder& finder, int64_t row, int64_t last) : count(std::min<int64_t>(LANES<T>, last - row)) {
    int64_t pieces = 1;
    first_run = LANES<T>;
    for (int64_t r = 0; r < LANES<T>; ++r) {
      offset[r] = finder.offset(row + std::min(r, count - 1));
      if (r > 0 && offset[r] != offset[r - 1] + 1) first_run = pieces++ == 1 ? r : 0;
    }
    if (pieces > 2) first_run = 0;
    const int64_t most = (p.N - 1) * p.stride_n + (p.P - 1) * p.stride_p;
    surrounded = p.stride_n >= 0 && p.stride_p == 1 && offset[0] + LANES<T> - 1 <= most && offset[LANES<T> - 1] >= LANES<T> - 1;
  }
  bool neighbours() const { return first_run == LANES<T> && count == LANES<T>; }
};

template <class T, class E, int... LANE>
PK_INLINE Vec<T> gather(const E* x, const int64_t* offset, std::integer_sequence<int, LANE...>) {
  return Vec<T>{static_cast<T>(x[offset[LANE]])...};
}

// A channel of LANES rows.
template <class T, class E>
PK_INLINE Vec<T> read_lanes(const E* plane, const Places<T>& places) {
  if constexpr (std::is_same_v<T, E>) {
    if (places.first_run == LANES<T>) return load(plane + places.offset[0]);
    if (places.first_run > 0 && places.surrounded) {
      const Index<T> lane = lane_numbers<T>();
      return lane < static_cast<std::remove_reference_t<decltype(lane[0])>>(places.first_run) ? load(plane + places.offset[0])
                                                                                            : load(plane + places.offset[LANES<T> - 1] - LANES<T> + 1);
    }
  }
  return gather<T>(plane, places.offset, std::make_integer_sequence<int, LANES<T>>{});
}

// Vectors become ones of length 1, or of zeros if they count as zero; norms [count] are what they are divided by. Division is exact where it
// can be: a vector of one channel becomes 1 or -1, and its gradient 0.
template <class T>
PK_INLINE void normalise(T* x, int64_t Cp, int64_t count, T* norms) {
  constexpr double floor = CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
  double length[LANES<T>] = {}, squared[LANES<T>] = {};
  for (int64_t r = 0; r < count; ++r) squared[r] = squared_norm(x + r * Cp, Cp);
  for (int64_t r = 0; r < LANES<T>; ++r) length[r] = std::sqrt(squared[r]);
  for (int64_t r = 0; r < count; ++r) {
    norms[r] = squared[r] <= floor ? std::numeric_limits<T>::infinity() : static_cast<T>(length[r]);
    if (length[r] < std::numeric_limits<T>::max()) {
      for (int64_t c = 0; c < Cp; c += LANES<T>) store(x + r * Cp + c, load(x + r * Cp + c) / norms[r]);
    } else {  // longer than T can say, or not a number
      for (int64_t c = 0; c < Cp; ++c) x[r * Cp + c] = static_cast<T>(x[r * Cp + c] / length[r]);
    }
  }
}

template <class T, class E>
void pack_rows(const ContrastivePack& p, int64_t first, int64_t last) {
  const E* const x = static_cast<const E*>(p.x);
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  Finder finder(p), ahead_finder(p);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, finder, row, last);
    T* const out = packed + row * p.Cp;
    if (p.stride_c != 1 && row + AHEAD < last) {
      const E* const ahead = x + ahead_finder.offset(row + AHEAD);
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(ahead + c * p.stride_c);
    }
    if (p.stride_c == 1 || p.C == 1) {
      for (int64_t r = 0; r < places.count; ++r) {
        for (int64_t c = 0; c < p.C; ++c) out[r * p.Cp + c] = static_cast<T>(x[places.offset[r] + c]);
        std::fill(out + r * p.Cp + p.C, out + (r + 1) * p.Cp, T(0));
      }
    } else {
      for (int64_t c = 0; c < p.Cp; c += LANES<T>) {
        Vec<T> square[LANES<T>];
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES<T>; ++j) square[j] = c + j < p.C ? read_lanes<T>(x + (c + j) * p.stride_c, places) : Vec<T>{};
        transpose<T>(square);
        if (places.count == LANES<T>) {
#pragma GCC unroll 16
          for (int64_t r = 0; r < LANES<T>; ++r) store(out + r * p.Cp + c, square[r]);
        } else {
          for (int64_t r = 0; r < places.count; ++r) store(out + r * p.Cp + c, square[r]);
        }
      }
    }
    if (p.normalize)
      normalise(out, p.Cp, places.count, norms + row);
    else
      std::fill(norms + row, norms + row + places.count, T(1));
  }
}

template <class T, class E>
void unpack_rows(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  E* const x = static_cast<E*>(p.grad_x);
  const T* const grad = static_cast<const T*>(p.grad_packed);
  Finder finder(p);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, finder, row, last);
    T along[LANES<T>] = {}, scale[LANES<T>];
    std::fill(scale, scale + LANES<T>, T(1));
    for (int64_t r = 0; p.normalize && r < places.count; ++r) {
      along[r] = dot(static_cast<const T*>(p.packed) + (row + r) * p.Cp, grad + (row + r) * p.Cp, p.Cp);
      scale[r] = 1 / static_cast<const T*>(p.norms)[row + r];
    }
    const auto at = [&](int64_t r, int64_t c) {
      const int64_t element = (row + r) * p.Cp + c;
      const Vec<T> g = load(grad + element);
      return p.normalize ? (g - load(static_cast<const T*>(p.packed) + element) * along[r]) * scale[r] : g;
    };
    for (int64_t c = 0; c < p.C; c += LANES<T>) {
      const int64_t channels = std::min<int64_t>(LANES<T>, p.C - c);
      if (p.stride_c == 1 || p.C == 1) {
        for (int64_t r = 0; r < places.count; ++r) {
          T lanes[LANES<T>];
          store(lanes, at(r, c));
          for (int64_t j = 0; j < channels; ++j) x[places.offset[r] + c + j] = converted<E>(lanes[j]);
        }
        continue;
      }
      Vec<T> square[LANES<T>];
      for (int64_t r = 0; r < LANES<T>; ++r) square[r] = at(std::min(r, places.count - 1), c);
      transpose<T>(square);
      for (int64_t j = 0; j < channels; ++j) {
        T lanes[LANES<T>];
        store(lanes, square[j]);
        E* const plane = x + (c + j) * p.stride_c;
        if (places.neighbours() && std::is_same_v<T, E>)
          std::memcpy(static_cast<void*>(plane + places.offset[0]), lanes, sizeof lanes);
        else
          for (int64_t r = 0; r < places.count; ++r) plane[places.offset[r]] = converted<E>(lanes[r]);
      }
    }
  }
}

void pack(const ContrastivePack& p, int64_t first, int64_t last) {
  with_kind(p.x_kind, [&](auto zero) {
    using E = decltype(zero);
    if constexpr (std::is_same_v<E, double>)
      pack_rows<double, E>(p, first, last);
    else
      pack_rows<float, E>(p, first, last);
  });
}

void unpack(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  with_kind(p.x_kind, [&](auto zero) {
    using E = decltype(zero);
    if constexpr (std::is_same_v<E, double>)
      unpack_rows<double, E>(p, first, last);
    else
      unpack_rows<float, E>(p, first, last);
  });
}

}  // namespace

namespace protokernels {

extern const ContrastivePackCpu PK_LEVEL_TABLE(contrastive_pack_cpu);
const ContrastivePackCpu PK_LEVEL_TABLE(contrastive_pack_cpu) = {pack, unpack};

}  // namespace protokernels
