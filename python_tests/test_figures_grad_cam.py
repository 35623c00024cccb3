# SPDX-License-Identifier: MIT
"""Grad-CAM: against closed forms, what is drawn of it, and the classifier that a label-free encoder borrows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="figures need the extra protokernels[train]")
pytest.importorskip("sklearn", reason="the classifier needs the extra protokernels[train]")

from matplotlib import colormaps

from protokernels.data import Split
from protokernels.evaluation import LinearProbe
from protokernels.figures import grad_cam as module
from protokernels.figures.grad_cam import class_probe, class_weights, grad_cam, grad_cam_figure, overlaid
from python_tests.test_figures import tiles


def maps_of(count: int = 3) -> Tensor:
    return torch.randn(count, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestMap:
    def test_of_a_linear_head_on_the_average_it_is_cam_over_the_number_of_positions(self) -> None:
        A, w = maps_of(), torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = grad_cam(A, lambda A: A.mean(dim=(2, 3)) @ w + 7)
        expected = torch.einsum("nkij,k->nij", A, w).clamp(min=0) / (4 * 6)
        torch.testing.assert_close(found, expected)
        assert (found == 0).any() and (found > 0).any()

    def test_weights_are_means_of_the_derivative(self) -> None:
        """Of sum_kij (A_kij^2 / 2 + A_kij M_kij) the derivative is A + M."""
        A = maps_of()
        M = A.flip(0, 3) * 3 + 1
        found = grad_cam(A, lambda A: (A.square() / 2 + A * M).sum(dim=(1, 2, 3)))
        weights = (A + M).numpy().mean(axis=(2, 3))
        expected = np.maximum(0, (weights[:, :, None, None] * A.numpy()).sum(axis=1))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)

    def test_within_no_grad_and_without_a_trace(self) -> None:
        A = maps_of().requires_grad_()
        with torch.no_grad():
            found = grad_cam(A, lambda A: A.sum(dim=(1, 2, 3)))
        assert not found.requires_grad and A.grad is None

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_that_is_not_finite_says_so_and_leaves_the_others_alone(self, bad: float) -> None:
        A, w = maps_of(), torch.ones(5, dtype=torch.float64)
        good = grad_cam(A, lambda A: A.mean(dim=(2, 3)) @ w)
        A[1, 2, 0, 0] = bad
        found = grad_cam(A, lambda A: A.mean(dim=(2, 3)) @ w)
        assert not torch.isfinite(found[1]).all()
        torch.testing.assert_close(found[[0, 2]], good[[0, 2]])


class TestOverlay:
    IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    def test_an_image_with_nothing_to_show_stays_grey(self, value: float) -> None:
        maps = torch.zeros(2, 3, 3)
        maps[1, 0, 0] = value
        shown = overlaid(self.IMAGES, maps)
        torch.testing.assert_close(shown.float(), self.IMAGES.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1))

    @pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
    def test_a_constant_map_has_the_colour_of_the_largest_value_everywhere(self, size: float) -> None:
        shown = overlaid(self.IMAGES, torch.full((2, 3, 3), size))
        colour = torch.tensor(colormaps["inferno"](1.0)[:3])[:, None, None]
        expected = 0.25 * self.IMAGES.mean(dim=1, keepdim=True) + 0.75 * colour
        torch.testing.assert_close(shown, expected.double(), atol=1e-6, rtol=0)

    def test_values_between_positions_are_bilinear(self) -> None:
        """Pixel centres at i + 1/2: a third of the way from 1 to 0 a black image has the colour of 2/3, at two thirds of its weight."""
        shown = overlaid(torch.zeros(1, 1, 1, 6), torch.tensor([[[1.0, 0.0]]]))[0, :, 0, :]
        for pixel, share in enumerate((1, 1, 2 / 3, 1 / 3, 0, 0)):
            colour = 0.75 * share * np.array(colormaps["inferno"](float(share))[:3])
            np.testing.assert_allclose(shown[:, pixel].numpy(), colour, atol=0.02)


class TestClassifier:
    def test_the_logits_of_two_classes_are_opposite(self) -> None:
        """scikit-learn's first row is 0, of which nothing could be seen."""
        probe = LinearProbe(torch.tensor([[0.0, 0.0], [2.0, -4.0]]), torch.zeros(2), "fair")
        assert class_weights(probe).tolist() == [[-1.0, 2.0], [1.0, -2.0]]

    def test_an_unseen_class_has_no_weights_and_changes_none(self) -> None:
        probe = LinearProbe(
            torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 2.0]]), torch.tensor([0.0, -math.inf, 0.0]), "fair"
        )
        assert class_weights(probe).tolist() == [[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]]

    def test_features_that_are_not_finite_give_none(self) -> None:
        assert class_probe(lambda x: x / 0, quadrants(), size=8, num_classes=2, seed=0) is None

    def test_no_more_images_than_are_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "FITTED_ON", 10)
        fitted = class_probe(quadrant_encoder, quadrants(), size=8, num_classes=2, seed=0)
        assert fitted is not None and fitted[1] == 10


def quadrants(count: int = 40) -> Split:
    """Class 0 is bright at the top left, class 1 at the bottom right, with noise everywhere."""
    images = np.random.default_rng(0).integers(0, 60, (count, 8, 8)).astype(np.uint8)
    labels = np.arange(count) % 2
    images[labels == 0, :4, :4] += 150
    images[labels == 1, 4:, 4:] += 150
    return Split(images, labels)


def quadrant_encoder(images: Tensor) -> Tensor:
    """A map of 2 x 2 positions; a channel for each position and class, bright where that is."""
    mean = torch.nn.functional.avg_pool2d(images, 4)
    first, last = torch.zeros(2, 1, 1, 2, 2)
    first[..., 0, 0] = last[..., 1, 1] = 1
    return torch.cat([mean * first, mean * last, mean], dim=1)


def test_the_figure_shows_the_evidence_where_it_is() -> None:
    split = quadrants()
    fitted = class_probe(quadrant_encoder, split, size=8, num_classes=2, seed=0)
    assert fitted is not None
    images = torch.from_numpy(split.images[:4])[:, None] / 255
    labels = torch.tensor([0, 1, 0, 0])  # the last one is wrong
    figure = grad_cam_figure(quadrant_encoder, fitted[0], images, labels, class_names=("left", "right"), title="t")
    captions = [text.get_text() for text in figure.axes[0].texts[:4]]
    assert captions == [
        "left\npredicted: left",
        "right\npredicted:\nright",
        "left\npredicted: left",
        "left\npredicted:\nright",
    ]
    colour = [np.ptp(tile, axis=2) for tile in tiles(figure)[4:]]  # grey has none
    for tile, (here, there) in zip(colour, ((0, 7), (7, 0), (0, 7), (0, 7)), strict=True):
        assert tile[here, here] > 0.2 and tile[there, there] == 0  # of the last what speaks for the left: its noise
