# SPDX-License-Identifier: MIT
"""One array over several ``.npy`` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

_ORDER: dict[bool, Literal["C", "F"]] = {False: "C", True: "F"}


class Shard(NamedTuple):
    """An array of a file, as its header was when it was checked."""

    path: Path
    length: int  # rows
    offset: int  # bytes before the data
    fortran_order: bool


class ShardedArray:
    """What ``np.concatenate`` would make of the arrays in several ``.npy`` files; rows are read when they are asked for.

    Stands for an ``np.ndarray`` where data sets take one: ``shape``, ``dtype``, ``ndim``, ``len``, ``np.asarray``,
    and indices along the first dimension, which copy. A file is open only while it is read, so there may be any number.

    Args:
        shards: the files, in order.
        shape: of one row.
        dtype: of all.
    """

    def __init__(self, shards: Sequence[Shard], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shards, self.dtype = tuple(shards), dtype
        self.ends = np.cumsum(
            [shard.length for shard in shards], dtype=np.int64
        )  # [S] rows in a file and those before it
        self.shape = (int(self.ends[-1]) if shards else 0, *shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            return self._rows(np.arange(*index.indices(len(self))))
        if isinstance(index, tuple):  # np.asarray would make a list of rows of it
            raise IndexError(f"indices are for the first dimension alone, [i][...] for more; got {len(index)} of them")
        chosen = np.asarray(index)
        if chosen.dtype == bool:
            if chosen.shape != self.shape[:1]:
                raise IndexError(f"a mask must have the shape [{len(self)}]; got {list(chosen.shape)}")
            return self._rows(np.flatnonzero(chosen))
        if chosen.dtype.kind not in "iu" and chosen.size:
            raise IndexError(f"indices must be whole numbers, a slice or a mask; got {chosen.dtype}")
        chosen = chosen.astype(np.int64)
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexError(f"indices must lie in {-len(self)}..{len(self) - 1}; got {chosen.min()}..{chosen.max()}")
        rows = self._rows(chosen.reshape(-1) % max(len(self), 1))
        return rows.reshape(*chosen.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the values lie in files; an array of them is a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def squeeze(self, axis: int) -> ShardedArray:
        """Without a dimension of the rows, which has length 1."""
        if self.shape[axis] != 1 or axis % self.ndim == 0:
            raise ValueError(
                f"dimension {axis} of {list(self.shape)} cannot be left out; expected one of the rows, of length 1"
            )
        kept = list(self.shape)
        del kept[axis]
        return ShardedArray(self.shards, tuple(kept[1:]), self.dtype)

    def _rows(self, rows: np.ndarray) -> np.ndarray:  # [n] -> [n, ...]
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        places = np.searchsorted(self.ends, rows, side="right")
        for place in np.unique(places):
            shard, chosen = self.shards[place], places == place
            shape, order = (shard.length, *self.shape[1:]), _ORDER[shard.fortran_order]
            file = np.memmap(shard.path, self.dtype, "r", shard.offset, shape, order)
            values[chosen] = file[rows[chosen] - (self.ends[place] - shard.length)]
        return values
