# SPDX-License-Identifier: MIT
"""The transformations of the op `warp` pixel by pixel in NumPy float64, and how far rounding may take a right answer from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protokernels.reference import warp as reference
from python_tests.prototypes_oracle import as_numpy, compute_dtype, unit_roundoff

STAGES = ("blur", "noise", "crop", "hflip", "vflip", "rotate")
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 9), (2, 3, 9, 1), (3, 2, 8, 8), (2, 5, 7, 13), (1, 1, 33, 17), (2, 1, 4, 31)]
"""Square and oblong, sides of 1, shorter than the blur reaches, and of odd lengths."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], parameters that leave no stage trivial, and keys."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)
    params = 0.05 + 0.9 * torch.rand(shape[0], 7, generator=generator, dtype=torch.float64)
    seeds = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=generator)
    return images, params.to(compute_dtype(images)), seeds


# -------------------------------------------------------------------------------------------------------------------- stages


def bounced(place: int, length: int) -> int:
    """A ball that walks |place| steps along the pixels and turns at the outermost ones; `reflect` without repeating the edge."""
    if length == 1:
        return 0
    at, step = 0, 1
    for _ in range(abs(place)):  # mirrored about pixel 0: both directions look alike
        if not 0 <= at + step < length:
            step = -step
        at += step
    return at


def padded(place: int, length: int, padding: str) -> int | None:
    if 0 <= place < length:
        return place
    if padding == "zeros":
        return None
    return bounced(place, length) if padding == "reflect" else min(max(place, 0), length - 1)


def blur_matrix(length: int, sigma: float, radius: int, padding: str) -> Array:  # [length, length]
    weights = [math.exp(-k * k / (2 * sigma * sigma)) for k in range(-radius, radius + 1)]
    matrix = np.zeros((length, length))
    for i, k in product(range(length), range(-radius, radius + 1)):
        j = padded(i + k, length, padding)
        if j is not None:
            matrix[i, j] += weights[k + radius] / sum(weights)
    return matrix


def blur(x: Array, sigma: float, radius: int, padding: str) -> Array:  # [C, ...]: along every axis but the first
    sigma = abs(sigma)
    if sigma < 1e-3:
        return x
    for axis in range(1, x.ndim):
        matrix = blur_matrix(x.shape[axis], sigma, radius, padding)
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return x


def crop(x: Array, center: Sequence[float], size: float, sharpness: float) -> Array:  # [C, ...]; center in x, y(, z)
    y = np.empty_like(x)
    for pixel in product(*map(range, x.shape[1:])):
        shares = []
        for i, side, c in zip(reversed(pixel), reversed(x.shape[1:]), center, strict=True):
            shares.append(logistic(sharpness * (side * size / 2 - abs(i + 0.5 - c * side))))
        y[(slice(None), *pixel)] = x[(slice(None), *pixel)] * min(shares)
    return y


def logistic(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def flip(x: Array, weight: float, axis: int) -> Array:
    return (1 - weight) * x + weight * np.flip(x, axis)


def rotate(x: Array, turns: float) -> Array:  # [C, H, W]
    angle = 2 * math.pi * (turns - round(turns))
    cos, sin = math.cos(angle), math.sin(angle)
    return affine(x, np.array([[cos, -sin, 0.0], [sin, cos, 0.0]]), x.shape[1:], "zeros")


def affine(x: Array, matrix: Array, size: Sequence[int], padding: str) -> Array:  # [C, ...]; x, y(, z) in the matrix
    y = np.zeros((x.shape[0], *size))
    for pixel in product(*map(range, size)):
        offset = np.array([i - (side - 1) / 2 for i, side in zip(reversed(pixel), reversed(size), strict=True)])
        source = matrix[:, :-1] @ offset + matrix[:, -1]
        places = [s + (side - 1) / 2 for s, side in zip(source, reversed(x.shape[1:]), strict=True)]
        places = [mirrored(s, side, padding) for s, side in zip(places, reversed(x.shape[1:]), strict=True)]
        for corner in product((0, 1), repeat=len(places)):
            at = [math.floor(s) + c for s, c in zip(places, corner, strict=True)]
            if all(0 <= a < side for a, side in zip(at, reversed(x.shape[1:]), strict=True)):
                weight = math.prod(1 - abs(s - a) for s, a in zip(places, at, strict=True))
                y[(slice(None), *pixel)] += weight * x[(slice(None), *reversed(at))]
    return y


def mirrored(s: float, side: int, padding: str) -> float:
    if padding == "zeros":
        return s
    while padding == "reflection" and side > 1 and not 0 <= s <= side - 1:
        s = -s if s < 0 else 2 * (side - 1) - s
    return min(max(s, 0.0), side - 1.0)


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def normal(seed: int, count: int) -> tuple[Array, Array]:  # numbers [count] and the lengths of their pairs [count]
    numbers, lengths = [], []
    for i in range((count + 3) // 4):
        words = philox((i % 2**32, i >> 32, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))
        for w0, w1 in (words[:2], words[2:]):
            length, angle = math.sqrt(-2 * math.log((w0 + 0.5) / 2**32)), 2 * math.pi * w1 / 2**32
            numbers += [length * math.cos(angle), length * math.sin(angle)]
            lengths += [length] * 2
    return np.array(numbers[:count]), np.array(lengths[:count])


# --------------------------------------------------------------------------------------------------------------------- chain


def transform(
    images: Tensor,  # [B, C, H, W]
    params: Tensor,  # [B, 7]
    seed: Tensor | None = None,  # [B]
    *,
    order: Sequence[str] = STAGES,
    enabled: Any = None,
    sigma_max: float = 2.0,
    noise_std: float = 0.1,
    crop_size: float = 0.25,
    sharpness: float = 1.0,
    radius: int = 6,
    blur_padding: str = "reflect",
) -> Array:  # [B, C, H, W]
    results = []
    for b, (x, p) in enumerate(zip(as_numpy(images), as_numpy(params).tolist(), strict=True)):
        for stage in order:
            if enabled is not None and not (
                enabled[b, STAGES.index(stage)] if isinstance(enabled, Tensor) else stage in enabled
            ):
                continue
            if stage == "blur":
                x = blur(x, sigma_max * p[0], radius, blur_padding)
            elif stage == "noise":
                assert seed is not None
                x = x + p[1] * noise_std * normal(int(seed[b]), x.size)[0].reshape(x.shape)
            elif stage == "crop":
                x = crop(x, p[2:4], crop_size, sharpness)
            elif stage == "rotate":
                x = rotate(x, p[6])
            else:
                x = flip(x, p[4], 2) if stage == "hflip" else flip(x, p[5], 1)
        results.append(x)
    return np.stack(results) if results else as_numpy(images)


def each(images: Tensor, function: Callable[[Array, int], Array]) -> Array:
    """The samples one by one."""
    return np.stack([function(x, b) for b, x in enumerate(as_numpy(images))])


# ------------------------------------------------------------------------------------------------------------------ rounding


def rounding(images: Tensor, *, radius: int = 6, sharpness: float = 1.0, noise: float = 0.0) -> float:
    """How far an element of a chain may be off, absolutely, for images up to M = max |x| computed with the unit roundoff u.

    * Blur: 2 (2 radius + 1) products and sums of weights that are known to 4 u: (4 radius + 16) u M.
    * Crop: the distance, up to 2 sides, is rounded twice, and the logistic function has the slope 1/4 at most: sides u sharpness M.
    * Flips: 8 u M.
    * Affine maps: a coordinate up to 2 sides with four roundings, 8 sides u, along each of up to three axes; neighbours differ by at
      most 2 M: 48 sides u M.
    * Noise: n up to 7, with the logarithm, root and cosine of rounded arguments: 40 u std, and where the length of a pair is near 0,
      sqrt(u) std (`noise_rounding` has it by elements).
    """
    u = unit_roundoff(compute_dtype(images))
    sides = max((1, *images.shape[2:]))
    largest = float(images.detach().abs().max()) if images.numel() else 0.0
    return u * largest * (4 * radius + 24 + (sharpness + 48) * sides) + noise * (40 * u + math.sqrt(2 * u))


def noise_rounding(lengths: Array, dtype: torch.dtype) -> Array:
    """Error of normal numbers that come in pairs of these lengths: u1 rounded near 1 moves -2 ln u1 by 2 u, the angle by 2 pi u."""
    u = unit_roundoff(dtype)
    return 2 * u / np.maximum(lengths, math.sqrt(2 * u)) + 10 * u * lengths


def check(actual: Tensor, expected: Array, error: float | Array) -> None:
    """`actual` is `expected` up to `error` and one rounding to its own type."""
    assert tuple(actual.shape) == expected.shape
    allowed = error + unit_roundoff(actual.dtype) * 1.001 * (np.abs(expected) + error) + torch.finfo(actual.dtype).tiny
    difference = np.abs(as_numpy(actual) - expected)
    assert (difference <= allowed).all(), f"off by {(difference / allowed).max():.2f} times what rounding explains"


# --------------------------------------------------------------------------------------------------------- kinks of affine maps


def kinks(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W] float64
    matrix: Tensor,  # [B, dims, dims + 1] float64
    grad: Tensor,  # [B, C, *size] float64
    padding: int,
) -> Tensor:  # [B, dims, dims + 1]
    """How far float32 may be off in the gradient of an affine map by its matrix.

    The derivative by a coordinate jumps where it is a whole number, and at the edges. A float32 coordinate is known to four roundings of
    the longest side: an output nearer than that to a jump may have the derivative of either side, and counts with all of its jump, the
    others with the roundings of their term.
    """
    size, axes = grad.shape[2:], grad.dim() - 2
    sides = images.shape[2:]
    near = 4 * 2**-24 * max(*sides, *size)
    offsets = [
        (torch.arange(length, dtype=torch.float64) - (length - 1) / 2).view(-1, *(1,) * i)
        for i, length in enumerate(reversed(size))
    ]
    levers = [offset.abs().expand(size) for offset in offsets] + [torch.ones(size, dtype=torch.float64)]
    places = []
    for i in range(axes):
        row = matrix[:, i].view(-1, axes + 1, *(1,) * axes)
        place = sum((row[:, j] * offsets[j] for j in range(axes)), row[:, axes] + (sides[axes - 1 - i] - 1) / 2)
        places.append(place.expand(-1, *size))
    slopes = []
    for signs in product((-near, near), repeat=axes):
        moved = [(place + sign).requires_grad_() for place, sign in zip(places, signs, strict=True)]
        slopes.append(torch.stack(torch.autograd.grad(reference.interpolate(images, moved, padding), moved, grad), 1))
    every = torch.stack(slopes)  # [2^axes, B, axes, *size]
    error = every.amax(0) - every.amin(0) + 8 * 2**-24 * every.abs().amax(0)
    return torch.stack([(error * lever).flatten(2).sum(2) for lever in levers], 2)


def rotation_kinks(
    images: Tensor,  # [B, C, H, W] float64
    turns: Tensor,  # [B] float64
    grad: Tensor,  # [B, C, H, W] float64
) -> Tensor:  # [B]
    """The same for a rotation and its angle in turns."""
    cos, sin = reference.cos_sin(turns)
    zero = torch.zeros_like(cos)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    by_angle = torch.stack([torch.stack([sin, cos, zero], 1), torch.stack([cos, sin, zero], 1)], 1).abs()
    return 2 * math.pi * (kinks(images, matrix, grad, 0) * by_angle).sum((1, 2))
