# SPDX-License-Identifier: MIT
"""What the Sinkhorn functions return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend
from ..reference import sinkhorn as reference
from ..reference._derivatives import may_want_gradient
from ..reference._precision import without_autocast
from . import _calls, _checks
from ._sinkhorn_problem import Problem

ROWS_AT_ONCE = 2**22
"""Elements of the plan that `apply` holds at a time where the cost is not stored."""


@dataclass(frozen=True, eq=False, repr=False)
class SinkhornResult:
    """Solution of a batch of transport problems; without the leading dimension for a single one.

    ``f`` and ``g`` are the potentials in units of cost, -inf where there is no mass (or no partner); adding a constant to f
    and taking it from g changes nothing. ``plan`` is computed when it is first asked for and kept.

    Attributes:
        f: [B, N].
        g: [B, M].
        transport_cost: [B], <P, C>.
        entropic_value: [B], <P, C> + epsilon sum P (log P - 1), and the penalties of unbalanced marginals.
        marginal_error: [B]; |P 1 - a|_1 + |P^T 1 - b|_1, absolute. With ``marginal_penalty`` there are no marginals to miss: it is
            sum a |u' - u|, how far the next iteration would move u = f / epsilon. No gradient.
        iterations: [B] int64, full iterations that led to this result.
        feasible: [B] bool; False where a row or column with mass has no allowed partner with mass (it is left empty), or where
            the total masses of a balanced problem differ by more than 1e-4 of them.
    """

    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    transport_cost: Tensor  # [B]
    entropic_value: Tensor  # [B]
    marginal_error: Tensor  # [B]
    iterations: Tensor  # [B] int64
    feasible: Tensor  # [B] bool
    _source: tuple[Tensor, ...]  # cost [B, N, M], or x [B, N, D] and y [B, M, D]
    _kind: str  # "dense", or the cost of the features
    _epsilon: Tensor  # [B]
    _mass: Tensor  # [B, N], a
    _tol: float
    _versions: tuple[int, ...]  # of the sources, epsilon and a
    _kept: dict[str, Tensor]

    @property
    def converged(self) -> Tensor:  # [B] bool
        """``marginal_error <= tol``; where tol is 0, at most a thousandth of the mass; then ``RuntimeError`` where ``a`` has been changed
        in place since."""
        if self._tol > 0:
            return self.marginal_error <= self._tol
        self._check_unchanged("converged", slice(len(self._source) + 1, None))
        return self.marginal_error <= 1e-3 * self._mass.sum(-1)

    @property
    def plan(self) -> Tensor:  # [B, N, M]
        """P = exp((f + g - C) / epsilon), differentiable as ``gradient`` says. From features it costs B N M memory and has no gradient.

        ``RuntimeError`` where the costs, features or epsilons have been changed in place since they were solved (such as by an
        optimiser's step) and the plan had not been read before. What compiled code has solved it keeps a copy of, and there is no error.
        """
        if "plan" not in self._kept:
            self._check_unchanged("plan", slice(len(self._source) + 1))
            first, last = self._source[0], self._source[-1]
            cost = first if self._kind == "dense" else reference.cost_matrix(first, last, self._kind)
            plan = self._plan_of(cost, self.f)
            if not torch.is_grad_enabled() and (self.f.requires_grad or first.requires_grad or _in_inference_mode()):
                return plan  # where gradients are recorded it is another one
            self._kept["plan"] = plan
        return self._kept["plan"]

    def apply(
        self,
        y: Tensor,  # [B, M, D]
    ) -> Tensor:  # [B, N, D]
        """P @ y, differentiable in y; from features a block of rows at a time. Divide by the row sums for the barycentric projection."""
        shape, known = ("[M, D]", "[M]") if self.g.dim() == 1 else ("[B, M, D]", "[B, M]")
        if not isinstance(y, Tensor) or y.dim() != self.g.dim() + 1 or y.shape[:-1] != self.g.shape:
            raise ValueError(
                f"SinkhornResult.apply: y must have shape {shape} with {known} = {list(self.g.shape)}; got {_checks.describe(y)}"
            )
        y = y.to(self.f.dtype)
        with without_autocast(y.device.type):
            if self._kind == "dense" or "plan" in self._kept:
                return self.plan @ y
            self._check_unchanged("apply", slice(len(self._source) + 1))
            x, points = self._source
            step = max(1, ROWS_AT_ONCE // max(1, self.g.numel()))
            blocks = [
                self._plan_of(reference.cost_matrix(rows, points, self._kind), f) @ y
                for rows, f in zip(x.split(step, -2), self.f.split(step, -1), strict=True)
            ]
            return torch.cat(blocks, dim=-2)

    def __getstate__(self) -> dict[str, object]:
        """For copies, whose tensors count their changes anew: of each, whether it has been changed since it was solved."""
        now = _versions_of(*self._source, self._epsilon, self._mass)
        return vars(self) | {"_versions": tuple(new > old for new, old in zip(now, self._versions, strict=False))}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        now = _versions_of(*self._source, self._epsilon, self._mass)
        changed = self._versions
        vars(self)["_versions"] = tuple(new - was for new, was in zip(now, changed, strict=False))

    def _check_unchanged(self, what: str, part: slice) -> None:
        now = _versions_of(*self._source, self._epsilon, self._mass)[part]
        if any(new > old for new, old in zip(now, self._versions[part], strict=False)):
            raise RuntimeError(
                f"SinkhornResult.{what}: what was solved has been changed in place since, such as by an optimiser's step; read "
                f"{'converged' if what == 'converged' else 'plan'} before that, or solve for a copy"
            )

    def __repr__(self) -> str:
        sizes = " x ".join(str(size) for size in (*self.f.shape, self.g.shape[-1]))
        return f"SinkhornResult({sizes}, {str(self.f.dtype).removeprefix('torch.')} on {self.f.device})"

    def _plan_of(self, cost: Tensor, f: Tensor) -> Tensor:
        single = f.dim() == 1
        if single:
            cost, f = cost.unsqueeze(0), f.unsqueeze(0)
        g = self.g.unsqueeze(0) if single else self.g
        if backend.native_serves(cost.device):
            plan: Tensor = _calls.call(
                "sinkhorn_plan", cost.contiguous(), f.contiguous(), g.contiguous(), self._epsilon
            )
        else:
            plan = reference.plan(cost, f, g, self._epsilon)
        return plan.squeeze(0) if single else plan


def result_of(
    solution: reference.Solution,
    problem: Problem,
    source: tuple[Tensor, ...],  # as in SinkhornResult, with the batch
    kind: str,
    *,
    single: bool,
    envelope: bool,
) -> SinkhornResult:
    """The result for the user: one problem without its batch; by the envelope, everything but the entropic value detached."""
    epsilon, (mass,) = problem.epsilon, _constants(problem.a)
    if envelope or not torch.is_grad_enabled():
        value = solution.entropic_value
        solution = reference.Solution(*_constants(*solution))._replace(entropic_value=value)
        *fixed, epsilon = _constants(*source, epsilon)
        source = tuple(fixed)
    if torch.compiler.is_compiling():  # nothing counts changes there, so the result has copies that nobody changes
        source, epsilon, mass = tuple(t.clone() for t in source), epsilon.clone(), mass.clone()
    if single:
        solution = reference.Solution(*(t.squeeze(0) for t in solution))
        source, mass = tuple(t.squeeze(0) for t in source), mass.squeeze(0)
    return SinkhornResult(*solution, source, kind, epsilon, mass, problem.tol, _versions_of(*source, epsilon, mass), {})


def _versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """How often each has been written to; tensors of inference mode do not count, nor does anything while compiling."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(-1 if x.is_inference() else x._version for x in tensors)


def _constants(*tensors: Tensor) -> list[Tensor]:
    all_of_them = may_want_gradient()  # while compiling and under torch.func, which do not tell
    return [x.detach() if all_of_them or x.requires_grad else x for x in tensors]


def _in_inference_mode() -> bool:
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
