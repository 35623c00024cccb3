# SPDX-License-Identifier: MIT
"""What an encoder that learned without labels is worth on a data set: the same for OPTiML and its baselines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data import ImageDataset, Split, to_tensor
from ..data.mapped import Images, prepared
from ..evaluation import TRANSFER_PROTOCOLS, Labelled, evaluate_transfer
from .distributed import ordinary_batch_norm
from .scoring import evaluation_splits, hold_out

if TYPE_CHECKING:
    from .self_supervised import PretrainingConfig


def transfer_scores(encoder: nn.Module, dataset: ImageDataset, config: PretrainingConfig, seed: int) -> dict[str, Any]:
    """Linear probes and fine-tuning at several label fractions, by the protocol that ``config.transfer`` names.

    Scored is the test split, with the validation split for choosing (where there is none, a sixth of the training images).
    With ``config.selection``, for choosing hyper-parameters, scored is the validation split, and a sixth of the training
    images chooses: the test split is not looked at. The sixth consists of whole groups (patients) where these are known.

    Args:
        encoder: [B, C, S, S] in [0, 1] -> dense map or vectors; computed in float32 whatever it was trained in.
        dataset: has one label per image (task ``labels``), and may have several findings (task ``targets``).
        config: image size, selection and protocol.
        seed: of subsets and heads.

    Returns:
        ``"splits"``: scored set -> task -> what :func:`protokernels.evaluation.evaluate_transfer` returns; ``"images"``: set ->
        number of images (``choosing``: those that chose, where ``val`` is scored); ``"left_out"``: see :func:`left_out`; ``"protocol"``.
    """
    _, scored = evaluation_splits(dataset, config.selection)
    name, test = next(iter(scored.items()))  # the first is the test split, or what stands for it
    train, val = choosing_splits(dataset, config.selection)
    protocol = TRANSFER_PROTOCOLS[config.transfer]
    device = next(encoder.parameters()).device
    encoder = ordinary_batch_norm(copy.deepcopy(encoder))  # the main process fine-tunes it alone
    encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    splits = {"train": train, "val" if name != "val" else "choosing": val, name: test}

    def prepare(images: np.ndarray) -> Tensor:
        return to_tensor(images, size=config.image_size).to(device, memory_format=torch.channels_last)

    images = [prepared(split.images, prepare) for split in splits.values()]
    tasks: dict[str, Any] = {}
    for task, class_names in (("labels", dataset.class_names), ("targets", dataset.target_names)):
        if class_names:
            labelled = [_labelled(x, split, task) for x, split in zip(images, splits.values(), strict=True)]
            tasks[task] = evaluate_transfer(encoder, *labelled, class_names=class_names, config=protocol, seed=seed)
    return {
        "splits": {name: tasks},
        "images": {key: len(split) for key, split in splits.items()},
        "left_out": left_out({name: tasks}),
        "protocol": {"transfer": config.transfer, **asdict(protocol)},
    }


def choosing_splits(dataset: ImageDataset, selection: bool) -> tuple[Split, Split]:
    """The images that a probe learns from, and those that choose its settings.

    Raises:
        DataError: there is no validation split for it, and the training images cannot be divided.
    """
    train, _ = evaluation_splits(dataset, selection)
    if selection or dataset.val is None:
        return hold_out(train, dataset.num_classes)
    return train, dataset.val


def left_out(splits: Mapping[str, Any]) -> dict[str, list[str]]:
    """Scored set -> classes that have no area there, because all of its images have them, or none."""
    return {
        split: sorted(
            {
                name
                for ways in tasks.values()
                for rows in ways.values()
                for row in rows.values()
                for name in row["left_out"]
            }
        )
        for split, tasks in splits.items()
    }


def left_out_notes(results: Mapping[str, Any]) -> list[str]:
    """A sentence for every scored set with such classes, from the results of a run or of several; older ones do not know."""
    return [
        f"left out of the means in {split}, where no image has them or all: {', '.join(names)}"
        for split, names in results.get("left_out", {}).items()
        if names
    ]


def _labelled(images: Images, split: Split, task: str) -> Labelled:
    targets = torch.as_tensor(split.labels if task == "labels" else split.targets)
    return Labelled(cast(Tensor, images), (targets if targets.ndim == 1 else targets.float()).to(images.device))
