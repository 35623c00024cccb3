# SPDX-License-Identifier: MIT
"""The figures of segmentation: label maps over slices, pixel features in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from ..evaluation.segmentation import DiceCounter
from .canvas import class_colours, legend_below, legend_name, new_figure, save_figure

TRUTH_COLOUR = "white"
CELL = 1.35  # inches per slice
POINTS = 5  # area of a pixel's dot


def draw_overlays(
    path: str | Path,
    images: Tensor | np.ndarray,  # [N, H, W] in [0, 1]
    truth: Tensor | np.ndarray,  # [N, H, W] whole numbers
    predictions: Mapping[str, Tensor | np.ndarray],  # [N, H, W] each
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """One row per slice: the slice, its ground truth, and what each method predicts, as coloured outlines.

    Class k has one colour in all panels. The ground truth is dotted over every prediction, whose mean Dice over the
    foreground classes of this slice stands below.

    Args:
        path: of the png.
        images: slices, drawn from 0 (black) to 1 (white).
        truth: their labels, 0 is background.
        predictions: label maps by the name of their method, in the order of the columns.
        class_names: with the background; default: numbers.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: no slice, shapes that differ, more classes than names.
    """
    pictures = _array(images)
    maps = {"ground truth": _array(truth), **{name: _array(value) for name, value in predictions.items()}}
    if pictures.ndim != 3 or 0 in pictures.shape or any(value.shape != pictures.shape for value in maps.values()):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in maps.items())
        raise ValueError(
            f"draw_overlays: expected images [N, H, W] and label maps of that shape; got {list(pictures.shape)}, {shapes}"
        )
    highest = max(int(value.max()) for value in maps.values())
    names = list(class_names or ["background", *(f"class {index}" for index in range(1, highest + 1))])
    if highest >= len(names):
        raise ValueError(f"draw_overlays: labels go up to {highest}; got {len(names)} class names")
    colours = class_colours(max(1, len(names) - 1))
    width = max(CELL * (1 + len(maps)), 4.0)
    figure = new_figure(width, (CELL * pictures.shape[1] / pictures.shape[2] + 0.06) * len(pictures) + 0.8)
    if title:
        figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(pictures), 1 + len(maps), squeeze=False)
    for row, picture in enumerate(pictures):
        for column, name in enumerate(["input", *maps]):
            axes = grid[row, column]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(name, fontsize=7, pad=3)
            if column == 0:
                continue
            _outline(axes, maps[name][row], colours)
            if column > 1:
                _outline(axes, maps["ground truth"][row], colours, truth=True)
                axes.set_xlabel(_dice(maps[name][row], maps["ground truth"][row], len(names)), fontsize=6, labelpad=2)
    handles = [
        Line2D([], [], color=colour, label=legend_name(name)) for colour, name in zip(colours, names[1:], strict=False)
    ]
    if predictions:
        handles.append(Line2D([], [], color="grey", linestyle=":", label="ground truth"))
    legend_below(figure, handles=handles)
    return save_figure(figure, path)


def draw_pixel_tsne(
    path: str | Path,
    embedding: Tensor | np.ndarray,  # [N, 2]
    labels: Tensor | np.ndarray,  # [N] whole numbers
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Pixel features in the plane, such as t-SNE's, coloured by class; the background is grey and lies below.

    Args:
        path: of the png.
        embedding: a place per pixel (``protokernels.evaluation.tsne_embedding``).
        labels: classes of the pixels, 0 is background.
        class_names: with the background; default: numbers.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: shapes that do not fit, more classes than names.
    """
    places, classes = _array(embedding), _array(labels)
    if places.ndim != 2 or places.shape[1] != 2 or classes.shape != places.shape[:1] or not len(places):
        raise ValueError(
            f"draw_pixel_tsne: expected places [N, 2] and labels [N], at least one; got {list(places.shape)} and "
            f"{list(classes.shape)}"
        )
    names = list(class_names or ["background", *(f"class {index}" for index in range(1, int(classes.max()) + 1))])
    if int(classes.max()) >= len(names):
        raise ValueError(f"draw_pixel_tsne: labels go up to {int(classes.max())}; got {len(names)} class names")
    figure = new_figure(5.2, 4.6)
    axes = figure.subplots()
    colours = [(0.75, 0.75, 0.75, 1.0), *class_colours(max(1, len(names) - 1))]
    for index, name in enumerate(names):
        chosen = places[classes == index]
        if len(chosen):
            axes.scatter(
                chosen[:, 0], chosen[:, 1], s=POINTS, color=colours[index], linewidths=0, label=legend_name(name)
            )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.05)
    if title:
        figure.suptitle(title, fontsize=9)
    legend_below(figure, markerscale=2)
    return save_figure(figure, path)


def _outline(axes: Axes, label: np.ndarray, colours: np.ndarray, *, truth: bool = False) -> None:
    """The border of every class; around the map lies background, so that no outline is open."""
    padded = np.pad(label, 1)
    rows, columns = (np.arange(-1, length + 1) for length in label.shape)
    for index in range(1, int(label.max()) + 1):
        mask = padded == index
        if not mask.any():
            continue
        style: dict[str, Any] = {"colors": TRUTH_COLOUR, "linestyles": "dotted", "linewidths": 0.8}
        if not truth:
            style = {"colors": [tuple(colours[index - 1])], "linestyles": "solid", "linewidths": 1.2}
        axes.contour(columns, rows, mask.astype(float), levels=[0.5], **style)
    axes.set_xlim(-0.5, label.shape[1] - 0.5)
    axes.set_ylim(label.shape[0] - 0.5, -0.5)


def _dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> str:
    counter = DiceCounter(num_classes)
    counter.add(prediction.astype(np.int64), truth.astype(np.int64))
    mean = counter.mean()
    return "" if np.isnan(mean) else f"Dice {mean:.3f}"


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
