# SPDX-License-Identifier: MIT
"""First derivatives that must not be differentiated again, since their formulas hold constant what a second one would need; and
gradients that are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transforms: Any = getattr(torch._C, "_are_functorch_transforms_active", None)


def may_want_gradient(*tensors: Tensor) -> bool:
    """Whether a derivative by one of these may be asked for. Under ``torch.func`` that may always be: what stands for many tensors in
    ``vmap`` does not know that they require a gradient. While compiling nobody tells whether there is a ``vmap``."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:
        if x.requires_grad:
            return True
    return torch.compiler.is_compiling() or under_transforms()


def under_transforms() -> bool:
    """Whether this is called within ``torch.func.grad``, ``vmap``, ``jvp`` or another of their kind."""
    return _transforms is not None and bool(_transforms())


def first_order(x: Tensor, message: str) -> Tensor:
    """``x``, whose gradient raises ``NotImplementedError`` with the message when it is differentiated in turn, instead of lacking terms.
    So does a tangent of forward mode, which neither ``detach`` nor ``no_grad`` would hold back."""
    if torch.compiler.is_compiling():
        return x
    if getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(message)
    if not may_want_gradient(x):
        return x
    return _FirstOrder.apply(x, message)  # type: ignore[no-any-return]


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, message: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        x, ctx.message = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _Last.apply(grad, x, ctx.message), None


class _Last(torch.autograd.Function):
    """The gradient, as a function of x: whoever goes back through it asks for a second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, message: str) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[None, ...]:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *_tangents: Tensor) -> Tensor:
        raise NotImplementedError(ctx.message)


def without_gradient(x: Tensor, where: Tensor) -> Tensor:
    """``x``, with a gradient of 0 for the elements marked, whatever the one that comes holds there; no copy of ``x`` is made,
    unless it is compiled."""
    if not may_want_gradient(x):
        return x
    if torch.compiler.is_compiling():  # which knows no derivative of forward mode
        return torch.where(where, x.detach(), x)
    return _Without.apply(x, where)  # type: ignore[no-any-return]


class _Without(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, where: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (where,) = ctx.saved_tensors
        return grad.masked_fill(where, 0.0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (where,) = ctx.saved_tensors
        return tangent.masked_fill(where, 0.0)
