# SPDX-License-Identifier: MIT
"""Differentiable transformations of images in plain PyTorch: blur, noise, soft crop, blended flips, rotation, affine maps.

Ruppli et al. 2022, Table 1, with one parameter l per sample. For an image X [H, W], a pixel in column x and row y at (x, y):

    blur     X * w_y * w_x,  w_k = exp(-k^2 / 2 s^2) / Z for |k| <= radius,  s = sigma_max |l|;  X itself where s < 1e-3
    noise    X + l noise_std n,  n standard normal (``warp_noise``)
    crop     X S(k min(half_x - |x + 1/2 - l1 W|, half_y - |y + 1/2 - l2 H|)),  S the logistic function
    flip     (1 - l) X + l X mirrored about ((W - 1) / 2, (H - 1) / 2)
    rotate   X(R (p - c) + c),  R = [[cos, -sin], [sin, cos]](2 pi l),  c = ((W - 1) / 2, (H - 1) / 2);  bilinear, zeros outside
    affine   X(A (p - c_out) + c_in + t),  [A | t] one matrix per sample

Half precision is computed in float32 and rounded once. Everything is differentiable by autograd, twice, in images and parameters. At a
kink the derivative is one-sided: a coordinate that is whole takes that towards the next pixel, a ridge of the crop belongs to x, |0| has
the derivative 0. A parameter that is not finite makes its sample NaN; one of a stage that is off for the sample is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .prototypes import compute_dtype
from .warp_noise import normal

STAGES = ("blur", "noise", "crop", "hflip", "vflip", "rotate")
COLUMNS = ((0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 7))
"""Which of the seven parameters a stage takes."""
PADDINGS = ("reflect", "replicate", "zeros")
AFFINE_PADDINGS = ("zeros", "border", "reflection")
SMALLEST_SIGMA = 1e-3
"""Below this blur is the identity, with the derivative zero."""


def transform(
    images: Tensor,  # [B, C, H, W]
    params: Tensor,  # [B, 7]
    enabled: Tensor,  # [B] int32, bit k: stage k
    seed: Tensor,  # [B] int64
    order: Sequence[int],  # numbers of stages
    radius: Sequence[int],  # rows, columns
    sigma_max: float,
    noise_std: float,
    crop_half: Sequence[float],  # half the window's height and width in pixels
    sharpness: float,
    padding: int,
) -> Tensor:  # [B, C, H, W]
    """The stages of ``order`` one after the other, each on the samples whose bit is set."""
    dtype = compute_dtype(images)
    x, params = images.to(dtype), params.to(dtype)
    params = torch.where(params.isfinite(), params, math.nan)
    if images.numel() == 0:
        order = ()
    for stage in order:
        on = ((enabled >> stage) & 1).bool()
        first, last = COLUMNS[stage]
        values = torch.where(on.unsqueeze(1), params[:, first:last], 0.0)
        if stage == 0:
            y = blur(x, sigma_max * values[:, 0], radius, padding)
        elif stage == 1:
            y = noise(x, noise_std * values[:, 0], seed)
        elif stage == 2:
            y = crop(x, values, crop_half, sharpness)
        elif stage == 5:
            y = rotate(x, values[:, 0])
        else:
            y = flip(x, values[:, 0], 3 if stage == 3 else 2)
        x = torch.where(_column(on, x), y, x)
    return (x + _column(params[:, :0].sum(1), x)).to(images.dtype)  # plus 0: connected whatever the order


# -------------------------------------------------------------------------------------------------------------------- stages


def blur(
    x: Tensor,  # [B, C, H, W]
    sigma: Tensor,  # [B], pixels
    radius: Sequence[int],  # rows, columns; 0: not along this axis
    padding: int,
) -> Tensor:  # [B, C, H, W]
    sigma = sigma.abs()
    small = sigma < SMALLEST_SIGMA
    positive = torch.where(small, 1.0, sigma)
    y = x
    for axis, reach in ((2, radius[0]), (3, radius[1])):
        if reach > 0:
            y = _filter(y, gaussian_taps(positive, reach), axis, padding)
    return torch.where(_column(small, x), x, y)


def gaussian_taps(
    sigma: Tensor,  # [B], positive
    radius: int,
) -> Tensor:  # [B, 2 radius + 1], rows sum to 1
    k = torch.arange(-radius, radius + 1, dtype=sigma.dtype, device=sigma.device)
    weights = torch.exp((k / sigma.unsqueeze(1)).square() / -2)
    return weights / weights.sum(1, keepdim=True)


def padded_places(length: int, radius: int, padding: int, device: torch.device) -> Tensor:  # [length + 2 radius]
    """Which element stands at -radius, ..., length + radius - 1. Reflection repeats no edge and goes back and forth."""
    place = torch.arange(-radius, length + radius, device=device)
    if padding == 1 or length == 1:
        return place.clamp(0, length - 1)
    period = 2 * (length - 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place)


def _filter(x: Tensor, taps: Tensor, axis: int, padding: int) -> Tensor:  # [B, C, H, W], [B, 2 radius + 1]
    radius, length = taps.shape[1] // 2, x.shape[axis]
    if PADDINGS[padding] == "zeros":
        padded = F.pad(x, (radius, radius) if axis == 3 else (0, 0, radius, radius))
    else:
        padded = x.index_select(axis, padded_places(length, radius, padding, x.device))
    total = _column(taps[:, 0], x) * padded.narrow(axis, 0, length)
    for k in range(1, taps.shape[1]):
        total = total + _column(taps[:, k], x) * padded.narrow(axis, k, length)
    return total


def noise(
    x: Tensor,  # [B, C, ...]
    std: Tensor,  # [B]
    seed: Tensor,  # [B] int64
) -> Tensor:  # [B, C, ...]
    numbers = normal(seed, x[0].numel()).to(x.dtype).view(x.shape)
    return x + _column(std, x) * numbers


def crop(
    x: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    center: Tensor,  # [B, 2] or [B, 3]: x, y, z as shares of the sides
    half: Sequence[float],  # half the window in pixels, in the order of the axes: y, x or z, y, x
    sharpness: float,
) -> Tensor:  # like x
    sides = x.shape[2:]
    inside = x.new_full((), math.inf)
    for i, axis in enumerate(reversed(range(len(sides)))):
        position = torch.arange(sides[axis], dtype=x.dtype, device=x.device) + 0.5
        distance = (position - center[:, i : i + 1] * sides[axis]).abs()
        value = (sharpness * (half[axis] - distance)).view(
            -1, *(sides[axis] if a == axis else 1 for a in range(len(sides)))
        )
        inside = torch.where((value < inside) | value.isnan(), value, inside)  # equal: the earlier axis, x first
    return x * inside.sigmoid().unsqueeze(1)


def flip(
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [B]
    axis: int,
) -> Tensor:  # [B, C, ...]
    share = _column(weight, x)
    return (1 - share) * x + share * x.flip(axis)


def rotate(
    x: Tensor,  # [B, C, H, W]
    turns: Tensor,  # [B]
) -> Tensor:  # [B, C, H, W]
    cos, sin = cos_sin(turns)
    zero = torch.zeros_like(cos)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    return affine(x, matrix, x.shape[2:], 0)


def cos_sin(turns: Tensor) -> tuple[Tensor, Tensor]:  # [B] -> [B], [B]
    """cos and sin of 2 pi turns; exact at quarter turns, whatever the number of whole turns."""
    quarters = 4 * (turns - turns.detach().round())
    quadrant = quarters.detach().round()
    angle = (quarters - quadrant) * (math.pi / 2)
    cos, sin = angle.cos(), angle.sin()
    odd, half_turn = quadrant.remainder(2) == 1, (quadrant == 2) | (quadrant == -2)
    back = quadrant == -1
    sign = torch.where(half_turn | back, -1.0, 1.0).to(turns.dtype)
    return sign * torch.where(odd, -sin, cos), sign * torch.where(odd, cos, sin)


# -------------------------------------------------------------------------------------------------------------------- affine


def affine_warp(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    matrix: Tensor,  # [B, 2, 3] or [B, 3, 4]
    size: Sequence[int],  # sides of the output: H, W or D, H, W
    padding: int,
) -> Tensor:  # [B, C, *size]
    dtype = compute_dtype(images)
    matrix = torch.where(matrix.isfinite().all(2).all(1)[:, None, None], matrix.to(dtype), math.nan)
    if images.numel() == 0 or 0 in size:
        empty = images.new_zeros((*images.shape[:2], *size))
        return empty + _column(matrix[:, 0, :0].sum(1), empty) + images.flatten(1)[:, :0].sum()
    return affine(images.to(dtype), matrix, size, padding).to(images.dtype)


def affine(
    x: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    matrix: Tensor,  # [B, 2, 3] or [B, 3, 4], rows and columns in the order x, y, z
    size: Sequence[int],
    padding: int,
) -> Tensor:  # [B, C, *size]
    axes = len(size)
    offsets = []  # of the output's pixels from the centre, for x, y, z
    for i in range(axes):
        length = size[axes - 1 - i]
        offset = torch.arange(length, dtype=x.dtype, device=x.device) - (length - 1) / 2
        offsets.append(offset.view(-1, *(1,) * i))
    coordinates = []
    for i in range(axes):
        row = matrix[:, i].view(-1, axes + 1, *(1,) * axes)
        place = row[:, 0] * offsets[0]
        for j in range(1, axes):
            place = place + row[:, j] * offsets[j]
        coordinates.append(place + ((x.shape[1 + axes - i] - 1) / 2 + row[:, axes]))
    return interpolate(x, coordinates, padding)


def interpolate(
    x: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    coordinates: Sequence[Tensor],  # of x, y, z in pixels, [B, ...] each
    padding: int,
) -> Tensor:  # [B, C, ...]
    """Linear interpolation between the 2^n pixels around a place. NaN where a coordinate is not finite."""
    B, C, *sides = x.shape
    finite = coordinates[0].isfinite()
    for coordinate in coordinates[1:]:
        finite = finite & coordinate.isfinite()
    corners: list[tuple[Tensor | int, Tensor | float]] = [(0, 1.0)]  # place in the flattened image and weight
    for length, coordinate in zip(sides, reversed(coordinates), strict=True):
        s = _within(torch.where(finite, coordinate, 0.0), length, padding)
        low = s.detach().floor()
        fraction = s - low
        pixel = low.clamp(-2, length + 1).long()
        taps = []
        for at, weight in ((pixel, 1 - fraction), (pixel + 1, fraction)):
            taps.append((at.clamp(0, length - 1), torch.where((at >= 0) & (at < length), weight, 0.0)))
        corners = [(place * length + at, share * weight) for place, share in corners for at, weight in taps]
    pixels = x.flatten(2)
    total: Tensor | None = None
    for place, share in corners:
        assert isinstance(place, Tensor) and isinstance(share, Tensor)
        taken = pixels.gather(2, place.reshape(B, 1, -1).expand(B, C, -1)).view(B, C, *place.shape[1:])
        total = taken * share.unsqueeze(1) if total is None else total + taken * share.unsqueeze(1)
    assert total is not None
    return torch.where(finite.unsqueeze(1), total, math.nan)


def _within(s: Tensor, length: int, padding: int) -> Tensor:
    """The coordinate inside the image that stands for one beyond; as ``grid_sample`` does with ``align_corners=True``, derivative too."""
    if padding == 0:
        return s
    last = length - 1
    if padding == 2 and last > 0:
        distance = s.abs()
        flips = (distance.detach() / last).floor()
        rest = distance - flips * last
        s = torch.where(flips.remainder(2) == 0, rest, last - rest)
    return torch.where((s > 0) & (s < last), s, s.detach().clamp(0, last))


def _column(values: Tensor, x: Tensor) -> Tensor:  # [B] -> [B, 1, 1, ...]
    return values.view(-1, *(1,) * (x.dim() - 1))
