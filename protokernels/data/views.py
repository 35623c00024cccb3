# SPDX-License-Identifier: MIT
"""Two random views of every image of a batch, the whole batch at once, in plain PyTorch.

Crop, resize and flip are one linear map along each axis, and so is the blur: a batch is transformed by batched matrix
products, R_y X R_x^T, without a Python step per image. All randomness lies in a :class:`ViewParameters`, drawn for
the images of a step from one generator: a resumed run, and a run on more processes, sees the same views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLUR_REACH = 3.0  # the Gaussian ends at this many sigma


@dataclass(frozen=True)
class ViewConfig:
    """How strong the transformations are; the defaults are those of SimCLR-like methods on grey images.

    Attributes:
        size: side of a view in pixels.
        crop_scale: smallest share of the image's area that a crop has; the largest is 1.
        crop_ratio: largest width / height of a crop; the smallest is its inverse.
        flip: probability of a horizontal flip.
        jitter: brightness and contrast are multiplied by factors from [1 - jitter, 1 + jitter] ...
        jitter_probability: ... with this probability.
        blur: probability of the Gaussian blur, for the first and the second view.
        blur_sigma: range of its standard deviation in pixels of an image of side 224; it shrinks with ``size``.
        solarise: probability that pixels >= 1/2 are inverted, for the first and the second view.
    """

    size: int = 224
    crop_scale: float = 0.2
    crop_ratio: float = 4 / 3
    flip: float = 0.5
    jitter: float = 0.4
    jitter_probability: float = 0.8
    blur: tuple[float, float] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        chances = (self.flip, self.jitter_probability, *self.blur, *self.solarise)
        if not all(0 <= chance <= 1 for chance in chances):
            raise ValueError(f"ViewConfig: probabilities must lie in [0, 1]; got {chances}")
        if self.size < 1 or not 0 < self.crop_scale <= 1 or not self.crop_ratio >= 1 or not 0 <= self.jitter <= 1:
            raise ValueError(
                "ViewConfig: size must be at least 1, crop_scale in (0, 1], crop_ratio at least 1, jitter in [0, 1]; "
                f"got {self.size}, {self.crop_scale}, {self.crop_ratio}, {self.jitter}"
            )
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"ViewConfig: blur_sigma must be a range of positive numbers; got {self.blur_sigma}")


class ViewParameters(NamedTuple):
    """What was drawn for one view of each image; float32 [B] on the CPU unless another shape is given."""

    box: Tensor  # [B, 4]: left, top, width, height of the crop as shares of the image
    flip: Tensor  # [B] bool
    brightness: Tensor  # factor, 1: unchanged
    contrast: Tensor  # factor, 1: unchanged
    sigma: Tensor  # of the blur in pixels of the view, 0: none
    solarise: Tensor  # [B] bool

    def part(self, rank: int, processes: int) -> ViewParameters:
        """The parameters of images rank, rank + processes, ..., which one of several processes holds."""
        return ViewParameters(*(value[rank::processes] for value in self))


def draw_views(config: ViewConfig, count: int, generator: torch.Generator, *, view: int) -> ViewParameters:
    """Draws the parameters of the first (``view`` = 0) or second (1) view of ``count`` images.

    The crop's area is uniform in [crop_scale, 1], the logarithm of its ratio uniform too; sides longer than the image
    are cut to it. Its place is uniform.
    """
    chance = torch.rand(count, 10, generator=generator)
    area = config.crop_scale + (1 - config.crop_scale) * chance[:, 0]
    root_ratio = torch.exp((chance[:, 1] - 0.5) * math.log(config.crop_ratio))
    width, height = ((area.sqrt() * side).clamp_max(1.0) for side in (root_ratio, 1 / root_ratio))
    box = torch.stack([chance[:, 2] * (1 - width), chance[:, 3] * (1 - height), width, height], dim=1)
    jittered = (chance[:, 5] < config.jitter_probability).float() * config.jitter
    low, high = (sigma * config.size / 224 for sigma in config.blur_sigma)
    return ViewParameters(
        box=box,
        flip=chance[:, 4] < config.flip,
        brightness=1 + jittered * (2 * chance[:, 6] - 1),
        contrast=1 + jittered * (2 * chance[:, 7] - 1),
        sigma=torch.where(
            chance[:, 8] < config.blur[view], low + (high - low) * torch.rand(count, generator=generator), 0
        ),
        solarise=chance[:, 9] < config.solarise[view],
    )


def make_view(images: Tensor, parameters: ViewParameters, size: int) -> Tensor:
    """Applies what was drawn, in this order: crop, flip, brightness, contrast, blur, solarise.

    Args:
        images: [B, C, H, W], uint8, or floating point in [0, 1]; on any device.
        parameters: of these B images.
        size: side of the views in pixels.

    Returns:
        [B, C, size, size] float32 in [0, 1].

    Raises:
        ValueError: the numbers of images and parameters differ.
    """
    if images.ndim != 4 or len(images) != len(parameters.box):
        raise ValueError(
            f"make_view: expected images [B, C, H, W] with parameters for each of B; got {list(images.shape)} and "
            f"{len(parameters.box)} parameters"
        )
    device = images.device
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    columns = resize_matrix(parameters.box[:, 0], parameters.box[:, 2], size, x.shape[3])
    columns = torch.where(parameters.flip[:, None, None], columns.flip(1), columns)
    rows = resize_matrix(parameters.box[:, 1], parameters.box[:, 3], size, x.shape[2])
    x = _separable(x, rows.to(device), columns.to(device))
    x = (x * _column(parameters.brightness, x)).clamp(0, 1)
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (level + (x - level) * _column(parameters.contrast, x)).clamp(0, 1)
    (blurred,) = parameters.sigma.nonzero(as_tuple=True)
    if len(blurred):
        smooth = blur_matrix(parameters.sigma[blurred], size).to(device)
        where = blurred.to(device)
        x = x.index_copy(0, where, _separable(x[where], smooth, smooth))
    return torch.where(_column(parameters.solarise, x), torch.where(x >= 0.5, 1 - x, x), x)


def two_views(
    images: Tensor,  # [b, C, H, W], the images of one process
    config: ViewConfig,
    generator: torch.Generator,
    *,
    rank: int = 0,
    processes: int = 1,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:  # [b, C, size, size] each
    """Two views of every image.

    Args:
        images: see :func:`make_view`.
        config: how strong the transformations are.
        generator: of the step, the same in every process.
        rank: this process holds images rank, rank + processes, ... of the batch.
        processes: number of processes.
        batch: images of all processes; default: ``len(images)``.

    Example:
        >>> import torch
        >>> from protokernels.data import ViewConfig, two_views
        >>> images = torch.randint(256, (8, 1, 128, 128), dtype=torch.uint8)
        >>> first, second = two_views(images, ViewConfig(size=56), torch.Generator().manual_seed(0))
        >>> first.shape, second.dtype
        (torch.Size([8, 1, 56, 56]), torch.float32)
    """
    count = len(images) if batch is None else batch
    drawn = [draw_views(config, count, generator, view=view).part(rank, processes) for view in (0, 1)]
    return make_view(images, drawn[0], config.size), make_view(images, drawn[1], config.size)


def resize_matrix(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:  # [B], [B] -> [B, size, side]
    """Bilinear resizing of part of an axis, one map per image.

    Output i lies at c_i = side (start + length (i + 1/2) / size) and takes pixel j, at j + 1/2, with a weight
    proportional to max(0, 1 - |j + 1/2 - c_i| / s), s = max(1, pixels per output): shrinking is antialiased. At the
    image's border the weights are renormalised. The same as ``F.interpolate(..., antialias=True)`` of a cut-out, except
    that pixels around a crop take part.
    """
    centre = side * (start[:, None] + length[:, None] * (torch.arange(size) + 0.5) / size)
    reach = (side * length / size).clamp_min(1.0)[:, None, None]
    distance = (torch.arange(side) + 0.5) - centre[:, :, None]
    weight = (1 - distance.abs() / reach).clamp_min(0)
    return weight / weight.sum(dim=2, keepdim=True)


def blur_matrix(sigma: Tensor, size: int) -> Tensor:  # [B] > 0 -> [B, size, size]
    """Gaussian blur along an axis: weights exp(-(i - j)^2 / 2 sigma^2) up to 3 sigma, renormalised, also at the
    border."""
    offset = torch.arange(size)[:, None] - torch.arange(size)
    weight = torch.exp(-offset.square() / (2 * sigma.square()[:, None, None]))
    weight = torch.where(offset.abs() <= (BLUR_REACH * sigma).ceil()[:, None, None], weight, 0)
    return weight / weight.sum(dim=2, keepdim=True)


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # R_y X R_x^T
    with torch.autocast(images.device.type, enabled=False):
        return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _column(values: Tensor, images: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1] on the device of the images
    return values.to(images.device)[:, None, None, None]
