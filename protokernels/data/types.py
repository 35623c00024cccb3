# SPDX-License-Identifier: MIT
"""What a data set is: uint8 images and one int64 label per image, in up to three splits; for some also several findings
per image, and whose image it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DataError
from .sharded import ShardedArray

ImageArray = np.ndarray | ShardedArray


def check_names_differ(dataset: str, names: tuple[str, ...]) -> None:
    """``DataError`` where two classes have one name: scores by class go by the name, and one would take the other's place."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{dataset}: names of classes must differ; {twice!r} occurs {names.count(twice)} times")


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one split.

    Attributes:
        images: pixels.
        labels: one class per image.
        targets: findings, any number of them per image; None where the source has none.
        groups: whose image it is, such as a patient number; None where it is not known.
        masks: where in an image that is which its label tells of, such as a tumour; for figures only, nothing learns from them. None
            where they are not known.

    Raises:
        DataError: for another dtype or shape, or when lengths differ.
    """

    images: ImageArray  # [N, H, W] or [N, H, W, 3] uint8
    labels: np.ndarray  # [N] int64
    targets: np.ndarray | None = None  # [N, L] uint8, 0 or 1
    groups: np.ndarray | None = None  # [N] text
    masks: np.ndarray | None = None  # [N, H, W] bool

    def __post_init__(self) -> None:
        for name, value in zip(("images", "labels", "targets", "groups", "masks"), self._values(), strict=True):
            if isinstance(value, ShardedArray) and name == "images":
                continue
            if not isinstance(value, np.ndarray) and (value is not None or name in ("images", "labels")):
                raise DataError(f"{name} must be a numpy array; got {type(value).__name__}")
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise DataError(
                f"images must be uint8 of shape [N, H, W] or [N, H, W, 3]; got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise DataError(f"labels must be int64 of shape [N]; got {labels.dtype} {list(labels.shape)}")
        if len(images) != len(labels):
            raise DataError(f"one label per image is needed; got {len(images)} images and {len(labels)} labels")
        targets, groups = self.targets, self.groups
        if targets is not None:
            if (
                targets.dtype != np.uint8
                or targets.ndim != 2
                or targets.shape[0] != len(images)
                or not targets.shape[1]
            ):
                raise DataError(
                    f"targets must be uint8 of shape [{len(images)}, L]; got {targets.dtype} {list(targets.shape)}"
                )
            if targets.max(initial=0) > 1:
                raise DataError(f"targets must be 0 or 1; got {int(targets.max())}")
        if groups is not None and (groups.dtype.kind != "U" or groups.shape != labels.shape):
            raise DataError(f"groups must be text of shape [{len(images)}]; got {groups.dtype} {list(groups.shape)}")
        masks = self.masks
        if masks is not None and (masks.dtype != np.bool_ or masks.shape != images.shape[:3]):
            raise DataError(
                f"masks must be bool of shape {list(images.shape[:3])}; got {masks.dtype} {list(masks.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray | slice) -> Split:
        """The images with these indices, with all that belongs to them."""
        return Split(*(None if value is None else value[indices] for value in self._values()))  # type: ignore[arg-type]

    def join(self, other: Split) -> Split:
        """These images, then those of ``other``; targets, groups and masks where both have them."""
        pairs = zip(self._values(), other._values(), strict=True)
        joined = [None if one is None or two is None else np.concatenate([one, two]) for one, two in pairs]
        return Split(*joined)  # type: ignore[arg-type]

    def _values(self) -> tuple[ImageArray | None, ...]:
        return self.images, self.labels, self.targets, self.groups, self.masks


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A labelled image data set.

    Attributes:
        name: as asked for, or the name of the file, without ``.npz``, or folder.
        train: training split.
        val: validation split; None where the source has none.
        test: test split.
        class_names: one name per class; label k belongs to ``class_names[k]``.
        target_names: one name per column of the splits' ``targets``; empty where there are none.
        provenance: where the pixels came from, in values that JSON can hold: ``source``; ``files`` (names without
            folders); ``md5s`` and ``published_md5s`` by file name; ``warnings``, a list of sentences to be kept with
            any result.

    Raises:
        DataError: when a split is empty, a label has no class name, two classes have one name, the splits differ in image
            shape, or targets do not fit ``target_names``.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    class_names: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    target_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_names_differ(self.name, self.class_names)
        check_names_differ(self.name, self.target_names)
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
            columns = 0 if split.targets is None else split.targets.shape[1]
            if columns != len(self.target_names):
                raise DataError(
                    f"{self.name}: one column of targets per name is needed; {split_name} has {columns} columns, there "
                    f"are {len(self.target_names)} names"
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
