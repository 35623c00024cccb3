# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formulas of the native contrastive operators.

``contrastive_losses`` is what a loss of one set of vectors calls, its derivative included; the operators it consists of are called one by
one where vectors travel between ranks (``_contrastive_distributed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.contrastive import compute_dtype
from . import _calls
from ._contrastive_plan import plan_sizes

ALIGN = 16
"""Elements to which the length of a packed vector is rounded up, as in csrc/ops/contrastive.h."""


def numbers_kept(x: Tensor) -> int:
    """How many statistics of a row the device keeps, as in csrc/ops/contrastive.h."""
    return 5 if x.device.type == "cpu" else 3


def _fake_plan(
    labels: Tensor,
    block: Sequence[int],
    stride: Sequence[int],
    per_image: bool,
    drop_remainder: bool,
    background: int | None,
    ignore_index: int | None,
    form: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, G = plan_sizes(labels.shape, block, stride, per_image, drop_remainder)
    return (
        labels.new_empty(R),
        labels.new_empty((G, 6), dtype=torch.int32),
        labels.new_empty((R, 3), dtype=torch.int32),
        labels.new_empty(R, dtype=torch.float64),
    )


def _fake_views(beside: Tensor, count: int, crossing: bool, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = 2 * count
    return (
        beside.new_empty(R, dtype=torch.int64),
        beside.new_empty((2 if crossing else 1, 6), dtype=torch.int32),
        beside.new_empty((R, 3), dtype=torch.int32),
        beside.new_empty(R, dtype=torch.float64),
    )


def _fake_pack(x: Tensor, order: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    R, padded, dtype = order.shape[0], (x.shape[1] + ALIGN - 1) // ALIGN * ALIGN, compute_dtype(x)
    return x.new_empty((R, padded), dtype=dtype), x.new_empty(R, dtype=dtype)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, order, ctx.normalize = inputs
    packed, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.set_materialize_grads(False)  # no zeros for the norms
    ctx.channels_last = _is_channels_last(x)
    ctx.save_for_backward(packed, norms, order, _without_memory(x))


def _is_channels_last(x: Tensor) -> bool:  # [N, C, ...]
    return x.dim() > 2 and x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2:].numel() > 1


def _without_memory(x: Tensor, views: int = 1) -> Tensor:
    """The shape, dtype and device of ``x``, or of several like it along N: all that the derivative has to know of it."""
    return x.new_empty((1,) * x.dim()).expand(views * x.shape[0], *x.shape[1:])


def _pack_backward(ctx: Any, grad_packed: Tensor | None, _norms: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_packed is None:
        return None, None, None
    packed, norms, order, like = ctx.saved_tensors
    return (
        _calls.call("contrastive_unpack", grad_packed, packed, norms, order, like, ctx.normalize, ctx.channels_last),
        None,
        None,
    )


def _fake_unpack(
    grad_packed: Tensor,
    packed: Tensor,
    norms: Tensor,
    order: Tensor,
    like: Tensor,
    normalize: bool,
    channels_last: bool,
) -> Tensor:
    N, C, P = like.shape
    return like.new_empty((N, P, C)).transpose(1, 2) if channels_last else like.new_empty((N, C, P))


def _fake_forward(
    rows: Tensor,
    columns: Tensor | None,
    groups: Tensor,
    ranges: Tensor,
    weights: Tensor | None,
    channels: int,
    temperature: float,
    unit: bool,
    form: int,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor]:
    R = rows.shape[0]
    return rows.new_empty(()), rows.new_empty(R), rows.new_empty((numbers_kept(rows), R))


def _fake_losses(x: Tensor, second: Tensor | None, order: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    R, padded, dtype = order.shape[0], (x.shape[1] + ALIGN - 1) // ALIGN * ALIGN, compute_dtype(x)
    shapes = ((), (R,), (R, padded), (R,), (numbers_kept(x), R))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _setup_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, second, order, groups, ranges, weights, *ctx.settings = inputs
    _, losses, packed, norms, statistics = output
    ctx.mark_non_differentiable(packed, norms, statistics)
    ctx.set_materialize_grads(False)
    ctx.channels_last, ctx.two_views = _is_channels_last(x), second is not None
    like = _without_memory(x, 2 if ctx.two_views else 1)
    ctx.save_for_backward(packed, norms, order, groups, ranges, weights, statistics, like, losses)


def _losses_backward(ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, *_rest: None) -> tuple[Any, ...]:
    if grad_total is None and grad_losses is None:
        return (None,) * 10
    grads = grad_total, grad_losses
    to_x = _calls.call("contrastive_losses_backward", *grads, *ctx.saved_tensors, *ctx.settings, ctx.channels_last)
    first, second = to_x.tensor_split(2) if ctx.two_views else (to_x, None)
    return first, second, *(None,) * 8


def _fake_losses_backward(
    grad_total: Tensor | None,
    grad_losses: Tensor | None,
    packed: Tensor,
    norms: Tensor,
    order: Tensor,
    groups: Tensor,
    ranges: Tensor,
    weights: Tensor,
    statistics: Tensor,
    like: Tensor,
    losses: Tensor,
    temperature: float,
    normalize: bool,
    form: int,
    precision: int,
    channels_last: bool,
) -> Tensor:
    N, C, *size = like.shape
    return like.new_empty((N, *size, C)).movedim(-1, 1) if channels_last else like.new_empty(like.shape)


def _fake_backward(rows: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(rows)


def _no_second_derivative(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "contrastive losses: the native kernels have no second derivative; "
        "use `with protokernels.backend.use('reference')` around the forward pass"
    )


_calls.register("contrastive_plan", _fake_plan)
_calls.register("contrastive_views", _fake_views)
_calls.register("contrastive_pack", _fake_pack, setup=_setup_pack, backward=_pack_backward)
_calls.register("contrastive_unpack", _fake_unpack, backward=_no_second_derivative)
_calls.register("contrastive_forward", _fake_forward)
_calls.register("contrastive_backward", _fake_backward)
_calls.register("contrastive_losses", _fake_losses, setup=_setup_losses, backward=_losses_backward)
_calls.register("contrastive_losses_backward", _fake_losses_backward, backward=_no_second_derivative)
