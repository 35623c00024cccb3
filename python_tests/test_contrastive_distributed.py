# SPDX-License-Identifier: MIT
"""Contrast over ranks: several gloo processes against one that holds all embeddings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import _native
from protokernels.ops._contrastive_distributed import _ReferenceKernel, class_ranges
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
    for form in ("supcon", "negout"):  # nt_xent_loss: partners are on the same rank
        halves = [(b - a) // 2 for a, b in pairwise(cuts)]
        parts = [x[a : a + 2 * half] for a, half in zip(cuts, halves, strict=False)]
        pairs = [torch.arange(half).repeat(2) + 1000 * rank for rank, half in enumerate(halves)]
        edges = [0, *torch.tensor([2 * half for half in halves]).cumsum(0).tolist()]
        means, _, grad = whole(torch.cat(parts), torch.cat(pairs), edges, form, 0.5, True)
        check_close(torch.stack([rank[index][0] for rank in ranks]), means, rounding(torch.float32, worker.D, 0.5))
        scale = grad.abs().max().item()
        check_close(torch.cat([rank[index][1] for rank in ranks]) / scale, grad / scale, 1e-5)
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
