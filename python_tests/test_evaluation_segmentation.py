# SPDX-License-Identifier: MIT
"""Dice against counts by hand and MONAI's, Hausdorff distances against shifts that are known."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="Hausdorff distances need the extra protokernels[train]")

from protokernels.data.volumes import LabelledVolume
from protokernels.evaluation import DiceCounter, segmentation_scores
from protokernels.evaluation.segmentation import hausdorff95


def labels(seed: int, shape: tuple[int, ...] = (5, 8, 8), classes: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, shape, dtype=np.uint8)


def volume(label: np.ndarray, name: str = "v", **options: Any) -> LabelledVolume:
    return LabelledVolume(name, name, np.zeros(label.shape, np.float32), label, **options)


class TestDiceCounter:
    def test_by_hand(self) -> None:
        counter = DiceCounter(4)
        counter.add(torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]]))
        counter.add(torch.tensor([[[1, 1, 1, 0]]]), torch.tensor([[[1, 0, 0, 0]]]))
        assert counter.counts.tolist() == [[2, 2, 1, 0], [2, 5, 1, 0], [4, 2, 2, 0]]
        torch.testing.assert_close(
            counter.dice(), torch.tensor([4 / 6, 4 / 7, 2 / 3, math.nan]).double(), equal_nan=True
        )
        assert counter.mean() == pytest.approx((4 / 7 + 2 / 3) / 2)

    def test_pooled_is_not_the_mean_over_volumes(self) -> None:
        """A volume with many pixels weighs more when pooled."""
        large, small = np.ones((1, 10, 10), np.uint8), np.zeros((1, 10, 10), np.uint8)
        small[0, 0, 0] = 1
        scores = segmentation_scores(
            [large, np.zeros_like(small)], [volume(large, "a"), volume(small, "b")], class_names=("x", "y")
        )
        assert scores["pooled_dice"]["mean"] == pytest.approx(200 / 201)
        assert scores["volume_dice"]["mean"] == pytest.approx(0.5)

    def test_as_monai_counts(self) -> None:
        from monai.metrics.meandice import compute_dice
        from monai.networks.utils import one_hot

        one, two = (torch.from_numpy(labels(seed).astype(np.int64)) for seed in (0, 1))
        counter = DiceCounter(4)
        counter.add(one, two)
        expected = compute_dice(*(one_hot(value[None, None], 4) for value in (one, two)), include_background=True)[0]
        torch.testing.assert_close(counter.dice(), expected.double(), rtol=1e-6, atol=0)

    def test_the_order_and_the_kind_of_what_is_added_change_nothing(self) -> None:
        one, two = labels(0), labels(1)
        slices, whole = DiceCounter(4), DiceCounter(4)
        for index in (3, 1, 4, 0, 2):
            slices.add(torch.from_numpy(one[index]), torch.from_numpy(two[index]).to(torch.int32))
        whole.add(one, two)
        assert torch.equal(slices.counts, whole.counts) and whole.counts[2].sum() == two.size
        whole.sum_over_processes()  # one process: nothing changes
        assert torch.equal(slices.counts, whole.counts)

    @pytest.mark.parametrize("kind", ["<u2", ">i2", ">u4", "<u8", ">i8"])
    def test_whole_numbers_as_files_have_them(self, kind: str) -> None:
        """Bytes in either order, without a sign, mirrored and read-only, as a turned volume of a NIfTI file is."""
        one, two = labels(0), labels(1)
        stored = np.flip(one, 1).astype(kind)[:, ::-1]
        stored.flags.writeable = False
        scores, expected = (segmentation_scores([guess], [volume(two)]) for guess in (stored, one))
        assert scores == expected
        counter, plain = DiceCounter(4), DiceCounter(4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            counter.add(stored, torch.from_numpy(two).to(torch.uint16))
        plain.add(one, two)
        assert torch.equal(counter.counts, plain.counts)

    def test_sum_over_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from protokernels.training import distributed

        monkeypatch.setattr(distributed, "sum_over_processes", lambda value: 3 * value)
        counter = DiceCounter(2)
        counter.add(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64))
        counter.sum_over_processes()
        assert counter.counts.tolist() == [[0, 12]] * 3 and counter.mean() == 1

    def test_nothing_there(self) -> None:
        counter = DiceCounter(3)
        assert math.isnan(counter.mean())
        counter.add(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64))
        assert counter.counts.sum() == 0

    @pytest.mark.parametrize(
        ("prediction", "label", "message"),
        [
            (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64), "prediction must be whole numbers, after argmax"),
            (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), "must have one shape"),
            (torch.full((2, 2), 3), torch.zeros(2, 2, dtype=torch.int64), r"prediction must lie in 0\.\.2; got 3\.\.3"),
            (torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), -1), r"label must lie in 0\.\.2; got -1\.\.-1"),
        ],
    )
    def test_refusals(self, prediction: torch.Tensor, label: torch.Tensor, message: str) -> None:
        counter = DiceCounter(3)
        with pytest.raises(ValueError, match=message):
            counter.add(prediction, label)
        assert counter.counts.sum() == 0
        with pytest.raises(ValueError, match="at least 2 classes"):
            DiceCounter(1)


class TestHausdorff:
    @pytest.mark.parametrize(("axis", "step"), [(0, 3.0), (1, 0.5), (2, 2.0)])
    def test_a_shifted_cube(self, axis: int, step: float) -> None:
        """Shifted by two voxels along one axis: the far face is two steps away from the other cube's, and more than 5 %
        of the surface is that face."""
        cube = np.zeros((16, 16, 16), np.uint8)
        cube[4:10, 4:10, 4:10] = 1
        (distance,) = hausdorff95(np.roll(cube, 2, axis), cube, 2, (3.0, 0.5, 2.0))
        assert distance == pytest.approx(2 * step)

    def test_a_stray_voxel_is_less_than_five_percent(self) -> None:
        cube = np.zeros((12, 12, 12), np.uint8)
        cube[2:8, 2:8, 2:8] = 1
        stray = cube.copy()
        stray[11, 11, 11] = 1
        assert hausdorff95(stray, cube, 2, (1.0, 1.0, 1.0)) == [0.0]

    def test_classes_that_are_missing(self) -> None:
        one, two = np.zeros((3, 6, 6), np.uint8), np.zeros((3, 6, 6), np.uint8)
        one[1, 2, 2] = two[1, 2, 3] = 1
        two[0, 0, 0] = 2
        distances = hausdorff95(one, two, 4, (1.0, 1.0, 1.0))
        assert distances[0] == pytest.approx(1) and math.isnan(distances[1]) and math.isnan(distances[2])


class TestScores:
    def test_what_is_left_out_is_counted(self) -> None:
        """Class 1: both volumes; class 2: missed in one, absent in the other; class 3: nowhere."""
        first, second = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
        first[1, 1:4, 1:4], first[1, 6, 6], second[1, 2:5, 2:5] = 1, 2, 1
        guess = np.where(first == 2, 0, first).astype(np.uint8)
        scores = segmentation_scores(
            [guess, np.roll(second, 1, 2)], [volume(first, "a"), volume(second, "b")], class_names=("0", "p", "q", "r")
        )
        shifted = 2 * 6 / 18
        assert scores["volume_dice"]["classes"] == {"p": pytest.approx((1 + shifted) / 2), "q": 0.0, "r": None}
        assert scores["volume_dice"]["mean"] == pytest.approx((1 + shifted) / 4)
        assert scores["volume_dice"]["absent"] == {"p": 0, "q": 1, "r": 2}
        assert scores["pooled_dice"]["classes"] == {"p": pytest.approx(2 * 15 / 36), "q": 0.0, "r": None}
        assert scores["hausdorff95"]["classes"] == {"p": pytest.approx(0.5), "q": None, "r": None}
        assert scores["hausdorff95"]["one_sided"] == {"p": 0, "q": 1, "r": 0}
        assert scores["hausdorff95"]["mean"] == pytest.approx(0.5)
        assert [one["name"] for one in scores["volumes"]] == ["a", "b"]
        assert scores["volumes"][1]["hausdorff95"] == {"p": pytest.approx(1), "q": None, "r": None}
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores

    def test_nothing_at_all(self) -> None:
        empty = np.zeros((2, 4, 4), np.uint8)
        scores = segmentation_scores([empty], [volume(empty)])
        assert scores["pooled_dice"]["mean"] is None and scores["hausdorff95"]["mean"] is None
        json.dumps(scores, allow_nan=False)

    def test_millimetres_only_where_all_are_known(self) -> None:
        label = np.zeros((4, 8, 8), np.uint8)
        label[1:3, 2:5, 2:5] = 1
        moved = np.roll(label, 1, 2)
        known, unknown = volume(label, spacing=(5.0, 1.0, 1.5), spacing_known=True), volume(label, "w")
        scores = segmentation_scores([moved], [known])
        assert scores["unit"] == "mm" and scores["hausdorff95"]["mean"] == pytest.approx(1.5)
        scores = segmentation_scores([moved, moved], [known, unknown])
        assert scores["unit"] == "pixels" and scores["hausdorff95"]["mean"] == pytest.approx(1)

    def test_inputs_stay_and_calls_repeat(self) -> None:
        one, two = labels(0), labels(1)
        before = one.copy(), two.copy()
        first, second = (segmentation_scores([one], [volume(two)]) for _ in range(2))
        assert first == second
        np.testing.assert_array_equal(one, before[0])
        np.testing.assert_array_equal(two, before[1])

    @pytest.mark.parametrize(
        ("predictions", "names", "message"),
        [
            ([], None, "one prediction per volume"),
            ([labels(0)[1:]], None, r"whole numbers of shape \[5, 8, 8\]; got uint8 \[4, 8, 8\]"),
            ([labels(0).astype(np.float32)], None, "whole numbers of shape"),
            ([labels(0)], ("0", "1"), r"must lie in 0\.\.1"),
            ([labels(0)], ("0", "a", "b", "a"), "class names must differ; got '0', 'a', 'b', 'a'"),
        ],
    )
    def test_refusals(self, predictions: list[np.ndarray], names: tuple[str, ...] | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            segmentation_scores(predictions, [volume(labels(1))], class_names=names)
        with pytest.raises(ValueError, match="at least one; got 0 and 0"):
            segmentation_scores([], [])
