# SPDX-License-Identifier: MIT
"""Entropic transport in NumPy float64, one problem at a time, without absent rows and columns; gradients by complex steps.

`solve` takes real or complex input. With h = 1e-30, Im F(x + i h d) / h is the derivative of F along d to rounding, so the
gradient of anything the iterations compute is known without a formula for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_tests.places import Place
from python_tests.prototypes_oracle import as_numpy, unit_roundoff

Array = np.ndarray
STEP = 1e-30

# (B, N, M): one, one row, one column, a vector's width less and more than one, several tiles, odd
SIZES = [
    (1, 1, 1), (2, 1, 5), (2, 5, 1), (3, 2, 3), (2, 15, 17), (1, 31, 33), (2, 33, 31), (5, 49, 49), (1, 129, 2), (1, 3, 257),
    (1, 130, 151),
]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a problem's iterations give; absent and blocked rows have potential -inf and no mass."""

    f: Array  # [N]
    g: Array  # [M]
    plan: Array  # [N, M]
    transport_cost: Any
    entropic_value: Any
    marginal_error: float
    iterations: int
    feasible: bool


def lse(x: Array, axis: int) -> Array:
    """log sum exp; -inf over nothing."""
    if x.shape[axis] == 0:
        return np.full(np.delete(x.shape, axis), -np.inf)
    top = x.real.max(axis=axis, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=axis)) + np.squeeze(top, axis)


def kl(p: Array, q: Array) -> Any:
    """sum p log(p / q) - p + q over q > 0."""
    inside = p.real > 0
    return (p[inside] * np.log(p[inside] / q[inside])).sum() - p.sum() + q.sum()


def solve(
    cost: Array,  # [N, M]
    a: Array,  # [N]
    b: Array,  # [M]
    epsilon: Any,
    num_iters: int,
    tol: float = 0.0,
    rho: tuple[float, float] = (math.inf, math.inf),
    start: Array | None = None,  # [M], g
) -> Answer:
    """Cuts out what is absent, then iterates by the definition."""
    kind = np.result_type(cost, a, b, np.asarray(epsilon), np.float64)
    rows, columns = np.flatnonzero(a.real > 0), np.flatnonzero(b.real > 0)
    allowed = ~np.isposinf(cost.real[np.ix_(rows, columns)])
    blocked = int((~allowed.any(axis=1)).sum() + (~allowed.any(axis=0)).sum())
    feasible = blocked == 0
    balanced = rho == (math.inf, math.inf)
    total = a.real.sum(), b.real.sum()
    if balanced and abs(total[0] - total[1]) > 1e-4 * max(total):
        feasible = False
    lost_rows, lost_columns = a[rows[~allowed.any(axis=1)]], b[columns[~allowed.any(axis=0)]]
    rows, columns = rows[allowed.any(axis=1)], columns[allowed.any(axis=0)]
    inside = np.ix_(rows, columns)
    C, p, q = cost[inside].astype(kind), a[rows].astype(kind), b[columns].astype(kind)
    scaled = np.where(np.isposinf(C.real), -np.inf, -np.where(np.isposinf(C.real), 0, C) / epsilon)
    damping = [1.0 if r == math.inf else r / (r + epsilon) for r in rho]
    v = np.zeros(len(columns), dtype=kind) if start is None else (start[columns] / epsilon).astype(kind)
    error, iterations = 0.0, 0

    def row_pass() -> Array:
        return damping[0] * (np.log(p) - lse(v[None, :] + scaled, 1))

    u_next = row_pass()
    while iterations < num_iters:
        u = u_next
        v = damping[1] * (np.log(q) - lse(u[:, None] + scaled, 0))
        u_next = row_pass()
        iterations += 1
        moved = (u - u_next).real
        error = float((p.real * np.abs(np.expm1(moved) if balanced else moved)).sum())
        if balanced:
            error += float(lost_rows.real.sum())
        if tol > 0 and error <= tol:
            break
    log_plan = u[:, None] + v[None, :] + scaled
    present = ~np.isneginf(log_plan.real)
    P = np.where(present, np.exp(np.where(present, log_plan, 0)), 0)
    transport = (P[present] * C[present]).sum()
    value = transport + epsilon * (P[present] * (log_plan[present] - 1)).sum()
    for r, marginal, mass, lost in ((rho[0], P.sum(1), p, lost_rows), (rho[1], P.sum(0), q, lost_columns)):
        if r != math.inf:
            value = value + r * (kl(marginal, mass) + lost.real.sum())
    f, g = np.full(len(a), -np.inf, dtype=kind), np.full(len(b), -np.inf, dtype=kind)
    f[rows], g[columns] = epsilon * u, epsilon * v
    plan = np.zeros(cost.shape, dtype=kind)
    plan[inside] = P
    if balanced:
        error += float(lost_columns.real.sum())
    return Answer(f, g, plan, transport, value, error, iterations, feasible)


def solve_batch(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, num_iters: int, start: Tensor | None = None, **options: Any
) -> list[Answer]:
    """`solve` on the values that the tensors [B, ...] hold."""
    parts = [as_numpy(x) for x in (cost, a, b, epsilon)]
    starts = [None] * len(parts[0]) if start is None else list(as_numpy(start))
    return [solve(*part, num_iters, start=g, **options) for *part, g in zip(*parts, starts, strict=True)]


def directional(
    loss: Callable[..., Any],  # of cost, a, b, epsilon, which may be complex
    point: tuple[Array, Array, Array, Any],
    direction: tuple[Array, Array, Array, Any],
) -> float:
    """The derivative of `loss` at `point` along `direction`."""
    moved = [x + 1j * STEP * np.where(np.isfinite(x), d, 0) for x, d in zip(point, direction, strict=True)]
    return float(np.imag(loss(*moved)) / STEP)


def draw(
    B: int, N: int, M: int, seed: int = 0, dtype: torch.dtype = torch.float64, uniform: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs [B, N, M] in [0, 1) and masses [B, N], [B, M] with the total 1, differing by e^3 unless uniform."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(B, N, M, generator=generator, dtype=torch.float64)
    a, b = (
        torch.rand(B, n, generator=generator, dtype=torch.float64).mul(0.0 if uniform else 3.0).softmax(1)
        for n in (N, M)
    )
    return cost.to(dtype), a.to(dtype), b.to(dtype)


def inputs(
    place: Place, B: int, N: int, M: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, ...]:
    """Cost, a, b and epsilon [B] that take gradients."""
    epsilon = torch.linspace(0.08, 0.2, B, dtype=dtype)
    return tuple(x.to(place.device).requires_grad_() for x in (*draw(B, N, M, seed, dtype), epsilon))


def log_error(answer: Answer, cost: Array, epsilon: float, dtype: torch.dtype, num_iters: int) -> float:
    """How far u, v and log P may be from float64 after so many iterations in `dtype`.

    A half-step rounds terms as large as S = max(|u|, |v|, |C| / epsilon) and a sum of up to n of them; it does not enlarge
    what it is given (it is nonexpansive in the largest norm). Roundings are independent with mean zero (Higham and Mary, 2019):
    they add up as sqrt(2 T), and four standard deviations are allowed.
    """
    u = unit_roundoff(dtype)
    finite = [np.abs(x.real[np.isfinite(x.real)]) for x in (answer.f, answer.g, cost)]
    size = max((float(x.max()) for x in finite if x.size), default=0.0) / epsilon
    return 4 * u * (math.sqrt(2 * num_iters) * (size + math.sqrt(max(cost.shape)) + 8) + 8)


def check(result: Any, answers: list[Answer], cost: Tensor, epsilon: Tensor, a: Tensor) -> None:
    """Every output of a batched result against the answers, up to rounding."""
    dtype = result.f.dtype
    assert result.f.shape == cost.shape[:2] and result.g.shape == (cost.shape[0], cost.shape[2])
    plans = as_numpy(result.plan)
    for index, answer in enumerate(answers):
        eps, C = float(epsilon[index]), as_numpy(cost[index])
        error = log_error(answer, C, eps, dtype, max(answer.iterations, 1))
        tiny = 2 * torch.finfo(dtype).tiny
        for name in ("f", "g"):
            actual, expected = as_numpy(getattr(result, name)[index]), getattr(answer, name)
            np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=eps * error)
        # the plan is exp of potentials that err by this much each
        np.testing.assert_allclose(plans[index], answer.plan, rtol=math.expm1(3 * error), atol=tiny)
        mass = float(answer.plan.sum())
        finite_cost = np.where(np.isposinf(C), 0, C)
        values = float((answer.plan * np.abs(finite_cost)).sum())
        bound = math.expm1(3 * error)
        np.testing.assert_allclose(
            as_numpy(result.transport_cost[index]), answer.transport_cost, rtol=0, atol=bound * values + tiny
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = float(np.where(answer.plan > 0, answer.plan * (np.abs(np.log(answer.plan)) + 1), 0).sum())
        penalty = abs(answer.entropic_value - answer.transport_cost) + values
        slack = bound * (values + eps * entropy + penalty + eps * mass)
        np.testing.assert_allclose(
            as_numpy(result.entropic_value[index]), answer.entropic_value, rtol=0, atol=slack + tiny
        )
        total = float(a[index].detach().double().sum())
        np.testing.assert_allclose(
            float(result.marginal_error[index]), answer.marginal_error, rtol=0, atol=bound * (total + mass)
        )
        assert int(result.iterations[index]) == answer.iterations
        assert bool(result.feasible[index]) == answer.feasible


@dataclass(frozen=True)
class Weights:
    """A linear functional of everything a result holds, finite where potentials are not."""

    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    transport_cost: Tensor  # [B]
    entropic_value: Tensor  # [B]
    plan: Tensor  # [B, N, M]

    @staticmethod
    def draw(B: int, N: int, M: int, seed: int = 7, gauge_free: bool = False) -> Weights:
        """`gauge_free`: f and g weigh the same in total, so that f + c, g - c changes nothing."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((B, N), (B, M), (B,), (B,), (B, N, M))
        f, g, t, e, plan = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        if gauge_free:
            f, g = f - f.mean(1, keepdim=True) + 1 / N, g - g.mean(1, keepdim=True) + 1 / M
        return Weights(f, g, t, e, 3 * plan)

    def of_result(self, result: Any) -> Tensor:
        device, dtype = result.f.device, result.f.dtype
        w = {name: value.to(device, dtype) for name, value in vars(self).items()}
        total = (w["transport_cost"] * result.transport_cost + w["entropic_value"] * result.entropic_value).sum()
        for name in ("f", "g"):
            x = getattr(result, name)
            total = total + torch.where(x == -math.inf, 0.0, w[name] * x).sum()
        return total + (w["plan"] * result.plan).sum()

    def of_answer(self, answer: Answer, index: int = 0) -> Any:
        w = {name: as_numpy(value[index]) for name, value in vars(self).items()}
        total = w["transport_cost"] * answer.transport_cost + w["entropic_value"] * answer.entropic_value
        for name in ("f", "g"):
            x = getattr(answer, name)
            finite = np.isfinite(x.real)
            total = total + (w[name][finite] * x[finite]).sum()
        return total + (w["plan"] * answer.plan).sum()


def gradients(result: Any, weights: Weights, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weights.of_result(result), inputs)


def modulo_constants(grad_a: Tensor, grad_b: Tensor) -> Tensor:  # [B, N], [B, M] -> [B, N, M]
    """What is left of the gradients of masses whose totals must change together."""
    return grad_a.unsqueeze(2) + grad_b.unsqueeze(1)


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| relative to |expected|, both as vectors."""
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((a - e).norm() / e.norm().clamp(min=1e-300))


def on(place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on a place's device, leaves of autograd."""
    return tuple(x.detach().to(place.device).requires_grad_(x.is_floating_point()) for x in tensors)


def with_holes(B: int, N: int, M: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Zero masses here and there, a third of the pairs forbidden, every row and column with a partner left."""
    cost, a, b = draw(B, N, M, seed=3)
    generator = torch.Generator().manual_seed(4)
    forbidden = torch.rand(B, N, M, generator=generator) < 0.33
    forbidden[:, :, 0] = forbidden[:, 0, :] = False
    cost[forbidden] = math.inf
    a[:, 1:] = a[:, 1:] * (torch.rand(B, N - 1, generator=generator) < 0.7)
    b[:, 1:] = b[:, 1:] * (torch.rand(B, M - 1, generator=generator) < 0.7)
    # the first row and column hold a third of the mass each and everybody may go there: a plan exists
    a[:, 0], b[:, 0] = 0, 0
    a, b = (2 / 3 * x / x.sum(1, keepdim=True).clamp(min=1e-9) for x in (a, b))
    a[:, 0], b[:, 0] = 1 - a.sum(1), 1 - b.sum(1)
    return cost.to(dtype), a.to(dtype), b.to(dtype)
