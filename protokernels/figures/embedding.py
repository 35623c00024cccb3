# SPDX-License-Identifier: MIT
"""Two-dimensional pictures of an embedding: true labels beside clusters, and beside what a map of the clusters predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from .canvas import as_pixels, class_colours, legend_name, new_figure

_THUMBNAIL_SHARE = 0.065  # side of a prototype's picture as a share of the axes
_LEGEND_LIMIT = 20


def embedding_pair(
    points: np.ndarray,  # [N, 2]
    labels: np.ndarray,  # [N] int
    clusters: np.ndarray,  # [N] int
    *,
    title: str,
    class_names: Sequence[str],
    prototype_points: np.ndarray | None = None,  # [K, 2]
    prototype_images: Tensor | None = None,  # [K, C, H, W]
) -> Figure:
    """Left: colours are true labels. Right: colours are clusters, with the decoded prototypes at their places.

    The prototypes of the largest clusters get their picture first; where another picture is in the way, a prototype is
    a white dot. A prototype without a member in ``clusters`` is left out.
    """
    figure = new_figure(11, 5.4)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = class_colours(len(class_names))
    _scatter(left, points, colours[labels], "true labels")
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colours[index], label=legend_name(name))
        for index, name in enumerate(class_names)
    ]
    if len(class_names) <= _LEGEND_LIMIT:
        figure.legend(handles=handles, loc="outside left center", fontsize=8, frameon=False)
    number = int(clusters.max()) + 1 if prototype_points is None else len(prototype_points)
    cluster_colours = _cluster_colours(clusters, number)
    _scatter(
        right,
        points,
        cluster_colours[clusters],
        "clusters" if prototype_points is None else "clusters and decoded prototypes",
    )
    if prototype_points is not None and prototype_images is not None:
        sizes = np.bincount(clusters, minlength=number)
        _place_prototypes(right, prototype_points, prototype_images, sizes, cluster_colours)
    return figure


def embedding_triptych(
    points: np.ndarray,  # [N, 2]
    labels: np.ndarray,  # [N] int
    clusters: np.ndarray,  # [N] int
    predictions: np.ndarray,  # [N] int
    *,
    title: str,
    class_names: Sequence[str],
    prototype_points: np.ndarray,  # [K, 2]
    prototype_images: Tensor,  # [K, C, H, W]
) -> Figure:
    """Left: colours are true labels. Middle: clusters, with the decoded prototypes at their places as in
    :func:`embedding_pair`. Right: the class that each cluster is mapped to; what is wrong is drawn on top, larger and with a dark edge."""
    figure = new_figure(15.5, 5.5)
    figure.suptitle(title, fontsize=11)
    left, middle, right = figure.subplots(1, 3, sharex=True, sharey=True)
    colours = class_colours(len(class_names))
    _scatter(left, points, colours[labels], "A  true labels")
    number = len(prototype_points)
    cluster_colours = _cluster_colours(clusters, number)
    _scatter(middle, points, cluster_colours[clusters], "B  clusters and decoded prototypes")
    _place_prototypes(
        middle, prototype_points, prototype_images, np.bincount(clusters, minlength=number), cluster_colours
    )
    wrong = predictions != labels
    share = 1 - wrong.mean()
    _scatter(
        right, points, colours[predictions], f"C  clusters mapped to labels: {share:.1%} right, others with an edge"
    )
    right.scatter(*points[wrong].T, c=colours[predictions[wrong]], s=11, linewidths=0.5, edgecolors="black")
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colours[index], label=legend_name(name))
        for index, name in enumerate(class_names)
    ]
    if len(class_names) <= _LEGEND_LIMIT:
        figure.legend(handles=handles, loc="outside left center", fontsize=8, frameon=False)
    return figure


def _cluster_colours(clusters: np.ndarray, number: int) -> np.ndarray:  # [number, 4]
    """Those that have members share the colours among them; neighbours in number differ in hue."""
    members = np.unique(clusters)
    colours = np.zeros((number, 4))
    colours[members] = class_colours(len(members))[np.random.default_rng(0).permutation(len(members))]
    return colours


def _scatter(axes: Axes, points: np.ndarray, colours: np.ndarray, title: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=7, linewidths=0, alpha=0.75)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.06)


def _place_prototypes(axes: Axes, places: np.ndarray, images: Tensor, sizes: np.ndarray, colours: np.ndarray) -> None:
    axes.update_datalim(places[sizes > 0])  # what lies outside the axes is not drawn
    axes.autoscale_view()
    spans = np.array([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())]) * (_THUMBNAIL_SHARE * 1.25)
    zoom = _THUMBNAIL_SHARE * 4.6 * 72 / images.shape[-1]
    taken: list[np.ndarray] = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] == 0:
            continue
        place = places[index]
        if any(np.all(np.abs(place - other) < spans) for other in taken):
            axes.plot(
                *place, marker="o", markersize=5, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8
            )
            continue
        taken.append(place)
        picture = OffsetImage(as_pixels(images[index]), zoom=zoom, cmap="gray", clim=(0, 1))
        frame = {"edgecolor": colours[index], "linewidth": 1.4, "boxstyle": "square,pad=0.05"}
        axes.add_artist(AnnotationBbox(picture, tuple(place), pad=0, bboxprops=frame))
