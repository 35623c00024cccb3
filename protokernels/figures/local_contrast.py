# SPDX-License-Identifier: MIT
"""The figures of local contrast (Hu et al. 2021): label maps over slices, pixel features in the plane, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.volumes import LabelledVolume
from ..evaluation import tsne_embedding
from ..training import RunFolder
from .canvas import class_colours, legend_name, new_figure, save_figure
from .curves import loss_curves
from .segmentation import draw_overlays, draw_pixel_tsne

if TYPE_CHECKING:
    from ..papers.local_contrast import Segmenter

PIXELS_PER_CLASS = 500
SHOWN = 5  # slices
_TITLES = {
    "global": "stage 1, global contrast",
    "local": "stage 2, local contrast",
    "fine_tune": "stage 3, segmentation",
}


def draw_curves(folder: Path, run: RunFolder, stages: Mapping[str, Mapping[str, Any]], *, title: str) -> list[Path]:
    """One picture per stage whose metrics are still there.

    Args:
        folder: of the pictures.
        run: of the last stage.
        stages: of the results: stage -> ``"folder"``, where it is not the run's own, as seen from that.
        title: of the pictures.
    """
    paths = []
    for name, stage in stages.items():
        place = run.path / stage.get("folder", "")
        if not place.exists():
            place = Path(stage["folder"])  # of an earlier version: as seen from the working folder
        metrics = RunFolder(place).metrics()
        if metrics:
            curves = [key for key in {key: None for line in metrics for key in line} if key not in ("epoch", "seconds")]
            figure = loss_curves(metrics, curves, title=f"{title}: {_TITLES[name]}")
            paths.append(save_figure(figure, folder / f"losses_{name}.png"))
    return paths


def draw_validation(path: Path, runs: Mapping[str, Sequence[RunFolder]], *, title: str) -> Path:
    """Validation Dice over the steps of stage 3, a line per method: who learns faster, and who arrives higher.

    Args:
        path: of the png.
        runs: finished runs by method, one per fold; the line is their mean, at the steps that all of them were scored at.
        title: of the figure.

    Raises:
        ValueError: no run was scored on its validation volumes.
    """
    figure = new_figure(4.8, 3.4)
    axes = figure.subplots()
    for colour, (name, folders) in zip(class_colours(len(runs)), runs.items(), strict=True):
        curves = [_validation(run) for run in folders]
        common = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
        means = [sum(curve[step] for curve in curves) / len(curves) for step in common]
        if common:
            axes.plot(
                common,
                means,
                color=colour,
                label=legend_name(f"{name} ({len(curves)})"),
                marker="o",
                markersize=2.5,
                linewidth=1.2,
            )
    if not axes.lines:
        raise ValueError("draw_validation: no run has a validation score in its metrics.jsonl")
    axes.set_xlabel("steps of stage 3", fontsize=8)
    axes.set_ylabel("validation Dice", fontsize=8)
    figure.suptitle(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, title="method (folds)", title_fontsize=6)
    return save_figure(figure, path)


def _validation(run: RunFolder) -> dict[int, float]:
    stage = (run.results() or {})["stages"]["fine_tune"]
    steps = stage["steps"] // stage["epochs"]
    return {line["epoch"] * steps: line["val_dice"] for line in run.metrics() if "val_dice" in line}


@torch.no_grad()
def draw_predictions(
    path: Path,
    models: Mapping[str, nn.Module],
    volumes: Sequence[LabelledVolume],
    *,
    class_names: Sequence[str],
    title: str,
) -> Path:
    """Input, ground truth and what each model predicts, for the fullest slice of the first volumes.

    Args:
        path: of the png.
        models: [B, 1, H, W] -> logits [B, K, H, W], by the names of their columns.
        volumes: from which the slices come.
        class_names: with the background.
        title: of the figure.
    """
    images, labels = fullest_slices(volumes[:SHOWN])
    predictions = {name: model(images[:, None]).argmax(dim=1) for name, model in models.items()}
    return draw_overlays(path, images, labels, predictions, class_names=class_names, title=title)


@torch.no_grad()
def draw_features(
    path: Path,
    model: Segmenter,
    volumes: Sequence[LabelledVolume],
    *,
    class_names: Sequence[str],
    title: str,
    seed: int,
) -> Path:
    """t-SNE of f^1, the features before the last 1x1 convolution, of as many pixels of every class.

    Args: see :func:`draw_predictions`; ``seed`` chooses the pixels.
    """
    images, labels = fullest_slices(volumes[: 2 * SHOWN])
    features, classes = class_pixels(model.backbone(images[:, None])[-1], labels, PIXELS_PER_CLASS, seed)
    places = tsne_embedding(features, max_samples=len(features), seed=seed)
    return draw_pixel_tsne(path, places.points, classes, class_names=class_names, title=title)


def fullest_slices(volumes: Sequence[LabelledVolume]) -> tuple[Tensor, Tensor]:  # [N, H, W] float32, [N, H, W] int64
    """Of every volume the slice with the most foreground."""
    chosen = [int((volume.label > 0).sum(axis=(1, 2)).argmax()) for volume in volumes]
    pairs = list(zip(volumes, chosen, strict=True))
    images = torch.stack([torch.from_numpy(volume.image[index]) for volume, index in pairs])
    labels = torch.stack([torch.from_numpy(volume.label[index]).long() for volume, index in pairs])
    return images, labels


def class_pixels(
    features: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N, H, W]
    count: int,
    seed: int,
) -> tuple[Tensor, Tensor]:  # [M, C], [M]
    """At most ``count`` random pixels of every class: nearly all pixels are background."""
    generator = torch.Generator().manual_seed(seed)
    vectors, classes = features.movedim(1, -1).flatten(0, 2), labels.flatten()
    kept = []
    for index in classes.unique():
        (where,) = (classes == index).nonzero(as_tuple=True)
        kept.append(where[torch.randperm(len(where), generator=generator)[:count]])
    chosen = torch.cat(kept)
    return vectors[chosen], classes[chosen]
