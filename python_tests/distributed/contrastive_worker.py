# SPDX-License-Identifier: MIT
"""One rank of several that `test_contrastive_distributed.py` starts: losses of its embeddings among everybody's, and gradients.

python contrastive_worker.py RANK WORLD_SIZE STORE OUTPUT BACKEND
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from protokernels import backend, cross_view_loss, nt_xent_loss, supcon_loss

FORMS = ("supcon", "in", "paper", "negout")
D = 19
SETTINGS = [(0.1, True), (0.01, True), (2.0, False), (1e-4, False)]
"""Temperature, normalize; scores are up to 4e5."""
CASES = [(form, gather) for form in FORMS for gather in (True, "ring")]
CROSSING = [
    (denominator, symmetric, gather)
    for denominator in ("all", "negatives")
    for symmetric in (True, False)
    for gather in (True, "ring")
]
PAIRS = [(denominator, gather) for denominator in ("all", "negatives") for gather in (True, "ring")]


def embeddings(world_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """All ranks' embeddings and labels, and where each rank's part begins: uneven parts, and nothing for the last rank but one."""
    generator = torch.Generator().manual_seed(world_size)
    sizes = [17 + 6 * rank for rank in range(world_size)]
    if world_size > 2:
        sizes[-2] = 0
    cuts = [sum(sizes[:rank]) for rank in range(world_size + 1)]
    x = torch.randn(cuts[-1], D, generator=generator)
    return x, torch.randint(-1, 6, (cuts[-1],), generator=generator), cuts


def losses_of_rank(rank: int, world_size: int) -> list[Any]:
    x, labels, cuts = embeddings(world_size)
    mine = slice(cuts[rank], cuts[rank + 1])
    results: list[Any] = []
    for form, gather in CASES:
        for temperature, normalize in SETTINGS:
            leaf = x[mine].clone().requires_grad_()
            options = {"temperature": temperature, "form": form, "normalize": normalize, "ignore_index": -1}
            loss = supcon_loss(leaf, labels[mine], gather=gather, **options)  # type: ignore[arg-type]
            losses = supcon_loss(leaf.detach(), labels[mine], gather=gather, reduction="none", **options)  # type: ignore[arg-type]
            loss.backward()
            results.append((loss.detach(), losses, leaf.grad))
    half = (cuts[rank + 1] - cuts[rank]) // 2
    for denominator, gather in PAIRS:
        leaf = x[mine][: 2 * half].clone().requires_grad_()
        loss = nt_xent_loss(leaf[:half], leaf[half:], denominator=denominator, gather=gather)  # type: ignore[arg-type]
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for denominator, symmetric, gather in CROSSING:
        for temperature, normalize in SETTINGS:
            first, second = (view.clone().requires_grad_() for view in (x[mine], x.flip(1)[mine]))
            loss = cross_view_loss(
                first,
                second,
                temperature=temperature,
                denominator=denominator,
                symmetric=symmetric,
                normalize=normalize,
                gather=gather,
            )  # type: ignore[arg-type]
            loss.backward()
            results.append((loss.detach(), first.grad, second.grad))
    return results


def main(rank: int, world_size: int, store: str, output: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    with backend.use(name):  # type: ignore[arg-type]
        torch.save(losses_of_rank(rank, world_size), output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
