# SPDX-License-Identifier: MIT
"""What tells data sets apart that came from no file, or were changed in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from .types import ImageArray, ImageDataset, Split
from .volume_types import LabelledVolume, SegmentationDataset


def content_md5(dataset: ImageDataset | SegmentationDataset) -> str:
    """One md5 over the values of all splits: pixels, labels, targets and groups, in their order.

    Pixels that were computed, from volumes of files or by the phantoms' formula, are left out: their last bits depend on the
    processor, and the files' ``"md5"`` or ``"md5s"`` stand for them.
    """
    files = {"md5"} if isinstance(dataset, ImageDataset) else {"md5", "md5s"}  # images with md5s are a file's own bytes
    pixels = files.isdisjoint(dataset.provenance)
    digest = hashlib.md5(usedforsecurity=False)
    for name, split in dataset.splits.items():
        digest.update(f"{name}, {len(split)}\n".encode())
        for array in _of_images(split, pixels) if isinstance(split, Split) else _of_volumes(split, pixels):
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _of_images(split: Split, pixels: bool) -> Iterator[ImageArray]:
    yield from [split.images] * pixels
    yield from (array for array in (split.labels, split.targets, split.groups) if array is not None)


def _of_volumes(volumes: tuple[LabelledVolume, ...], pixels: bool) -> Iterator[np.ndarray]:
    for volume in volumes:
        yield from (np.array([volume.name, volume.group]), np.array(volume.spacing), volume.label)
        yield from [volume.image] * pixels
