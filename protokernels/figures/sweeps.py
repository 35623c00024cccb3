# SPDX-License-Identifier: MIT
"""Scores over a setting that was swept."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .canvas import class_colours, legend_name, new_figure

COLUMNS = 3


class Panel(NamedTuple):
    """Lines over one setting."""

    label: str  # below the axis: the setting
    score: str  # beside the axis
    values: Sequence[Any]  # of the setting; numbers, or anything with a name
    means: Mapping[str, Sequence[float]]  # line -> score at each value; NaN where there is none
    deviations: Mapping[str, Sequence[float]]  # line -> standard deviations; a line without has no bars
    title: str = ""


def sweep_figure(panels: Sequence[Panel], *, title: str) -> Figure:
    """One panel per setting, one line per score; bars are standard deviations over runs.

    Raises:
        ValueError: no panel, or one that :func:`draw_panel` refuses.
    """
    if not panels:
        raise ValueError("sweep_figure: there is nothing to draw; expected at least one panel")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 2.8 * rows + 0.3)
    figure.suptitle(title, fontsize=9)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(places, panels, strict=False):
        draw_panel(axes, panel)
    return figure


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Lines over the values in their order, each value marked: numbers at their places, on a logarithmic axis where all are
    positive and the largest is at least eight times the smallest; anything else side by side.

    Raises:
        ValueError: no line, or another number of scores than values.
    """
    values, means, deviations = panel.values, panel.means, panel.deviations
    lengths = {len(values), *(len(line) for lines in (means, deviations) for line in lines.values())}
    if not means or not len(values) or len(lengths) != 1 or set(deviations) - set(means):
        raise ValueError(
            f"draw_panel: expected for every line one mean per value ({len(values)}), and as many deviations or none; "
            f"got means { {name: len(line) for name, line in means.items()} }, deviations "
            f"{ {name: len(line) for name, line in deviations.items()} }"
        )
    numeric = all(isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in values)
    places = np.asarray(values, float) if numeric else np.arange(len(values), dtype=float)
    order = np.argsort(places, kind="stable")
    names = [f"{value:g}" if numeric else textwrap.fill(str(value), 14) for value in values]
    for colour, (name, line) in zip(class_colours(len(means)), means.items(), strict=True):
        spread = np.asarray(deviations[name], float)[order] if name in deviations else None
        axes.errorbar(
            places[order],
            np.asarray(line, float)[order],
            spread,
            color=colour,
            label=legend_name(name),
            marker="o",
            markersize=3,
            capsize=2,
        )
    if numeric and places[order[0]] > 0 and places[order[-1]] >= 8 * places[order[0]]:
        axes.set_xscale("log")
    axes.set_xticks(places[order], [names[index] for index in order])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(panel.label, fontsize=8)
    axes.set_ylabel(panel.score, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if panel.title:
        axes.set_title(panel.title, fontsize=9)
    if len(means) > 1:
        axes.legend(fontsize=6)
