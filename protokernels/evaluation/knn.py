# SPDX-License-Identifier: MIT
"""k nearest neighbours, exact and in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import check_embeddings, check_labels

MATRIX_ENTRIES = 1 << 22  # float64 distances held at a time: 32 MiB, so that the allocator reuses the block
SPARE = 16  # candidates beyond k that are compared exactly


def knn_predict(
    train_embeddings: Tensor,  # [M, D]
    train_labels: Tensor,  # [M] int64
    queries: Tensor,  # [N, D]
    *,
    k: int = 5,
    num_classes: int,
    chunk: int | None = None,
) -> Tensor:  # [N] int64
    """Predicts the majority label of the k nearest training samples by squared Euclidean distance.

    Candidates come from |x|^2 + |y|^2 - 2 x.y in float64, one matrix product per chunk of queries, so that the N x M
    matrix never exists. That form cancels for near neighbours; therefore the k + 16 best are compared again by sum_d
    (x_d - y_d)^2, and where rounding could have pushed a neighbour out of these candidates the query is compared with
    the whole bank. The result is that of the direct float64 sum over d = 0, 1, ... for every pair, whatever the chunk
    or the number of threads.

    Args:
        train_embeddings: the bank, any floating-point dtype.
        train_labels: its labels.
        queries: samples to predict.
        k: number of neighbours, at most M.
        num_classes: number of classes.
        chunk: queries at a time; None: as many as keep the distances at 32 MiB.

    Returns:
        Labels on the device of ``queries``. Of labels with equally many votes the smallest wins; of samples at equal
        distance the one with the lower index is the nearer.

    Raises:
        ValueError: NaN or infinity, wrong shapes, labels out of range, or k larger than the bank.

    Example:
        >>> bank, labels = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([0, 0, 1])
        >>> knn_predict(bank, labels, torch.tensor([[9.0], [0.4]]), k=1, num_classes=2).tolist()
        [1, 0]
    """
    caller = "knn_predict"
    check_embeddings(caller, "train_embeddings", train_embeddings)
    check_labels(caller, "train_labels", train_labels, length=len(train_embeddings), upper=num_classes)
    if queries.ndim != 2 or queries.shape[1] != train_embeddings.shape[1]:
        raise ValueError(
            f"{caller}: queries must have the shape [N, {train_embeddings.shape[1]}]; got {list(queries.shape)}"
        )
    if not 1 <= k <= len(train_embeddings):
        raise ValueError(f"{caller}: k must lie in 1..{len(train_embeddings)}, the size of the bank; got {k}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{caller}: chunk must be at least 1 or None; got {chunk}")
    prediction = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    if len(queries) == 0:
        return prediction
    check_embeddings(caller, "queries", queries)
    bank = train_embeddings.detach().to(queries.device, torch.float64)
    labels = train_labels.to(queries.device)
    rows = chunk or max(1, MATRIX_ENTRIES // len(bank))
    search = _Search(bank, k)
    for start in range(0, len(queries), rows):
        neighbours = search.nearest(queries[start : start + rows].detach().to(torch.float64))
        votes = torch.zeros(len(neighbours), num_classes, dtype=torch.int64, device=queries.device)
        votes.scatter_add_(1, labels[neighbours], torch.ones_like(neighbours))
        prediction[start : start + rows] = votes.argmax(dim=1)  # the first of equal maxima
    return prediction


class _Search:
    """Finds the k nearest rows of a bank."""

    def __init__(self, bank: Tensor, k: int) -> None:  # [M, D] float64
        self.bank, self.k = bank, k
        self.columns = bank.t().contiguous()  # [D, M]
        self.center = bank.mean(dim=0)  # distances do not change; the products, and so their rounding errors, shrink
        self.centered = bank - self.center
        self.norms = self.centered.square().sum(dim=1)  # [M]
        self.radius = self.norms.max().sqrt()

    def nearest(self, queries: Tensor) -> Tensor:  # [q, D] float64 -> [q, k] int64, nearest first
        centered = queries - self.center
        norms = centered.square().sum(dim=1)
        approximate = (norms[:, None] + self.norms).addmm_(centered, self.centered.t(), alpha=-2.0)  # [q, M]
        count = min(self.k + SPARE, len(self.bank))
        farthest, candidates = approximate.topk(count, dim=1, largest=False, sorted=True)
        candidates = candidates.sort(dim=1).values
        distances = torch.zeros_like(farthest)
        for dimension, column in enumerate(self.columns):
            difference = queries[:, dimension, None] - column[candidates]
            distances += difference * difference
        distances, order = distances.sort(dim=1, stable=True)  # stable: equal distances stay in order of index
        result = candidates.gather(1, order)[:, : self.k]
        if count < len(self.bank):
            # how much nearer than `farthest` a row left out may be: the rounding of the product form and the direct sum
            relative = 8.0 * (self.bank.shape[1] + 8) * torch.finfo(torch.float64).eps
            bound = relative * (norms.sqrt() + self.radius).square()
            doubtful = farthest[:, -1] - bound <= distances[:, self.k - 1]
            for row in doubtful.nonzero()[:, 0].tolist():
                result[row] = self._nearest_of_all(queries[row])
        return result

    def _nearest_of_all(self, query: Tensor) -> Tensor:  # [D] -> [k]
        distances = torch.zeros_like(self.norms)
        for dimension, column in enumerate(self.columns):
            difference = query[dimension] - column
            distances += difference * difference
        limit = distances.kthvalue(self.k).values
        inside = (distances <= limit).nonzero()[:, 0]  # ascending index; more than k where distances tie
        return inside[distances[inside].sort(stable=True).indices[: self.k]]
