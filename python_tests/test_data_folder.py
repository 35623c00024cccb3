# SPDX-License-Identifier: MIT
"""Data sets in a folder of ``.npy`` files, whole or in parts: the same values and results as one ``.npz``, wherever it is cut."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protokernels.data import DataError, Split, load_dataset, npy
from protokernels.data.array_folder import ArrayFolder, open_arrays, shard_files
from protokernels.data.content import content_md5
from protokernels.data.datasets import data_title
from protokernels.data.sharded import ShardedArray
from python_tests.data_files import make_arrays, save

CUTS = {"train": [1, 1, 4], "val": [2], "test": []}  # where the arrays of a split end and the next file begins


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array that may stay on the disk does, however small."""
    monkeypatch.setattr(npy, "MAP_FROM", 1)


def with_patients(**options: Any) -> dict[str, np.ndarray]:
    """Patients whose names grow longer, so that the files of one array have texts of different lengths."""
    arrays = make_arrays(**options)
    ids = {
        f"{name}_patient_ids": np.array([f"{name}{10**i}" for i in range(n)]) for name, n in _lengths(arrays).items()
    }
    return {**arrays, **ids, "class_names": np.array(["normal", "pneumonia"])}


def _lengths(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: len(arrays[f"{name}_labels"]) for name in CUTS}


def write(folder: Path, arrays: dict[str, np.ndarray], *, parts: bool) -> Path:
    """A file per array, or with ``parts`` one per cut for those of the splits, of which one stays whole and one is empty."""
    folder.mkdir()
    for name, array in arrays.items():
        if not parts or name in ("class_names", "test_labels"):
            np.save(folder / f"{name}.npy", array)
            continue
        (folder / name).mkdir()
        for index, part in enumerate(np.split(array, CUTS[name.split("_")[0]])):
            short = np.array(part.tolist(), dtype=str) if array.dtype.kind == "U" and len(part) else part
            np.save(folder / name / f"part-{index + 9}.npy", short)  # 9, 10, 11: in the order of the numbers
    return folder


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_the_data_set_is_that_of_the_npz_file(
    tmp_path: Path, channels: int, on_disk: bool, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "MAP_FROM", 1 if on_disk else 1 << 40)
    arrays = with_patients(channels=max(channels, 1))
    if channels == 1:
        arrays = {key: value[..., None] if "images" in key else value for key, value in arrays.items()}
    expected = load_dataset(save(tmp_path / "x.npz", arrays))
    found = load_dataset(write(tmp_path / "mine", arrays, parts=parts))
    assert (found.name, found.class_names, found.channels) == ("mine", expected.class_names, expected.channels)
    assert found.provenance["source"] == "folder of npy files" and content_md5(found) == content_md5(expected)
    for name, split in found.splits.items():
        whole = expected.splits[name]
        assert isinstance(split.images, ShardedArray if parts and name != "test" else np.memmap) == on_disk
        np.testing.assert_array_equal(np.asarray(split.images), np.asarray(whole.images))
        np.testing.assert_array_equal(split.labels, whole.labels)
        np.testing.assert_array_equal(split.groups, whole.groups)
        np.testing.assert_array_equal(split.take(np.array([2, 0])).images, whole.images[[2, 0]])
        np.testing.assert_array_equal(np.asarray(split.join(whole).images), np.concatenate([whole.images] * 2))


def test_an_unpacked_archive_is_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = make_arrays()
    with zipfile.ZipFile(save(tmp_path / "x.npz", arrays)) as archive:
        archive.extractall(tmp_path / "mnist")
    monkeypatch.setenv("PROTOKERNELS_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "mnist", "./mnist", "mnist/"):  # not the name of a known data set
        np.testing.assert_array_equal(load_dataset(name).val.images, arrays["val_images"])  # type: ignore[union-attr]
    (tmp_path / "mnist").rename(tmp_path / "mine.v2")
    monkeypatch.chdir(tmp_path / "mine.v2")
    assert load_dataset(".").name == "mine.v2"
    monkeypatch.chdir("/")
    assert load_dataset("mine.v2").name == "mine.v2"
    with pytest.raises(
        DataError, match=r"unknown data set 'mine'; expected one of .* the path of an \.npz file or a folder"
    ):
        load_dataset("mine")
    with pytest.raises(DataError, match="unknown data set ''"):
        load_dataset("")


class TestFingerprint:
    def test_is_of_the_arrays_that_count(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "mine", make_arrays(), parts=True)
        before = load_dataset(folder).provenance
        assert set(before["files"]) == set(before["md5s"]) > {"train_images/", "test_labels.npy"}
        np.save(folder / "train-embeddings.npy", np.zeros(3))
        (folder / "train_images" / "._part-9.npy").write_bytes(b"what a Mac leaves behind")
        (folder / "train_images" / "notes.txt").write_text("of a person")
        assert load_dataset(folder).provenance == before

    def test_tells_any_change(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "mine", make_arrays(), parts=True)
        before = load_dataset(folder).provenance["md5s"]
        part = folder / "train_images" / "part-11.npy"
        np.save(part, 255 - np.load(part))
        after = load_dataset(folder).provenance["md5s"]
        assert {name for name in before if before[name] != after[name]} == {"train_images/"}


ROWS = np.random.default_rng(0).integers(0, 256, (23, 3, 2), dtype=np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ShardedArray:
    folder = tmp_path_factory.mktemp("mine") / "rows"
    folder.mkdir()
    for index, part in enumerate(np.split(ROWS, [5, 5, 6, 17])):
        np.save(folder / f"{index}.npy", np.asfortranarray(part) if index == 3 else part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npy, "MAP_FROM", 1)
        rows = ArrayFolder(folder.parent).read_or_map("rows")
    assert isinstance(rows, ShardedArray) and len(rows.shards) == 4  # the empty file is none
    return rows


class TestRowsOfSeveralFiles:
    @given(st.data())
    def test_are_those_of_one_array(self, files: ShardedArray, data: st.DataObject) -> None:
        numbers = st.integers(-23, 22)
        ends = st.none() | st.integers(-30, 30)
        index = data.draw(
            numbers
            | st.builds(slice, ends, ends, st.none() | st.integers(-4, 4).filter(bool))
            | st.lists(numbers, max_size=30).map(lambda rows: np.array(rows, np.int64))
            | st.lists(st.booleans(), min_size=23, max_size=23).map(np.array)
            | st.lists(numbers, min_size=6, max_size=6).map(lambda rows: np.array(rows, np.int32).reshape(2, 3))
        )
        found = files[index]
        assert found.dtype == np.uint8 and found.shape == ROWS[index].shape
        np.testing.assert_array_equal(found, ROWS[index])

    def test_look_like_one_array(self, files: ShardedArray) -> None:
        assert (files.shape, files.ndim, files.dtype, len(files)) == ((23, 3, 2), 3, np.uint8, 23)
        np.testing.assert_array_equal(np.asarray(files, dtype=np.float32), ROWS.astype(np.float32))
        np.testing.assert_array_equal(np.concatenate([ROWS, files]), np.concatenate([ROWS, ROWS]))

    def test_lose_a_dimension_of_length_one(self, files: ShardedArray) -> None:
        one = ShardedArray(files.shards, (3, 1, 2), files.dtype)
        for axis in (2, -2):
            np.testing.assert_array_equal(one.squeeze(axis)[15:19], ROWS[15:19])
        for axis in (1, 3, 0):
            with pytest.raises(ValueError, match="cannot be left out"):
                one.squeeze(axis)

    @pytest.mark.parametrize(
        "index", [23, -24, np.array([0, 23]), np.zeros(22, bool), np.array([0.5]), "3", (0, 1), (0,)]
    )
    def test_that_do_not_exist_are_refused(self, files: ShardedArray, index: Any) -> None:
        with pytest.raises(IndexError):
            files[index]

    def test_of_a_file_that_was_cut_short_since(self, tmp_path: Path, mapping: None) -> None:
        folder = write(tmp_path / "mine", make_arrays(), parts=True)
        images = load_dataset(folder).train.images
        part = folder / "train_images" / "part-12.npy"
        part.write_bytes(part.read_bytes()[:-1])
        assert len(images[:4]) == 4
        with pytest.raises(ValueError, match="length is greater than file size"):
            images[4:]


def replace(name: str, array: np.ndarray) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        np.save(folder / name, array, allow_pickle=True)

    return change


def shorten(folder: Path) -> None:
    path = folder / "train_images" / "part-12.npy"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(folder: Path) -> None:
    with (folder / "train_images" / "part-12.npy").open("ab") as file:
        np.save(file, np.zeros(3))


def claim(folder: Path) -> None:
    with (folder / "train_images" / "part-12.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**50, 28, 28)})


PART = "train_images/part-12.npy"


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shorten,
            r"part-12\.npy is damaged: its header claims \[2, 28, 28\] of uint8 \(1,568 bytes\), the file holds 1,567",
        ),
        (lengthen, r"part-12\.npy is damaged: its header claims"),
        (claim, r"part-12\.npy is damaged: its header claims \[1125899906842624, 28, 28\]"),
        (replace(PART, np.array([{}] * 2)), r"part-12\.npy holds pickled Python objects"),
        (
            replace(PART, np.zeros((2, 28, 27), np.uint8)),
            r"part-12\.npy: all parts .* part-9\.npy has \[1, 28, 28\]; got \[2, 28, 27\]",
        ),
        (
            replace(PART, np.zeros((2, 28, 28), np.uint16)),
            r"part-12\.npy: all parts .* part-9\.npy has uint8; got uint16",
        ),
        (
            replace(PART, np.zeros((3, 28, 28), np.uint8)),
            r"train_images and train_labels must have .* part-12\.npy differs",
        ),
        (replace("train_labels/part-13.npy", np.zeros((0, 1), np.uint8)), r"same names .* part-13\.npy differs"),
        (
            replace("train_images.npy", np.zeros(3)),
            r"train_images is a file train_images\.npy and a folder train_images",
        ),
        (replace("train_patient_ids.npy", np.arange(6)), "train_patient_ids must be text of shape"),
        (lambda folder: (folder / PART).write_bytes(b""), r"part-12\.npy is truncated or damaged"),
        (
            lambda folder: (folder / "test_labels.npy").unlink(),
            r"arrays test_images and test_labels; it holds .*train_images",
        ),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, change: Callable[[Path], object], message: str, on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "MAP_FROM", 1 if on_disk else 1 << 40)
    folder = write(tmp_path / "mine", make_arrays(), parts=True)
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_without_arrays_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the arrays train_images and train_labels; it holds nothing"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="no array 'x'; it holds nothing"):
        open_arrays(tmp_path).read("x")


def test_a_link_that_leads_nowhere_is_no_smaller_data_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", make_arrays(), parts=True)
    for name in ("train_images", "train_labels"):
        (folder / name / "part-9.npy").unlink()
        (folder / name / "part-9.npy").symlink_to(tmp_path / "not mounted")
    with pytest.raises(FileNotFoundError, match=r"mine/train_images/part-9\.npy"):
        load_dataset(folder)


def test_names_of_folders_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "scans.v2", make_arrays(), parts=False)
    assert data_title(folder) == "scans.v2" and data_title("a/scans.v2.npz") == data_title("scans.v2.NPZ") == "scans.v2"
    (folder / "x").mkdir()
    for place, name in ((folder, "."), (folder / "x", "..")):
        monkeypatch.chdir(place)
        assert data_title(name) == load_dataset(name).name == "scans.v2"


def test_a_part_without_rows_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", make_arrays(), parts=True)
    np.save(folder / "train_labels" / "part-9.npy", np.array(1))
    with pytest.raises(DataError, match=r"part-9\.npy: all parts of one array must agree .* got \[\]"):
        open_arrays(folder).read("train_labels")


def test_memory_limits_only_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "mine", make_arrays(), parts=True)
    monkeypatch.setattr(npy, "system_memory", lambda: 2000)
    with pytest.raises(
        DataError, match=r"train_images claims \[6, 28, 28\] of uint8, 4,704 bytes; at most 2,000 are loaded"
    ):
        load_dataset(folder)
    monkeypatch.setattr(npy, "MAP_FROM", 2000)
    assert isinstance(load_dataset(folder).train.images, ShardedArray)


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["b", "a10", "a9", "a09", "a1b10", "a1b9", "2", "10"]
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.zeros(1))
    assert [file.stem for file in shard_files(tmp_path)] == ["2", "10", "a1b9", "a1b10", "a09", "a9", "a10", "b"]


def test_only_images_may_stay_in_several_files(files: ShardedArray) -> None:
    with pytest.raises(DataError, match="labels must be a numpy array"):
        Split(ROWS, files)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_file_in_fortran_order(tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy, "MAP_FROM", 1 if on_disk else 1 << 40)
    np.save(tmp_path / "rows.npy", np.asfortranarray(ROWS))
    found = open_arrays(tmp_path).read_or_map("rows")
    assert isinstance(found, ShardedArray) == on_disk
    np.testing.assert_array_equal(np.asarray(found), ROWS)


@pytest.mark.usefixtures("mapping")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # of what so short a training is worth
def test_training_gives_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")
    from protokernels.papers import vaesim
    from protokernels.training import RunFolder

    arrays, scores, states = make_arrays(), [], []
    for path in (save(tmp_path / "mine.npz", arrays), write(tmp_path / "mine", arrays, parts=True)):
        config = vaesim.VAESimConfig.preset(
            "fair", data=str(path), epochs=2, num_prototypes=2, latent_dim=2, image_size=16, batch_size=4
        )
        folder = tmp_path / f"run{len(states)}"
        results = vaesim.train(config, folder, figures=False, quiet=True, device="cpu")
        scores.append(results["splits"])
        states.append((RunFolder(folder).checkpoints.load() or {})["model"])
    assert scores[0] == scores[1]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
