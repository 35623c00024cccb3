# SPDX-License-Identifier: MIT
"""The segmentation network of ``protokernels.papers.local_contrast``: which volumes it sees, which weights are kept, how they
are loaded and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.volumes import LabelledVolume, SegmentationDataset, labelled_subset, load_segmentation
from ..evaluation.segmentation import DiceCounter, segmentation_scores
from ..models import UNet, load_part
from ..models.unet import fitting_part
from ..models.weights import first_line, load_untrusted
from ..training import CheckpointStore, Session
from ..training.runs import load_runs
from ..training.segmentation import predict_volumes
from ._local_contrast_baselines import MeanTeacher
from ._local_contrast_config import LocalContrastConfig

PAPER = "local_contrast"  # in the runs that have such a network


class Segmenter(nn.Module):
    """E, D and the last 1x1 convolution.

    Shape: [B, 1, H, W] -> logits [B, K, H, W].
    """

    def __init__(self, backbone: UNet, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(backbone.width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images)[-1])
        return logits


def stage_volumes(dataset: SegmentationDataset, config: LocalContrastConfig) -> dict[str, tuple[LabelledVolume, ...]]:
    """The volumes that each stage sees. Those of the test set are in none, unless ``transductive`` asks for it."""
    everything = (*dataset.train, *dataset.val, *dataset.test)
    labelled = tuple(labelled_subset(dataset.train, config.labelled))
    return {
        "global": everything if config.transductive else tuple(dataset.train),
        "local": tuple(dataset.train) if config.recipe.local_contrast == "self" else labelled,
        "fine_tune": labelled,
        "unlabelled": tuple(dataset.train[len(labelled) :]) or labelled,
    }


class Keeper:
    """Scores the validation volumes now and then and keeps the weights that are to be used, in ``weights`` of the run.

    A file there holds the configuration and the names of the classes as well: it is all that prediction needs.
    """

    def __init__(self, session: Session, config: LocalContrastConfig, dataset: SegmentationDataset) -> None:
        self.session, self.config, self.dataset = session, config, dataset
        self.store = CheckpointStore(session.run.path / "weights")
        self.volumes = dataset.val[: config.validation_volumes or None]
        before = [line["val_dice"] for line in session.run.metrics() if "val_dice" in line]
        self.best = max(before, default=-1.0)

    def after_epoch(self, epoch: int) -> None:
        """Called when the steps of an epoch are done, before its checkpoint is written: a run that is killed in between does
        the epoch again and arrives at the same weights."""
        epochs, times = self.session.total_epochs, self.config.validations
        last = epoch + 1 == epochs
        if (epoch + 1) * times // epochs == epoch * times // epochs:
            return  # not one of `times` epochs evenly over the training; the last always is one
        bare = self.session.bare_model
        model = bare.teacher if isinstance(bare, MeanTeacher) else bare
        dice = validation_dice(model, self.volumes, self.dataset.num_classes, self.session.device)
        self.session.note(val_dice=dice)
        better = dice > self.best
        self.best = max(self.best, dice)
        if (better if self.config.keep == "best" else last) and self.session.accelerator.is_main_process:
            state = {
                "model": model.state_dict(),
                "config": self.config.record(),
                "class_names": list(self.dataset.class_names),
                "val_dice": dice,
            }
            self.store.save(state, epoch=epoch + 1)


def validation_dice(
    model: nn.Module, volumes: tuple[LabelledVolume, ...], num_classes: int, device: torch.device
) -> float:
    """Dice pooled over volumes, mean over the foreground classes."""
    counter = DiceCounter(num_classes)
    for prediction, volume in zip(predict_volumes(model, volumes, device), volumes, strict=True):
        counter.add(prediction, volume.label)
    dice = counter.mean()
    return dice if math.isfinite(dice) else 0.0


def new_segmenter(config: LocalContrastConfig, num_classes: int) -> Segmenter:
    """The network of a configuration, with random weights."""
    return Segmenter(UNet(1, width=config.width, depth=config.depth), num_classes)


def load_segmenter(path: str | Path) -> tuple[Segmenter, LocalContrastConfig]:
    """The network that a run arrived at, in evaluation mode, and its configuration.

    Args:
        path: a run's folder (of several seeds, the first is taken), or one of the files in its folder ``weights``, which
            needs nothing else.

    Raises:
        FileNotFoundError: there is nothing to load yet, or nothing any more.
        CheckpointError: every file is damaged.
        ValueError: a tensor is missing or does not fit, the file is none of ours, or the run is of another paper.
    """
    path = Path(path)
    if path.is_file():
        state = load_untrusted(path, str(path))  # it cannot run code
    else:
        run = load_runs(path)[0]
        if (paper := run.config().get("paper")) != PAPER:
            raise ValueError(
                f"{path} is {f'a run of {paper}' if paper else 'no run of a paper'}; expected the folder of a run of {PAPER}"
            )
        state = run.newest(CheckpointStore(run.path / "weights"), "weights")
        path = run.path / "weights"
    if not isinstance(state, dict) or not {"model", "config", "class_names"} <= state.keys():
        raise ValueError(
            f"{path} holds no segmentation network with its configuration; give the run's folder, or a file in its folder "
            "weights (those in checkpoints belong to the optimisation)"
        )
    try:
        config = LocalContrastConfig.from_dict(state["config"])
        with torch.device("meta"):  # compares shapes; a file that claims a huge network gets no memory for it
            fitting_part(new_segmenter(config, len(state["class_names"])), state["model"])
    except (RuntimeError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no segmentation network with its configuration ({first_line(error)})"
        ) from error
    model = new_segmenter(config, len(state["class_names"]))
    load_part(model, state["model"])
    return model.eval(), config


def load_volumes(config: LocalContrastConfig, data_root: str | Path | None = None) -> SegmentationDataset:
    """The data of a configuration."""
    return load_segmentation(config.data, data_root, image_size=config.image_size, fold=config.fold, split=config.split)


def provenance(dataset: SegmentationDataset, config: LocalContrastConfig) -> dict[str, Any]:
    """Where the data came from; its warnings, those of the configuration, and one of classes that no labelled volume has."""
    warnings = [*dataset.provenance.get("warnings", []), *config.warnings()]
    everywhere = {label for volumes in dataset.splits.values() for label in classes_of(volumes)}
    unknown = sorted(everywhere - classes_of(stage_volumes(dataset, config)["fine_tune"]))
    if unknown:
        names = ", ".join(dataset.class_names[label] for label in unknown)
        warnings.append(
            f"no labelled volume has the label {names}: nothing can be learned of it, and its scores say nothing"
        )
    return {**dataset.provenance, "warnings": warnings}


def classes_of(volumes: Sequence[LabelledVolume]) -> set[int]:
    """Those that occur."""
    return {int(label) for volume in volumes for label in np.flatnonzero(np.bincount(volume.label.reshape(-1)))}


def score(model: nn.Module, dataset: SegmentationDataset, config: LocalContrastConfig) -> dict[str, Any]:
    """Dice and distances on the test set, or on the validation set where hyper-parameters are chosen."""
    name, volumes = ("val", dataset.val) if config.selection else ("test", dataset.test)
    device = next(model.parameters()).device
    scores = segmentation_scores(predict_volumes(model, volumes, device), volumes, class_names=dataset.class_names)
    counts = {split: len(part) for split, part in dataset.splits.items()}
    return {
        "splits": {name: scores},
        "volumes": {**counts, "labelled": len(stage_volumes(dataset, config)["fine_tune"])},
        "protocol": {"labelled": config.labelled, "fold": config.fold, "split": config.split, "keep": config.keep},
    }
