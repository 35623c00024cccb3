# SPDX-License-Identifier: MIT
"""The label of the k nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.nearest import nearest
from .types import check_embeddings, check_labels


def knn_predict(
    train_embeddings: Tensor,  # [M, D]
    train_labels: Tensor,  # [M] int64
    queries: Tensor,  # [N, D]
    *,
    k: int = 5,
    num_classes: int,
) -> Tensor:  # [N] int64
    """Predicts the majority label of the k nearest training samples by squared Euclidean distance.

    The neighbours are those of ``protokernels.nearest``: exactly ranked, whatever the number of threads, without a matrix
    of all distances.

    Args:
        train_embeddings: the bank, any floating-point dtype.
        train_labels: its labels.
        queries: samples to predict.
        k: number of neighbours, at most M.
        num_classes: number of classes.

    Returns:
        Labels on the device of ``queries``. Of labels with equally many votes the smallest wins; of samples at equal
        distance the one with the lower index is the nearer.

    Raises:
        ValueError: NaN or infinity, wrong shapes, labels out of range, or k larger than the bank.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import knn_predict
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
    if len(queries) == 0:
        return torch.empty(0, dtype=torch.int64, device=queries.device)
    check_embeddings(caller, "queries", queries)
    neighbours = nearest(queries, train_embeddings.to(queries.device), k).indices
    votes = torch.zeros(len(queries), num_classes, dtype=torch.int64, device=queries.device)
    votes.scatter_add_(1, train_labels.to(queries.device)[neighbours], torch.ones_like(neighbours))
    return votes.argmax(dim=1)  # the first of equal maxima
