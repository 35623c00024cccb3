# SPDX-License-Identifier: MIT
"""The figures of local contrast (Hu et al. 2021): label maps over slices, pixel features in the plane, training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from torch import Tensor, nn

import protokernels

from ..data.volumes import LabelledVolume
from ..evaluation import tsne_embedding
from ..training import RunFolder
from .canvas import class_colours, legend_name, new_figure, save_figure
from .curves import loss_curves
from .diagram import Box, Shapes, diagram
from .segmentation import draw_overlays, draw_pixel_tsne

if TYPE_CHECKING:
    from ..papers._local_contrast_config import LocalContrastConfig
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


@torch.no_grad()
def draw_architecture(path: Path, model: Segmenter, config: LocalContrastConfig, *, title: str) -> Path:
    """The network with the heads and losses of the stages that the method has, and whose images each stage sees."""
    from ..papers.local_contrast import GlobalContrast, LocalContrast  # they draw their figures with this module

    recipe, backbone = config.recipe, model.backbone
    parts = nn.ModuleDict({"encoder": backbone.encoder, "decoder": backbone.decoder, "head": model.head})
    if recipe.global_contrast:
        parts["h_1"] = GlobalContrast(backbone.encoder, config).head
    if recipe.local_contrast:
        parts["h_2"] = LocalContrast(backbone, config).head
    images = torch.zeros(2, 1, config.image_size, config.image_size)
    shapes = Shapes(parts, len(images))
    with shapes.measured():
        skips, centre = parts["encoder"](images)
        f = parts["decoder"](skips, centre)[-1]
        for name, x in (("head", f), ("h_1", centre), ("h_2", f)):
            if name in parts:
                parts[name](x)
    kind = {"": "", "plain": "cross-entropy and Dice", "mixup": "cross-entropy and Dice of mixed slices",
            "tcsm": "cross-entropy, Dice, consistency with a teacher"}[recipe.fine_tuning]  # fmt: skip
    boxes = {
        "x": Box(0, 1, shapes.value("slices", images), "data"),
        "E": Box(1, 1, shapes.module("encoder", "E"), "module"),
        "D": Box(2, 1, shapes.module("decoder", "D"), "module"),
        "head": Box(3, 2, shapes.module("head"), "module"),
        "segmentation": Box(4, 2, f"stage 3, labelled slices\n{kind}", "loss"),
    }
    arrows = [("x", "E"), ("E", "D"), ("D", "head"), ("head", "segmentation")]
    if "h_1" in parts:
        boxes["h_1"] = Box(3, 0, shapes.module("h_1"), "module")
        boxes["global"] = Box(4, 0, "stage 1, two views of all slices\nNT-Xent", "loss")
        arrows += [("E", "h_1"), ("h_1", "global")]
    if "h_2" in parts:
        where = f"blocks of {config.block_size}" if recipe.local_contrast == "block" else f"stride {config.stride}"
        seen = "all" if recipe.local_contrast == "self" else "labelled"
        boxes["h_2"] = Box(3, 1, shapes.module("h_2"), "module")
        boxes["local"] = Box(4, 1, f"stage 2, two views of {seen} slices\npixel contrast, {where}", "loss")
        arrows += [("D", "h_2"), ("h_2", "local")]
    return save_figure(diagram(boxes, arrows, title=title), path)


def partners(
    labels: Tensor,  # [N, H, W] int64
    anchor: tuple[int, int, int],  # map, row and column of a pixel
    **options: Any,
) -> Tensor:  # [N, H, W] int64
    """Which pixels attract an anchor in ``local_contrastive_loss`` (1), which repel it (-1), and which it does not meet (0).

    Seen from the loss itself: among equal features f, the derivative of the anchor's loss by those of another pixel is f times a
    number that is negative where the pixel attracts.
    """
    features = torch.ones(len(labels), 1, *labels.shape[1:], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        losses = protokernels.local_contrastive_loss(features, labels, normalize=False, reduction="none", **options)
        (gradient,) = torch.autograd.grad(losses[anchor], features)
    found = -gradient[:, 0].sign() * (gradient[:, 0].abs() > 1e-12)
    found[anchor] = 0
    return found.long()


def draw_partners(
    path: Path, volumes: Sequence[LabelledVolume], config: LocalContrastConfig, *, title: str
) -> Path | None:
    """The pixels that an anchor meets in stage 2, by blocks and on a grid: in its own view of a slice, in the other view, and in another
    slice of the batch. None where no pixel on the grid has a class."""
    images, labels = fullest_slices(volumes[:2])
    anchor = _telling_anchor(labels[0], config)
    if anchor is None:
        return None
    where = (0, *anchor)
    stacked = torch.cat([labels, labels])  # first views, then second ones
    ways: dict[str, dict[str, Any]] = {
        f"blocks of {config.block_size}": {"block_size": config.block_size, "drop_remainder": config.drop_remainder},
        f"stride {config.stride}": {"stride": config.stride},
    }
    shown = {"the anchor's view": 0, "other view": len(labels), "other slice": 1 % len(labels)}
    figure = new_figure(1.7 * len(shown) + 0.4, 2.0 * len(ways) + 0.6)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(ways), len(shown), squeeze=False)
    for line, (name, options) in zip(grid, ways.items(), strict=True):
        found = partners(stacked, where, form=config.local_form, scope=config.scope, **options)
        counts = f"{int((found == 1).sum())} attract, {int((found == -1).sum())} repel"
        for axes, (heading, index) in zip(line, shown.items(), strict=True):
            grey = 0.25 + 0.5 * images[index % len(images)].numpy()[..., None].repeat(3, axis=2)
            for sign, colour in _PARTNERS.items():
                chosen = (found[index] == sign).numpy()
                grey[chosen] = 0.35 * grey[chosen] + 0.65 * np.array(to_rgb(colour))
            axes.imshow(grey, vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(heading, fontsize=7, pad=2)
        line[0].plot(
            anchor[1], anchor[0], "*", color="white", markeredgecolor="black", markersize=8, markeredgewidth=0.6
        )
        line[0].set_ylabel(f"{name}\n{counts}", fontsize=7)
    handles = [Line2D([], [], color=colour, marker="s", linestyle="", markersize=5) for colour in _PARTNERS.values()]
    figure.legend(
        handles, ["attracts the anchor", "repels it"], loc="outside lower center", ncols=2, fontsize=7, frameon=False
    )
    return save_figure(figure, path)


_PARTNERS = {1: "tab:blue", -1: "tab:orange"}


def _telling_anchor(labels: Tensor, config: LocalContrastConfig) -> tuple[int, int] | None:  # [H, W]
    """The pixel of a class that lies on the grid and has most of both kinds, of its class and of others, in its block."""
    size, step = config.block_size, config.stride
    best, found = 0, None
    for y, x in (labels[::step, ::step].nonzero() * step).tolist():
        block = labels[y // size * size :, x // size * size :][:size, :size]
        same = int((block == labels[y, x]).sum()) - 1
        if config.drop_remainder and block.numel() < size**2:
            continue
        telling = 1 + min(same, block.numel() - 1 - same)
        if telling > best:
            best, found = telling, (y, x)
    return found


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
