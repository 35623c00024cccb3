# SPDX-License-Identifier: MIT
"""Random changes of images that keep what they show: histogram equalisation, rotation, scale, translation.

The paper's "VAEsim (aug)" names these four and no strengths; the defaults are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import protokernels

LEVELS = 256  # grey levels of a histogram


@dataclass(frozen=True)
class Augmentation:
    """How strong the changes are; 0 everywhere leaves images as they are, bit for bit."""

    equalise: float = 0.5  # probability
    rotation: float = 15.0  # degrees, the largest in either direction
    scale: float = 0.1  # the largest change of size, up or down
    translation: float = 0.1  # the largest shift along each axis, as a share of the side

    def __post_init__(self) -> None:
        inside = 0 <= self.equalise <= 1 and 0 <= self.scale < 1
        if not (inside and 0 <= self.rotation <= 180 and 0 <= self.translation <= 1):
            raise ValueError(
                "Augmentation: equalise and translation must lie in [0, 1], rotation in [0, 180] degrees, scale in [0, 1); got "
                f"{self}"
            )


def augment(
    images: Tensor,  # [b, C, H, W] float32 in [0, 1], the images of one process
    strength: Augmentation,
    generator: torch.Generator,
    *,
    rank: int = 0,
    processes: int = 1,
    batch: int | None = None,
) -> Tensor:  # [b, C, H, W]
    """Every image with its own changes: equalised or not, then turned, scaled and shifted in one bilinear step; what comes in from
    outside is 0.

    Args:
        images: on any device.
        strength: see :class:`Augmentation`.
        generator: of the step, on the CPU, the same in every process.
        rank: this process holds images rank, rank + processes, ... of the batch.
        processes: number of processes.
        batch: images of all processes; default: ``len(images)``.

    Example:
        >>> import torch
        >>> from protokernels.data.augmentations import Augmentation, augment
        >>> augment(torch.rand(8, 1, 28, 28), Augmentation(), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 1, 28, 28])
    """
    count = len(images) if batch is None else batch
    chosen, matrix = (
        value[rank::processes].to(images.device) for value in draw(strength, count, images.shape[2:], generator)
    )
    (rows,) = chosen.nonzero(as_tuple=True)
    if len(rows):
        images = images.index_copy(0, rows, equalise(images[rows]))
    return protokernels.affine_warp(images, matrix)


def draw(
    strength: Augmentation, count: int, sides: tuple[int, int] | torch.Size, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # [count] bool, [count, 2, 3]
    """Which images are equalised, and the map from a pixel of the result to where it comes from, about the centre and in pixels
    (see :func:`protokernels.affine_warp`)."""
    chance = torch.rand(count, 5, generator=generator, dtype=torch.float32)
    signed = 2 * chance[:, 1:] - 1
    angle = signed[:, 0] * math.radians(strength.rotation)
    zoom = 1 + signed[:, 1] * strength.scale
    shift = signed[:, 2:] * strength.translation * torch.tensor([sides[1], sides[0]])  # x, y
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    turn = torch.stack([cosine, sine, -sine, cosine], dim=1).view(-1, 2, 2)
    return chance[:, 0] < strength.equalise, torch.cat([turn, shift[:, :, None]], dim=2)


def equalise(images: Tensor) -> Tensor:  # [B, C, H, W] in [0, 1] -> the same
    """Histogram equalisation of every channel: a grey level becomes the share of pixels that are darker or equal, stretched so that
    the darkest level present is 0.

        x -> (F(x) - F(x_min)) / (1 - F(x_min)),   F the distribution of the 256 rounded levels

    An image of one level stays as it is.
    """
    shape = images.shape
    levels = (images * (LEVELS - 1)).round().clamp(0, LEVELS - 1).to(torch.int64).reshape(-1, shape[2] * shape[3])
    counts = torch.zeros(len(levels), LEVELS, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))  # integers: the same in every order
    below = counts.cumsum(dim=1)
    darkest = counts.gather(1, levels.amin(dim=1, keepdim=True))
    spread = levels.shape[1] - darkest
    mapped = ((below - darkest).clamp_min(0) / spread.clamp_min(1)).to(images.dtype)
    result = mapped.gather(1, levels).view(shape)
    return torch.where((spread > 0).view(shape[0], shape[1], 1, 1), result, images)
