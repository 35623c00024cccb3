# SPDX-License-Identifier: MIT
"""MNIST's idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from .download import fetch, file_md5, find_file, searched
from .errors import DataError
from .types import ImageDataset, Split

LIMIT = 1 << 30  # bytes in one array; the largest of MNIST has 47 million
MAX_RATIO = 1100  # gzip shrinks nothing by more
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


class _Published(NamedTuple):
    name: str  # of the unzipped file
    md5: str  # of the unzipped file
    packed_md5: str  # of the .gz


PUBLISHED = {
    ("train", "images"): _Published(
        "train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb", "f68b3c2dcbeaaa9fbdd348bbdeb94873"
    ),
    ("train", "labels"): _Published(
        "train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624", "d53e105ee54ea40749a09fcbcd1e9432"
    ),
    ("test", "images"): _Published(
        "t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea", "9fb629c4189551a2d022fa330f9573f3"
    ),
    ("test", "labels"): _Published(
        "t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637", "ec29112dd5afa0611ce80d1b7f02629c"
    ),
}


def load_mnist(root: Path, *, download: bool) -> ImageDataset:
    """MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, no validation split.

    Each of the four files may be gzipped or not.
    """
    arrays: dict[tuple[str, str], np.ndarray] = {}
    provenance: dict[str, Any] = {
        "source": "MNIST idx files",
        "files": [],
        "md5s": {},
        "published_md5s": {},
        "warnings": [],
    }
    for (split, kind), published in PUBLISHED.items():
        path = _locate(root, published, download=download)
        array, content_md5 = read_idx(path, dimensions=3 if kind == "images" else 1)
        arrays[split, kind] = array
        packed = path.suffix == ".gz"
        file_digest = file_md5(path) if packed else content_md5
        provenance["files"].append(path.name)
        provenance["md5s"][path.name] = file_digest
        provenance["published_md5s"][path.name] = published.packed_md5 if packed else published.md5
        if content_md5 != published.md5:  # the content counts: gzip writes different bytes on different machines
            message = (
                f"{path.name} is not the published file: its content has md5 {content_md5}, expected {published.md5}; "
                "it is used as it is"
            )
            provenance["warnings"].append(message)
            warnings.warn(message, UserWarning, stacklevel=3)
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = Split(arrays[split, "images"], arrays[split, "labels"].astype(np.int64))
        except DataError as error:
            raise DataError(f"mnist, {split} files in {root}: {error}") from error
    class_names = tuple(str(digit) for digit in range(10))
    return ImageDataset("mnist", splits["train"], None, splits["test"], class_names, provenance)


def read_idx(path: Path, *, dimensions: int) -> tuple[np.ndarray, str]:
    """Reads an idx file of uint8 values.

    The header is checked before anything is allocated: magic number ``00 00 08 d`` for uint8 with d dimensions, then d
    big-endian uint32 sizes, whose product must be exactly the number of bytes that follow.

    Args:
        path: the file; gzipped where the name ends in ``.gz``.
        dimensions: expected number of dimensions, 3 for images and 1 for labels.

    Returns:
        The array, and the md5 of the unzipped file.

    Raises:
        DataError: with the file's name and what is wrong with it.
    """
    try:
        with cast("IO[bytes]", gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            header = file.read(4 + 4 * dimensions)
            shape = _parse_header(path, header, dimensions)
            size = math.prod(shape)
            if size > LIMIT:
                raise DataError(
                    f"{path}: the header claims {size:,} bytes of data, more than the {LIMIT:,} accepted; the file is "
                    "damaged"
                )
            present = path.stat().st_size * (MAX_RATIO if path.suffix == ".gz" else 1)
            content = file.read(min(size + 1, present))  # memory is allocated for as much as is asked for
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); delete it and fetch it again") from error
    if len(content) != size:
        found = f"only {len(content):,}" if len(content) < size else "more"
        raise DataError(
            f"{path} is truncated or damaged: its header {list(shape)} promises {size:,} bytes of data, {found} "
            "follow; fetch it again"
        )
    digest = hashlib.md5(header, usedforsecurity=False)
    digest.update(content)
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape), digest.hexdigest()


def _parse_header(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * dimensions:
        raise DataError(
            f"{path} is truncated: {len(header)} bytes, an idx header with {dimensions} dimensions has "
            f"{4 + 4 * dimensions}"
        )
    expected = bytes((0, 0, 8, dimensions))
    if header[:4] != expected:
        hint = "; it is gzipped, so its name must end in .gz" if header[:2] == b"\x1f\x8b" else ""
        raise DataError(
            f"{path} is not the expected idx file: magic number {header[:4].hex()}, expected {expected.hex()}{hint}"
        )
    return struct.unpack(f">{dimensions}I", header[4:])


def _locate(root: Path, published: _Published, *, download: bool) -> Path:
    packed = f"{published.name}.gz"
    path = find_file(root, (packed, published.name))
    if path is not None:
        return path
    target = root / "mnist" / packed
    urls = [mirror + packed for mirror in MIRRORS]
    if not download:
        raise DataError(
            f"mnist: no file {packed} (nor {published.name}) in {searched(root)}; pass --download (download=True), or fetch "
            f"{urls[0]} (md5 {published.packed_md5}) and put it at {target}"
        )
    fetch(urls, target, published.packed_md5)
    return target
