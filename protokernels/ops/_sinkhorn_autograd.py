# SPDX-License-Identifier: MIT
"""Fake kernels (shapes for torch.compile and torch.export) and the autograd formulas of the native Sinkhorn operators.

`save_history` of sinkhorn_forward decides what its backward is: with the history the derivative of the iterations, without it that of
the fixed point, which for the entropic value alone is the envelope's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _calls

Grad = Tensor | None
NO_SECOND_DERIVATIVE = (
    "sinkhorn_features and sinkhorn_divergence have no second derivative and no forward mode; sinkhorn(cost, gradient='unrolled') on the "
    "reference backend has"
)


def _fake_solution(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    B = a.shape[0]
    return (
        torch.empty_like(a),
        torch.empty_like(b),
        *(a.new_empty(B) for _ in range(3)),
        a.new_empty(B, dtype=torch.int64),
        a.new_empty(B, dtype=torch.bool),
    )


def _fake_forward(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    g_init: Grad,
    num_iters: int,
    tol: float,
    rho_a: float,
    rho_b: float,
    save_history: bool,
) -> tuple[Tensor, ...]:
    B, N, M = cost.shape
    return *_fake_solution(a, b), a.new_empty((B, num_iters, N + M) if save_history else (0,))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, epsilon, g_init, _, _, ctx.rho_a, ctx.rho_b, ctx.save_history = inputs
    f, g, _, _, marginal_error, iterations, feasible, history = output
    ctx.mark_non_differentiable(marginal_error, iterations, feasible, history)
    ctx.save_for_backward(cost, a, b, epsilon, g_init, f, g, iterations, history)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_f: Grad, grad_g: Grad, grad_cost: Grad, grad_value: Grad, *_rest: Grad
) -> tuple[Grad, ...]:
    if grad_f is None and grad_g is None and grad_cost is None and grad_value is None:
        return (None,) * 10
    cost, a, b, epsilon, g_init, f, g, iterations, history = ctx.saved_tensors
    if grad_f is None and grad_g is None and grad_cost is None and not ctx.save_history:
        assert grad_value is not None
        to_cost: Grad = None
        to_epsilon: Grad = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            to_cost, to_epsilon = _calls.call(
                "sinkhorn_envelope_backward", cost, f, g, epsilon, grad_value.contiguous()
            )
        to_a, to_b = _envelope_masses(ctx, grad_value, f, g, ctx.needs_input_grad[1:3])
    else:
        grads = (None if x is None else x.contiguous() for x in (grad_f, grad_g, grad_cost, grad_value))
        to_cost, to_a, to_b, to_epsilon = _calls.call(
            "sinkhorn_backward",
            cost,
            a,
            b,
            epsilon,
            g_init,
            f,
            g,
            iterations,
            history,
            *grads,
            not ctx.save_history,
            ctx.rho_a,
            ctx.rho_b,
        )
    found = (to_cost, to_a, to_b, to_epsilon)
    wanted = (x if needed else None for x, needed in zip(found, ctx.needs_input_grad[:4], strict=True))
    return *wanted, *(None,) * 6


def _envelope_masses(ctx: Any, grad_value: Tensor, f: Tensor, g: Tensor, wanted: Sequence[bool]) -> tuple[Grad, Grad]:
    return _envelope_mass(grad_value, f, ctx.rho_a, wanted[0]), _envelope_mass(grad_value, g, ctx.rho_b, wanted[1])


def _envelope_mass(grad_value: Tensor, potential: Tensor, rho: float, wanted: bool) -> Grad:
    """e f, or e rho (1 - exp(-f / rho)) where the marginal may be missed; 0 for absent rows."""
    if not wanted:
        return None
    finite = torch.where(potential == -math.inf, 0.0, potential)
    return grad_value.unsqueeze(-1) * (finite if rho == math.inf else -rho * torch.expm1(-finite / rho))


def _fake_backward(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(cost), torch.empty_like(a), torch.empty_like(b), torch.empty_like(epsilon)


def _setup_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _plan_backward(ctx: Any, grad_plan: Tensor) -> tuple[Grad, ...]:
    plan, cost, f, g, epsilon = ctx.saved_tensors
    found = _calls.call("sinkhorn_plan_backward", grad_plan.contiguous(), plan, cost, f, g, epsilon)
    return tuple(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=True))


def _setup_features(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, _, _, epsilon, _, ctx.cosine, _, _, ctx.rho_a, ctx.rho_b, _ = inputs
    f, g, transport_cost, _, *rest = output
    ctx.mark_non_differentiable(f, g, transport_cost, *rest)
    ctx.save_for_backward(x, y, f, g, epsilon)
    ctx.set_materialize_grads(False)


def _features_backward(
    ctx: Any, _f: Grad, _g: Grad, _transport_cost: Grad, grad_value: Grad, *_rest: Grad
) -> tuple[Grad, ...]:
    if grad_value is None:
        return (None,) * 12
    x, y, f, g, epsilon = ctx.saved_tensors
    to_x, to_y, to_epsilon = _calls.call(
        "sinkhorn_features_backward", x, y, f, g, epsilon, grad_value.contiguous(), ctx.cosine
    )
    masses = _envelope_masses(ctx, grad_value, f, g, ctx.needs_input_grad[2:4])
    found = (to_x, to_y, *masses, to_epsilon)
    return *(v if needed else None for v, needed in zip(found, ctx.needs_input_grad[:5], strict=True)), *(None,) * 7


def _no_second_derivative(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "sinkhorn: the native kernels have no second derivative; gradient='unrolled' has one with "
        "`with protokernels.backend.use('reference')` around the forward pass"
    )


def _no_second_derivative_of_features(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


def _fake_plan(cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor) -> Tensor:
    return torch.empty_like(cost)


def _fake_plan_backward(
    grad_plan: Tensor, plan: Tensor, cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(cost), torch.empty_like(f), torch.empty_like(g), torch.empty_like(epsilon)


def _fake_envelope_backward(
    cost: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, grad_entropic_value: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cost), torch.empty_like(epsilon)


def _fake_features_forward(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    return _fake_solution(a, b)


def _fake_features_backward(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(epsilon)


_calls.register("sinkhorn_forward", _fake_forward, setup=_setup_forward, backward=_backward)
_calls.register("sinkhorn_plan", _fake_plan, setup=_setup_plan, backward=_plan_backward)
_calls.register("sinkhorn_features_forward", _fake_features_forward, setup=_setup_features, backward=_features_backward)
_calls.register("sinkhorn_backward", _fake_backward, backward=_no_second_derivative)
_calls.register("sinkhorn_plan_backward", _fake_plan_backward, backward=_no_second_derivative)
_calls.register("sinkhorn_envelope_backward", _fake_envelope_backward, backward=_no_second_derivative)
_calls.register("sinkhorn_features_backward", _fake_features_backward, backward=_no_second_derivative_of_features)
