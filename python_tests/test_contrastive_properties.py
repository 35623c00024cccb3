# SPDX-License-Identifier: MIT
"""What holds for the op `contrastive` on any problem: invariants on sizes, values and seeds that hypothesis chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import FORMS, brute_force, check_close, draw_maps, rounding
from python_tests.places import PLACES, Place

# One fixture serves all examples of a test: it only selects the backend.
COMMON = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZES = st.sampled_from([1, 2, 3, 5, 8, 11])
CHANNELS = st.sampled_from([1, 2, 3, 8, 16, 17, 31, 33])
CLASSES = st.sampled_from([1, 2, 3, 6, 40])
TEMPERATURES = st.sampled_from([0.01, 0.03, 0.1, 0.5, 2.0])
SEEDS = st.integers(0, 2**31 - 1)
FORM = st.sampled_from(FORMS)
REDUCTIONS = st.sampled_from(["group", "anchor", "image", "none"])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


class TestValue:
    @COMMON
    @given(
        N=st.sampled_from([1, 2, 3]), C=CHANNELS, H=SIZES, W=SIZES, classes=CLASSES, temperature=TEMPERATURES,
        form=FORM, reduction=REDUCTIONS, block=st.sampled_from([None, 1, 2, 3, 7]), drop=st.booleans(), seed=SEEDS,
    )  # fmt: skip
    def test_float64_agrees(
        self, place: Place, N: int, C: int, H: int, W: int, classes: int, temperature: float, form: Any,
        reduction: Any, block: int | None, drop: bool, seed: int,
    ) -> None:  # fmt: skip
        features, labels = draw_maps((N, C, H, W), classes, seed)
        options = {
            "temperature": temperature, "form": form, "reduction": reduction, "block_size": block, "drop_remainder": drop,
        }  # fmt: skip
        x = features.double().requires_grad_()
        expected = brute_force(x, labels, **options)
        y = features.to(place.device).requires_grad_()
        actual = local_contrastive_loss(y, labels.to(place.device), **options)
        bound = rounding(features.dtype, C, temperature)
        check_close(actual.detach(), expected.detach(), bound)
        expected_grad = gradient(expected, x)
        lengths = features.norm(dim=1, keepdim=True).clamp(min=1e-3)
        scale = max((expected_grad * lengths).abs().max().item(), 1e-2 / temperature)
        check_close(gradient(actual, y).cpu() * lengths / scale, expected_grad * lengths / scale, 4 * bound)

    @COMMON
    @given(N=SIZES, C=CHANNELS, H=SIZES, W=SIZES, form=FORM, seed=SEEDS)
    def test_order_and_names_of_classes_do_not_matter(
        self, place: Place, N: int, C: int, H: int, W: int, form: Any, seed: int
    ) -> None:
        """Pixels of a group permuted; classes renamed, the background kept."""
        features, labels = draw_maps((N, C, H, W), 4, seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(N * H * W, generator=generator)
        mixed = features.movedim(1, -1).flatten(0, 2)[order].view(N, H, W, C).movedim(-1, 1)
        names = torch.tensor([0, *(torch.randperm(50, generator=generator)[:3] + 1).tolist()])
        mixed_labels = names[labels.flatten()[order].view(N, H, W)]
        loss = local_contrastive_loss(features.to(place.device), labels.to(place.device), form=form)
        check_close(
            local_contrastive_loss(mixed.to(place.device), mixed_labels.to(place.device), form=form),
            loss,
            rounding(features.dtype, C, 0.1),
        )

    @COMMON
    @given(C=CHANNELS, H=SIZES, W=SIZES, form=FORM, factor=st.sampled_from([1e-3, 0.5, 4.0, 1e4]), seed=SEEDS)
    def test_length_of_the_features_does_not_matter(
        self, place: Place, C: int, H: int, W: int, form: Any, factor: float, seed: int
    ) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, C, H, W), 3, seed))
        x, longer = features.requires_grad_(), (factor * features.detach()).requires_grad_()
        a = local_contrastive_loss(x, labels, form=form, block_size=4)
        b = local_contrastive_loss(longer, labels, form=form, block_size=4)
        check_close(b.detach(), a.detach(), rounding(features.dtype, C, 0.1))
        grad = gradient(a, x)
        scale = max(grad.abs().max().item(), 1e-3)
        check_close(factor * gradient(b, longer) / scale, grad / scale, 4 * rounding(features.dtype, C, 0.1))

    @COMMON
    @given(C=CHANNELS, H=SIZES, W=SIZES, form=FORM, seed=SEEDS)
    def test_stride_one_and_blocks_of_the_whole_map_are_dense(
        self, place: Place, C: int, H: int, W: int, form: Any, seed: int
    ) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, C, H, W), 3, seed))
        dense = local_contrastive_loss(features, labels, form=form)
        assert torch.equal(local_contrastive_loss(features, labels, form=form, stride=1), dense)
        assert torch.equal(local_contrastive_loss(features, labels, form=form, block_size=(H, W)), dense)

    @COMMON
    @given(N=st.integers(1, 40), D=CHANNELS, temperature=TEMPERATURES, seed=SEEDS)
    def test_nt_xent_is_supcon_with_a_class_for_every_pair(
        self, place: Place, N: int, D: int, temperature: float, seed: int
    ) -> None:
        first, second = torch.randn(2, N, D, generator=torch.Generator().manual_seed(seed)).to(place.device)
        labels = torch.arange(N, device=place.device).repeat(2)
        expected = supcon_loss(torch.cat([first, second]), labels, temperature=temperature)
        check_close(
            nt_xent_loss(first, second, temperature=temperature), expected, rounding(first.dtype, D, temperature)
        )

    @COMMON
    @given(N=st.integers(1, 40), D=CHANNELS, temperature=TEMPERATURES, seed=SEEDS)
    def test_cross_view_does_not_change_when_views_are_swapped_or_rows_permuted(
        self, place: Place, N: int, D: int, temperature: float, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randn(2, N, D, generator=generator).to(place.device)
        order = torch.randperm(N, generator=generator).to(place.device)
        bound = rounding(first.dtype, D, temperature)
        loss = cross_view_loss(first, second, temperature=temperature)
        check_close(cross_view_loss(second, first, temperature=temperature), loss, bound)
        check_close(cross_view_loss(first[order], second[order], temperature=temperature), loss, bound)


class TestGradient:
    @COMMON
    @given(C=CHANNELS, H=SIZES, W=SIZES, form=FORM, temperature=TEMPERATURES, seed=SEEDS)
    def test_of_directions_it_is_at_right_angles_to_its_vector(
        self, place: Place, C: int, H: int, W: int, form: Any, temperature: float, seed: int
    ) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, C, H, W), 3, seed, torch.float64))
        x = features.requires_grad_()
        grad = gradient(local_contrastive_loss(x, labels, form=form, temperature=temperature, block_size=4), x)
        along = (x * grad).sum(1).detach()
        assert float(along.abs().max()) <= 8 * rounding(torch.float64, C, temperature) / temperature

    @COMMON
    @given(C=CHANNELS, H=SIZES, W=SIZES, form=FORM, seed=SEEDS)
    def test_background_gets_a_gradient_only_from_anchors(
        self, place: Place, C: int, H: int, W: int, form: Any, seed: int
    ) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, C, H, W), 3, seed))
        x = features.requires_grad_()
        losses = local_contrastive_loss(x, labels, form=form, block_size=4, reduction="none")
        assert not losses[labels == 0].any()
        grad = gradient(losses, x).movedim(1, -1)
        for top in range(0, H, 4):
            for left in range(0, W, 4):
                block = (slice(None), slice(top, top + 4), slice(left, left + 4))
                classes, counts = labels[block].unique(return_counts=True)
                anchors = ((classes != 0) & (counts > 1)).any() and (form in ("supcon", "in") or len(classes) > 1)
                if not anchors:
                    assert not grad[block].any()
                elif C > 1:
                    assert grad[block][labels[block] == 0].any() or not (labels[block] == 0).any()
