# SPDX-License-Identifier: MIT
"""From a volume to the slices that a network sees: the same steps in training and in prediction."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .errors import DataError


def scaled_to_unit(volume: np.ndarray) -> np.ndarray:  # [X, Y, Z] -> the same, float32 in [0, 1]
    """(v - min) / (max - min) over the whole volume; a constant volume becomes 0.

    Raises:
        DataError: NaN or infinity in it.
    """
    values = np.asarray(volume, dtype=np.float64 if volume.dtype.itemsize > 4 else np.float32)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        bad = int((~np.isfinite(values)).sum())
        raise DataError(f"{bad:,} of {values.size:,} voxels are NaN or infinite; replace them, by the value of air say")
    if values.dtype.type(high / 2) == values.dtype.type(low / 2):  # also half the smallest number of the type is 0
        return np.zeros(values.shape, np.float32)
    # Halved first: the span of huge values may not fit the type.
    scaled = (values / 2 - low / 2) / (high / 2 - low / 2)
    return np.clip(scaled, 0, 1).astype(np.float32)


def image_slices(volume: np.ndarray, size: int | None) -> np.ndarray:  # [X, Y, Z] -> [Z, size, size] float32
    """Slices along the third axis, X as rows and Y as columns, the volume scaled to [0, 1] before.

    Bilinear without antialiasing, pixel centres at i + 1/2, as ``protokernels.data.to_tensor`` does; None keeps X and
    Y.
    """
    slices = np.ascontiguousarray(scaled_to_unit(volume).transpose(2, 0, 1))
    if size is None or slices.shape[1:] == (size, size):
        return slices
    tensor = torch.from_numpy(slices)[:, None]
    resized = F.interpolate(tensor, (size, size), mode="bilinear", align_corners=False)
    return np.asarray(resized[:, 0].clamp_(0, 1).numpy())


def label_slices(label: np.ndarray, size: int | None) -> np.ndarray:  # [X, Y, Z] -> [Z, size, size], uint8 both
    """Slices of a label map, each pixel taking the class of the nearest one: no class appears that was not there.

    The released code of Hu et al. interpolates labels linearly and truncates them, which puts class 1 between 0 and 2.
    """
    slices = np.ascontiguousarray(label.transpose(2, 0, 1))
    if size is None or slices.shape[1:] == (size, size):
        return slices
    return np.asarray(
        F.interpolate(torch.from_numpy(slices)[:, None], (size, size), mode="nearest-exact")[:, 0].numpy()
    )
