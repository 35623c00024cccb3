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

// Where LANES rows lie in x; those past the end repeat the last one.
template <class T>
struct Places {
  int64_t offset[LANES<T>];
  int64_t count;
  bool neighbours;  // one behind the other in memory

  Places(const ContrastivePack& p, int64_t row, int64_t last) : count(std::min<int64_t>(LANES<T>, last - row)), neighbours(count == LANES<T>) {
    for (int64_t r = 0; r < LANES<T>; ++r) {
      const int64_t place = p.order[row + std::min(r, count - 1)], n = place / p.P;
      offset[r] = n * p.stride_n + (place - n * p.P) * p.stride_p;
      neighbours &= offset[r] == offset[0] + r;
    }
  }
};

// A vector becomes one of length 1, or of zeros if it counts as zero; returns what it was divided by. Division is exact where it can be: a
// vector of one channel becomes 1 or -1, and its gradient 0.
template <class T>
PK_INLINE T normalise(T* x, int64_t Cp) {
  const double squared = squared_norm(x, Cp), length = std::sqrt(squared);
  const bool zero = squared <= CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
  const T divisor = zero ? std::numeric_limits<T>::infinity() : static_cast<T>(length);
  if (length < std::numeric_limits<T>::max()) {
    for (int64_t c = 0; c < Cp; c += LANES<T>) store(x + c, load(x + c) / divisor);
  } else {  // longer than T can say, or not a number
    for (int64_t c = 0; c < Cp; ++c) x[c] = static_cast<T>(x[c] / length);
  }
  return divisor;
}

template <class T, class E>
void pack_rows(const ContrastivePack& p, int64_t first, int64_t last) {
  const E* const x = static_cast<const E*>(p.x);
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, row, last);
    T* const out = packed + row * p.Cp;
    if (p.stride_c == 1 || p.C == 1) {
      for (int64_t r = 0; r < places.count; ++r) {
        for (int64_t c = 0; c < p.C; ++c) out[r * p.Cp + c] = static_cast<T>(x[places.offset[r] + c]);
        std::fill(out + r * p.Cp + p.C, out + (r + 1) * p.Cp, T(0));
      }
    } else {
      for (int64_t c = 0; c < p.Cp; c += LANES<T>) {
        Vec<T> square[LANES<T>];
        for (int64_t j = 0; j < LANES<T>; ++j) {
          T lanes[LANES<T>] = {};
          const E* const plane = x + (c + j) * p.stride_c;
          if (c + j < p.C && places.neighbours && std::is_same_v<T, E>)
            std::memcpy(lanes, plane + places.offset[0], sizeof lanes);
          else if (c + j < p.C)
            for (int64_t r = 0; r < LANES<T>; ++r) lanes[r] = static_cast<T>(plane[places.offset[r]]);
          square[j] = load(lanes);
        }
        transpose<T>(square);
        if (places.count == LANES<T>) {
#pragma GCC unroll 16
          for (int64_t r = 0; r < LANES<T>; ++r) store(out + r * p.Cp + c, square[r]);
        } else {
          for (int64_t r = 0; r < places.count; ++r) store(out + r * p.Cp + c, square[r]);
        }
      }
    }
    for (int64_t r = 0; r < places.count; ++r) {
      norms[row + r] = p.normalize ? normalise(out + r * p.Cp, p.Cp) : T(1);
    }
  }
}

template <class T, class E>
void unpack_rows(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  E* const x = static_cast<E*>(p.grad_x);
  const T* const grad = static_cast<const T*>(p.grad_packed);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, row, last);
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
        if (places.neighbours && std::is_same_v<T, E>)
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
