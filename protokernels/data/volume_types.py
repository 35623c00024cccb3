# SPDX-License-Identifier: MIT
"""What a segmentation data set is: volumes cut into slices, a class for every pixel, and whose volume it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DataError
from .types import check_names_differ

MAX_CLASSES = 256  # labels are uint8


@dataclass(frozen=True, eq=False)
class LabelledVolume:
    """One volume with its label map, slice by slice.

    Attributes:
        name: of the volume, unique in its data set.
        group: whose volume it is, such as a patient number; a patient's volumes stay in one split.
        image: slices, the whole volume scaled to [0, 1] by its smallest and largest value.
        label: class of every pixel, 0 is background.
        spacing: distance in mm between slices, rows and columns of these arrays; (1, 1, 1) where it is not known.
        spacing_known: whether ``spacing`` is in mm; where it is not, distances are in pixels.

    Raises:
        DataError: another dtype or shape, values outside [0, 1], NaN, a spacing that is not positive.
    """

    name: str
    group: str
    image: np.ndarray  # [S, H, W] float32
    label: np.ndarray  # [S, H, W] uint8
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spacing_known: bool = False

    def __post_init__(self) -> None:
        image, label = self.image, self.label
        if image.dtype != np.float32 or image.ndim != 3 or 0 in image.shape:
            raise DataError(
                f"{self.name}: image must be float32 of shape [S, H, W], not empty; got {image.dtype} "
                f"{list(image.shape)}"
            )
        if label.dtype != np.uint8 or label.shape != image.shape:
            raise DataError(
                f"{self.name}: label must be uint8 of shape {list(image.shape)} as the image; got {label.dtype} "
                f"{list(label.shape)}"
            )
        if not (image.min() >= 0 and image.max() <= 1):  # NaN fails as well
            raise DataError(f"{self.name}: image must lie in [0, 1]; got {image.min()}..{image.max()}")
        if len(self.spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in self.spacing):
            raise DataError(f"{self.name}: spacing must be three positive numbers of mm; got {self.spacing}")

    def __len__(self) -> int:
        """Number of slices."""
        return len(self.image)


@dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """Labelled volumes in three splits that share no patient.

    Attributes:
        name: as asked for.
        train: training volumes, in an order of which any beginning is a fair sample (see ``labelled_subset``).
        val: validation volumes.
        test: test volumes.
        class_names: one per class; class 0 is background.
        provenance: where the volumes came from and how they were split, in values that JSON can hold: ``source``,
            ``files``, ``md5`` or ``md5s``, ``slice_axis``, ``split``, and ``warnings``, a list of sentences to be kept with any result.

    Raises:
        DataError: an empty split, a patient in two splits, a name of a volume or class that occurs twice, a label without a class name,
            slices of different sizes.
    """

    name: str
    train: tuple[LabelledVolume, ...]
    val: tuple[LabelledVolume, ...]
    test: tuple[LabelledVolume, ...]
    class_names: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise DataError(
                f"{self.name}: 2 to {MAX_CLASSES} classes are expected, the background counted; got {self.num_classes}"
            )
        check_names_differ(self.name, self.class_names)
        owner: dict[str, str] = {}
        names: set[str] = set()
        for split, volumes in self.splits.items():
            if not volumes:
                raise DataError(f"{self.name}: the {split} split is empty; at least one volume is needed")
            for volume in volumes:
                if owner.setdefault(volume.group, split) != split:
                    raise DataError(
                        f"{self.name}: patient {volume.group} occurs in {owner[volume.group]} and in {split}; every "
                        "patient belongs to one split"
                    )
                if volume.name in names:
                    raise DataError(f"{self.name}: two volumes are called {volume.name}; names must differ")
                names.add(volume.name)
                highest = int(volume.label.max())
                if highest >= self.num_classes:
                    raise DataError(
                        f"{self.name}: labels of {volume.name} must lie in 0..{self.num_classes - 1} "
                        f"({self.num_classes} classes); got {highest}"
                    )
                if volume.image.shape[1:] != self.train[0].image.shape[1:]:
                    raise DataError(
                        f"{self.name}: all slices must have one size; {self.train[0].name} has "
                        f"{list(self.train[0].image.shape[1:])}, {volume.name} has {list(volume.image.shape[1:])}"
                    )

    @property
    def splits(self) -> dict[str, tuple[LabelledVolume, ...]]:
        """The splits by name, in the order train, val, test."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the slices in pixels."""
        height, width = self.train[0].image.shape[1:]
        return int(height), int(width)
