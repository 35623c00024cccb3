# SPDX-License-Identifier: MIT
"""A score over the share of labels that was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .canvas import class_colours, legend_name, new_figure

_TITLES = {"probe": "linear probe", "fine_tune": "fine-tuning"}


def label_fraction_curves(
    scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    *,
    title: str,
    metric: str = "macro_auroc",
) -> Figure:
    """One panel per way of evaluation, one line per method; bars are the standard deviation over runs.

    Args:
        scores: method -> way (``"probe"``, ``"fine_tune"``) -> fraction (``"1%"``) -> metric -> a number, or mean and
            standard deviation as ``"mean"`` and ``"std"``. Fractions without the metric are left out.
        title: of the figure.
        metric: what is drawn.

    Raises:
        ValueError: nothing has the metric.
    """
    ways = [way for way in _TITLES if any(_points(method.get(way, {}), metric) for method in scores.values())]
    if not ways:
        raise ValueError(f"label_fraction_curves: no result holds {metric!r}; expected method -> way -> fraction -> it")
    figure = new_figure(3.6 * len(ways), 3.0)
    figure.suptitle(title, fontsize=9)
    colours = class_colours(len(scores))
    for axes, way in zip(figure.subplots(1, len(ways), squeeze=False)[0], ways, strict=True):
        ticks: set[float] = set()
        for colour, (name, method) in zip(colours, scores.items(), strict=True):
            points = _points(method.get(way, {}), metric)
            if not points:
                continue
            shares, means, deviations = zip(*points, strict=True)
            ticks.update(shares)
            axes.errorbar(
                shares, means, deviations, color=colour, label=legend_name(name), marker="o", markersize=3, capsize=2
            )
        axes.set_xscale("log")
        axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("labels, %", fontsize=8)
        axes.set_ylabel(metric.replace("_", " ").replace("auroc", "AUROC"), fontsize=8)
        axes.set_title(_TITLES[way], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    if len(scores) > 1:
        axes.legend(fontsize=6)
    return figure


def _points(rows: Mapping[str, Mapping[str, Any]], metric: str) -> list[tuple[float, float, float]]:
    """(percent, mean, standard deviation), in the order of the percentages."""
    points = []
    for share, row in rows.items():
        value = row.get(metric)
        if value is None:
            continue
        mean, deviation = (value["mean"], value.get("std") or 0.0) if isinstance(value, Mapping) else (value, 0.0)
        points.append((float(share.rstrip("%")), float(mean), float(deviation)))
    return sorted(points)
