// SPDX-License-Identifier: MIT
// Contrastive losses on the CPU, forward: sums of exponentials down the lanes of a strip (of its rows, over the columns) and, where columns are
// anchors of the same set, across the lanes (of a column, over the rows), from one score and one exponential.
//
// Sums run in float over at most 48 columns, or over the lanes of one block, then in double. Without a bound every sum is relative to the largest
// score so far: of a strip's lanes over the columns at hand, and of a column's lanes as strips go by. The scores of a class themselves
// are summed less a centre, so that those of vectors that nearly coincide keep their differences at any temperature.
#pragma once

#include <cmath>

#include "common/exponentials.h"
#include "common/rows.h"
#include "ops/cpu/contrastive_tile.h"

namespace {

// What is summed over the columns that a row has met; of class P and of the others N.
template <class T>
struct Sums {
  double *p, *n, *linear;  // relative to the bound or to the largest score, linear to the centre, in units of log 2
  T *p_top, *n_top;        // the largest scores; null with a bound

  static Sums take(int64_t count, bool bounded, Arena& arena) {
    Sums s{};
    s.p = arena.take<double>(count), s.n = arena.take<double>(count), s.linear = arena.take<double>(count);
    if (!bounded) s.p_top = arena.take<T>(count), s.n_top = arena.take<T>(count);
    return s;
  }
  void clear(int64_t begin, int64_t end) const {
    for (double* sum : {p, n, linear}) std::fill(sum + begin, sum + end, 0.0);
    if (p_top) std::fill(p_top + begin, p_top + end, LEAST<T>), std::fill(n_top + begin, n_top + end, LEAST<T>);
  }
};

template <class T>
struct ForwardRoom {
  Sums<T> sums;  // of all rows
  T* panels;

  ForwardRoom(const ContrastiveForward& p, const ContrastiveSchedule& schedule, Arena& arena)
      : sums(Sums<T>::take(p.R, p.bounded, arena)), panels(arena.take<T>(schedule.panel_rows * p.C)) {}
};

// Sums of a column in the lanes.
template <class T>
struct Across {
  T *p, *n, *linear, *p_top, *n_top;  // [Y_ROWS, LANES]

  static Across take(bool bounded, Arena& arena) {
    const int64_t count = Y_ROWS * LANES<T>;
    Across a{};
    a.p = arena.take<T>(count), a.n = arena.take<T>(count), a.linear = arena.take<T>(count);
    if (!bounded) a.p_top = arena.take<T>(count), a.n_top = arena.take<T>(count);
    return a;
  }
  void clear(int64_t columns) const {
    for (T* sum : {p, n, linear}) std::fill(sum, sum + columns * LANES<T>, T(0));
    if (p_top) std::fill(p_top, p_top + columns * LANES<T>, LEAST<T>), std::fill(n_top, n_top + columns * LANES<T>, LEAST<T>);
  }
};

template <class T>
PK_INLINE void add(T* p, Vec<T> v) {
  store(p, load(p) + v);
}

template <class T>
PK_INLINE void add_doubles(double* p, Vec<T> v) {
  alignas(64) T lane[LANES<T>];
  store(lane, v);
  for (int64_t i = 0; i < LANES<T>; i += LANES<double>) store(p + i, load(p + i) + load_double(lane + i));
}

template <class T>
PK_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// sum = sum 2^(top - new top) + part 2^(part's top - new top), elementwise.
template <class T>
PK_INLINE void merge(double* sum, T* top, Vec<T> part, Vec<T> part_top) {
  const Vec<T> before = load(top), now = larger<T>(before, part_top);
  alignas(64) T kept[LANES<T>], added[LANES<T>];
  store(kept, exp2_nonpositive(before - now)), store(added, part * exp2_nonpositive(part_top - now));
  store(top, now);
  for (int64_t i = 0; i < LANES<T>; i += LANES<double>) store(sum + i, load(sum + i) * load_double(kept + i) + load_double(added + i));
}

template <class T>
void merge_one(double& sum, T& top, double part, T part_top) {
  const T now = part_top > top ? part_top : top;
  sum = sum * std::exp2(static_cast<double>(top) - now) + part * std::exp2(static_cast<double>(part_top) - now);
  top = now;
}

// ------------------------------------------------------------------------------------------------------ a strip of scores

// Scores [columns, VECTORS lanes] of a strip and columns [y, y + columns).
template <class T>
struct Scores {
  const T* data;
  int32_t y;
  const T* at(int32_t column) const { return data + (column - y) * STRIP<T>; }
};

template <class T, int VECTORS>
PK_INLINE Vec<T> both(const Vec<T>* v) {
  return VECTORS == 2 ? v[0] + v[VECTORS - 1] : v[0];
}

template <class T, int VECTORS>
struct StripSums {
  Vec<T> p[VECTORS]{}, n[VECTORS]{}, linear[VECTORS]{};
};

// Columns [begin, end) are of another class than all rows of the strip.
template <class T, int VECTORS, bool ACROSS>
PK_INLINE void sum_others(const Scores<T>& scores, int32_t begin, int32_t end, StripSums<T, VECTORS>& sums, T* across) {
  for (int32_t y = begin; y < end; ++y) {
    Vec<T> e[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) e[v] = exp2_nonpositive(load(scores.at(y) + v * LANES<T>)), sums.n[v] += e[v];
    if (ACROSS) add(across + (y - scores.y) * LANES<T>, both<T, VECTORS>(e));
  }
}

// Columns [begin, end) are of the class of all rows of the strip, or (MIXED) of that of some.
template <class T, int VECTORS, bool ACROSS, bool MIXED>
PK_INLINE void sum_same(const Scores<T>& scores, int32_t begin, int32_t end, const Rows<T>& rows, const Strip& strip, bool triangle,
                        StripSums<T, VECTORS>& sums, const Across<T>& across) {
  for (int32_t y = begin; y < end; ++y) {
    const int64_t lane = (y - scores.y) * LANES<T>;
    Vec<T> e[VECTORS], s[VECTORS], others[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      s[v] = load(scores.at(y) + v * LANES<T>), e[v] = exp2_nonpositive(s[v]);
      if (MIXED) {
        const Masks<T> mask = masks(rows, strip.begin + v * LANES<T>, y, triangle);
        others[v] = keep<T>(mask.other, e[v], 0), e[v] = keep<T>(mask.same, e[v], 0), s[v] = keep<T>(mask.same, s[v], 0);
        sums.n[v] += others[v];
      }
      sums.p[v] += e[v], sums.linear[v] += s[v];
    }
    if (!ACROSS) continue;
    if (MIXED) add(across.n + lane, both<T, VECTORS>(others));
    add(across.p + lane, both<T, VECTORS>(e)), add(across.linear + lane, both<T, VECTORS>(s));
  }
}

template <class T, int VECTORS, bool ACROSS>
PK_INLINE void sum_bounded(const Scores<T>& scores, const Rows<T>& rows, const Strip& strip, int32_t y_end, bool triangle,
                           const Sums<T>& down, const Across<T>& across) {
  StripSums<T, VECTORS> sums;
  bool some_same = false;
  for_meetings(strip, scores.y, y_end, triangle, [&](Meeting meeting, int32_t begin, int32_t end) {
    if (meeting == Meeting::other) sum_others<T, VECTORS, ACROSS>(scores, begin, end, sums, across.n);
    if (meeting == Meeting::same) sum_same<T, VECTORS, ACROSS, false>(scores, begin, end, rows, strip, triangle, sums, across);
    if (meeting == Meeting::mixed) sum_same<T, VECTORS, ACROSS, true>(scores, begin, end, rows, strip, triangle, sums, across);
    some_same |= meeting == Meeting::same || meeting == Meeting::mixed;
  });
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t x = strip.begin + v * LANES<T>;
    add_doubles<T>(down.n + x, sums.n[v]);
    if (some_same) add_doubles<T>(down.p + x, sums.p[v]), add_doubles<T>(down.linear + x, sums.linear[v]);
  }
}

// A vector of scores joins the sums of a column.
template <class T, int VECTORS>
PK_INLINE void join(T* sum, T* top, const Vec<T>* s) {
  const Vec<T> before = load(top), now = larger<T>(before, VECTORS == 2 ? larger<T>(s[0], s[VECTORS - 1]) : s[0]);
  Vec<T> total = load(sum) * exp2_nonpositive(before - now);
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) total += exp2_nonpositive(s[v] - now);
  store(sum, total), store(top, now);
}

template <class T, int VECTORS, bool ACROSS>
PK_INLINE void sum_unbounded(const Scores<T>& scores, const Rows<T>& rows, const Strip& strip, int32_t y_end, bool triangle, T centre,
                             const Sums<T>& down, const Across<T>& across) {
  Vec<T> p[VECTORS]{}, n[VECTORS]{}, linear[VECTORS]{}, p_top[VECTORS], n_top[VECTORS];
  for (int v = 0; v < VECTORS; ++v) p_top[v] = n_top[v] = broadcast(LEAST<T>);
  // Calls use(y, same, scores, centred) for the scores of one class at a time; -infinity stands for those of the other, 0 among the centred ones.
  const auto each = [&](const auto& use) {
    for_meetings(strip, scores.y, y_end, triangle, [&](Meeting meeting, int32_t begin, int32_t end) {
      if (meeting == Meeting::none) return;
      for (int32_t y = begin; y < end; ++y) {
        Vec<T> s[VECTORS], part[VECTORS], centred[VECTORS];
        for (int v = 0; v < VECTORS; ++v) s[v] = load(scores.at(y) + v * LANES<T>), centred[v] = s[v] - centre;
        if (meeting != Meeting::mixed) {
          use(y, meeting == Meeting::same, s, centred);
          continue;
        }
        for (const bool same : {true, false}) {
          for (int v = 0; v < VECTORS; ++v) {
            const Masks<T> mask = masks(rows, strip.begin + v * LANES<T>, y, triangle);
            part[v] = keep<T>(same ? mask.same : mask.other, s[v], -INFINITE<T>), centred[v] = keep<T>(mask.same, s[v] - centre, 0);
          }
          use(y, same, part, centred);
        }
      }
    });
  };
  each([&](int32_t, bool same, const Vec<T>* s, const Vec<T>*) {
    for (int v = 0; v < VECTORS; ++v) (same ? p_top : n_top)[v] = larger<T>((same ? p_top : n_top)[v], s[v]);
  });
  each([&](int32_t y, bool same, const Vec<T>* s, const Vec<T>* centred) {
    const int64_t lane = (y - scores.y) * LANES<T>;
    for (int v = 0; v < VECTORS; ++v) {
      (same ? p : n)[v] += exp2_nonpositive(s[v] - (same ? p_top : n_top)[v]);
      if (same) linear[v] += centred[v];
    }
    if (!ACROSS) return;
    join<T, VECTORS>((same ? across.p : across.n) + lane, (same ? across.p_top : across.n_top) + lane, s);
    if (same) add(across.linear + lane, both<T, VECTORS>(centred));
  });
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t x = strip.begin + v * LANES<T>;
    merge(down.n + x, down.n_top + x, n[v], n_top[v]);
    merge(down.p + x, down.p_top + x, p[v], p_top[v]);
    add_doubles<T>(down.linear + x, linear[v]);
  }
}

// ---------------------------------------------------------------------------------------------------------------- a part

template <class T>
PK_INLINE double total_of(const T* lanes, T top, const T* tops) {
  double sum = 0;
  for (int64_t i = 0; i < LANES<T>; ++i)
    sum += tops ? static_cast<double>(lanes[i]) * std::exp2(static_cast<double>(tops[i]) - top) : static_cast<double>(lanes[i]);
  return sum;
}

template <class T>
void add_across(const Across<T>& across, int64_t columns, const Sums<T>& sums, int64_t y) {
  for (int64_t i = 0; i < columns; ++i, ++y) {
    const int64_t lane = i * LANES<T>;
    for (int64_t l = 0; l < LANES<T>; ++l) sums.linear[y] += across.linear[lane + l];
    if (!across.p_top) {
      sums.p[y] += total_of<T>(across.p + lane, 0, nullptr), sums.n[y] += total_of<T>(across.n + lane, 0, nullptr);
      continue;
    }
    const T p_top = *std::max_element(across.p_top + lane, across.p_top + lane + LANES<T>);
    const T n_top = *std::max_element(across.n_top + lane, across.n_top + lane + LANES<T>);
    merge_one(sums.p[y], sums.p_top[y], total_of(across.p + lane, p_top, across.p_top + lane), p_top);
    merge_one(sums.n[y], sums.n_top[y], total_of(across.n + lane, n_top, across.n_top + lane), n_top);
  }
}

template <class T>
struct ForwardScratch {
  Rows<T> rows;
  Sums<T> down;
  Across<T> across;
  T* scores;

  ForwardScratch(const ContrastiveForward& p, const ContrastiveSchedule& schedule, Arena& arena)
      : rows(Rows<T>::take(schedule.most_x, arena)),
        down(Sums<T>::take(round_up(schedule.most_x, STRIP<T>), p.bounded, arena)),
        across(Across<T>::take(p.bounded, arena)),
        scores(arena.take<T>(Y_ROWS * STRIP<T>)) {}
};

template <class T, bool BOUNDED, bool ACROSS>
void sum_part(const ContrastiveForward& p, const ContrastivePart& part, const T* panels, const ForwardRoom<T>& room,
              ForwardScratch<T>& scratch) {
  const T last = Scale<T>::of(p).last, centre = centre_of<T>(p);
  const T* const columns = static_cast<const T*>(p.columns);
  const Rows<T>& rows = scratch.rows;
  const int32_t blocks = static_cast<int32_t>((part.y_end - part.y_begin + Y_ROWS - 1) / Y_ROWS);
  const int64_t length = part.y_end - part.y_begin;
  for (int32_t k = 0; k < blocks; ++k) {
    const int32_t y = static_cast<int32_t>(part.y_begin + length * k / blocks),
                  y_end = static_cast<int32_t>(part.y_begin + length * (k + 1) / blocks);
    if (ACROSS) scratch.across.clear(y_end - y);
    for (int64_t n = 0; n < rows.strip_count; ++n) {
      const Strip& strip = rows.strips[n];
      if (part.triangle && part.x_begin + strip.begin >= y_end) break;
      const Scores<T> scores{scratch.scores, y};
      const T* const panel = panels + strip.begin * p.C;
      const auto of_vectors = [&](auto vectors) {
        constexpr int VECTORS = decltype(vectors)::value;
        multiply_strip<T, VECTORS>(y_end - y, columns + y * p.Cp, p.Cp, panel, p.C, scratch.scores, STRIP<T>, rows.start + strip.begin,
                                   last);
        if constexpr (BOUNDED)
          sum_bounded<T, VECTORS, ACROSS>(scores, rows, strip, y_end, part.triangle, scratch.down, scratch.across);
        else
          sum_unbounded<T, VECTORS, ACROSS>(scores, rows, strip, y_end, part.triangle, centre, scratch.down, scratch.across);
      };
      if (rows.vectors(n) == 2)
        of_vectors(std::integral_constant<int, 2>{});
      else
        of_vectors(std::integral_constant<int, 1>{});
    }
    if (ACROSS) add_across(scratch.across, y_end - y, room.sums, y);
  }
}

}  // namespace
