# SPDX-License-Identifier: MIT
"""Contours of what an image shows, carried along with its transformations: against the transformed disc in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="figures need the extra protokernels[train]")
pytest.importorskip("accelerate", reason="optimized views need the extra protokernels[train]")

from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline

from protokernels.data import DataError, Split
from protokernels.figures import labelled_rows
from protokernels.papers import optimized_views
from protokernels.papers._optimized_views_networks import OptimizedViews
from protokernels.papers._optimized_views_scoring import example_views, examples
from protokernels.papers.optimized_views import OptimizedViewsConfig
from python_tests.nifti_files import write_brats

SIZE, RADIUS = 64, 10.0
MIDDLE = (SIZE - 1) / 2
CENTRE = (26.0, 20.0)  # of the disc, x and y
CONFIG = OptimizedViewsConfig.preset("fair", data="digits", image_size=SIZE, width=2, m_width=2)


class Chosen(nn.Module):
    """Stands for M: always the same parameters."""

    def __init__(self, *Lambda: float) -> None:
        super().__init__()
        self.Lambda = torch.tensor(Lambda)

    def forward(self, images: Tensor) -> Tensor:
        return self.Lambda.expand(len(images), 7)


def disc() -> Tensor:  # [1, 1, SIZE, SIZE]
    y, x = torch.meshgrid(*[torch.arange(SIZE, dtype=torch.float32)] * 2, indexing="ij")
    return (RADIUS + 0.5 - torch.hypot(x - CENTRE[0], y - CENTRE[1])).clamp(0, 1)[None, None]  # 1/2 at the radius


def drawn(figure: Figure) -> list[Outline]:
    return [
        path for part in figure.axes[0].collections if isinstance(part, QuadContourSet) for path in part.get_paths()
    ]


def inside(outline: Outline, grid: np.ndarray) -> np.ndarray:  # [P, 2] of x and y -> [P]
    return np.logical_xor.reduce([Outline(part).contains_points(grid) for part in outline.to_polygons()])


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


@pytest.mark.parametrize(
    ("hflip", "vflip", "turns", "window"),
    [
        (0, 0, 0.0, (0.45, 0.35)),  # the window, a quarter of the image, holds the middle of the disc
        (0.8, 0, 0.0, (0.3, 0.3)),  # the stronger of the two mirror images counts
        (0, 1, 0.1, (0.4, 0.25)),
        (1, 1, 0.6, (0.45, 0.2)),
    ],
)
@pytest.mark.parametrize("order", ["forwards", "without crop"])
def test_a_disc_in_closed_form(
    hflip: float, vflip: float, turns: float, window: tuple[float, float], order: str
) -> None:
    config = CONFIG if order == "forwards" else replace(CONFIG, order=("noise", "hflip", "blur", "vflip", "rotate"))
    torch.manual_seed(0)
    model = OptimizedViews(config, 1).eval()
    model.M = Chosen(1.0, 1.0, *window, hflip, vflip, turns)  # type: ignore[assignment]
    image = torch.rand(1, 1, SIZE, SIZE)
    view, mask = example_views(model, image, disc(), torch.Generator().manual_seed(0))
    assert mask is not None
    figure = labelled_rows([("X", image), ("X_M", view)], title="t", masks=[None, mask])
    (outline,) = drawn(figure)

    fine = np.stack(np.meshgrid(*[np.arange(0, SIZE, 0.25)] * 2), axis=-1).reshape(-1, 2)  # of the view, x and y
    x, y = fine[:, 0] - MIDDLE, fine[:, 1] - MIDDLE
    angle = 2 * math.pi * turns  # small positive turns are counter-clockwise, y points down
    x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
    x, y = (-x if hflip > 0.5 else x) + MIDDLE, (-y if vflip > 0.5 else y) + MIDDLE
    level = 0.5 / max(hflip, 1 - hflip)  # of the mask before it is blended with its mirror image
    there = np.hypot(x - CENTRE[0], y - CENTRE[1]) <= RADIUS + 0.5 - level
    if order == "forwards":  # the window fades as the logistic function
        half = SIZE / 8 - math.log(level / (1 - level))
        there &= np.maximum(abs(x + 0.5 - window[0] * SIZE), abs(y + 0.5 - window[1] * SIZE)) <= half
    row = SIZE + max(1, round(0.06 * SIZE))  # the view stands below the image
    assert overlap(inside(outline, fine + np.array([0, row])), there) > 0.96


def test_the_same_transformations_act_on_image_and_mask() -> None:
    """Where each acts with probability 1/2: an image that is its own mask, without blur and noise, stays its own mask."""
    config = replace(CONFIG, strategy="simclr", order=("crop", "hflip", "vflip", "rotate"))
    images = torch.rand(40, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    views, masks = example_views(OptimizedViews(config, 1), images, images, torch.Generator().manual_seed(0))
    assert masks is not None and torch.equal(views, masks)
    assert 0 < sum(torch.equal(view, image) for view, image in zip(views, images, strict=True)) < 40
    alone, none = example_views(OptimizedViews(config, 1), images, None, torch.Generator().manual_seed(0))
    assert none is None and torch.equal(alone, views)  # a mask changes no view


class TestLines:
    def test_a_mask_up_to_the_border_is_closed_there(self) -> None:
        mask = torch.zeros(2, 1, 8, 8)
        mask[1, :, 5:, 6:] = 1
        (outline,) = drawn(labelled_rows([("X", torch.zeros(2, 1, 8, 8))], title="t", masks=[mask]))
        x = 8 + 1  # of the second image
        np.testing.assert_allclose(outline.vertices.min(axis=0), (x + 5.5, 4.5))
        np.testing.assert_allclose(outline.vertices.max(axis=0), (x + 7.5, 7.5))
        np.testing.assert_array_equal(outline.vertices[0], outline.vertices[-1])

    def test_the_picture_is_as_large_as_without(self) -> None:
        images, mask = torch.rand(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
        plain, lined = (labelled_rows([("X", images)], title="t", masks=masks) for masks in ([], [mask]))
        assert plain.axes[0].get_xlim() == lined.axes[0].get_xlim()
        assert plain.axes[0].get_ylim() == lined.axes[0].get_ylim()


def test_split_masks() -> None:
    images, labels = np.zeros((3, 4, 5, 3), np.uint8), np.zeros(3, np.int64)
    masks = np.arange(60).reshape(3, 4, 5) % 2 == 0
    split = Split(images, labels, masks=masks)
    taken = split.take(np.array([2, 0]))
    assert taken.masks is not None and taken.masks[0].tolist() == masks[2].tolist()
    assert split.join(split).masks is not None and split.join(Split(images, labels)).masks is None
    for wrong in (masks[:2], masks.astype(np.uint8)):
        with pytest.raises(DataError, match=r"masks must be bool of shape \[3, 4, 5\]; got"):
            Split(images, labels, masks=wrong)
    assert examples(Split(images, labels), CONFIG)[2] is None
    *_, shown = examples(split, CONFIG)
    assert shown is not None and shown.shape == (3, 1, SIZE, SIZE) and shown.min() == 0 and shown.max() == 1


def test_figures_of_brats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tumours are outlined in the slices that show one, untransformed, and in none of the others."""
    write_brats(tmp_path / "Task01_BrainTumour", 90)
    config = replace(CONFIG, data="brats", strategy="random", epochs=1, evaluations=1)
    figures: list[Any] = []
    monkeypatch.setattr(
        "protokernels.figures.optimized_views.labelled_rows",
        lambda *a, **k: figures.append(k) or labelled_rows(*a, **k),
    )
    optimized_views.train(config, tmp_path / "run", data_root=tmp_path, device="cpu", quiet=True)
    (given,) = figures
    first, second, third = given["masks"]
    assert [float(mask.max()) > 0.5 for mask in first] == [False] * 4 + [True] * 4
    assert given["captions"] == ["no tumour"] * 4 + ["tumour"] * 4
    assert second.shape == third.shape == first.shape and not torch.equal(second, third)
