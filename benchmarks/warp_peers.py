# SPDX-License-Identifier: MIT
"""Other people's ways to the differentiable transformations of Ruppli et al., each at its best, in the default order.

A function takes images [B, C, H, W] and params [B, 7] as `protokernels.transform` does; `blur` and `rotation` take the column they need.
Noise is drawn inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS, SIGMA_MAX, NOISE_STD = 6, 2.0, 0.1
Transform = Callable[[Tensor, Tensor], Tensor]


def torch_blur(x: Tensor, params: Tensor) -> Tensor:
    """Two depthwise convolutions, every sample's kernel a group of its own."""
    B, C, H, W = x.shape
    k = torch.arange(-RADIUS, RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(k.square() / (-2 * (SIGMA_MAX * params[:, :1]).square()))
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(C, 0)[:, None, :, None]  # [B C, 1, taps, 1]
    x = F.pad(x, (RADIUS,) * 4, "reflect").view(1, B * C, H + 2 * RADIUS, W + 2 * RADIUS)
    x = F.conv2d(F.conv2d(x, weights.mT, groups=B * C), weights, groups=B * C)
    return x.view(B, C, H, W)


def torch_middle(x: Tensor, params: Tensor) -> Tensor:
    """Noise, crop by the smaller of two sigmoids, flips."""
    H, W = x.shape[2:]
    noise, crop_x, crop_y, horizontal, vertical = (params[:, k, None, None, None] for k in range(1, 6))
    x = x + NOISE_STD * noise * torch.randn_like(x)
    column = torch.arange(W, device=x.device, dtype=x.dtype) + 0.5
    row = (torch.arange(H, device=x.device, dtype=x.dtype) + 0.5)[:, None]
    x = x * torch.minimum(
        torch.sigmoid(W / 8 - (column - W * crop_x).abs()), torch.sigmoid(H / 8 - (row - H * crop_y).abs())
    )
    x = torch.lerp(x, x.flip(3), horizontal)
    return torch.lerp(x, x.flip(2), vertical)


def torch_rotation(x: Tensor, params: Tensor) -> Tensor:
    H, W = x.shape[2:]
    angle = 2 * math.pi * params[:, 6]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    aspect = (H - 1) / (W - 1)
    theta = torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=True)


def torch_chain(x: Tensor, params: Tensor) -> Tensor:
    return torch_rotation(torch_middle(torch_blur(x, params), params), params)


def kornia_blur(x: Tensor, params: Tensor) -> Tensor:
    from kornia.filters import gaussian_blur2d

    sigma = (SIGMA_MAX * params[:, :1]).expand(-1, 2)
    return gaussian_blur2d(x, 2 * RADIUS + 1, sigma, "reflect")


def kornia_rotation(x: Tensor, params: Tensor) -> Tensor:
    from kornia.geometry import rotate

    return rotate(x, 360 * params[:, 6])


def kornia_chain(x: Tensor, params: Tensor) -> Tensor:
    """kornia has no soft crop and no blended flip: those are torch's."""
    return kornia_rotation(torch_middle(kornia_blur(x, params), params), params)


@cache
def compiled(function: Transform) -> Transform:
    return torch.compile(function, dynamic=False)


def compiled_of(function: Transform) -> Callable[[], Transform]:
    return lambda: compiled(function)


Table = dict[str, tuple[str, Callable[[], Transform]]]
CHAIN: Table = {
    "torch": ("torch", lambda: torch_chain),
    "torch.compile": ("torch", compiled_of(torch_chain)),
    "kornia": ("kornia", lambda: kornia_chain),
}
BLUR: Table = {
    "torch": ("torch", lambda: torch_blur),
    "torch.compile": ("torch", compiled_of(torch_blur)),
    "kornia": ("kornia", lambda: kornia_blur),
}
ROTATION: Table = {
    "torch": ("torch", lambda: torch_rotation),
    "torch.compile": ("torch", compiled_of(torch_rotation)),
    "kornia": ("kornia", lambda: kornia_rotation),
}
TABLES: dict[str, Any] = {"chain": CHAIN, "blur": BLUR, "rotation": ROTATION}
