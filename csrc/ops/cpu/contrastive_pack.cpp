// SPDX-License-Identifier: MIT
// Vectors out of images or embeddings and gradients back into them, on the CPU. Limit: memory, every number read and written once.
// Those whose channels lie in planes are in contrastive_planes.h.

#include "common/cpu_level.h"
#include "ops/cpu/contrastive_planes.h"

namespace {

template <class Function>
PK_INLINE void with_kind(Kind kind, const Function& function) {
  switch (kind) {
    case Kind::f32: return function(float{});
    case Kind::f64: return function(double{});
    case Kind::bf16: return function(Bf16{});
    default: return function(Half{});
  }
}

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

bool channels_beside_each_other(const ContrastivePack& p) { return p.stride_c == 1 || p.C == 1; }

template <class T, class E>
void pack_any(const ContrastivePack& p, int64_t first, int64_t last) {
  if (p.row_at)
    pack_map<T, E>(p, first, last);
  else
    channels_beside_each_other(p) ? pack_rows<T, E>(p, first, last) : pack_planes<T, E>(p, first, last);
}

template <class T, class E>
void unpack_any(const ContrastiveUnpack& p, int64_t first, int64_t last) {
  if (p.row_at)
    unpack_map<T, E>(p, first, last);
  else
    channels_beside_each_other(p) ? unpack_rows<T, E>(p, first, last) : unpack_planes<T, E>(p, first, last);
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
