# SPDX-License-Identifier: MIT
"""The CUDA kernels of `contrastive` that sort rows by class, run by the emulator, against the same in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels.ops._contrastive_plan import crossing_plan, pairs_plan, plan_in_torch, plan_sizes

from .emulator.build import SEEDS, load, missing_tools, poisoned

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

LAYOUTS: list[tuple[tuple[int, int, int], tuple[int, int, int], bool]] = [
    ((0, 0, 0), (1, 1, 1), False),
    ((1, 4, 4), (1, 1, 1), True),
    ((2, 3, 20), (1, 1, 1), False),
    ((0, 0, 0), (1, 3, 3), False),
    ((2, 4, 9), (2, 1, 3), False),
]
SHAPES = [(3, 1, 9, 10), (2, 3, 4, 5), (1, 1, 1, 1), (4, 1, 33, 31), (0, 1, 4, 4), (2, 1, 0, 4)]
ROLES: list[tuple[int | None, int | None]] = [(0, None), (None, None), (0, -1), (None, 1), (3, 3)]
LARGEST = 2048
"""Rows that one block sorts."""


def run(labels: Tensor, *arguments: Any, seeds: Sequence[int] = (1,)) -> None:
    """plan() over the seeds against plan_in_torch(); arguments as for the latter."""
    block, stride, per_image, drop, background, ignored, form, reduction = arguments
    emulator = load("contrastive")
    R, G = plan_sizes(labels.shape, block, stride, per_image, drop)
    expected = plan_in_torch(labels, *arguments)
    for seed in seeds:
        emulator.configure(seed=seed)
        order, groups = np.full(R, -7, np.int64), np.full((G, 6), -7, np.int32)
        ranges, weights = np.full((R, 3), -7, np.int32), poisoned(R, np.float64)
        given = ([] if value is None else [value] for value in (background, ignored))
        emulator.plan(
            labels.numpy(), list(block), list(stride), per_image, drop, *given, form, reduction,
            order, groups, ranges, weights,
        )  # fmt: skip
        for one, two in zip((order, groups, ranges), expected, strict=False):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(weights, expected[3], rtol=1e-14, atol=0)


def drawn(shape: Sequence[int], low: int = -1, high: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(low, high, tuple(shape), generator=torch.Generator().manual_seed(seed))


class TestPlan:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("per_image", [False, True])
    @pytest.mark.parametrize(("block", "stride", "drop"), LAYOUTS)
    def test_layouts(self, shape: tuple[int, ...], per_image: bool, block: Any, stride: Any, drop: bool) -> None:
        for roles, form, reduction in zip(ROLES, (0, 2, 3, 0, 0), (0, 1, 2, 1, 2), strict=True):
            run(drawn(shape), block, stride, per_image, drop, *roles, form, reduction)

    @pytest.mark.parametrize("reduction", [0, 1, 2])
    def test_threads_in_any_order(self, reduction: int) -> None:
        labels = drawn((3, 1, 20, 33))
        for block in ((0, 0, 0), (1, 8, 8)):
            run(labels, block, (1, 1, 1), False, False, 0, -1, 2, reduction, seeds=SEEDS)

    @pytest.mark.parametrize("scale", [1, 255, 256, 2**20 + 1, 2**40 + 3, 2**60])
    def test_labels_of_any_size(self, scale: int) -> None:
        labels = drawn((2, 1, 20, 30), -4, 4) * scale
        run(labels, (0, 0, 0), (1, 1, 1), False, False, 0, -scale, 0, 0)
        run(labels + 7, (1, 7, 7), (1, 1, 1), False, False, None, None, 0, 1)

    def test_labels_at_both_ends_of_64_bits(self) -> None:
        ends = torch.tensor([-(2**63), 2**63 - 1, 0, -(2**63) + 1, 5, 2**63 - 2])
        labels = ends[drawn((2, 1, 20, 30), 0, 6)]
        for background, ignored in ((0, None), (None, 5), (0, 5), (2**63 - 1, -(2**63)), (-(2**63), 0)):
            run(labels, (0, 0, 0), (1, 1, 1), False, False, background, ignored, 0, 0)

    def test_every_row_a_class_or_all_one(self) -> None:
        places = torch.arange(1500).view(1, 1, 30, 50)
        for labels in (places, places.flip(3), places % 750, torch.zeros_like(places)):
            run(labels, (0, 0, 0), (1, 1, 1), False, False, None, None, 2, 1)
            run(labels, (0, 0, 0), (1, 1, 1), False, False, 0, None, 0, 1)

    @pytest.mark.parametrize("rows", [LARGEST - 1, LARGEST, LARGEST + 1, 3 * LARGEST, 3 * LARGEST + 700])
    @pytest.mark.parametrize("classes", [1, 3, 10**6])
    def test_groups_of_several_blocks(self, rows: int, classes: int) -> None:
        labels = drawn((rows, 1, 1, 1), 0, classes)
        for roles, form, reduction in (((None, None), 0, 1), ((0, 1), 3, 0)):
            run(labels, (0, 0, 0), (1, 1, 1), False, False, *roles, form, reduction)

    def test_large_groups_of_different_sizes(self) -> None:
        labels = drawn((3, 2, 40, 50))
        labels[:, :, :32, :32] = 0
        for per_image in (False, True):
            run(labels, (0, 32, 32), (1, 1, 1), per_image, False, 0, 3, 2, 2, seeds=SEEDS[:2])


class TestViews:
    @pytest.mark.parametrize("count", [0, 1, 3, 300])
    def test_pairs_and_crossing(self, count: int) -> None:
        emulator = load("contrastive")
        device = torch.device("cpu")
        for crossing, symmetric in ((False, True), (True, True), (True, False)):
            expected = crossing_plan(count, symmetric, device) if crossing else pairs_plan(count, device)
            order, ranges = np.full(2 * count, -7, np.int64), np.full((2 * count, 3), -7, np.int32)
            groups, weights = np.full((1 + crossing, 6), -7, np.int32), poisoned(2 * count, np.float64)
            emulator.views(count, crossing, symmetric, order, groups, ranges, weights)
            for one, two in zip((order, groups, ranges, weights), expected, strict=True):
                np.testing.assert_array_equal(one, two)
