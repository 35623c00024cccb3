# SPDX-License-Identifier: MIT
"""Which images are trained on, which are scored, and how: the same for every paper that learns without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..data import DataError, ImageDataset, Split
from ..evaluation import EvaluationConfig, Representation, evaluate_representation, label_subsets

HELD_OUT = 1 / 6  # of the training images, where the data has no validation split to choose on


def evaluation_splits(dataset: ImageDataset, selection: bool = False) -> tuple[Split, dict[str, Split]]:
    """The images to train on and the sets to score, by name.

    Validation and test set are scored apart and together: papers differ in which they call the test set.

    Args:
        dataset: the data.
        selection: for choosing hyper-parameters: the only set scored is the data set's own validation data or, where it
            has none, the last sixth of its training images, which are then not trained on; a sixth of every class where the images
            stand class by class; where it knows whose images they are, a sixth of whole groups.
    """
    train, val, test = dataset.train, dataset.val, dataset.test
    if selection and val is None and (train.groups is not None or _stand_by_class(train.labels)):
        train, held = hold_out(train, dataset.num_classes)
        return train, {"held-out": held}
    if selection and val is None:
        cut = len(train) - len(train) // 6
        return train.take(slice(0, cut)), {"held-out": train.take(slice(cut, None))}
    if val is None:
        return train, {"test": test}
    if selection:
        return train, {"val": val}
    return train, {"test": test, "val": val, "val+test": val.join(test)}


def _stand_by_class(labels: np.ndarray) -> bool:  # [N]
    """Whether the images of every class stand together, as in files made of one folder for each: the last ones are of one class."""
    return 0 < int(np.count_nonzero(np.diff(labels))) < len(np.unique(labels))


def hold_out(split: Split, num_classes: int, share: float = HELD_OUT) -> tuple[Split, Split]:
    """``split`` without, and only, about ``share`` of its images: whole groups where there are groups, else stratified by
    class. Always the same ones."""
    if split.groups is None:
        chosen = label_subsets(torch.as_tensor(split.labels), [share], num_classes=num_classes)[share].numpy()
        held = np.isin(np.arange(len(split)), chosen)
    else:
        names, group, sizes = np.unique(split.groups, return_inverse=True, return_counts=True)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).numpy()
        before = np.cumsum(sizes[order]) - sizes[order]
        held = np.isin(group, order[before < share * len(split)])
    if bool(held.all()):
        count = len(split)
        few = (
            f"{count} are too few for one of each class"
            if split.groups is None
            else f"all {count} are of one group (patient)"
        )
        raise DataError(
            f"some of the training images have to be held out, but {few}, so that none would be left to train on; "
            "add images (of other patients, where these are known) or a validation split"
        )
    return split.take(np.flatnonzero(~held)), split.take(np.flatnonzero(held))


def unknown_classes_warning(dataset: ImageDataset, train: Split) -> str | None:
    """What to say of classes that images outside ``train`` have and none in it; None where there are none."""
    present = np.unique(np.concatenate([split.labels for split in dataset.splits.values()]))
    unknown = [dataset.class_names[label] for label in np.setdiff1d(present, train.labels)]
    if not unknown:
        return None
    return f"no training image has the label {', '.join(unknown)}: nothing can be learned of it, and its scores say nothing"


def check_neighbours(knn_k: int, bank: int) -> None:
    """``ValueError`` where there are fewer than ``knn_k`` images in a bank of ``bank``: before training, not at its end."""
    if knn_k > bank:
        raise ValueError(
            f"knn_k must be at most {bank}, the number of training images that are compared with; got {knn_k}"
        )


def score(
    represent: Callable[[Split, str], Representation],
    dataset: ImageDataset,
    protocol: EvaluationConfig,
    *,
    num_clusters: int,
    selection: bool,
    seed: int,
) -> dict[str, Any]:
    """The scores of one trained model on every set of :func:`evaluation_splits`.

    Args:
        represent: embeddings of a split, given its name.
        dataset: the data.
        protocol: how scores are computed.
        num_clusters: number of prototypes.
        selection: see :func:`evaluation_splits`.
        seed: of the linear probe.

    Returns:
        ``"splits"``: set -> method -> score -> number; ``"images"``: set -> number of images; ``"protocol"``.
    """
    train, tests = evaluation_splits(dataset, selection)
    reference = represent(train, "train")
    scores = {
        name: evaluate_representation(
            reference,
            represent(split, name),
            num_classes=dataset.num_classes,
            num_clusters=num_clusters,
            config=protocol,
            seed=seed,
        )
        for name, split in tests.items()
    }
    images = {name: len(split) for name, split in {"train": train, **tests}.items()}
    return {"splits": scores, "images": images, "protocol": asdict(protocol)}
