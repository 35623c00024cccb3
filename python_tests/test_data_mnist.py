# SPDX-License-Identifier: MIT
"""MNIST's files: what is read, what is refused, what is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protokernels.data import DataError, load_dataset
from protokernels.data import idx as idx_module
from python_tests.data_files import idx_bytes, load_quietly, write_mnist


class TestMnist:
    @pytest.mark.parametrize("folder", ["", "mnist", "medmnist", "MNIST/raw"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_reads_idx_from_every_folder(self, tmp_path: Path, folder: str, packed: bool) -> None:
        arrays = write_mnist(tmp_path / folder, packed=packed)
        mnist = load_quietly("mnist", tmp_path)
        np.testing.assert_array_equal(mnist.train.images, arrays["train-images-idx3-ubyte"])
        np.testing.assert_array_equal(mnist.test.labels, arrays["t10k-labels-idx1-ubyte"])
        assert mnist.val is None and list(mnist.splits) == ["train", "test"] and mnist.num_classes == 10
        assert len(mnist.provenance["warnings"]) == 4 and len(mnist.provenance["md5s"]) == 4
        assert str(tmp_path) not in json.dumps(mnist.provenance)

    def test_root_comes_from_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_mnist(tmp_path / "here")
        monkeypatch.setenv("PROTOKERNELS_DATA", str(tmp_path / "here"))
        with pytest.warns(UserWarning):
            assert len(load_dataset("mnist").train) == 12
        with pytest.raises(DataError, match="no file"):
            load_dataset("mnist", tmp_path / "elsewhere")
        monkeypatch.delenv("PROTOKERNELS_DATA")
        monkeypatch.setenv("HOME", str(tmp_path))
        write_mnist(tmp_path / ".cache" / "protokernels" / "mnist")
        with pytest.warns(UserWarning):
            assert len(load_dataset("mnist").train) == 12

    def test_content_decides_not_how_it_was_packed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        arrays = write_mnist(tmp_path)
        published = {
            key: value._replace(md5=hashlib.md5(idx_bytes(arrays[value.name])).hexdigest())
            for key, value in idx_module.PUBLISHED.items()
        }
        monkeypatch.setattr(idx_module, "PUBLISHED", published)
        assert load_dataset("mnist", tmp_path).provenance["warnings"] == []  # the .gz bytes differ from LeCun's

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: content[:10], "truncated"),
            (lambda content: content[:-1], "promises 9,408 bytes of data, only 9,407 follow"),
            (lambda content: content + b"\0", "more follow"),
            (lambda content: b"", "truncated"),
            (lambda content: b"\0\0\x0d\3" + content[4:], "magic number 00000d03, expected 00000803"),
            (lambda content: content[:4] + b"\xff" * 12 + content[16:], "claims"),
            (lambda content: pickle.dumps(content), "magic number"),
        ],
    )
    @pytest.mark.parametrize("packed", [True, False])
    def test_damaged_content_is_refused_by_name(
        self, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str, packed: bool
    ) -> None:
        arrays = write_mnist(tmp_path, packed=packed)
        name = "train-images-idx3-ubyte"
        content = damage(idx_bytes(arrays[name]))
        (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(DataError, match=reason) as caught:
            load_dataset("mnist", tmp_path)
        assert name in str(caught.value)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
    def test_damaged_gzip_is_refused_by_name(self, tmp_path: Path, damage: str) -> None:
        write_mnist(tmp_path)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 0xFF
        path.write_bytes({"truncated": content[: len(content) // 2], "not gzip": b"<html>"}.get(damage, content))
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is truncated or damaged"):
            load_dataset("mnist", tmp_path)

    def test_an_unzipped_name_with_zipped_content_says_so(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.rename(path.with_suffix(""))
        with pytest.raises(DataError, match=r"must end in \.gz"):
            load_dataset("mnist", tmp_path)

    def test_a_gzip_bomb_stops_at_the_promised_size(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 28, 28)
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(50_000_000)))
        with pytest.raises(DataError, match="more follow"):
            load_dataset("mnist", tmp_path)

    def test_labels_that_do_not_belong_to_the_images(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        for labels, reason in ((np.zeros(5, np.uint8), "12 images and 5 labels"), (np.full(12, 11, np.uint8), "0..9")):
            (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
            with pytest.raises(DataError, match=reason), pytest.warns(UserWarning):
                load_dataset("mnist", tmp_path)

    def test_missing_files_say_what_to_fetch_and_where_to_put_it(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_dataset("mnist", tmp_path)
        message = str(caught.value)
        for part in (
            "train-images-idx3-ubyte.gz",
            "https://",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            str(tmp_path / "mnist"),
        ):
            assert part in message
