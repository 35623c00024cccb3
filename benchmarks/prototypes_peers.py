# SPDX-License-Identifier: MIT
"""Other people's ways to do what the op `prototypes` does, each as its users write it. A call is one step on one batch.

A step is: unit vectors, similarities, softmax, a label for each row, sums and counts of the clusters, moving average.
Where a peer leaves something out, `LEAVES_OUT` says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT = 0.95
LEAVES_OUT = {
    "vector-quantize-pytorch": "no soft assignment",
    "faiss KMeans, one iteration": "no soft assignment, no moving average",
    "scikit-learn MiniBatchKMeans": "no soft assignment, Euclidean",
    "flash-kmeans, one iteration": "no soft assignment, no moving average, products in tf32",
}


def soft_assignment(z: Tensor, q: Tensor, temperature: float) -> Tensor:
    return torch.softmax(F.normalize(z, dim=1) @ F.normalize(q, dim=1).T / temperature, dim=1)


def moved(q: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    mean = sums / counts.clamp(min=1).unsqueeze(1)
    return torch.where(counts.unsqueeze(1) > 0, WEIGHT * mean + (1 - WEIGHT) * q, q)


def by_index_add(z: Tensor, q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.zeros_like(q).index_add_(0, labels, z)
    counts = q.new_zeros(len(q)).index_add_(0, labels, z.new_ones(len(z)))
    return moved(q, sums, counts), counts


def argmax_index_add(z: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, ...]:
    c = soft_assignment(z, q, temperature)
    labels = c.argmax(dim=1)
    return c, labels, *by_index_add(z, q, labels)


def multinomial_index_add(z: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, ...]:
    c = soft_assignment(z, q, temperature)
    labels = torch.multinomial(c, 1).squeeze(1)
    return c, labels, *by_index_add(z, q, labels)


def one_hot_matmul(z: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, ...]:
    c = soft_assignment(z, q, temperature)
    labels = c.argmax(dim=1)
    members = F.one_hot(labels, len(q)).to(z.dtype)
    return c, labels, moved(q, members.T @ z, members.sum(dim=0)), members


def python_loop(z: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, ...]:
    c = soft_assignment(z, q, temperature)
    labels = c.argmax(dim=1)
    new = q.clone()
    for k in range(len(q)):
        members = z[labels == k]
        if len(members):
            new[k] = WEIGHT * members.mean(dim=0) + (1 - WEIGHT) * q[k]
    return c, labels, new


def vector_quantize(z: Tensor, q: Tensor, temperature: float) -> Callable[[], object]:
    from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-not-found, unused-ignore]

    layer = VectorQuantize(
        z.shape[1], len(q), use_cosine_sim=True, decay=1 - WEIGHT, commitment_weight=0.0, threshold_ema_dead_code=0
    ).train()
    layer = layer.to(z.device)
    batch = z.unsqueeze(0)

    def step() -> object:
        with torch.no_grad():
            return layer(batch)

    return step


def faiss_kmeans(z: Tensor, q: Tensor, temperature: float) -> Callable[[], object]:
    import faiss  # type: ignore[import-not-found, unused-ignore]

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, start = F.normalize(z, dim=1).numpy(), F.normalize(q, dim=1).numpy()
    every = {"min_points_per_centroid": 1, "max_points_per_centroid": len(rows) + 1}

    def step() -> object:
        kmeans = faiss.Kmeans(rows.shape[1], len(start), niter=1, spherical=True, **every)
        kmeans.train(rows, init_centroids=start)
        return kmeans.centroids

    return step


def flash_kmeans(z: Tensor, q: Tensor, temperature: float) -> Callable[[], object]:
    from flash_kmeans import batch_kmeans_Cosine  # type: ignore[import-not-found, unused-ignore]

    batch, start = z.unsqueeze(0), q.unsqueeze(0)
    return lambda: batch_kmeans_Cosine(batch, len(q), max_iters=1, init_centroids=start)


def scikit_learn(z: Tensor, q: Tensor, temperature: float) -> Callable[[], object]:
    from sklearn.cluster import MiniBatchKMeans

    rows = F.normalize(z, dim=1).numpy()
    model = MiniBatchKMeans(len(q), init=F.normalize(q, dim=1).numpy(), n_init=1, reassignment_ratio=0.0)
    model.partial_fit(rows)
    return lambda: model.partial_fit(rows)


TORCH_PEERS = {
    "torch argmax + index_add": argmax_index_add,
    "torch multinomial + index_add": multinomial_index_add,
    "torch one-hot matmul": one_hot_matmul,
    "torch loop over clusters": python_loop,
}
LIBRARY_PEERS = {
    "vector-quantize-pytorch": ("vector_quantize_pytorch", vector_quantize),
    "faiss KMeans, one iteration": ("faiss", faiss_kmeans),
    "scikit-learn MiniBatchKMeans": ("sklearn", scikit_learn),
}
CUDA_LIBRARY_PEERS = {
    "vector-quantize-pytorch": ("vector_quantize_pytorch", vector_quantize),
    "flash-kmeans, one iteration": ("flash_kmeans", flash_kmeans),
}
