# SPDX-License-Identifier: MIT
"""Images in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from .canvas import new_figure, show_image


def image_grid(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    *,
    title: str,
    captions: Sequence[str] | None = None,
    faded: Sequence[bool] | None = None,
    columns: int = 10,
) -> Figure:
    """All images in rows of ``columns``, each with its caption; ``faded`` ones are drawn pale."""
    count = len(images)
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    figure = new_figure(max(4.0, 0.85 * columns), (1.05 if captions else 0.85) * rows + 0.5)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    size = 6 if captions and max(map(len, captions)) > 10 else 7
    for index, axes in enumerate(grid.flat):
        if index >= count:
            axes.axis("off")
            continue
        caption = captions[index] if captions else ""
        show_image(axes, images[index], caption, faded=bool(faded and faded[index]), size=size)
    return figure


def reconstruction_rows(
    originals: Tensor,  # [N, C, H, W] in [0, 1]
    reconstructions: Tensor,  # [N, C, H, W]
    *,
    title: str,
) -> Figure:
    """Originals above their reconstructions."""
    count = len(originals)
    figure = new_figure(max(4.0, 0.95 * count), 2.6)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(2, count, squeeze=False)
    for row, (label, images) in enumerate((("original", originals), ("reconstructed", reconstructions))):
        for column in range(count):
            show_image(grid[row, column], images[column])
        grid[row, 0].set_ylabel(label, fontsize=8)
    return figure


def labelled_rows(
    rows: Sequence[tuple[str, Tensor]],  # name and [N, C, H, W] in [0, 1], the same N
    *,
    title: str,
    captions: Sequence[str],
) -> Figure:
    """One row per name, one column per image; ``captions`` stand above the columns."""
    count = len(captions)
    figure = new_figure(max(4.0, 0.95 * count), 1.0 * len(rows) + 0.7)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for index, (name, images) in enumerate(rows):
        for column in range(count):
            show_image(grid[index, column], images[column], captions[column] if index == 0 else "")
        grid[index, 0].set_ylabel(name, fontsize=8)
    return figure
