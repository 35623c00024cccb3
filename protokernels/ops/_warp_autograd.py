# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formulas of the native transformations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _calls


def _fake_forward(images: Tensor, *_rest: Any) -> Tensor:
    return images.new_empty(images.shape)


def _fake_backward(
    grad: Tensor,
    images: Tensor,
    params: Tensor,
    enabled: Tensor | None,
    seed: Tensor | None,
    order: Sequence[int],
    radius: Sequence[int],
    sigma_max: float,
    noise_std: float,
    crop_size: float,
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
    found = _calls.call("warp_backward", grad.contiguous(), *ctx.saved_tensors, *ctx.settings, *needs)
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
    found = _calls.call("warp_affine_backward", grad.contiguous(), *ctx.saved_tensors, ctx.padding, *needs)
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), None, None


def _gradients(first: Tensor, second: Tensor, need_first: bool, need_second: bool) -> tuple[Tensor, Tensor]:
    """What was not asked for is empty."""
    return first.new_empty(first.shape if need_first else (0,)), second.new_empty(second.shape if need_second else (0,))


def _no_second_derivative(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "transformations: the native kernels have no second derivative; "
        "use `with protokernels.backend.use('reference')` around the forward pass"
    )


_calls.register("warp_forward", _fake_forward, setup=_setup, backward=_backward)
_calls.register("warp_backward", _fake_backward, backward=_no_second_derivative)
_calls.register("warp_affine_forward", _fake_affine_forward, setup=_setup_affine, backward=_affine_backward)
_calls.register("warp_affine_backward", _fake_affine_backward, backward=_no_second_derivative)
