// SPDX-License-Identifier: MIT
// Vectors out of images or embeddings and gradients back into them, on the CPU. Limit: memory, every number read and written once.
//
// LANES rows go together, as squares transposed in registers where the channels of a vector lie in planes. Rows that are neighbours in the map,
// which most are after a stable sort by class, are read and written by the vector.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/cpu_level.h"
#include "common/rows.h"
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
    default: return function(Half{});
  }
}

// Rows from those at work to those that memory is asked for: planes are read across, which it does not see coming.
constexpr int64_t AHEAD = 32;

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

// ------------------------------------------------------------------------------------------- channels beside each other
//
// Sums over channels run in four parts, one for every remainder of the channel's number by four: along a row they are one vector, in lanes four, and
// every layout of x gives the same bits.

template <class T>
PK_INLINE double squared_length(const T* x, int64_t Cp) {
  Four<double> sum{};
  for (int64_t c = 0; c < Cp; c += 4) {
    const Four<double> d = __builtin_convertvector(load_four(x + c), Four<double>);
    sum += d * d;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
PK_INLINE T inner_product(const T* x, const T* y, int64_t Cp) {
  Four<T> sum{};
  for (int64_t c = 0; c < Cp; c += 4) sum += load_four(x + c) * load_four(y + c);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T, class E>
void pack_rows(const ContrastivePack& p, int64_t first, int64_t last) {
  constexpr double floor = CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  Finder finder(p);
  for (int64_t row = first; row < last; ++row) {
    const E* const x = static_cast<const E*>(p.x) + finder.offset(row);
    T* const out = packed + row * p.Cp;
    for (int64_t c = 0; c < p.C; ++c) out[c] = static_cast<T>(x[c]);
    std::fill(out + p.C, out + p.Cp, T(0));
    norms[row] = T(1);
    if (!p.normalize) continue;
    const double squared = squared_length(out, p.Cp), length = std::sqrt(squared);
    norms[row] = squared <= floor ? std::numeric_limits<T>::infinity() : static_cast<T>(length);
    if (length < std::numeric_limits<T>::max()) {
      for (int64_t c = 0; c < p.Cp; c += LANES<T>) store(out + c, load(out + c) / norms[row]);
    } else {  // longer than T can say, or not a number
      for (int64_t c = 0; c < p.Cp; ++c) out[c] = static_cast<T>(out[c] / length);
    }
  }
}

template <class T, class E>
void unpack_rows(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  Finder finder(p);
  for (int64_t row = first; row < last; ++row) {
    E* const x = static_cast<E*>(p.grad_x) + finder.offset(row);
    const T *const grad = static_cast<const T*>(p.grad_packed) + row * p.Cp, *const f = static_cast<const T*>(p.packed) + row * p.Cp;
    const T along = p.normalize ? inner_product(f, grad, p.Cp) : T(0), scale = p.normalize ? 1 / static_cast<const T*>(p.norms)[row] : T(1);
    for (int64_t c = 0; c < p.C; ++c) x[c] = converted<E>(p.normalize ? (grad[c] - f[c] * along) * scale : grad[c]);
  }
}

// --------------------------------------------------------------------------------------------------- channels in planes

// LANES rows, one in each lane: [Cp, LANES].
template <class T>
struct Lanes {
  std::vector<T> memory;
  T* data;

  explicit Lanes(int64_t Cp) : memory(static_cast<size_t>((Cp + 1) * LANES<T>)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
    data = memory.data() + (VECTOR_BYTES - address % VECTOR_BYTES) % VECTOR_BYTES / sizeof(T);
  }
  PK_MEMBER T* at(int64_t c) { return data + c * LANES<T>; }
};

template <class T, class E, int... LANE>
PK_INLINE Vec<T> gather(const E* x, const int64_t* offset, std::integer_sequence<int, LANE...>) {
  return Vec<T>{static_cast<T>(x[offset[LANE]])...};
}

template <class T, class E>
PK_INLINE void read_lanes(const E* x, const ContrastivePack& p, const Places<T>& places, Lanes<T>& lanes) {
  if constexpr (std::is_same_v<T, E>) {
    const T *const front = x + places.offset[0], *const back = x + places.offset[LANES<T> - 1] - (LANES<T> - 1);
    if (places.first_run == LANES<T>) {
      for (int64_t c = 0; c < p.C; ++c) store(lanes.at(c), load(front + c * p.stride_c));
      return;
    }
    if (places.first_run > 0 && places.surrounded) {
      const Index<T> in_front = lane_numbers<T>() < (Index<T>{} + static_cast<int>(places.first_run));
      for (int64_t c = 0; c < p.C; ++c) store(lanes.at(c), in_front ? load(front + c * p.stride_c) : load(back + c * p.stride_c));
      return;
    }
  }
  for (int64_t c = 0; c < p.C; ++c)
    store(lanes.at(c), gather<T>(x + c * p.stride_c, places.offset, std::make_integer_sequence<int, LANES<T>>{}));
}

// Not inlined: GCC would unroll it into scalar square roots.
__attribute__((noinline)) void take_roots(const double* squared, int64_t count, double* root) {
  for (int64_t l = 0; l < count; ++l) root[l] = std::sqrt(squared[l]);
}

// Divides by the lengths: exactly where it can be, so that a vector of one channel becomes 1 or -1 and its gradient 0. norm [LANES] are the divisors,
// infinite where a vector counts as zero.
template <class T>
PK_INLINE void normalise(Lanes<T>& lanes, int64_t C, int64_t Cp, T* norm) {
  constexpr double floor = CONTRASTIVE_NORM_FLOOR * CONTRASTIVE_NORM_FLOOR;
  constexpr int64_t halves = LANES<T> / LANES<double>;
  Vec<double> sum[4][halves]{};
  for (int64_t c = 0; c < Cp; c += 4)
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k)
#pragma GCC unroll 2
      for (int64_t h = 0; h < halves; ++h) {
        const Vec<double> x = load_double(lanes.at(c + k) + h * LANES<double>);
        sum[k][h] += x * x;
      }
  double squared[LANES<T>], length[LANES<T>];
  for (int64_t h = 0; h < halves; ++h) store(squared + h * LANES<double>, (sum[0][h] + sum[1][h]) + (sum[2][h] + sum[3][h]));
  take_roots(squared, LANES<T>, length);
  bool ordinary = true;
  for (int64_t l = 0; l < LANES<T>; ++l) {
    norm[l] = squared[l] <= floor ? std::numeric_limits<T>::infinity() : static_cast<T>(length[l]);
    ordinary &= length[l] < std::numeric_limits<T>::max();
  }
  if (ordinary) {
    const Vec<T> divisor = load(norm);
    for (int64_t c = 0; c < C; ++c) store(lanes.at(c), load(lanes.at(c)) / divisor);
  } else {  // one is longer than T can say, or not a number; the others are what they are without it
    for (int64_t l = 0; l < LANES<T>; ++l) {
      const bool usual = length[l] < std::numeric_limits<T>::max();
      for (int64_t c = 0; c < C; ++c) {
        T& x = lanes.at(c)[l];
        x = usual ? x / norm[l] : static_cast<T>(x / length[l]);
      }
    }
  }
}

template <class T, class E>
void pack_planes(const ContrastivePack& p, int64_t first, int64_t last) {
  const E* const x = static_cast<const E*>(p.x);
  T *const packed = static_cast<T*>(p.packed), *const norms = static_cast<T*>(p.norms);
  Finder finder(p), ahead_finder(p);
  Lanes<T> lanes(p.Cp);
  T norm[LANES<T>];
  std::fill(norm, norm + LANES<T>, T(1));
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, finder, row, last);
    if (row + AHEAD < last) {
      const E* const ahead = x + ahead_finder.offset(row + AHEAD);
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(ahead + c * p.stride_c);
    }
    read_lanes(x, p, places, lanes);
    if (p.normalize) normalise(lanes, p.C, p.Cp, norm);
    std::copy(norm, norm + places.count, norms + row);
    for (int64_t c = 0; c < p.Cp; c += LANES<T>) {
      Vec<T> square[LANES<T>];
#pragma GCC unroll 16
      for (int64_t j = 0; j < LANES<T>; ++j) square[j] = load(lanes.at(c + j));
      transpose<T>(square);
      T* const out = packed + row * p.Cp + c;
      if (places.count == LANES<T>) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < LANES<T>; ++r) store(out + r * p.Cp, square[r]);
      } else {
        for (int64_t r = 0; r < places.count; ++r) store(out + r * p.Cp, square[r]);
      }
    }
  }
}

// Rows [row, row + count) into lanes; the last one is repeated.
template <class T>
PK_INLINE void transpose_rows(const T* rows, int64_t count, int64_t Cp, Lanes<T>& lanes) {
  for (int64_t c = 0; c < Cp; c += LANES<T>) {
    Vec<T> square[LANES<T>];
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES<T>; ++r) square[r] = load(rows + std::min(r, count - 1) * Cp + c);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int64_t j = 0; j < LANES<T>; ++j) store(lanes.at(c + j), square[j]);
  }
}

template <class T, class E>
void unpack_planes(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  const T *const all = static_cast<const T*>(p.grad_packed), *const vectors = static_cast<const T*>(p.packed);
  E* const x = static_cast<E*>(p.grad_x);
  Finder finder(p), ahead_finder(p);
  Lanes<T> grad(p.Cp), f(p.Cp);
  for (int64_t row = first; row < last; row += LANES<T>) {
    const Places<T> places(p, finder, row, last);
    if (row + AHEAD < last) {
      const E* const ahead = x + ahead_finder.offset(row + AHEAD);
      for (int64_t c = 0; c < p.C; ++c) __builtin_prefetch(ahead + c * p.stride_c, 1);
    }
    transpose_rows(all + row * p.Cp, places.count, p.Cp, grad);
    if (p.normalize) {
      transpose_rows(vectors + row * p.Cp, places.count, p.Cp, f);
      T norm[LANES<T>];
      for (int64_t l = 0; l < LANES<T>; ++l) norm[l] = static_cast<const T*>(p.norms)[row + std::min(l, places.count - 1)];
      Vec<T> along[4]{};
      for (int64_t c = 0; c < p.Cp; c += 4)
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; ++k) along[k] += load(f.at(c + k)) * load(grad.at(c + k));
      const Vec<T> total = (along[0] + along[1]) + (along[2] + along[3]), scale = T(1) / load(norm);
      for (int64_t c = 0; c < p.C; ++c) store(grad.at(c), (load(grad.at(c)) - load(f.at(c)) * total) * scale);
    }
    if (std::is_same_v<T, E> && places.neighbours()) {
      for (int64_t c = 0; c < p.C; ++c) std::memcpy(static_cast<void*>(x + places.offset[0] + c * p.stride_c), grad.at(c), sizeof(Vec<T>));
    } else {
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t r = 0; r < places.count; ++r) x[places.offset[r] + c * p.stride_c] = converted<E>(grad.at(c)[r]);
    }
  }
}

template <class T, class E>
void pack_any(const ContrastivePack& p, int64_t first, int64_t last) {
  p.stride_c == 1 || p.C == 1 ? pack_rows<T, E>(p, first, last) : pack_planes<T, E>(p, first, last);
}

template <class T, class E>
void unpack_any(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  p.stride_c == 1 || p.C == 1 ? unpack_rows<T, E>(p, first, last) : unpack_planes<T, E>(p, first, last);
}

void pack(const ContrastivePack& p, int64_t first, int64_t last) {
  with_kind(p.x_kind, [&](auto zero) {
    using E = decltype(zero);
    if constexpr (std::is_same_v<E, double>)
      pack_any<double, E>(p, first, last);
    else
      pack_any<float, E>(p, first, last);
  });
}

void unpack(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  with_kind(p.x_kind, [&](auto zero) {
    using E = decltype(zero);
    if constexpr (std::is_same_v<E, double>)
      unpack_any<double, E>(p, first, last);
    else
      unpack_any<float, E>(p, first, last);
  });
}

}  // namespace

namespace protokernels {

extern const ContrastivePackCpu PK_LEVEL_TABLE(contrastive_pack_cpu);
const ContrastivePackCpu PK_LEVEL_TABLE(contrastive_pack_cpu) = {pack, unpack};

}  // namespace protokernels
