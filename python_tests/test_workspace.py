# SPDX-License-Identifier: MIT
"""What a call on the CPU takes from torch's allocator, against what "Memory" in `csrc/README.md` states.

A profiler sees every request. They are added up as if nothing were given back before the end, results and gradients with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import protokernels
from python_tests.places import needs_native

pytestmark = needs_native

draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
B, N, M, D, K, ROWS = 8, 300, 200, 32, 30, 3000
COST, X, Y = draw(B, N, M), draw(2, 600, 16), draw(2, 500, 16)
Z, QUERIES, PROTOTYPES, LABELS = draw(ROWS, D), draw(4000, D), draw(K, D), torch.arange(ROWS) % 5
MAPS, KINDS = draw(2, 16, 64, 64), torch.arange(2 * 64 * 64).reshape(2, 64, 64) // 100 % 3
IMAGES, PARAMS = draw(6, 2, 128, 100), draw(6, 7).sigmoid()
PROBLEMS, POINTS, PIXELS, PLANE = B * (N + M), 2 * (600 + 500), 2 * 64 * 64, 128 * 100


def requests(call: Callable[[], Any]) -> list[int]:
    """Bytes of every request of a call that was made once before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None
    events = watched.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def gradient(call: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    return lambda: torch.autograd.grad(call(*leaves).sum(), leaves)


def transport(cost: Tensor, iterations: int, way: str) -> Tensor:
    result = protokernels.sinkhorn(cost, epsilon=0.1, num_iters=iterations, gradient=way)  # type: ignore[arg-type]
    return result.entropic_value if way == "envelope" else result.transport_cost


def clouds(x: Tensor) -> Tensor:
    return protokernels.sinkhorn_features(x, Y, epsilon=0.1, num_iters=10, gradient="envelope").entropic_value


def supcon(z: Tensor) -> Tensor:
    return protokernels.supcon_loss(z, LABELS)


def local(maps: Tensor) -> Tensor:
    return protokernels.local_contrastive_loss(maps, KINDS, temperature=0.1, block_size=16)


def iterated(iterations: int, way: str) -> Callable[[Tensor], Tensor]:
    return lambda cost: transport(cost, iterations, way)


class Case(NamedTuple):
    call: Callable[[], Any]
    results: int  # numbers of four bytes, gradients among them; the rest likewise
    whole: float  # workspace of the call
    each: float  # and of each thread


CASES = {
    **{
        f"sinkhorn, {count} iterations": Case(partial(transport, COST, count, "unrolled"), 2 * PROBLEMS, 0, 1.2 * N * M)
        for count in (10, 100)
    },
    **{
        f"sinkhorn, {count} iterations, {way}": Case(
            gradient(iterated(count, way), COST), B * N * M + 2 * PROBLEMS, whole * PROBLEMS, each * N * M
        )
        for count in (10, 100)
        for way, whole, each in (("unrolled", count + 2, 3.5), ("implicit", 3, 4.5), ("envelope", 3, 1.2))
    },
    "sinkhorn_features": Case(partial(clouds, X), 2 * POINTS, 0, 3 * 1100 * 16),
    "sinkhorn_features, envelope": Case(gradient(clouds, X), 2 * POINTS + 1200 * 16, 8 * POINTS, 7 * 1100 * 16),
    "supcon_loss": Case(partial(supcon, Z), 1, ROWS * (2.2 * D + 16), 6000),
    "supcon_loss, gradient": Case(gradient(supcon, Z), ROWS * D, ROWS * (4.5 * D + 16), 26000),
    "local_contrastive_loss": Case(partial(local, MAPS), 1, PIXELS * (2.2 * 16 + 16), 6000),
    "local_contrastive_loss, gradient": Case(gradient(local, MAPS), PIXELS * 16, PIXELS * (4.5 * 16 + 16), 26000),
    "nearest, k 5": Case(partial(protokernels.nearest, QUERIES, Z, k=5), 3 * 4000 * 5, 100, 0),
    "nearest, k 100": Case(partial(protokernels.nearest, QUERIES, Z, k=100), 3 * 4000 * 100, 100, 0),
    "soft_assign": Case(partial(protokernels.soft_assign, Z, PROTOTYPES, temperature=1.0), ROWS * K, 2 * K * D, 0),
    "prototype_step": Case(
        partial(protokernels.prototype_step, Z, PROTOTYPES, temperature=1.0, new_weight=0.1),
        ROWS * (K + 2) + K * D,
        60 * K * D,
        0,
    ),
    "transform": Case(partial(protokernels.transform, IMAGES, PARAMS), IMAGES.numel(), 100, 5 * PLANE),
    "transform, gradient": Case(
        gradient(protokernels.transform, IMAGES, PARAMS), 2 * IMAGES.numel(), IMAGES.numel() + 200, 18 * PLANE
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_call_takes_what_is_stated(name: str, threads: int) -> None:
    case, before = CASES[name], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        taken = sum(requests(case.call)) / 4
    finally:
        torch.set_num_threads(before)
    stated = case.results + case.whole + threads * case.each
    print(f"{taken:,.0f} of {stated:,.0f}, {taken / stated:.2f}")
    assert 0.6 * stated < taken <= stated  # what is stated is not idle, either


def test_iterations_take_nothing() -> None:
    """Of Sinkhorn without a gradient, and with one that does not go through them: the same requests."""
    for call in (lambda n: transport(COST, n, "unrolled"), lambda n: gradient(iterated(n, "implicit"), COST)()):
        assert requests(partial(call, 10)) == requests(partial(call, 100))
