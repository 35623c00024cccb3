# SPDX-License-Identifier: MIT
"""One rank of the two that `test_nn_sinkhorn.py` starts: assigns its part of every batch of scores and saves what it gets.

python sinkhorn_worker.py RANK WORLD_SIZE STORE OUTPUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from protokernels.nn import SinkhornAssignment

K = 5
# rows of every batch, and where the second half of the ranks begins: even, uneven, nothing for one of the halves, nothing at all
BATCHES = [(32, 16), (11, 7), (6, 6), (9, 0), (0, 0)]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(B, K, generator=generator) for B, _ in BATCHES]
    drawn[0][3, 1:] = drawn[1][:, 2] = -torch.inf  # a sample for one prototype alone, a prototype for no sample
    return drawn


def share(rows: Tensor, cut: int, rank: int, world_size: int) -> Tensor:
    """The rows of a rank: what comes before the cut lies on the first half of the ranks."""
    parts = [part for half in (rows[:cut], rows[cut:]) for part in half.tensor_split(world_size // 2)]
    return parts[rank]


def main(rank: int, world_size: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    parts = [share(rows, cut, rank, world_size) for rows, (_, cut) in zip(batches(), BATCHES, strict=True)]
    module = SinkhornAssignment(epsilon=0.3, num_iters=4)
    results = [module(part) for part in parts]
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
