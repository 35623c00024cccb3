# SPDX-License-Identifier: MIT
"""Images on the disk as training and evaluation take them: a batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .sharded import ShardedArray
from .tensors import to_tensor
from .types import ImageArray


class MappedImages:
    """Stands for the tensor that ``prepare`` would make of all images, whose rows it makes when they are asked for, with the same bits.

    Args:
        images: on the disk.
        prepare: some of them -> tensor [n, C, S, S], on the device.
        rows: which of the images these are, and in which order; default: all.
    """

    def __init__(
        self,
        images: ImageArray,  # [N, H, W] or [N, H, W, 3] uint8
        prepare: Callable[[np.ndarray], Tensor],
        rows: np.ndarray | None = None,  # [n] int64
    ) -> None:
        self.images, self.prepare, self.rows = images, prepare, rows
        example = prepare(images[:1])
        self.device = example.device
        self.shape = torch.Size((len(images) if rows is None else len(rows), *example.shape[1:]))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        index = chosen if isinstance(chosen, slice) else chosen.cpu().numpy()
        return self.prepare(self.images[index if self.rows is None else self.rows[index]])

    def split(self, count: int) -> Iterator[Tensor]:
        """All images, ``count`` at a time."""
        return (self[start : start + count] for start in range(0, len(self), count))

    def subset(self, indices: Tensor) -> MappedImages:  # [n] int64
        """The images at ``indices``, which stay in the file."""
        chosen = indices.cpu().numpy()
        return MappedImages(self.images, self.prepare, chosen if self.rows is None else self.rows[chosen])


Images = Tensor | MappedImages  # [N, C, S, S]


def prepared(images: ImageArray, prepare: Callable[[np.ndarray], Tensor]) -> Images:
    """What ``prepare`` makes of all images: at once, or where they are on the disk when it is asked for."""
    return MappedImages(images, prepare) if isinstance(images, (np.memmap, ShardedArray)) else prepare(images)


def tensor_batches(images: ImageArray, count: int, *, size: int) -> Iterator[Tensor]:
    """:func:`to_tensor` of all images, ``count`` at a time."""
    return (to_tensor(images[start : start + count], size=size) for start in range(0, len(images), count))
