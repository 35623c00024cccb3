# SPDX-License-Identifier: MIT
"""Random changes of slices for segmentation, the labels moving along: intensities, elastic deformation, rotation, scale,
mirroring, crop.

A batch is changed as a whole in plain PyTorch, every image by its own parameters. They are drawn on the CPU from one
generator, so that a resumed run, and a run on more processes, sees the same views. Strengths are those of the released
code of Hu et al. 2021, which takes its transformations from batchgenerators; where that interpolates by cubic splines,
images here are interpolated bilinearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

GAUSSIAN_REACH = 4.0  # the kernel ends at this many sigma
Parameters = TypeVar("Parameters", "IntensityParameters", "SpatialParameters")


@dataclass(frozen=True)
class IntensityConfig:
    """Changes of intensity, in this order; images are in [0, 1] before and need not be after.

    Attributes:
        brightness_probability: a number is added to the whole image, ...
        brightness_mean: ... normally distributed around this one ...
        brightness_std: ... with this standard deviation.
        gamma_probability: (x - min) / (max - min) of an image is raised to a power, ...
        gamma: ... uniform in [low, 1] or, with equal chances, in [1, high].
        noise_probability: normally distributed noise is added to every pixel ...
        noise_std: ... whose standard deviation is uniform in this range (batchgenerators calls it a variance).
    """

    brightness_probability: float = 0.5
    brightness_mean: float = 1.0
    brightness_std: float = 1.0
    gamma_probability: float = 0.5
    gamma: tuple[float, float] = (0.5, 2.0)
    noise_probability: float = 0.5
    noise_std: tuple[float, float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        _check_chances(self, self.brightness_probability, self.gamma_probability, self.noise_probability)
        if not 0 < self.gamma[0] <= 1 <= self.gamma[1]:
            raise ValueError(f"IntensityConfig: gamma must be a range (low, high) around 1, positive; got {self.gamma}")
        if not 0 <= self.noise_std[0] <= self.noise_std[1] or not self.brightness_std >= 0:
            raise ValueError(
                "IntensityConfig: noise_std must be a range of numbers that are not negative, brightness_std neither; "
                f"got {self.noise_std}, {self.brightness_std}"
            )


@dataclass(frozen=True)
class SpatialConfig:
    """Where a pixel of the view is taken from; lengths are in pixels. Beyond the border the border's pixel is repeated.

    Attributes:
        mirror_probability: columns are reversed.
        elastic_probability: every pixel is displaced by a smooth field: noise uniform in [-1, 1], blurred by a Gaussian
            (zeros outside the image) and multiplied by alpha.
        elastic_alpha: range of alpha.
        elastic_sigma: range of the Gaussian's standard deviation.
        rotation_probability: the view is turned about its centre ...
        rotation: ... by an angle in this range, in radians.
        scale_probability: the distance from the centre is multiplied ...
        scale: ... by a factor uniform in [low, 1] or, with equal chances, in [1, high]; above 1 the view shows more.
        centre_distance: the view's centre is anywhere at least this far from the border; None: at the image's centre.
    """

    mirror_probability: float = 0.0
    elastic_probability: float = 1.0
    elastic_alpha: tuple[float, float] = (0.0, 1000.0)
    elastic_sigma: tuple[float, float] = (40.0, 60.0)
    rotation_probability: float = 0.5
    rotation: tuple[float, float] = (0.0, 2 * math.pi)
    scale_probability: float = 0.5
    scale: tuple[float, float] = (0.7, 1.25)
    centre_distance: float | None = 30.0

    def __post_init__(self) -> None:
        _check_chances(
            self, self.mirror_probability, self.elastic_probability, self.rotation_probability, self.scale_probability
        )
        if (
            not 0 <= self.elastic_alpha[0] <= self.elastic_alpha[1]
            or not 0 < self.elastic_sigma[0] <= self.elastic_sigma[1]
        ):
            raise ValueError(
                "SpatialConfig: elastic_alpha must be a range of numbers that are not negative, elastic_sigma of positive "
                f"ones; got {self.elastic_alpha}, {self.elastic_sigma}"
            )
        if not self.rotation[0] <= self.rotation[1] or not 0 < self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(
                "SpatialConfig: rotation must be a range (low, high), scale one around 1, positive; got "
                f"{self.rotation}, {self.scale}"
            )
        if self.centre_distance is not None and not self.centre_distance >= 0:
            raise ValueError(f"SpatialConfig: centre_distance must not be negative; got {self.centre_distance}")

    @classmethod
    def preset(cls, name: str) -> SpatialConfig:
        """``"global"``: the views of global contrast, stage 1. ``"segmentation"``: training with labels, stage 3."""
        if name == "global":
            return cls()
        if name == "segmentation":
            return cls(mirror_probability=0.5, rotation=(-0.1, 0.1), scale=(0.5, 1.9), centre_distance=None)
        raise ValueError(f'SpatialConfig: expected the preset "global" or "segmentation"; got {name!r}')


class IntensityParameters(NamedTuple):
    """What was drawn for each image; float32 on the CPU."""

    shift: Tensor  # [B], 0: unchanged
    gamma: Tensor  # [B], 1: unchanged
    noise_std: Tensor  # [B], 0: none
    noise: Tensor  # [B, H, W], standard normal


class SpatialParameters(NamedTuple):
    """What was drawn for each image; float32 on the CPU unless another dtype is given."""

    mirror: Tensor  # [B] bool
    alpha: Tensor  # [B], 0: no elastic deformation
    sigma: Tensor  # [B]
    angle: Tensor  # [B]
    scale: Tensor  # [B], 1: unchanged
    shift: Tensor  # [B, 2], of the centre in rows and columns
    noise: Tensor  # [B, 2, H, W], uniform in [-1, 1]: before the blur


class View(NamedTuple):
    """One view of a batch."""

    images: Tensor  # [B, 1, H, W] float32
    labels: Tensor | None  # [B, H, W]


def intensity_views(
    images: Tensor,  # [b, 1, H, W]
    config: IntensityConfig,
    generator: torch.Generator,
    *,
    rank: int = 0,
    processes: int = 1,
    batch: int | None = None,
) -> Tensor:  # [b, 1, H, W] float32
    """One view of every image with other intensities; pixels stay where they are, and so labels remain right.

    Args:
        images: floating point, on any device.
        config: how strong the changes are.
        generator: of the step, on the CPU, the same in every process.
        rank: this process holds images rank, rank + processes, ... of the batch.
        processes: number of processes.
        batch: images of all processes; default: ``len(images)``.

    Raises:
        ValueError: another shape or dtype of the images.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 32, 32)
        >>> intensity_views(images, IntensityConfig(), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 32, 32])
    """
    _check_images("intensity_views", images)
    count = len(images) if batch is None else batch
    parameters = draw_intensity(config, count, images.shape[2], images.shape[3], generator)
    return change_intensity(images, _part(parameters, rank, processes))


def spatial_views(
    images: Tensor,  # [b, 1, H, W]
    labels: Tensor | None,  # [b, H, W] whole numbers
    config: SpatialConfig,
    generator: torch.Generator,
    *,
    rank: int = 0,
    processes: int = 1,
    batch: int | None = None,
) -> View:
    """One view of every image whose pixels are moved, and their labels with them.

    A view's pixel at r from its centre takes the place c + s R(r + d): d the elastic displacement, R the rotation, s the
    scale, c the centre. Images are interpolated bilinearly, labels take the class of the nearest pixel.

    Args and errors: see :func:`intensity_views`; ``labels`` None gives None back.

    Example:
        >>> import torch
        >>> images, labels = torch.rand(4, 1, 32, 32), torch.randint(3, (4, 32, 32))
        >>> config, generator = SpatialConfig.preset("segmentation"), torch.Generator().manual_seed(0)
        >>> spatial_views(images, labels, config, generator).labels.unique()
        tensor([0, 1, 2])
    """
    _check_images("spatial_views", images, labels)
    count = len(images) if batch is None else batch
    parameters = draw_spatial(config, count, images.shape[2], images.shape[3], generator)
    return move_pixels(images, labels, _part(parameters, rank, processes))


def view_pair(
    images: Tensor,  # [b, 1, H, W]
    labels: Tensor | None,  # [b, H, W] whole numbers
    intensity: IntensityConfig,
    spatial: SpatialConfig | None,
    generator: torch.Generator,
    *,
    identical_views: bool = False,
    rank: int = 0,
    processes: int = 1,
    batch: int | None = None,
) -> tuple[View, View]:
    """Two views of every image for contrast: intensities first, then, unless ``spatial`` is None, places.

    The views are independent. ``identical_views`` instead repeats what the released code of Hu et al. does: its
    transformations of intensity write into the array they are given, so those of the second view come on top of those
    of the first, and without ``spatial`` both views are that one array.

    Args and errors: see :func:`intensity_views` and :func:`spatial_views`.

    Example:
        >>> import torch
        >>> images = torch.rand(4, 1, 32, 32)
        >>> generator = torch.Generator().manual_seed(0)
        >>> first, second = view_pair(images, None, IntensityConfig(), None, generator, identical_views=True)
        >>> torch.equal(first.images, second.images)
        True
    """
    _check_images("view_pair", images, labels)
    share = {"rank": rank, "processes": processes, "batch": len(images) if batch is None else batch}
    first = intensity_views(images, intensity, generator, **share)
    second = intensity_views(first if identical_views else images, intensity, generator, **share)
    if spatial is None:
        return View(second if identical_views else first, labels), View(second, labels)
    views = [spatial_views(view, labels, spatial, generator, **share) for view in (first, second)]
    return views[0], views[1]


def draw_intensity(
    config: IntensityConfig, count: int, height: int, width: int, generator: torch.Generator
) -> IntensityParameters:
    """Draws parameters for ``count`` images."""
    chance = torch.rand(count, 6, generator=generator, dtype=torch.float32)
    normal = torch.randn(count, generator=generator, dtype=torch.float32)
    noise = torch.randn(count, height, width, generator=generator, dtype=torch.float32)
    shift = config.brightness_mean + config.brightness_std * normal
    low, high = config.noise_std
    return IntensityParameters(
        shift=torch.where(chance[:, 0] < config.brightness_probability, shift, 0),
        gamma=torch.where(
            chance[:, 1] < config.gamma_probability, _around_one(chance[:, 2], chance[:, 3], config.gamma), 1
        ),
        noise_std=torch.where(chance[:, 4] < config.noise_probability, low + (high - low) * chance[:, 5], 0),
        noise=noise,
    )


def change_intensity(images: Tensor, parameters: IntensityParameters) -> Tensor:  # [B, 1, H, W] -> the same, float32
    """Applies what was drawn, in this order: brightness, gamma, noise. A constant image has no gamma."""
    shift, gamma, std = (_column(value, images) for value in parameters[:3])
    x = images.float() + shift
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    span = high - low
    share = ((x - low) / torch.where(span > 0, span, 1)).clamp(0, 1)
    x = torch.where((gamma != 1) & (span > 0), share**gamma * span + low, x)
    return x + std * parameters.noise.to(images.device)[:, None]


def draw_spatial(
    config: SpatialConfig, count: int, height: int, width: int, generator: torch.Generator
) -> SpatialParameters:
    """Draws parameters for ``count`` images of ``height`` x ``width`` pixels."""
    chance = torch.rand(count, 11, generator=generator, dtype=torch.float32)
    noise = 2 * torch.rand(count, 2, height, width, generator=generator, dtype=torch.float32) - 1

    def uniform(column: int, limits: tuple[float, float]) -> Tensor:
        return limits[0] + (limits[1] - limits[0]) * chance[:, column]

    distance = config.centre_distance
    room = torch.tensor(
        [0.0 if distance is None else max(0.0, side / 2 - distance) for side in (height, width)], dtype=torch.float32
    )
    return SpatialParameters(
        mirror=chance[:, 0] < config.mirror_probability,
        alpha=torch.where(chance[:, 1] < config.elastic_probability, uniform(2, config.elastic_alpha), 0),
        sigma=uniform(3, config.elastic_sigma),
        angle=torch.where(chance[:, 4] < config.rotation_probability, uniform(5, config.rotation), 0),
        scale=torch.where(
            chance[:, 6] < config.scale_probability, _around_one(chance[:, 7], chance[:, 8], config.scale), 1
        ),
        shift=room * (2 * chance[:, 9:11] - 1),
        noise=noise,
    )


def move_pixels(
    images: Tensor,  # [B, 1, H, W]
    labels: Tensor | None,  # [B, H, W]
    parameters: SpatialParameters,
) -> View:
    """Applies what was drawn: see :func:`spatial_views`. Mirroring comes first."""
    grid = sampling_grid(parameters, images.device)
    with torch.autocast(images.device.type, enabled=False):
        moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        if labels is None:
            return View(moved, None)
        # float32 holds whole numbers up to 2^24 exactly
        taken = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return View(moved, taken[:, 0].to(labels.dtype))


def sampling_grid(parameters: SpatialParameters, device: torch.device) -> Tensor:  # [B, H, W, 2]
    """Where each pixel of the views is taken from, as ``F.grid_sample(..., align_corners=False)`` wants it."""
    height, width = parameters.noise.shape[2:]
    mirror, alpha, sigma, angle, scale, shift, noise = (value.to(device) for value in parameters)
    with torch.autocast(device.type, enabled=False):
        smooth = (
            gaussian_matrix(sigma, height)[:, None] @ noise @ gaussian_matrix(sigma, width)[:, None].transpose(2, 3)
        )
    offset = alpha[:, None, None, None] * smooth
    down, across = (torch.arange(side, device=device, dtype=offset.dtype) - (side - 1) / 2 for side in (height, width))
    rows, columns = down[:, None] + offset[:, 0], across + offset[:, 1]  # [B, H, W]
    cos, sin = (scale * torch.cos(angle))[:, None, None], (scale * torch.sin(angle))[:, None, None]
    down = cos * rows - sin * columns + shift[:, 0, None, None]
    across = sin * rows + cos * columns + shift[:, 1, None, None]
    across = torch.where(mirror[:, None, None], -across, across)
    return torch.stack([across * (2 / width), down * (2 / height)], dim=3)


def gaussian_matrix(sigma: Tensor, size: int) -> Tensor:  # [B] -> [B, size, size]
    """Gaussian blur along an axis with zeros outside it: weights exp(-(i - j)^2 / 2 sigma^2) up to 4 sigma, divided by
    their sum over a whole kernel."""
    reach = (GAUSSIAN_REACH * sigma + 0.5).floor()
    longest = int(reach.max()) if len(sigma) else 0
    variance = 2 * sigma.square()[:, None]
    steps = torch.arange(-longest, longest + 1, device=sigma.device)
    kernel = torch.exp(-steps.square() / variance) * (steps.abs() <= reach[:, None])
    offset = torch.arange(size, device=sigma.device)[:, None] - torch.arange(size, device=sigma.device)
    weight = torch.exp(-offset.square() / variance[:, :, None]) * (offset.abs() <= reach[:, None, None])
    return weight / kernel.sum(dim=1)[:, None, None]


def _around_one(
    side: Tensor, place: Tensor, limits: tuple[float, float]
) -> Tensor:  # [B], [B] uniform in [0, 1) -> [B]
    low, high = limits
    return torch.where((side < 0.5) & (low < 1), low + (1 - low) * place, 1 + (high - 1) * place)


def _part(parameters: Parameters, rank: int, processes: int) -> Parameters:
    return type(parameters)(*(value[rank::processes] for value in parameters))


def _column(values: Tensor, images: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1] on the device of the images
    return values.to(images.device)[:, None, None, None]


def _check_chances(config: IntensityConfig | SpatialConfig, *chances: float) -> None:
    if not all(0 <= chance <= 1 for chance in chances):
        raise ValueError(f"{type(config).__name__}: probabilities must lie in [0, 1]; got {chances}")


def _check_images(caller: str, images: Tensor, labels: Tensor | None = None) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
        raise ValueError(
            f"{caller}: images must be floating point of shape [B, 1, H, W]; got {str(images.dtype)[6:]} "
            f"{list(images.shape)}"
        )
    expected = images[:, 0].shape
    if labels is not None and (labels.shape != expected or labels.is_floating_point() or labels.is_complex()):
        raise ValueError(
            f"{caller}: labels must be whole numbers of shape {list(expected)}; got {str(labels.dtype)[6:]} "
            f"{list(labels.shape)}"
        )
