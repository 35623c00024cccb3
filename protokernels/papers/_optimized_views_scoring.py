# SPDX-License-Identifier: MIT
"""Data and scores of ``protokernels.papers.optimized_views``: one question per image, and how well a line answers it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import protokernels

from ..data import DataError, ImageDataset, Split, load_dataset, to_tensor
from ..evaluation import Labelled, TransferConfig, evaluate_transfer, label_subsets, linear_evaluation
from ..evaluation.hold_out import hold_out_sets
from ..models.modes import evaluating
from ..training.scoring import evaluation_splits
from ..training.transfer_scoring import choosing_splits, left_out
from ._optimized_views_config import PARAMETERS, OptimizedViewsConfig
from ._optimized_views_networks import OptimizedViews, drawn_parameters

BATCH = 256  # images at a time, where nothing is learned
BINS = 20  # of a histogram over [0, 1]
HOLD_OUT = {"sets": 3, "folds": 3, "seed": 0}


def load_presence(name: str, root: str | Path | None = None, *, download: bool = False) -> ImageDataset:
    """A data set with one yes-or-no label per image; ``digits`` becomes "is it odd?".

    Raises:
        DataError: more than two classes.
    """
    dataset = load_dataset(name, root, download=download)
    if name == "digits":
        parts: dict[str, Any] = {key: replace(split, labels=split.labels % 2) for key, split in dataset.splits.items()}
        return replace(dataset, **parts, class_names=("even", "odd"))
    check_presence(dataset)
    return dataset


def check_presence(dataset: ImageDataset) -> None:
    """``DataError`` for more or fewer than two classes."""
    if dataset.num_classes != 2:
        raise DataError(
            f"optimized_views asks for the presence of one thing, with two classes; {dataset.name} has {dataset.num_classes}: "
            f"{', '.join(dataset.class_names[:5])}. Take brain_tumor, chest_nih, chest_kermany, brats or digits"
        )


def check_hold_out(dataset: ImageDataset, config: OptimizedViewsConfig) -> None:
    """``DataError`` where the scored set is too small for the paper's linear evaluation: cut into sets, and these into folds."""
    name, split = scored_split(dataset, config)
    try:
        for part in hold_out_sets(split.labels, split.groups, sets=HOLD_OUT["sets"], seed=HOLD_OUT["seed"]):
            own = None if split.groups is None else split.groups[part]
            hold_out_sets(split.labels[part], own, sets=HOLD_OUT["folds"], seed=HOLD_OUT["seed"])
    except ValueError as error:
        sets, folds = HOLD_OUT["sets"], HOLD_OUT["folds"]
        raise DataError(
            f"{dataset.name}: the paper's evaluation cuts the {name} set into {sets} parts and each of them into {folds} folds, for which "
            f"at least {sets * folds} images of every class, and as many patients where these are known, are needed ({error})"
        ) from error


def labelled_images(split: Split, config: OptimizedViewsConfig, seed: int) -> np.ndarray:  # [n] int64, ascending
    """The training images whose labels a strategy may use: a share of each class, drawn by the seed."""
    if config.recipe.labels == "all":
        return np.arange(len(split))
    if config.recipe.labels == "none":
        return np.empty(0, np.int64)
    subsets = label_subsets(torch.as_tensor(split.labels), [config.labelled], num_classes=2, seed=seed)
    chosen: np.ndarray = subsets[config.labelled].numpy()
    return chosen


def hidden_labels(split: Split, labelled: np.ndarray) -> Tensor:  # [N] int64, -1 where the label may not be seen
    """The labels of ``labelled`` images."""
    labels = np.full(len(split), -1, np.int64)
    labels[labelled] = split.labels[labelled]
    return torch.as_tensor(labels)


@torch.no_grad()
def in_batches(network: nn.Module, split: Split, size: int) -> Tensor:  # -> [N, D] float32 on the CPU
    """What ``network`` makes of the untransformed images, in evaluation mode; its mode is restored."""
    device = next(network.parameters()).device
    with evaluating(network):
        outputs = [
            network(
                to_tensor(split.images[start : start + BATCH], size=size)
                .to(device)
                .contiguous(memory_format=torch.channels_last)
            )
            for start in range(0, len(split), BATCH)
        ]
    return torch.cat(outputs).float().cpu()


def hold_out_scores(network: nn.Module, split: Split, config: OptimizedViewsConfig) -> dict[str, Any]:
    """The paper's linear evaluation of f (section 2.4)."""
    return linear_evaluation(in_batches(network, split, config.image_size), split.labels, split.groups, **HOLD_OUT)


def parameter_counts(model: OptimizedViews, split: Split) -> dict[str, list[int]]:
    """How often M chooses which value, by parameter: counts in :data:`BINS` equal bins of [0, 1]."""
    assert model.M is not None
    values = in_batches(model.M, split, model.config.image_size)
    return {
        name: torch.histc(column, BINS, 0, 1).int().tolist() for name, column in zip(PARAMETERS, values.T, strict=True)
    }


def scored_split(dataset: ImageDataset, config: OptimizedViewsConfig) -> tuple[str, Split]:
    """Name and images of what is scored: the test set, or with ``selection`` the validation set."""
    return next(iter(evaluation_splits(dataset, config.selection)[1].items()))


@torch.no_grad()
def classifier_scores(model: OptimizedViews, features: Tensor, labels: np.ndarray) -> dict[str, float]:
    """The AUC of p on features of f; empty where the images are of one class."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2:
        return {}
    logits = model.classify(features.to(next(model.p.parameters()).device)).double().cpu().numpy()
    return {"auc": float(roc_auc_score(labels, logits))}


def score(model: OptimizedViews, dataset: ImageDataset, config: OptimizedViewsConfig, seed: int) -> dict[str, Any]:
    """Both linear evaluations of f, and p where it is what the strategy trains.

    Returns:
        ``"splits"``: scored set -> ``"hold_out"`` (see :func:`protokernels.evaluation.linear_evaluation`), ``"probe"``: label
        fraction -> row of :func:`protokernels.evaluation.evaluate_transfer`, fitted on training images, and for supervised strategies
        ``"classifier"``: the AUC of p itself; ``"images"``; ``"left_out"``; ``"protocol"``.
    """
    name, test = scored_split(dataset, config)
    train, val = choosing_splits(dataset, config.selection)
    splits = {"train": train, "val" if name != "val" else "choosing": val, name: test}
    features = [in_batches(model.f, split, config.image_size) for split in splits.values()]
    probe = TransferConfig(fractions=tuple(sorted({config.labelled, 1.0})), fine_tune_fractions=())
    inputs = (Labelled(x, torch.as_tensor(split.labels)) for x, split in zip(features, splits.values(), strict=True))
    transfer = evaluate_transfer(nn.Identity(), *inputs, class_names=dataset.class_names, config=probe, seed=seed)
    scores = {
        "hold_out": linear_evaluation(features[-1], test.labels, test.groups, **HOLD_OUT),
        "probe": transfer["probe"],
    }
    if config.recipe.loss == "classes":
        scores["classifier"] = classifier_scores(model, features[-1], test.labels)
    return {
        "splits": {name: scores},
        "images": {key: len(split) for key, split in splits.items()},
        "left_out": left_out({name: {"labels": transfer}}),
        "protocol": {"hold_out": dict(HOLD_OUT), "probe": asdict(probe)},
    }


def examples(
    split: Split, config: OptimizedViewsConfig
) -> tuple[np.ndarray, Tensor, Tensor | None]:  # [8], [8, C, S, S], [8, 1, S, S]
    """Four images of each class, the first ones: their indices, the images as the networks see them, and in [0, 1] the masks that the
    data set has of them."""
    indices = np.concatenate([np.flatnonzero(split.labels == label)[:4] for label in (0, 1)])
    masks = (
        None if split.masks is None else to_tensor(255 * split.masks[indices].view(np.uint8), size=config.image_size)
    )
    return indices, to_tensor(split.images[indices], size=config.image_size), masks


@torch.no_grad()
def example_views(
    model: OptimizedViews, images: Tensor, masks: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:  # [B, C, S, S], [B, 1, S, S]
    """X_M as the strategy of ``model`` makes it, on the CPU, and the masks carried along: cropped, mirrored and turned like their images,
    with neither blur nor noise."""
    half = model.config.recipe.views == "half"
    Lambda, enabled = (model.M(images), None) if model.M is not None else drawn_parameters(len(images), half, generator)
    views = model.transform(images, Lambda, torch.randint(2**63 - 1, (len(images),), generator=generator), enabled)
    if masks is None:
        return views, None
    order: list[Any] = [stage for stage in model.config.order if stage not in ("blur", "noise")]
    return views, protokernels.transform(masks, Lambda, order=order, enabled=enabled)
