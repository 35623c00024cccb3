# SPDX-License-Identifier: MIT
"""The differentiable transformations as a module: strengths are chosen once, images and parameters are given at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import _warp_checks as checks
from ..ops import warp as ops
from ..ops._checks import check_choice
from ..reference.warp import PADDINGS, STAGES


class DifferentiableTransform(nn.Module):
    """The transformations of Ruppli et al. 2022, Table 1, with seven parameters per image: :func:`protokernels.transform`.

    Args:
        order, sigma_max, noise_std, crop_size, sharpness, radius, blur_padding: as there.

    Shape: images [B, C, H, W] and params [B, 7] -> [B, C, H, W]. ``enabled``, ``generator`` and ``seed`` are given at the call.

    Example:
        >>> import torch
        >>> from protokernels.nn import DifferentiableTransform
        >>> transform = DifferentiableTransform(noise_std=0.05)
        >>> images, params = torch.rand(4, 1, 32, 32), torch.rand(4, 7, requires_grad=True)
        >>> transform(images, params).square().mean().backward()  # all seven at once
        >>> half = torch.rand(4, 6) < 0.5  # each with the probability 1/2
        >>> transform(images, params, enabled=half).shape
        torch.Size([4, 1, 32, 32])
    """

    def __init__(
        self,
        *,
        order: Sequence[checks.Stage] = STAGES,  # type: ignore[assignment]  # a tuple of these names
        sigma_max: float = 2.0,
        noise_std: float = 0.1,
        crop_size: float = 0.25,
        sharpness: float = 1.0,
        radius: int = 6,
        blur_padding: checks.Padding = "reflect",
    ) -> None:
        super().__init__()
        name = "DifferentiableTransform"
        checks.stage_numbers(name, order)
        check_choice(name, "blur_padding", blur_padding, PADDINGS)
        self.order = tuple(order)
        self.sigma_max = checks.check_number(name, "sigma_max", sigma_max)
        self.noise_std = checks.check_number(name, "noise_std", noise_std)
        self.crop_size = checks.check_number(name, "crop_size", crop_size)
        self.sharpness = checks.check_number(name, "sharpness", sharpness, positive=True)
        self.radius = checks.check_radius(name, radius)
        self.blur_padding: checks.Padding = blur_padding

    def forward(
        self,
        images: Tensor,  # [B, C, H, W]
        params: Tensor,  # [B, 7]
        *,
        enabled: checks.Enabled = None,  # or [B, 6] bool
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,  # [B] int64
    ) -> Tensor:  # [B, C, H, W]
        return ops.transform(
            images,
            params,
            order=self.order,
            enabled=enabled,
            sigma_max=self.sigma_max,
            noise_std=self.noise_std,
            crop_size=self.crop_size,
            sharpness=self.sharpness,
            radius=self.radius,
            blur_padding=self.blur_padding,
            generator=generator,
            seed=seed,
        )

    def extra_repr(self) -> str:
        return (
            f"order={'-'.join(self.order)}, sigma_max={self.sigma_max}, noise_std={self.noise_std}, crop_size={self.crop_size}, "
            f"sharpness={self.sharpness}, radius={self.radius}, blur_padding={self.blur_padding!r}"
        )
