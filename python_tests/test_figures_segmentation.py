# SPDX-License-Identifier: MIT
"""Figures of segmentation: what is drawn where, and in which colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need the extra protokernels[train]")

from matplotlib.figure import Figure
from matplotlib.image import imread

from protokernels.data.acdc import CLASSES
from protokernels.data.nifti_folders import MMWHS_CLASSES
from protokernels.figures import segmentation
from protokernels.figures.canvas import class_colours, save_figure
from protokernels.figures.segmentation import draw_overlays, draw_pixel_tsne


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: str | Path) -> Path:
        figures.append(figure)
        return save_figure(figure, path)

    monkeypatch.setattr(segmentation, "save_figure", keep)
    return figures


def squares(count: int = 2, side: int = 16) -> torch.Tensor:
    """Class 1 at the top left, class 2 at the bottom right, touching the border."""
    label = torch.zeros(count, side, side, dtype=torch.int64)
    label[:, 2:6, 3:9] = 1
    label[:, 10:, 12:] = 2
    return label


class TestOverlays:
    def test_one_row_per_slice_one_column_per_method(self, tmp_path: Path, drawn: list[Figure]) -> None:
        truth = squares()
        wrong = truth.roll(1, dims=1)
        path = draw_overlays(
            tmp_path / "a.png", torch.rand(2, 16, 16), truth, {"random": wrong, "block": truth}, title="t"
        )
        assert imread(path).std() > 0.01
        (figure,) = drawn
        assert [axes.get_title() for axes in figure.axes[:4]] == ["input", "ground truth", "random", "block"]
        assert len(figure.axes) == 8
        assert all(axes.images[0].get_clim() == (0, 1) for axes in figure.axes)
        captions = [axes.get_xlabel() for axes in figure.axes[:4]]
        assert captions[:2] == ["", ""] and captions[3] == "Dice 1.000"
        shared = (
            18 + 20
        ) / 2  # of 24 pixels of either class; a row of class 2 has left at the bottom, come in at the top
        assert captions[2] == f"Dice {2 * shared / 48:.3f}"

    def test_a_class_has_one_colour_and_its_outline_is_closed(self, tmp_path: Path, drawn: list[Figure]) -> None:
        truth = squares(1)
        only_two = torch.where(truth == 2, 2, 0)
        draw_overlays(tmp_path / "a.png", torch.zeros(1, 16, 16), truth, {"x": only_two})
        _, second, third = drawn[0].axes
        colours = class_colours(2)
        for axes, expected in ((second, colours), (third, colours[1:])):
            outlines = [one for one in axes.collections if solid(one)]
            assert len(outlines) == len(expected)
            for outline, colour in zip(outlines, expected, strict=True):
                np.testing.assert_allclose(outline.get_edgecolor()[0], colour)
                for path in outline.get_paths():
                    np.testing.assert_array_equal(path.vertices[0], path.vertices[-1])
            assert axes.get_xlim() == (-0.5, 15.5) and axes.get_ylim() == (15.5, -0.5)
        assert sum(not solid(one) for one in third.collections) == 2  # the ground truth, dotted

    def test_background_only_and_many_classes(self, tmp_path: Path) -> None:
        images = np.random.default_rng(0).random((1, 8, 12))
        draw_overlays(tmp_path / "a.png", images, np.zeros((1, 8, 12), int), {})
        many = np.arange(96).reshape(1, 8, 12) // 4
        draw_overlays(tmp_path / "b.png", images, many, {"m": many})
        assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))

    def test_the_same_input_gives_the_same_bytes(self, tmp_path: Path) -> None:
        files = [draw_overlays(tmp_path / name, squares() / 2, squares(), {"x": squares()}) for name in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_refusals(self, tmp_path: Path) -> None:
        images, truth = torch.rand(2, 16, 16), squares()
        with pytest.raises(ValueError, match=r"got \[2, 16, 16\], ground truth \[2, 16, 16\], x \[1, 16, 16\]"):
            draw_overlays(tmp_path / "a.png", images, truth, {"x": truth[:1]})
        with pytest.raises(ValueError, match="labels go up to 2; got 2 class names"):
            draw_overlays(tmp_path / "a.png", images, truth, {}, class_names=("0", "1"))
        with pytest.raises(ValueError, match="expected images"):
            draw_overlays(tmp_path / "a.png", images[:0], truth[:0], {})
        assert not (tmp_path / "a.png").exists()


def solid(outline: object) -> bool:
    ((_, dashes),) = outline.get_linestyle()  # type: ignore[attr-defined]
    return dashes is None


@pytest.mark.parametrize("names", [(*CLASSES, "b"), ("background", *MMWHS_CLASSES.values()), ("background", "b")])
def test_the_legend_is_as_wide_as_its_figure_at_most(
    names: tuple[str, ...], tmp_path: Path, drawn: list[Figure]
) -> None:
    """ACDC's and MMWHS's names, four of which are wider than the overlays of one method; a short name keeps its line."""
    truth = torch.arange(16 * 16).reshape(1, 16, 16) % len(names)
    draw_overlays(tmp_path / "a.png", torch.rand(1, 16, 16), truth, {"random": truth}, class_names=names)
    places, classes = torch.rand(len(names), 2), torch.arange(len(names))
    draw_pixel_tsne(tmp_path / "b.png", places, classes, class_names=[f"{name} of the heart" for name in names])
    for figure in drawn:
        (legend,) = figure.legends
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        assert box.y1 <= min(axes.get_window_extent().y0 for axes in figure.axes)


class TestPixels:
    def test_every_class_in_its_colour(self, tmp_path: Path, drawn: list[Figure]) -> None:
        labels = torch.tensor([0, 1, 2, 1])
        path = draw_pixel_tsne(tmp_path / "a.png", torch.rand(4, 2), labels, class_names=("none", "one", "two"))
        assert imread(path).std() > 0.01
        dots = drawn[0].axes[0].collections
        assert [len(one.get_offsets()) for one in dots] == [1, 2, 1]
        assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["none", "one", "two"]
        np.testing.assert_allclose(dots[2].get_facecolor()[0], class_colours(2)[1])

    def test_refusals(self, tmp_path: Path) -> None:
        for places, labels in ((torch.rand(4, 3), torch.zeros(4)), (torch.rand(4, 2), torch.zeros(3))):
            with pytest.raises(ValueError, match=r"places \[N, 2\] and labels \[N\]"):
                draw_pixel_tsne(tmp_path / "a.png", places, labels)
        with pytest.raises(ValueError, match="labels go up to 3"):
            draw_pixel_tsne(tmp_path / "a.png", torch.rand(1, 2), torch.tensor([3]), class_names=("a", "b"))
