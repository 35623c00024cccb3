# SPDX-License-Identifier: MIT
"""Metrics over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import new_figure


def loss_curves(
    metrics: Sequence[dict[str, Any]], names: Sequence[str], *, title: str, boundary: float | None = None
) -> Figure:
    """One panel per metric that the lines of ``metrics.jsonl`` have; a dotted line at the epoch ``boundary``, between phases.

    Raises:
        ValueError: there are no lines, or none has any of ``names``.
    """
    if not metrics:
        raise ValueError(
            "loss_curves: there are no metrics to draw; expected at least one finished epoch in metrics.jsonl"
        )
    asked = names
    names = [name for name in asked if any(name in line for line in metrics)]
    if not names:
        raise ValueError(
            f"loss_curves: no line of the metrics has {', '.join(asked) or 'a name, for none was asked for'}; they have "
            f"{', '.join(metrics[0])}"
        )
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.2 * columns, 2.2 * rows + 0.4)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        points = [(line["epoch"], line[name]) for line in metrics if name in line]
        axes.plot(
            [epoch for epoch, _ in points],
            [value for _, value in points],
            linewidth=1.4,
            marker="." if len(points) < 3 else "",
        )
        if boundary is not None:
            axes.axvline(boundary, color="grey", linestyle=":", linewidth=1)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure
