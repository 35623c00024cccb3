# SPDX-License-Identifier: MIT
"""Arrays out of a folder: ``NAME.npy``, or ``NAME/`` with any number of ``.npy`` files that are its parts in the order of
their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import npy
from .download import file_md5
from .errors import DataError
from .npy import Header, check_memory, named_errors, read_header, read_values
from .npz import NpzFile
from .sharded import Shard, ShardedArray


class ArrayFolder:
    """Reads single arrays as :class:`.npz.NpzFile` does, which has the same methods; an ``.npz`` file unpacked is such a folder.

    Every failure is a :class:`DataError` with the file's name and the reason.
    """

    source = "folder of npy files"

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = {file.stem: [file] for file in shard_files(path)}
        parts = {folder.name: files for folder in path.iterdir() if folder.is_dir() and (files := shard_files(folder))}
        self._files = {**whole, **parts}
        self._seen: dict[str, list[Header]] = {}  # of the arrays that were asked for, a header of each file
        if both := sorted(whole.keys() & parts.keys()):
            raise DataError(f"{path}: {both[0]} is a file {both[0]}.npy and a folder {both[0]}; expected one of them")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self._files)

    def header(self, name: str) -> Header:
        """Shape and dtype of an array, without reading it."""
        return joined(self._headers(name), self._files[name])

    def read(self, name: str) -> np.ndarray:
        """An array in C order."""
        check_memory(self.header(name), f"{self.path}: {name}")
        parts = []
        for path in self._files[name]:
            with named_errors(str(path)), path.open("rb") as file:
                parts.append(read_values(file, read_header(file, path.stat().st_size, str(path), "file")))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_or_map(self, name: str) -> np.ndarray | ShardedArray:
        """As :meth:`read`, but one of :data:`.npy.MAP_FROM` bytes or more stays on the disk and may be larger than memory: an
        ``np.memmap`` that cannot be written to or, of several files and in Fortran order, a :class:`ShardedArray`.

        Who changes a file afterwards changes the array.
        """
        headers = self._headers(name)
        files, header = self._files[name], joined(headers, self._files[name])
        if header.size < npy.MAP_FROM:
            return self.read(name)
        if len(files) > 1 or header.fortran_order:
            return sharded(headers, files)
        return np.memmap(files[0], header.dtype, "r", header.offset, header.shape)

    def md5s(self) -> dict[str, str]:
        """File or folder of each array that was asked for -> md5 of the bytes, of a folder's files one after another."""
        return {
            files[0].name if files[0].parent == self.path else f"{name}/": file_md5(*files)
            for name, files in sorted(self._files.items())
            if name in self._seen
        }

    def check_parts(self, *names: str) -> None:
        """``DataError`` where arrays whose rows belong together are cut differently, so that a file of one may stand for another's."""
        cut = {
            name: {file.name: header.shape[:1] for file, header in zip(files, self._headers(name), strict=True)}
            for name in names
            if name in self and (files := self._files[name])[0].parent != self.path
        }
        for name, parts in cut.items():
            first = next(iter(cut))
            if parts != cut[first]:
                wrong = min(parts.items() ^ cut[first].items())[0]
                raise DataError(
                    f"{self.path}: {first} and {name} must have files of the same names with the same numbers of rows; {wrong} differs"
                )

    def _headers(self, name: str) -> list[Header]:
        if name not in self._files:
            raise DataError(f"{self.path}: no array {name!r}; it holds {', '.join(self.names) or 'nothing'}")
        if name not in self._seen:
            self._seen[name] = [header_of(file) for file in self._files[name]]
        return self._seen[name]


Arrays = NpzFile | ArrayFolder


def open_arrays(path: Path) -> Arrays:
    """The arrays of an ``.npz`` file or of a folder."""
    return ArrayFolder(path) if path.is_dir() else NpzFile(path)


def shard_files(path: Path) -> list[Path]:
    """The ``.npy`` files of a folder, in the order of their names, numbers in them by value; a file is itself."""
    if not path.is_dir():
        return [path]
    # A link that leads nowhere stays: to read it fails, where without it the data would silently be fewer.
    files = [file for file in path.glob("*.npy") if not file.is_dir() and not file.name.startswith(".")]
    return sorted(files, key=_natural_order)


def _natural_order(file: Path) -> tuple[list[int | str], str]:  # 9 before 10
    parts = re.split("([0-9]+)", file.stem)  # text and numbers in turn
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], file.name


def header_of(path: Path) -> Header:
    """What a ``.npy`` file says of its array, checked against the length of the file."""
    with named_errors(str(path)), path.open("rb") as file:
        return read_header(file, path.stat().st_size, str(path), "file")


def joined(headers: Sequence[Header], files: Sequence[Path]) -> Header:
    """The header of the arrays one after another, which may differ in length, and in that of texts."""
    first = headers[0]
    if len(headers) == 1:
        return first
    for header, path in zip(headers, files, strict=True):
        if not header.shape or header.shape[1:] != first.shape[1:]:
            raise DataError(
                f"{path}: all parts of one array must agree beyond the first dimension, {files[0].name} has "
                f"{list(first.shape)}; got {list(header.shape)}"
            )
        if header.dtype != first.dtype and not header.dtype.kind == first.dtype.kind == "U":
            raise DataError(
                f"{path}: all parts of one array must have one dtype, {files[0].name} has {first.dtype}; got {header.dtype}"
            )
    dtype = max((header.dtype for header in headers), key=lambda dtype: dtype.itemsize)
    return Header((sum(header.shape[0] for header in headers), *first.shape[1:]), dtype, False, 0)


def sharded(headers: Sequence[Header], files: Sequence[Path]) -> ShardedArray:
    """Files whose headers agree as one array."""
    shards = [
        Shard(path, header.shape[0], header.offset, header.fortran_order)
        for path, header in zip(files, headers, strict=True)
        if header.shape[0]
    ]
    return ShardedArray(shards, headers[0].shape[1:], headers[0].dtype)
