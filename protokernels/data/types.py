# SPDX-License-Identifier: MIT
"""What a data set is: uint8 images and one int64 label per image, in up to three splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


class DataError(ValueError):
    """A data set is unknown, missing, damaged or not supported; the message says which, and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one split.

    Raises:
        DataError: for another dtype or shape, or when the two lengths differ.
    """

    images: np.ndarray  # [N, H, W] or [N, H, W, 3] uint8
    labels: np.ndarray  # [N] int64

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise DataError(
                f"images must be uint8 of shape [N, H, W] or [N, H, W, 3]; got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise DataError(f"labels must be int64 of shape [N]; got {labels.dtype} {list(labels.shape)}")
        if len(images) != len(labels):
            raise DataError(f"one label per image is needed; got {len(images)} images and {len(labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A labelled image data set.

    Attributes:
        name: as asked for, or the file's name without ``.npz``.
        train: training split.
        val: validation split; None where the source has none.
        test: test split.
        class_names: one name per class; label k belongs to ``class_names[k]``.
        provenance: where the pixels came from, in values that JSON can hold: ``source``; ``files`` (names without
            folders); ``md5s`` and ``published_md5s`` by file name; ``warnings``, a list of sentences to be kept with
            any result.

    Raises:
        DataError: when a split is empty, a label has no class name, or the splits differ in image shape.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    class_names: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split_name, split in self.splits.items():
            if len(split) == 0:
                raise DataError(f"{self.name}: the {split_name} split is empty; at least one image is needed")
            lowest, highest = int(split.labels.min()), int(split.labels.max())
            if lowest < 0 or highest >= self.num_classes:
                raise DataError(
                    f"{self.name}: {split_name} labels must lie in 0..{self.num_classes - 1} ({self.num_classes} "
                    f"classes); got {lowest}..{highest}"
                )
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(
                    f"{self.name}: all splits must hold images of one shape; train has "
                    f"{list(self.train.images.shape[1:])}, {split_name} has {list(split.images.shape[1:])}"
                )

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that exist, by name, in the order train, val, test."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def num_classes(self) -> int:
        """Number of classes, also those without an image."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 1 if self.train.images.ndim == 3 else 3
