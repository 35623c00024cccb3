# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formulas of the native contrastive operators.

The losses of a row depend on scores through three statistics; ``contrastive_coefficients`` is the derivative by them,
``contrastive_backward`` takes it on to the vectors. With one set of vectors a single call serves both roles of a pair; with two sets
there is one call for each.
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
    ctx.channels_last = x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] > 1
    like = x.new_empty((1, 1, 1)).expand(x.shape)  # shape, dtype and device without the memory
    ctx.save_for_backward(packed, norms, order, like)


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
    return rows.new_empty(()), rows.new_empty(R), rows.new_empty((3, R))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, groups, ranges, weights, *ctx.settings = inputs
    _, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(rows, columns, groups, ranges, weights, statistics)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, _statistics: None
) -> tuple[Tensor | None, ...]:
    rows, columns, groups, ranges, weights, statistics = ctx.saved_tensors
    channels, temperature, unit, form, precision = ctx.settings
    from_total = (None, None) if grad_total is None or weights is None else (grad_total.contiguous(), weights)
    from_losses = None if grad_losses is None else grad_losses.contiguous()
    if from_losses is None and from_total[0] is None:
        return (None,) * 10
    coefficients = _calls.call("contrastive_coefficients", from_losses, statistics, groups, ranges, form, *from_total)
    own, none, rest = (statistics, coefficients), (None, None), (channels, temperature, unit, precision)
    to_rows = to_columns = None
    if columns is None:
        to_rows = _calls.call("contrastive_backward", rows, None, groups, ranges, *own, *own, *rest)
    else:  # as many columns as rows, and as the rows see the columns so do the columns see the rows
        if ctx.needs_input_grad[0]:
            to_rows = _calls.call("contrastive_backward", rows, columns, groups, ranges, *own, *none, *rest)
        if ctx.needs_input_grad[1]:
            to_columns = _calls.call("contrastive_backward", columns, rows, groups, ranges, *none, *own, *rest)
    return to_rows, to_columns, *(None,) * 8


def _fake_coefficients(grad_losses: Tensor | None, statistics: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(statistics)


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
_calls.register("contrastive_forward", _fake_forward, setup=_setup_forward, backward=_backward)
_calls.register("contrastive_unpack", _fake_unpack, backward=_no_second_derivative)
_calls.register("contrastive_coefficients", _fake_coefficients, backward=_no_second_derivative)
_calls.register("contrastive_backward", _fake_backward, backward=_no_second_derivative)
