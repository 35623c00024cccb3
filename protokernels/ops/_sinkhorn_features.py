# SPDX-License-Identifier: MIT
"""Transport between clouds of features without the matrix of their costs, and the debiased divergence on top."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backend
from ..reference import prototypes as prototypes_reference
from ..reference import sinkhorn as reference
from ..reference._derivatives import first_order
from . import _calls, _checks
from ._sinkhorn_autograd import NO_SECOND_DERIVATIVE
from ._sinkhorn_problem import (
    Penalty,
    Problem,
    anneal,
    check_annealing,
    check_batch,
    prepare,
)
from ._sinkhorn_result import SinkhornResult, result_of

Cost = Literal["cosine", "sqeuclidean"]
COSTS = ("cosine", "sqeuclidean")
Precision = Literal["highest", "high", "medium"]
PRECISIONS = ("highest", "high", "medium")


def sinkhorn_features(
    x: Tensor,  # [B, N, D] or [N, D]
    y: Tensor,  # [B, M, D] or [M, D]
    a: Tensor | None = None,  # [B, N] or [N]
    b: Tensor | None = None,  # [B, M] or [M]
    *,
    cost: Cost = "cosine",
    epsilon: float | Tensor = 0.05,
    num_iters: int = 100,
    tol: float = 0.0,
    gradient: Literal["envelope"] = "envelope",
    row_mask: Tensor | None = None,  # [B, N] or [N] bool
    column_mask: Tensor | None = None,  # [B, M] or [M] bool
    marginal_penalty: Penalty | None = None,
    init: Tensor | None = None,  # [B, M] or [M]
    annealing: float | None = None,
    precision: Precision = "highest",
) -> SinkhornResult:
    """:func:`sinkhorn` between two clouds of features, in memory that grows with N + M, not N M.

        C_ij = 1 - cos(x_i, y_j)   or   |x_i - y_j|^2

    Costs are computed on the fly in every pass, forward and backward; no N x M array is ever stored. ``entropic_value`` is
    differentiable in x, y, a, b and epsilon by the envelope theorem (see :func:`sinkhorn` for when that is valid);
    everything else comes detached.
    In plain PyTorch: ``sinkhorn(1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT, gradient="envelope")``. A zero vector has cosine 0 with
    everything, and no gradient.

    Args:
        x: features of the rows, any floating-point type and strides; half precision is computed and returned in float32.
        y: features of the columns; the wider of both types counts.
        cost: ``"cosine"``, in [0, 2] whatever the features, which is what the default epsilon suits; or ``"sqeuclidean"``, which
            grows with D and the scale of the features, and epsilon must with it; distances over epsilon beyond the range of the type (3e38
            in float32: features of about 1e18) give NaN or infinity.
        gradient: ``"envelope"``; for the others build the cost and call :func:`sinkhorn`.
        a, b, epsilon, num_iters, tol, row_mask, column_mask, marginal_penalty, init: as in :func:`sinkhorn`.
        annealing: as in :func:`sinkhorn`; it starts from a bound on the costs: 2 for ``"cosine"``, the largest (|x| + |y|)^2
            for ``"sqeuclidean"``.
        precision: of the products of all iterations but the last on a GPU: ``"highest"`` as float32; ``"high"`` and ``"medium"`` with 11
            bits (as TF32) where that is faster, today on Hopper up to 128 dimensions and for balanced problems. A vector is rounded to
            2^-12 of its largest element, so a potential is wrong by about 2^-11 |x| |y| / sqrt(D), less what the last iteration mends; that
            one, the values and gradients are of full precision. A problem that ``tol`` stops before the last iteration keeps potentials
            of 11 bits and is judged by their marginal error. A CPU always computes in float32.

    Returns:
        A :class:`SinkhornResult`; its ``apply`` streams too, its ``plan`` has N M elements.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> x = torch.eye(3).requires_grad_()
        >>> result = protokernels.sinkhorn_features(x, torch.eye(3)[[2, 0, 1]], epsilon=0.1)
        >>> result.plan.argmax(1).tolist()
        [1, 2, 0]
        >>> result.entropic_value.backward()
        >>> x.grad.shape
        torch.Size([3, 3])
    """
    op = "sinkhorn_features"
    if gradient != "envelope":
        raise ValueError(
            f"{op}: gradient must be 'envelope' where the cost is never stored; got {gradient!r}; "
            "build the cost (protokernels.reference.sinkhorn.cost_matrix(x, y, cost)) and call sinkhorn() with it"
        )
    single, x, y = clouds(op, x, y, cost)
    dtype = x.dtype
    sizes = (x.shape[0], x.shape[1], y.shape[1])
    problem = prepare(op, x, sizes, dtype, a, b, row_mask, column_mask, epsilon, num_iters, tol, marginal_penalty, init)
    check_annealing(op, annealing)
    _checks.check_choice(op, "precision", precision, PRECISIONS)
    if any(given is not None for given in (a, b, row_mask, column_mask)):
        x, y = _readable(x, problem.a), _readable(y, problem.b)
    if annealing is not None:
        fixed = x.detach(), y.detach()
        spread = _spread(*fixed, problem, cost)
        problem = anneal(problem, annealing, spread, lambda step: _solve(*fixed, step, cost, precision).g)
    solution = _solve(x, y, problem, cost, precision)
    return result_of(solution, problem, (x, y), cost, single=single, envelope=True)


def sinkhorn_divergence(
    x: Tensor,  # [B, N, D] or [N, D]
    y: Tensor,  # [B, M, D] or [M, D]
    a: Tensor | None = None,  # [B, N] or [N]
    b: Tensor | None = None,  # [B, M] or [M]
    *,
    cost: Cost = "sqeuclidean",
    epsilon: float | Tensor = 0.05,
    num_iters: int = 100,
    tol: float = 0.0,
    row_mask: Tensor | None = None,  # [B, N] or [N] bool
    column_mask: Tensor | None = None,  # [B, M] or [M] bool
    precision: Precision = "highest",
) -> Tensor:  # [B] or []
    """How far two clouds of points are apart, without the bias of the entropy.

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2        OT: ``entropic_value`` of :func:`sinkhorn_features`

    At convergence S >= 0, and 0 only for equal clouds; it goes from the optimal transport cost (epsilon -> 0) to a kernel
    distance (epsilon -> inf; Feydy et al., AISTATS 2019). The three terms cancel the mass terms of the entropy, so this is
    also the divergence defined with KL(P | a b^T). Differentiable in x, y, a, b and epsilon by the envelope theorem; memory
    grows with N + M.

    Args: as in :func:`sinkhorn_features`; for ``cost="cosine"`` clouds with the same directions count as equal.

    Returns:
        [B], or a scalar for one pair of clouds.

    Raises:
        TypeError, ValueError: arguments do not fit.

    Example:
        >>> import torch, protokernels
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> [round(float(protokernels.sinkhorn_divergence(x, x + shift)), 2) for shift in (0.0, 0.5)]
        [0.0, 0.25]
    """
    op = "sinkhorn_divergence"
    single, x, y = clouds(op, x, y, cost)
    dtype, (B, N, _), M = x.dtype, x.shape, y.shape[1]
    both = prepare(op, x, (B, N, M), dtype, a, b, row_mask, column_mask, epsilon, num_iters, tol, None, None)
    _checks.check_choice(op, "precision", precision, PRECISIONS)
    if any(given is not None for given in (a, b, row_mask, column_mask)):
        x, y = _readable(x, both.a), _readable(y, both.b)
    rows, columns = both._replace(b=both.a), both._replace(a=both.b)
    between, of_x, of_y = (
        _solve(*pair, problem, cost, precision).entropic_value
        for pair, problem in (((x, y), both), ((x, x), rows), ((y, y), columns))
    )
    value = torch.sub(between, of_x + of_y, alpha=0.5)
    return value.squeeze(0) if single else value


def clouds(op: str, x: Tensor, y: Tensor, cost: str) -> tuple[bool, Tensor, Tensor]:
    """Whether it is one problem, and both clouds as [B, N, D] in the type that is computed in."""
    if not isinstance(cost, str) or cost not in COSTS:
        raise ValueError(f"{op}: cost must be 'cosine' or 'sqeuclidean'; got {cost!r}")
    check_batch(op, "x", x, "[B, N, D] or [N, D]")
    check_batch(op, "y", y, "[B, M, D] or [M, D]")
    _checks.check_same_device(op, "x", x, "y", y)
    if x.dim() != y.dim() or x.shape[-1] != y.shape[-1] or (x.dim() == 3 and x.shape[0] != y.shape[0]):
        raise ValueError(
            f"{op}: x [B, N, D] and y [B, M, D] must share B and D; got {list(x.shape)} and {list(y.shape)}"
        )
    if 0 in x.shape[-2:] or 0 in y.shape[-2:]:
        raise ValueError(
            f"{op}: x and y must hold at least one vector of at least one dimension; got {list(x.shape)} and {list(y.shape)}"
        )
    single, dtype = x.dim() == 2, prototypes_reference.compute_dtype(x, y)
    if single:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    return single, x.to(dtype).contiguous(), y.to(dtype).contiguous()


def _readable(points: Tensor, mass: Tensor) -> Tensor:  # [B, N, D], [B, N] -> [B, N, D]
    """The CUDA kernels read the points of what is absent, which may be anything."""
    return points if points.device.type == "cpu" else torch.where((mass == 0).unsqueeze(2), 0.0, points)


def _solve(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    problem: Problem,
    cost: Cost,
    precision: Precision,
) -> reference.Solution:
    a, b, epsilon, start, num_iters, tol, rho = problem
    a, b = first_order(a, NO_SECOND_DERIVATIVE), first_order(b, NO_SECOND_DERIVATIVE)
    if backend.native_serves(x.device):
        settings = cost == "cosine", num_iters, tol, *rho, PRECISIONS.index(precision)
        return reference.Solution(*_calls.call("sinkhorn_features_forward", x, y, a, b, epsilon, start, *settings))
    x, y = (torch.where((mass == 0).unsqueeze(2), 0.0, points) for mass, points in ((a, x), (b, y)))  # absent: anything
    x, y, epsilon = (first_order(value, NO_SECOND_DERIVATIVE) for value in (x, y, epsilon))
    return reference.solve_envelope(reference.cost_matrix(x, y, cost), a, b, epsilon, start, num_iters, tol, rho)


def _spread(x: Tensor, y: Tensor, problem: Problem, cost: Cost) -> Tensor:  # [B], no less than the range of the costs
    if cost == "cosine":
        return torch.full_like(problem.epsilon, 2.0)
    longest = (
        torch.where(mass > 0, points.square().sum(2), 0.0).amax(1).sqrt()
        for points, mass in ((x, problem.a), (y, problem.b))
    )
    return sum(longest, torch.zeros_like(problem.epsilon)).square()
