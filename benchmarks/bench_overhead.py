# SPDX-License-Identifier: MIT
"""What a call costs besides its work: every public function on tiny inputs, beside one operator of torch and the plain PyTorch form.

pytest benchmarks/bench_overhead.py --threads 1 --results benchmarks/results/overhead_cpu.json [-k sinkhorn]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels as pk

CALLS, CALLS_OF_PLAIN = 200, 20
"""Calls in one measured round, some milliseconds at least; times are divided by it."""
OURS, OPERATOR, PLAIN = "protokernels", "torch.softmax", "plain PyTorch"
WAYS = ("forward", "forward and backward")
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A public function on a tiny input; the gradient, if there is one, goes to that input."""

    name: str
    input: Tensor
    call: Callable[[Tensor], Tensor]
    differentiable: bool = True


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z, other, prototypes, bank = normal(8, 16), normal(8, 16), normal(4, 16), normal(16, 16)
    labels, cost, points, more = torch.arange(8) % 4, normal(1, 8, 8).abs(), normal(1, 8, 4), normal(1, 8, 4)
    maps, classes = normal(2, 8, 8, 8), torch.arange(128).view(2, 8, 8) % 3
    images, params, numbers, center = (
        normal(2, 1, 8, 8),
        normal(2, 7).sigmoid(),
        normal(2).sigmoid(),
        normal(2, 2).sigmoid(),
    )
    matrix = torch.eye(2, 3).repeat(2, 1, 1)
    few: dict[str, Any] = {"epsilon": 0.1, "num_iters": 5}
    kept = prototypes.clone()  # the update in place works on this one
    return [
        Case("soft_assign", z, lambda x: pk.soft_assign(x, prototypes, temperature=0.1)),
        Case(
            "prototype_step", z, lambda x: pk.prototype_step(x, prototypes, temperature=0.1, new_weight=0.9).assignment
        ),
        Case("update_prototypes", z, lambda x: pk.update_prototypes(prototypes, x, labels, new_weight=0.9)[0], False),
        Case("update_prototypes_", z, lambda x: pk.update_prototypes_(kept, x, labels, new_weight=0.9)[0], False),
        Case("sinkhorn", cost, lambda x: pk.sinkhorn(x, **few).transport_cost),
        Case("sinkhorn_features", points, lambda x: pk.sinkhorn_features(x, more, **few).entropic_value),
        Case("sinkhorn_divergence", points, lambda x: pk.sinkhorn_divergence(x, more, **few)),
        Case("local_contrastive_loss", maps, lambda x: pk.local_contrastive_loss(x, classes, block_size=4)),
        Case("supcon_loss", z, lambda x: pk.supcon_loss(x, labels)),
        Case("nt_xent_loss", z, lambda x: pk.nt_xent_loss(x, other)),
        Case("cross_view_loss", z, lambda x: pk.cross_view_loss(x, other)),
        Case("transform", images, lambda x: pk.transform(x, params)),
        Case("gaussian_blur", images, lambda x: pk.gaussian_blur(x, numbers)),
        Case("gaussian_noise", images, lambda x: pk.gaussian_noise(x, numbers)),
        Case("soft_crop", images, lambda x: pk.soft_crop(x, center)),
        Case("blend_flip", images, lambda x: pk.blend_flip(x, numbers)),
        Case("rotate", images, lambda x: pk.rotate(x, numbers)),
        Case("affine_warp", images, lambda x: pk.affine_warp(x, matrix)),
        Case("nearest", z, lambda x: pk.nearest(x, bank, k=3).distances, False),
    ]


CASES = cases()


def repeated(case: Case, way: str, function: Callable[[Tensor], Tensor], calls: int, backend: str = "auto") -> Call:
    """``calls`` calls of ``function``, forward alone or with the gradient of the input."""
    x = case.input.clone().requires_grad_(way != WAYS[0])
    grad = torch.ones_like(function(x))

    def run() -> None:
        with pk.backend.use(backend):
            for _ in range(calls):
                y = function(x)
                if way != WAYS[0]:
                    torch.autograd.grad(y, x, grad)

    return run


@pytest.mark.parametrize("name", [OURS, OPERATOR, PLAIN])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_call(benchmark: Any, contest: Any, case: Case, way: str, name: str) -> None:
    if torch.get_num_threads() != 1:
        pytest.exit("the cost of a call is measured on one thread: pass --threads 1", returncode=3)
    if way != WAYS[0] and not case.differentiable:
        pytest.skip(f"{case.name} has no gradient")
    calls = CALLS_OF_PLAIN if name == PLAIN else CALLS
    ours = repeated(case, way, case.call, calls)
    contenders: dict[str, Callable[[], Call]] = {
        OURS: lambda: ours,
        OPERATOR: lambda: repeated(case, way, lambda x: torch.softmax(x, -1), calls),
        PLAIN: lambda: repeated(case, way, case.call, calls, "reference"),
    }
    shape = "x".join(map(str, case.input.shape))
    facts = {"what": f"a call, {way}", "case": f"{case.name}, {shape}", "sizes": "function, input"}
    contest(benchmark, contenders[name](), ours, calls=calls, order=CASES.index(case), contender=name, **facts)


def test_every_public_function_is_here() -> None:
    functions = {name for name in pk.__all__ if callable(getattr(pk, name)) and not isinstance(getattr(pk, name), type)}
    assert functions == {case.name for case in CASES}
