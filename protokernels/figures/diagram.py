# SPDX-License-Identifier: MIT
"""Diagrams of what is connected to what, with the shapes that a forward pass had: none can disagree with the network it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from torch import Tensor, nn

FONT = 8  # points, of every text
PAD, GAP_X, GAP_Y, MARGIN = 0.08, 0.32, 0.22, 0.12  # inches: around a text, between columns and rows, around everything
MOST = 8  # layers of a module that are listed one by one
_FILL = {"data": "white", "module": "#dce9f5", "value": "#eeeeee", "loss": "#fbe5d0"}


class Box(NamedTuple):
    """A text in a frame."""

    column: int
    row: int
    text: str
    kind: Literal["data", "module", "value", "loss"] = "value"


class Shapes:
    """What the modules of a model gave in a forward pass of ``batch`` images.

    Args:
        model: whose modules are looked at.
        batch: number of images, B.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch = model, batch
        self.outputs: dict[str, list[Tensor]] = {}  # of each module, in the order in which they were first done

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the forward pass; of a module that is called several times the first call counts."""
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: self._keep(name, output))
            for name, module in self.model.named_modules()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, output: Any) -> None:
        self.outputs.setdefault(name, _tensors(output))

    def shape(self, tensor: Tensor) -> str:
        """The shape of a tensor with B for the batch, such as ``[2B, 16, 7, 7]``."""
        first, *others = tensor.shape
        times, rest = divmod(first, self.batch)
        names = [str(first) if rest or not times else f"{times if times > 1 else ''}B", *map(str, others)]
        return f"[{', '.join(names)}]"

    def value(self, name: str, tensor: Tensor) -> str:
        """The text of a box for a tensor."""
        return f"{name}\n{self.shape(tensor)}"

    def module(self, path: str, name: str = "") -> str:
        """The text of a box for a module: its name, what its layers give one after the other, and what it gives itself.

        Args:
            path: of the module in the model.
            name: that it has in the paper; default: ``path``.
        """
        lines = [f"{name} = {path}" if name and name != path else path]
        inside = self._layers(path)
        lines += [f"{kind} {self.shape(output)}" for kind, output in inside]
        listed = [output.shape for _, output in inside]
        lines += [
            ("→ " if inside else "") + self.shape(output) for output in self.outputs[path] if output.shape not in listed
        ]
        return "\n".join(lines)

    def _layers(self, path: str) -> list[tuple[str, Tensor]]:
        """Name and output of the layers with weights in a module; where there are many, of its parts; none where it is a layer itself."""
        below = {name: module for name, module in self.model.named_modules() if name.startswith(f"{path}.")}
        leaves = [name for name in self.outputs if name in below and isinstance(below[name], _LAYERS)]
        if len(leaves) <= MOST:
            last = [name.rpartition(".")[2] for name in leaves]  # in a sequence of layers a number
            names = [
                type(below[path]).__name__ if name.isdigit() else name for path, name in zip(leaves, last, strict=True)
            ]
            return [(name, self.outputs[path][0]) for name, path in zip(names, leaves, strict=True)]
        names = [name for name, module in below.items() if _is_part(module) and name in self.outputs]
        parts = [name for name in names if not any(name.startswith(f"{other}.") for other in names if other != name)]
        if len(parts) == 1:
            return self._layers(parts[0])
        return [(name.removeprefix(f"{path}."), self.outputs[name][0]) for name in self.outputs if name in parts]


_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def _is_part(module: nn.Module) -> bool:
    """Whether it computes with weights and is no normalisation."""
    return any(isinstance(each, _LAYERS) for each in module.modules())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def diagram(boxes: Mapping[str, Box], arrows: Sequence[tuple[str, str]], *, title: str) -> Figure:
    """Boxes in columns and rows, each as wide as its text, with arrows between them that cross none.

    Args:
        boxes: by name.
        arrows: names of the boxes that they go from and to.
        title: of the figure.

    Raises:
        ValueError: an arrow would have to cross a box.
    """
    figure = Figure()
    figure.suptitle(title, fontsize=FONT)
    sizes = {name: _size(figure, box.text) for name, box in boxes.items()}
    across = _places([(box.column, sizes[name][0]) for name, box in boxes.items()], GAP_X)
    down = _places([(box.row, sizes[name][1]) for name, box in boxes.items()], GAP_Y)
    wide, high = _size(figure, title)
    content = max(end for _, end in across.values()) + MARGIN
    width, top = max(content, wide + 2 * MARGIN), high + MARGIN
    left = (width - content) / 2
    height = top + max(end for _, end in down.values()) + MARGIN
    figure.set_size_inches(width, height)
    FigureCanvasAgg(figure)
    figure.texts[0].set_y(1 - 0.5 * top / height)
    figure.texts[0].set_verticalalignment("center")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    frames = {}
    for name, box in boxes.items():
        x, y = left + sum(across[box.column]) / 2, top + sum(down[box.row]) / 2
        (w, h), style = sizes[name], "square,pad=0" if box.kind == "module" else "round,pad=0,rounding_size=0.08"
        frames[name] = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, facecolor=_FILL[box.kind],
                                      edgecolor="0.4", linewidth=0.8))  # fmt: skip
        axes.text(x, y, box.text, fontsize=FONT, ha="center", va="center", multialignment="center", linespacing=1.3,
                  parse_math=False)  # fmt: skip
    for start, end in arrows:
        lanes = left + across[boxes[end].column][0] - GAP_X / 2, left + across[boxes[start].column][1] + GAP_X / 2
        points = _way(frames, start, end, lanes, both=(end, start) in arrows)
        axes.add_patch(FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=7, linewidth=0.8, color="0.25",
                                       shrinkA=0, shrinkB=0, joinstyle="miter"))  # fmt: skip
    return figure


def _size(figure: Figure, text: str) -> tuple[float, float]:
    """Of a box around a text, in inches."""
    drawn = figure.text(0, 0, text, fontsize=FONT, linespacing=1.3, parse_math=False)
    extent = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    drawn.remove()
    return extent.width / figure.dpi + 2 * PAD, extent.height / figure.dpi + 2 * PAD


def _places(given: Sequence[tuple[int, float]], gap: float) -> dict[int, tuple[float, float]]:
    """Where every column or row begins and ends: each is as wide as the widest of its boxes."""
    sizes: dict[int, float] = {}
    for index, size in given:
        sizes[index] = max(sizes.get(index, 0.0), size)
    places, start = {}, MARGIN
    for index in sorted(sizes):
        places[index] = (start, start + sizes[index])
        start += sizes[index] + gap
    return places


Frame = tuple[float, float, float, float]  # left, top, right, bottom


def _way(
    frames: Mapping[str, Frame], start: str, end: str, lanes: tuple[float, float], *, both: bool
) -> list[tuple[float, float]]:
    """From one box to the other: straight, or with two corners in a lane between columns; the first that crosses no box."""
    a, b = frames[start], frames[end]
    if a[0] < b[2] and b[0] < a[2]:  # one above the other
        x = (b[0] + b[2]) / 2 + ((0.08 if a[1] < b[1] else -0.08) if both else 0.0)
        ways = [[(x, a[3]), (x, b[1])] if a[1] < b[1] else [(x, a[1]), (x, b[3])]]
    else:
        first, last = (a[2], (a[1] + a[3]) / 2), (b[0], (b[1] + b[3]) / 2)
        level = abs(first[1] - last[1]) < 1e-6
        ways = [[first, *([] if level else [(x, first[1]), (x, last[1])]), last] for x in lanes]
    others = [frame for name, frame in frames.items() if name not in (start, end)]
    for way in ways:
        if not any(_crosses(segment, frame) for segment in pairwise(way) for frame in others):
            return way
    raise ValueError(f"diagram: no way from {start} to {end} that crosses no box")


def _crosses(segment: tuple[tuple[float, float], tuple[float, float]], frame: Frame) -> bool:
    (x0, y0), (x1, y1) = segment  # along an axis
    return max(min(x0, x1), frame[0]) < min(max(x0, x1), frame[2]) + 1e-9 and max(min(y0, y1), frame[1]) < (
        min(max(y0, y1), frame[3]) + 1e-9
    )
