# SPDX-License-Identifier: MIT
"""Volumes out of NIfTI files that nobody vouches for, turned so that their axes point to right, anterior and superior;
and label volumes in the place of the volume they belong to."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from .errors import DataError
from .npy import system_memory

SUFFIXES = (".nii.gz", ".nii")
LIMIT = 1 << 33  # bytes of one volume; the largest CT of the Decathlon has 0.4e9
BLOCK = 1 << 22  # bytes read at a time
TRAILER = 1 << 24  # bytes tolerated before the data, as extensions of the header, and behind them
BYTES_PER_VOXEL = 24  # in memory at once, beside the file's own: as numbers, scaled, resized, as labels
LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # per unit; anything else counts as mm


@dataclass(frozen=True, eq=False)
class NiftiVolume:
    """A volume in RAS+ order: the axes run to the patient's right, to anterior, to superior, as nearly as the file's do.

    Attributes:
        path: of the file.
        values: voxels, with the file's slope and intercept applied.
        spacing: mm between voxels along the three axes.
        affine: from the numbers of the file's own voxels to places in mm.
    """

    path: Path
    values: np.ndarray  # [X, Y, Z] float32 or float64
    spacing: tuple[float, float, float]
    affine: np.ndarray  # [4, 4] float64
    _header: Any
    _axes: tuple[int, ...]  # the file's axis a is axis _axes[a] here ...
    _flipped: tuple[int, ...]  # ... and those of the file's axes run backwards

    def same_place(self, other: NiftiVolume) -> bool:
        """Whether the corners of both lie within a tenth of a voxel of each other; axes may be stored in any order."""
        ours, theirs = (volume._corners() for volume in (self, other))
        return bool(
            (np.abs(ours - theirs).max() <= 0.1 * min(self.spacing)) and self.values.shape == other.values.shape
        )

    def _corners(self) -> np.ndarray:  # [8, 3], in RAS+ order
        shape = np.array(self.values.shape)[list(self._axes)]  # as the file stores it
        corners = np.empty((8, 3))
        for row, corner in enumerate(np.ndindex(2, 2, 2)):
            ours = np.array(corner)[list(self._axes)]
            for axis in self._flipped:
                ours[axis] = 1 - ours[axis]
            corners[row] = self.affine[:3, :3] @ (ours * (shape - 1)) + self.affine[:3, 3]
        return corners

    def label_file(self, label: np.ndarray) -> bytes:  # [X, Y, Z] uint8
        """The bytes of a NIfTI file of ``label``, uncompressed, with the axes, affine, sform, qform and units of the
        file that was read.

        The file's description and its extensions are left out: they may hold anything, the patient's name as well.

        Raises:
            DataError: another shape or dtype.
        """
        import nibabel

        if label.dtype != np.uint8 or label.shape != self.values.shape:
            raise DataError(
                f"{self.path}: its label must be uint8 of shape {list(self.values.shape)}; got {label.dtype} "
                f"{list(label.shape)}"
            )
        stored = np.flip(label.transpose(self._axes), self._flipped)
        header = self._header.copy()
        header.set_data_dtype(np.uint8)
        header.set_intent(LABEL_INTENT)
        header["descrip"], header["aux_file"] = b"", b""
        header["cal_min"], header["cal_max"] = 0, 0
        kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
        image = kind(stored.reshape(header.get_data_shape()), header.get_best_affine(), header)
        content: bytes = image.to_bytes()
        return content


class _Orientation(NamedTuple):
    axes: tuple[int, ...]
    flipped: tuple[int, ...]
    spacing: tuple[float, float, float]
    affine: np.ndarray  # [4, 4], in mm


def read_nifti(path: str | Path, *, channel: int | None = None) -> NiftiVolume:
    """Reads one volume.

    The header is checked before anything is allocated, and a gzipped file to its checksum.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file with one volume; lengths of one behind the third axis are dropped.
        channel: which volume of a file that holds several along its fourth axis, such as the sequences of an
            examination; a file with one volume has channel 0.

    Raises:
        DataError: with the file's name and the reason: missing, damaged or truncated, not a NIfTI file, several volumes
            in it and no ``channel``, or no such channel, no real numbers, an affine that is singular or not finite.
        ImportError: nibabel is not installed.
    """
    path = Path(path)
    with _opened(path) as file:
        start, header, orientation = _read_header(path, file, channel)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        end = int(header["vox_offset"]) + math.prod(shape) * dtype.itemsize
        content = _read_data(path, file, start, end)
    raw = np.frombuffer(content, dtype, math.prod(shape), int(header["vox_offset"]))
    if channel is not None and len(shape) > 3:  # the first three axes run fastest, so a channel is one piece
        one = math.prod(shape[:3])
        raw, shape = raw[one * channel :][:one], shape[:3]
        header.set_data_shape(shape)
    exact = dtype.kind in "iu" and dtype.itemsize <= 2
    values = raw.astype(np.float32 if exact or dtype.itemsize <= 2 or dtype.str[1:] == "f4" else np.float64)
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        values = values * values.dtype.type(slope) + values.dtype.type(intercept)
    order, flipped, spacing, affine = orientation
    cube = values.reshape((*shape, 1, 1)[:3], order="F")
    turned = np.flip(cube, flipped).transpose(np.argsort(order))
    return NiftiVolume(path, np.ascontiguousarray(turned), spacing, affine, header, order, flipped)


def check_nifti(path: str | Path) -> None:
    """Raises what :func:`read_nifti` would raise for the file's name and header; voxels are not read."""
    with _opened(Path(path)) as file:
        _read_header(Path(path), file, None)


def whole_labels(volume: NiftiVolume) -> np.ndarray:  # [X, Y, Z] int64
    """The voxels as whole numbers.

    Raises:
        DataError: some are not.
    """
    values = volume.values
    wrong = ~((np.rint(values) == values) & (np.abs(values) < 2**53))  # NaN and infinity are wrong as well
    if wrong.any():
        raise DataError(
            f"{volume.path}: labels must be whole numbers; got {float(values[wrong][0]):g}, one of "
            f"{int(wrong.sum()):,} that are not. Is it an image, or a label map that was interpolated?"
        )
    labels: np.ndarray = values.astype(np.int64)
    return labels


def without_suffix(path: Path) -> str:
    """The file's name without ``.nii`` or ``.nii.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    _check_name(path)
    try:
        with cast("IO[bytes]", gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); delete it and fetch it again") from error


def _check_name(path: Path) -> None:
    if not path.is_file():
        what = "is a folder; a file is expected" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path} is not a NIfTI file by its name, which must end in .nii or .nii.gz; convert it first (DICOM: with "
            "dcm2niix)"
        )
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise DataError(f"{path} is empty; fetch it again")
    if start.startswith(b"\x1f\x8b") != path.name.endswith(".gz"):
        fault = "is not gzipped although" if path.name.endswith(".gz") else "is gzipped, so"
        wish = "ends in .gz" if path.name.endswith(".gz") else "must end in .gz"
        raise DataError(f"{path} {fault} its name {wish}; it starts with {start!r}")


def _read_header(path: Path, file: IO[bytes], channel: int | None) -> tuple[bytes, Any, _Orientation]:
    """The bytes read so far, the header, and where its axes run."""
    try:
        import nibabel
    except ImportError as error:
        raise ModuleNotFoundError(
            'NIfTI files need nibabel: pip install "protokernels[train]"', name="nibabel"
        ) from error
    start = file.read(4)
    sizes = {struct.pack(f"{order}i", size): size for order in "<>" for size in (348, 540)}
    if start not in sizes:
        raise DataError(f"{path} is not a NIfTI file: it starts with {start!r}, not with the size of a header")
    size = sizes[start]
    start += file.read(size - 4)
    if len(start) < size:
        raise DataError(f"{path} is truncated: {len(start)} bytes, a header has {size}; fetch it again")
    kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    magic = start[344:348] if size == 348 else start[4:8]
    if magic[:3] not in (b"n+1", b"n+2"):
        reason = "its data lie in another file" if magic[:2] == b"ni" else f"its magic number is {magic!r}"
        raise DataError(f"{path} is not a single NIfTI file: {reason}")
    try:
        header = kind(start)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        header.get_slope_inter()
        affine = np.asarray(header.get_best_affine(), np.float64)
        unit = header.get_xyzt_units()[0]
    except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: its header is damaged ({error}); fetch the file again") from error
    if dtype.kind not in "iuf":
        raise DataError(f"{path} holds {header.get_value_label('datatype')} voxels; expected real numbers")
    if not shape or any(length < 1 for length in shape):
        raise DataError(f"{path}: its header is damaged: it claims a volume of shape {list(shape)}")
    if len(shape) < 2 or any(length > 1 for length in shape[3 if channel is None else 4 :]):
        raise DataError(
            f"{path} holds an array of shape {list(shape)}; expected one volume [X, Y, Z]. Split a series into its "
            "volumes first (nibabel.four_to_three)"
        )
    channels = shape[3] if len(shape) > 3 else 1
    if channel is not None and not 0 <= channel < channels:
        raise DataError(f"{path} holds {channels} volumes; there is no channel {channel}, the first is 0")
    offset, claimed = float(header["vox_offset"]), math.prod(shape)
    limit = min(LIMIT // dtype.itemsize, system_memory() // (dtype.itemsize + BYTES_PER_VOXEL))
    if not size <= offset <= size + TRAILER or claimed > limit:
        raise DataError(
            f"{path}: its header claims {list(shape)} of {dtype} ({claimed:,} voxels) from byte {offset:g} on; at most "
            f"{limit:,} voxels are read on this machine, from {size} to {size + TRAILER:,} on; the file is damaged or "
            "too large"
        )
    return start, header, _orientation(path, affine, MILLIMETRES.get(unit, 1.0))


def _orientation(path: Path, affine: np.ndarray, unit: float) -> _Orientation:
    from nibabel.orientations import io_orientation

    matrix = affine[:3, :3]
    lengths = np.sqrt((matrix**2).sum(axis=0)) * unit
    known = bool(np.isfinite(affine).all()) and bool((lengths > 0).all())
    if not known or abs(np.linalg.det(matrix / (lengths / unit))) < 1e-6:
        raise DataError(
            f"{path}: its affine is singular or not finite: {np.round(affine, 6).tolist()}; it cannot say where the "
            "patient's right is. Write the true one into the header (nibabel: set_sform)"
        )
    turn = io_orientation(affine)
    order = tuple(int(axis) for axis in turn[:, 0])
    flipped = tuple(axis for axis in range(3) if turn[axis, 1] < 0)
    across, along, up = (float(lengths[order.index(axis)]) for axis in range(3))
    in_millimetres = affine * [[unit], [unit], [unit], [1.0]]
    return _Orientation(order, flipped, (across, along, up), in_millimetres)


def _read_data(path: Path, file: IO[bytes], start: bytes, end: int) -> bytes:
    content = bytearray(start)
    while len(content) < end:
        block = file.read(min(BLOCK, end - len(content)))
        if not block:
            raise EOFError(f"its header promises {end:,} bytes, {len(content):,} are there")
        content += block
    if len(file.read(TRAILER + 1)) > TRAILER:  # reads a gzipped file to its checksum
        raise DataError(f"{path}: much more follows the {end:,} bytes that its header promises; the header is damaged")
    return bytes(content)
