# SPDX-License-Identifier: MIT
"""Other people's ways to solve a batch of entropic transport problems, each as its users write it.

A function of `PLANS`, `VALUES` and `PLAN_GRADIENTS` takes a problem, one of `FEATURES` clouds of features, and gives a call that makes
all iterations, no early stop; what a library needs in a form of its own is converted before. Masses are uniform over what the
masks leave; only the peers in `TAKE_MASKS` can do with masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    cost: Tensor  # [B, N, M]
    a: Tensor  # [B, N]
    b: Tensor  # [B, M]
    weight: Tensor  # [B, N, M]
    epsilon: float
    num_iters: int

    def numpy(self) -> tuple[Any, ...]:
        return tuple(x.numpy() for x in (self.cost, self.a, self.b, self.weight))


# ------------------------------------------------------------------------------------------------------------ torch


def log_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """Log domain, two log-sum-exps an iteration, as in SuperGlue."""
    scores, log_a, log_b = -cost / epsilon, a.log(), b.log()
    u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(num_iters):
        u = log_a - torch.logsumexp(scores + v.unsqueeze(1), 2)
        v = log_b - torch.logsumexp(scores + u.unsqueeze(2), 1)
    return scores + u.unsqueeze(2) + v.unsqueeze(1)


def torch_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iters: int) -> Tensor:
    return log_plan(cost, a, b, epsilon, num_iters).exp()


def torch_value(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, num_iters: int, unrolled: bool) -> Tensor:
    with torch.set_grad_enabled(unrolled):
        log_p = log_plan(cost, a, b, epsilon, num_iters)
    plan = log_p.exp()
    return (plan * cost).sum() + epsilon * torch.special.entr(plan).neg().sum() - epsilon * plan.sum()


def torch_plans(p: Problem, compiled: bool = False) -> Call:
    solve = torch.compile(torch_plan, dynamic=False) if compiled else torch_plan
    return torch.no_grad()(partial(solve, p.cost, p.a, p.b, p.epsilon, p.num_iters))


def torch_values(p: Problem, unrolled: bool) -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(torch_value(leaf, p.a, p.b, p.epsilon, p.num_iters, unrolled), leaf)[0]


def torch_plan_gradients(p: Problem) -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(torch_plan(leaf, p.a, p.b, p.epsilon, p.num_iters), leaf, p.weight)[0]


def torch_to_tolerance(p: Problem, tol: float) -> Call:
    """All problems go on until the last has converged; looked at every ten iterations, as the libraries do."""

    def solve() -> Tensor:
        scores, log_a, log_b = -p.cost / p.epsilon, p.a.log(), p.b.log()
        v = torch.zeros_like(log_b)
        for t in range(p.num_iters):
            u = log_a - torch.logsumexp(scores + v.unsqueeze(1), 2)
            v = log_b - torch.logsumexp(scores + u.unsqueeze(2), 1)
            if t % 10 == 9:
                plan = (scores + u.unsqueeze(2) + v.unsqueeze(1)).exp()
                if float((plan.sum(2) - p.a).abs().sum(1).max()) < tol:
                    break
        return plan

    return torch.no_grad()(solve)


# -------------------------------------------------------------------------------------------------------------- POT


def pot_batch(cost: Tensor, p: Problem, method: str, grad: str, tol: float = 0.0) -> Any:
    import ot.batch  # type: ignore[import-not-found, unused-ignore]

    return ot.batch.solve_batch(
        cost, reg=p.epsilon, a=p.a, b=p.b, max_iter=p.num_iters, tol=tol, method=method, grad=grad
    )


def pot_plans(p: Problem, tol: float = 0.0, *, method: str) -> Call:
    return lambda: pot_batch(p.cost, p, method, "detach", tol).plan


def pot_values(p: Problem) -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(pot_batch(leaf, p, "log_sinkhorn", "envelope").value.sum(), leaf)[0]


def pot_plan_gradients(p: Problem) -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(pot_batch(leaf, p, "log_sinkhorn", "autodiff").plan, leaf, p.weight)[0]


def pot_loop(p: Problem) -> Call:
    import ot

    rows = list(zip(*p.numpy()[:3], strict=True))

    def run() -> Any:
        return [
            ot.sinkhorn(a, b, c, p.epsilon, method="sinkhorn_log", numItermax=p.num_iters, stopThr=0.0, warn=False)
            for c, a, b in rows
        ]

    return run


# ---------------------------------------------------------------------------------------------------------- geomloss


def geomloss_values(p: Problem) -> Call:
    """Its symmetric updates, as many as ours: one scaling step each."""
    from geomloss import SamplesLoss  # type: ignore[import-not-found, unused-ignore]

    diameter = float(p.cost.max())
    leaf = p.cost.detach().clone().requires_grad_()
    scaling = (p.epsilon / diameter) ** (1 / p.num_iters)
    x, y = torch.zeros(*p.a.shape, 1, device=p.a.device), torch.ones(*p.b.shape, 1, device=p.b.device)

    def cost(rows: Tensor, _columns: Tensor) -> Tensor:  # asked for from both sides; either has the whole derivative
        return leaf if float(rows[0, 0, 0]) == 0 else leaf.detach().mT

    loss = SamplesLoss(
        p=1, blur=p.epsilon, diameter=diameter, scaling=scaling, debias=False, backend="tensorized", cost=cost
    )
    return lambda: torch.autograd.grad(loss(p.a, x, p.b, y).sum(), leaf)[0]


# --------------------------------------------------------------------------------------------- features at cosine cost


@dataclass(frozen=True)
class FeaturesProblem:
    x: Tensor  # [B, N, D]
    y: Tensor  # [B, N, D]
    epsilon: float
    num_iters: int

    def call(self, value: Callable[[Tensor, Tensor], Tensor], backward: bool) -> Call:
        """The values [B], or their gradients by x and y."""
        if not backward:
            return torch.no_grad()(lambda: value(self.x, self.y))
        leaves = [cloud.detach().clone().requires_grad_() for cloud in (self.x, self.y)]
        return lambda: torch.autograd.grad(value(*leaves).sum(), leaves)


def torch_features(p: FeaturesProblem, backward: bool) -> Call:
    """The matrix of costs written out; gradients by the envelope theorem."""
    masses = p.x.new_full(p.x.shape[:2], 1 / p.x.shape[1])

    def value(x: Tensor, y: Tensor) -> Tensor:
        cost = 1 - F.normalize(x, dim=2) @ F.normalize(y, dim=2).mT
        return torch_value(cost, masses, masses, p.epsilon, p.num_iters, False)

    return p.call(value, backward)


def flash_sinkhorn(p: FeaturesProblem, backward: bool) -> Call:
    """Half of the squared distance of unit vectors is the cosine cost, and its alternating updates come in the order of ours. Its value
    counts the entropy against the product of the masses: a constant away, which is subtracted."""
    from flash_sinkhorn import SamplesLoss  # type: ignore[import-not-found, unused-ignore]

    loss = SamplesLoss(
        "sinkhorn", backend="alternating", half_cost=True, eps=p.epsilon, n_iters=p.num_iters, use_epsilon_scaling=False,
        debias=False, normalize=False, allow_tf32=True, autotune=True,
    )  # fmt: skip
    constant = p.epsilon * (2 * math.log(p.x.shape[1]) + 1)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return loss(F.normalize(x[0], dim=1), F.normalize(y[0], dim=1)).view(1) - constant

    return p.call(value, backward)


def keops_features(p: FeaturesProblem, backward: bool) -> Call:
    """Lazy matrices of KeOps, two log-sum-exps an iteration; by the envelope theorem the gradient is that of the plan's mass."""
    from pykeops.torch import LazyTensor  # type: ignore[import-not-found, unused-ignore]

    log_mass = -math.log(p.x.shape[1])

    def score(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Any:
        rows, columns = LazyTensor(x.unsqueeze(2).contiguous()), LazyTensor(y.unsqueeze(1).contiguous())
        potentials = LazyTensor(u[:, :, None, None].contiguous()) + LazyTensor(v[:, None, :, None].contiguous())
        return potentials - (1 - (rows | columns)) / p.epsilon

    def value(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=2), F.normalize(y, dim=2)
        u, v = torch.zeros_like(x[:, :, 0]), torch.zeros_like(y[:, :, 0])
        with torch.no_grad():
            for _ in range(p.num_iters):
                u = log_mass - score(x, y, torch.zeros_like(u), v).logsumexp(dim=2).squeeze(-1)
                v = log_mass - score(x, y, u, torch.zeros_like(v)).logsumexp(dim=1).squeeze(-1)
            marginal = score(x, y, u, v).exp().sum(dim=2).squeeze(-1)
            known = p.epsilon * ((u * marginal).sum(1) + v.mean(1) - marginal.sum(1))
        mass = score(x, y, u, v).exp().sum(dim=2).sum((1, 2))
        return known - p.epsilon * (mass - mass.detach())

    return p.call(value, backward)


# ------------------------------------------------------------------------------------------------------------------ OTT


def ott_solver(p: Problem, tol: float = 0.0) -> tuple[Any, tuple[Any, ...]]:
    import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
    from ott.geometry import geometry  # type: ignore[import-not-found, unused-ignore]
    from ott.problems.linear import linear_problem  # type: ignore[import-not-found, unused-ignore]
    from ott.solvers.linear import sinkhorn  # type: ignore[import-not-found, unused-ignore]

    every = 10 if tol > 0 else p.num_iters  # iterations between two looks at the error
    solver = sinkhorn.Sinkhorn(
        threshold=tol, min_iterations=0 if tol > 0 else p.num_iters, max_iterations=p.num_iters, inner_iterations=every
    )

    def solve(c: Any, a: Any, b: Any) -> Any:
        return solver(linear_problem.LinearProblem(geometry.Geometry(c, epsilon=p.epsilon), a, b))

    return solve, tuple(jnp.asarray(x) for x in p.numpy())


def ott_plans(p: Problem, tol: float = 0.0) -> Call:
    import jax

    solve, (c, a, b, _) = ott_solver(p, tol)
    run = jax.jit(jax.vmap(lambda c, a, b: solve(c, a, b).matrix))
    return lambda: run(c, a, b).block_until_ready()


def ott_values(p: Problem) -> Call:
    import jax

    solve, (c, a, b, _) = ott_solver(p)
    run = jax.jit(jax.vmap(jax.grad(lambda c, a, b: solve(c, a, b).reg_ot_cost)))
    return lambda: run(c, a, b).block_until_ready()


def ott_plan_gradients(p: Problem) -> Call:
    import jax

    solve, (c, a, b, w) = ott_solver(p)
    run = jax.jit(jax.vmap(jax.grad(lambda c, a, b, w: (solve(c, a, b).matrix * w).sum())))
    return lambda: run(c, a, b, w).block_until_ready()


PLANS: dict[str, tuple[str, Callable[[Problem], Call]]] = {
    "torch": ("torch", torch_plans),
    "torch.compile": ("torch", partial(torch_plans, compiled=True)),
    "POT solve_batch, log domain": ("ot", partial(pot_plans, method="log_sinkhorn")),
    "POT solve_batch, scaling": ("ot", partial(pot_plans, method="sinkhorn")),
    "POT, one by one, log domain": ("ot", pot_loop),
    "OTT-JAX": ("ott", ott_plans),
}
TO_TOLERANCE: dict[str, tuple[str, Callable[[Problem, float], Call]]] = {
    "torch": ("torch", torch_to_tolerance),
    "POT solve_batch, log domain": ("ot", partial(pot_plans, method="log_sinkhorn")),
    "POT solve_batch, scaling": ("ot", partial(pot_plans, method="sinkhorn")),
    "OTT-JAX": ("ott", ott_plans),
}
VALUES: dict[str, tuple[str, Callable[[Problem], Call]]] = {
    "torch, envelope": ("torch", partial(torch_values, unrolled=False)),
    "torch, unrolled": ("torch", partial(torch_values, unrolled=True)),
    "POT solve_batch, envelope": ("ot", pot_values),
    "geomloss, as many steps": ("geomloss", geomloss_values),
    "OTT-JAX": ("ott", ott_values),
}
PLAN_GRADIENTS: dict[str, tuple[str, Callable[[Problem], Call]]] = {
    "torch, unrolled": ("torch", torch_plan_gradients),
    "POT solve_batch, unrolled": ("ot", pot_plan_gradients),
    "OTT-JAX, implicit": ("ott", ott_plan_gradients),
}
FEATURES: dict[str, tuple[str, Callable[[FeaturesProblem, bool], Call]]] = {
    "torch, the cost written out": ("torch", torch_features),
    "flash-sinkhorn": ("flash_sinkhorn", flash_sinkhorn),
}
FEATURES_ON_CPU: dict[str, tuple[str, Callable[[FeaturesProblem, bool], Call]]] = {
    "torch, the cost written out": ("torch", torch_features),
    "KeOps": ("pykeops", keops_features),
}
TAKE_MASKS = frozenset({"torch", "torch.compile", "torch, envelope", "POT solve_batch, scaling"})
"""Peers that accept masses of zero."""
LEAVES_OUT = {
    "POT solve_batch, scaling": "no log domain",
    "geomloss, as many steps": "symmetric updates while epsilon falls",
    "flash-sinkhorn": "products in tf32, one problem at a time",
}
ALLOWED = {
    "geomloss, as many steps": 0.2,
    "POT, one by one, log domain": 0.05,
    "OTT-JAX": 0.05,
    "OTT-JAX, implicit": 0.05,
}
"""How far the results of peers may be from ours that iterate another way or end with the other half-step."""
