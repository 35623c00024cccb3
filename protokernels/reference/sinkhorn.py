# SPDX-License-Identifier: MIT
"""Entropic optimal transport in plain PyTorch: batched Sinkhorn in the log domain, its three gradients, costs between features.

A problem has a cost C [N, M], masses a [N] and b [M] and a regularisation epsilon. With u = f / epsilon and v = g / epsilon, rows
first and columns last, a full iteration is

    u_i <- lambda_a (log a_i - LSE_j(v_j - C_ij / epsilon))          lambda = rho / (rho + epsilon), 1 if the marginal is exact
    v_j <- lambda_b (log b_j - LSE_i(u_i - C_ij / epsilon))

from v = 0, and what comes out is

    P_ij = exp(u_i + v_j - C_ij / epsilon)                transport_cost = <P, C>
    entropic_value = <P, C> + epsilon sum P (log P - 1)   (+ rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b) where rho is finite)

Zero mass means an absent row or column (potential -inf, nothing transported), an infinite cost a forbidden pair; a row or column that
has mass and no partner is left empty in the same way and makes `feasible` False. Sums run over what is there, so none of these
gives a NaN, in values or in gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import without_autocast
from .prototypes import unit_vectors

FEASIBLE_MASS = 1e-4
"""Total masses of a balanced problem may differ by this much, relative to the larger."""


class Solution(NamedTuple):
    """What the iterations leave."""

    f: Tensor  # [B, N], units of cost
    g: Tensor  # [B, M]
    transport_cost: Tensor  # [B]
    entropic_value: Tensor  # [B]
    marginal_error: Tensor  # [B]
    iterations: Tensor  # [B] int64
    feasible: Tensor  # [B] bool


class _Scaled(NamedTuple):
    """A problem in units of epsilon, its absent pairs marked; everything is finite where `allowed`."""

    cost: Tensor  # [B, N, M], 0 for forbidden pairs
    allowed: Tensor  # [B, N, M] bool
    epsilon: Tensor  # [B, 1, 1]
    log_a: Tensor  # [B, N], -inf for zero mass
    log_b: Tensor  # [B, M]

    def scores(self, u: Tensor, v: Tensor) -> Tensor:  # [B, N], [B, M] -> log P [B, N, M]
        return torch.where(
            self.allowed, u.unsqueeze(2) + v.unsqueeze(1) - self.cost / self.epsilon, u.new_full((), -math.inf)
        )


def _scaled(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> _Scaled:
    absent = (a == 0).unsqueeze(2) | (b == 0).unsqueeze(1)  # where the cost may be anything, NaN included
    forbidden = (cost == math.inf) | absent
    return _Scaled(torch.where(forbidden, 0.0, cost), ~forbidden, epsilon.reshape(-1, 1, 1), _log_mass(a), _log_mass(b))


def _log_mass(mass: Tensor) -> Tensor:
    """log, -inf without gradient for zero."""
    return torch.where(mass == 0, -math.inf, torch.where(mass == 0, 1.0, mass).log())


def _sum_exp(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """LSE over `dim` with the maximum taken out and whether anything was there; LSE of nothing is 0 here and has no gradient."""
    top = scores.detach().amax(dim, keepdim=True)
    shift = torch.where(top == -math.inf, 0.0, top)
    total = (scores - shift).exp().sum(dim)
    present = total != 0
    return torch.where(present, total, 1.0).log() + torch.where(present, shift.squeeze(dim), 0.0), present


def _half_step(scores: Tensor, dim: int, log_mass: Tensor, damping: Tensor | float) -> Tensor:
    lse, present = _sum_exp(scores, dim)
    alive = present & (log_mass != -math.inf)
    return torch.where(alive, damping * (torch.where(alive, log_mass, 0.0) - lse), -math.inf)


def _damping(rho: float, epsilon: Tensor) -> Tensor | float:  # epsilon [B, 1, 1] -> [B, 1]
    return 1.0 if rho == math.inf else rho / (rho + epsilon.squeeze(2))


def _kl(p: Tensor, q: Tensor) -> Tensor:  # [B, N], [B, N] -> [B]: sum p log(p / q) - p + q, 0 log 0 = 0
    q = torch.where(p != 0, q, q.detach())  # rows that are blocked have no gradient
    both = (p != 0) & (q != 0)
    ratio = torch.where(both, p, 1.0) / torch.where(both, q, 1.0)
    return (p * ratio.log() - p + q).sum(1)


def _iterate(
    problem: _Scaled,
    a: Tensor,  # [B, N]
    start: Tensor | None,  # [B, M], g
    num_iters: int,
    tol: float,
    rho: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # u [B, N], v [B, M], marginal error of the rows [B], iterations [B]
    damping_a, damping_b = (_damping(r, problem.epsilon) for r in rho)
    v = torch.zeros_like(problem.log_b) if start is None else start.detach() / problem.epsilon.squeeze(2)
    v = torch.where(problem.log_b == -math.inf, -math.inf, v)
    u = torch.zeros_like(problem.log_a)
    done = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
    iterations = torch.zeros(a.shape[0], dtype=torch.int64, device=a.device)
    next_u = _half_step(problem.scores(torch.zeros_like(u), v), 2, problem.log_a, damping_a)
    error = a.new_zeros(a.shape[0])
    for _ in range(num_iters):
        u = torch.where(done.unsqueeze(1), u, next_u)
        new_v = _half_step(problem.scores(u, torch.zeros_like(v)), 1, problem.log_b, damping_b)
        v = torch.where(done.unsqueeze(1), v, new_v)
        next_u = _half_step(problem.scores(torch.zeros_like(u), v), 2, problem.log_a, damping_a)
        iterations = iterations + (~done).to(torch.int64)
        with torch.no_grad():
            error = _row_error(a, u, next_u, balanced=rho == (math.inf, math.inf))
            if tol > 0:
                done = done | (error <= tol)
    return u, v, error, iterations


def _row_error(a: Tensor, u: Tensor, next_u: Tensor, balanced: bool) -> Tensor:  # [B]
    """From the row pass that would come next: |P 1 - a|_1 if balanced, else how far the potentials would move."""
    alive = u != -math.inf
    step = torch.where(alive, u, 0.0) - torch.where(alive, next_u, 0.0)
    moved = torch.expm1(step).abs() if balanced else step.abs()
    return torch.where(alive, a * moved, a if balanced else 0.0).sum(1)


def solve(
    cost: Tensor,  # [B, N, M], +inf: forbidden
    a: Tensor,  # [B, N], 0: absent
    b: Tensor,  # [B, M]
    epsilon: Tensor,  # [B]
    start: Tensor | None,  # [B, M], g to start from, not differentiated
    num_iters: int,
    tol: float,
    rho: tuple[float, float],
) -> Solution:
    """The iterations as they are written above; autograd through them is the unrolled gradient."""
    problem = _scaled(cost, a, b, epsilon)
    u, v, error, iterations = _iterate(problem, a, start, num_iters, tol, rho)
    return _solution(problem, a, b, u, v, error, iterations, rho)


def _solution(
    problem: _Scaled,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    error: Tensor,
    iterations: Tensor,
    rho: tuple[float, float],
) -> Solution:
    epsilon = problem.epsilon.squeeze(2)  # [B, 1]
    blocked_a, blocked_b = (u == -math.inf) & (a != 0), (v == -math.inf) & (b != 0)
    balanced = rho == (math.inf, math.inf)
    if balanced:
        error = error + torch.where(blocked_b, b.detach(), 0.0).sum(1)
    feasible = ~(blocked_a.any(1) | blocked_b.any(1))
    if balanced:
        total_a, total_b = a.detach().sum(1), b.detach().sum(1)
        feasible = feasible & ((total_a - total_b).abs() <= FEASIBLE_MASS * torch.maximum(total_a, total_b))
    plan, log_plan = _plan(problem, u, v)
    transport_cost = (plan * problem.cost).sum((1, 2))
    value = transport_cost + epsilon.squeeze(1) * (plan * (log_plan - 1)).sum((1, 2))
    for r, marginal, mass in ((rho[0], plan.sum(2), a), (rho[1], plan.sum(1), b)):
        if r != math.inf:
            # in float64: beside equal masses the terms cancel, and a penalty may be large
            value = value + (r * _kl(marginal.double(), mass.double())).to(value.dtype)
    return Solution(_times(epsilon, u), _times(epsilon, v), transport_cost, value, error.detach(), iterations, feasible)


def _times(epsilon: Tensor, u: Tensor) -> Tensor:  # [B, 1], [B, N] -> [B, N], -inf stays and has no gradient
    alive = u != -math.inf
    return torch.where(alive, epsilon * torch.where(alive, u, 0.0), -math.inf)


def _plan(problem: _Scaled, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """P and log P, which is 0 where P is 0 by absence."""
    present = problem.allowed & (u != -math.inf).unsqueeze(2) & (v != -math.inf).unsqueeze(1)
    log_plan = torch.where(present, problem.scores(u, v), 0.0)
    return torch.where(present, log_plan.exp(), 0.0), log_plan


def plan(
    cost: Tensor,  # [B, N, M]
    f: Tensor,  # [B, N]
    g: Tensor,  # [B, M]
    epsilon: Tensor,  # [B]
) -> Tensor:  # [B, N, M]
    """P = exp((f + g - C) / epsilon), 0 for absent and forbidden pairs."""
    total = f.unsqueeze(2) + g.unsqueeze(1)
    present = (cost != math.inf) & (total != -math.inf)
    exponent = (torch.where(present, total, 0.0) - torch.where(present, cost, 0.0)) / epsilon.reshape(-1, 1, 1)
    return torch.where(present, exponent.exp(), 0.0)


# ---------------------------------------------------------------------------------------- gradients at convergence


def solve_implicit(
    cost: Tensor,  # [B, N, M]
    a: Tensor,  # [B, N]
    b: Tensor,  # [B, M]
    epsilon: Tensor,  # [B]
    start: Tensor | None,  # [B, M]
    num_iters: int,
    tol: float,
) -> Solution:
    """Balanced; values of :func:`solve`, derivatives of the fixed point by the implicit function theorem.

    At the fixed point r(u, v) = (P 1 - a, P^T 1 - b) = 0, so d(u, v) = -J^+ dr with J = [[diag(P 1), P], [P^T, diag(P^T 1)]].
    J is singular along (1, -1), once for each group of rows and columns that forbidden pairs cut off; the pseudo-inverse
    takes the least change. It is taken of J with unit diagonal, in float64.
    """
    with torch.no_grad():
        u, v, error, iterations = _iterate(_scaled(cost, a, b, epsilon), a, start, num_iters, tol, (math.inf, math.inf))
    problem = _scaled(cost, a, b, epsilon)
    P, _ = _plan(problem, u, v)  # depends on cost and epsilon; u and v are constants here
    residual = torch.cat([P.sum(2) - a, P.sum(1) - b], dim=1)
    N, fixed = a.shape[1], P.detach().double()
    diagonal = torch.cat([fixed.sum(2), fixed.sum(1)], dim=1)
    scale = torch.where(diagonal > 0, diagonal, math.inf).rsqrt()  # 0 for what is absent
    jacobian = torch.diag_embed(diagonal)
    jacobian[:, :N, N:], jacobian[:, N:, :N] = fixed, fixed.mT
    unit = torch.nan_to_num(scale.unsqueeze(2) * jacobian * scale.unsqueeze(1))  # a NaN stays in `residual`
    inverse = torch.linalg.pinv(unit, rtol=1e-11, hermitian=True)
    step = -(scale * (inverse @ (scale * residual.double()).unsqueeze(2)).squeeze(2)).to(u.dtype)
    step = torch.where(torch.cat([u, v], dim=1) == -math.inf, 0.0, step)
    step = step - step.detach()  # the derivative alone
    return _solution(problem, a, b, u + step[:, :N], v + step[:, N:], error, iterations, (math.inf, math.inf))


def solve_envelope(
    cost: Tensor,  # [B, N, M]
    a: Tensor,  # [B, N]
    b: Tensor,  # [B, M]
    epsilon: Tensor,  # [B]
    start: Tensor | None,  # [B, M]
    num_iters: int,
    tol: float,
    rho: tuple[float, float],
) -> Solution:
    """Values of :func:`solve`; only `entropic_value` has a gradient, that of the Lagrangian with P, f and g held fixed:

    dC = P     da = f     db = g     d epsilon = sum P (log P - 1)     da = rho_a (1 - exp(-f / rho_a)) where rho_a is finite
    """
    with torch.no_grad():
        solution = solve(cost, a, b, epsilon, start, num_iters, tol, rho)
        fixed = plan(cost, solution.f, solution.g, epsilon)
        entropy = torch.where(fixed > 0, fixed * (torch.where(fixed > 0, fixed, 1.0).log() - 1), 0.0).sum((1, 2))
    lagrangian = (fixed * torch.where(fixed == 0, 0.0, cost)).sum((1, 2)) + epsilon * entropy
    for mass, potential, r in ((a, solution.f, rho[0]), (b, solution.g, rho[1])):
        finite = torch.where(potential == -math.inf, 0.0, potential)
        lagrangian = lagrangian + (mass * (finite if r == math.inf else -r * torch.expm1(-finite / r))).sum(1)
    return solution._replace(entropic_value=solution.entropic_value + (lagrangian - lagrangian.detach()))


# ------------------------------------------------------------------------------------------------ costs of features


def cost_matrix(
    x: Tensor,  # [B, N, D] or [N, D]
    y: Tensor,  # [B, M, D] or [M, D]
    cost: str,
) -> Tensor:  # [B, N, M] or [N, M]
    """``cosine``: 1 - cos(x_i, y_j), a zero vector having cosine 0 with everything; ``sqeuclidean``: |x_i - y_j|^2."""
    with without_autocast(x.device.type):
        if cost == "cosine":
            return 1 - unit_vectors(x) @ unit_vectors(y).mT
        squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        return (squares - 2 * (x @ y.mT)).clamp(min=0)
