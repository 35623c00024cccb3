# SPDX-License-Identifier: MIT
"""Arrays out of an ``.npz`` file that nobody vouches for: a header is checked before memory is allocated for it."""

from __future__ import annotations

import errno
import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from .types import DataError

LIMIT = 1 << 35  # bytes in one array; the largest of MedMNIST, pathmnist_224, has 13.5e9
BLOCK = 1 << 20  # bytes read at a time
MAX_HEADER = 10_000  # bytes; numpy's own limit
LARGE, MAX_RATIO = 1 << 28, 100  # images shrink by less than this; a larger array that does not is an archive bomb
MAP_FROM = 1 << 28  # bytes from which on an array that may be mapped is not read
ADVICE = "; in C order and saved with numpy.savez, not numpy.savez_compressed, they stay in the file"
LOCAL_HEADER = 30  # bytes in front of a member; in the last four the lengths of its name and extra field, which follow
DAMAGE = (  # every way in which zipfile, zlib and numpy's header parser report a bad file
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    MemoryError,
    tokenize.TokenError,
)


class Header(NamedTuple):
    """What an array's header says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # bytes before the data

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """Reads single arrays; nothing is ever unpickled.

    Every failure is a :class:`DataError` with the file's name and the reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._named_errors():
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

    def read(self, name: str, *, may_map: bool = False) -> np.ndarray:
        """An array in C order; zipfile compares the checksum with the last block.

        With ``may_map``, one of :data:`MAP_FROM` bytes or more that lies in the file as it would in memory (stored, as ``numpy.savez``
        does, and in C order) is an ``np.memmap`` that cannot be written to: it may be larger than memory. Its bytes are read once for the
        checksum and not kept. Who changes the file afterwards changes the array, and who shortens it ends the process.
        """
        with self._open(name) as (archive, file):
            header = self._read_header(name, file)
            stored = self._members[f"{name}.npy"].compress_type == zipfile.ZIP_STORED
            if may_map and stored and not header.fortran_order and header.size >= MAP_FROM:
                return self._map(name, header, archive, file)
            limit = min(LIMIT, system_memory())
            if header.size > limit:
                raise DataError(
                    f"{self.path}: {name} claims {list(header.shape)} of {header.dtype}, {header.size:,} bytes; at most "
                    f"{limit:,} are loaded on this machine{ADVICE if may_map else ''}"
                )
            array = np.empty(math.prod(header.shape), dtype=header.dtype)
            target = memoryview(cast("bytearray", array.view(np.uint8)))
            position = 0
            while position < len(target):
                block = file.read(min(BLOCK, len(target) - position))
                if not block:
                    raise EOFError(f"{len(target) - position:,} bytes are missing")
                target[position : position + len(block)] = block
                position += len(block)
        if header.fortran_order:
            return np.ascontiguousarray(array.reshape(header.shape[::-1]).T)
        return array.reshape(header.shape)

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
        with self._named_errors(name), zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
            yield archive, file

    def _read_header(self, name: str, file: IO[bytes]) -> Header:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{self.path}: {name} has npy format version {version}; plain arrays have 1.0 or 2.0")
        length_field = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(length_field, "little")
        if length > MAX_HEADER:  # numpy would read all of it before it looks
            raise DataError(f"{self.path}: {name} is damaged: its header claims to be {length:,} bytes long")
        header = io.BytesIO(length_field + file.read(length))
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(header)
        if dtype.hasobject:
            raise DataError(
                f"{self.path}: {name} holds pickled Python objects, which could run any code when read; ask for a file "
                "with plain arrays"
            )
        if any(length < 0 for length in shape) or dtype.itemsize == 0:
            raise DataError(f"{self.path}: {name} is damaged: its header claims {list(shape)} of {dtype}")
        offset, size = file.tell(), math.prod(shape) * dtype.itemsize
        stored = self._members[f"{name}.npy"].file_size - offset
        if size != stored:
            raise DataError(
                f"{self.path}: {name} is damaged: its header claims {list(shape)} of {dtype} ({size:,} bytes), the "
                f"archive holds {stored:,} bytes"
            )
        if size > LARGE and size > MAX_RATIO * self.path.stat().st_size:
            raise DataError(
                f"{self.path}: {name} would unpack to {size:,} bytes from a file of {self.path.stat().st_size:,}; no "
                "images shrink so much, so it is not read"
            )
        return Header(shape, dtype, fortran_order, offset)

    @contextmanager
    def _named_errors(self, name: str | None = None) -> Iterator[None]:
        """Turns the reports of a bad archive into a DataError that names the file."""
        try:
            yield
        except DataError:
            raise
        except (*DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to a place before the file
                raise
            where = f"{self.path}: {name}" if name else str(self.path)
            raise DataError(f"{where} is truncated or damaged ({error}); delete it and fetch it again") from error


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


def system_memory() -> int:
    """Physical memory in bytes, as far as the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return LIMIT
