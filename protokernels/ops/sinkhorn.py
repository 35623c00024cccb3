# SPDX-License-Identifier: MIT
"""Batched entropic optimal transport: Sinkhorn's iterations in the log domain, with three gradients.

The equations stand in ``protokernels.reference.sinkhorn`` and ``csrc/ops/sinkhorn.h``. Source: M. Cuturi, Sinkhorn
Distances (NeurIPS 2013); log domain and absorption: G. Peyré and M. Cuturi, Computational Optimal Transport (2019), section 4.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend
from ..reference import prototypes as prototypes_reference
from ..reference import sinkhorn as reference
from ..reference._derivatives import first_order, may_want_gradient
from . import _calls, _sinkhorn_autograd  # noqa: F401  (the second registers shapes and gradients)
from ._sinkhorn_features import sinkhorn_divergence, sinkhorn_features
from ._sinkhorn_problem import (
    Gradient,
    Penalty,
    Problem,
    anneal,
    check_annealing,
    check_batch,
    check_gradient,
    prepare,
)
from ._sinkhorn_result import SinkhornResult, result_of

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_divergence", "sinkhorn_features"]


def sinkhorn(
    cost: Tensor,  # [B, N, M] or [N, M]
    a: Tensor | None = None,  # [B, N] or [N]
    b: Tensor | None = None,  # [B, M] or [M]
    *,
    epsilon: float | Tensor = 0.05,
    num_iters: int = 100,
    tol: float = 0.0,
    gradient: Gradient = "unrolled",
    row_mask: Tensor | None = None,  # [B, N] or [N] bool
    column_mask: Tensor | None = None,  # [B, M] or [M] bool
    marginal_penalty: Penalty | None = None,
    init: Tensor | None = None,  # [B, M] or [M]
    annealing: float | None = None,
) -> SinkhornResult:
    """Solves a batch of transport problems with entropic regularisation.

        P = argmin  <P, C> + epsilon sum P (log P - 1)      over P >= 0 with P 1 = a and P^T 1 = b

    by ``num_iters`` iterations u = log a - LSE_j(v_j - C_ij / epsilon), v = log b - LSE_i(u_i - C_ij / epsilon) from v = 0. Columns come
    last: column sums are exact, row sums as good as ``marginal_error`` says. In plain PyTorch, for uniform masses::

        for _ in range(num_iters):
            u = -log(N) - logsumexp(v[:, None, :] - C / epsilon, 2)
            v = -log(M) - logsumexp(u[:, :, None] - C / epsilon, 1)
        P = exp(u[:, :, None] + v[:, None, :] - C / epsilon)

    No epsilon overflows: potentials are kept in the log domain. A smaller epsilon needs more iterations, roughly in proportion to
    the range of the costs over epsilon; if ``converged`` is False, take more iterations or a larger epsilon, or start
    from a solution (``init``, ``annealing``). In float32 the plan is known to about 1e-7 max|C| / epsilon relative; float64 goes further.
    Where that is more than 1 nothing is known, and gradients through the iterations may overflow.

    **Which gradient is valid when.** Gradients reach cost, a, b and epsilon (where it is a tensor):

    * ``"unrolled"``: the exact derivative of the iterations as they ran, for every output, converged or not. Keeps
      num_iters (N + M) numbers per problem, no matrices. The right choice for few iterations, and the default.
    * ``"implicit"``: the derivative of the fixed point, for every output; its cost does not grow with the iterations. Wrong
      as far as the problem has not converged: look at ``converged``. Exact marginals only. Potentials and the gradients of a and b are
      defined up to a constant (mass cannot change on one side alone); after a softmax, or in f + g, it drops out.
    * ``"envelope"``: for ``entropic_value`` only: dC = P, da = f, db = g, d epsilon = sum P (log P - 1), with no extra pass. Valid near
      convergence; ``marginal_error`` bounds what is missing. All other outputs come detached: differentiating them
      raises, instead of training on a wrong gradient.

    Libraries differ by a convention. With KL(P | a b^T) in place of sum P (log P - 1) the value is smaller by
    epsilon (sum a log a + sum b log b) up to a constant, and its derivative by a is f - epsilon log a, not f. POT's
    ``ot.solve(grad="envelope")`` gives the centred f for both of its entropies, which differs from finite differences for its KL value with
    non-uniform a: for the gradients of a and b it is no oracle.

    Half precision is computed and returned in float32, also under autocast. Second derivatives: reference backend only.

    Args:
        cost: any strides; +inf forbids a pair; in float32 best between 1e-15 and 1e15 (divide costs and epsilon by one number; the plan
            stays), or gradients may overflow or vanish; N, M >= 1, B may be 0. One problem [N, M] gives results without the batch.
        a: masses of the rows, >= 0; zero: the row is absent. Default: equal masses with the total 1 over what the mask leaves.
        b: masses of the columns; their total must be that of a (within 1e-4) unless ``marginal_penalty`` is given.
        epsilon: regularisation in units of cost: a number, or a tensor with one element or [B]. The default suits costs of order 1.
        num_iters: full iterations, or their largest number where ``tol`` is set.
        tol: a problem stops after the first iteration with ``marginal_error <= tol``, each on its own; 0: never.
        gradient: see above.
        row_mask: True where a row is present; the result is that of the problem without the others. Masses given are not rescaled.
        column_mask: the same for columns.
        marginal_penalty: rho, or (rho_a, rho_b): marginals may be missed at the price rho KL(P 1 | a) instead of being exact (None).
            On a GPU that price is rounded, in float32 to about 1e-7 rho: for a rho far above the costs take None or float64.
        init: potential g to start from, such as that of an earlier result; no gradient. n iterations from g continue those that led to it;
            -inf (a column that was absent there) counts as 0.
        annealing: factor in (0, 1): beforehand, one iteration each at epsilons falling by it from the range of the costs, none below
            epsilon; log 10^4 / -log factor of them, rounded up, whatever the range (14 for 0.5), so that one beyond 10^4 epsilon ends
            in a jump. These are not counted and not differentiated.

    Returns:
        A :class:`SinkhornResult`: plan (computed when asked for), transport cost, entropic value, potentials, diagnostics.

    Raises:
        TypeError, ValueError: arguments do not fit. Values of masses and of epsilon tensors are looked at on the CPU only: elsewhere that
            would wait for the device, and ``feasible`` says what is wrong.

    Example:
        >>> import torch, protokernels
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> result = protokernels.sinkhorn(cost, epsilon=0.5)
        >>> [[round(p, 3) for p in row] for row in result.plan.tolist()]
        [[0.44, 0.06], [0.06, 0.44]]
        >>> result.transport_cost.backward()
        >>> cost.grad.shape, bool(result.converged)
        (torch.Size([2, 2]), True)
    """
    op = "sinkhorn"
    check_batch(op, "cost", cost, "[B, N, M] or [N, M]")
    single = cost.dim() == 2
    dtype = prototypes_reference.compute_dtype(cost)
    batch = (cost.unsqueeze(0) if single else cost).to(dtype).contiguous()
    B, N, M = batch.shape
    if N == 0 or M == 0:
        raise ValueError(f"{op}: cost must have at least one row and one column; got {list(cost.shape)}")
    problem = prepare(
        op, cost, (B, N, M), dtype, a, b, row_mask, column_mask, epsilon, num_iters, tol, marginal_penalty, init
    )
    check_gradient(op, gradient, problem.rho)
    check_annealing(op, annealing)
    if any(x is not None for x in (a, b, row_mask, column_mask)):
        batch = _readable(batch, problem.a, problem.b)
    if annealing is not None:
        fixed = batch.detach()
        problem = anneal(problem, annealing, _spread(fixed, problem), lambda step: _solve(fixed, step, "envelope").g)
    solution = _solve(batch, problem, gradient)
    return result_of(solution, problem, (batch,), "dense", single=single, envelope=gradient == "envelope")


def _readable(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:  # [B, N, M], [B, N], [B, M] -> [B, N, M]
    """The CUDA kernels read the costs of what is absent, which may be anything."""
    if cost.device.type == "cpu":
        return cost
    return torch.where((a == 0).unsqueeze(2) | (b == 0).unsqueeze(1), 0.0, cost)


def _solve(
    cost: Tensor,  # [B, N, M]
    problem: Problem,
    gradient: Gradient,
) -> reference.Solution:
    a, b, epsilon, start, num_iters, tol, rho = problem
    if backend.native_serves(cost.device):
        wanted = may_want_gradient(cost, a, b, epsilon)
        outputs = _calls.call(
            "sinkhorn_forward", cost, a, b, epsilon, start, num_iters, tol, *rho, wanted and gradient == "unrolled"
        )
        return reference.Solution(*outputs[:7])
    if gradient == "unrolled":
        return reference.solve(cost, a, b, epsilon, start, num_iters, tol, rho)
    message = (
        f"sinkhorn: gradient={gradient!r} has no second derivative and no forward mode; gradient='unrolled' on the "
        "reference backend has"
    )
    cost, a, b, epsilon = (first_order(x, message) for x in (cost, a, b, epsilon))
    if gradient == "implicit":
        return reference.solve_implicit(cost, a, b, epsilon, start, num_iters, tol)
    return reference.solve_envelope(cost, a, b, epsilon, start, num_iters, tol, rho)


def _spread(
    cost: Tensor, problem: Problem
) -> Tensor:  # [B, N, M] -> [B]: largest minus smallest cost of pairs with mass
    used = cost.isfinite() & (problem.a > 0).unsqueeze(2) & (problem.b > 0).unsqueeze(1)
    largest = torch.where(used, cost, -math.inf).amax((1, 2))
    return (largest - torch.where(used, cost, math.inf).amin((1, 2))).clamp(min=0.0)
