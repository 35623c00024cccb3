# SPDX-License-Identifier: MIT
"""Diagrams: shapes as a forward pass has them, texts that do not overlap, arrows that cross no box; and whom an anchor meets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="figures need the extra protokernels[train]")
pytest.importorskip("accelerate", reason="the papers need the extra protokernels[train]")

from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from protokernels.figures import contrastive_autoencoder as autoencoder_figures
from protokernels.figures import local_contrast as local_figures
from protokernels.figures import optimized_views as views_figures
from protokernels.figures import optiml as optiml_figures
from protokernels.figures import save_figure
from protokernels.figures import vaesim as vaesim_figures
from protokernels.figures.canvas import DOTS_PER_INCH
from protokernels.figures.diagram import FONT, Box, Shapes, diagram
from protokernels.papers import contrastive_autoencoder, local_contrast, optiml, vaesim
from protokernels.papers import optimized_views as views
from protokernels.papers._local_contrast_segmenter import new_segmenter
from protokernels.papers._optimized_views_networks import OptimizedViews

TITLE = "a title of usual length, fair, digits: networks and losses"


def images(size: int) -> Tensor:
    return torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))


def of_autoencoder(**changes: Any) -> Figure:
    config = contrastive_autoencoder.CONFIG.preset("fair", data="digits", **changes)
    model = contrastive_autoencoder.ContrastiveAutoencoder(config, 1).eval()
    model.begin_second_phase(torch.randn(12, config.latent_dim))
    return autoencoder_figures.architecture(model.eval(), images(config.image_size), title=TITLE)


def of_first_phase() -> Figure:
    config = contrastive_autoencoder.CONFIG.preset("fair", data="digits")
    model = contrastive_autoencoder.ContrastiveAutoencoder(config, 1).eval()
    return autoencoder_figures.architecture(model, images(config.image_size), title=TITLE)


def of_vaesim(preset: Any) -> Figure:
    config = vaesim.CONFIG.preset(preset, data="digits")
    model = vaesim.VAESim(config, 1)
    model.prototypes.initialize(torch.randn(50, config.latent_dim))
    return vaesim_figures.architecture(model.eval(), config, images(config.image_size), title=TITLE)


def of_optiml(**changes: Any) -> Figure:
    config = optiml.CONFIG.preset("fair", data="digits", width=2, **changes)
    return optiml_figures.architecture(optiml.OPTiML(config, 1).eval(), images(config.image_size), title=TITLE)


def of_views(**changes: Any) -> Figure:
    config = views.CONFIG.preset("fair", data="digits", **changes)
    return views_figures.architecture(OptimizedViews(config, 1).eval(), images(config.image_size), title=TITLE)


def of_local(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Figure:
    config = local_contrast.CONFIG.preset("fair", data="phantoms", width=4, **changes)
    kept: list[Figure] = []
    monkeypatch.setattr(local_figures, "save_figure", lambda figure, path: kept.append(figure))
    local_figures.draw_architecture(Path("a.png"), new_segmenter(config, 3).eval(), config, title=TITLE)
    return kept[0]


DIAGRAMS = {
    "autoencoder": of_autoencoder,
    "autoencoder, released": lambda: of_autoencoder(condition="ignored"),
    "autoencoder, first phase": of_first_phase,
    **{f"vaesim {name}": lambda name=name: of_vaesim(name) for name in ("paper", "official", "fair")},
    **{f"optiml {name}": lambda name=name: of_optiml(cvsim=name) for name in ("heads", "batch", "dense")},
    "optiml, uniform": lambda: of_optiml(marginals="uniform", halve_variance=True),
    "optiml, mse": lambda: of_optiml(alignment="mse"),
    **{f"views {name}": lambda name=name: of_views(strategy=name) for name in views.STRATEGIES},
    "views, few transformations": lambda: of_views(order=("rotate",)),
}


@pytest.fixture(params=[*DIAGRAMS, *(f"local {name}" for name in local_contrast.METHODS)])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Figure:
    torch.manual_seed(0)
    name: str = request.param
    return of_local(monkeypatch, method=name.removeprefix("local ")) if name.startswith("local ") else DIAGRAMS[name]()


def frames(figure: Figure) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def texts(figure: Figure) -> dict[str, str]:
    """First line -> the others, of every box."""
    return {text.get_text().split("\n")[0]: text.get_text() for text in figure.axes[0].texts}


def along(arrow: FancyArrowPatch) -> Iterator[tuple[float, float]]:
    points = arrow._path_original.vertices  # type: ignore[attr-defined]
    for first, last in pairwise(points):
        yield from ((first + (last - first) * share).tolist() for share in np.linspace(0, 1, 200))


def test_no_text_touches_another_and_no_arrow_a_box_that_is_not_its_own(drawn: Figure, tmp_path: Path) -> None:
    path = save_figure(drawn, tmp_path / "a.png")
    assert imread(path).std() > 0.01 and path.stat().st_size < 200_000
    drawn.set_dpi(DOTS_PER_INCH)
    drawn.draw_without_rendering()
    written = [text for text in (*drawn.texts, *drawn.axes[0].texts) if text.get_text()]
    assert {text.get_fontsize() for text in drawn.findobj(Text) if text.get_text()} == {FONT}
    boxes = [text.get_window_extent() for text in written]
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y0 >= 0 and box.y1 <= drawn.bbox.y1 for box in boxes)
    around = [frame.get_window_extent() for frame in frames(drawn)]
    assert not any(first.overlaps(second) for first, second in combinations(around, 2))
    for text, frame in zip(drawn.axes[0].texts, around, strict=True):
        box = text.get_window_extent()
        assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
    sizes = [(frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) for frame in frames(drawn)]
    arrows = [patch for patch in drawn.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) >= len(around) - 1
    for arrow in arrows:
        inside = [
            any(x + 0.01 < px < x + w - 0.01 and y + 0.01 < py < y + h - 0.01 for px, py in along(arrow))
            for x, y, w, h in sizes
        ]
        assert not any(inside)
        ends = [points for points in along(arrow)]
        for px, py in (ends[0], ends[-1]):  # on the edge of some box
            assert any(x - 0.01 < px < x + w + 0.01 and y - 0.01 < py < y + h + 0.01 for x, y, w, h in sizes)


class TestPapers:
    def test_contrastive_autoencoder(self) -> None:
        found = texts(of_autoencoder(seed_channels=4))
        assert found["e = encoder"].split("\n")[1:] == [
            "Conv2d [B, 32, 16, 16]", "Conv2d [B, 64, 8, 8]", "Conv2d [B, 128, 4, 4]", "Linear [B, 128]",
        ]  # fmt: skip
        assert found["p = projector"].split("\n")[-1] == "Linear [B, 128]"
        assert "latent [B, 64]\ncondition [B, 16]\nmix [B, 4, 4, 4]" in found["d = decoder"]
        assert found["between the phases"].endswith("[12, 128]")
        assert found["phase 2, e and p frozen"].endswith("[B, 12]")
        assert not [text for text in texts(of_first_phase()) if "phases" in text or "phase 2" in text]

    def test_a_condition_that_is_ignored_has_no_arrow(self) -> None:
        counts = [
            sum(isinstance(patch, FancyArrowPatch) for patch in figure.axes[0].patches)
            for figure in (of_autoencoder(), of_autoencoder(condition="ignored"))
        ]
        assert counts == [9, 8]

    def test_vaesim(self) -> None:
        found = texts(of_vaesim("fair"))
        assert found["e = encoder"].endswith("mean [B, 32]\nlog_variance [B, 32]")
        assert found["k = argmax c"] == "k = argmax c\nQ_k ← 0.1 mean of z with label k + 0.9 Q_k\nQ [40, 32]"
        assert "dot(z, Q)" in texts(of_vaesim("official"))["c = prototypes"]

    def test_optiml(self) -> None:
        """Digits: 32 pixels, maps of 4 x 4."""
        found = texts(of_optiml(epsilon=0.1, num_iters=7))
        assert found["encoder"].split("\n")[-1] == "layer4 [B, 16, 4, 4]"
        assert found["C = 1 - cos of positions"].endswith("[B, 16, 16]")
        assert found["Sinkhorn, ε = 0.1"].split("\n")[1:] == ["7 iterations, P", "[B, 16, 16]"]
        assert found["cvsim"].endswith("logits [B, 16]\nsoftmax: masses a, b\n[B, 16]")
        assert "12.5 variance + 1 covariance" in texts(of_optiml(halve_variance=True))

    def test_optimized_views(self) -> None:
        found = texts(of_views())
        assert found["M"].endswith("head [B, 7]") and found["f"].endswith("→ [B, 64]") and found["p"] == "p\n[B, 1]"
        assert found["I_NCE of X_M and X"].endswith("f, g, p: +1, M: -1")
        assert found["cross-entropy, labelled images"].endswith("f, g, p: 1 (X_M), 1 (X); M: 10")
        assert "M" not in texts(of_views(strategy="random")) and "p" not in texts(of_views(strategy="simclr"))
        assert "g" not in texts(of_views(strategy="supervised"))

    def test_local_contrast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = texts(of_local(monkeypatch, method="global+local-block", block_size=8))
        assert whole["E = encoder"].endswith("centre [B, 16, 8, 8]") and whole["head"] == "head\n[B, 3, 32, 32]"
        assert whole["h_1"].endswith("[B, 8]") and whole["h_2"].endswith("[B, 8, 32, 32]")
        assert whole["stage 2, two views of labelled slices"].endswith("blocks of 8")
        assert not {"h_1", "h_2"} & texts(of_local(monkeypatch, method="random")).keys()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.many = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.first(torch.cat([x, x]))
        self.first(y[:1, :3])
        return self.many(y), {"a": y[0]}


class TestShapes:
    def test_measured(self) -> None:
        shapes = Shapes(model := nn.ModuleDict({"net": Twice()}), batch=5)
        with shapes.measured():
            model["net"](torch.zeros(5, 3))
        assert shapes.module("net.first", "f") == "f = net.first\nLinear [2B, 4]"  # the first call counts
        assert shapes.module("net.first.0") == "net.first.0\n[2B, 4]"
        assert shapes.module("net") == "net\nfirst [2B, 4]\nmany [2B, 4]\n→ [4]"  # ten layers are too many
        assert shapes.shape(torch.zeros(7, 2)) == "[7, 2]" and shapes.shape(torch.zeros(3)) == "[3]"
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_model_that_fails_keeps_no_hook(self) -> None:
        shapes = Shapes(model := Twice(), batch=5)
        with pytest.raises(RuntimeError), shapes.measured():
            model(torch.zeros(5, 2))
        assert not any(module._forward_hooks for module in model.modules())


def test_an_arrow_that_would_cross_a_box_is_refused() -> None:
    boxes = {"a": Box(0, 0, "a"), "b": Box(1, 0, "b"), "c": Box(2, 0, "c")}
    with pytest.raises(ValueError, match="no way from a to c that crosses no box"):
        diagram(boxes, [("a", "c")], title="t")


class TestPartners:
    LABELS = torch.randint(0, 3, (4, 12, 20), generator=torch.Generator().manual_seed(0))
    ANCHOR = (1, 4, 8)

    @pytest.mark.parametrize("form", ["supcon", "in", "paper", "negout"])
    @pytest.mark.parametrize("scope", ["group", "image"])
    @pytest.mark.parametrize("options", [{"block_size": 8}, {"stride": 4}])
    def test_in_closed_form(self, form: str, scope: str, options: dict[str, int]) -> None:
        labels = self.LABELS.clone()
        labels[self.ANCHOR] = 1
        n, y, x = torch.meshgrid(*(torch.arange(size) for size in labels.shape), indexing="ij")
        met = (y % 4 == 0) & (x % 4 == 0) if "stride" in options else (y // 8 == 0) & (x // 8 == 1)
        met &= (n == self.ANCHOR[0]) | (scope == "group")
        expected = torch.where(labels == 1, 1, -1) * met
        expected[self.ANCHOR] = 0
        found = local_figures.partners(labels, self.ANCHOR, form=form, scope=scope, **options)
        assert torch.equal(found, expected) and {-1, 0, 1} == set(found.unique().tolist())

    def test_drawn(self, tmp_path: Path) -> None:
        config = local_contrast.CONFIG.preset("fair", data="phantoms", method="local-stride")
        volumes = local_contrast.load_volumes(config).test
        path = local_figures.draw_partners(tmp_path / "a.png", volumes, config, title="t")
        assert path is not None and imread(path).std() > 0.01
        one = local_figures.draw_partners(tmp_path / "b.png", volumes[:1], config, title="t")
        assert one is not None
        empty = [replace(volumes[0], label=np.zeros_like(volumes[0].label))]
        assert local_figures.draw_partners(tmp_path / "c.png", empty, config, title="t") is None
