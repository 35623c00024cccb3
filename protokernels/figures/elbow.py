# SPDX-License-Identifier: MIT
"""The elbow method: KMeans' inertia over the number of clusters."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import new_figure


def elbow_curve(
    n_clusters: Sequence[int], inertias: Sequence[float], chosen: int, *, found: bool, title: str
) -> Figure:
    """Inertia against the number of clusters, with the number that was chosen.

    Args:
        n_clusters: numbers that were tried.
        inertias: sum of squared distances to the nearest centre, for each.
        chosen: one of ``n_clusters``.
        found: whether the curve has an elbow there; otherwise ``chosen`` is a fallback, and the figure says so.
        title: of the figure.

    Raises:
        ValueError: lengths differ, or ``chosen`` was not tried.
    """
    if len(n_clusters) != len(inertias) or chosen not in n_clusters:
        raise ValueError(
            f"elbow_curve: expected one inertia for each number of clusters and a choice among them; got {len(n_clusters)} "
            f"numbers, {len(inertias)} inertias and {chosen}"
        )
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    axes.plot(n_clusters, inertias, marker="o", markersize=4, linewidth=1.4)
    label = f"elbow: {chosen} clusters" if found else f"no elbow: {chosen} clusters by default"
    axes.axvline(chosen, color="black", linestyle="--", linewidth=1, label=label)
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel("number of clusters", fontsize=9)
    axes.set_ylabel("inertia (sum of squared distances)", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, framealpha=1, edgecolor="none")  # opaque: the line may stand behind it
    return figure
