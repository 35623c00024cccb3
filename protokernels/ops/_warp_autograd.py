# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formulas of the native transformations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, backend

OPS = torch.ops.protokernels
AVAILABLE = _native.LIBRARY is not None and hasattr(OPS, "warp_forward")


def native_serves(device: torch.device) -> bool:
    """``backend.native_serves``, and no for a library from before these operators."""
    return AVAILABLE and backend.native_serves(device)


def _fake_forward(images: Tensor, *_rest: Any) -> Tensor:
    return images.new_empty(images.shape)


def _fake_backward(
    grad: Tensor,
    images: Tensor,
    params: Tensor,
    enabled: Tensor,
    seed: Tensor,
    order: Sequence[int],
    radius: Sequence[int],
    sigma_max: float,
    noise_std: float,
    crop_half: Sequence[float],
    sharpness: float,
    padding: int,
    need_images: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients(images, params, need_images, need_params)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, params, enabled, seed, *ctx.settings = inputs
    ctx.save_for_backward(images, params, enabled, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = OPS.warp_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings, *needs)
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None,) * 9


def _fake_affine_forward(images: Tensor, matrix: Tensor, size: Sequence[int], padding: int) -> Tensor:
    return images.new_empty((*images.shape[:2], *size))


def _fake_affine_backward(
    grad: Tensor, images: Tensor, matrix: Tensor, padding: int, need_images: bool, need_matrix: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(images, matrix, need_images, need_matrix)


def _setup_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, matrix, _, ctx.padding = inputs
    ctx.save_for_backward(images, matrix)


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    found = OPS.warp_affine_backward(grad.contiguous(), *ctx.saved_tensors, ctx.padding, *needs)
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), None, None


def _gradients(first: Tensor, second: Tensor, need_first: bool, need_second: bool) -> tuple[Tensor, Tensor]:
    """What was not asked for is empty."""
    return first.new_empty(first.shape if need_first else (0,)), second.new_empty(second.shape if need_second else (0,))


def _no_second_derivative(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "transformations: the native kernels have no second derivative; "
        "use `with protokernels.backend.use('reference')` around the forward pass"
    )


if AVAILABLE:
    torch.library.register_fake("protokernels::warp_forward")(_fake_forward)
    torch.library.register_fake("protokernels::warp_backward")(_fake_backward)
    torch.library.register_fake("protokernels::warp_affine_forward")(_fake_affine_forward)
    torch.library.register_fake("protokernels::warp_affine_backward")(_fake_affine_backward)
    torch.library.register_autograd("protokernels::warp_forward", _backward, setup_context=_setup)
    torch.library.register_autograd("protokernels::warp_affine_forward", _affine_backward, setup_context=_setup_affine)
    for name in ("warp_backward", "warp_affine_backward"):
        torch.library.register_autograd(f"protokernels::{name}", _no_second_derivative)
