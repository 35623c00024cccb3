# SPDX-License-Identifier: MIT
"""Arrays out of an ``.npz`` file that nobody vouches for: a header is checked before memory is allocated for it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from . import npy
from .download import file_md5
from .errors import DataError
from .npy import BLOCK, Header, check_memory, named_errors, read_header, read_values

LARGE, MAX_RATIO = 1 << 28, 100  # images shrink by less than this; a larger array that does not is an archive bomb
ADVICE = "; in C order and saved with numpy.savez, not numpy.savez_compressed, they stay in the file, as they do unpacked into a folder"
LOCAL_HEADER = 30  # bytes in front of a member; in the last four the lengths of its name and extra field, which follow


class NpzFile:
    """Reads single arrays; nothing is ever unpickled.

    Every failure is a :class:`DataError` with the file's name and the reason.
    """

    source = "npz file"

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_errors(str(path)):
            if not zipfile.is_zipfile(path):
                raise DataError(f"{path} is not an .npz file: {_what_it_is(path)}")
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._members

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(name.removesuffix(".npy") for name in self._members)

    def header(self, name: str) -> Header:
        """Shape and dtype of an array, without reading it."""
        with self._open(name) as (_, file):
            return self._read_header(name, file)

    def read(self, name: str) -> np.ndarray:
        """An array in C order; zipfile compares the checksum with the last block."""
        return self._read(name, "")

    def read_or_map(self, name: str) -> np.ndarray:
        """As :meth:`read`, but one of :data:`.npy.MAP_FROM` bytes or more that lies in the file as it would in memory (stored, as
        ``numpy.savez`` does, and in C order) is an ``np.memmap`` that cannot be written to: it may be larger than memory.

        Its bytes are read once for the checksum and not kept. Who changes the file afterwards changes the array, and who shortens it
        ends the process.
        """
        with self._open(name) as (archive, file):
            header = self._read_header(name, file)
            stored = self._members[f"{name}.npy"].compress_type == zipfile.ZIP_STORED
            if stored and not header.fortran_order and header.size >= npy.MAP_FROM:
                return self._map(name, header, archive, file)
        return self._read(name, ADVICE)

    def md5s(self) -> dict[str, str]:
        """The file's name -> its md5."""
        return {self.path.name: file_md5(self.path)}

    def _read(self, name: str, advice: str) -> np.ndarray:
        with self._open(name) as (_, file):
            header = self._read_header(name, file)
            check_memory(header, f"{self.path}: {name}", advice)
            return read_values(file, header)

    def _map(self, name: str, header: Header, archive: zipfile.ZipFile, file: IO[bytes]) -> np.ndarray:
        """The array where it lies in the archive, of which ``file`` has just read the header."""
        left = header.size
        while block := file.read(BLOCK):  # zipfile compares the checksum with the last one
            left -= len(block)
        if left:
            raise EOFError(f"{left:,} bytes are missing")
        info, whole = self._members[f"{name}.npy"], archive.fp
        assert whole is not None
        whole.seek(info.header_offset)
        local = whole.read(LOCAL_HEADER)
        more = int.from_bytes(local[-4:-2], "little") + int.from_bytes(local[-2:], "little")
        start = info.header_offset + LOCAL_HEADER + more
        behind = [other.header_offset for other in archive.infolist() if other.header_offset > info.header_offset]
        if start + info.compress_size > min(behind, default=archive.start_dir):  # not every version of zipfile looks
            raise DataError(f"{self.path}: {name} is damaged: it overlaps what follows in the archive")
        return np.memmap(whole, header.dtype, "r", start + header.offset, header.shape)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[zipfile.ZipFile, IO[bytes]]]:
        info = self._members.get(f"{name}.npy")
        if info is None:
            raise DataError(f"{self.path}: no array {name!r}; it holds {', '.join(self.names) or 'nothing'}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise DataError(
                f"{self.path}: {name} is encrypted or packed in a way numpy does not use; save with numpy.savez"
            )
        with named_errors(f"{self.path}: {name}"), zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
            yield archive, file

    def _read_header(self, name: str, file: IO[bytes]) -> Header:
        where = f"{self.path}: {name}"
        header = read_header(file, self._members[f"{name}.npy"].file_size, where, "archive")
        if header.size > LARGE and header.size > MAX_RATIO * self.path.stat().st_size:
            raise DataError(
                f"{where} would unpack to {header.size:,} bytes from a file of {self.path.stat().st_size:,}; no images "
                "shrink so much, so it is not read"
            )
        return header


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        return "it is empty; fetch it again"
    if start.startswith(b"\x80"):
        return "it is a Python pickle, which could run any code when read; ask for a file with plain arrays"
    if start.startswith(b"PK"):
        return "it is a truncated zip archive; delete it and fetch it again"
    if start.startswith(b"\x93NUMPY"):
        return "it is a single array (.npy); save the splits with numpy.savez_compressed"
    if start.lstrip().lower().startswith((b"<!doc", b"<html")):
        return "it is a web page, probably an error message of the server; fetch it again"
    return f"it starts with {start!r}; an .npz is a zip archive and starts with b'PK'"
