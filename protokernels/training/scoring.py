# SPDX-License-Identifier: MIT
"""Which images are trained on, which are scored, and how: the same for every paper that learns without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..data import ImageDataset, Split
from ..evaluation import EvaluationConfig, Representation, evaluate_representation


def evaluation_splits(dataset: ImageDataset, selection: bool = False) -> tuple[Split, dict[str, Split]]:
    """The images to train on and the sets to score, by name.

    Validation and test set are scored apart and together: papers differ in which they call the test set.

    Args:
        dataset: the data.
        selection: for choosing hyper-parameters: the only set scored is the data set's own validation data or, where it
            has none, the last sixth of its training images, which are then not trained on.
    """
    train, val, test = dataset.train, dataset.val, dataset.test
    if selection and val is None:
        cut = len(train) - len(train) // 6
        return train.take(slice(0, cut)), {"held-out": train.take(slice(cut, None))}
    if val is None:
        return train, {"test": test}
    if selection:
        return train, {"val": val}
    return train, {"test": test, "val": val, "val+test": val.join(test)}


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
