# SPDX-License-Identifier: MIT
"""Scores of label maps: Dice from exact counts, pooled over all pixels and per volume, and the 95 % Hausdorff distance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .types import described

if TYPE_CHECKING:
    from ..data.volumes import LabelledVolume

PERCENTILE = 95.0


class DiceCounter:
    """Counts pixels per class as whole numbers, so that no order of adding, and no number of processes, changes a score.

    Dice of class k = 2 hits_k / (predicted_k + true_k), with hits, predictions and true pixels summed over all that was
    added: the pooled Dice of the released code of Hu et al.

    Args:
        num_classes: with the background, class 0.
        device: of the counts.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import DiceCounter
        >>> counter = DiceCounter(3)
        >>> counter.add(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[1, 0, 0, 0]]]))
        >>> counter.dice()  # class 2 is in neither
        tensor([0.8000, 0.6667,    nan], dtype=torch.float64)
        >>> round(counter.mean(), 4)
        0.6667
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise ValueError(f"DiceCounter: expected at least 2 classes, the background counted; got {num_classes}")
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)  # hits, predicted, true

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return self.counts.shape[1]

    def add(
        self,
        prediction: Tensor | np.ndarray,  # [N, H, W] whole numbers
        label: Tensor | np.ndarray,  # [N, H, W] whole numbers
    ) -> None:
        """Adds the pixels of some slices; any shape will do where both have the same.

        Raises:
            ValueError: different shapes, values that are no whole numbers or no classes.
        """
        prediction, label = (_native(value) for value in (prediction, label))
        if prediction.shape != label.shape:
            raise ValueError(
                f"DiceCounter: prediction and label must have one shape; got {described(prediction)} and "
                f"{described(label)}"
            )
        flat = []
        for name, value in (("prediction", prediction), ("label", label)):
            if value.is_floating_point() or value.is_complex():
                raise ValueError(f"DiceCounter: {name} must be whole numbers, after argmax; got {described(value)}")
            value = value.to(torch.int64)
            if value.numel() and (int(value.min()) < 0 or int(value.max()) >= self.num_classes):
                raise ValueError(
                    f"DiceCounter: {name} must lie in 0..{self.num_classes - 1}; got {int(value.min())}.."
                    f"{int(value.max())}"
                )
            flat.append(value.reshape(-1).to(self.counts.device))
        predicted, true = flat
        for row, classes in enumerate((true[predicted == true], predicted, true)):
            self.counts[row] += torch.bincount(classes, minlength=self.num_classes)

    def dice(self) -> Tensor:  # [K] float64
        """Dice of every class, the background first; NaN for one that was neither predicted nor there."""
        hits, predicted, true = self.counts.double()
        dice: Tensor = 2 * hits / (predicted + true)
        return dice

    def mean(self) -> float:
        """Mean Dice over the foreground classes that were predicted or there; NaN where none was."""
        return float(self.dice()[1:].nanmean())

    def sum_over_processes(self) -> None:
        """Adds up the counts of all processes; each then holds the sum. Nothing changes where there is one process."""
        from ..training.distributed import sum_over_processes  # here: it brings accelerate along

        self.counts = sum_over_processes(self.counts)


def segmentation_scores(
    predictions: Sequence[np.ndarray],  # each [S, H, W] whole numbers
    volumes: Sequence[LabelledVolume],
    *,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Scores predicted label maps against the volumes' labels.

    - ``pooled_dice``: 2 TP / (predicted + true), each summed over all pixels of all volumes, per foreground class and as
      their mean (the metric of the released code of Hu et al.). A class in no label and no prediction is left out.
    - ``volume_dice``: the same per volume; per class the mean over volumes, then the mean over classes. A volume with a
      class in its label or its prediction only counts with 0; one with the class in neither says nothing about it, is
      left out and counted in ``absent``.
    - ``hausdorff95``: the larger of the two 95 % quantiles of the distances from the surface of one to the surface of the
      other, per class and volume, means as above (MONAI's). Where the label or the prediction lacks the class there is no
      distance: both cases are left out, and counted in ``absent`` (in neither) and ``one_sided``, so a low distance with
      a high ``one_sided`` is no good result. In mm where all spacings are known, else in pixels.

    Args:
        predictions: one per volume, in the same order.
        volumes: with labels.
        class_names: with the background; default: as many classes as occur, ``"class 1"``, ``"class 2"``, ...

    Returns:
        Values that JSON can hold: the three scores above, each with ``mean`` and ``classes``; ``volumes``, the scores of
        each by class, None where there is none; and ``unit``.

    Raises:
        ValueError: numbers or shapes that do not fit, no volume, equal class names.
        ImportError: MONAI is not installed.

    Example:
        >>> from protokernels.data import load_segmentation
        >>> from protokernels.evaluation import segmentation_scores
        >>> volumes = load_segmentation("phantoms", split="paper").test
        >>> scores = segmentation_scores([volume.label for volume in volumes], volumes)
        >>> scores["pooled_dice"]["mean"], scores["hausdorff95"]["mean"], scores["unit"]
        (1.0, 0.0, 'pixels')
    """
    caller = "segmentation_scores"
    if len(predictions) != len(volumes) or not volumes:
        raise ValueError(
            f"{caller}: one prediction per volume is needed, at least one; got {len(predictions)} and {len(volumes)}"
        )
    maps = [np.asarray(prediction) for prediction in predictions]
    for prediction, volume in zip(maps, volumes, strict=True):
        if prediction.shape != volume.label.shape or prediction.dtype.kind not in "iu":
            raise ValueError(
                f"{caller}: the prediction of {volume.name} must be whole numbers of shape {list(volume.label.shape)}; got "
                f"{prediction.dtype} {list(prediction.shape)}"
            )
    highest = max(int(value.max()) for value in (*maps, *(volume.label for volume in volumes)))
    names = list(class_names or ("background", *(f"class {index}" for index in range(1, max(highest, 1) + 1))))
    if len(set(names)) < len(names):
        raise ValueError(f"{caller}: class names must differ; got {', '.join(map(repr, names))}")
    pooled = DiceCounter(len(names))
    known = all(volume.spacing_known for volume in volumes)
    dice, distances = [], []
    for prediction, volume in zip(maps, volumes, strict=True):
        own = DiceCounter(len(names))
        own.add(prediction, volume.label)
        pooled.counts += own.counts
        dice.append(own.dice()[1:].tolist())
        spacing = volume.spacing if known else (1.0, 1.0, 1.0)
        distances.append(hausdorff95(prediction, volume.label, len(names), spacing))
    # Absent from both is NaN in Dice; absent from one is NaN in the distance only.
    absent = np.isnan(np.array(dice)).sum(axis=0)
    one_sided = np.isnan(np.array(distances)).sum(axis=0) - absent
    return {
        "pooled_dice": _summary(names, [pooled.dice()[1:].tolist()]),
        "volume_dice": _summary(names, dice) | {"absent": _by_class(names, absent.tolist())},
        "hausdorff95": _summary(names, distances)
        | {"absent": _by_class(names, absent.tolist()), "one_sided": _by_class(names, one_sided.tolist())},
        "unit": "mm" if known else "pixels",
        "volumes": [
            {
                "name": volume.name,
                "dice": _by_class(names, [_number(value) for value in one]),
                "hausdorff95": _by_class(names, [_number(value) for value in two]),
            }
            for volume, one, two in zip(volumes, dice, distances, strict=True)
        ],
    }


def hausdorff95(
    prediction: np.ndarray,  # [S, H, W] whole numbers
    label: np.ndarray,  # [S, H, W] whole numbers
    num_classes: int,
    spacing: tuple[float, float, float],
) -> list[float]:
    """95 % Hausdorff distance of the classes 1, 2, ... in units of ``spacing``; NaN where one of both lacks the class."""
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance  # seconds to import

    result = []
    for index in range(1, num_classes):
        one, two = (torch.from_numpy(value == index)[None, None] for value in (prediction, label))
        if not one.any() or not two.any():
            result.append(math.nan)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of what it deprecates
            distance = compute_hausdorff_distance(
                one, two, include_background=True, percentile=PERCENTILE, spacing=list(spacing)
            )
        result.append(float(distance))
    return result


def _native(values: Tensor | np.ndarray) -> Tensor:
    """A tensor of the same numbers; torch takes no arrays that run backwards, are read-only or in another byte order."""
    if isinstance(values, np.ndarray):
        values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(values)


def _summary(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, Any]:  # [volumes, K - 1]
    values = [[value for value in column if not math.isnan(value)] for column in zip(*rows, strict=True)]
    classes = [sum(column) / len(column) if column else math.nan for column in values]
    finite = [value for value in classes if not math.isnan(value)]
    mean = sum(finite) / len(finite) if finite else None
    return {"mean": mean, "classes": _by_class(names, [_number(value) for value in classes])}


def _by_class(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names[1:], values, strict=True))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
