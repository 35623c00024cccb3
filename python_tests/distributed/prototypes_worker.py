# SPDX-License-Identifier: MIT
"""One rank of the two that `test_nn_prototypes.py` starts: trains `nn.Prototypes` on its part of every batch, saves what it holds.

python prototypes_worker.py RANK WORLD_SIZE STORE OUTPUT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from protokernels.nn import Prototypes

K, D = 6, 5
# rows of every batch, and where the second half of the ranks begins: even, uneven, nothing for one of the halves, one row
BATCHES = [(64, 32), (10, 7), (12, 12), (9, 0), (1, 1), (40, 20)]


def batches(dtype: torch.dtype) -> list[Tensor]:
    """The same rows on every rank; groups far from zero, so that rounding moves no label."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(K, D, generator=generator, dtype=torch.float64) * 3
    made = []
    for B, _ in BATCHES:
        rows = centres[torch.randint(0, K, (B,), generator=generator)]
        made.append((rows + 0.1 * torch.randn(B, D, generator=generator, dtype=torch.float64)).to(dtype))
    return made


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)


def given_start(module: Prototypes, dtype: torch.dtype) -> Prototypes:
    module.prototypes.copy_(start(dtype))
    module.initialized.fill_(True)
    return module.train()


def train(module: Prototypes, parts: list[Tensor]) -> dict[str, Any]:
    """Assignments and gradients of every part, prototypes and counts after it."""
    history: dict[str, Any] = {"assignments": [], "gradients": [], "prototypes": [], "counts": []}
    for part in parts:
        z = part.clone().requires_grad_()
        c = module(z)
        c.square().sum().backward()
        history["assignments"].append(c.detach())
        history["gradients"].append(z.grad)
        history["prototypes"].append(module.prototypes.clone())
        history["counts"].append(module.last_counts.clone())
    return history


def share(rows: Tensor, cut: int, rank: int, world_size: int) -> Tensor:
    """The rows of a rank: what comes before the cut lies on the first half of the ranks."""
    parts = [part for half in (rows[:cut], rows[cut:]) for part in half.tensor_split(world_size // 2)]
    return parts[rank]


def main(rank: int, world_size: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        parts = [share(rows, cut, rank, world_size) for rows, (_, cut) in zip(batches(dtype), BATCHES, strict=True)]
        module = given_start(Prototypes(K, D, temperature=0.1, new_weight=0.9, dtype=dtype), dtype)
        results[str(dtype)] = train(module, parts)

    # every rank starts from rank 0's rows, whatever its own generator would have chosen
    own = batches(torch.float32)[0].chunk(world_size)[rank]
    module = Prototypes(K, D, new_weight=0.0, generator=torch.Generator().manual_seed(rank)).train()
    module(own)
    results["initial"] = module.prototypes.clone()

    # clusters 3 to 5 get no member on any rank, cluster 2 only on rank 1
    module = Prototypes(
        K, K, similarity="dot", new_weight=1.0, revive_after=2, generator=torch.Generator().manual_seed(rank)
    ).train()
    module.prototypes.copy_(torch.eye(K))
    module.initialized.fill_(True)
    rows = torch.eye(K)[[0, 1] if rank == 0 else [0, 2]] * (10 + rank)
    results["revival"] = []
    for _ in range(2):
        module(rows)
        results["revival"].append((module.prototypes.clone(), module.empty_updates.clone()))
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
