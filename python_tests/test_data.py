# SPDX-License-Identifier: MIT
"""Data sets: what is read, and what is refused. All files are made here, except where PROTOKERNELS_DATA names real ones."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protokernels.data import DataError, ImageDataset, Split, available_datasets, load_dataset, to_tensor
from python_tests.data_files import COUNTS, load_quietly, make_arrays, save

DATA_ROOT = os.environ.get("PROTOKERNELS_DATA")


class TestTypes:
    def test_split_refuses_other_dtypes_and_shapes(self) -> None:
        images, labels = np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64)
        assert len(Split(images, labels)) == 2
        for bad_images in (images.astype(np.float32), images[0], np.zeros((2, 4, 4, 4), np.uint8)):
            with pytest.raises(DataError, match="uint8"):
                Split(bad_images, labels)
        for bad_labels in (labels.astype(np.int32), labels[:, None]):
            with pytest.raises(DataError, match="int64"):
                Split(images, bad_labels)
        for values in (
            (list(images), labels),
            (images, [0, 1]),
            (images, labels, [[1]]),
            (images, labels, None, ["a"]),
        ):
            with pytest.raises(DataError, match="must be a numpy array; got list"):
                Split(*values)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="2 images and 1 labels"):
            Split(images, labels[:1])

    def test_dataset_refuses_classes_of_one_name(self) -> None:
        split = Split(np.zeros((2, 4, 4), np.uint8), np.array([0, 2]), np.zeros((2, 2), np.uint8))
        for classes, findings in (("aba", "xy"), ("abc", "yy")):
            with pytest.raises(DataError, match=r"x: names of classes must differ; '[ay]' occurs 2 times"):
                ImageDataset("x", split, None, split, tuple(classes), {}, tuple(findings))

    def test_dataset_refuses_labels_without_a_class(self) -> None:
        images = np.zeros((2, 4, 4), np.uint8)
        split = Split(images, np.array([0, 2]))
        assert ImageDataset("x", split, None, split, ("a", "b", "c")).num_classes == 3
        with pytest.raises(DataError, match=r"0\.\.1 \(2 classes\); got 0\.\.2"):
            ImageDataset("x", split, None, split, ("a", "b"))
        with pytest.raises(DataError, match=r"got -1\.\.0"):
            ImageDataset("x", Split(images, np.array([0, -1])), None, split, ("a", "b", "c"))

    def test_dataset_refuses_empty_and_unequal_splits(self) -> None:
        small, large = (Split(np.zeros((2, side, side), np.uint8), np.zeros(2, np.int64)) for side in (4, 5))
        empty = Split(np.zeros((0, 4, 4), np.uint8), np.zeros(0, np.int64))
        with pytest.raises(DataError, match="one shape"):
            ImageDataset("x", small, None, large, ("a",))
        with pytest.raises(DataError, match="test split is empty"):
            ImageDataset("x", small, None, empty, ("a",))


class TestDigits:
    def test_splits_are_the_documented_ones(self) -> None:
        digits = load_dataset("digits")
        assert {name: len(split) for name, split in digits.splits.items()} == {"train": 1259, "val": 179, "test": 359}
        assert digits.num_classes == 10 and digits.channels == 1 and digits.train.images.shape[1:] == (8, 8)
        for split in digits.splits.values():
            shares = np.bincount(split.labels, minlength=10) / len(split)
            assert np.abs(shares - 0.1).max() < 0.01

    def test_splits_are_disjoint_and_complete(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_dataset("digits")
        rows = [
            image.tobytes() + bytes([label])
            for split in digits.splits.values()
            for image, label in zip(split.images, split.labels, strict=True)
        ]
        source = load_digits()
        expected = [
            np.rint(image * 255 / 16).astype(np.uint8).tobytes() + bytes([label])
            for image, label in zip(source.images, source.target, strict=True)
        ]
        assert sorted(rows) == sorted(expected)
        assert digits.train.images.min() == 0 and digits.train.images.max() == 255

    def test_split_never_changes(self) -> None:
        # A change here changes every published number on digits.
        digest = hashlib.md5()
        for split in load_dataset("digits").splits.values():
            digest.update(split.images.tobytes() + split.labels.astype("<i8").tobytes())
        assert digest.hexdigest() == "4cc5d9a9b6d43cec8bb90115d0b52265"
        assert load_dataset("DIGITS").provenance == load_dataset("digits").provenance


class TestMedmnistFlag:
    @pytest.mark.parametrize(
        ("name", "side", "channels", "classes"),
        [
            ("pneumoniamnist", 28, 1, 2),
            ("bloodmnist", 28, 3, 8),
            ("pneumoniamnist_64", 64, 1, 2),
            ("retinamnist_128", 128, 3, 5),
        ],
    )
    def test_reads_grey_and_colour_at_all_sizes(
        self, tmp_path: Path, name: str, side: int, channels: int, classes: int
    ) -> None:
        arrays = make_arrays(side, channels, classes=2)
        save(tmp_path / "medmnist" / f"{name}.npz", arrays)
        dataset = load_quietly(name, tmp_path)
        assert (dataset.name, dataset.channels, dataset.num_classes) == (name, channels, classes)
        for split in COUNTS:
            np.testing.assert_array_equal(dataset.splits[split].images, arrays[f"{split}_images"])
            np.testing.assert_array_equal(dataset.splits[split].labels, arrays[f"{split}_labels"][:, 0])

    def test_class_names_and_provenance(self, tmp_path: Path) -> None:
        path = save(tmp_path / "pneumoniamnist.npz", make_arrays())
        dataset = load_quietly("pneumoniamnist", tmp_path)
        provenance = dataset.provenance
        assert dataset.class_names == ("normal", "pneumonia")
        assert provenance["md5s"] == {"pneumoniamnist.npz": hashlib.md5(path.read_bytes()).hexdigest()}
        assert provenance["published_md5s"] == {"pneumoniamnist.npz": "28209eda62fecd6e6a2d98b1501bb15f"}
        (warning,) = provenance["warnings"]
        assert "'train': 6" in warning and "'train': 4708" in warning
        assert str(tmp_path) not in json.dumps(provenance)

    def test_the_published_file_gives_no_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from medmnist.info import INFO

        path = save(tmp_path / "pneumoniamnist.npz", make_arrays())
        monkeypatch.setitem(INFO["pneumoniamnist"], "MD5", hashlib.md5(path.read_bytes()).hexdigest())
        assert load_dataset("pneumoniamnist", tmp_path).provenance["warnings"] == []

    @pytest.mark.parametrize(
        ("name", "side", "channels"), [("pneumoniamnist", 64, 1), ("pneumoniamnist_64", 28, 1), ("bloodmnist", 28, 1)]
    )
    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path, name: str, side: int, channels: int) -> None:
        save(tmp_path / f"{name}.npz", make_arrays(side, channels))
        with pytest.raises(DataError, match=f"is not {name}: expected"):
            load_dataset(name, tmp_path)

    def test_labels_beyond_the_classes_are_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "pneumoniamnist.npz", make_arrays(classes=3))
        with pytest.raises(DataError, match=r"pneumoniamnist.*0\.\.1"), pytest.warns(UserWarning):
            load_dataset("pneumoniamnist", tmp_path)

    def test_unsupported_and_unknown_names(self, tmp_path: Path) -> None:
        for name, reason in (
            ("organmnist3d", "volumes"),
            ("organmnist3d_64", "volumes"),
            ("lungmnist", "unknown MedMNIST set"),
            ("cifar10", "unknown data set"),
            ("Hippocampus", "holds labelled volumes; load them with protokernels.data.load_segmentation"),
            ("pneumoniamnist_32", "unknown data set"),
            ("", "unknown data set"),
        ):
            with pytest.raises(DataError, match=reason):
                load_dataset(name, tmp_path)
        names = available_datasets()
        assert {"digits", "mnist", "chest_nih", "chest_kermany", "pneumoniamnist", "chestmnist"} <= set(names)
        assert not {"organmnist3d"} & set(names)

    def test_without_medmnist(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save(tmp_path / "pneumoniamnist.npz", make_arrays())
        monkeypatch.setitem(sys.modules, "medmnist.info", None)
        own = ("chest_nih", "chest_kermany", "chest_kermany_subtype", "brain_tumor", "brain_tumor_types", "brats")
        assert available_datasets() == ("digits", "mnist", *own)
        with pytest.raises(ImportError, match=r"pip install \"protokernels\[train\]\""):
            load_dataset("pneumoniamnist", tmp_path)
        assert load_dataset(str(path)).num_classes == 2

    def test_missing_file_says_what_to_fetch(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_dataset("bloodmnist_64", tmp_path)
        for part in ("bloodmnist_64.npz", "https://zenodo.org", str(tmp_path / "medmnist"), "download=True"):
            assert part in str(caught.value)


class TestNpzFile:
    def test_without_val_and_without_names(self, tmp_path: Path) -> None:
        arrays = {key: value for key, value in make_arrays(classes=3).items() if not key.startswith("val")}
        arrays["patient_ids"] = np.array(["a", "b"])
        dataset = load_dataset(save(tmp_path / "mine.npz", arrays))
        assert dataset.name == "mine" and dataset.val is None
        assert dataset.class_names == ("class 0", "class 1", "class 2")
        assert dataset.provenance["warnings"] == []

    def test_patients_from_the_file(self, tmp_path: Path) -> None:
        arrays = make_arrays() | {
            "train_patient_ids": np.array(list("aabbcc")),
            "test_patient_ids": np.array(list("xcax")),
        }
        with pytest.warns(UserWarning, match="2 patients occur in train and in test"):
            dataset = load_dataset(save(tmp_path / "x.npz", arrays))
        assert dataset.train.groups is not None and dataset.train.groups.tolist() == list("aabbcc")
        assert dataset.val is not None and dataset.val.groups is None
        assert dataset.provenance["warnings"] == ["x.npz: 2 patients occur in train and in test"]
        arrays["train_patient_ids"] = np.arange(6)
        with pytest.raises(
            DataError, match=r"train_patient_ids must be text of shape \[6\]; got int64 \[6\]; save ids.astype"
        ):
            load_dataset(save(tmp_path / "y.npz", arrays))

    def test_what_to_do_about_other_values_is_said(self, tmp_path: Path) -> None:
        arrays = make_arrays()
        deep = save(tmp_path / "x.npz", arrays | {"train_images": arrays["train_images"].astype(np.uint16)})
        with pytest.raises(
            DataError, match=r"must be uint8, 0\.\.255; got uint16 .*; scale all images of the file alike"
        ):
            load_dataset(deep)
        words = save(tmp_path / "y.npz", arrays | {"train_labels": np.array(["no", "yes"] * 3)})
        with pytest.raises(
            DataError, match=r"whole numbers; got <U3 \[6\]; number the classes from 0 on, their names are class_names"
        ):
            load_dataset(words)

    def test_class_names_from_the_file(self, tmp_path: Path) -> None:
        arrays = make_arrays() | {"class_names": np.array(["healthy", "ill", "unclear"])}
        assert load_dataset(str(save(tmp_path / "x.npz", arrays))).class_names == ("healthy", "ill", "unclear")
        with pytest.raises(DataError, match=r"labels must lie in 0\.\.0"):
            load_dataset(str(save(tmp_path / "y.npz", arrays | {"class_names": np.array(["one"])})))
        with pytest.raises(DataError, match="class_names must be text"):
            load_dataset(str(save(tmp_path / "z.npz", arrays | {"class_names": np.arange(3)})))

    def test_path_below_the_root(self, tmp_path: Path) -> None:
        save(tmp_path / "folder" / "x.npz", make_arrays())
        assert load_dataset("folder/x.npz", tmp_path).name == "x"
        with pytest.raises(DataError, match="no file"):
            load_dataset("x.npz", tmp_path)

    @pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "<u8"])
    @pytest.mark.parametrize("flat", [True, False])
    def test_label_dtypes_and_shapes(self, tmp_path: Path, dtype: str, flat: bool) -> None:
        arrays = make_arrays()
        expected = arrays["train_labels"][:, 0].astype(np.int64)
        for split in COUNTS:
            labels = arrays[f"{split}_labels"].astype(dtype)
            arrays[f"{split}_labels"] = labels[:, 0] if flat else labels
        labels = load_dataset(str(save(tmp_path / "x.npz", arrays))).train.labels
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, expected)

    def test_fortran_order_single_channel_and_uncompressed(self, tmp_path: Path) -> None:
        arrays = make_arrays(channels=3)
        np.savez(tmp_path / "x.npz", **{key: np.asfortranarray(value) for key, value in arrays.items()})  # type: ignore[arg-type]
        dataset = load_dataset(str(tmp_path / "x.npz"))
        np.testing.assert_array_equal(dataset.train.images, arrays["train_images"])
        assert dataset.train.images.flags.c_contiguous
        grey = {key: value[..., :1] if "images" in key else value for key, value in arrays.items()}
        dataset = load_dataset(str(save(tmp_path / "y.npz", grey)))
        np.testing.assert_array_equal(dataset.test.images, arrays["test_images"][..., 0])

    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("train_images", np.zeros((6, 28, 28), np.float32), r"must be uint8, 0\.\.255; got float32"),
            ("train_images", np.zeros((6, 3, 28, 28), np.uint8), "move the channels to the end"),
            ("train_images", np.zeros((6, 28, 28, 28), np.uint8), "volumes are not supported"),
            ("train_images", np.zeros((6, 28), np.uint8), r"\[N, H, W\]"),
            ("train_images", np.zeros((6, 0, 28), np.uint8), "sides of 1 to 4096"),
            ("train_images", np.zeros((6, 1, 5000), np.uint8), "sides of 1 to 4096"),
            ("train_images", np.zeros((5, 28, 28), np.uint8), "N = 5 as the images"),
            ("train_labels", np.zeros((6, 14), np.uint8), "14 labels per image"),
            ("train_labels", np.zeros((6, 1), np.float64), "whole numbers; got float64"),
            ("train_labels", np.full((6, 1), -1), "must not be negative; got -1"),
            ("train_labels", np.full((6, 1), 10**9), "labels go up to 1000000000"),
            ("train_labels", np.full((6, 1), 2**64 - 1, np.uint64), "got 18446744073709551615"),
            ("val_images", np.zeros((3, 30, 30), np.uint8), "images of one shape"),
        ],
    )
    def test_wrong_arrays_are_refused_by_name(self, tmp_path: Path, key: str, value: np.ndarray, reason: str) -> None:
        path = save(tmp_path / "x.npz", make_arrays() | {key: value})
        with pytest.raises(DataError, match=reason) as caught:
            load_dataset(str(path))
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("key", ["train_images", "train_labels", "test_images", "val_labels"])
    def test_missing_arrays_are_named(self, tmp_path: Path, key: str) -> None:
        arrays = make_arrays()
        del arrays[key]
        with pytest.raises(DataError, match="expected the arrays"):
            load_dataset(str(save(tmp_path / "x.npz", arrays)))

    def test_empty_splits_are_refused(self, tmp_path: Path) -> None:
        empty = {"test_images": np.zeros((0, 28, 28), np.uint8), "test_labels": np.zeros((0, 1), np.uint8)}
        with pytest.raises(DataError, match="at least one"):
            load_dataset(str(save(tmp_path / "x.npz", make_arrays() | empty)))


class TestToTensor:
    def test_scales_and_keeps_the_size(self) -> None:
        images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
        tensor = to_tensor(images, size=None)
        assert tensor.dtype == torch.float32 and tensor.shape == (1, 1, 16, 16) and tensor.is_contiguous()
        torch.testing.assert_close(tensor.flatten() * 255, torch.arange(256.0))
        assert tensor.min() == 0 and tensor.max() == 1

    def test_doubling_by_hand(self) -> None:
        # centres at i + 0.5: output 0 lies before the first centre, output 1 a quarter of the way between the two
        tensor = to_tensor(np.array([[[0, 255], [0, 255]]], np.uint8), size=4)
        torch.testing.assert_close(tensor[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))

    @pytest.mark.parametrize("side", [8, 28, 64])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_equals_interpolate(self, side: int, channels: int) -> None:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (5, side, side) + ((3,) if channels == 3 else ()), dtype=np.uint8)
        planes = torch.from_numpy(images.reshape(5, side, side, channels)).permute(0, 3, 1, 2).float() / 255
        expected = F.interpolate(planes, (32, 32), mode="bilinear", align_corners=False)
        tensor = to_tensor(images)
        torch.testing.assert_close(tensor, expected)
        assert tensor.is_contiguous() and tensor.min() >= 0 and tensor.max() <= 1

    def test_chunks_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = np.random.default_rng(0).integers(0, 256, (23, 9, 11), dtype=np.uint8)
        whole = to_tensor(images, size=12)
        monkeypatch.setattr("protokernels.data.tensors.CHUNK", 5)
        assert torch.equal(to_tensor(images, size=12), whole) and whole.shape == (23, 1, 12, 12)

    def test_read_only_empty_and_tensor_input(self) -> None:
        images = np.full((2, 4, 4, 3), 7, np.uint8)
        images.flags.writeable = False
        assert torch.equal(to_tensor(images, size=4), to_tensor(torch.full((2, 4, 4, 3), 7, dtype=torch.uint8), size=4))
        assert to_tensor(images[:0]).shape == (0, 3, 32, 32)

    @pytest.mark.parametrize(
        ("images", "size"),
        [
            (np.zeros((2, 4, 4), np.float32), 32),
            (np.zeros((4, 4), np.uint8), 32),
            (np.zeros((2, 3, 4, 4), np.uint8), 32),
            (np.zeros((2, 4, 4), np.uint8), 0),
            (np.zeros((2, 0, 4), np.uint8), 32),
        ],
    )
    def test_refuses_the_rest(self, images: np.ndarray, size: int) -> None:
        with pytest.raises(ValueError, match="to_tensor"):
            to_tensor(images, size=size)


def test_import_is_light() -> None:
    """Neither scikit-learn nor medmnist nor torchvision is imported before a data set needs it."""
    code = (
        "import sys, protokernels.data; "
        "print([name for name in ('sklearn', 'medmnist', 'torchvision', 'pandas') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(DATA_ROOT is None, reason="PROTOKERNELS_DATA is not set: no real data at hand")
class TestRealData:
    def test_mnist(self) -> None:
        try:
            mnist = load_dataset("mnist")
        except DataError as error:
            pytest.skip(f"MNIST is not in PROTOKERNELS_DATA: {error}")
        assert mnist.train.images.shape == (60000, 28, 28) and mnist.test.images.shape == (10000, 28, 28)
        if not mnist.provenance["warnings"]:  # the published files: LeCun's class counts
            assert np.bincount(mnist.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
            assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]

    @pytest.mark.filterwarnings("ignore:.*not the published file")
    def test_pneumoniamnist(self) -> None:
        try:
            dataset = load_dataset("pneumoniamnist")
        except DataError as error:
            pytest.skip(f"PneumoniaMNIST is not in PROTOKERNELS_DATA: {error}")
        counts = {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()}
        assert counts == {"train": [1214, 3494], "val": [135, 389], "test": [234, 390]}
        published = dataset.provenance["md5s"] == dataset.provenance["published_md5s"]
        assert len(dataset.provenance["warnings"]) == (0 if published else 1)
