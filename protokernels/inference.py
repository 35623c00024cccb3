# SPDX-License-Identifier: MIT
"""Segmentation of whole volumes by a network for slices: an array to an array, a NIfTI file to a NIfTI file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data.errors import DataError
from .data.nifti import SUFFIXES, read_nifti
from .data.slicing import image_slices
from .models.modes import evaluating


def segment_volume(
    model: nn.Module,
    image: np.ndarray,  # [X, Y, Z]
    *,
    image_size: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> np.ndarray:  # [X, Y, Z] uint8
    """The class of every voxel.

    The volume is prepared as in training: scaled to [0, 1], cut along the third axis, slices resized to ``image_size`` x
    ``image_size``. The logits of a slice are resized bilinearly to X x Y, and then the largest wins: borders between
    classes come out finer than pixels of the network, while resizing its decisions would draw them in its pixels.

    Args:
        model: slices [B, 1, image_size, image_size] float32 to logits [B, K, h, w], on ``device``. It predicts in
            evaluation mode; its mode is put back.
        image: real numbers, in the orientation that the model was trained with.
        image_size: side of the slices that the model was trained with, in pixels.
        batch_size: slices at a time.
        device: where the model is.

    Raises:
        DataError: another shape, NaN or infinity.
        ValueError: ``batch_size`` is below 1; the model returns something else than logits of at most 256 classes, or NaN.

    Example:
        >>> import numpy as np, torch
        >>> class Threshold(torch.nn.Module):  # class 1 where a voxel is above the middle
        ...     def forward(self, slices):
        ...         return torch.cat([1 - slices, slices], dim=1)
        >>> label = segment_volume(Threshold(), np.eye(6)[:, :, None].repeat(3, axis=2), image_size=6)
        >>> label.shape, int(label.sum())
        ((6, 6, 3), 18)
    """
    if batch_size < 1:
        raise ValueError(f"segment_volume: batch_size must be at least 1; got {batch_size}")
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "iufb":
        raise DataError(
            f"segment_volume: expected a volume [X, Y, Z] of real numbers; got {image.dtype} {list(image.shape)}"
        )
    slices = torch.from_numpy(image_slices(image, image_size))[:, None]
    label = np.empty(image.shape, np.uint8)
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(slices), batch_size):
            part = slices[start : start + batch_size]
            logits = model(part.to(device))
            if logits.ndim != 4 or len(logits) != len(part) or not 2 <= logits.shape[1] <= 256:
                raise ValueError(
                    f"segment_volume: the model must return logits [{len(part)}, K, h, w] of 2 to 256 classes; got "
                    f"{list(logits.shape)}"
                )
            if not bool(torch.isfinite(logits).all()):
                raise ValueError("segment_volume: the model returns NaN or infinity; it has probably diverged")
            fine = F.interpolate(logits.float(), image.shape[:2], mode="bilinear", align_corners=False)
            classes = fine.argmax(dim=1).to(torch.uint8).cpu().numpy()
            label[:, :, start : start + batch_size] = classes.transpose(1, 2, 0)
    return label


def segment_file(
    model: nn.Module,
    path_in: str | Path,
    path_out: str | Path,
    *,
    image_size: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Path:
    """Segments a NIfTI volume and writes its label volume.

    The volume is turned to right, anterior, superior, as in training, and its label back again: the label file has the
    shape, affine, sform, qform and units of the input. It is written whole or not at all.

    Args:
        model, image_size, batch_size, device: see :func:`segment_volume`.
        path_in: a ``.nii`` or ``.nii.gz`` file with one volume.
        path_out: a ``.nii`` or ``.nii.gz`` file; its folder is made where it is missing. An existing file is replaced.

    Returns:
        ``path_out``.

    Raises:
        DataError: the input is missing, damaged, a series, not a NIfTI file; the output has another suffix or is the
            input.
    """
    from .training.files import make_folder, write_bytes  # here: it brings accelerate along

    path_in, path_out = Path(path_in), Path(path_out)
    if not path_out.name.endswith(SUFFIXES):
        raise DataError(f"{path_out}: the name of a label volume must end in .nii or .nii.gz")
    if path_out.exists() and path_in.exists() and path_out.samefile(path_in):
        raise DataError(f"{path_out}: the label volume would replace the volume itself; choose another name")
    volume = read_nifti(path_in)
    try:
        label = segment_volume(model, volume.values, image_size=image_size, batch_size=batch_size, device=device)
    except DataError as error:
        raise DataError(f"{path_in}: {error}") from error
    content = volume.label_file(label)
    make_folder(path_out.parent, parents=True)
    write_bytes(path_out, gzip.compress(content, mtime=0) if path_out.name.endswith(".gz") else content)
    return path_out
