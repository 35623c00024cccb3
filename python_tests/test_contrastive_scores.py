# SPDX-License-Identifier: MIT
"""The op `contrastive` on scores so large that the last bit of one is worth much of its exponential: losses and gradients in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import FORMS
from python_tests.places import PLACES, Place

ON_CPU = [place for place in PLACES if place.id == "cpu-native"]
"""Statistics on CUDA are logarithms in float32, and so is the sum of exponentials of the reference."""


def check_gradients(place: Place, loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    """Those in float32 equal those in float64."""
    gradients = []
    with place.selected():
        for dtype in (torch.float32, torch.float64):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            gradients.append(torch.autograd.grad(loss(*leaves, **options), leaves))
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("place", ON_CPU)
class TestValue:
    @pytest.mark.parametrize("temperature", [1e-10, 0.1, 1e-4, 1e-8, 1e-30])
    def test_vectors_that_coincide_have_the_entropy_as_loss_at_any_temperature(
        self, place: Place, temperature: float
    ) -> None:
        row = torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
        with place.selected():
            losses = supcon_loss(row.expand(16, 24), torch.arange(16) % 2, temperature=temperature, reduction="none")
        torch.testing.assert_close(losses, torch.full((16,), math.log(15)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", ON_CPU)
class TestGradient:
    """A row's weights sum to 1 at any score, also those of columns that tie."""

    @pytest.mark.parametrize("form", FORMS)
    def test_of_one_set(self, place: Place, form: Any) -> None:
        labels = torch.arange(40) % 4
        x = 100 * torch.randn(40, 64, generator=torch.Generator().manual_seed(13))
        x[20:] = x[:20].roll(2, 0)  # every vector has a twin of another class

        def of_embeddings(x: Tensor, **options: Any) -> Tensor:
            return supcon_loss(x, labels, **options)

        def of_maps(x: Tensor, **options: Any) -> Tensor:
            maps = x.T.reshape(1, 64, 5, 8)
            return local_contrastive_loss(maps, labels.view(1, 5, 8), background=None, block_size=(5, 4), **options)

        cases = [(x, False, 1.0), (x, False, 1e-3), *((x, True, 10.0**-power) for power in (4, 6, 9, 20, 30))]
        for vectors, normalize, temperature in cases:
            options = {"temperature": temperature, "form": form, "normalize": normalize}
            for loss in (of_embeddings, of_maps):
                check_gradients(place, loss, vectors, **options)

    @pytest.mark.parametrize("loss", [nt_xent_loss, cross_view_loss])
    @pytest.mark.parametrize("denominator", ["all", "negatives"])
    def test_of_two_views(self, place: Place, loss: Callable[..., Tensor], denominator: str) -> None:
        first = 100 * torch.randn(20, 64, generator=torch.Generator().manual_seed(13))
        second = first + first.roll(2, 0) / 100
        for scale in (1.0, 10.0, 60.0):
            options = {"temperature": 1.0, "denominator": denominator, "normalize": False}
            check_gradients(place, loss, scale * first, scale * second, **options)
