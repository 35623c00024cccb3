# SPDX-License-Identifier: MIT
"""The op `sinkhorn` against its peers, on the CPU and on CUDA.

pytest benchmarks/bench_sinkhorn.py --results benchmarks/results/sinkhorn_cpu.json [-k 64x49x49] [--seconds 2]
pytest benchmarks/bench_sinkhorn.py --device cuda --results FILE.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import protokernels
from benchmarks import sinkhorn_peers as peers
from benchmarks.measure import peak_mb
from benchmarks.measure_cuda import EAGER, GRAPH, Bind
from benchmarks.sinkhorn_peers import Call, FeaturesProblem, Problem

OURS, IMPLICIT, GEOMLOSS = "protokernels", "protokernels, implicit", "geomloss, as many steps"
SIZES = "problems x N x M, iterations"


@dataclass(frozen=True)
class Case:
    """B problems between N and M unit vectors in 64 dimensions at cosine cost; `masked`: three in ten rows and columns are absent."""

    B: int
    N: int
    num_iters: int
    epsilon: float = 0.05
    masked: bool = False

    @property
    def name(self) -> str:
        extra = (", masked" if self.masked else "") + (f", eps {self.epsilon:g}" if self.epsilon != 0.05 else "")
        return f"{self.B}x{self.N}x{self.N}, {self.num_iters} it{extra}"

    def tensors(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """cost, a, b and a weight for the plan."""
        generator = torch.Generator(device).manual_seed(seed)
        x, y = (torch.randn(self.B, self.N, 64, generator=generator, device=device) for _ in range(2))
        unit = torch.nn.functional.normalize
        cost = 1 - unit(x, dim=2) @ unit(y, dim=2).mT
        masses = []
        for _ in range(2):
            present = torch.rand(self.B, self.N, generator=generator, device=device) >= 0.3 * self.masked
            present[:, 0] = True
            masses.append(present / present.sum(1, keepdim=True))
        return cost, *masses, torch.randn(cost.shape, generator=generator, device=device)

    def problem(self) -> Problem:
        return Problem(*self.tensors(), self.epsilon, self.num_iters)

    def limit(self, matrices: int, sweeps: int = 1) -> tuple[float, float]:
        """Two products with exp(-C / epsilon) in every iteration; so many matrices are read or written at least once."""
        pairs = self.B * self.N * self.N
        return 4.0 * pairs * self.num_iters * sweeps, 4.0 * matrices * pairs


CASES = [
    Case(64, 49, 50),
    Case(64, 49, 100),
    Case(64, 49, 100, masked=True),
    Case(64, 49, 100, epsilon=0.005),
    Case(16, 196, 100),
    Case(4, 1024, 50),
    Case(1, 4096, 10),
    Case(1, 4096, 100),
]
TO_TOLERANCE, TOLERANCE = [Case(64, 49, 1000), Case(16, 196, 1000)], 1e-3
SWEEP = [Case(1, N, 20) for N in (64, 128, 256, 512, 1024, 2048)]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def solve(p: Problem, cost: Tensor, gradient: Any) -> protokernels.SinkhornResult:
    return protokernels.sinkhorn(cost, p.a, p.b, epsilon=p.epsilon, num_iters=p.num_iters, gradient=gradient)


def our_plans(p: Problem) -> Call:
    return torch.no_grad()(lambda: solve(p, p.cost, "envelope").plan)


def our_values(p: Problem) -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(solve(p, leaf, "envelope").entropic_value.sum(), leaf)[0]


def our_plan_gradients(p: Problem, gradient: str = "unrolled") -> Call:
    leaf = p.cost.detach().clone().requires_grad_()
    return lambda: torch.autograd.grad(solve(p, leaf, gradient).plan, leaf, p.weight)[0]


def distance(ours: Any, theirs: Any) -> float:
    """|ours - theirs| relative to the length of theirs: single elements cancel."""
    expected = np.stack(theirs) if isinstance(theirs, list) else np.asarray(theirs)
    return float(np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected))


def admit(name: str, ours: Call, peer: Call) -> None:
    """Skips a peer that does not compute the same thing, or fails: at a small epsilon some give NaN."""
    try:
        apart = distance(ours(), peer())
    except Exception as error:
        pytest.skip(f"{name} fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
    if not apart <= peers.ALLOWED.get(name, 1e-3):
        pytest.skip(f"{name} gives something else: {apart:.2g} of its length apart")


def peer_call(name: str, table: dict[str, tuple[str, Callable[[Problem], Call]]], case: Case, p: Problem) -> Call:
    module, prepare = table[name]
    pytest.importorskip(module, reason=f"{name}: {module} is not installed")
    if case.masked and name not in peers.TAKE_MASKS:
        pytest.skip(f"{name} has no masks")
    if "one by one" in name and case.N > 200:
        pytest.skip(f"{name}: minutes for a call")
    torch.compiler.reset()
    return prepare(p)


def facts(what: str, case: Case, name: str, **more: Any) -> dict[str, Any]:
    order = CASES.index(case) if case in CASES else case.N
    leaves_out = peers.LEAVES_OUT.get(name, "")
    return {
        "what": what, "case": case.name, "sizes": SIZES, "order": order, "contender": name, "leaves_out": leaves_out, **more,
    }  # fmt: skip


@EVERY_CASE
class TestForward:
    """Plans, written out."""

    def test_ours(self, benchmark: Any, contest: Any, case: Case) -> None:
        ours = our_plans(case.problem())
        contest(benchmark, ours, ours, limit=case.limit(2), **facts("forward", case, OURS))

    @pytest.mark.parametrize("name", peers.PLANS)
    def test_peer(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        p = case.problem()
        ours, peer = our_plans(p), peer_call(name, peers.PLANS, case, p)
        admit(name, ours, peer)
        contest(benchmark, peer, ours, **facts("forward", case, name))


@EVERY_CASE
class TestValue:
    """The entropic value and its gradient by the costs, by the envelope theorem where a peer knows it."""

    def test_ours(self, benchmark: Any, contest: Any, case: Case) -> None:
        ours = our_values(case.problem())
        row = facts("value, forward and backward", case, OURS, peak_mb=peak_mb(ours))
        contest(benchmark, ours, ours, limit=case.limit(2), **row)

    @pytest.mark.parametrize("name", peers.VALUES)
    def test_peer(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        p = case.problem()
        ours, peer = our_values(p), peer_call(name, peers.VALUES, case, p)
        admit(name, ours, peer)
        contest(benchmark, peer, ours, **facts("value, forward and backward", case, name, peak_mb=peak_mb(peer)))


@EVERY_CASE
class TestPlanGradient:
    """The gradient of <W, P> by the costs: exact for the iterations made, or at convergence."""

    @pytest.mark.parametrize("name", [OURS, IMPLICIT])
    def test_ours(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        if name == IMPLICIT and case.N > 1024:
            pytest.skip("few iterations: not converged, so not comparable")
        ours = our_plan_gradients(case.problem(), "implicit" if name == IMPLICIT else "unrolled")
        sweeps = 1 if name == IMPLICIT else 3
        contest(benchmark, ours, ours, limit=case.limit(4, sweeps), **facts("gradient through the plan", case, name))

    @pytest.mark.parametrize("name", peers.PLAN_GRADIENTS)
    def test_peer(self, benchmark: Any, contest: Any, case: Case, name: str) -> None:
        if case.N > 1024:
            pytest.skip(f"{name}: keeps every iteration's matrices")
        p = case.problem()
        kind = "implicit" if "implicit" in name else "unrolled"
        ours, peer = our_plan_gradients(p, kind), peer_call(name, peers.PLAN_GRADIENTS, case, p)
        admit(name, ours, peer)
        against = IMPLICIT if kind == "implicit" else OURS
        contest(benchmark, peer, ours, **facts("gradient through the plan", case, name, against=against))


@pytest.mark.parametrize("name", [OURS, *peers.TO_TOLERANCE])
@pytest.mark.parametrize("case", TO_TOLERANCE, ids=lambda case: case.name)
def test_to_tolerance(benchmark: Any, contest: Any, case: Case, name: str) -> None:
    """Plans whose rows miss their masses by no more than TOLERANCE, in sum; each stops by its own measure (POT: the root of the
    sum of squares), and the row says how far the worst of its problems is off."""
    p = case.problem()
    ours = contender = torch.no_grad()(
        lambda: protokernels.sinkhorn(p.cost, p.a, p.b, epsilon=p.epsilon, num_iters=p.num_iters, tol=TOLERANCE).plan
    )
    if name != OURS:
        module, prepare = peers.TO_TOLERANCE[name]
        pytest.importorskip(module, reason=f"{name}: {module} is not installed")
        contender = prepare(p, TOLERANCE)
    error = float(np.abs(np.asarray(contender()).sum(2) - p.a.numpy()).sum(1).max())
    row = facts("until rows miss their masses by less than 1e-3", case, name, row_error=error)
    contest(benchmark, contender, ours, **row)


def our_features(p: FeaturesProblem, backward: bool) -> Call:
    def value(x: Tensor, y: Tensor) -> Tensor:
        return protokernels.sinkhorn_features(x, y, epsilon=p.epsilon, num_iters=p.num_iters).entropic_value

    return p.call(value, backward)


@pytest.mark.parametrize("name", [OURS, *peers.FEATURES_ON_CPU])
@pytest.mark.parametrize("size", [(1, 4096, 64, 10), (8, 1024, 64, 20), (1, 4096, 64, 100)], ids=str)
def test_features(benchmark: Any, contest: Any, size: tuple[int, ...], name: str) -> None:
    """Value and gradients of features at cosine cost: the N x N costs are never stored."""
    B, N, D, num_iters = size
    generator = torch.Generator().manual_seed(0)
    p = FeaturesProblem(*(torch.randn(B, N, D, generator=generator) for _ in range(2)), 0.05, num_iters)
    ours = contender = our_features(p, True)
    if name != OURS:
        module, solve = peers.FEATURES_ON_CPU[name]
        pytest.importorskip(module, reason=f"{name}: {module} is not installed")
        contender = solve(p, True)
        apart = max(distance(one, other) for one, other in zip(ours(), contender(), strict=True))
        assert apart <= 1e-3, f"{name} gives something else: {apart:.2g} of its length apart"
    pairs = float(B * N * N)
    # A product in every iteration and one of the results; backward the same and two for the gradients.
    limit = (2.0 * D * pairs * (num_iters + 4), 16.0 * B * N * D) if name == OURS else None
    row = {"what": "features, forward and backward", "case": f"{B}x{N}x{N}, D = {D}, {num_iters} it", "sizes": SIZES,
           "peak_mb": peak_mb(contender)}  # fmt: skip
    contest(benchmark, contender, ours, limit=limit, **row, order=N * B, contender=name)


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"N = {case.N}")
@pytest.mark.parametrize("name", [OURS, "torch"])
def test_sweep(benchmark: Any, contest: Any, case: Case, name: str) -> None:
    """How time grows with N, one problem, 20 iterations; `size` is the number of pairs."""
    p = case.problem()
    ours = our_plans(p)
    contender = ours if name == OURS else peers.torch_plans(p)
    limit = case.limit(2) if name == OURS else None
    contest(benchmark, contender, ours, limit=limit, **facts("sweep over N x N", case, name, size=case.N**2))


def on_cuda(function: Callable[[Problem], Call], case: Case) -> Bind:
    def run(*tensors: Tensor) -> Any:
        return function(Problem(*tensors, case.epsilon, case.num_iters))

    return run


CUDA = {
    "forward": {
        OURS: our_plans,
        "torch": peers.torch_plans,
        "torch.compile": partial(peers.torch_plans, compiled=True),
        "POT solve_batch, log domain": partial(peers.pot_plans, method="log_sinkhorn"),
    },
    "value, forward and backward": {
        OURS: our_values,
        "torch, envelope": partial(peers.torch_values, unrolled=False),
        GEOMLOSS: peers.geomloss_values,
    },
    "gradient through the plan": {
        OURS: our_plan_gradients,
        IMPLICIT: partial(our_plan_gradients, gradient="implicit"),
        "torch, unrolled": peers.torch_plan_gradients,
    },
}


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [EAGER, GRAPH])
@pytest.mark.parametrize(("what", "name"), [(what, name) for what, table in CUDA.items() for name in table])
def test_on_cuda(cuda_contest: Any, case: Case, mode: str, what: str, name: str) -> None:
    """What the classes above measure, on CUDA."""
    module = "ot" if name.startswith("POT") else "geomloss" if name == GEOMLOSS else "torch"
    if find_spec(module) is None:
        pytest.skip(f"{name}: {module} is not installed")
    if name == GEOMLOSS and mode == GRAPH:
        pytest.skip(f"{name} waits for the device, which a graph cannot hold")
    if case.masked and not name.startswith(("torch", "protokernels")):
        pytest.skip(f"{name} has no masks")
    if what == "gradient through the plan" and case.N > 1024 and "torch" in name:
        pytest.skip(f"{name}: keeps every iteration's matrices")
    torch.compiler.reset()
    against = IMPLICIT if name == IMPLICIT else OURS
    ours, contender = (on_cuda(CUDA[what][each], case) for each in (against, name))
    is_ours = name in (OURS, IMPLICIT)
    sweeps = 3 if what == "gradient through the plan" and name == OURS else 1

    def agree(one: Tensor, other: Tensor) -> None:
        apart = distance(one.cpu(), other.cpu())
        if name in peers.ALLOWED and not apart <= peers.ALLOWED[name]:
            pytest.skip(f"{name} gives something else: {apart:.2g} of its length apart")
        assert name in peers.ALLOWED or apart <= 1e-3

    cuda_contest(
        ours if is_ours else contender,
        ours,
        case.tensors,
        mode=mode,
        limit=(*case.limit(2 if what == "forward" else 4, sweeps), "fp32") if is_ours else None,
        agree=None if is_ours else agree,
        **facts(what, case, name, against=against),
    )


FEATURES_ON_CUDA = [(1, 4096, 64, 10), (1, 4096, 64, 100), (1, 10240, 64, 100), (64, 196, 512, 50)]


@pytest.mark.cuda
@pytest.mark.parametrize("size", FEATURES_ON_CUDA, ids=lambda size: "{}x{}, D = {}, {} it".format(*size))
@pytest.mark.parametrize("mode", [EAGER, GRAPH])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("name", [OURS, *peers.FEATURES])
def test_features_on_cuda(cuda_contest: Any, size: tuple[int, ...], mode: str, backward: bool, name: str) -> None:
    B, N, D, num_iters = size
    module, solve = ("torch", our_features) if name == OURS else peers.FEATURES[name]
    if find_spec(module) is None:
        pytest.skip(f"{name}: {module} is not installed")
    if name == "flash-sinkhorn" and B > 1:
        pytest.skip(f"{name} takes one problem at a time")
    if name.startswith("torch") and B * N * N * num_iters > 2e9:
        pytest.skip(f"{name}: a minute for a row, at the rate of the smaller sizes")

    def draw(seed: int, device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(torch.randn(B, N, D, generator=generator, device=device) for _ in range(2))

    def bound(solve: Callable[[FeaturesProblem, bool], Call]) -> Bind:
        return lambda x, y: solve(FeaturesProblem(x, y, 0.05, num_iters), backward)

    def agree(one: Any, other: Any) -> None:
        """Values are compared as they are, since costs are about 1 and a value may be about 0; gradients by their norm."""
        if backward:
            apart = max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))
        else:
            apart = float((one.sum() - other.sum()).abs() / B)
        allowed = 5e-3 if backward and name == "flash-sinkhorn" else 1e-3
        if name == "flash-sinkhorn" and not apart <= allowed:
            pytest.skip(f"{name} gives something else: {apart:.2g} apart")
        assert apart <= allowed

    ours = bound(our_features)
    pairs = float(B * N * N)
    # An iteration is two products; backward makes the plan again and multiplies it with both clouds.
    flops, traffic = pairs * (4 * D * num_iters + 6 * D * backward), (8.0 + 8.0 * backward) * B * N * D
    cuda_contest(
        ours if name == OURS else bound(solve), ours, draw, mode=mode, limit=(flops, traffic, "3xtf32") if name == OURS else None,
        agree=None if name == OURS else agree, what="features, forward" + " and backward" * backward,
        case=f"{B}x{N}x{N}, D = {D}, {num_iters} it", sizes=SIZES, order=N * B, contender=name,
        leaves_out=peers.LEAVES_OUT.get(name, ""),
    )  # fmt: skip
