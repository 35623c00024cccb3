# SPDX-License-Identifier: MIT
"""Phantoms: made volumes with bright ellipses and darker lesions in them, so that segmentation runs without any file.

They are not images of anybody. A score on them says that the code works, nothing about a method.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .slicing import image_slices, label_slices
from .volume_types import LabelledVolume

CLASSES = ("background", "phantom ellipse", "phantom lesion")
COUNT, SLICES, SIDE = 20, 8, 32
SEED = 0
WARNING = "phantoms: made volumes, no images of anybody; scores say nothing about a method"


def make(size: int | None) -> list[LabelledVolume]:
    """:data:`COUNT` phantoms of :data:`SLICES` slices of 32 x 32 pixels, resized to ``size``; always the same ones."""
    return [_make_one(index, size) for index in range(COUNT)]


def provenance() -> dict[str, Any]:
    """Where they come from."""
    return {
        "source": "phantoms made by protokernels.data.phantoms",
        "files": [],
        "md5s": {},
        "slice_axis": "third axis",
        "warnings": [WARNING],
    }


def _make_one(index: int, size: int | None) -> LabelledVolume:
    random = np.random.Generator(np.random.PCG64([SEED, index])).random
    across, along, up = np.meshgrid(*(np.linspace(-1, 1, n) for n in (SIDE, SIDE, SLICES)), indexing="ij")
    middle, radii, angle = 0.3 * (random(3) - 0.5), 0.45 + 0.25 * random(3), np.pi * random()
    turned = (
        np.cos(angle) * (across - middle[0]) + np.sin(angle) * (along - middle[1]),
        -np.sin(angle) * (across - middle[0]) + np.cos(angle) * (along - middle[1]),
        0.7 * (up - middle[2]),
    )
    inside = sum((axis / radius) ** 2 for axis, radius in zip(turned, radii, strict=True)) <= 1
    place = middle[:2] + 0.5 * radii[:2] * (random(2) - 0.5)
    lesion = inside & ((across - place[0]) ** 2 + (along - place[1]) ** 2 + up**2 / 4 <= (0.14 + 0.1 * random()) ** 2)
    label = np.where(lesion, 2, inside).astype(np.uint8)
    grey = 0.15 + 0.1 * across * random() + 0.45 * inside - 0.25 * lesion  # a slanted background
    image = grey + 0.06 * (random(label.shape) - 0.5) + 0.04 * np.sin(7 * along + 6 * random())
    name = f"phantom{index:02d}"
    return LabelledVolume(name, name, image_slices(image, size), label_slices(label, size))
