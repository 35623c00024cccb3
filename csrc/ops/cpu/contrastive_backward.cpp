// SPDX-License-Identifier: MIT
// Contrastive losses on the CPU, backward. The equations stand in ops/contrastive.h, the order of work in ops/contrastive_schedule.h.
//
// A block of scores [48 columns, 128 rows] is computed again, becomes H where it lies, and is multiplied by the vectors of either side while it is in
// L1: df_x += H^T f_y and, with one set of vectors, df_y += H f_x. With a bound H is one exponential of the score, times a sum of two
// numbers that belong to row and column; without it there is one exponential for each of the two losses that a pair belongs to.
// Limit at A anchors among S vectors of length C: (A S - A^2 / 2) pairs, each 6 C flop and one exponential; with two sets A M pairs of 4 C.

#include "common/exponentials.h"
#include "ops/cpu/contrastive_tile.h"

namespace {

template <class T>
constexpr int64_t H_STRIDE = X_ROWS + STRIP<T>;  // no power of two: a strip's lines spread over all of L1

// Derivatives by the statistics of vectors, over the temperature. With a bound p and n are multiplied by exp(bound - statistic), so that H is
// p 2^s; without it by exp(top - statistic), and the tops stand beside them, infinite where there is nothing to weigh: H is p 2^(s - top),
// a difference without rounding where it matters.
template <class T>
struct Coefficients {
  T *p, *n, *linear, *p_top, *n_top;

  static Coefficients take(int64_t count, bool bounded, Arena& arena) {
    Coefficients c{};
    count += STRIP<T>;  // whole strips are read
    c.p = arena.take<T>(count), c.n = arena.take<T>(count), c.linear = arena.take<T>(count);
    if (!bounded) c.p_top = arena.take<T>(count), c.n_top = arena.take<T>(count);
    return c;
  }

  bool any(int64_t begin, int64_t end) const {
    for (const T* values : {p, n, linear})
      for (int64_t i = begin; i < end; ++i)
        if (!(values[i] == T(0))) return true;
    return false;
  }
};

template <class T>
struct BackwardRoom {
  Coefficients<T> rows, columns;
  T* panels;

  BackwardRoom(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, Arena& arena) : rows{}, columns{} {
    if (b.row_statistics) rows = Coefficients<T>::take(b.R, b.bounded, arena);
    if (b.one_set)
      columns = rows;
    else if (b.column_statistics)
      columns = Coefficients<T>::take(b.M, b.bounded, arena);
    panels = arena.take<T>(schedule.panel_rows * b.C);
  }
};

template <class T>
struct BackwardScratch {
  Rows<T> rows;
  T *scores, *x_columns, *y_columns;

  BackwardScratch(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, Arena& arena)
      : rows(Rows<T>::take(schedule.most_x, arena)),
        scores(arena.take<T>(Y_ROWS * H_STRIDE<T>)),
        x_columns(arena.take<T>(b.one_set ? schedule.most_x * b.Cp : 0)),
        y_columns(arena.take<T>(Y_ROWS * b.Cp)) {}
};

// ---------------------------------------------------------------------------------------------------------- coefficients

// weight 2^above exp(-log_sum), 0 where the weight is.
template <class T>
PK_INLINE Vec<T> weighed(Vec<T> weight, Vec<T> log_sum, Vec<T> above) {
  const Vec<T> x = above - log_sum * static_cast<T>(LOG2_E), down = exp2_nonpositive(x > T(0) ? -x : x);
  const Vec<T> value = x > T(0) ? weight / down : weight * down;
  return weight == T(0) ? Vec<T>{} : value;
}

template <class T>
void prepare_range(const ContrastiveBackward& b, const T* statistics, const T* derivatives, int64_t count, const Coefficients<T>& out,
                   int64_t first, int64_t last) {
  const T scale = static_cast<T>(1 / b.temperature), bound = bound_of<T>(b);
  for (int64_t i = first; i < last; i += LANES<T>) {
    T in[7][LANES<T>];  // p, n and the three derivatives, the tops of p and n
    const int64_t lanes = std::min<int64_t>(LANES<T>, last - i);
    for (int k = 0; k < 7; ++k) {
      std::fill(in[k], in[k] + LANES<T>, T(0));
      const bool derivative = k >= 2 && k < 5;
      std::copy_n((derivative ? derivatives : statistics) + (k < 2 ? k : k - 2) * count + i, lanes, in[k]);
    }
    const Vec<T> p_top = load(in[5]), n_top = load(in[6]);
    const Vec<T> p = load(in[0]), n = load(in[1]), dp = load(in[2]) * scale, dn = load(in[3]) * scale;
    T result[5][LANES<T>];
    store(result[0], weighed<T>(dp, p, b.bounded ? bound - p_top : Vec<T>{}));
    store(result[1], weighed<T>(dn, n, b.bounded ? bound - n_top : Vec<T>{}));
    store(result[2], load(in[4]) * scale);
    store(result[3], dp == T(0) ? broadcast(-LEAST<T>) : p_top);
    store(result[4], dn == T(0) ? broadcast(-LEAST<T>) : n_top);
    std::copy_n(result[0], lanes, out.p + i), std::copy_n(result[1], lanes, out.n + i), std::copy_n(result[2], lanes, out.linear + i);
    if (!b.bounded) std::copy_n(result[3], lanes, out.p_top + i), std::copy_n(result[4], lanes, out.n_top + i);
  }
}

template <class T>
void prepare_columns(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, void* workspace, int64_t first, int64_t last) {
  Arena shared(workspace);
  const BackwardRoom<T> room(b, schedule, shared);
  prepare_range(b, static_cast<const T*>(b.column_statistics), static_cast<const T*>(b.column_coefficients), b.M, room.columns, first,
                last);
}

// --------------------------------------------------------------------------------------------------------- H of a strip

// Whose losses count in a part.
template <bool BOUNDED_SCORES, bool OF_ROWS, bool OF_COLUMNS>
struct Losses {
  static constexpr bool BOUNDED = BOUNDED_SCORES, ROWS = OF_ROWS, COLUMNS = OF_COLUMNS;
};

// Lanes past the strip's last row may hold what another part is writing just now: H of these lanes is stored and never read.
template <class T, int VECTORS>
struct StripCoefficients {
  Vec<T> weight[VECTORS], top[VECTORS];

  PK_INLINE StripCoefficients of(const T* weights, const T* tops, int64_t x) {
    StripCoefficients c{};
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      if (weights) c.weight[v] = load(weights + x + v * LANES<T>);
      if (tops) c.top[v] = load(tops + x + v * LANES<T>);
    }
    return c;
  }
};

// Sum over the losses of both.
template <class T, class L>
PK_INLINE Vec<T> weight_of(Vec<T> s, Vec<T> x_weight, Vec<T> x_top, T y_weight, T y_top) {
  if constexpr (L::BOUNDED)
    return exp2_nonpositive(s) * (L::ROWS && L::COLUMNS ? x_weight + y_weight : L::ROWS ? x_weight : broadcast(y_weight));
  Vec<T> h{};
  if (L::ROWS) h += x_weight * exp2_nonpositive(s - x_top);
  if (L::COLUMNS) h += y_weight * exp2_nonpositive(s - y_top);
  return h;
}

// Scores [columns, VECTORS lanes] become H.
template <class T, class L, int VECTORS>
PK_INLINE void scores_to_h(T* scores, int32_t y_begin, int32_t y_end, const Rows<T>& rows, const Strip& strip, bool triangle, int64_t row,
                           const Coefficients<T>& cx, const Coefficients<T>& cy) {
  using X = StripCoefficients<T, VECTORS>;
  const auto at = [](const T* values, int32_t y) { return L::COLUMNS && values ? values[y] : T(0); };
  for_meetings(strip, y_begin, y_end, triangle, [&](Meeting meeting, int32_t begin, int32_t end) {
    if (meeting == Meeting::other) {
      const X n = X::of(cx.n, cx.n_top, row);
      for (int32_t y = begin; y < end; ++y) {
        T* const s = scores + (y - y_begin) * H_STRIDE<T>;
        const T weight = at(cy.n, y), top = at(cy.n_top, y);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
          store(s + v * LANES<T>, weight_of<T, L>(load(s + v * LANES<T>), n.weight[v], n.top[v], weight, top));
      }
    } else if (meeting == Meeting::none) {
      for (int32_t y = begin; y < end; ++y)
        for (int v = 0; v < VECTORS; ++v) store(scores + (y - y_begin) * H_STRIDE<T> + v * LANES<T>, Vec<T>{});
    } else {
      const X p = X::of(cx.p, cx.p_top, row), n = X::of(cx.n, cx.n_top, row), linear = X::of(cx.linear, nullptr, row);
      for (int32_t y = begin; y < end; ++y)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          T* const s = scores + (y - y_begin) * H_STRIDE<T> + v * LANES<T>;
          const Vec<T> x = load(s), same = weight_of<T, L>(x, p.weight[v], p.top[v], at(cy.p, y), at(cy.p_top, y)) +
                                           (linear.weight[v] + at(cy.linear, y));
          if (meeting == Meeting::same) {
            store(s, same);
            continue;
          }
          const Masks<T> mask = masks(rows, strip.begin + v * LANES<T>, y, triangle);
          const Vec<T> other = weight_of<T, L>(x, n.weight[v], n.top[v], at(cy.n, y), at(cy.n_top, y));
          store(s, keep<T>(mask.same, same, 0) + keep<T>(mask.other, other, 0));
        }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------- a part

template <class T, class L>
void apply_part(const ContrastiveBackward& b, const ContrastivePart& part, const T* panels, const BackwardRoom<T>& room,
                const BackwardScratch<T>& scratch) {
  const T last = Scale<T>::of(b).last;
  const T *const f_rows = static_cast<const T*>(b.rows), *const f_columns = static_cast<const T*>(b.columns);
  T* const gradient = static_cast<T*>(b.grad_rows);
  const Rows<T>& rows = scratch.rows;
  const bool both = part.triangle || part.y_block >= 0;
  Columns<T> x_vectors{};
  if (both) x_vectors = Columns<T>::of(f_rows + part.x_begin * b.Cp, rows.count, b.Cp, scratch.x_columns);
  const int64_t length = part.y_end - part.y_begin, blocks = (length + Y_ROWS - 1) / Y_ROWS;
  for (int64_t k = 0; k < blocks; ++k) {
    const int32_t y = static_cast<int32_t>(part.y_begin + length * k / blocks),
                  y_end = static_cast<int32_t>(part.y_begin + length * (k + 1) / blocks);
    const int64_t columns = y_end - y, limit = part.triangle ? std::min<int64_t>(rows.count, y_end - 1 - part.x_begin) : rows.count;
    const bool y_counts = L::COLUMNS && room.columns.any(y, y_end);
    const Columns<T> y_vectors = Columns<T>::of(f_columns + y * b.Cp, columns, b.Cp, scratch.y_columns);
    for (int64_t x = 0; x < limit; x += X_ROWS) {
      const int64_t count = std::min(limit - x, X_ROWS);
      if (!y_counts && !(L::ROWS && room.rows.any(part.x_begin + x, part.x_begin + x + count))) continue;
      for (int64_t n = x / STRIP<T>; n * STRIP<T> < x + count; ++n) {
        const Strip& strip = rows.strips[n];
        T* const scores = scratch.scores + strip.begin - x;
        const auto of_vectors = [&](auto vectors) {
          constexpr int VECTORS = decltype(vectors)::value;
          multiply_strip<T, VECTORS>(columns, f_columns + y * b.Cp, b.Cp, panels + strip.begin * b.C, b.C, scores, H_STRIDE<T>,
                                     rows.start + strip.begin, last);
          scores_to_h<T, L, VECTORS>(scores, y, y_end, rows, strip, part.triangle, part.x_begin + strip.begin, room.rows, room.columns);
        };
        if (rows.vectors(n) == 2)
          of_vectors(std::integral_constant<int, 2>{});
        else
          of_vectors(std::integral_constant<int, 1>{});
      }
      accumulate<T, Order::columns>(count, scratch.scores, H_STRIDE<T>, y_vectors, 0, columns, b.Cp, gradient + (part.x_begin + x) * b.Cp);
      if (both) accumulate<T, Order::rows>(columns, scratch.scores, H_STRIDE<T>, x_vectors, x, count, b.Cp, gradient + y * b.Cp);
    }
  }
}

template <class T, bool BOUNDED>
void apply_losses(const ContrastiveBackward& b, const ContrastivePart& part, const T* panels, const BackwardRoom<T>& room,
                  const BackwardScratch<T>& scratch) {
  const ContrastiveGroup& group = b.groups[part.group];
  const bool of_rows = b.row_statistics && part.x_begin < group.row_anchor_end;
  const bool of_columns = b.column_statistics && part.y_begin < group.column_anchor_end;
  if (of_rows && of_columns)
    apply_part<T, Losses<BOUNDED, true, true>>(b, part, panels, room, scratch);
  else if (of_rows)
    apply_part<T, Losses<BOUNDED, true, false>>(b, part, panels, room, scratch);
  else
    apply_part<T, Losses<BOUNDED, false, true>>(b, part, panels, room, scratch);
}

template <class T>
void backward_part(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, const ContrastivePart& part, void* workspace,
                   void* scratch_memory) {
  Arena shared(workspace), own(scratch_memory);
  const BackwardRoom<T> room(b, schedule, shared);
  BackwardScratch<T> scratch(b, schedule, own);
  T* const panels = room.panels + schedule.panels[part.x_block] * b.C;
  T* const gradient = static_cast<T*>(b.grad_rows);
  const auto prepare_rows = [&](int64_t begin, int64_t end) {
    prepare_range(b, static_cast<const T*>(b.row_statistics), static_cast<const T*>(b.row_coefficients), b.R, room.rows, begin, end);
  };
  if (part.x_turn == 0) {
    pack_strips(static_cast<const T*>(b.rows) + part.x_begin * b.Cp, part.x_end - part.x_begin, b.C, b.Cp, Scale<T>::of(b).panels, panels);
    std::fill(gradient + part.x_begin * b.Cp, gradient + part.x_end * b.Cp, T(0));
    if (b.row_statistics) prepare_rows(part.x_begin, part.x_end);
  }
  if (part.y_block >= 0 && part.y_turn == 0) {
    std::fill(gradient + part.y_begin * b.Cp, gradient + part.y_end * b.Cp, T(0));
    if (part.y_group != part.group && b.row_statistics) prepare_rows(part.y_begin, part.y_end);
  }
  scratch.rows.read(part, b.ranges, b.bounded ? bound_of<T>(b) : T(0));
  b.bounded ? apply_losses<T, true>(b, part, panels, room, scratch) : apply_losses<T, false>(b, part, panels, room, scratch);
}

// ----------------------------------------------------------------------------------------------------------------- table

ContrastiveBytes bytes(const ContrastiveBackward& b, const ContrastiveSchedule& schedule) {
  Arena shared(nullptr), own(nullptr);
  if (b.double_compute)
    BackwardRoom<double>(b, schedule, shared), BackwardScratch<double>(b, schedule, own);
  else
    BackwardRoom<float>(b, schedule, shared), BackwardScratch<float>(b, schedule, own);
  return {shared.bytes(), own.bytes()};
}

void prepare(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, void* workspace, int64_t first, int64_t last) {
  b.double_compute ? prepare_columns<double>(b, schedule, workspace, first, last)
                   : prepare_columns<float>(b, schedule, workspace, first, last);
}

void backward_any(const ContrastiveBackward& b, const ContrastiveSchedule& schedule, const ContrastivePart& part, void* workspace,
                  void* scratch) {
  [[maybe_unused]] const FlushToZero flush;  // weights far below 1 meet small coordinates
  b.double_compute ? backward_part<double>(b, schedule, part, workspace, scratch)
                   : backward_part<float>(b, schedule, part, workspace, scratch);
}

}  // namespace

namespace protokernels {

extern const ContrastiveBackwardCpu PK_LEVEL_TABLE(contrastive_backward_cpu);
const ContrastiveBackwardCpu PK_LEVEL_TABLE(contrastive_backward_cpu) = {bytes, prepare, backward_any};

}  // namespace protokernels
