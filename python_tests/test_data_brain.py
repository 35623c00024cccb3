# SPDX-License-Identifier: MIT
"""Brain MRI: the file of slices, and slices of BraTS volumes in the Decathlon's layout. All files are made here, except where
PROTOKERNELS_DATA names real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protokernels.data import DataError, load_dataset
from protokernels.data.brats import BLACK, kept_slices
from protokernels.data.nifti import read_nifti
from python_tests.data_files import COUNTS, make_arrays, save
from python_tests.nifti_files import BRATS_SHAPE, write_brats, write_nifti

DATA_ROOT = os.environ.get("PROTOKERNELS_DATA")


def brain_arrays() -> dict[str, Any]:
    arrays: dict[str, Any] = make_arrays(16, classes=4)
    first = 0
    for split, count in COUNTS.items():
        arrays[f"{split}_near_dup_group"] = first + np.arange(count, dtype=np.int32) // 2
        first += count
    return arrays


class TestBrainTumor:
    @pytest.mark.parametrize("folder", ["", "brain_tumor_4class"])
    def test_presence_and_types(self, tmp_path: Path, folder: str) -> None:
        arrays = brain_arrays()
        save(tmp_path / folder / "brain_tumor_4class_128.npz", arrays)
        binary, types = (load_dataset(name, tmp_path) for name in ("brain_tumor", "brain_tumor_types"))
        assert binary.class_names == ("no tumour", "tumour") and types.num_classes == 4
        for name, split in binary.splits.items():
            labels = arrays[f"{name}_labels"][:, 0]
            np.testing.assert_array_equal(split.labels, labels > 0)
            np.testing.assert_array_equal(types.splits[name].labels, labels)
            np.testing.assert_array_equal(split.images, arrays[f"{name}_images"])
            assert split.groups is not None and split.groups.tolist() == [
                str(g) for g in arrays[f"{name}_near_dup_group"]
            ]
        assert len(binary.provenance["warnings"]) == 2 and str(tmp_path) not in json.dumps(binary.provenance)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_near_dup_group": None}, "no array train_near_dup_group; it holds"),
            ({"val_images": None}, "no array val_images"),
            ({"train_near_dup_group": np.zeros(6)}, r"must be whole numbers of shape \[6\]; got float64"),
            ({"train_near_dup_group": np.zeros(5, np.int64)}, r"got int64 \[5\]"),
            ({"test_near_dup_group": np.zeros(4, np.int64)}, "1 groups of test occur in a split before it, 0 say"),
            ({"test_labels": np.full((4, 1), 4, np.uint8)}, r"must lie in 0\.\.3; got 4\.\.4"),
            ({"train_images": np.zeros((6, 16, 16))}, "must be uint8"),
        ],
    )
    def test_refusals(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        arrays = {key: value for key, value in (brain_arrays() | changes).items() if value is not None}
        save(tmp_path / "brain_tumor_4class_128.npz", arrays)
        with pytest.raises(DataError, match=message):
            load_dataset("brain_tumor", tmp_path)

    def test_a_missing_file_says_how_to_make_it(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no file brain_tumor_4class_128\.npz in .* protokernels\.data\.brain"):
            load_dataset("brain_tumor", tmp_path)

    @pytest.mark.skipif(DATA_ROOT is None, reason="PROTOKERNELS_DATA names no real data")
    def test_the_real_file(self) -> None:
        data = load_dataset("brain_tumor", DATA_ROOT)
        assert [len(split) for split in data.splits.values()] == [2007, 287, 576]
        assert [int((split.labels == 0).sum()) for split in data.splits.values()] == [228, 33, 66]


class TestBrats:
    def test_slices_labels_and_patients(self, tmp_path: Path) -> None:
        volumes = write_brats(tmp_path / "Task01_BrainTumour")
        data = load_dataset("brats", tmp_path)
        assert data.class_names == ("no tumour", "tumour")
        assert [len(split) for split in data.splits.values()] == [15, 5, 5]  # slice 0 has 7 / 8 black
        owners = [set(split.groups.tolist()) for split in data.splits.values() if split.groups is not None]
        assert set.union(*owners) == set(volumes) and sum(map(len, owners)) == 5  # no patient in two splits
        assert data.train.images.shape[1:] == (BRATS_SHAPE[1], BRATS_SHAPE[0])
        assert data.test.labels.tolist() == [0, 0, 1, 0, 1]  # slices 1 to 5
        assert data.train.masks is None and data.val is not None and data.val.masks is not None
        assert data.test.masks is not None
        rows = BRATS_SHAPE[1] - 1  # the last
        assert np.argwhere(data.test.masks).tolist() == [[2, rows - 1, 2], [4, rows - 2, 5]]
        first = data.test.images[0]  # slice 1: two rows of Y; rows run from anterior, so they are the last
        assert first[:-2].max() == 0 and first[-1, -1] == 255
        assert data.provenance["sequence"] == "FLAIR" and data.provenance["patients"] == {
            "train": 3,
            "val": 1,
            "test": 1,
        }

    def test_black_slices(self) -> None:
        volume = np.zeros((10, 10, 3))
        volume[:2, :, 0] = 5  # 80 % black: out
        volume[:2, :, 1] = 5
        volume[2, 0, 1] = 7  # 79 %
        volume[:, :, 2] = 3  # no black, and constant
        marked = np.zeros(volume.shape, np.int64)
        marked[2, 9, 1:] = 4
        slices, masks = kept_slices(volume, marked)
        assert BLACK == 0.8 and slices.shape == (2, 10, 10)
        assert masks.dtype == bool and np.argwhere(masks).tolist() == [[0, 0, 2], [1, 0, 2]]
        assert slices[0].max() == 255 and slices[0][-1, 2] == 255 and slices[0][-1, 0] == round(255 * 5 / 7)
        assert slices[1].max() == 0

    def test_the_sequence_is_found_by_its_name(self, tmp_path: Path) -> None:
        write_brats(tmp_path / "brats", description={"modality": {"0": "T1w", "1": "flair", "2": "x", "3": "y"}})
        assert len(load_dataset("brats", tmp_path).train) == 3 * BRATS_SHAPE[2]  # noise is never black

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            ({"modality": {"0": "T1w"}}, "no sequence FLAIR; dataset.json names T1w"),
            ({"modality": {"a": "T1w"}}, "modality must name sequences by number"),
            ({"modality": {"1": "FLAIR"}}, "without a gap"),
        ],
    )
    def test_refuses_other_descriptions(self, tmp_path: Path, description: dict[str, Any], message: str) -> None:
        write_brats(tmp_path / "brats", description=description)
        with pytest.raises(DataError, match=message):
            load_dataset("brats", tmp_path)

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no folder .*Task01_BrainTumour"):
            load_dataset("brats", tmp_path)
        write_brats(tmp_path / "brats", 2)
        with pytest.raises(DataError, match="at least 3 patients; got 2"):
            load_dataset("brats", tmp_path)
        write_brats(tmp_path / "brats", 4)
        write_nifti(tmp_path / "brats" / "labelsTr" / "BRATS_001.nii.gz", np.zeros((3, 3, 3), np.uint8))
        with pytest.raises(DataError, match="needs the shape of its image"):
            load_dataset("brats", tmp_path)
        write_nifti(tmp_path / "brats" / "labelsTr" / "BRATS_001.nii.gz", np.zeros(BRATS_SHAPE, np.uint8))
        write_nifti(
            tmp_path / "brats" / "imagesTr" / "BRATS_001.nii.gz", np.full((*BRATS_SHAPE, 4), np.nan, np.float32)
        )
        with pytest.raises(DataError, match=r"BRATS_001: .* voxels of a volume are NaN or infinite"):
            load_dataset("brats", tmp_path)


class TestChannels:
    def test_one_volume_of_several(self, tmp_path: Path) -> None:
        values = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
        affine = np.diag([-1.0, 1, 2, 1])
        path = write_nifti(tmp_path / "four.nii.gz", values, affine)
        for channel in range(5):
            volume = read_nifti(path, channel=channel)
            np.testing.assert_array_equal(volume.values, values[::-1, :, :, channel])
            assert volume.spacing == (1, 1, 2)
        label = read_nifti(path, channel=2).label_file(np.ones((2, 3, 4), np.uint8))
        (tmp_path / "label.nii").write_bytes(label)
        assert read_nifti(tmp_path / "label.nii").values.shape == (2, 3, 4)
        with pytest.raises(DataError, match="holds 5 volumes; there is no channel 5"):
            read_nifti(path, channel=5)
        with pytest.raises(DataError, match="expected one volume"):
            read_nifti(path)

    def test_a_single_volume_is_channel_zero(self, tmp_path: Path) -> None:
        values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        path = write_nifti(tmp_path / "one.nii", values)
        np.testing.assert_array_equal(read_nifti(path, channel=0).values, values)
        with pytest.raises(DataError, match="holds 1 volumes; there is no channel 1"):
            read_nifti(path, channel=1)
