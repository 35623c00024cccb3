# SPDX-License-Identifier: MIT
"""Images in rows and columns: one picture of all of them, since axes for each take longest of all to draw."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..data import Split
from .canvas import as_pixels, new_figure

_GAP = 0.06
"""Between images, in widths of one."""
_CAPTION = 0.2
"""Height of a line of a caption, likewise."""
_LETTERS = 15
"""In a line of a caption, which is as wide as an image."""
_OUTLINE = "tab:red"
"""Of masks."""


def image_grid(
    images: Tensor,  # [N, C, H, W] in [0, 1]
    *,
    title: str,
    captions: Sequence[str] | None = None,
    faded: Sequence[bool] | None = None,
    columns: int = 10,
) -> Figure:
    """All images in rows of ``columns``, each with its caption; ``faded`` ones are drawn pale.

    Raises:
        ValueError: no image, or captions or ``faded`` of another length.
    """
    count = len(images)
    lengths = [len(given) for given in (captions, faded) if given]
    if not count or any(length != count for length in lengths):
        raise ValueError(
            f"image_grid: expected at least one image, and captions and faded as many or none; got {count} images and {lengths}"
        )
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    tall = images.shape[-2] / images.shape[-1]
    captions, size = _folded(captions or ())
    figure = new_figure(max(4.0, 0.85 * columns), 0.85 * rows * (tall + _CAPTION * _lines(captions)) + 0.4)
    figure.suptitle(title, fontsize=10)
    tiles = [as_pixels(image) for image in images]
    if faded is not None:
        tiles = [1 - 0.3 * (1 - tile) if pale else tile for tile, pale in zip(tiles, faded, strict=True)]
    _draw_tiles(figure.subplots(), tiles, columns, captions, size=size)
    return figure


def reconstruction_rows(
    originals: Tensor,  # [N, C, H, W] in [0, 1]
    reconstructions: Tensor,  # [N, C, H, W]
    *,
    title: str,
) -> Figure:
    """Originals above their reconstructions."""
    return labelled_rows([("original", originals), ("reconstructed", reconstructions)], title=title)


def labelled_rows(
    rows: Sequence[tuple[str, Tensor]],  # name and [N, C, H, W] in [0, 1], the same N
    *,
    title: str,
    captions: Sequence[str] = (),
    masks: Sequence[Tensor | None] = (),  # of each row [N, 1, H, W]
) -> Figure:
    """One row per name, one column per image; ``captions``, if there are any, stand above the columns. Where a row has ``masks``, each
    image has a line around what is above 1/2 in its mask.

    Raises:
        ValueError: no row, no image, or rows or captions of different lengths.
    """
    lengths = {len(images) for _, images in rows} | ({len(captions)} if captions else set())
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"labelled_rows: expected rows and captions of one length, at least 1; got {sorted(lengths)}")
    (count,) = lengths
    tall = rows[0][1].shape[-2] / rows[0][1].shape[-1]
    captions, size = _folded(captions)
    figure = new_figure(max(4.0, 0.95 * count), 0.95 * len(rows) * tall + 0.4 + 0.1 * _lines(captions))
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots()
    tiles = [as_pixels(image) for _, images in rows for image in images]
    places = _draw_tiles(axes, tiles, count, captions, size=size)
    for (name, _), place in zip(rows, places[::count], strict=True):
        axes.text(-0.1 * place.get_width(), place.get_y() + place.get_height() / 2, name, fontsize=8,
                  ha="right", va="center", rotation=90, multialignment="center")  # fmt: skip
    for index, row in enumerate(masks):
        for mask, place in zip([] if row is None else row, places[index * count :], strict=False):
            _outline(axes, mask[0].numpy(), place)
    return figure


def _outline(axes: Axes, mask: np.ndarray, place: Rectangle) -> None:
    """The line at 1/2, closed at the border of the image in ``place``; none where the mask does not reach it."""
    if not mask.max() > 0.5:
        return
    rows, columns = (np.arange(-1, length + 1) + 0.5 for length in mask.shape)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.contour(
        columns + place.get_x(), rows + place.get_y(), np.pad(mask, 1), levels=[0.5], colors=_OUTLINE, linewidths=0.9
    )
    axes.set(xlim=limits[0], ylim=limits[1])


def of_each_class(split: Split, count: int) -> Tensor:  # -> [n] int64
    """The first images of every class in turn, ordered by class."""
    labels = torch.as_tensor(split.labels)
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    chosen = (rank * (int(labels.max()) + 1) + labels).argsort(stable=True)[:count]
    return chosen[labels[chosen].argsort(stable=True)]


def _folded(captions: Sequence[str]) -> tuple[list[str], float]:
    """Captions no wider than an image, for names of classes are of any length; and the size of their letters in points."""
    size = 6 if max(map(len, captions), default=0) > 10 else 7
    return ["\n".join(textwrap.fill(line, _LETTERS) for line in caption.split("\n")) for caption in captions], size


def _lines(captions: Sequence[str]) -> int:
    """Of the caption that has most."""
    return max((caption.count("\n") + 1 for caption in captions), default=0)


def _draw_tiles(
    axes: Axes,
    tiles: Sequence[np.ndarray],  # [H, W] or [H, W, 3] each
    columns: int,
    captions: Sequence[str],
    *,
    size: float,
) -> list[Rectangle]:
    """Tiles in rows of ``columns``, framed, the first ones with captions of ``size`` points above them. The frames, in units of pixels."""
    height, width = tiles[0].shape[:2]
    gap = max(1, round(_GAP * width))
    # captions of the first row stand outside of the picture
    above = round(_CAPTION * _lines(captions) * width) if len(captions) > columns else 0
    down, right = height + gap + above, width + gap
    rows = -(-len(tiles) // columns)
    picture = np.ones((rows * down - gap - above, columns * right - gap, 3), dtype=np.float32)
    frames = []
    for index, tile in enumerate(tiles):
        y, x = index // columns * down, index % columns * right
        picture[y : y + height, x : x + width] = tile if tile.ndim == 3 else tile[..., None]
        frames.append(Rectangle((x - 0.5, y - 0.5), width, height))
    axes.imshow(picture, interpolation="nearest")
    axes.add_collection(
        PatchCollection(frames, facecolor="none", edgecolor="black", linewidth=0.6, clip_on=False), autolim=False
    )
    axes.set_axis_off()
    axes.set_anchor("N")
    for frame, caption in zip(frames, captions, strict=False):
        place = frame.get_x() + width / 2, frame.get_y()
        axes.annotate(
            caption,
            place,
            (0, 2),
            textcoords="offset points",
            fontsize=size,
            ha="center",
            va="bottom",
            annotation_clip=False,
        )
    return frames
