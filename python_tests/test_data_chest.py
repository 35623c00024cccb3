# SPDX-License-Identifier: MIT
"""Chest X-rays and images with several findings: what is read, and what is refused. All files are made here, except where
PROTOKERNELS_DATA names real ones."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protokernels.data import DataError, ImageDataset, Split, load_dataset
from protokernels.training.scoring import evaluation_splits
from python_tests.data_files import COUNTS, load_quietly, make_arrays, save

NAMES14 = np.array([f"finding {index}" for index in range(14)])
DATA_ROOT = os.environ.get("PROTOKERNELS_DATA")


def chest_arrays(side: int = 16) -> dict[str, Any]:
    """Both chest files in one: labels, subtype, 14 findings, patients that stay in their split."""
    arrays: dict[str, Any] = make_arrays(side)
    generator = np.random.default_rng(1)
    for split, count in COUNTS.items():
        arrays[f"{split}_labels14"] = generator.integers(0, 2, (count, 14), dtype=np.uint8)
        arrays[f"{split}_subtype"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
        arrays[f"{split}_patient_ids"] = np.array([f"{split}-{index // 2}" for index in range(count)])
    return arrays | {"class_names_14": NAMES14}


class TestChest:
    @pytest.mark.parametrize("folder", ["", "chest_nih"])
    def test_nih(self, tmp_path: Path, folder: str) -> None:
        arrays = chest_arrays()
        save(tmp_path / folder / "chest_nih_128.npz", arrays)
        data = load_dataset("chest_nih", tmp_path)
        assert data.class_names == ("no finding", "pneumonia") and data.target_names == tuple(NAMES14)
        for name, split in data.splits.items():
            np.testing.assert_array_equal(split.images, arrays[f"{name}_images"])
            np.testing.assert_array_equal(split.labels, arrays[f"{name}_labels"][:, 0])
            np.testing.assert_array_equal(split.targets, arrays[f"{name}_labels14"])  # type: ignore[arg-type]
            np.testing.assert_array_equal(split.groups, arrays[f"{name}_patient_ids"])  # type: ignore[arg-type]
        assert data.provenance["warnings"] == [] and len(data.provenance["md5s"]["chest_nih_128.npz"]) == 32
        assert str(tmp_path) not in json.dumps(data.provenance)

    def test_kermany_with_two_and_with_three_classes(self, tmp_path: Path) -> None:
        arrays = chest_arrays()
        save(tmp_path / "chest_kermany" / "chest_kermany_96.npz", arrays)
        two, three = (load_dataset(name, tmp_path) for name in ("chest_kermany", "chest_kermany_subtype"))
        assert two.class_names == ("normal", "pneumonia") and two.target_names == () and two.train.targets is None
        assert three.num_classes == 3 and three.train.labels.tolist() == [0, 1, 2, 0, 1, 2]

    def test_patients_may_be_unknown_and_shared_ones_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "chest_kermany_96.npz"
        arrays = chest_arrays()
        save(path, {key: value for key, value in arrays.items() if "patient" not in key})
        assert load_dataset("chest_kermany", tmp_path).train.groups is None
        save(path, arrays | {"test_patient_ids": np.array(["train-0", "train-1", "x", "x"])})
        with pytest.warns(UserWarning, match="2 patients occur in train and in test"):
            data = load_dataset("chest_kermany", tmp_path)
        assert len(data.provenance["warnings"]) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_labels14": None}, "no array train_labels14; it holds class_names_14"),
            ({"class_names_14": None}, "no array class_names_14"),
            ({"val_images": None}, "no array val_images"),
            ({"train_labels14": np.zeros((6, 13), np.uint8)}, r"shape \[6, 14\]; got uint8 \[6, 13\]"),
            ({"train_labels14": np.full((6, 14), 2, np.uint8)}, "train_labels14 must be 0 or 1; got 2"),
            ({"train_labels14": np.zeros((6, 14))}, "whole numbers"),
            ({"test_labels": np.full((4, 1), 2, np.uint8)}, r"0\.\.1 \(2 classes\); got 2\.\.2"),
            ({"test_labels": np.full((4, 1), -1, np.int8)}, "must not be negative"),
            ({"train_patient_ids": np.arange(6)}, r"must be text of shape \[6\]; got int64 \[6\]"),
            ({"train_images": np.zeros((6, 16, 16))}, "must be uint8"),
            ({"class_names_14": np.zeros((14, 2))}, r"text of shape \[L\]"),
        ],
    )
    def test_odd_files_are_refused_by_name(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        arrays = {key: value for key, value in (chest_arrays() | changes).items() if value is not None}
        save(tmp_path / "chest_nih_128.npz", arrays)
        with pytest.raises(DataError, match=message) as caught:
            load_dataset("chest_nih", tmp_path)
        assert "chest_nih_128.npz" in str(caught.value)

    def test_a_file_without_subtypes(self, tmp_path: Path) -> None:
        save(tmp_path / "chest_kermany_96.npz", make_arrays(16))
        assert load_dataset("chest_kermany", tmp_path).num_classes == 2
        with pytest.raises(DataError, match="no array train_subtype"):
            load_dataset("chest_kermany_subtype", tmp_path)

    def test_missing_file_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file chest_nih_128\.npz in .*protokernels\.data\.chest"):
            load_dataset("chest_nih", tmp_path)

    def test_damaged_file(self, tmp_path: Path) -> None:
        path = save(tmp_path / "chest_nih_128.npz", chest_arrays())
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(DataError, match="truncated"):
            load_dataset("chest_nih", tmp_path)

    @pytest.mark.skipif(not DATA_ROOT, reason="PROTOKERNELS_DATA names no folder with the real files")
    @pytest.mark.parametrize(("name", "counts"), [("chest_nih", (710, 87, 177)), ("chest_kermany", (4707, 525, 624))])
    def test_real_files(self, name: str, counts: tuple[int, ...]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                data = load_dataset(name)
            except DataError as error:
                pytest.skip(f"the file is not there: {error}")
        assert tuple(map(len, data.splits.values())) == counts
        if name == "chest_nih":
            assert data.train.targets is not None
            pneumonia = data.train.targets[:, data.target_names.index("Pneumonia")]
            np.testing.assert_array_equal(pneumonia, data.train.labels)


class TestChestMnist:
    def arrays(self) -> dict[str, np.ndarray]:
        arrays = make_arrays(28)
        for split, count in COUNTS.items():
            arrays[f"{split}_labels"] = np.random.default_rng(2).integers(0, 2, (count, 14), dtype=np.uint8)
        arrays["train_labels"][0] = 0
        return arrays

    def test_findings_and_one_label(self, tmp_path: Path) -> None:
        arrays = self.arrays()
        save(tmp_path / "medmnist" / "chestmnist.npz", arrays)
        data = load_quietly("chestmnist", tmp_path)
        assert data.target_names[:2] == ("atelectasis", "cardiomegaly") and len(data.target_names) == 14
        assert data.class_names == ("no finding", "any finding") and data.train.labels[0] == 0
        np.testing.assert_array_equal(data.test.targets, arrays["test_labels"])  # type: ignore[arg-type]
        np.testing.assert_array_equal(data.test.labels, arrays["test_labels"].any(axis=1))

    @pytest.mark.parametrize(
        ("value", "message"),
        [(np.zeros((6, 1), np.uint8), r"\[6, 14\]"), (np.full((6, 14), 3, np.uint8), "0 or 1; got 0*3")],
    )
    def test_other_labels_are_refused(self, tmp_path: Path, value: np.ndarray, message: str) -> None:
        save(tmp_path / "chestmnist.npz", self.arrays() | {"train_labels": value})
        with pytest.raises(DataError, match="train_labels must"):
            load_dataset("chestmnist", tmp_path)


class TestSplit:
    images, labels = np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 0])

    @pytest.mark.parametrize(
        ("targets", "groups", "message"),
        [
            (np.zeros((2, 5), np.uint8), None, r"shape \[3, L\]"),
            (np.zeros((3, 5)), None, "uint8"),
            (np.zeros(3, np.uint8), None, r"shape \[3, L\]"),
            (np.full((3, 1), 2, np.uint8), None, "0 or 1; got 2"),
            (None, np.arange(3), "text"),
            (None, np.array(["a", "b"]), r"shape \[3\]"),
        ],
    )
    def test_refusals(self, targets: np.ndarray | None, groups: np.ndarray | None, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Split(self.images, self.labels, targets, groups)

    def test_take_and_join_keep_what_belongs_together(self) -> None:
        split = Split(self.images, self.labels, np.eye(3, dtype=np.uint8), np.array(["a", "b", "c"]))
        part = split.take(np.array([2, 0]))
        assert part.targets is not None and part.groups is not None
        assert part.targets.tolist() == [[0, 0, 1], [1, 0, 0]] and part.groups.tolist() == ["c", "a"]
        both = part.join(split)
        assert both.groups is not None and both.groups.tolist() == ["c", "a", "a", "b", "c"] and len(both) == 5
        assert part.join(Split(self.images, self.labels)).targets is None

    def test_names_must_fit_the_columns(self) -> None:
        split = Split(self.images, self.labels, np.eye(3, dtype=np.uint8))
        with pytest.raises(DataError, match="train has 3 columns, there are 0 names"):
            ImageDataset("x", split, None, split, ("a", "b"))
        data = ImageDataset("x", split, split, split, ("a", "b"), target_names=("p", "q", "r"))
        _, tests = evaluation_splits(data)
        joined = tests["val+test"].targets
        assert joined is not None and len(joined) == 6
