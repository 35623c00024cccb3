# SPDX-License-Identifier: MIT
"""The figures of Ruppli et al. 2022: transformed images, AUC over epochs, and which parameters M chooses."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..data.datasets import data_title
from ..papers._optimized_views_networks import OptimizedViews, drawn_parameters
from ..training import RunFolder
from .canvas import class_colours, legend_name, new_figure, save_figure
from .curves import loss_curves
from .diagram import Box, Shapes, diagram
from .grids import labelled_rows

if TYPE_CHECKING:
    from ..papers._optimized_views_config import OptimizedViewsConfig

_CURVES = ("loss", "contrast", "view_cross_entropy", "cross_entropy", "m_loss", "m_contrast", "m_cross_entropy", "auc")


def draw(
    folder: Path,
    run: RunFolder,
    split: str,
    config: OptimizedViewsConfig,
    rows: Mapping[str, tuple[Tensor, Tensor | None]],  # name -> images [N, C, S, S], masks [N, 1, S, S]
    captions: Sequence[str],
    chosen: Sequence[Mapping[str, Any]],
    model: OptimizedViews,
) -> list[Path]:
    """Draws everything into ``folder / "figures"`` and returns the paths.

    Args:
        folder: of the run, or of several seeds.
        run: whose metrics are drawn.
        split: name of the scored set.
        config: of the run.
        rows: images, untransformed and transformed, each with what its masks have become, whose outlines are drawn.
        captions: one per image.
        chosen: lines ``{"epoch": ..., "counts": {parameter: [counts]}}``; empty where there is no M.
        model: whose networks are drawn.
    """
    name = f"{config.recipe.title}, {config.preset_name}, {data_title(config.data)}"
    metrics = run.metrics()
    names = [key for key in _CURVES if any(key in line for line in metrics)]
    figures = {
        "architecture": architecture(model, rows["X"][0][:2], title=f"{name}: networks and losses"),
        "losses": loss_curves(metrics, names, title=f"{name}: training, AUC in {split}"),
        "views": labelled_rows(
            [(row, images) for row, (images, _) in rows.items()],
            captions=captions,
            title=f"{name}: images and their transformed versions",
            masks=[masks for _, masks in rows.values()],
        ),
    }
    if chosen:
        figures["parameters"] = parameter_histograms(chosen, title=f"{name}: parameters that M chooses in {split}")
    return [save_figure(figure, folder / "figures" / f"{key}.png") for key, figure in figures.items()]


@torch.no_grad()
def architecture(model: OptimizedViews, images: Tensor, *, title: str) -> Figure:  # [B, C, S, S]
    """M or a random Lambda, the transformations T, the networks f, g and p, and the losses that the strategy has."""
    config, shapes = model.config, Shapes(model, len(images))
    recipe, (alpha_0, alpha_1, alpha_2, alpha_3, alpha_4) = config.recipe, config.weights
    with shapes.measured():
        Lambda = model.M(images) if model.M is not None else drawn_parameters(len(images), False, torch.Generator())[0]
        view = model.transform(images, Lambda, torch.zeros(len(images), dtype=torch.int64))
        h, _ = model.embed(view)
        model.p(h)
    half = "\neach with probability 1/2" if recipe.views == "half" else ""
    stages = [", ".join(config.order[start : start + 3]) for start in range(0, len(config.order), 3)]
    boxes = {
        "X": Box(0, 1, shapes.value("X", images), "data"),
        "T": Box(2, 0, shapes.value("\n".join(["T = " + ",\n".join(stages) + half, "X_M"]), view)),
        "f": Box(3, 1, shapes.module("f"), "module"),
    }
    chosen = (
        Box(1, 0, shapes.value("Λ uniform", Lambda)) if model.M is None else Box(1, 0, shapes.module("M"), "module")
    )
    arrows = [("X", "T"), ("Λ", "T"), ("T", "f")]
    if model.M is not None:
        arrows.append(("X", "Λ"))
    boxes["Λ"] = chosen
    if recipe.loss != "classes":
        arrows += [("X", "f"), ("f", "g"), ("g", "contrast")]
        boxes["g"] = Box(4, 0, shapes.module("g"), "module")
        sign = ["+", "-"] if config.sign == "text" else ["-", "+"]
        parts = [f"f, g, p: {sign[0]}{alpha_2:g}"] + [f"M: {sign[1]}{alpha_0:g}"] * (model.M is not None)
        text = (
            "Khosla's loss, labelled images"
            if recipe.loss == "class pairs"
            else f"I_NCE of X_M and X\n{', '.join(parts)}"
        )
        boxes["contrast"] = Box(5, 0, text, "loss")
    if recipe.loss == "classes" or max(alpha_1, alpha_3, alpha_4) > 0:
        arrows += [("f", "p"), ("p", "classes")]
        boxes["p"] = Box(4, 2, shapes.module("p"), "module")
        weights = f"\nf, g, p: {alpha_3:g} (X_M), {alpha_4:g} (X)" + f"; M: {alpha_1:g}" * (model.M is not None)
        boxes["classes"] = Box(5, 2, "cross-entropy, labelled images" + weights * (recipe.loss == "pairs"), "loss")
    return diagram(boxes, arrows, title=title)


def auc_curves(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    *,
    title: str,
    flat: Collection[str] = (),
) -> Figure:
    """AUC over epochs by strategy, mean over runs with a band of one standard deviation (Fig. 2 of the paper).

    Args:
        curves: strategy -> run -> (epoch, AUC).
        title: of the figure.
        flat: strategies that are drawn as a horizontal line at their last value: what is trained with labels only.

    Raises:
        ValueError: there is no point.
    """
    if not any(points for runs in curves.values() for points in runs):
        raise ValueError("auc_curves: no run has an AUC yet; expected at least one evaluated epoch")
    figure = new_figure(6.4, 3.4)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots()
    for colour, (name, runs) in zip(class_colours(len(curves)), curves.items(), strict=True):
        by_epoch: dict[int, list[float]] = {}
        for points in runs:
            for epoch, area in points:
                by_epoch.setdefault(epoch, []).append(area)
        if not by_epoch:
            continue
        epochs = sorted(by_epoch)
        means = np.array([statistics.fmean(by_epoch[epoch]) for epoch in epochs])
        if name in flat:
            axes.axhline(means[-1], color=colour, linestyle="--", linewidth=1.2, label=legend_name(name))
            continue
        spread = np.array([statistics.stdev(by_epoch[epoch]) if len(by_epoch[epoch]) > 1 else 0.0 for epoch in epochs])
        axes.plot(epochs, means, color=colour, marker="o", markersize=3, linewidth=1.4, label=legend_name(name))
        axes.fill_between(epochs, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel("AUC", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=6, loc="outside right center")
    return figure


def parameter_histograms(chosen: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """A map per parameter: epochs to the right, values upwards, darker where more images have them.

    Raises:
        ValueError: no line.
    """
    if not chosen:
        raise ValueError("parameter_histograms: there is no line; expected one per epoch")
    names = list(chosen[0]["counts"])
    columns = 4
    rows = -(-len(names) // columns)
    figure = new_figure(2.2 * columns, 2.0 * rows + 0.4)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False)
    epochs = [line["epoch"] for line in chosen]
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        counts = np.array([line["counts"][name] for line in chosen], float).T  # [bins, epochs]
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, 0.0, 1.0)
        axes.imshow(
            shares, cmap="Greys", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent, interpolation="nearest"
        )
        axes.set_title(name, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        axes.set_yticks([0, 0.5, 1])
        axes.set_xlabel("epoch", fontsize=7)
        axes.tick_params(labelsize=6)
    return figure
