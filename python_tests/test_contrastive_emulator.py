# SPDX-License-Identifier: MIT
"""The CUDA kernels of `contrastive`, run on the CPU by the emulator and compared with sums over all pairs in float64.

The oracle rounds the vectors as the tensor cores do (tf32, bf16), so that every precision is held to float32 accuracy in
what follows the rounding. `SCORE` bounds the error of a score of vectors x and y by SCORE * sum |x_c y_c| / temperature:
three tf32 products lose 2^-22 of a product, the sum of up to 130 products some units of 2^-24.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from .emulator.build import SEEDS, load, missing_tools, poisoned

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

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


ROUNDED = {"highest": lambda x: x.astype(np.float64), "high": as_tf32, "medium": as_bf16}
ROUNDING = {"highest": 2.0**-22, "high": 2.0**-11, "medium": 2.0**-9}
"""Relative error of a number on its way into the tensor cores."""


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
            classes = [(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
            places.append((begin, int(ends[-2]), int(ends[-1]), classes))
            begin = int(ends[-1]) + group.ignored
        return places

    @property
    def bounded(self) -> bool:
        return self.unit and 2 / self.temperature < 80

    @property
    def options(self) -> tuple[Any, ...]:
        return self.C, self.temperature, self.bounded

    # -------------------------------------------------------------------------------------------- oracle

    def pairs(self) -> tuple[Array, Array, Array, Array, Array]:
        """Scores and the sum of their products' magnitudes, who is a positive and who a negative, who may be an anchor."""
        x = ROUNDED[self.precision](self.rows)
        y = x if self.columns is None else ROUNDED[self.precision](self.columns)
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


class TestForward:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("kind", TYPES)
    def test_several_groups(self, kind: str, form: str) -> None:
        emulator = load("contrastive")
        problem = Problem(SOME, C=20, form=form, kind=kind, before=3)
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(problem.forward(emulator))
        problem.check_forward(results[0])
        for other in results[1:]:
            for name, value in other.items():
                np.testing.assert_array_equal(value, results[0][name], err_msg=name)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("unit", [True, False])
    @pytest.mark.parametrize("C", [1, 16, 20, 130])
    def test_lengths_and_precisions(self, C: int, unit: bool, precision: str) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=1)
        problem = Problem([Group([40, 33], 20)], C=C, unit=unit, precision=precision, form="in")
        problem.check_forward(problem.forward(emulator))

    @pytest.mark.parametrize("rows", [1, 2, 31, 33, 129])
    def test_odd_sizes(self, rows: int) -> None:
        emulator = load("contrastive")
        emulator.configure(seed=2)
        for groups in ([Group([rows])], [Group([rows // 2, rows - rows // 2], 70)]):
            problem = Problem(groups, form="paper" if rows % 2 else "negout")
            problem.check_forward(problem.forward(emulator))
