# SPDX-License-Identifier: MIT
"""Which vectors meet which: the sorting in torch against the groups of the reference, and the native ones against that in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels.ops._contrastive_plan import Plan, crossing_plan, pairs_plan, plan_in_torch, plan_sizes
from protokernels.reference import contrastive as reference
from python_tests.places import needs_gpu, needs_native

LAYOUTS: list[tuple[tuple[int, int, int], tuple[int, int, int], bool]] = [
    ((0, 0, 0), (1, 1, 1), False),
    ((1, 4, 4), (1, 1, 1), False),
    ((1, 4, 4), (1, 1, 1), True),
    ((2, 3, 20), (1, 1, 1), False),
    ((2, 3, 20), (1, 1, 1), True),
    ((0, 0, 0), (1, 3, 3), False),
    ((0, 0, 0), (2, 1, 30), False),
]
SHAPES = [(3, 1, 9, 10), (2, 3, 4, 5), (1, 1, 1, 1), (4, 1, 33, 31), (0, 1, 4, 4), (2, 1, 0, 4)]
ROLES: list[tuple[int | None, int | None]] = [(0, None), (None, None), (0, -1), (None, 1), (5, 5)]


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


def compare(labels: Tensor, *arguments: Any, device: str) -> None:
    """contrastive_plan on the device against plan_in_torch."""
    expected = plan_in_torch(labels, *arguments)
    actual = [one.cpu() for one in torch.ops.protokernels.contrastive_plan(labels.to(device), *arguments)]
    for one, two in zip(actual[:3], expected[:3], strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-14, atol=0)


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-1, 4, shape, generator=torch.Generator().manual_seed(seed))


class TestValue:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("per_image", [False, True])
    @pytest.mark.parametrize(("block", "stride", "drop"), LAYOUTS)
    def test_rows_are_sorted_and_ranges_are_classes(
        self, shape: tuple[int, ...], per_image: bool, block: Any, stride: Any, drop: bool
    ) -> None:
        labels = drawn(shape)
        flat = labels.flatten()
        plan = Plan(*plan_in_torch(labels, block, stride, per_image, drop, 0, -1, 0, 0))
        members = list(reference.positions(shape, block, stride, per_image, drop, labels.device))
        assert plan_sizes(shape, block, stride, per_image, drop) == (len(plan.order), len(members))
        assert len(plan.groups) == len(members) and len(plan.order) == sum(map(len, members))
        for (begin, anchor_end, end, *columns), group in zip(plan.groups.tolist(), members, strict=True):
            assert columns == [begin, anchor_end, end]
            assert sorted(plan.order[begin:end].tolist()) == group[flat[group] != -1].tolist()
            classes = flat[plan.order[begin:end]]
            assert (classes[: anchor_end - begin] != 0).all() and (classes[anchor_end - begin :] == 0).all()
            for row in range(begin, end):
                first, last, itself = plan.ranges[row].tolist()
                assert itself == row and begin <= first <= row < last <= end
                assert last - first == (classes == classes[row - begin]).sum()
                assert (flat[plan.order[first:last]] == classes[row - begin]).all()
                assert (plan.order[first:last].diff() > 0).all()  # stable

    @pytest.mark.parametrize("reduction", ["group", "anchor", "image"])
    @pytest.mark.parametrize("form", reference.FORMS)
    def test_weights_are_those_of_the_mean(self, reduction: str, form: str) -> None:
        """The weighted sum of the losses without reduction is the reduced loss."""
        labels = drawn((3, 1, 9, 10), seed=1)
        labels[2] = 0
        features = torch.randn(3, 4, 1, 9, 10, dtype=torch.float64)
        arguments = {
            "temperature": 0.3, "block": (1, 4, 4), "stride": (1, 1, 1), "per_image": False, "drop_remainder": False,
            "background": 0, "ignore_index": -1, "form": form, "normalize": True,
        }  # fmt: skip
        losses = reference.local_contrastive_loss(features, labels, reduction="none", **arguments)  # type: ignore[arg-type]
        expected = reference.local_contrastive_loss(features, labels, reduction=reduction, **arguments)  # type: ignore[arg-type]
        number = ("group", "anchor", "image").index(reduction)
        plan = Plan(
            *plan_in_torch(labels, (1, 4, 4), (1, 1, 1), False, False, 0, -1, reference.FORMS.index(form), number)
        )
        torch.testing.assert_close((losses.flatten()[plan.order] * plan.weights).sum(), expected)
        assert plan.weights.sum().item() == pytest.approx(1)

    def test_plans_without_sorting(self) -> None:
        plan = pairs_plan(3, torch.device("cpu"))
        assert plan.order.tolist() == [0, 3, 1, 4, 2, 5]
        assert plan.ranges.tolist() == [[0, 2, 0], [0, 2, 1], [2, 4, 2], [2, 4, 3], [4, 6, 4], [4, 6, 5]]
        plan = crossing_plan(2, True, torch.device("cpu"))
        assert plan.groups.tolist() == [[0, 2, 2, 2, 4, 4], [2, 4, 4, 0, 2, 2]]
        assert plan.ranges.tolist() == [[2, 3, 0], [3, 4, 1], [0, 1, 2], [1, 2, 3]]
        assert plan.weights.tolist() == [0.25] * 4
        plan = crossing_plan(2, False, torch.device("cpu"))
        assert plan.groups.tolist() == [[0, 2, 2, 2, 2, 4], [2, 2, 4, 0, 2, 2]]
        assert plan.weights.tolist() == [0.5, 0.5, 0, 0]

    @needs_native
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("per_image", [False, True])
    @pytest.mark.parametrize(("block", "stride", "drop"), LAYOUTS)
    def test_native_equals_torch(
        self, shape: tuple[int, ...], per_image: bool, block: Any, stride: Any, drop: bool, device: str
    ) -> None:
        for labels in (drawn(shape), drawn(shape, 1) * 2**60, torch.zeros(shape, dtype=torch.int64)):
            for background, ignored in ROLES:
                for form, reduction in ((0, 0), (2, 1), (3, 2)):
                    compare(labels, block, stride, per_image, drop, background, ignored, form, reduction, device=device)

    @needs_native
    @pytest.mark.parametrize("device", DEVICES)
    def test_native_equals_torch_in_large_groups(self, device: str) -> None:
        for labels in (drawn((4, 1, 96, 96)), torch.arange(4 * 96 * 96).view(4, 1, 96, 96) % 20000):
            compare(labels, (0, 0, 0), (1, 1, 1), False, False, 0, 3, 0, 0, device=device)
            compare(labels, (1, 64, 50), (1, 1, 1), False, False, None, None, 2, 2, device=device)

    @needs_native
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("count", [0, 1, 5, 700])
    def test_native_views_equal_torch(self, count: int, device: str) -> None:
        for crossing, symmetric in ((False, True), (True, True), (True, False)):
            here = torch.device("cpu")
            expected = crossing_plan(count, symmetric, here) if crossing else pairs_plan(count, here)
            actual = torch.ops.protokernels.contrastive_views(torch.empty(0, device=device), count, crossing, symmetric)
            for one, two in zip(actual, expected, strict=True):
                assert one.dtype == two.dtype and torch.equal(one.cpu(), two)
