# SPDX-License-Identifier: MIT
"""Pictures: they are drawn, they are legible files, and nothing touches pyplot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need the extra protokernels[train]")

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.legend import Legend
from matplotlib.offsetbox import AnnotationBbox
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from protokernels.figures import (
    elbow_curve,
    embedding_pair,
    image_grid,
    labelled_rows,
    loss_curves,
    reconstruction_rows,
    save_figure,
    similarity_heatmap,
)
from protokernels.figures.canvas import DOTS_PER_INCH, class_colours
from protokernels.figures.fractions import label_fraction_curves
from protokernels.figures.optimized_views import auc_curves, parameter_histograms
from protokernels.figures.segmentation import draw_pixel_tsne
from protokernels.figures.sweeps import Panel, sweep_figure
from protokernels.training import WriteError


def pixels(path: Path) -> np.ndarray:
    picture: np.ndarray = imread(path)
    assert picture.ndim == 3 and min(picture.shape[:2]) >= 150
    assert picture[..., :3].std() > 0.01, "the picture is blank"
    return picture


def corners(figure: Figure) -> list[tuple[int, int]]:
    """Of the images in a grid: first column, first row."""
    (frames,) = figure.axes[0].collections
    return [tuple((path.vertices.min(0) + 0.5).astype(int)) for path in frames.get_paths()]


def tiles(figure: Figure) -> list[np.ndarray]:
    """What a grid shows in each of its frames, [H, W, 3]."""
    (frames,) = figure.axes[0].collections
    picture = np.asarray(figure.axes[0].images[0].get_array())
    ends = [(path.vertices.max(0) + 0.5).astype(int) for path in frames.get_paths()]
    return [picture[y:last, x:right] for (x, y), (right, last) in zip(corners(figure), ends, strict=True)]


class TestFiles:
    def test_pyplot_stays_out(self) -> None:
        code = "import sys, protokernels.figures, protokernels.figures.vaesim; sys.exit('matplotlib.pyplot' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_the_same_figure_gives_the_same_bytes_and_replaces_the_old_file(self, tmp_path: Path) -> None:
        figures = [similarity_heatmap(torch.eye(4), title="t") for _ in range(2)]
        first = save_figure(figures[0], tmp_path / "new" / "a.png").read_bytes()
        assert save_figure(figures[1], tmp_path / "new" / "a.png").read_bytes() == first
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]

    def test_a_file_in_the_folders_place_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "figures").write_bytes(b"mine")
        with pytest.raises(WriteError, match=r"figures could not be written .* a file of that name is in the way"):
            save_figure(similarity_heatmap(torch.eye(4), title="t"), tmp_path / "figures" / "a.png")

    @pytest.mark.parametrize("name", ["$", "$x_{$", r"a $\frac$", "$x$ ^_b", "[lowercase]"])
    def test_names_are_drawn_as_they_are_spelt(self, name: str, tmp_path: Path) -> None:
        figure = image_grid(torch.rand(3, 1, 16, 16), title=name, captions=[f"{name} {index}" for index in range(3)])
        pixels(save_figure(figure, tmp_path / "a.png"))
        assert not any(text.get_parse_math() for text in figure.findobj(Text))
        figure = embedding_pair(
            np.random.default_rng(0).normal(size=(9, 2)),
            np.arange(9) % 2,
            np.arange(9) % 3,
            title=name,
            class_names=[name, "b"],
        )
        pixels(save_figure(figure, tmp_path / "b.png"))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [name, "b"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda title: image_grid(torch.zeros(2, 1, 8, 8), title=title),
        lambda title: similarity_heatmap(torch.eye(4), title=title),
        lambda title: elbow_curve([2, 3], [1.0, 2.0], 2, found=True, title=title),
        lambda title: auc_curves({"random": [[(1, 0.5)]]}, title=title),
    ],
)
def test_a_title_wider_than_its_figure_is_all_there(draw: Callable[[str], Figure], tmp_path: Path) -> None:
    figure = draw(
        "mine, university hospital, 2019 to 2024: decoded prototypes, with the most frequent class and number of members"
    )
    save_figure(figure, tmp_path / "a.png")
    figure.draw_without_rendering()
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1
    assert figure.axes[0].get_window_extent().y1 <= title.y0


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_are_whole_numbers(epochs: int) -> None:
    numbers = range(1, epochs + 1)
    figures = [
        auc_curves({"random": [[(epoch, 0.5) for epoch in numbers]]}, title="t"),
        parameter_histograms([{"epoch": epoch, "counts": {"blur": [1, 2]}} for epoch in numbers], title="t"),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        ticks = figure.axes[0].get_xticks()
        assert len(ticks) and all(tick == round(tick) for tick in ticks)


class TestLegends:
    """matplotlib leaves labels that begin with an underscore out of a legend."""

    NAMES = ("_one", "two")

    def test_lines(self) -> None:
        row = {"probe": {"1%": {"macro_auroc": 0.5}}}
        line = {name: [0.5, 0.6] for name in self.NAMES}
        figures = [
            label_fraction_curves(dict.fromkeys(self.NAMES, row), title="t"),
            sweep_figure([Panel("x", "y", [1, 2], line, {"_one": [0.1, 0.1]})], title="t"),
            auc_curves({name: [[(1, 0.5)]] for name in self.NAMES}, title="t", flat=self.NAMES[:1]),
        ]
        for figure in figures:
            (legend,) = figure.findobj(Legend)
            assert [text.get_text().strip() for text in legend.get_texts()] == list(self.NAMES)

    def test_dots(self) -> None:
        figure = embedding_pair(np.eye(2), np.arange(2), np.arange(2), title="t", class_names=self.NAMES)
        assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == list(self.NAMES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("protokernels.figures.segmentation.save_figure", lambda figure, path: figure)
            figure = draw_pixel_tsne("a.png", np.eye(2), np.arange(2), class_names=self.NAMES)  # type: ignore[assignment]
        assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == list(self.NAMES)


class TestGrids:
    @pytest.mark.parametrize(("count", "channels", "height"), [(1, 1, 16), (40, 1, 16), (13, 3, 24)])
    def test_every_image_stands_in_its_place_below_its_caption(
        self, tmp_path: Path, count: int, channels: int, height: int
    ) -> None:
        images = torch.rand(count, channels, height, 16)
        captions = [f"image {i}" for i in range(count)]
        figure = image_grid(images, title="t", captions=captions)
        pixels(save_figure(figure, tmp_path / "a.png"))
        found = tiles(figure)
        assert len(found) == count and [text.get_text() for text in figure.axes[0].texts] == captions
        for image, tile in zip(images, found, strict=True):
            np.testing.assert_array_equal(tile, image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        for (x, y), text in zip(corners(figure), figure.axes[0].texts, strict=True):
            assert text.xy == (x + 7.5, y - 0.5)

    @pytest.mark.parametrize("rows", [False, True])
    def test_captions_do_not_touch_each_other(self, rows: bool) -> None:
        """Names of PathMNIST's and BloodMNIST's classes, and a long word."""
        names = ["cancer-associated stroma (1421)", "immature granulocytes(myelocytes)", "Lungenentzündung mm"]
        images, captions = torch.zeros(8, 1, 28, 28), [name for name in names for _ in range(3)][1:]
        figure = (
            labelled_rows([("self-\nsupervised", images)] * 3, captions=captions, title="t")
            if rows
            else image_grid(images, title="t", captions=captions)
        )
        figure.set_dpi(DOTS_PER_INCH)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_rotation() == 0]
        assert len(boxes) == 8
        for left, right in pairwise(boxes):
            assert left.x1 < right.x0
        assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
        assert max(box.y1 for box in boxes) <= figure.texts[0].get_window_extent().y0

    @pytest.mark.parametrize("caption", ["gq|", "gq|\ngq|"])
    def test_captions_do_not_touch_the_images(self, caption: str) -> None:
        figure = image_grid(torch.zeros(23, 1, 28, 28), title="t", captions=[caption] * 23)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        boxes = [text.get_window_extent() for text in axes.texts]
        for x, y in corners(figure):
            first, last = axes.transData.transform([(x, y + 28), (x + 28, y)])
            assert not any(box.overlaps(Bbox([first + 0.5, last - 0.5])) for box in boxes)

    def test_grey_levels_are_absolute(self) -> None:
        """A dim image stays dim: every image is drawn from 0 (black) to 1 (white)."""
        first, second = tiles(image_grid(torch.full((2, 1, 8, 8), 0.2), title="t", faded=[False, True]))
        np.testing.assert_allclose(first, 0.2)
        np.testing.assert_allclose(second, 1 - 0.3 * 0.8)

    def test_reconstructions(self, tmp_path: Path) -> None:
        figure = reconstruction_rows(torch.zeros(5, 1, 8, 8), torch.ones(5, 1, 8, 8), title="t")
        pixels(save_figure(figure, tmp_path / "a.png"))
        assert [float(tile.mean()) for tile in tiles(figure)] == [0.0] * 5 + [1.0] * 5
        assert [text.get_text() for text in figure.axes[0].texts] == ["original", "reconstructed"]

    @pytest.mark.parametrize(("count", "more"), [(0, {}), (2, {"captions": ["one"]}), (2, {"faded": [True] * 3})])
    def test_grids_of_nothing_or_with_other_lengths_are_refused(self, count: int, more: Any) -> None:
        with pytest.raises(ValueError, match=f"image_grid: expected at least one image.* got {count} images"):
            image_grid(torch.zeros(count, 1, 4, 4), title="t", **more)

    @pytest.mark.parametrize("counts", [(), (0, 0), (2, 3)])
    def test_rows_of_different_lengths_are_refused(self, counts: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="rows and captions of one length, at least 1"):
            labelled_rows([("row", torch.zeros(count, 1, 8, 8)) for count in counts], title="t")


class TestCurvesAndHeatmap:
    def test_curves_show_the_metrics(self, tmp_path: Path) -> None:
        metrics = [{"epoch": epoch, "loss": 1 / epoch, "kl": epoch} for epoch in range(1, 30)]
        figure = loss_curves(metrics, ["loss", "kl"], title="t")
        pixels(save_figure(figure, tmp_path / "a.png"))
        assert figure.axes[0].lines[0].get_ydata().tolist() == [1 / epoch for epoch in range(1, 30)]

    def test_one_epoch_is_a_visible_point_and_none_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no line of the metrics has kl; they have epoch, loss"):
            loss_curves([{"epoch": 1, "loss": 2.0}], ["kl"], title="t")
        figure = loss_curves([{"epoch": 1, "loss": 2.0}], ["loss"], title="t")
        assert figure.axes[0].lines[0].get_marker() == "."
        with pytest.raises(ValueError, match="no metrics"):
            loss_curves([], ["loss"], title="t")

    def test_epochs_and_prototypes_are_whole_numbers(self) -> None:
        curves = loss_curves([{"epoch": 1, "loss": 0.5}], ["loss", "of another phase"], title="t")
        assert [axes.get_title() for axes in curves.axes if axes.axison] == ["loss"]
        for figure in (curves, similarity_heatmap(torch.eye(3), title="t")):
            figure.draw_without_rendering()
            low, high = figure.axes[0].get_xlim()
            shown = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
            assert shown and all(tick == int(tick) for tick in shown)

    def test_heatmap_is_cosine_similarity(self) -> None:
        figure = similarity_heatmap(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), title="t")
        values = np.asarray(figure.axes[0].images[0].get_array())
        np.testing.assert_allclose(values, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-6)


class TestEmbeddingPair:
    def draw(self, classes: int, prototypes: int, places: np.ndarray | None = None):  # type: ignore[no-untyped-def]
        generator = np.random.default_rng(0)
        points = generator.normal(size=(300, 2)).astype(np.float32)
        return embedding_pair(
            points,
            generator.integers(0, classes, 300),
            np.concatenate([np.arange(prototypes), generator.integers(0, prototypes, 300 - prototypes)]),
            title="t",
            class_names=[f"class {k}" for k in range(classes)],
            prototype_points=points[:prototypes] if places is None else places,
            prototype_images=torch.rand(prototypes, 1, 16, 16),
        )

    @pytest.mark.parametrize(("classes", "prototypes"), [(1, 1), (2, 40), (10, 40), (25, 5)])
    def test_draws(self, tmp_path: Path, classes: int, prototypes: int) -> None:
        figure = self.draw(classes, prototypes)
        pixels(save_figure(figure, tmp_path / "a.png"))
        assert len(figure.legends) == (1 if classes <= 20 else 0)

    def test_prototype_pictures_do_not_cover_each_other(self, tmp_path: Path) -> None:
        figure = self.draw(2, 60)
        save_figure(figure, tmp_path / "a.png")
        renderer = figure.canvas.get_renderer()
        boxes = [a.get_window_extent(renderer) for a in figure.axes[1].artists if isinstance(a, AnnotationBbox)]
        assert 5 < len(boxes) < 60
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert len(figure.axes[1].lines) == 60 - len(boxes)  # the others are dots

    def test_a_prototype_beside_all_points_is_seen(self) -> None:
        """matplotlib draws no picture whose place lies outside the axes, and makes no room for it."""
        places = np.array([[9.0, 0.0], [0.0, -9.0]])
        figure = self.draw(2, 2, places)
        for axes in figure.axes:  # the panels show the points in the same places
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            assert left < -2 and 9 < right < 10 and -10 < low < -9 and 2 < high < 4

    def test_empty_prototypes_are_left_out(self) -> None:
        points = np.random.default_rng(0).normal(size=(50, 2))
        figure = embedding_pair(
            points,
            np.zeros(50, dtype=int),
            np.zeros(50, dtype=int),
            title="t",
            class_names=["only"],
            prototype_points=np.array([[0.0, 0.0], [9.0, 9.0]]),
            prototype_images=torch.rand(2, 1, 8, 8),
        )
        assert len([a for a in figure.axes[1].artists if isinstance(a, AnnotationBbox)]) == 1
        assert figure.axes[1].get_xlim()[1] < 9  # nor is there room for the other

    def test_clusters_with_members_share_the_colours(self) -> None:
        """Of forty prototypes ten may have members, which need not look alike for the sake of the others."""
        used = np.arange(3, 40, 4)
        figure = embedding_pair(
            np.random.default_rng(0).normal(size=(50, 2)),
            np.zeros(50, dtype=int),
            np.resize(used, 50),
            title="t",
            class_names=["only"],
            prototype_points=np.zeros((40, 2)),
            prototype_images=torch.rand(40, 1, 8, 8),
        )
        colours = np.unique(figure.axes[1].collections[0].get_facecolors()[:, :3], axis=0)
        np.testing.assert_allclose(colours, np.unique(class_colours(10)[:, :3], axis=0))
