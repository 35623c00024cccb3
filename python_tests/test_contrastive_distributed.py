# SPDX-License-Identifier: MIT
"""Contrast over ranks: several gloo processes against one that holds all embeddings."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from protokernels import _native, cross_view_loss, supcon_loss
from protokernels import backend as backends
from protokernels.ops._contrastive_distributed import _ReferenceKernel, _Travel, class_ranges
from protokernels.reference import contrastive as reference
from python_tests import forks
from python_tests.contrastive_oracle import check_close, rounding
from python_tests.distributed import contrastive_worker as worker

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.LIBRARY is None, reason="the native library is not built")),
]


def run_ranks(folder: Path, world_size: int, backend: str) -> list[list[Any]]:
    words = [(rank, world_size, folder / "store", folder / f"{rank}.pt", backend) for rank in range(world_size)]
    forks.run_ranks(worker.__file__, folder, words)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def whole(
    x: Tensor, labels: Tensor, cuts: list[int], form: str, temperature: float, normalize: bool
) -> tuple[Tensor, ...]:
    """Mean of every rank's anchors, the losses, and the gradient of the sum of the means, from one process in float64."""
    leaf = x.double().requires_grad_()
    kept = labels != -1
    losses, anchors = reference.group_loss(
        reference.prepared(leaf[kept], normalize), labels[kept], None, temperature, form
    )
    everyone = torch.zeros(len(x), dtype=torch.float64).index_put((kept,), losses)
    is_anchor = torch.zeros(len(x), dtype=torch.bool).index_put((kept,), anchors)
    means = torch.stack([everyone[a:b].sum() / is_anchor[a:b].sum().clamp(min=1) for a, b in pairwise(cuts)])
    return means.detach(), everyone.detach(), torch.autograd.grad(means.sum(), leaf)[0]


def whole_crossing(
    first: Tensor, second: Tensor, cuts: list[int], form: str, temperature: float, symmetric: bool, normalize: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean of every rank's pairs, and the gradients of the sum of the means, from one process in float64."""
    views = [view.double().requires_grad_() for view in (first, second)]
    same = torch.eye(len(first), dtype=torch.bool)
    losses = torch.zeros(len(first), dtype=torch.float64)
    for a, b in [(0, 1), (1, 0)][: 1 + symmetric]:
        rows, columns = (reference.prepared(views[view], normalize) for view in (a, b))
        losses = losses + reference.pair_losses(rows, columns, same, ~same, temperature, form)[0] / (1 + symmetric)
    means = torch.stack([losses[a:b].sum() / max(1, b - a) for a, b in pairwise(cuts)])
    return means.detach(), torch.autograd.grad(means.sum(), views)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_with_everything(tmp_path: Path, world_size: int, backend: str) -> None:
    """Losses, and the gradient of the sum of all ranks' losses; gathered and passed round."""
    ranks = run_ranks(tmp_path, world_size, backend)
    x, labels, cuts = worker.embeddings(world_size)
    index = 0
    for form, _ in worker.CASES:
        for temperature, normalize in worker.SETTINGS:
            means, losses, grad = whole(x, labels, cuts, form, temperature, normalize)
            bound = rounding(torch.float32, worker.D, temperature)
            if not normalize:
                bound *= x.square().sum(1).max().item()
            check_close(torch.stack([rank[index][0] for rank in ranks]), means, bound)
            check_close(torch.cat([rank[index][1] for rank in ranks]), losses, bound)
            scale = grad.abs().max().item()
            check_close(torch.cat([rank[index][2] for rank in ranks]) / scale, grad / scale, min(4 * bound, 1e-4))
            index += 1
    for denominator, _ in worker.PAIRS:  # nt_xent_loss: partners are on the same rank
        form = {"all": "supcon", "negatives": "negout"}[denominator]
        halves = [(b - a) // 2 for a, b in pairwise(cuts)]
        parts = [x[a : a + 2 * half] for a, half in zip(cuts, halves, strict=False)]
        pairs = [torch.arange(half).repeat(2) + 1000 * rank for rank, half in enumerate(halves)]
        edges = [0, *torch.tensor([2 * half for half in halves]).cumsum(0).tolist()]
        means, _, grad = whole(torch.cat(parts), torch.cat(pairs), edges, form, 0.5, True)
        check_close(torch.stack([rank[index][0] for rank in ranks]), means, rounding(torch.float32, worker.D, 0.5))
        scale = grad.abs().max().item()
        check_close(torch.cat([rank[index][1] for rank in ranks]) / scale, grad / scale, 1e-5)
        index += 1
    for denominator, symmetric, _ in worker.CROSSING:  # cross_view_loss: a rank's pairs among everybody's
        form = {"all": "supcon", "negatives": "negout"}[denominator]
        for temperature, normalize in worker.SETTINGS:
            means, grads = whole_crossing(x, x.flip(1), cuts, form, temperature, symmetric, normalize)
            bound = rounding(torch.float32, worker.D, temperature)
            if not normalize:
                bound *= x.square().sum(1).max().item()
            check_close(torch.stack([rank[index][0] for rank in ranks]), means, bound)
            for view, grad in enumerate(grads):
                scale = grad.abs().max().item()
                found = torch.cat([rank[index][1 + view] for rank in ranks])
                check_close(found / scale, grad / scale, min(4 * bound, 1e-4))
            index += 1


def test_the_reference_within_autocast_multiplies_in_float32() -> None:
    x, labels, _ = worker.embeddings(2)
    rows, labels = reference.prepared(x, True), labels.sort().values
    kernel = _ReferenceKernel(0.1)
    ranges = class_ranges(labels, labels, True)

    def both() -> tuple[Tensor, Tensor]:
        statistics = kernel.statistics(rows, rows, ranges)
        own = statistics, torch.ones_like(statistics)
        return statistics, kernel.gradient(rows, rows, ranges, own, own)

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        found = both()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gather", [True, "ring"])
@pytest.mark.parametrize("crossing", [False, True], ids=["supcon", "cross_view"])
def test_other_derivatives_are_refused(backend: Any, gather: Any, crossing: bool) -> None:
    """They would lack what goes through the statistics and through the other ranks."""
    x, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3

    def loss(x: Tensor) -> Tensor:
        return cross_view_loss(x, x.flip(0), gather=gather) if crossing else supcon_loss(x, labels, gather=gather)

    with backends.use(backend):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="_loss: gather has no second derivative"):
            grad.square().sum().backward()
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=r"_loss: gather has no .* forward mode"),
        ):
            loss(forward_ad.make_dual(x, torch.ones_like(x)))
        for transformed in (torch.func.grad(loss), torch.func.vmap(lambda y: loss(y.expand_as(x)))):
            with pytest.raises(NotImplementedError, match=r"_loss: gather does not work under torch\.func"):
                transformed(x)


def test_round_a_ring_two_ranks_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that came in, one on its way among them, of six ranks with five rows each."""
    arrived: list[weakref.ref[Tensor]] = []

    def post(moves: list[SimpleNamespace]) -> list[Any]:
        arrived.extend(weakref.ref(move.part) for move in moves if move.what is dist.irecv)
        return []

    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 6)
    monkeypatch.setattr(dist, "all_gather", lambda counts, own: [count.copy_(own) for count in counts])
    monkeypatch.setattr(dist, "P2POp", lambda what, part, rank: SimpleNamespace(what=what, part=part, rank=rank))
    monkeypatch.setattr(dist, "batch_isend_irecv", post)
    most = 0
    for _, parts in _Travel(5, torch.device("cpu"), ring=True).round([torch.zeros(5, 3), torch.zeros(5)]):
        most = max(most, sum(part() is not None for part in arrived) // len(parts))
        del parts
    assert len(arrived) == 5 * 2 and most == 2
