# SPDX-License-Identifier: MIT
"""All scores of a representation, the same way for every paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .knn import knn_predict
from .linear import LinearProtocol, linear_probe
from .mapping import statistical_mapping
from .scores import classification_scores, clustering_scores
from .types import Representation


@dataclass(frozen=True)
class EvaluationConfig:
    """How a representation is evaluated.

    Attributes:
        knn_k: number of neighbours.
        linear_protocol: ``"paper"``, ``"official"`` or ``"fair"``; see :func:`protokernels.evaluation.linear_probe`.
    """

    knn_k: int = 5
    linear_protocol: LinearProtocol = "paper"


def evaluate_representation(
    train: Representation,
    test: Representation,
    *,
    num_classes: int,
    num_clusters: int | None = None,
    config: EvaluationConfig | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Fits everything on ``train`` and scores it on ``test``.

    Args:
        train: split that the cluster map, the neighbours and the linear layer come from.
        test: split that is scored; its labels are used for nothing else.
        num_classes: number of classes.
        num_clusters: number of clusters; None: the largest cluster of both splits plus 1.
        config: k and the linear protocol.
        seed: of the linear probe.

    Returns:
        One dictionary of numbers per method, each as :func:`classification_scores` gives it: ``"statistical"``
        (cluster, then the mode of its training labels), ``"knn"``, ``"linear"``, and ``"majority"`` (always the most
        frequent training class: what any method has to beat). ``"clustering"`` holds :func:`clustering_scores` of the
        test split. ``"statistical"`` and ``"clustering"`` are left out where the splits have no clusters.

    Raises:
        ValueError: an empty split, NaN or infinity, clusters in one split only, or values out of range.
    """
    config = config if config is not None else EvaluationConfig()
    for name, split in (("train", train), ("test", test)):
        if len(split) == 0:
            raise ValueError(f"evaluate_representation: the {name} split is empty; at least one sample is needed")
    if (train.clusters is None) != (test.clusters is None):
        raise ValueError("evaluate_representation: either both splits have clusters or none; got them for one only")
    scores: dict[str, dict[str, float]] = {}
    if train.clusters is not None and test.clusters is not None:
        if num_clusters is None:
            num_clusters = 1 + int(max(train.clusters.max(), test.clusters.max()))
        mapping = statistical_mapping(train, num_classes, num_clusters)
        if int(test.clusters.max()) >= num_clusters:
            raise ValueError(
                f"evaluate_representation: test clusters must lie in 0..{num_clusters - 1}; got "
                f"{int(test.clusters.max())}"
            )
        scores["statistical"] = classification_scores(
            mapping.to(test.clusters.device)[test.clusters], test.labels, num_classes
        )
    neighbours = knn_predict(train.embeddings, train.labels, test.embeddings, k=config.knn_k, num_classes=num_classes)
    scores["knn"] = classification_scores(neighbours, test.labels, num_classes)
    probe = linear_probe(
        train.embeddings, train.labels, num_classes=num_classes, protocol=config.linear_protocol, seed=seed
    )
    scores["linear"] = classification_scores(probe.predict(test.embeddings), test.labels, num_classes)
    if test.clusters is not None:
        scores["clustering"] = clustering_scores(test.clusters, test.labels)
    majority = torch.bincount(train.labels, minlength=num_classes).argmax()
    scores["majority"] = classification_scores(
        majority.to(test.labels.device).expand(len(test)), test.labels, num_classes
    )
    return scores
