# SPDX-License-Identifier: MIT
"""Random views of a batch of images for contrastive learning, on the kernels of ``transform`` and ``affine_warp``.

Crop, flips and rotation are ONE affine map per image, blur and noise one more pass with an image's own strengths. Nothing runs per image in
Python, nothing waits for the device, and gradients flow to the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _warp_checks as checks
from ..ops import warp as ops
from ..ops._checks import (
    FLOATING,
    check_choice,
    check_flag,
    check_generator,
    check_interval,
    check_whole,
    describe,
    drawn_by,
)
from ..reference.warp import AFFINE_PADDINGS
from .view_strength import Range, ViewStrength

BLUR_REACH = 3.0  # the Gaussian ends at this many sigma, unless its radius is given


class ViewParameters(NamedTuple):
    """What was drawn for one view of each image; float32 [B] unless another type or shape is given."""

    box: Tensor  # [B, 4]: left, top, width, height of the crop as shares of the image
    mirror: Tensor  # [B, 2] bool: along x, along y
    angle: Tensor  # radians
    brightness: Tensor  # factor, 1: unchanged
    contrast: Tensor  # factor, 1: unchanged
    offset: Tensor  # 0: unchanged
    gamma: Tensor  # exponent, 1: unchanged
    sigma: Tensor  # of the blur in pixels of the view, 0: none
    noise_std: Tensor  # 0: none
    seed: Tensor  # int64, key of the noise
    solarise: Tensor  # bool

    def part(self, rank: int, processes: int) -> ViewParameters:
        """The parameters of images rank, rank + processes, ..., which one of several processes holds."""
        return ViewParameters(*(value[rank::processes] for value in self))

    def to(self, device: torch.device) -> ViewParameters:
        return ViewParameters(*(value.to(device, non_blocking=True) for value in self))


class RandomViews(nn.Module):
    """Random views of every image of a batch, such as SimCLR compares.

    Applied in this order: resized crop, flips and rotation (one bilinear affine map), brightness, contrast, offset, gamma, blur, noise,
    solarisation. The rotation is one of the view: what it brings in at the corners is the image around the crop. Where
    a crop shrinks the image, a Gaussian blur of (pixels per pixel - 1) / 2 before it keeps aliasing away.

    All randomness lies in :class:`ViewParameters`, drawn in a few calls for the whole batch from the generator given: the same generator
    gives the same views in any division of the batch over processes (``draw``, ``part``, ``make``), and noise too has a key for each image.

    Args:
        size: sides (H, W) of a view in pixels, or one for both.
        strengths: of each view; default: two alike.
        limits: intensities are cut to this range after every change of them; None: never (then there is no solarisation).
        padding_mode: what lies outside the image for a rotation or a large crop, see :func:`protokernels.affine_warp`.
        antialias: blur before shrinking.

    Shape: images [B, C, H, W], floating point, or uint8 which becomes float32 in [0, 1] -> a tuple of views [B, C, *size].

    Example:
        >>> import torch
        >>> from protokernels.nn import RandomViews, ViewStrength
        >>> views = RandomViews(32, ViewStrength(rotate=0.5), ViewStrength(blur=0.1, noise=0.5))
        >>> first, second = views(torch.rand(8, 1, 64, 48), generator=torch.Generator().manual_seed(0))
        >>> first.shape, second.dtype
        (torch.Size([8, 1, 32, 32]), torch.float32)
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *strengths: ViewStrength,
        limits: Range | None = (0.0, 1.0),
        padding_mode: checks.AffinePadding = "border",
        antialias: bool = True,
    ) -> None:
        super().__init__()
        sides = _sides(size)
        for strength in strengths:
            if not isinstance(strength, ViewStrength):
                raise TypeError(
                    f"RandomViews: strengths must be ViewStrength, one for each view; got {describe(strength)}"
                )
        check_choice("RandomViews", "padding_mode", padding_mode, AFFINE_PADDINGS)
        check_flag("RandomViews", "antialias", antialias)
        if limits is not None:
            check_interval("RandomViews", "limits", limits)
        self.size = sides
        self.strengths = strengths or (ViewStrength(), ViewStrength())
        if limits is not None and not limits[0] < limits[1]:
            raise ValueError(f"RandomViews: limits must be a range (low, high) or None; got {limits}")
        if limits is None and any(strength.solarise for strength in self.strengths):
            raise ValueError(
                "RandomViews: solarisation mirrors intensities within limits; pass limits, e.g. (0.0, 1.0)"
            )
        self.limits = limits
        self.padding_mode: checks.AffinePadding = padding_mode
        self.antialias = antialias

    @classmethod
    def preset(cls, name: str, size: int | tuple[int, int]) -> RandomViews:
        """The two views of a paper.

        ``"contrastive_autoencoder"`` (Ferrante et al. 2022): rotation up to 30 degrees, blur with five taps, noise, flip and crop,
        each with the probability 1/2.

        ``"local_contrast"`` (Hu et al. 2021, released code): offset, gamma and noise, rotation by any angle, scale. Unlike there, no
        elastic deformation; the power of gamma is uniform in its logarithm, the scale in its square, the area shown; and intensities
        change after the image has moved. :mod:`protokernels.data.segmentation_views`, with which that paper is trained, has all of it.

        ``"optiml"`` (Singh et al. 2024, from the authors' sister methods): crop, flip, jitter of brightness and contrast; blur and
        solarisation differ between the views. Unlike there, crops are bilinear, not bicubic, and there is no jitter of saturation and
        hue and no turning grey: these change nothing in grey X-rays, but views of colour images lack them.
        """
        if name == "contrastive_autoencoder":
            half = ViewStrength(
                crop=0.5, crop_scale=(0.5, 1.0), rotate=0.5, jitter=0.0, blur=0.5, blur_radius=2, noise=0.5
            )
            return cls(size, half, half, padding_mode="zeros")
        if name == "local_contrast":
            height, width = _sides(size)
            shape = width / height  # of the view, which is scaled alike in both directions
            strong = ViewStrength(
                crop=0.5, crop_scale=(0.49, 1.5625), crop_ratio=(shape, shape), hflip=0.0, rotate=0.5, rotation=(0.0, 2 * math.pi),
                jitter=0.0, offset=0.5, offset_normal=(1.0, 1.0), gamma=0.5, blur=0.0, noise=0.5,
            )  # fmt: skip
            return cls(size, strong, strong, limits=None)
        if name == "optiml":
            side = sum(_sides(size)) / 2
            sigma = (0.1 * side / 224, 2.0 * side / 224)
            return cls(
                size,
                ViewStrength(blur=1.0, blur_sigma=sigma),
                ViewStrength(blur=0.1, blur_sigma=sigma, solarise=0.2),
            )
        raise ValueError(
            f"RandomViews: expected the preset 'contrastive_autoencoder', 'local_contrast' or 'optiml'; got {name!r}"
        )

    def forward(
        self,
        images: Tensor,  # [B, C, H, W]
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:  # [B, C, *size] each
        """One view per strength. ``generator``: on any device; default: torch's own for the device of the images."""
        _check_images(images)
        check_generator("RandomViews", generator)
        device = images.device if generator is None else generator.device
        drawn = [
            self.draw(images.shape[0], view, sides=images.shape[2:], generator=generator, device=device)
            for view in range(len(self.strengths))
        ]
        return tuple(self.make(images, parameters, view) for view, parameters in enumerate(drawn))

    def draw(
        self,
        count: int,
        view: int = 0,
        *,
        sides: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> ViewParameters:
        """Parameters of view number ``view`` for ``count`` images, on ``device``, which must be that of the generator.

        ``sides``: (H, W) of the images, ``images.shape[2:]``, for the shape of the crops; default: those of a square.
        """
        if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
            raise TypeError(f"RandomViews: count must be a number of images; got {describe(count)}")
        if count < 0:
            raise ValueError(f"RandomViews: count must not be negative; got {count}")
        check_generator("RandomViews", generator)
        strength = self._strength(view)
        source = drawn_by(generator)
        shares = torch.rand(len(_COLUMNS), count, dtype=torch.float32, device=device, **source)
        columns: dict[str, Tensor] = dict(zip(_COLUMNS, shares, strict=True))
        normal = torch.randn(count, dtype=torch.float32, device=device, **source)
        limits = (-(2**63), 2**63 - 1)
        seed = torch.randint(*limits, (count,), dtype=torch.int64, device=device, **source)

        def happens(name: str) -> Tensor:
            probability: float = getattr(strength, name)
            return columns[name] < probability

        def uniform(name: str, limits: Range) -> Tensor:
            return limits[0] + (limits[1] - limits[0]) * columns[name]

        area = uniform("area", strength.crop_scale)
        root = (uniform("ratio", _logarithms(strength.crop_ratio)) / 2).exp() * _share_per_pixel(sides)
        longest = torch.ones_like(area).masked_fill(area > 1, math.inf)
        cropped = happens("crop")
        width, height = (
            torch.where(cropped, torch.minimum(area.sqrt() * side, longest), 1.0) for side in (root, 1 / root)
        )
        box = torch.stack([columns["left"] * (1 - width), columns["top"] * (1 - height), width, height], 1)
        jitter, mean, std = happens("jitter").to(torch.float32), *strength.offset_normal
        return ViewParameters(
            box=box,
            mirror=torch.stack([happens("hflip"), happens("vflip")], 1),
            angle=torch.where(happens("rotate"), uniform("rotation", strength.rotation), 0.0),
            brightness=1 + jitter * strength.brightness * (2 * columns["brightness"] - 1),
            contrast=1 + jitter * strength.contrast * (2 * columns["contrast"] - 1),
            offset=torch.where(happens("offset"), mean + std * normal, 0.0),
            gamma=torch.where(happens("gamma"), uniform("power", _logarithms(strength.gamma_range)).exp(), 1.0),
            sigma=torch.where(happens("blur"), uniform("blur_sigma", strength.blur_sigma), 0.0),
            noise_std=torch.where(happens("noise"), uniform("noise_std", strength.noise_std), 0.0),
            seed=seed,
            solarise=happens("solarise"),
        )

    def make(self, images: Tensor, parameters: ViewParameters, view: int = 0) -> Tensor:
        """The view of images [B, C, H, W] that has these parameters, drawn for view number ``view``."""
        _check_images(images)
        if not isinstance(parameters, ViewParameters):
            raise TypeError(
                f"RandomViews: parameters must be ViewParameters, as draw returns; got {describe(parameters)}"
            )
        if images.shape[0] != parameters.box.shape[0]:
            raise ValueError(
                f"RandomViews: expected parameters for each of {images.shape[0]} images; got {parameters.box.shape[0]}"
            )
        strength, p = self._strength(view), parameters.to(images.device)
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = x if dtype == torch.float64 else x.float()
        matrix = view_matrix(p, tuple(x.shape[2:]), self.size)
        if self.antialias:
            x = _smooth(x, matrix, strength.crop_scale[1], self.size)
        x = ops.affine_warp(x, matrix, size=self.size, padding_mode=self.padding_mode)
        if strength.jitter:
            x = self._cut(x * _column(p.brightness, x))
            level = x.mean(dim=(1, 2, 3), keepdim=True)
            factor = _column(p.contrast, x)
            x = self._cut(x * factor + level * (1 - factor))  # in this form exact for 1
        if strength.offset:
            x = self._cut(x + _column(p.offset, x))
        if strength.gamma:
            x = _power(x, _column(p.gamma, x))
        order: list[checks.Stage] = [*(("blur",) if strength.blur else ()), *(("noise",) if strength.noise else ())]
        if order:
            values = F.pad(torch.stack([p.sigma, p.noise_std], 1), (0, 5))
            radius = strength.blur_radius
            if radius is None:
                radius = min(math.ceil(BLUR_REACH * strength.blur_sigma[1]), checks.MOST_RADIUS)
            x = ops.transform(x, values, order=order, sigma_max=1.0, noise_std=1.0, radius=radius, seed=p.seed)
            x = self._cut(x)
        if strength.solarise and self.limits is not None:
            low, high = self.limits
            upper = x >= (low + high) / 2
            x = torch.where(_column(p.solarise, x) & upper, low + high - x, x)
        return x.to(dtype)

    def _strength(self, view: int) -> ViewStrength:
        check_whole("RandomViews", "view", view)
        if not 0 <= view < len(self.strengths):
            raise ValueError(f"RandomViews: view must lie in 0..{len(self.strengths) - 1}; got {view}")
        return self.strengths[view]

    def _cut(self, x: Tensor) -> Tensor:
        return x if self.limits is None else x.clamp(*self.limits)

    def extra_repr(self) -> str:
        views = []
        for strength in self.strengths:
            changed = [f.name for f in fields(strength) if getattr(strength, f.name) != f.default]
            views.append(f"ViewStrength({', '.join(f'{name}={getattr(strength, name)}' for name in changed)})")
        return f"size={self.size}, {', '.join(views)}, limits={self.limits}, padding_mode={self.padding_mode!r}"


_COLUMNS = (
    "crop", "area", "ratio", "left", "top", "hflip", "vflip", "rotate", "rotation", "jitter", "brightness", "contrast",
    "offset", "gamma", "power", "blur", "blur_sigma", "noise", "noise_std", "solarise",
)  # fmt: skip


def _sides(size: object) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or any(
        isinstance(side, bool) or not isinstance(side, int) or not 0 < side < 2**31 for side in sides
    ):
        raise ValueError(f"RandomViews: size must be one or two positive numbers of pixels; got {size!r}")
    return sides


def _share_per_pixel(sides: Sequence[int] | None) -> float:
    """The root of H / W, which makes a crop's width / height in pixels one in shares of the image, half of it for either side."""
    if sides is None:
        return 1.0
    if (
        not isinstance(sides, Sequence)
        or len(sides) != 2
        or any(isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) or side < 0 for side in sides)
    ):
        raise ValueError(f"RandomViews: sides must be the height and width of the images in pixels; got {sides!r}")
    H, W = sides
    return 1.0 if H == 0 or W == 0 else (H / W) ** 0.5


def view_matrix(
    parameters: ViewParameters,
    sides: tuple[int, ...],  # H, W of the images
    size: tuple[int, int],
) -> Tensor:  # [B, 2, 3]
    """Crop, flips and rotation as the matrix of ``affine_warp``: [diag(s) R | t], s the pixels per pixel of the view, negative where it is
    mirrored, and t from the image's centre to the crop's. The matrix goes from the view to the image, so what is applied last comes first:
    a pixel of the view is turned back by R, then mirrored and stretched to the crop."""
    left, top, width, height = parameters.box.unbind(1)
    sign = 1 - 2 * parameters.mirror.to(width.dtype)
    across, down = sign[:, 0] * width * (sides[1] / size[1]), sign[:, 1] * height * (sides[0] / size[0])
    cos, sin = parameters.angle.cos(), parameters.angle.sin()
    first = torch.stack([cos * across, -sin * across, (left + width / 2 - 0.5) * sides[1]], 1)
    second = torch.stack([sin * down, cos * down, (top + height / 2 - 0.5) * sides[0]], 1)
    return torch.stack([first, second], 1)


def _smooth(x: Tensor, matrix: Tensor, largest_area: float, size: tuple[int, int]) -> Tensor:
    """Blurred before it shrinks: sigma = (s - 1) / 2 with s^2 the area of a view's pixel in pixels of the image."""
    most = (math.sqrt(max(1.0, largest_area) * x.shape[2] * x.shape[3] / (size[0] * size[1])) - 1) / 2
    if most < 0.25:  # its neighbours would have weights below 4e-4
        return x
    area = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs()
    sigma = (area.sqrt() - 1).clamp_min(0.0) / 2
    return ops.gaussian_blur(x, sigma, radius=min(math.ceil(BLUR_REACH * most), checks.MOST_RADIUS))


def _power(x: Tensor, gamma: Tensor) -> Tensor:
    """Scaled to [0, 1], raised to the power, scaled back. A constant image has no gamma."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    span = high - low
    share = ((x - low) / torch.where(span > 0, span, 1.0)).clamp(0.0, 1.0)
    above = share > 0  # the power of 0 has no derivative
    raised = torch.where(above, torch.where(above, share, 1.0) ** gamma, 0.0)
    return torch.where((gamma != 1) & (span > 0), raised * span + low, x)


def _logarithms(limits: Range) -> Range:
    return math.log(limits[0]), math.log(limits[1])


def _column(values: Tensor, x: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1]
    return values.view(-1, *(1,) * (x.dim() - 1))


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or images.dtype not in (*FLOATING, torch.uint8) or images.dim() != 4:
        raise ValueError(
            f"RandomViews: images must be floating point or uint8 of shape [B, C, H, W]; got {describe(images)}"
        )
