# SPDX-License-Identifier: MIT
"""Other people's ways to find nearest neighbours, each as its users write it. A call starts from queries and bank, with no index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Found = tuple[Tensor, Tensor]  # squared distances [N, k], indices [N, k]
Call = Callable[[], Found]

BLOCK_MB = 512
"""torch keeps no more of the matrix of distances than this at a time."""
LEAVES_OUT = {
    "faiss, flat": "float32 order",
    "torch.cdist + topk": "float32 order",
    "torch.mm + topk": "float32 order",
    "torch.compile of mm + topk": "float32 order",
}


def blocks(queries: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
    return queries.split(max(1, BLOCK_MB * 2**18 // len(bank)))


def cdist_topk(queries: Tensor, bank: Tensor, k: int) -> Found:
    found = [torch.cdist(block, bank).topk(k, largest=False) for block in blocks(queries, bank)]
    return torch.cat([one.values for one in found]).square(), torch.cat([one.indices for one in found])


def one_block(block: Tensor, bank: Tensor, k: int) -> Found:
    distances = torch.addmm(bank.square().sum(1), block, bank.T, alpha=-2)
    found = distances.topk(k, largest=False)
    return found.values + block.square().sum(1, keepdim=True), found.indices


def mm_topk(queries: Tensor, bank: Tensor, k: int) -> Found:
    found = [one_block(block, bank, k) for block in blocks(queries, bank)]
    return torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found])


def faiss_flat(queries: Tensor, bank: Tensor, k: int) -> Call:
    import faiss  # type: ignore[import-not-found, unused-ignore]

    faiss.omp_set_num_threads(torch.get_num_threads())

    def call() -> Found:
        distances, indices = faiss.knn(queries.numpy(), bank.numpy(), k)
        return torch.from_numpy(distances), torch.from_numpy(indices)

    return call


def scikit_learn(queries: Tensor, bank: Tensor, k: int) -> Call:
    from sklearn.neighbors import NearestNeighbors

    def call() -> Found:
        model = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=torch.get_num_threads()).fit(bank.numpy())
        distances, indices = model.kneighbors(queries.numpy())
        return torch.from_numpy(distances).square(), torch.from_numpy(indices)

    return call


TORCH_PEERS = {"torch.cdist + topk": cdist_topk, "torch.mm + topk": mm_topk}
LIBRARY_PEERS = {"faiss, flat": ("faiss", faiss_flat), "scikit-learn, brute force": ("sklearn", scikit_learn)}
