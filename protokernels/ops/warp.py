# SPDX-License-Identifier: MIT
"""Differentiable transformations of images and volumes, each sample with its own parameters, alone or as one chain.

Source: Ruppli et al., Optimizing transformations for contrastive learning in a differentiable framework, 2022 (Table 1). The native kernels
stand in ``csrc/ops/warp.h``, the equations in plain PyTorch in ``protokernels.reference.warp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import warp as reference
from . import _checks
from . import _warp_checks as checks
from ._warp_checks import AffinePadding, Enabled, Padding, Stage
from ._warp_stages import blend_flip, gaussian_blur, gaussian_noise, rotate, run_affine, run_stages, soft_crop

__all__ = ["affine_warp", "blend_flip", "gaussian_blur", "gaussian_noise", "rotate", "soft_crop", "transform"]


def transform(
    images: Tensor,  # [B, C, H, W]
    params: Tensor,  # [B, 7]
    *,
    order: Sequence[Stage] = ("blur", "noise", "crop", "hflip", "vflip", "rotate"),
    enabled: Enabled = None,  # or [B, 6] bool
    sigma_max: float = 2.0,
    noise_std: float = 0.1,
    crop_size: float = 0.25,
    sharpness: float = 1.0,
    radius: int = 6,
    blur_padding: Padding = "reflect",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,  # [B] int64
) -> Tensor:  # [B, C, H, W]
    """The transformations of Ruppli et al. one after the other, in two passes over the images.

    The columns of ``params``, each meant for [0, 1] and allowed beyond, for an image X of height H and width W:

    ====== ======== ========================================================================================================
    column stage    what becomes of X
    ====== ======== ========================================================================================================
    0      blur     Gaussian blur with sigma = sigma_max |l| pixels; below 1e-3 X itself, bit for bit
    1      noise    X + l noise_std n, n standard normal
    2, 3   crop     X S(k (h - d)): a soft window about (l1 W, l2 H), S the logistic function; nothing is resized
    4      hflip    (1 - l) X + l X mirrored left to right; l = 1 is the exact mirror image
    5      vflip    (1 - l) X + l X mirrored upside down
    6      rotate   turned by l turns about the centre, bilinear, zeros outside; l = 1/4 turns a square exactly
    ====== ======== ========================================================================================================

    In the crop, d is the distance from the window's centre along x or y, h half the window's side along it, ``crop_size / 2`` of the
    image's side, and the axis that gives the smaller value counts; the default window is a quarter as wide and as high as the image.
    With y pointing down, small positive l turns counter-clockwise. What flips and rotations do exactly they do for finite images: NaN and
    infinity come through a weight of 0, and spread; infinity may become NaN.

    Gradients reach the images and all seven parameters; second derivatives exist on the reference backend. At a kink they are one-sided.
    Noise is a function of the sample's seed and the element's place in the sample alone: the same seed gives the same noise in any batch,
    and backward computes it again instead of keeping it. Half precision is computed in float32 and rounded once.

    Args:
        images: float32, float64, bfloat16 or float16; any sides, also 1 or empty.
        params: floating point; computed in float32, or float64 for float64 images. One that is not finite makes its sample NaN.
        order: which transformations, in the order they are applied; one that is absent is off.
        enabled: of those in ``order``, the ones that are on: all (None), the names given, or for each sample a row of [B, 6] in the order
            ("blur", "noise", "crop", "hflip", "vflip", "rotate"). What is off leaves the sample as it is and gives its parameter the
            gradient 0.
        sigma_max: standard deviation of the blur at l = 1, in pixels.
        noise_std: standard deviation of the noise at l = 1, in the unit of the images.
        crop_size: side of the crop's window as a share of the image's.
        sharpness: k, how fast the crop fades, per pixel.
        radius: the blur ends this many pixels away (at most 64), its weights divided by their sum; 3 sigma_max keeps 99.7 %.
        blur_padding: what the blur sees outside: the image mirrored without repeating its edge, its edge repeated, or zeros.
        generator: draws the seeds, on the device of the images; default: torch's own for that device.
        seed: a key for each sample, instead.

    Returns:
        The transformed images, same shape and dtype.

    Raises:
        TypeError: an argument is no tensor or number of the kind above.
        ValueError: shapes, devices, names or values do not fit.

    Example:
        >>> import torch, protokernels
        >>> images = torch.rand(4, 1, 32, 32)
        >>> params = torch.rand(4, 7, requires_grad=True)
        >>> protokernels.transform(images, params).sum().backward()
        >>> params.grad.shape
        torch.Size([4, 7])
        >>> turned = protokernels.transform(images, torch.full((4, 7), 0.25), order=["rotate"])
        >>> torch.equal(turned, images.rot90(1, (2, 3)))
        True
    """
    op = "transform"
    checks.check_images(op, images, volumes=False)
    params = checks.beside(op, images, "params", params, (images.shape[0], 7), "[B, 7]")
    stages = checks.stage_numbers(op, order)
    bits = checks.enabled_bits(op, images, enabled)
    noisy = 1 in stages and (enabled is None or isinstance(enabled, Tensor) or "noise" in enabled)
    reach = checks.check_radius(op, radius)
    _checks.check_choice(op, "blur_padding", blur_padding, reference.PADDINGS)
    return run_stages(
        images,
        params,
        stages,
        bits=bits,
        seed=checks.seeds(op, images, generator, seed, used=noisy),
        radius=(reach, reach),
        sigma_max=checks.check_number(op, "sigma_max", sigma_max),
        noise_std=checks.check_number(op, "noise_std", noise_std),
        crop_size=checks.check_number(op, "crop_size", crop_size),
        sharpness=checks.check_number(op, "sharpness", sharpness, positive=True),
        padding=blur_padding,
    )


def affine_warp(
    images: Tensor,  # [B, C, H, W] or [B, C, D, H, W]
    matrix: Tensor,  # [B, 2, 3] or [B, 3, 4]
    *,
    size: Sequence[int] | None = None,
    padding_mode: AffinePadding = "zeros",
) -> Tensor:  # [B, C, *size]
    """Moves pixels by an affine map, one matrix per sample.

        O(p) = X(A (p - c_out) + c_in + t),   matrix = [A | t],   c = (side - 1) / 2 along each axis

    p, in pixels, has the components (x, y) or (x, y, z), x along the last axis: the matrix says where, from the image's centre, the
    output's pixel at p from its own centre is taken from. Between pixels X is interpolated linearly. [1 0 0; 0 1 0] is the identity, exact
    for finite images: NaN and infinity come through a weight of 0 to their neighbours, and infinity may become NaN.

    A ``theta`` for ``torch.nn.functional.affine_grid`` counts in half sides, s = side / 2, or (side - 1) / 2 with ``align_corners=True``:
    A_ij = theta_ij s_in_i / s_out_j and t_i = theta_i,last s_in_i, i and j in the order x, y, z. With it, the result is that of
    ``grid_sample``.

    Gradients reach images and matrix; not the matrix through a coordinate that ``"border"`` or ``"reflection"`` has put on the edge, as in
    ``grid_sample``. Second derivatives exist on the reference backend. The gradient of the images is summed up in a fixed order on every
    device, unlike that of ``grid_sample``.

    Args:
        images: float32, float64, bfloat16 or float16; half precision is computed in float32 and rounded once.
        matrix: floating point; computed in float32, or float64 for float64 images. A number that is not finite makes its sample NaN.
        size: sides of the output, (H, W) or (D, H, W); default: those of the images.
        padding_mode: what lies outside: ``"zeros"``, the edge (``"border"``), or the image mirrored about its outermost pixels'
            centres (``"reflection"``, that of ``grid_sample`` with ``align_corners=True``).

    Returns:
        [B, C, H, W] or [B, C, D, H, W], with the sides ``size``, same dtype.

    Raises:
        TypeError: an argument is no tensor or number of the kind above.
        ValueError: shapes, devices or values do not fit.

    Example:
        >>> import torch, protokernels
        >>> image = torch.arange(4.0).view(1, 1, 1, 4)
        >>> shift = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])
        >>> protokernels.affine_warp(image, shift).flatten().tolist()
        [0.5, 1.5, 2.5, 1.5]
    """
    op = "affine_warp"
    checks.check_images(op, images)
    B, axes = images.shape[0], images.dim() - 2
    matrix = checks.beside(op, images, "matrix", matrix, (B, axes, axes + 1), f"[B, {axes}, {axes + 1}]")
    sides = checks.output_size(op, images, size)
    _checks.check_choice(op, "padding_mode", padding_mode, reference.AFFINE_PADDINGS)
    return run_affine(images, matrix, sides, reference.AFFINE_PADDINGS.index(padding_mode))
