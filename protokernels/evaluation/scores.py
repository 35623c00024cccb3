# SPDX-License-Identifier: MIT
"""Scores of predictions and of clusterings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .types import check_labels, described


def classification_scores(
    prediction: Tensor,  # [N] int64
    target: Tensor,  # [N] int64
    num_classes: int,
) -> dict[str, float]:
    """Accuracy, precision, recall and F1, with macro and weighted averages.

    Per class c: precision = hits / predicted, recall = hits / present, F1 = 2 hits / (predicted + present); 0/0 counts
    as 0. ``macro`` is the plain mean over the classes that occur in ``target`` or ``prediction``, ``weighted`` the mean
    weighted by how often they occur in ``target``, so that ``weighted_recall`` equals ``accuracy``. A prediction of
    ``num_classes`` or more (an output that stands for no class) is simply wrong.

    Returns:
        ``accuracy``, ``macro_precision``, ``macro_recall`` (the balanced accuracy), ``macro_f1``,
        ``weighted_precision``, ``weighted_recall``, ``weighted_f1`` and ``majority_rate``, the accuracy of always
        answering the most frequent class of ``target``.

    Raises:
        ValueError: no sample, wrong shapes, labels out of range.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import classification_scores
        >>> classification_scores(torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 0, 0]), num_classes=2)["accuracy"]
        0.75
    """
    caller = "classification_scores"
    if len(target) == 0:
        raise ValueError(f"{caller}: at least one sample is needed; got none")
    check_labels(caller, "target", target, length=len(target), upper=num_classes)
    fits = isinstance(prediction, Tensor) and prediction.dtype == torch.int64
    if not fits or prediction.shape != target.shape or int(prediction.min()) < 0:
        raise ValueError(
            f"{caller}: prediction must be int64 of shape [{len(target)}] and not negative; got {described(prediction)}"
        )
    prediction, target = prediction.cpu(), target.cpu()
    hits = torch.bincount(target[prediction == target], minlength=num_classes).double()
    predicted = torch.bincount(prediction[prediction < num_classes], minlength=num_classes).double()
    present = torch.bincount(target, minlength=num_classes).double()
    occurring = (predicted + present) > 0
    share = present / len(target)
    scores = {"accuracy": float(hits.sum() / len(target))}
    per_class = {
        "precision": hits / predicted.clamp(min=1.0),
        "recall": hits / present.clamp(min=1.0),
        "f1": 2.0 * hits / (predicted + present).clamp(min=1.0),
    }
    scores |= {f"macro_{name}": float(values[occurring].mean()) for name, values in per_class.items()}
    scores |= {f"weighted_{name}": float((values * share).sum()) for name, values in per_class.items()}
    scores["majority_rate"] = float(share.max())
    return scores


def clustering_scores(
    clusters: Tensor,  # [N] int64
    target: Tensor,  # [N] int64
) -> dict[str, float]:
    """How well clusters agree with classes, without any training split.

    ``hungarian_accuracy`` matches clusters and classes one to one so that as many samples as possible agree; samples of
    clusters without a partner count as wrong, so with many more clusters than classes it is low even for pure clusters.
    The statistical mapping is many to one and rises with the number of clusters: the two are not comparable. The
    matching uses the labels that it scores, as is usual for this measure.

    Returns:
        ``nmi`` (normalised mutual information, arithmetic mean of the entropies), ``ari`` (adjusted Rand index),
        ``hungarian_accuracy``, and ``clusters_used``, the number of different clusters in ``clusters``.

    Raises:
        ValueError: no sample or wrong shapes.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import clustering_scores
        >>> scores = clustering_scores(torch.tensor([5, 5, 7, 9]), torch.tensor([0, 0, 1, 1]))
        >>> scores["hungarian_accuracy"], scores["clusters_used"]
        (0.75, 3.0)
    """
    caller = "clustering_scores"
    for name, values in (("clusters", clusters), ("target", target)):
        fits = isinstance(values, Tensor) and values.dtype == torch.int64 and values.ndim == 1
        if not fits or len(values) == 0 or len(values) != len(target):
            raise ValueError(
                f"{caller}: {name} must be int64 of shape [N], the same N of at least 1 for both; got "
                f"{described(values)}"
            )
    try:
        from scipy.optimize import linear_sum_assignment
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError as error:
        raise ImportError('clustering_scores needs scikit-learn: pip install "protokernels[train]"') from error
    classes, target_rank = np.unique(target.cpu().numpy(), return_inverse=True)
    used, cluster_rank = np.unique(clusters.cpu().numpy(), return_inverse=True)
    pairs = cluster_rank * len(classes) + target_rank
    table = np.bincount(pairs, minlength=len(used) * len(classes)).reshape(len(used), len(classes))
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "nmi": float(normalized_mutual_info_score(target_rank, cluster_rank)),
        "ari": float(adjusted_rand_score(target_rank, cluster_rank)),
        "hungarian_accuracy": float(table[rows, columns].sum() / len(target_rank)),
        "clusters_used": float(len(used)),
    }
