# SPDX-License-Identifier: MIT
"""Semi-supervised contrastive learning for segmentation: global contrast on all slices, local contrast on labelled pixels.

X. Hu, D. Zeng, X. Xu, Y. Shi. Semi-supervised Contrastive Learning for Label-Efficient Medical Image Segmentation. MICCAI
2021, LNCS 12902, pp. 481-490. https://doi.org/10.1007/978-3-030-87196-3_45
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import protokernels

from ..data.segmentation_views import IntensityConfig, SpatialConfig, View, spatial_views, view_pair
from ..data.volumes import LabelledVolume, SegmentationDataset, labelled_subset, load_segmentation, slices_of
from ..evaluation.segmentation import DiceCounter, segmentation_scores
from ..models import UNet, UNetEncoder, global_head, local_head
from ..training import CheckpointStore, RunFolder, Session, Step, process_count, seed_everything
from ..training.randomness import derived_seed
from ..training.runs import RunSettings, load_runs, train_runs, update_results, write_summary
from ..training.segmentation import Stages, predict_volumes, segmentation_losses
from ._local_contrast_baselines import MeanTeacher, mixup_losses, tcsm_losses, tcsm_weight
from ._local_contrast_config import METHODS, PAPER_RESULTS, LocalContrastConfig

CONFIG = LocalContrastConfig  # the name under which the command line finds it
DEFAULT_DATA = "phantoms"


class GlobalContrast(nn.Module):
    """Encoder E and head h_1 of stage 1.

    Shape: two views [B, 1, H, W] of the same slices -> L_g (Eq. 1).
    """

    def __init__(self, encoder: UNetEncoder, config: LocalContrastConfig) -> None:
        super().__init__()
        self.encoder, self.head = encoder, global_head(encoder.dim)
        self.head.requires_grad_(config.train_global_head)
        self.temperature = config.global_temperature

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        z = self.head(self.encoder(torch.cat([first, second]))[1]).float()  # h_1(E(a_i)), normalised in the loss
        z_first, z_second = z.chunk(2)
        return protokernels.nt_xent_loss(
            z_first, z_second, temperature=self.temperature, gather=process_count() > 1
        )  # Eq. 1


class LocalContrast(nn.Module):
    """E, decoder D and head h_2 of stage 2.

    Shape: two views [B, 1, H, W] with their labels [B, H, W], or None -> L_l (Eq. 2 and 3).
    """

    def __init__(self, backbone: UNet, config: LocalContrastConfig) -> None:
        super().__init__()
        self.backbone, self.head = backbone, local_head(backbone.width, config.local_head)
        self.config = config

    def forward(
        self, first: Tensor, second: Tensor, first_labels: Tensor | None = None, second_labels: Tensor | None = None
    ) -> Tensor:
        f = self.head(self.backbone(torch.cat([first, second]))[-1])  # f^1 = h_2(D_1(E(a_i)))
        labels = None if first_labels is None or second_labels is None else torch.cat([first_labels, second_labels])
        return local_loss(f.float(), labels, self.config)


def local_loss(f: Tensor, labels: Tensor | None, config: LocalContrastConfig) -> Tensor:  # [2B, C, H, W], [2B, H, W]
    """Eq. 2 and 3, in blocks or on a grid (section 2.3)."""
    in_blocks = config.recipe.local_contrast == "block"
    return protokernels.local_contrastive_loss(
        f,
        labels,
        temperature=config.temperature,
        block_size=config.block_size if in_blocks else None,
        stride=None if in_blocks else config.stride,
        form=config.form,
        scope=config.scope,
        reduction=config.reduction,
        drop_remainder=config.drop_remainder,
    )


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


def contrast_globally(images: Tensor, session: Session) -> None:  # [N, 1, H, W] in [0, 1]
    """Stage 1: two views of every slice, with other intensities, moved and deformed."""
    spatial, intensity = SpatialConfig.preset("global"), IntensityConfig()
    for _ in session.epochs():
        for step in session.steps():
            generator = session.shared_generator(step, "views")
            first, second = view_pair(images[step.indices], None, intensity, spatial, generator, **share(step))
            loss = session.model(first.images, second.images)
            session.optimise(loss, step)
            session.record(step, loss=loss)


def contrast_locally(
    images: Tensor,  # [N, 1, H, W] in [0, 1]
    labels: Tensor | None,  # [N, H, W] int64; None: the same pixel of the other view is the positive
    session: Session,
    config: LocalContrastConfig,
) -> None:
    """Stage 2: two views of every slice with other intensities, and where they are."""
    intensity = IntensityConfig()
    spatial = SpatialConfig.preset("global") if config.spatial_views and labels is not None else None
    for _ in session.epochs():
        for step in session.steps():
            x, y = images[step.indices], None if labels is None else labels[step.indices]
            first, second = view_pair(
                x,
                y,
                intensity,
                spatial,
                session.shared_generator(step, "views"),
                identical_views=config.identical_views,
                **share(step),
            )
            loss = session.model(first.images, second.images, first.labels, second.labels)
            session.optimise(loss, step)
            session.record(step, loss=loss)


def fine_tune(
    images: Tensor,  # [N, 1, H, W] in [0, 1]
    labels: Tensor,  # [N, H, W] int64
    unlabelled: Tensor,  # [U, 1, H, W] in [0, 1]
    session: Session,
    config: LocalContrastConfig,
    after_epoch: Callable[[int], None],
) -> None:
    """Stage 3: segmentation of the labelled slices, plainly or by one of the two methods that change it."""
    model, bare = session.model, session.bare_model

    def moved(x: Tensor, y: Tensor | None) -> View:
        spatial = SpatialConfig.preset("segmentation")
        return spatial_views(x, y, spatial, generator, **share(step)) if config.augment else View(x, y)

    for epoch in session.epochs():
        for step in session.steps():
            generator = session.shared_generator(step, "views")
            x, y = moved(images[step.indices], labels[step.indices])
            assert y is not None
            if config.recipe.fine_tuning == "mixup":
                losses = mixup_losses(model, x, y, config.mixup_alpha, generator)
            elif isinstance(bare, MeanTeacher):
                chosen = torch.randint(len(unlabelled), (step.batch,), generator=generator)
                others, _ = moved(unlabelled[chosen[step.rank :: step.processes].to(x.device)], None)
                weight = tcsm_weight(step.progress, config.tcsm_weight)
                losses = tcsm_losses(
                    model, bare, x, y, others, weight=weight, noise=config.tcsm_noise, generator=generator
                )
            else:
                losses = segmentation_losses(model(x), y)
            session.optimise(losses["loss"], step)
            if isinstance(bare, MeanTeacher):
                bare.after_step(config.tcsm_momentum)
            session.record(step, **losses)
        after_epoch(epoch)


def share(step: Step) -> dict[str, int]:
    """Which of the batch's images this process has, so that a view does not depend on the number of processes."""
    return {"rank": step.rank, "processes": step.processes, "batch": step.batch}


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


def train(
    config: LocalContrastConfig,
    out: str | Path | None = None,
    *,
    data_root: str | Path | None = None,
    download: bool = False,
    figures: bool = True,
    settings: RunSettings | None = None,
    dataset: SegmentationDataset | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Trains, evaluates and draws; one run or several with different seeds.

    Args:
        config: usually from :meth:`LocalContrastConfig.preset`.
        out: folder of the run; default: the first free one of ``runs/local_contrast-<data>-<method>-<preset>``, ``...-2``
            and so on.
        data_root: where the data lies; default: ``PROTOKERNELS_DATA``.
        download: has no effect: nothing is fetched.
        figures: draw pictures of the first run.
        settings: seed, runs, resume, precision, device, quiet; or give these as keywords.
        dataset: what :func:`load_volumes` returned for this data, fold, split and size, to save loading it again.

    Returns:
        The content of ``results.json``, and the run's folder as ``"folder"``.
    """
    dataset = dataset or load_volumes(config, data_root)
    settings = replace(settings or RunSettings(), **more)
    volumes = stage_volumes(dataset, config)
    recipe = config.recipe

    def run_one(run: RunFolder, seed: int, accelerator: Accelerator) -> dict[str, Any]:
        folder = Path(config.stages) if config.stages else run.path / "stages"
        stages, device = Stages(run, folder, seed, accelerator, settings), accelerator.device
        seed_everything(seed)
        backbone = UNet(1, width=config.width, depth=config.depth)  # the same for every method
        summary = {}

        if recipe.global_contrast:
            images = slices_of(volumes["global"])[0].to(device)
            seed_everything(derived_seed(seed, "global"))
            summary["global"] = stages.before(
                "global",
                config.stage_record("global"),
                GlobalContrast(backbone.encoder, config),
                len(images),
                config.stage("global"),
                lambda session: contrast_globally(images, session),
            )
        if recipe.local_contrast:
            images, labels, *_ = (each.to(device) for each in slices_of(volumes["local"]))
            targets = None if recipe.local_contrast == "self" else labels
            seed_everything(derived_seed(seed, "local"))
            summary["local"] = stages.before(
                "local",
                config.stage_record("local"),
                LocalContrast(backbone, config),
                len(images),
                config.stage("local"),
                lambda session: contrast_locally(images, targets, session, config),
            )
        images, labels, *_ = (each.to(device) for each in slices_of(volumes["fine_tune"]))
        unlabelled = slices_of(volumes["unlabelled"])[0].to(device) if recipe.fine_tuning == "tcsm" else images
        seed_everything(derived_seed(seed, "fine_tune"))
        segmenter = Segmenter(backbone, dataset.num_classes)
        model: nn.Module = segmenter
        if recipe.fine_tuning == "tcsm":
            model = MeanTeacher(segmenter, lambda: new_segmenter(config, dataset.num_classes))

        def loop(session: Session) -> None:
            keeper = Keeper(session, config, dataset)
            fine_tune(images, labels, unlabelled, session, config, keeper.after_epoch)

        summary["fine_tune"] = stages.last("fine_tune", model, len(images), config.stage("fine_tune"), loop)
        if not accelerator.is_main_process:
            return {}
        return {**score(load_segmenter(run.path)[0].to(device), dataset, config), "stages": summary}

    count = len(slices_of(volumes["fine_tune"])[0])
    data = Path(config.data).stem
    results = train_runs(
        f"local_contrast-{data}-{config.method}-{config.preset_name}",
        {"paper": "local_contrast", "config": config.record()},
        run_one,
        out=out,
        settings=settings,
        provenance=provenance(dataset, config),
        epochs=config.stage("fine_tune").plan(count, 0, "").epochs,
    )
    if figures and results:
        draw_figures(results["folder"], data_root=data_root, dataset=dataset)
    return results


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
        path: a run's folder, or one of the files in its folder ``weights``, which needs nothing else.

    Raises:
        FileNotFoundError: there is nothing to load yet.
        ValueError: a tensor is missing or does not fit, or the file is none of ours.
    """
    path = Path(path)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else CheckpointStore(path / "weights").load()
    if state is None:
        raise FileNotFoundError(f"{path} has no weights yet; continue the run with --resume")
    config = LocalContrastConfig.from_dict(state["config"])
    model = new_segmenter(config, len(state["class_names"]))
    model.load_state_dict(state["model"])
    return model.eval(), config


def load_volumes(config: LocalContrastConfig, data_root: str | Path | None = None) -> SegmentationDataset:
    """The data of a configuration."""
    return load_segmentation(
        config.data, data_root, image_size=config.image_size, fold=config.fold, split=config.split
    )


def provenance(dataset: SegmentationDataset, config: LocalContrastConfig) -> dict[str, Any]:
    """Where the data came from; its warnings and those of the configuration."""
    return {**dataset.provenance, "warnings": [*dataset.provenance.get("warnings", []), *config.warnings()]}


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


def evaluate(folder: str | Path, *, data_root: str | Path | None = None) -> dict[str, Any]:
    """Scores the weights that a run, or each of its seeds, kept, and rewrites its ``results.json``."""
    for run in load_runs(folder):
        model, config = load_segmenter(run.path)
        dataset = load_volumes(config, data_root)
        epochs = (run.results() or {}).get("stages", {}).get("fine_tune", {}).get("epochs", config.fine_tune_epochs)
        update_results(run, score(model, dataset, config), provenance(dataset, config), epochs=epochs)
    return write_summary(folder)


def draw_figures(folder: str | Path, *, data_root: str | Path | None = None, dataset: SegmentationDataset | None = None) -> list[Path]:
    return []
