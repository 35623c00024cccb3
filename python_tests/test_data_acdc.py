# SPDX-License-Identifier: MIT
"""ACDC's slices: how they become volumes, and what is refused. All files are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protokernels.data import DataError, load_segmentation
from python_tests.data_files import save


def acdc_arrays() -> dict[str, np.ndarray]:
    """Two frames of three slices for each of 3, 1 and 1 patients, the slices not in order."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, patients in (("train", (1, 2, 3)), ("val", (4,)), ("test", (5,))):
        keys = [(patient, frame, place) for patient in patients for frame in (1, 9) for place in (2, 0, 1)]
        arrays[f"{split}_patient_ids"], arrays[f"{split}_frame"], arrays[f"{split}_slice"] = np.array(
            keys, np.int16
        ).T.copy()
        arrays[f"{split}_images"] = generator.integers(0, 256, (len(keys), 8, 8), dtype=np.uint8)
        arrays[f"{split}_masks"] = generator.integers(0, 4, (len(keys), 8, 8), dtype=np.uint8)
    return arrays


class TestAcdc:
    def test_slices_become_volumes_in_order(self, tmp_path: Path) -> None:
        arrays = acdc_arrays()
        save(tmp_path / "acdc" / "acdc_slices_128.npz", arrays)
        data = load_segmentation("acdc", tmp_path, split="paper")
        assert [len(part) for part in data.splits.values()] == [6, 2, 2]
        assert {v.group for v in data.train} == {"patient001", "patient002", "patient003"}
        one = data.val[1]
        assert one.name == "patient004_frame09" and not one.spacing_known
        np.testing.assert_array_equal(one.label, arrays["val_masks"][[4, 5, 3]])
        raw = arrays["val_images"][[4, 5, 3]].astype(np.float32)
        np.testing.assert_allclose(one.image, (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-6)

    def test_training_patients_are_in_a_random_order(self, tmp_path: Path) -> None:
        """ACDC numbers patients by disease; the first of the list are those that count as labelled."""
        arrays = acdc_arrays() | {key: np.zeros((40, 8, 8), np.uint8) for key in ("train_images", "train_masks")}
        patients = np.arange(100, 120, dtype=np.int16).repeat(2)
        arrays |= {"train_patient_ids": patients, "train_frame": np.tile(np.int16([1, 9]), 20)}
        save(tmp_path / "acdc_slices_128.npz", arrays | {"train_slice": np.zeros(40, np.int16)})
        groups = [volume.group for volume in load_segmentation("acdc", tmp_path, split="paper").train]
        assert groups[::2] == groups[1::2], "volumes of a patient stay together"
        assert groups != sorted(groups) and len(set(groups)) == 20

    def test_its_split_is_its_own(self, tmp_path: Path) -> None:
        save(tmp_path / "acdc_slices_128.npz", acdc_arrays())
        with pytest.raises(DataError, match="one split of its own, so there is fold 0 only; got fold 1"):
            load_segmentation("acdc", tmp_path, split="paper", fold=1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_masks": None}, "no array train_masks"),
            ({"train_frame": np.zeros(18)}, "train_frame must be whole numbers"),
            ({"train_slice": np.zeros(18, np.int16)}, "two train slices of patient001_frame01 have one number"),
            ({"train_slice": np.zeros(17, np.int16)}, "one patient, frame and slice each"),
            ({"train_images": np.zeros((18, 8, 8))}, "train_images must be uint8"),
            ({"val_masks": np.zeros((6, 8, 7), np.uint8)}, r"val_masks must have the shape \[6, 8, 8\]"),
            ({"test_masks": np.full((6, 8, 8), 4, np.uint8)}, r"must lie in 0\.\.3 \(4 classes\); got 4"),
            ({"test_patient_ids": np.full(6, 1, np.int16)}, "patient patient001 occurs in train and in test"),
        ],
    )
    def test_odd_files_are_refused_by_name(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        arrays = {key: value for key, value in (acdc_arrays() | changes).items() if value is not None}
        save(tmp_path / "acdc_slices_128.npz", arrays)
        with pytest.raises(DataError, match=message) as caught:
            load_segmentation("acdc", tmp_path, split="paper")
        assert "acdc_slices_128.npz" in str(caught.value)

    def test_a_missing_file_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file acdc_slices_128\.npz in .*protokernels\.data\.acdc"):
            load_segmentation("acdc", tmp_path, split="paper")
