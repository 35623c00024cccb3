# SPDX-License-Identifier: MIT
"""Area under the ROC curve, per class and as a plain mean over classes, for one label per image or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .types import check_labels, described


@dataclass(frozen=True)
class Auroc:
    """AUROC of every class that can be scored.

    Attributes:
        macro: plain mean over ``per_class``; None where no class can be scored.
        per_class: class name -> area, in the order of the classes.
        left_out: names of the classes whose targets are all positive or all negative, for which no area exists.
    """

    macro: float | None
    per_class: dict[str, float]
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """In values that JSON can hold."""
        named = {"auroc": dict(self.per_class), "left_out": list(self.left_out)}
        return named if self.macro is None else {"macro_auroc": self.macro, **named}


def auroc(
    scores: Tensor,  # [N, K] floating point
    targets: Tensor,  # [N] int64, or [N, K] with 0 and 1
    class_names: Sequence[str],
) -> Auroc:
    """The probability that a positive image scores higher than a negative one, ties counting half, for every class.

    With one label per image ([N] targets) every class stands against the rest, and images are ranked by the probability of the class,
    the softmax over classes: a number added to all logits of an image changes nothing. Two such classes are one question, which
    is asked once: of the second class, with ``scores[:, 1] - scores[:, 0]``. All of it is float64, whatever type the scores have.

    Args:
        scores: logits. Probabilities serve too, but of three or more classes with one label per image only as their logarithms.
            Minus infinity is the logarithm of probability 0.
        targets: class numbers, or a 0/1 matrix with any number of ones per row.
        class_names: K names.

    Returns:
        The areas; classes without both labels are left out and named.

    Raises:
        ValueError: wrong shapes, no image, equal names, NaN scores, logits without probabilities (plus infinity), targets out of range.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import auroc
        >>> scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
        >>> auroc(scores, torch.tensor([1, 0, 0]), ["normal", "pneumonia"]).per_class
        {'pneumonia': 1.0}
    """
    caller = "auroc"
    classes = len(class_names)
    fits = isinstance(scores, Tensor) and scores.ndim == 2 and scores.is_floating_point()
    if not fits or len(scores) == 0 or scores.shape[1] != classes:
        raise ValueError(
            f"{caller}: scores must be floating point of shape [N, {classes}] (one column per class name) with N at "
            f"least 1; got {described(scores)}"
        )
    if len(set(class_names)) < classes:
        raise ValueError(f"{caller}: class names must differ; got {', '.join(map(repr, class_names))}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{caller}: {int(scores.isnan().any(1).sum())} of {len(scores)} rows of scores hold NaN")
    positive = as_multi_hot(caller, targets, len(scores), classes)
    scores = scores.detach().double()  # before anything is subtracted: rounding makes ties
    if targets.ndim == 1 and classes > 1:
        logs = scores.log_softmax(dim=1)  # ranks as the softmax does, and small ones stay apart
        if bool(logs.isnan().any()):
            raise ValueError(
                f"{caller}: {int(logs.isnan().any(1).sum())} of {len(scores)} rows of logits have no softmax"
            )
        if classes == 2:
            scores, positive, class_names = scores[:, 1:] - scores[:, :1], positive[:, 1:], class_names[1:]
        else:
            scores = logs
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError('auroc needs scikit-learn: pip install "protokernels[train]"') from error
    scored = (positive.any(0) & ~positive.all(0)).tolist()
    left_out = tuple(name for name, usable in zip(class_names, scored, strict=True) if not usable)
    per_class: dict[str, float] = {}
    if any(scored):  # one call for all columns: most of a call's time are checks of what it is given
        columns = [index for index, usable in enumerate(scored) if usable]
        truth = positive[:, columns].cpu().numpy()
        given = scores[:, columns].clamp(-1e300, 1e300).cpu().numpy()  # scikit-learn takes no infinity
        areas = np.atleast_1d(roc_auc_score(truth, given, average=None))
        per_class = {class_names[index]: float(area) for index, area in zip(columns, areas, strict=True)}
    macro = sum(per_class.values()) / len(per_class) if per_class else None
    return Auroc(macro, per_class, left_out)


def as_multi_hot(caller: str, targets: Tensor, count: int, classes: int) -> Tensor:  # [N, K] bool
    """Which classes each image has; refuses targets that are neither [N] class numbers nor an [N, K] 0/1 matrix."""
    if targets.ndim == 1:
        check_labels(caller, "targets", targets, length=count, upper=classes)
        return F.one_hot(targets, classes).bool()
    fits = isinstance(targets, Tensor) and targets.shape == (count, classes)
    if not fits or not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            f"{caller}: targets must be int64 class numbers of shape [{count}] or zeros and ones of shape "
            f"[{count}, {classes}]; got {described(targets)}"
        )
    return targets.bool()
