# SPDX-License-Identifier: MIT
"""Figures without pyplot: an Agg canvas of their own, saved whole or not at all."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from ..training.files import make_folder, write_bytes

DOTS_PER_INCH = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches whose parts keep clear of each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes ``figure`` as png; a reader never finds half a picture. The file does not depend on the time of day. Names of classes
    and files are drawn as they are spelt: a dollar begins no formula. Logarithmic axes therefore need tick labels of their own, for
    matplotlib's are formulas."""
    path = Path(path)
    make_folder(path.parent, parents=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    _fold_titles(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
    return path


def _fold_titles(figure: Figure) -> None:
    """Puts a title that is wider than its figure on several lines; matplotlib's own wrapping takes a dollar for a formula."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for title in figure.texts:
        share = figure.bbox.width / max(1.0, title.get_window_extent(renderer).width)
        if share < 1:
            lines = title.get_text().split("\n")
            letters = max(1, int(0.95 * share * max(map(len, lines))))
            title.set_text("\n".join(textwrap.fill(line, letters) for line in lines))


def as_pixels(image: Tensor) -> np.ndarray:  # [C, H, W] in [0, 1] -> [H, W] or [H, W, 3]
    """An image as matplotlib takes it."""
    pixels: np.ndarray = image.detach().float().clamp(0, 1).cpu().numpy()
    arranged: np.ndarray = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    return arranged


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """One image without ticks."""
    axes.imshow(as_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=7, pad=2)


def legend_name(name: str) -> str:
    """``name`` as a label that stands in a legend: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def legend_below(figure: Figure, **options: Any) -> None:
    """A legend below the axes, in as many columns, up to four, as the figure is wide enough for. ``options`` as of ``Figure.legend``."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in (4, 3, 2, 1):
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=7, frameon=False, **options)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def class_colours(count: int) -> np.ndarray:  # [count, 4]
    """Colours that can be told apart: the ten of tab10, then the twenty of tab20, then evenly spaced hues."""
    if count <= 10:
        return np.asarray(colormaps["tab10"](np.arange(count)))
    if count <= 20:
        return np.asarray(colormaps["tab20"](np.arange(count)))
    return np.asarray(colormaps["gist_rainbow"](np.linspace(0, 1, count, endpoint=False)))
