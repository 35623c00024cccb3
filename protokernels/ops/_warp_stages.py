# SPDX-License-Identifier: MIT
"""Each transformation alone, for images and volumes: the chain of ``transform`` with one stage, volumes folded into images.

Source of the blur, the noise, the crop, the flip and the rotation: Ruppli et al. 2022, Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend
from ..reference import warp as reference
from ..reference.prototypes import compute_dtype
from . import _calls, _checks, _warp_autograd  # noqa: F401  (the last registers shapes and gradients)
from . import _warp_checks as checks
from ._warp_checks import Padding

Dimension = Literal["horizontal", "vertical", "depth"]
DIMENSIONS: tuple[Dimension, ...] = ("horizontal", "vertical", "depth")
"""x, y and z."""


def gaussian_blur(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    sigma: float | Tensor,  # [B] or []
    *,
    radius: int = 6,
    padding: Padding = "reflect",
) -> Tensor:  # like images
    """Gaussian blur along every axis, each sample with its own standard deviation.

        w_k = exp(-k^2 / 2 sigma^2) / Z  for |k| <= radius

    Differentiable in images and sigma. Below 1e-3 pixels the image is returned bit for bit, and sigma has no gradient; a negative sigma
    counts as its absolute value. Below about 0.3 pixels the gradient is there but vanishes exponentially.

    Args:
        images: float32, float64, bfloat16 or float16 (computed in float32, rounded once).
        sigma: in pixels, one for all or one for each sample.
        radius: taps on either side, at most 64; 3 sigma keeps 99.7 % of the weight, which is divided by its sum.
            On the CPU taps with less than 1e-9 of the weight (float64: 1e-19) are left out; so is a NaN or infinity that only they reach.
        padding: ``"reflect"`` (mirrored without repeating the edge; any side, also shorter than the radius), ``"replicate"``, ``"zeros"``.

    Returns:
        As many images of the same size and type.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> images = torch.rand(2, 1, 16, 16)
        >>> blurred = protokernels.gaussian_blur(images, torch.tensor([0.0, 1.5]))
        >>> torch.equal(blurred[0], images[0]), bool(blurred[1].std() < images[1].std())
        (True, True)
    """
    op = "gaussian_blur"
    checks.check_images(op, images)
    values = checks.column(op, images, "sigma", sigma)
    reach = checks.check_radius(op, radius)
    _checks.check_choice(op, "padding", padding, reference.PADDINGS)
    blurred = run_stages(_planes(images), values, [0], radius=(reach, reach), sigma_max=1.0, padding=padding)
    if images.dim() == 5:  # then along depth: the rows of [D, H W]
        blurred = run_stages(
            blurred.reshape(_stacked(images)), values, [0], radius=(reach, 0), sigma_max=1.0, padding=padding
        )
    return _like(images, blurred)


def gaussian_noise(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    std: float | Tensor,  # [B] or []
    *,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,  # [B] int64
) -> Tensor:  # like images
    """Adds ``std`` times standard normal noise, each sample with its own ``std``.

    Noise is a function of the sample's seed and the element's place in the sample alone: the same seed gives the same noise in any batch,
    on any device up to rounding, and backward computes it again instead of keeping it. Differentiable in images and std.

    Args:
        images: float32, float64, bfloat16 or float16 (computed in float32, rounded once).
        std: standard deviation, one for all or one for each sample.
        generator: draws the seeds, on the device of the images; default: torch's own for that device.
        seed: a key for each sample, instead.

    Returns:
        As many images of the same size and type.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> seed = torch.arange(3)
        >>> noise = protokernels.gaussian_noise(torch.zeros(3, 1, 64, 64), 1.0, seed=seed)
        >>> torch.equal(noise[2:], protokernels.gaussian_noise(torch.zeros(1, 1, 64, 64), 1.0, seed=seed[2:]))
        True
    """
    op = "gaussian_noise"
    checks.check_images(op, images)
    values = checks.column(op, images, "std", std)
    keys = checks.seeds(op, images, generator, seed)
    return _like(images, run_stages(_planes(images), values, [1], seed=keys, noise_std=1.0))


def soft_crop(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    center: Tensor | Sequence[float],  # [B, 2], [2], [B, 3] or [3]
    *,
    size: float = 0.25,
    sharpness: float = 1.0,
) -> Tensor:  # like images
    """Darkens what lies outside a window; nothing is cut off or resized.

        O = X S(sharpness (size L / 2 - |p - center L|)),   S(v) = 1 / (1 + exp(-v))

    along the axis where this is smallest, with p the pixel's centre (i + 1/2) and L the side along that axis, in pixels. Differentiable in
    images and center; on the ridges where two axes are equal the gradient goes to x before y before z.

    Args:
        images: float32, float64, bfloat16 or float16 (computed in float32, rounded once).
        center: of the window as shares of the sides, (x, y) or (x, y, z): one for all or one for each sample. May lie outside.
        size: side of the window as a share of the image's, in every direction.
        sharpness: how fast the window fades, per pixel.

    Returns:
        As many images of the same size and type.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> window = protokernels.soft_crop(torch.ones(1, 1, 64, 64), (0.5, 0.25))
        >>> [round(window[0, 0, y, x].item(), 3) for y, x in ((16, 32), (48, 32), (16, 24))]
        [0.999, 0.0, 0.622]
    """
    op = "soft_crop"
    checks.check_images(op, images)
    place = checks.positions(op, images, center)
    share = checks.check_number(op, "size", size)
    sharpness = checks.check_number(op, "sharpness", sharpness, positive=True)
    if images.dim() == 4:
        return run_stages(images, F.pad(place, (2, 3)), [2], crop_size=share, sharpness=sharpness)
    place = torch.where(place.isfinite(), place, math.nan)
    dtype = compute_dtype(images)
    return reference.crop(images.to(dtype), place, _halves(images, share), sharpness).to(
        images.dtype
    )  # one product: nothing to fuse


def blend_flip(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    weight: float | Tensor,  # [B] or []
    *,
    dim: Dimension = "horizontal",
) -> Tensor:  # like images
    """Blends every image with its mirror image: O = (1 - weight) X + weight X~.

    Differentiable in images and weight. Weight 0 is the identity and 1 the mirror image, both exact for finite images (NaN and infinity
    come through a weight of 0); other values, also beyond, are allowed.

    Args:
        images: float32, float64, bfloat16 or float16 (computed in float32, rounded once).
        weight: one for all or one for each sample.
        dim: ``"horizontal"`` exchanges left and right, ``"vertical"`` top and bottom, ``"depth"`` (volumes only) front and back.

    Returns:
        As many images of the same size and type.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> image = torch.tensor([[[[0.0, 4.0]]]])
        >>> protokernels.blend_flip(image, 0.25).tolist(), protokernels.blend_flip(image, 1.0).tolist()
        ([[[[1.0, 3.0]]]], [[[[4.0, 0.0]]]])
    """
    op = "blend_flip"
    checks.check_images(op, images)
    _checks.check_choice(op, "dim", dim, DIMENSIONS[: images.dim() - 2])
    stage = 3 if dim == "horizontal" else 4
    values = checks.column(op, images, "weight", weight)
    planes = images.reshape(_stacked(images)) if dim == "depth" else _planes(images)
    return _like(images, run_stages(planes, values, [stage]))


def rotate(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    angle: float | Tensor,  # [B] or [], radians
    *,
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
    axis: Dimension = "depth",
) -> Tensor:  # like images
    """Turns every image about its centre by its own angle, bilinear.

        O(p) = X(R (p - c) + c),   R = [[cos, -sin], [sin, cos]],   c = ((W - 1) / 2, (H - 1) / 2)

    With rows counted downwards, a positive angle turns counter-clockwise. The angle is divided by 2 pi and reduced to a turn before sine
    and cosine: quarter turns of squares, such as pi / 2, are exact for finite images (others: see :func:`affine_warp`).
    Differentiable in images and angle.

    Args:
        images: float32, float64, bfloat16 or float16 (computed in float32, rounded once).
        angle: in radians, one for all or one for each sample. A float32 tensor is divided in float32, with an error of up to about
            1e-7 |angle| radians; for many turns pass a number or a float64 tensor, whose turns are counted in float64.
        padding_mode: what lies outside, see :func:`affine_warp`.
        axis: of a volume, the one that keeps its coordinates: ``"depth"`` turns x and y (every slice like an image), ``"vertical"`` x
            and z, ``"horizontal"`` y and z; R acts on the two in this order. Images know ``"depth"`` only.

    Returns:
        As many images of the same size and type.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import math, torch, protokernels
        >>> images = torch.rand(2, 1, 16, 16)
        >>> torch.equal(protokernels.rotate(images, math.pi / 2), images.rot90(1, (2, 3)))
        True
    """
    op = "rotate"
    checks.check_images(op, images)
    _checks.check_choice(op, "axis", axis, DIMENSIONS if images.dim() == 5 else ("depth",))
    _checks.check_choice(op, "padding_mode", padding_mode, reference.AFFINE_PADDINGS)
    if isinstance(angle, (int, float)) and not isinstance(angle, bool):
        checks.check_range(op, "angle", angle, checks.compute_dtype(images))
        number = angle / (2 * math.pi)  # in float64: multiples of pi / 2 are exact
        # Whole turns go before float32 takes digits of the turns for those of the angle. A compiled function may get a symbol here,
        # which math.isfinite and math.remainder do not take.
        if torch.compiler.is_compiling():
            scalar = _calls.filled(images, (), number, torch.float64)
            turns: float | Tensor = (scalar - scalar.round()).to(checks.compute_dtype(images))
        else:
            turns = math.remainder(number, 1.0) if math.isfinite(number) else number
    else:
        if isinstance(angle, Tensor) and angle.dtype == torch.float64 != images.dtype:
            angle = angle - 2 * math.pi * (angle.detach() / (2 * math.pi)).round()
        radians = checks.per_sample(op, images, "angle", angle)
        turn = 2 * math.pi if radians.is_cpu else torch.full_like(radians, 2 * math.pi)
        turns = radians / turn  # by a tensor on a GPU, which would multiply by the inverse of a number
    kept = {"depth": 2, "vertical": 3, "horizontal": 4}[axis]
    moved = images.movedim(kept, 2) if images.dim() == 5 else images
    planes = _planes(moved)
    if padding_mode == "zeros":
        turned = run_stages(planes, checks.column(op, images, "angle", turns), [5])
    else:
        turns = checks.per_sample(op, images, "angle", turns)
        cos, sin = reference.cos_sin(torch.where(turns.isfinite(), turns, math.nan))
        zero = torch.zeros_like(cos)
        matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        turned = run_affine(planes, matrix, list(planes.shape[2:]), reference.AFFINE_PADDINGS.index(padding_mode))
    turned = _like(moved, turned)
    return turned.movedim(2, kept).contiguous() if images.dim() == 5 else turned


# ------------------------------------------------------------------------------------------------------------------- helpers


def run_stages(
    images: Tensor,  # [B, C, H, W]
    params: Tensor,  # [B, 7] in the compute dtype
    order: list[int],
    *,
    bits: Tensor | None = None,  # [B] int32; None: every stage of the order is on
    seed: Tensor | None = None,  # [B] int64; None: 0
    radius: Sequence[int] = (0, 0),
    sigma_max: float = 0.0,
    noise_std: float = 0.0,
    crop_size: float = 0.0,
    sharpness: float = 1.0,
    padding: Padding = "reflect",
) -> Tensor:  # [B, C, H, W]
    before, after = (order, list(radius), sigma_max, noise_std), (sharpness, reference.PADDINGS.index(padding))
    if backend.native_serves(images.device):
        done: Tensor = _calls.call(
            "warp_forward",
            images.contiguous(),
            params.contiguous(),
            bits,
            None if seed is None else seed.contiguous(),
            *before,
            crop_size,
            *after,
        )
        return done
    B = images.shape[0]
    if bits is None:
        bits = torch.full((B,), checks.ALL_STAGES, dtype=torch.int32, device=images.device)
    if seed is None:
        seed = torch.zeros(B, dtype=torch.int64, device=images.device)
    return reference.transform(images, params, bits, seed, *before, _halves(images, crop_size), *after)


def run_affine(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    matrix: Tensor,  # [B, 2, 3] or [B, 3, 4] in the compute dtype
    size: list[int],
    padding: int,
) -> Tensor:  # [B, C, *size]
    if backend.native_serves(images.device):
        warped: Tensor = _calls.call("warp_affine_forward", images.contiguous(), matrix.contiguous(), size, padding)
        return warped
    return reference.affine_warp(images, matrix, size, padding)


def _halves(images: Tensor, size: float) -> list[float]:
    """Half the crop's window along each side, in pixels."""
    return [side * size / 2 for side in images.shape[2:]]


def _like(images: Tensor, planes: Tensor) -> Tensor:  # the shape of images
    return planes if images.dim() == 4 else planes.view(images.shape)


def _planes(images: Tensor) -> Tensor:  # [B, C, D, H, W] -> [B, C D, H, W]
    return images.flatten(1, 2) if images.dim() == 5 else images


def _stacked(volumes: Tensor) -> tuple[int, ...]:  # [B, C, D, H, W] -> [B, C, D, H W]
    B, C, D, H, W = volumes.shape
    return B, C, D, H * W
