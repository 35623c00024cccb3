# SPDX-License-Identifier: MIT
"""Linear evaluation inside the test set: a probe that is fitted on one part of it and scored on another.

The protocol of Ruppli et al. 2022 (section 2.4): "trained with a test set of labeled data, not used in the previous training phase",
by three-fold cross-validation, for several hold-out sets. It asks whether the classes are linearly separable in the representation,
not what a user with the training labels would reach; for that see :func:`protokernels.evaluation.evaluate_transfer`.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .threads import one_thread
from .types import check_embeddings, check_labels

SETS, FOLDS = 3, 3


def hold_out_sets(
    labels: np.ndarray,  # [N] integers
    groups: np.ndarray | None = None,  # [N], whose image it is
    *,
    sets: int = SETS,
    seed: int = 0,
) -> list[np.ndarray]:  # [n] int64 indices each, ascending
    """Cuts the images into ``sets`` parts that share no group and have about the same shares of the classes.

    In plain scikit-learn: the test folds of ``StratifiedGroupKFold(sets, shuffle=True, random_state=seed)``, or of
    ``StratifiedKFold`` where no groups are known.

    Raises:
        ValueError: fewer groups, or images of a class, than parts.

    Example:
        >>> import numpy as np
        >>> from protokernels.evaluation import hold_out_sets
        >>> parts = hold_out_sets(np.array([0, 1] * 6), np.repeat(["a", "b", "c", "d", "e", "f"], 2))
        >>> [len(part) for part in parts]
        [4, 4, 4]
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    of = np.arange(len(labels)) if groups is None else groups
    for name, counts in (
        ("groups", [len(np.unique(of))]),
        ("images of a class", np.unique(labels, return_counts=True)[1]),
    ):
        if min(counts, default=0) < sets:
            raise ValueError(
                f"hold_out_sets: {sets} parts need at least {sets} {name}; got {min(counts, default=0)} among {len(labels)} images"
            )
    if groups is None:
        splits = StratifiedKFold(sets, shuffle=True, random_state=seed).split(of, labels)
    else:
        splits = StratifiedGroupKFold(sets, shuffle=True, random_state=seed).split(of, labels, groups)
    return [np.sort(test) for _, test in splits]


def cross_validated_auc(
    features: Tensor,  # [N, D] floating point
    labels: np.ndarray,  # [N], 0 and 1
    groups: np.ndarray | None = None,  # [N]
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> list[float]:  # one AUC per fold that can be scored
    """Area under the ROC curve of a linear probe in each fold of a stratified cross-validation that keeps groups together.

    The probe is a logistic regression (scikit-learn, C = 1) on features with the mean and deviation of the fold's training part.
    A fold whose training or scored part holds one class only is left out.

    Raises:
        ValueError: NaN or infinity, wrong shapes, labels other than 0 and 1, fewer groups or images of a class than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_embeddings("cross_validated_auc", "features", features)
    labels = np.asarray(labels)
    if labels.dtype.kind in "biu":  # whole numbers of any width, or True and False
        labels = labels.astype(np.int64)
    check_labels("cross_validated_auc", "labels", torch.as_tensor(labels), length=len(features), upper=2)
    x, areas = features.detach().cpu().double().numpy(), []
    parts = hold_out_sets(labels, groups, sets=folds, seed=seed)
    with one_thread():
        for test in parts:
            train = np.setdiff1d(np.arange(len(labels)), test)
            if min(len(np.unique(labels[train])), len(np.unique(labels[test]))) < 2:
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(
                x[train], labels[train]
            )
            areas.append(float(roc_auc_score(labels[test], probe.decision_function(x[test]))))
    return areas


def linear_evaluation(
    features: Tensor,  # [N, D] of the test set
    labels: np.ndarray,  # [N], 0 and 1
    groups: np.ndarray | None = None,  # [N]
    *,
    sets: int = SETS,
    folds: int = FOLDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Cross-validated AUC inside each of several hold-out sets (Ruppli et al. 2022).

    Args:
        features: of a frozen encoder.
        labels: pathology present or not.
        groups: patients; kept together in sets and folds.
        sets: hold-out sets that the images are cut into.
        folds: of the cross-validation inside a set.
        seed: of both cuts.

    Returns:
        ``auc``, the mean over the sets of their means over folds, and ``auc_std`` the sample standard deviation over sets; ``sets``, by
        number (``"1"``, ...) each one's ``auc``, ``images``, ``positive`` and ``folds`` (scored ones). Without ``auc`` where nothing could
        be scored.

    Raises:
        ValueError: see :func:`cross_validated_auc`.
    """
    rows: dict[str, dict[str, Any]] = {}
    labels, groups = np.asarray(labels), None if groups is None else np.asarray(groups)
    for number, part in enumerate(hold_out_sets(labels, groups, sets=sets, seed=seed), start=1):
        own = None if groups is None else groups[part]
        areas = cross_validated_auc(features[torch.as_tensor(part)], labels[part], own, folds=folds, seed=seed)
        row: dict[str, Any] = {"images": len(part), "positive": int(labels[part].sum()), "folds": len(areas)}
        rows[str(number)] = {"auc": statistics.fmean(areas), **row} if areas else row
    means = [row["auc"] for row in rows.values() if "auc" in row]
    result: dict[str, Any] = {"sets": rows}
    if means:
        result |= {"auc": statistics.fmean(means), "auc_std": statistics.stdev(means) if len(means) > 1 else 0.0}
    return result
