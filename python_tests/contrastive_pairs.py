# SPDX-License-Identifier: MIT
"""Contrastive problems as the kernels take them, and their losses and gradients as sums over all pairs in float64.

The oracle rounds the vectors as the tensor cores do (16-bit floats where scores are bounded, else tf32 and bf16), so that every
precision is held to float32 accuracy in what follows the rounding. `SCORE` bounds the error of a score of vectors x and y by
SCORE * sum |x_c y_c| / temperature: three products of parts lose 2^-22 of a product, the sum of up to 257 products some units of
2^-24.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .emulator.build import poisoned

Array = np.ndarray[Any, Any]
FORMS = ("supcon", "in", "paper", "negout")
PRECISIONS = ("highest", "high", "medium")
SCORE = {"f32": 2.0**-19, "f64": 2.0**-48}
TYPES = {"f32": np.float32, "f64": np.float64}


def as_tf32(values: Array) -> Array:
    fraction, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.sign(fraction) * np.floor(np.abs(fraction) * 2048 + 0.5), exponent - 11)


def as_bf16(values: Array) -> Array:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().double().numpy()


def as_half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float64)


ROUNDED = {"highest": lambda x: x.astype(np.float64), "high": as_tf32, "medium": as_bf16}
ROUNDING = {"highest": 2.0**-22, "high": 2.0**-11, "medium": 2.0**-8}
"""Relative error of a number on its way into the tensor cores; 16-bit floats have 11 significant bits, as tf32."""


@dataclass
class Group:
    """Sizes of the classes with anchors, of the background behind them, and of the ignored rows behind that."""

    classes: list[int]
    background: int = 0
    ignored: int = 0


@dataclass
class Problem:
    """Vectors with their groups, as the kernels take them, and what the oracle makes of them."""

    groups: list[Group]
    C: int = 16
    temperature: float = 0.1
    form: str = "supcon"
    precision: str = "highest"
    kind: str = "f32"
    unit: bool = True
    scale: float = 1.0
    columns_of: list[Group] | None = None
    before: int = 0
    """Ignored rows before the first group."""
    seed: int = 0
    rows: Array = field(init=False)
    columns: Array | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        dtype = TYPES[self.kind]

        def draw(groups: list[Group], before: int) -> Array:
            count = before + sum(sum(g.classes) + g.background + g.ignored for g in groups)
            x = self.scale * generator.standard_normal((count, self.C))
            if self.unit:
                x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            return np.pad(x, ((0, 0), (0, -self.C % 16))).astype(dtype)

        self.rows = draw(self.groups, self.before)
        self.row_places = self._places(self.groups, self.before)
        self.column_places = self.row_places
        if self.columns_of is not None:
            self.columns = draw(self.columns_of, 0)
            self.column_places = self._places(self.columns_of, 0)
        R = len(self.rows)
        self.weights = generator.random(R)
        self.grad_losses = generator.standard_normal(R).astype(dtype)
        self.group_table = np.array(
            [(*r[:3], *c[:3]) for r, c in zip(self.row_places, self.column_places, strict=True)], np.int32
        ).reshape(-1, 6)
        self.ranges = np.tile(np.array([0, 0, -1], np.int32), (R, 1))
        for (_, _, _, of_rows), (_, _, _, of_columns) in zip(self.row_places, self.column_places, strict=True):
            for (begin, end), of_column in zip(of_rows, of_columns, strict=True):
                self.ranges[begin:end, :2] = of_column
                if self.columns is None:
                    self.ranges[begin:end, 2] = np.arange(begin, end)

    @staticmethod
    def _places(groups: list[Group], begin: int) -> list[tuple[int, int, int, list[tuple[int, int]]]]:
        places = []
        for group in groups:
            ends = begin + np.cumsum([0, *group.classes, group.background])
            classes = [(int(a), int(b)) for a, b in pairwise(ends)]
            places.append((begin, int(ends[-2]), int(ends[-1]), classes))
            begin = int(ends[-1]) + group.ignored
        return places

    @property
    def bounded(self) -> bool:
        return self.unit and 2 / self.temperature < 80

    @property
    def options(self) -> tuple[Any, ...]:
        return self.C, self.temperature, self.bounded

    def rounded(self, vectors: Array) -> Array:
        """As the tensor cores see them."""
        if self.bounded and self.precision != "highest":
            return as_half(vectors)
        return np.asarray(ROUNDED[self.precision](vectors))

    # -------------------------------------------------------------------------------------------- oracle

    def pairs(self) -> tuple[Array, Array, Array, Array, Array]:
        """Scores and the sum of their products' magnitudes, who is a positive and who a negative, who may be an anchor."""
        x = self.rounded(self.rows)
        y = x if self.columns is None else self.rounded(self.columns)
        scores, size = x @ y.T / self.temperature, np.abs(x) @ np.abs(y).T / self.temperature
        positive, negative = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
        anchors = np.zeros(len(x), bool)
        for row_begin, anchor_end, row_end, column_begin, _, column_end in self.group_table:
            anchors[row_begin:anchor_end] = True
            for i in range(row_begin, row_end):
                begin, end, own = self.ranges[i]
                negative[i, column_begin:column_end] = True
                positive[i, begin:end], negative[i, begin:end] = True, False
                if own >= 0:
                    positive[i, own] = negative[i, own] = False
        return scores, size, positive, negative, anchors

    def answer(self) -> dict[str, Array]:
        """Statistics, losses, total; and of every row the largest error of a score."""
        scores, size, positive, negative, may = self.pairs()
        P, N = positive.sum(1), negative.sum(1)
        anchors = may & (P > 0) & ((N > 0) | (self.form in ("supcon", "in")))
        p, n = log_sum(scores, positive), log_sum(scores, negative)
        linear = np.where(positive, scores, 0).sum(1)
        count = np.maximum(P, 1)
        with np.errstate(invalid="ignore"):
            losses = {
                "supcon": np.logaddexp(p, n) - linear / count,
                "in": np.logaddexp(p, n) - p + np.log(count),
                "paper": (n - p) / count,
                "negout": n - linear / count,
            }[self.form]
        losses = np.where(anchors, losses, 0)
        statistics = np.stack([np.where(may, p, -np.inf), np.where(may, n, -np.inf), np.where(may, linear, 0)])
        error = SCORE[self.kind] * np.where(positive | negative, size, 0).max(1, initial=0)
        return {
            "losses": losses,
            "statistics": statistics,
            "total": np.array([(losses * self.weights).sum()]),
            "error": error + SCORE[self.kind],
            "positives": P,
        }

    # ------------------------------------------------------------------------------------------ emulator

    def empty(self, *shape: int) -> Array:
        return poisoned(shape, TYPES[self.kind])

    def forward(self, emulator: Any, weights: bool = True) -> dict[str, Array]:
        R = len(self.rows)
        out = {"losses": self.empty(R), "statistics": self.empty(3, R), "total": self.empty(1)}
        getattr(emulator, f"forward_{self.kind}")(
            *(self.rows, self.columns, self.group_table, self.ranges, self.weights if weights else None),
            *self.options, FORMS.index(self.form), PRECISIONS.index(self.precision), *out.values(),
        )  # fmt: skip
        return out

    def check_forward(self, out: dict[str, Array]) -> None:
        expected = self.answer()
        error, count = expected["error"], np.maximum(expected["positives"], 1)
        close(out["statistics"][0], expected["statistics"][0], error, "p")
        close(out["statistics"][1], expected["statistics"][1], error, "n")
        close(out["statistics"][2], expected["statistics"][2], error * count, "l")
        of_loss = 3 * error + SCORE[self.kind] * (np.abs(expected["losses"]) + 1)
        close(out["losses"], expected["losses"], of_loss, "losses")
        close(out["total"], expected["total"], (of_loss * self.weights).sum() + 1e-30, "total")

    def coefficients(self, emulator: Any, statistics: Array) -> Array:
        out = self.empty(3, len(self.rows))
        getattr(emulator, f"coefficients_{self.kind}")(
            self.grad_losses, statistics, self.group_table, self.ranges, FORMS.index(self.form), out
        )
        return out

    def backward(self, emulator: Any, own: Losses | None, others: Losses | None = None) -> Array:
        """The gradient of the rows, from the losses of the rows and, with two sets, of the columns."""
        out = self.empty(*self.rows.shape)
        getattr(emulator, f"backward_{self.kind}")(
            *(self.rows, self.columns, self.group_table, self.ranges, *(own or (None, None)), *(others or (None, None))),
            *self.options, PRECISIONS.index(self.precision), out,
        )  # fmt: skip
        return out

    def losses(self, emulator: Any) -> Losses:
        statistics = self.forward(emulator)["statistics"]
        return statistics, self.coefficients(emulator, statistics)

    def exchanged(self) -> Problem:
        """The columns as rows, with losses of their own."""
        assert self.columns is not None and self.columns_of is not None
        other = replace(self, groups=self.columns_of, columns_of=self.groups, seed=self.seed + 1)
        other.rows, other.columns = self.columns, self.rows
        return other


Losses = tuple[Array, Array]


def loss_gradient(problem: Problem) -> tuple[Array, Array, Array]:
    """The derivative of the losses by the scores, [R, M]; the size of its terms; the error that scores bring into them."""
    scores, _, positive, negative, may = problem.pairs()
    answer = problem.answer()
    P, N = positive.sum(1, keepdims=True), negative.sum(1, keepdims=True)
    anchors = may[:, None] & (P > 0) & ((N > 0) | (problem.form in ("supcon", "in")))

    def softmax(mask: Array) -> Array:
        log = log_sum(scores, mask)[:, None]
        return np.exp(np.where(mask, scores - np.where(np.isfinite(log), log, 0), -np.inf))

    of_all, of_p, of_n = softmax(positive | negative), softmax(positive), softmax(negative)
    count = np.maximum(P, 1)
    plus, minus = {
        "supcon": (of_all, positive / count),
        "in": (of_all, of_p),
        "paper": (of_n / count, of_p / count),
        "negout": (of_n, positive / count),
    }[problem.form]
    upstream = np.where(anchors, problem.grad_losses[:, None].astype(np.float64), 0)
    size = np.abs(upstream) * (plus + minus)
    return upstream * (plus - minus), size, size * 4 * answer["error"][:, None]


def check_gradient(problem: Problem, actual: Array, own: Problem | None, others: Problem | None) -> None:
    """Against the losses of the rows, of the columns, or of both."""
    shape = (len(problem.rows), len(problem.rows if problem.columns is None else problem.columns))
    total, size, error = (np.zeros(shape) for _ in range(3))
    for part, turned in ((own, False), (others, True)):
        if part is not None:
            for target, value in zip((total, size, error), loss_gradient(part), strict=True):
                target += value.T if turned else value
    y = problem.rounded(problem.rows if problem.columns is None else problem.columns)
    expected = total @ y / problem.temperature
    rounding = SCORE[problem.kind] + (ROUNDING[problem.precision] if problem.kind == "f32" else 0)
    if (
        problem.bounded and problem.kind == "f32"
    ):  # weights of pairs as 16-bit floats: beside the largest, what is below 2^-37 of it
        parts = [part for part in (own, others) if part is not None]
        largest = max((float(np.abs(part.grad_losses).max(initial=0)) for part in parts), default=0.0)
        error += np.where(size > 0, 2.0**-37 * 2 * largest, 0)
    tolerance = (error + size * rounding) @ np.abs(y) / problem.temperature
    assert (actual[tolerance == 0] == 0).all()
    smallest = 1e-30 if problem.kind == "f32" else 1e-300  # weights of a pair below 2^-126 are lost
    close(actual, expected, tolerance + smallest, "grad_rows")


def log_sum(scores: Array, mask: Array) -> Array:
    masked = np.where(mask, scores, -np.inf)
    top = masked.max(1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.exp(masked - shift[:, None]).sum(1))


def close(actual: Array, expected: Array, tolerance: Array, name: str) -> None:
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite], err_msg=name)
    excess = np.abs(actual[~infinite] - expected[~infinite]) / np.broadcast_to(tolerance, expected.shape)[~infinite]
    assert (excess <= 1).all(), f"{name}: {excess.max():.3g} times the tolerance"  # a NaN fails


SOME = [
    Group([9, 1, 14], 12),
    Group([], 5),
    Group([2], 0, ignored=3),
    Group([3, 30], 0),
    Group([], 0),
    Group([1, 1], 2),
]
"""Several classes, none, one; a class of one; ignored rows, no background, an empty group."""
