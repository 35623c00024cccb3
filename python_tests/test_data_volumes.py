# SPDX-License-Identifier: MIT
"""Labelled volumes: what is read, how it is split, and what is refused. All files are made here, except where
PROTOKERNELS_DATA names real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protokernels.data import DataError, phantoms
from protokernels.data.slicing import image_slices, label_slices, scaled_to_unit
from protokernels.data.volumes import (
    LabelledVolume,
    SegmentationDataset,
    labelled_subset,
    load_segmentation,
    patient_split,
    slices_of,
)
from python_tests.nifti_files import SHAPE, write_decathlon, write_nifti

DATA_ROOT = os.environ.get("PROTOKERNELS_DATA")


def volume(name: str = "v", group: str | None = None, **changes: Any) -> LabelledVolume:
    values = {"image": np.zeros((3, 4, 4), np.float32), "label": np.zeros((3, 4, 4), np.uint8)} | changes
    return LabelledVolume(name, group or name, **values)


class TestTypes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image": np.zeros((3, 4, 4))}, r"float32 of shape \[S, H, W\].*got float64"),
            ({"image": np.zeros((4, 4), np.float32)}, r"got float32 \[4, 4\]"),
            ({"image": np.zeros((0, 4, 4), np.float32)}, "not empty"),
            ({"image": np.full((3, 4, 4), 2, np.float32)}, r"must lie in \[0, 1\]"),
            ({"image": np.full((3, 4, 4), np.nan, np.float32)}, r"must lie in \[0, 1\]"),
            ({"label": np.zeros((3, 4, 4), np.int64)}, "label must be uint8"),
            ({"label": np.zeros((2, 4, 4), np.uint8)}, r"\[3, 4, 4\] as the image; got uint8 \[2, 4, 4\]"),
            ({"spacing": (1.0, 0.0, 1.0)}, "positive"),
            ({"spacing": (1.0, float("nan"), 1.0)}, "positive"),
        ],
    )
    def test_a_volume_is_checked(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            volume(**changes)

    @pytest.mark.parametrize(
        ("parts", "classes", "message"),
        [
            ((("a",), ("b",), ()), 2, "the test split is empty"),
            ((("a",), ("b",), ("c:a",)), 2, "patient a occurs in train and in test"),
            ((("a:p", "a:p"), ("b",), ("c",)), 2, "two volumes are called a"),
            ((("a",), ("b",), ("c",)), 1, "2 to 256 classes"),
        ],
    )
    def test_a_data_set_is_checked(self, parts: tuple[tuple[str, ...], ...], classes: int, message: str) -> None:
        train, val, test = (tuple(volume(name.split(":")[0], name.split(":")[-1]) for name in part) for part in parts)
        with pytest.raises(DataError, match=message):
            SegmentationDataset("x", train, val, test, tuple("abc"[:classes]))

    def test_labels_and_sizes_are_checked(self) -> None:
        high, wide = np.full((3, 4, 4), 2, np.uint8), (np.zeros((3, 4, 5), np.float32), np.zeros((3, 4, 5), np.uint8))
        with pytest.raises(DataError, match=r"labels of c must lie in 0\.\.1 \(2 classes\); got 2"):
            SegmentationDataset("x", (volume("a"),), (volume("b"),), (volume("c", label=high),), ("p", "q"))
        with pytest.raises(DataError, match="x: names of classes must differ; 'q' occurs 2 times"):
            SegmentationDataset("x", (volume("a"),), (volume("b"),), (volume("c"),), ("p", "q", "q"))
        with pytest.raises(DataError, match=r"a has \[4, 4\], b has \[4, 5\]"):
            other = volume("b", image=wide[0], label=wide[1])
            SegmentationDataset("x", (volume("a"),), (other,), (volume("c"),), ("p", "q"))


class TestSlicing:
    def test_a_volume_is_scaled_as_a_whole(self) -> None:
        values = np.arange(24, dtype=np.int16).reshape(2, 3, 4) - 7
        np.testing.assert_allclose(scaled_to_unit(values), (values + 7) / 23, atol=1e-7)
        assert scaled_to_unit(np.full((2, 2, 2), 5.0)).max() == 0
        for dtype in (np.float32, np.float64):  # half the smallest number is 0
            assert scaled_to_unit(np.array([[[0, np.finfo(dtype).smallest_subnormal]]], dtype)).max() == 0
        huge = np.array([-1.7e308, 0, 1.7e308]).reshape(1, 1, 3)
        np.testing.assert_allclose(scaled_to_unit(huge), [[[0, 0.5, 1]]])
        with pytest.raises(DataError, match="1 of 3 voxels are NaN or infinite"):
            scaled_to_unit(np.array([0, np.nan, 1.0]).reshape(1, 1, 3))

    def test_slices_are_the_third_axis_and_resized_as_torch_does(self) -> None:
        values = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
        values[0, 0, :2] = 0, 1  # scaled already
        slices = image_slices(values, None)
        np.testing.assert_array_equal(slices[3], values[:, :, 3])
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(slices)[:, None], (8, 8), mode="bilinear", align_corners=False
        )[:, 0]
        np.testing.assert_allclose(image_slices(values, 8), expected.numpy(), atol=1e-6)

    @pytest.mark.parametrize("size", [1, 3, 7, 16])
    def test_labels_get_no_new_class(self, size: int) -> None:
        """Linear interpolation, truncated as in the released code of Hu et al., would put class 1 between 0 and 2."""
        label = np.zeros((9, 8, 3), np.uint8)
        label[2:6, 3:7] = 2
        resized = label_slices(label, size)
        assert resized.shape == (3, size, size) and set(np.unique(resized)) <= {0, 2}
        linear = torch.nn.functional.interpolate(
            torch.from_numpy(label.transpose(2, 0, 1).astype(np.float32))[:, None], (16, 16), mode="bilinear"
        )
        assert 1 in linear.to(torch.int64)

    @pytest.mark.parametrize("edge", [3, 5, 8])
    @pytest.mark.parametrize("size", [4, 7, 16, 30])
    def test_labels_and_images_stay_on_top_of_each_other(self, edge: int, size: int) -> None:
        """The border of a half plane lies at one place in both."""
        half = np.zeros((10, 10, 1), np.uint8)
        half[edge:] = 1
        image, label = image_slices(half, size)[0], label_slices(half, size)[0]
        np.testing.assert_array_equal(label, image >= 0.5)
        assert abs(label.mean() - (1 - edge / 10)) <= 0.5 / size


class TestSplit:
    groups = tuple(f"p{index:03d}" for index in range(260))

    @pytest.mark.parametrize("split", ["paper", "official"])
    @pytest.mark.parametrize("count", [5, 20, 23, 260])
    def test_every_fold_is_disjoint_and_leaves_nobody_out(self, split: Any, count: int) -> None:
        seen = set()
        for fold in range(7):
            train, val, test = patient_split(self.groups[:count], fold, split=split)
            assert sorted([*train, *val, *test]) == list(range(count))
            seen.add(tuple(test))
            assert min(map(len, (train, val, test))) > 0
        assert len(seen) > 1

    def test_sizes_of_the_paper_and_of_the_released_code(self) -> None:
        sizes = {
            ("paper", 260, (3, 1, 1)): (156, 52, 52),
            ("paper", 20, (2, 1, 1)): (10, 5, 5),
            ("official", 260, (3, 1, 1)): (130, 65, 65),
            ("official", 20, (2, 1, 1)): (10, 5, 5),
        }
        for (split, count, ratio), expected in sizes.items():
            parts = patient_split(self.groups[:count], 1, split=split, ratio=ratio)  # type: ignore[arg-type]
            assert tuple(map(len, parts)) == expected

    def test_the_paper_tests_every_patient_once(self) -> None:
        tested = [index for fold in range(5) for index in patient_split(self.groups, fold, split="paper")[2]]
        assert sorted(tested) == list(range(260))
        assert patient_split(self.groups, 5, split="paper")[2] != patient_split(self.groups, 0, split="paper")[2]

    @pytest.mark.parametrize("split", ["paper", "official"])
    def test_volumes_of_a_patient_stay_together_and_order_does_not_matter(self, split: Any) -> None:
        groups = [f"p{index // 3}" for index in range(30)]
        for fold in range(5):
            parts = patient_split(groups, fold, split=split)
            owners = [{groups[index] for index in part} for part in parts]
            assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
            backwards = patient_split(groups[::-1], fold, split=split)
            assert [{groups[29 - index] for index in part} for part in backwards] == owners

    def test_the_training_list_is_in_a_random_order_of_its_fold(self) -> None:
        first, second = (patient_split(self.groups, fold, split="paper")[0] for fold in (0, 1))
        assert first != sorted(first) and first[:7] != second[:7]
        assert first == patient_split(self.groups, 0, split="paper")[0]

    def test_too_few_patients(self) -> None:
        with pytest.raises(DataError, match="5 parts needs at least 5 patients; got 4"):
            patient_split(["a", "b", "c", "d", "d"], 0, split="paper")
        with pytest.raises(DataError, match=r"split must be .* got 'papers'"):
            patient_split(self.groups, 0, split="papers")  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"ratio must be \(a, 1, 1\) .*; got \(3, 2, 1\)"):
            patient_split(self.groups, 0, split="paper", ratio=(3, 2, 1))

    def test_labelled_subset(self) -> None:
        volumes = [volume(f"v{index}") for index in range(156)]
        assert [len(labelled_subset(volumes, share)) for share in (0.05, 0.1, 0.2, 1)] == [7, 15, 31, 156]
        assert [len(labelled_subset(volumes[:10], share)) for share in (0.01, 0.1, 0.2, 0.4)] == [1, 1, 2, 4]
        assert len(labelled_subset(volumes[:100], 0.29)) == 29  # 0.29 * 100 is 28.999999999999996
        assert labelled_subset(volumes, 0.05) == tuple(volumes[:7])
        for share, some in ((0, volumes), (1.5, volumes), (0.5, [])):
            with pytest.raises(ValueError, match="labelled_subset"):
                labelled_subset(some, share)


class TestSlicesOf:
    def test_slices_and_where_they_come_from(self) -> None:
        image = np.linspace(0, 1, 5 * 4 * 4, dtype=np.float32).reshape(5, 4, 4)
        label = np.arange(80, dtype=np.uint8).reshape(5, 4, 4)
        one, two = volume("a"), volume("b", image=image, label=label)
        images, labels, owner, place = slices_of([one, two])
        assert images.shape == (8, 1, 4, 4) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and owner.tolist() == [0] * 3 + [1] * 5
        torch.testing.assert_close(place, torch.tensor([0, 1 / 3, 2 / 3, 0, 0.2, 0.4, 0.6, 0.8]))
        np.testing.assert_array_equal(images[3:, 0], image)
        np.testing.assert_array_equal(labels[3:], label)
        images.zero_()
        assert image.max() == 1, "the volume has changed"

    def test_refusals(self) -> None:
        other = volume("b", image=np.zeros((1, 2, 2), np.float32), label=np.zeros((1, 2, 2), np.uint8))
        for volumes in ([], [volume(), other]):
            with pytest.raises(ValueError, match="at least one volume, and slices of one size"):
                slices_of(volumes)


class TestPhantoms:
    def test_they_are_always_the_same_and_say_what_they_are(self) -> None:
        one, two = (load_segmentation("phantoms", split="paper") for _ in range(2))
        for first, second in zip(one.train, two.train, strict=True):
            np.testing.assert_array_equal(first.image, second.image)
        assert "phantom" in one.provenance["warnings"][0] and all("phantom" in v.name for v in one.train)
        assert all(set(np.unique(v.label)) == {0, 1, 2} for part in one.splits.values() for v in part)
        assert one.image_size == (32, 32) and one.class_names == phantoms.CLASSES
        assert json.loads(json.dumps(one.provenance)) == one.provenance

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fold": 5}, r"fold must lie in 0\.\.4 \(5 folds\); got 5"),
            ({"fold": -1}, "fold must lie in"),
            ({"image_size": 0}, "at least 1 pixel"),
            ({"split": "mine"}, 'must be "paper" or "official"'),
        ],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_segmentation("phantoms", **({"split": "paper"} | options))

    def test_size(self) -> None:
        assert load_segmentation("phantoms", split="paper", image_size=16).image_size == (16, 16)


class TestDecathlon:
    @pytest.mark.parametrize("by_path", [True, False])
    def test_folder(self, tmp_path: Path, by_path: bool) -> None:
        maps = write_decathlon(tmp_path / "Task99_Organ")
        name = tmp_path / "Task99_Organ" if by_path else "Task99_Organ"
        data = load_segmentation(name, tmp_path, image_size=16, split="paper")
        assert data.class_names == ("background", "front", "back") and data.image_size == (16, 16)
        everyone = [v for part in data.splits.values() for v in part]
        assert sorted(v.name for v in everyone) == sorted(maps) and all(v.spacing_known for v in everyone)
        for one in everyone:
            assert one.label.shape == (SHAPE[2], 16, 16)
            np.testing.assert_array_equal(one.label, label_slices(maps[one.name], 16))
            np.testing.assert_allclose(one.spacing, (1, SHAPE[0] / 16, SHAPE[1] / 16))
        assert str(tmp_path) not in json.dumps(data.provenance)
        assert data.provenance["files"][0] == "imagesTr/organ_000.nii.gz" and len(data.provenance["files"]) == 16
        (tmp_path / "Task99_Organ" / "labelsTr" / "organ_003.nii.gz").write_bytes(
            (tmp_path / "Task99_Organ" / "labelsTr" / "organ_001.nii.gz").read_bytes()
        )
        other = load_segmentation(name, tmp_path, image_size=16, split="paper")
        assert other.provenance["md5"] != data.provenance["md5"]

    def test_a_folder_without_size_or_description(self, tmp_path: Path) -> None:
        write_decathlon(tmp_path / "organ")
        with pytest.raises(DataError, match="pass image_size"):
            load_segmentation("organ", tmp_path, split="paper")
        (tmp_path / "organ" / "dataset.json").unlink()
        data = load_segmentation("organ", tmp_path, image_size=8, split="official")
        assert data.class_names == ("background", "class 1", "class 2")

    def test_masks_of_0_and_255_without_description_are_no_256_classes(self, tmp_path: Path) -> None:
        label = np.zeros(SHAPE, np.uint8)
        label[1:3] = 255
        for index in range(5):
            write_nifti(tmp_path / "o" / "imagesTr" / f"o_{index}.nii.gz", label.astype(np.float32), np.eye(4))
            write_nifti(tmp_path / "o" / "labelsTr" / f"o_{index}.nii.gz", label, np.eye(4))
        with pytest.raises(
            DataError, match=r"without a gap; got 0, 255; number them so, or name all classes in dataset.json"
        ):
            load_segmentation("o", tmp_path, image_size=8, split="paper")

    def test_files_in_another_orientation_give_the_same_slices(self, tmp_path: Path) -> None:
        """Stored backwards and with axes swapped, its affine telling so: the same volume."""
        values = np.random.default_rng(0).random(SHAPE).astype(np.float32)
        label = (values > 0.5).astype(np.uint8)
        affine = np.diag([2.0, 3.0, 4.0, 1.0])
        # voxel (k, i, X - 1 - j) of the file is voxel (i, j, k)
        moved = np.zeros((4, 4))
        moved[2, 0], moved[0, 1], moved[1, 2], moved[1, 3], moved[3, 3] = 4, 2, -3, 3 * (SHAPE[1] - 1), 1
        for part, array in (("imagesTr", values), ("labelsTr", label)):
            for index in range(4):
                write_nifti(tmp_path / "o" / part / f"o_{index}.nii.gz", array, affine)
            turned = array.transpose(2, 0, 1)[:, :, ::-1]
            write_nifti(tmp_path / "o" / part / "o_9.nii.gz", turned, moved)
        data = load_segmentation("o", tmp_path, image_size=6, split="paper")
        everyone = {v.name: v for part in data.splits.values() for v in part}
        np.testing.assert_array_equal(everyone["o_9"].image, everyone["o_0"].image)
        np.testing.assert_array_equal(everyone["o_9"].label, everyone["o_0"].label)
        assert everyone["o_9"].spacing == everyone["o_0"].spacing == (4, 2, 3 * SHAPE[1] / 6)

    def test_the_list_of_the_description_counts_and_its_paths_do_not(self, tmp_path: Path) -> None:
        write_decathlon(tmp_path / "organ")
        listed = [{"image": f"../../etc/organ_{index:03d}.nii.gz", "label": "x"} for index in range(6)]
        labels = {"background": 0, "front": 1, "back": 2}  # as nnU-Net writes them
        (tmp_path / "organ" / "dataset.json").write_text(json.dumps({"training": listed, "labels": labels}))
        data = load_segmentation("organ", tmp_path, image_size=8, split="paper")
        assert sum(map(len, data.splits.values())) == 6 and data.class_names == ("background", "front", "back")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "labelsTr" / "organ_003.nii.gz").unlink(), r"no file labelsTr/organ_003\.nii\.gz"),
            (lambda f: (f / "imagesTr" / "organ_000.nii.gz").unlink(), r"no file imagesTr/organ_000\.nii\.gz"),
            (lambda f: (f / "dataset.json").write_text("{"), r"dataset\.json is not valid JSON"),
            (lambda f: (f / "dataset.json").write_text("[" * 100_000), r"dataset\.json is not valid JSON"),
            (lambda f: (f / "dataset.json").write_text("[]"), "must hold an object"),
            (lambda f: (f / "dataset.json").write_text('{"training": [1]}'), "training must be a list"),
            (lambda f: (f / "dataset.json").write_text('{"labels": {"0": "a", "2": "b"}}'), "without a gap"),
            (lambda f: (f / "dataset.json").write_text('{"labels": 3}'), "labels must name classes"),
            (lambda f: (f / "dataset.json").write_text('{"labels": {"0": "a", "1": "b"}}'), "among 0, 1; got 2"),
            (
                lambda f: write_nifti(f / "labelsTr" / "organ_002.nii.gz", np.full(SHAPE, 0.5, np.float32)),
                "organ_002.*whole numbers; got 0.5",
            ),
            (
                lambda f: write_nifti(f / "labelsTr" / "organ_002.nii.gz", np.full(SHAPE, np.inf, np.float32)),
                "organ_002.*whole numbers",
            ),
            (
                lambda f: write_nifti(f / "labelsTr" / "organ_002.nii.gz", np.zeros((6, 5, 3), np.uint8)),
                r"organ_002.*\[6, 5, 3\], its image organ_002\.nii\.gz \[6, 5, 4\]",
            ),
            (
                lambda f: write_nifti(
                    f / "labelsTr" / "organ_002.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([1, 1, 2.0, 1])
                ),
                "organ_002.* lies elsewhere",
            ),
            (
                lambda f: write_nifti(f / "imagesTr" / "organ_002.nii.gz", np.full(SHAPE, np.nan, np.float32)),
                "organ_002.*120 of 120 voxels are NaN",
            ),
        ],
    )
    def test_damage_is_refused_by_name(self, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
        write_decathlon(tmp_path / "organ")
        damage(tmp_path / "organ")
        with pytest.raises(DataError, match=message):
            load_segmentation("organ", tmp_path, image_size=8, split="paper")

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no data set 'liver': no folder .*phantoms"):
            load_segmentation("liver", tmp_path, split="paper")
        (tmp_path / "images.npz").touch()
        with pytest.raises(
            DataError, match=r"images.npz is a file; labelled volumes lie in a folder, .* load_dataset's"
        ):
            load_segmentation("images.npz", tmp_path, split="paper")
        (tmp_path / "liver").mkdir()
        with pytest.raises(DataError, match="neither imagesTr and labelsTr"):
            load_segmentation("liver", tmp_path, split="paper")


class TestMmwhs:
    def write(self, folder: Path, labels: np.ndarray, count: int = 4) -> None:
        for index in range(count):
            stem = f"ct_train_10{index:02d}"
            write_nifti(folder / f"{stem}_image.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE) - 50)
            write_nifti(folder / f"{stem}_label.nii.gz", labels)

    def test_label_values_become_classes(self, tmp_path: Path) -> None:
        values = np.array([0, 500, 600, 420, 550, 205, 820, 850])
        labels = values[np.arange(120) % 8].reshape(SHAPE).astype(np.int16)
        self.write(tmp_path / "mmwhs", labels)
        data = load_segmentation("mmwhs", tmp_path, image_size=5, split="paper")
        assert [len(part) for part in data.splits.values()] == [2, 1, 1] and data.num_classes == 8
        assert data.train[0].group.startswith("10") and data.provenance["warnings"] == []
        whole = load_segmentation("mmwhs", tmp_path, split="official", image_size=160)
        expected = label_slices((np.arange(120) % 8).reshape(SHAPE).astype(np.uint8), 160)
        np.testing.assert_array_equal(whole.test[0].label, expected)
        assert load_segmentation("mmwhs", tmp_path, split="paper").image_size == (160, 160)
        (tmp_path / "unpacked" / "mmwhs").mkdir(parents=True)
        (tmp_path / "mmwhs").rename(tmp_path / "unpacked" / "mmwhs" / "ct_train")
        assert len(load_segmentation("mmwhs", tmp_path / "unpacked", split="paper").train) == 2

    def test_stray_values_are_counted_and_other_maps_refused(self, tmp_path: Path) -> None:
        labels = np.zeros(SHAPE, np.int16)
        labels[0, 0, :3] = 500, 421, 421
        self.write(tmp_path / "mmwhs", labels)
        data = load_segmentation("mmwhs", tmp_path, image_size=5, split="paper")
        assert "421 (2 voxels)" in data.provenance["warnings"][0]
        self.write(tmp_path / "mmwhs", np.ones(SHAPE, np.int16))
        with pytest.raises(DataError, match=r"label values must be among 0, 500.*got 1"):
            load_segmentation("mmwhs", tmp_path, split="paper")

    def test_pairs_must_be_whole(self, tmp_path: Path) -> None:
        self.write(tmp_path / "mmwhs", np.zeros(SHAPE, np.int16))
        (tmp_path / "mmwhs" / "ct_train_1001_label.nii.gz").unlink()
        with pytest.raises(DataError, match="no file ct_train_1001_label"):
            load_segmentation("mmwhs", tmp_path, split="paper")


@pytest.mark.skipif(not DATA_ROOT, reason="PROTOKERNELS_DATA names no folder with the real files")
class TestRealData:
    def load(self, name: str, **options: Any) -> SegmentationDataset:
        try:
            return load_segmentation(name, split="paper", **options)
        except DataError as error:
            if "no folder" in str(error) or "no file" in str(error):
                pytest.skip(f"the data are not there: {error}")
            raise

    def test_hippocampus(self) -> None:
        data = self.load("hippocampus", fold=2)
        assert [len(part) for part in data.splits.values()] == [156, 52, 52] and data.image_size == (64, 64)
        shares = np.mean([np.bincount(v.label.reshape(-1), minlength=3) / v.label.size for v in data.test], axis=0)
        # Over all 260 volumes the shares are 94.75, 2.73 and 2.52 %; these are 52 of them.
        np.testing.assert_allclose(shares, (0.9475, 0.0273, 0.0252), atol=0.003)
        assert all(v.spacing[0] == 1 and v.spacing_known for v in data.test)

    def test_acdc(self) -> None:
        data = self.load("acdc", image_size=32)
        assert [len(part) for part in data.splits.values()] == [140, 20, 40]
        assert [len(slices_of(part).images) for part in data.splits.values()] == [1312, 210, 380]
