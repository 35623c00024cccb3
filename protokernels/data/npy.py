# SPDX-License-Identifier: MIT
"""Arrays in numpy's format that nobody vouches for: a header is checked before memory is allocated for it."""

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
from typing import IO, NamedTuple, cast

import numpy as np

from .errors import DataError

LIMIT = 1 << 35  # bytes in one array; the largest of MedMNIST, pathmnist_224, has 13.5e9
BLOCK = 1 << 20  # bytes read at a time
MAX_HEADER = 10_000  # bytes; numpy's own limit
MAP_FROM = 1 << 28  # bytes from which on an array that may be mapped is not read
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


def read_header(file: IO[bytes], length: int, where: str, container: str) -> Header:
    """Reads the header at the file's position, its start.

    Args:
        file: numpy's format, version 1.0 or 2.0.
        length: bytes of the file, the header with them, which must be what the header says.
        where: the array, for messages.
        container: what holds these bytes, for messages.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where} has npy format version {version}; plain arrays have 1.0 or 2.0")
    length_field = file.read(2 if version == (1, 0) else 4)
    header_length = int.from_bytes(length_field, "little")
    if header_length > MAX_HEADER:  # numpy would read all of it before it looks
        raise DataError(f"{where} is damaged: its header claims to be {header_length:,} bytes long")
    text = io.BytesIO(length_field + file.read(header_length))
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(text)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(text)
    if dtype.hasobject:
        raise DataError(
            f"{where} holds pickled Python objects, which could run any code when read; ask for a file with plain arrays"
        )
    if any(side < 0 for side in shape) or dtype.itemsize == 0:
        raise DataError(f"{where} is damaged: its header claims {list(shape)} of {dtype}")
    header = Header(shape, dtype, fortran_order, file.tell())
    if header.size != length - header.offset:
        raise DataError(
            f"{where} is damaged: its header claims {list(shape)} of {dtype} ({header.size:,} bytes), the "
            f"{container} holds {length - header.offset:,} bytes"
        )
    return header


def check_memory(header: Header, where: str, advice: str = "") -> None:
    """``DataError`` for an array that this machine does not hold."""
    limit = min(LIMIT, system_memory())
    if header.size > limit:
        raise DataError(
            f"{where} claims {list(header.shape)} of {header.dtype}, {header.size:,} bytes; at most {limit:,} are loaded "
            f"on this machine{advice}"
        )


def read_values(file: IO[bytes], header: Header) -> np.ndarray:
    """The array behind a header that was just read, in C order."""
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


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turns the reports of a bad file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to a place before the file
            raise
        raise DataError(f"{where} is truncated or damaged ({error}); delete it and fetch it again") from error


def system_memory() -> int:
    """Physical memory in bytes, as far as the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return LIMIT
