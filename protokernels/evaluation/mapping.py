# SPDX-License-Identifier: MIT
"""From clusters to classes by counting."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Representation, check_labels


def statistical_mapping(train: Representation, num_classes: int, num_clusters: int) -> Tensor:  # [num_clusters] int64
    """Gives each cluster the class that most of its training samples have.

    mapping_k = argmax_c #{i : clusters_i = k, labels_i = c}; ties go to the smallest class. A cluster without a
    training sample gets the most frequent class of the whole training split. A test sample is then predicted as
    ``mapping[clusters]``: its own label plays no part. Several clusters may map to one class, so more clusters can only
    help on the training split.

    Args:
        train: training split with clusters.
        num_classes: number of classes C.
        num_clusters: number of clusters K.

    Returns:
        The class of each cluster, on the device of the clusters.

    Raises:
        ValueError: no sample, no clusters, or a label or cluster out of range.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import Representation, statistical_mapping
        >>> train = Representation(torch.zeros(4, 1), torch.tensor([2, 2, 1, 0]), torch.tensor([0, 0, 0, 1]))
        >>> statistical_mapping(train, num_classes=3, num_clusters=3).tolist()
        [2, 0, 2]
    """
    caller = "statistical_mapping"
    if train.clusters is None:
        raise ValueError(
            f"{caller}: the training split has no clusters; pass Representation(embeddings, labels, clusters)"
        )
    if len(train) == 0:
        raise ValueError(f"{caller}: the training split is empty; at least one sample is needed")
    check_labels(caller, "labels", train.labels, length=len(train), upper=num_classes)
    check_labels(caller, "clusters", train.clusters, length=len(train), upper=num_clusters)
    pairs = train.clusters * num_classes + train.labels.to(train.clusters.device)
    counts = torch.bincount(pairs, minlength=num_clusters * num_classes).view(num_clusters, num_classes)
    seen = counts.sum(dim=1) > 0
    return torch.where(seen, counts.argmax(dim=1), counts.sum(dim=0).argmax())
