# SPDX-License-Identifier: MIT
"""Files that lie, are damaged or come over a bad line: nothing is run, nothing huge is allocated, nothing half is kept."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import random
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from protokernels.data import DataError, load_dataset
from protokernels.data import download as download_module
from protokernels.data import idx as idx_module
from protokernels.data.idx import read_idx
from protokernels.data.nifti import read_nifti
from protokernels.data.npz import NpzFile
from python_tests.data_files import idx_bytes, make_arrays, save, write_mnist


class Alarm:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return partial(open, str(self.path), "w"), ()


class TestHostileNpz:
    def test_pickles_are_refused_and_never_run(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        objects = np.array([Alarm(trace)] * 6, dtype=object)
        path = save(tmp_path / "x.npz", make_arrays() | {"train_labels": objects})
        with pytest.raises(DataError, match=r"x\.npz: train_labels holds pickled Python objects"):
            load_dataset(str(path))
        (tmp_path / "y.npz").write_bytes(pickle.dumps(Alarm(trace)))
        with pytest.raises(DataError, match=r"y\.npz is not an \.npz file: it is a Python pickle"):
            load_dataset(str(tmp_path / "y.npz"))
        assert not trace.exists()
        pickle.loads(pickle.dumps(Alarm(trace))).close()
        assert trace.exists()  # so the trace would have been left

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\x93NUMPY\x01\x00", r"single array \(\.npy\)"),
            (b"hello world", "starts with b'hello wo'"),
            (b"PK\x03\x04 and no more", "truncated zip"),
        ],
    )
    def test_other_files_are_told_apart(self, tmp_path: Path, content: bytes, reason: str) -> None:
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            load_dataset(str(tmp_path / "x.npz"))

    def test_a_changed_pixel_is_found(self, tmp_path: Path) -> None:
        arrays = make_arrays()
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        content = bytearray((tmp_path / "x.npz").read_bytes())
        position = content.index(arrays["train_images"].tobytes()[-28:])
        content[position + 27] ^= 1
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DataError, match="train_images is truncated or damaged"):
            load_dataset(str(tmp_path / "x.npz"))

    @pytest.mark.parametrize("compressed", [True, False])
    def test_random_damage_is_refused_or_harmless(self, tmp_path: Path, compressed: bool) -> None:
        arrays = make_arrays(side=4)
        buffer = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(buffer, **arrays)  # type: ignore[arg-type, operator]
        generator, path, refused = random.Random(0), tmp_path / "x.npz", 0
        for _ in range(300):
            content = bytearray(buffer.getvalue())
            for _ in range(generator.choice((1, 1, 3))):
                content[generator.randrange(len(content))] = generator.randrange(256)
            if generator.random() < 0.1:
                content = content[: generator.randrange(len(content))]
            path.write_bytes(content)
            try:
                dataset = load_dataset(str(path))
            except DataError as error:
                assert str(path) in str(error)
                refused += 1
                continue
            for name, split in dataset.splits.items():
                np.testing.assert_array_equal(split.images, arrays[f"{name}_images"])
                np.testing.assert_array_equal(split.labels, arrays[f"{name}_labels"][:, 0])
        assert 150 < refused < 300

    @pytest.mark.parametrize(
        ("shape", "reason"),
        [
            ((2**40, 28, 28), "the archive holds 4,704 bytes"),
            ((-6, 28, 28), "damaged"),
            ((6, 28, 27), r"claims \[6, 28, 27\] of uint8 \(4,536 bytes\)"),
        ],
    )
    def test_a_header_that_lies_is_refused_before_reading(
        self, tmp_path: Path, shape: tuple[int, ...], reason: str
    ) -> None:
        arrays = make_arrays()
        path = save(tmp_path / "x.npz", {key: value for key, value in arrays.items() if key != "train_images"})
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train_images.npy", header.getvalue() + arrays["train_images"].tobytes())
        with pytest.raises(DataError, match=reason):
            load_dataset(str(path))

    def test_an_archive_bomb_is_refused_before_reading(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.npz", {key: value for key, value in make_arrays().items() if key != "train_images"})
        header = io.BytesIO()
        shape = (1024, 1024, 512)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("train_images.npy", "w") as file:
            file.write(header.getvalue())
            for _ in range(512):
                file.write(bytes(1 << 20))
        assert path.stat().st_size < 1_000_000
        with pytest.raises(DataError, match="would unpack to 536,870,912 bytes"):
            load_dataset(str(path))

    def test_unusual_compression_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_LZMA) as archive:
            for key, value in make_arrays().items():
                buffer = io.BytesIO()
                np.save(buffer, value)
                archive.writestr(f"{key}.npy", buffer.getvalue())
        with pytest.raises(DataError, match="packed in a way numpy does not use"):
            load_dataset(str(tmp_path / "x.npz"))


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python had allocated at most while ``work`` was refused, touched or not."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestNothingIsAllocatedForAPromise:
    """A header claims far more than the file holds."""

    def test_npz(self, tmp_path: Path) -> None:
        """10^15 values; a header that claims to be 50 MB long, and is, of spaces."""
        for name, start, spaces in (
            ("array", npy_start(10**15), 0),
            ("header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 50_000_000), 50),
        ):
            path = tmp_path / f"{name}.npz"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
                file.write(start)
                for _ in range(spaces):
                    file.write(b" " * 1_000_000)
            assert peak(partial(NpzFile(path).read, "x")) < 1_000_000

    @pytest.mark.parametrize("packed", [True, False])
    def test_idx(self, tmp_path: Path, packed: bool) -> None:
        path = tmp_path / ("x.gz" if packed else "x")
        for sides in ((2**10,) * 3, (2**17,) * 3):  # just as much as is accepted, and 10^15
            content = bytes((0, 0, 8, 3)) + struct.pack(">3I", *sides) + bytes(3)
            path.write_bytes(gzip.compress(content) if packed else content)
            assert peak(partial(read_idx, path, dimensions=3)) < 1_000_000

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    def test_nifti(self, tmp_path: Path, suffix: str) -> None:
        nibabel = pytest.importorskip("nibabel", reason="NIfTI files need the extra protokernels[train]")
        for side in (2**9, 2**17, 2**40):  # 134 MB, 10^15, more than 64 bits count
            content = bytearray(nibabel.Nifti2Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes())
            content[16:80] = struct.pack("<8q", 3, side, side, side, 1, 1, 1, 1)
            path = tmp_path / f"x{suffix}"
            path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
            assert peak(partial(read_nifti, path)) < 5_000_000  # it is read in blocks of 4 MB


def npy_start(count: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
    return header.getvalue()


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server on this machine and the files it offers; ``short`` answers with less than it announced."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.strip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"") + (10 if "short" in self.path else 0)))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}", files
        web.shutdown()
        thread.join()


class TestDownload:
    def test_medmnist_is_fetched_checked_and_kept(
        self, tmp_path: Path, server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from medmnist.info import INFO

        address, files = server
        content = save(tmp_path / "source.npz", make_arrays()).read_bytes()
        files["x.npz"] = content
        monkeypatch.setitem(INFO["pneumoniamnist"], "url", f"{address}/x.npz")
        monkeypatch.setitem(INFO["pneumoniamnist"], "MD5", hashlib.md5(content).hexdigest())
        root = tmp_path / "root"
        assert load_dataset("pneumoniamnist", root, download=True).provenance["warnings"] == []
        files.clear()
        assert len(load_dataset("pneumoniamnist", root, download=True).train) == 6  # not fetched again
        assert [path.name for path in (root / "medmnist").iterdir()] == ["pneumoniamnist.npz"]

    def test_mnist_comes_from_the_first_mirror_that_has_it(
        self, tmp_path: Path, server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        address, files = server
        arrays = write_mnist(tmp_path / "source")
        published = {}
        for key, value in idx_module.PUBLISHED.items():
            content = (tmp_path / "source" / f"{value.name}.gz").read_bytes()
            files[f"second/{value.name}.gz"] = content
            digests = hashlib.md5(idx_bytes(arrays[value.name])).hexdigest(), hashlib.md5(content).hexdigest()
            published[key] = value._replace(md5=digests[0], packed_md5=digests[1])
        monkeypatch.setattr(idx_module, "PUBLISHED", published)
        monkeypatch.setattr(idx_module, "MIRRORS", (f"{address}/first/", f"{address}/second/"))
        mnist = load_dataset("mnist", tmp_path / "root", download=True)
        np.testing.assert_array_equal(mnist.test.images, arrays["t10k-images-idx3-ubyte"])
        assert len(list((tmp_path / "root" / "mnist").iterdir())) == 4

    @pytest.mark.parametrize(
        ("path", "reason"), [("wrong.npz", "has md5"), ("short.npz", "short.npz"), ("absent.npz", "404")]
    )
    def test_failures_leave_nothing_and_say_what_to_do(
        self, tmp_path: Path, server: tuple[str, dict[str, bytes]], path: str, reason: str
    ) -> None:
        address, files = server
        files["wrong.npz"], files["short.npz"] = b"something else", b"half"
        target = tmp_path / "medmnist" / "x.npz"
        with pytest.raises(DataError, match=reason) as caught:
            download_module.fetch((f"{address}/{path}",), target, hashlib.md5(b"the right one").hexdigest())
        assert str(target) in str(caught.value) and "Fetch it" in str(caught.value)
        assert list(target.parent.iterdir()) == []

    def test_without_a_network(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"could not download .*put it at"):
            download_module.fetch(("http://127.0.0.1:9/x.npz",), tmp_path / "x.npz", "0" * 32)
