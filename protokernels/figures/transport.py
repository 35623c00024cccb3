# SPDX-License-Identifier: MIT
"""Where the mass of one view's positions goes in the other view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .canvas import as_pixels, new_figure, show_image

_COLOURS = "inferno"


def transport_maps(
    first: Tensor,  # [N, C, S, S] in [0, 1]
    second: Tensor,  # [N, C, S, S]
    plans: Tensor,  # [N, n, n], n = side * side positions in rows
    *,
    side: int,
    positions: Sequence[int],
    partners: Tensor,  # [N, n, 2] row and column in the second view, in units of its side; NaN: outside
    title: str,
) -> Figure:
    """One row per image: its first view with the chosen positions, then for each of them where in the second view its mass
    goes (the largest is the brightest), with a cross at the place where the two crops show the same point."""
    columns = 1 + len(positions)
    figure = new_figure(1.5 * columns, 1.55 * len(first) + 0.6)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(first), columns, squeeze=False)
    for index, axes in enumerate(grid):
        show_image(axes[0], first[index], "first view" if index == 0 else "")
        for number, position in enumerate(positions, start=1):
            _mark(axes[0], position, side, first.shape[-1], str(number))
            place = partners[index, position]
            row = plans[index, position]
            heading = f"mass of {number}: {100 * float(row.sum()):.3g} %"
            _overlay(axes[number], second[index], row.reshape(side, side), heading)
            if torch.isfinite(place).all():
                down, across = (place * second.shape[-1] - 0.5).tolist()
                axes[number].plot(across, down, "x", color="cyan", markersize=6, markeredgewidth=1.5)
    return figure


def mass_maps(
    first: Tensor,  # [N, C, S, S] in [0, 1]
    second: Tensor,  # [N, C, S, S]
    a: Tensor,  # [N, n]
    b: Tensor,  # [N, n]
    plans: Tensor,  # [N, n, n]
    *,
    side: int,
    title: str,
) -> Figure:
    """One row per image: both views, the masses of their positions over them, and the plan as a matrix."""
    figure = new_figure(7.6, 1.55 * len(first) + 0.6)
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(first), 5, squeeze=False)
    headings = ("first view", "second view", "mass a", "mass b", "plan")
    for index, axes in enumerate(grid):
        show_image(axes[0], first[index])
        show_image(axes[1], second[index])
        _overlay(axes[2], first[index], a[index].reshape(side, side), "")
        _overlay(axes[3], second[index], b[index].reshape(side, side), "")
        axes[4].imshow(plans[index].numpy(), cmap=_COLOURS, interpolation="nearest")
        axes[4].set_xticks([])
        axes[4].set_yticks([])
        if index == 0:
            for axis, heading in zip(axes, headings, strict=True):
                axis.set_title(heading, fontsize=7, pad=2)
    return figure


def _overlay(axes: Axes, image: Tensor, mass: Tensor, heading: str) -> None:
    """The mass in colour over the grey image, each position as one square."""
    grey = as_pixels(image.mean(dim=0, keepdim=True))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    size = (image.shape[-2], image.shape[-1])
    fine = F.interpolate(mass[None, None].float(), size, mode="nearest")[0, 0]
    top = max(float(fine.max()), torch.finfo(torch.float32).tiny)
    axes.imshow(fine.numpy(), cmap=_COLOURS, vmin=0, vmax=top, alpha=0.55, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    if heading:
        axes.set_title(heading, fontsize=6, pad=2)


def _mark(axes: Axes, position: int, side: int, size: int, name: str) -> None:
    cell = size / side
    row, column = divmod(position, side)
    corner = (column * cell - 0.5, row * cell - 0.5)
    axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="cyan", linewidth=1.2))
    axes.text(corner[0] + cell / 2, corner[1] + cell / 2, name, color="cyan", fontsize=7, ha="center", va="center")
