# SPDX-License-Identifier: MIT
"""The op `contrastive`: pixels and embeddings against brute force in float64, closed forms, gradients.

`test_contrastive_edges.py` holds what is degenerate or wrong, `test_contrastive_scores.py` large scores,
`test_contrastive_properties.py` invariants on random problems, `test_contrastive_torch.py` what torch does with the op,
`test_contrastive_distributed.py` contrast over ranks, `test_contrastive_plan.py` the sorting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import FORMS, brute_force, check_close, draw_maps, rounding
from python_tests.places import PLACES, Place, needs_native

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "blocks": {"block_size": 4},
    "uneven blocks": {"block_size": (5, 3)},
    "whole blocks": {"block_size": 4, "drop_remainder": True},
    "strides": {"stride": 2},
    "uneven strides": {"stride": (3, 1)},
    "own image": {"block_size": 4, "scope": "image"},
    "no background": {"block_size": 4, "background": None},
    "ignored": {"block_size": 4, "ignore_index": 1},
    "background ignored": {"stride": 2, "ignore_index": 0},
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def with_gradient(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


class TestValue:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_maps_within_rounding_of_brute_force(self, place: Place, layout: str, form: Any) -> None:
        features, labels = draw_maps((3, 5, 9, 7), seed=1)
        for temperature in (0.02, 0.1, 1.0):
            options = {"temperature": temperature, "form": form, **LAYOUTS[layout]}
            expected = brute_force(features, labels, **options)
            actual = local_contrastive_loss(features.to(place.device), labels.to(place.device), **options)
            check_close(actual, expected, rounding(features.dtype, 5, temperature))

    @pytest.mark.parametrize("reduction", ["group", "anchor", "image", "none"])
    @pytest.mark.parametrize("layout", ["dense", "blocks", "strides", "whole blocks"])
    def test_every_reduction(self, place: Place, layout: str, reduction: Any) -> None:
        features, labels = draw_maps((3, 5, 9, 7), seed=2)
        labels[1] = 0  # a map without anchors
        options = {"reduction": reduction, **LAYOUTS[layout]}
        expected = brute_force(features, labels, temperature=0.1, **options)
        actual = local_contrastive_loss(features.to(place.device), labels.to(place.device), **options)
        check_close(actual, expected, rounding(features.dtype, 5, 0.1))

    @pytest.mark.parametrize(
        "options", [{"block_size": (2, 3, 2)}, {"stride": 2}, {}, {"block_size": 2, "reduction": "none"}]
    )
    def test_volumes(self, place: Place, options: dict[str, Any]) -> None:
        features, labels = draw_maps((2, 4, 3, 5, 4), seed=3)
        expected = brute_force(features, labels, temperature=0.1, **options)
        actual = local_contrastive_loss(features.to(place.device), labels.to(place.device), **options)
        check_close(actual, expected, rounding(features.dtype, 4, 0.1))

    @pytest.mark.parametrize("options", [{"block_size": 3}, {"stride": 2}, {}])
    def test_without_labels_the_same_pixel_of_the_other_view_attracts(
        self, place: Place, options: dict[str, Any]
    ) -> None:
        features = draw_maps((4, 6, 5, 7), seed=4)[0]
        pixels = torch.arange(2 * 35).view(2, 5, 7).repeat(2, 1, 1)
        expected = brute_force(features, pixels, temperature=0.1, background=None, **options)
        check_close(
            local_contrastive_loss(features.to(place.device), None, **options),
            expected,
            rounding(features.dtype, 6, 0.1),
        )

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("N", "D"), [(1, 1), (2, 1), (2, 31), (31, 2), (33, 33), (129, 31), (64, 129), (130, 16)])
    def test_embeddings_of_odd_sizes(self, place: Place, N: int, D: int, form: Any) -> None:
        features, labels = draw_maps((N, D, 1), classes=max(2, N // 7), seed=N + D)
        embeddings, labels = features[..., 0], labels[:, 0]
        expected = brute_force(
            features, labels[:, None], temperature=0.1, background=None, form=form, reduction="anchor"
        )
        actual = supcon_loss(embeddings.to(place.device), labels.to(place.device), temperature=0.1, form=form)
        check_close(actual, expected, rounding(embeddings.dtype, D, 0.1))

    def test_losses_of_single_embeddings(self, place: Place) -> None:
        features, labels = draw_maps((40, 8, 1), classes=12, seed=6)
        options = {"form": "paper", "ignore_index": 3}
        expected = brute_force(features, labels, temperature=0.5, background=None, reduction="none", **options)
        actual = supcon_loss(
            features[..., 0].to(place.device),
            labels[:, 0].to(place.device),
            temperature=0.5,
            reduction="none",
            **options,
        )
        check_close(actual, expected[:, 0], rounding(features.dtype, 8, 0.5))

    @pytest.mark.parametrize("normalize", [True, False])
    def test_nt_xent_is_cross_entropy_with_the_partner(self, place: Place, normalize: bool) -> None:
        first, second = torch.randn(2, 33, 19, generator=torch.Generator().manual_seed(7)).double()
        z = torch.cat([first, second])
        z = F.normalize(z, dim=1) if normalize else z
        scores = (z @ z.T / 0.5).masked_fill(torch.eye(66, dtype=torch.bool), -math.inf)
        partner = torch.arange(66).roll(33)
        expected = F.cross_entropy(scores, partner)
        loss = nt_xent_loss(first.float().to(place.device), second.float().to(place.device), normalize=normalize)
        check_close(loss, expected, 30 * rounding(torch.float32, 19, 0.5))
        apart = (
            scores.masked_fill(F.one_hot(partner).bool(), -math.inf).logsumexp(1)
            - scores.gather(1, partner[:, None])[:, 0]
        )
        loss = nt_xent_loss(
            first.to(place.device), second.to(place.device), denominator="negatives", normalize=normalize
        )
        check_close(loss, apart.mean(), 1e-12)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_cross_view_is_cross_entropy_with_the_own_index(
        self, place: Place, symmetric: bool, normalize: bool
    ) -> None:
        first, second = torch.randn(2, 33, 19, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        a, b = (F.normalize(x, dim=1) if normalize else x for x in (first, second))
        scores, own = a @ b.T / 0.7, torch.arange(33)
        both = [F.cross_entropy(scores, own), F.cross_entropy(scores.T, own)]
        apart = scores.masked_fill(torch.eye(33, dtype=torch.bool), -math.inf)
        both_apart = [(apart.logsumexp(axis) - scores.diag()).mean() for axis in (1, 0)]
        for denominator, ways in (("all", both), ("negatives", both_apart)):
            expected = sum(ways) / 2 if symmetric else ways[0]
            actual = cross_view_loss(
                first.to(place.device), second.to(place.device), temperature=0.7,
                denominator=denominator, symmetric=symmetric, normalize=normalize,  # type: ignore[arg-type]
            )  # fmt: skip
            check_close(actual, torch.as_tensor(expected), 1e-12)

    @pytest.mark.parametrize("count", [2, 5, 70])
    def test_identical_features_have_closed_forms(self, place: Place, count: int) -> None:
        """supcon = in = log(S - 1), paper = (log |N| - log |P|) / |P|, negout = log |N| - 1 / temperature + 1 / temperature."""
        features = torch.full((1, 3, 1, 3 * count), 0.7, device=place.device)
        labels = torch.cat([torch.full((count,), 1), torch.full((2 * count,), 2)]).view(1, 1, -1).to(place.device)
        weights = torch.cat([torch.full((count,), count), torch.full((2 * count,), 2 * count)]).double()
        others, everyone = 3 * count - weights, math.log(3 * count - 1)
        closed = {
            "supcon": everyone,
            "in": everyone,
            "paper": ((others.log() - (weights - 1).log()) / (weights - 1)).mean().item(),
            "negout": others.log().mean().item(),
        }
        for form, expected in closed.items():
            loss = local_contrastive_loss(features, labels, temperature=0.05, form=form)  # type: ignore[arg-type]
            assert loss.item() == pytest.approx(expected, abs=2e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types_are_computed_in_float32_or_better(self, place: Place, dtype: torch.dtype) -> None:
        features, labels = draw_maps((2, 19, 6, 6), seed=9, dtype=dtype)
        loss = local_contrastive_loss(features.to(place.device), labels.to(place.device), block_size=3)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_close(loss, brute_force(features, labels, temperature=0.1, block_size=3), rounding(dtype, 19, 0.1))

    @pytest.mark.parametrize("form", FORMS)
    def test_raw_and_long_vectors_and_a_small_temperature(self, place: Place, form: Any) -> None:
        """Scores of thousands: sums of exponentials without a maximum would be 0 or infinite."""
        features, labels = draw_maps((2, 6, 5, 5), seed=10)
        for x, temperature, normalize in ((20 * features, 0.1, False), (features, 1e-3, True)):
            largest_score = (x.square().sum(1).max().item() if not normalize else 1.0) / temperature
            assert largest_score > 900
            expected = brute_force(x, labels, temperature=temperature, form=form, normalize=normalize, reduction="none")
            actual = local_contrastive_loss(
                x.to(place.device),
                labels.to(place.device),
                temperature=temperature,
                form=form,
                normalize=normalize,
                reduction="none",
            )
            assert actual.isfinite().all()
            assert (actual.double().cpu() - expected).abs().max() <= 1e-6 * largest_score


class TestGradient:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_maps_against_autograd_through_brute_force(self, place: Place, layout: str, form: Any) -> None:
        features, labels = draw_maps((3, 5, 9, 7), seed=11)
        for temperature in (0.02, 0.3):
            options = {"temperature": temperature, "form": form, **LAYOUTS[layout]}
            _, expected = with_gradient(brute_force, features.double(), labels=labels, **options)
            _, actual = with_gradient(
                local_contrastive_loss, features.to(place.device), labels=labels.to(place.device), **options
            )
            scale = expected.abs().max().item()
            check_close(actual / scale, expected / scale, 2 * rounding(features.dtype, 5, temperature))

    @pytest.mark.parametrize("reduction", ["anchor", "image", "none"])
    def test_every_reduction(self, place: Place, reduction: Any) -> None:
        features, labels = draw_maps((2, 5, 6, 7), seed=12)
        options = {"temperature": 0.1, "block_size": 3, "reduction": reduction}
        _, expected = with_gradient(brute_force, features.double(), labels=labels, **options)
        _, actual = with_gradient(
            local_contrastive_loss, features.to(place.device), labels=labels.to(place.device), **options
        )
        scale = expected.abs().max().item()
        check_close(actual / scale, expected / scale, 2 * rounding(features.dtype, 5, 0.1))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("N", "D"), [(2, 1), (31, 2), (33, 33), (129, 31), (64, 129)])
    def test_embeddings_of_odd_sizes(self, place: Place, N: int, D: int, form: Any) -> None:
        features, labels = draw_maps((N, D, 1), classes=max(2, N // 7), seed=N + D)
        _, expected = with_gradient(
            brute_force,
            features.double(),
            labels=labels,
            temperature=0.1,
            background=None,
            form=form,
            reduction="anchor",
        )
        _, actual = with_gradient(
            supcon_loss,
            features[..., 0].to(place.device),
            labels=labels[:, 0].to(place.device),
            temperature=0.1,
            form=form,
        )
        scale = max(expected.abs().max().item(), 1e-3)
        check_close(actual / scale, expected[..., 0] / scale, 4 * rounding(features.dtype, D, 0.1))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("normalize", [True, False])
    def test_gradcheck_in_float64(self, place: Place, form: Any, normalize: bool) -> None:
        features, labels = draw_maps((2, 3, 4, 5), seed=13, dtype=torch.float64)
        features, labels = features.to(place.device).requires_grad_(), labels.to(place.device)
        for temperature in (0.02, 0.5):  # with a running maximum, and without
            assert torch.autograd.gradcheck(
                lambda x, t=temperature: local_contrastive_loss(
                    x, labels, temperature=t, block_size=3, form=form, normalize=normalize
                ),
                features,
                atol=1e-5 / temperature,
            )

    @pytest.mark.parametrize("denominator", ["all", "negatives"])
    def test_gradcheck_of_pairs(self, place: Place, denominator: Any) -> None:
        first, second = (
            torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s))
            .to(place.device)
            .requires_grad_()
            for s in (1, 2)
        )
        for loss in (
            lambda a, b: nt_xent_loss(a, b, denominator=denominator),
            lambda a, b: cross_view_loss(a, b, denominator=denominator),
            lambda a, b: cross_view_loss(a, b, denominator=denominator, symmetric=False, normalize=False),
        ):
            assert torch.autograd.gradcheck(loss, (first, second))
            assert torch.autograd.gradcheck(lambda a, f=loss: f(a, second.detach()), (first,))
            assert torch.autograd.gradcheck(lambda b, f=loss: f(first.detach(), b), (second,))

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("temperature", [0.5, 0.005])
    @pytest.mark.parametrize("count", [1, 2, 31, 33, 129, 700])
    def test_between_views(self, place: Place, count: int, temperature: float, symmetric: bool) -> None:
        """Both gradients against autograd through the matrix of scores in float64."""
        views = torch.randn(2, count, 21, generator=torch.Generator().manual_seed(count))
        a, b = (x.to(place.device).requires_grad_() for x in views)
        actual = torch.autograd.grad(cross_view_loss(a, b, temperature=temperature, symmetric=symmetric), (a, b))
        c, d = (x.double().requires_grad_() for x in views)
        scores, own = F.normalize(c, dim=1) @ F.normalize(d, dim=1).T / temperature, torch.arange(count)
        ways = [F.cross_entropy(scores, own), F.cross_entropy(scores.T, own)][: 1 + symmetric]
        expected = torch.autograd.grad(sum(ways) / len(ways), (c, d))
        error = 1e-6 / temperature  # of a probability
        for one, two in zip(actual, expected, strict=True):
            assert (one.cpu() - two).abs().max() <= error * (two.abs().max() + 1e-3)

    @pytest.mark.parametrize("layout", ["blocks", "strides", "dense"])
    def test_of_directions_is_at_right_angles_to_the_features(self, place: Place, layout: str) -> None:
        features, labels = draw_maps((2, 6, 7, 8), seed=14)
        features, labels = features.to(place.device), labels.to(place.device)
        _, grad = with_gradient(local_contrastive_loss, features, labels=labels, **LAYOUTS[layout])
        assert grad.abs().max() > 0
        assert (grad * features).sum(1).abs().max() <= 1e-5 * (grad.norm(dim=1) * features.norm(dim=1)).max()

    def test_of_pixels_that_take_no_part_is_zero(self, place: Place) -> None:
        features, labels = draw_maps((2, 6, 7, 8), classes=4, seed=15)
        features, labels = features.to(place.device), labels.to(place.device)
        _, grad = with_gradient(local_contrastive_loss, features, labels=labels, stride=3, ignore_index=2)
        takes_part = torch.zeros_like(labels, dtype=torch.bool)
        takes_part[:, ::3, ::3] = True
        takes_part &= labels != 2
        assert not grad.movedim(1, -1)[~takes_part].any()
        assert grad.movedim(1, -1)[takes_part].any(dim=1).all()  # the background among them

    def test_half_precision_gets_its_own_type(self, place: Place) -> None:
        features, labels = draw_maps((2, 8, 6, 6), seed=16, dtype=torch.bfloat16)
        _, expected = with_gradient(brute_force, features.double(), labels=labels, temperature=0.1, block_size=3)
        _, actual = with_gradient(
            local_contrastive_loss, features.to(place.device), labels=labels.to(place.device), block_size=3
        )
        assert actual.dtype == torch.bfloat16
        scale = expected.abs().max().item()
        check_close(actual / scale, expected / scale, 2**-8)

    @pytest.mark.parametrize("place", [p for p in PLACES if p.id != "cpu-reference"])
    def test_second_derivative_is_refused(self, place: Place) -> None:
        with place.selected():
            x = torch.randn(6, 4, device=place.device, requires_grad=True)
            labels = torch.arange(6, device=place.device) % 2
            (grad,) = torch.autograd.grad(supcon_loss(x, labels), x, create_graph=True)
            with pytest.raises(NotImplementedError, match="no second derivative"):
                torch.autograd.grad(grad.square().sum(), x)


class TestContract:
    def test_the_docstring_has_every_form_with_its_formula(self) -> None:
        """``help`` of the function is where the README sends its readers."""
        lines = (local_contrastive_loss.__doc__ or "").splitlines()
        for form in FORMS:
            assert any(line.split()[:1] == [f'``"{form}"``'] and len(line.split()) > 3 for line in lines)

    def test_any_strides_give_the_same(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 20, 6, 8), seed=17))
        expected = with_gradient(local_contrastive_loss, features, labels=labels, block_size=4)
        views = [
            features.to(memory_format=torch.channels_last),
            features.mT.contiguous().mT,
            torch.cat([features, features], dim=1)[:, :20],
            features.flip(3).flip(3)[:, :, :, :],
            torch.stack([features, features], dim=-1)[..., 0],
        ]
        for view in views:
            leaf = view.detach().requires_grad_()
            loss = local_contrastive_loss(leaf, labels.mT.contiguous().mT, block_size=4)
            loss.backward()
            assert torch.equal(loss, expected[0]) and torch.equal(leaf.grad, expected[1])  # type: ignore[arg-type]

    def test_inputs_stay_as_they_are(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 5, 6, 8), seed=18))
        before = features.clone(), labels.clone()
        with_gradient(local_contrastive_loss, features, labels=labels, block_size=4)
        assert torch.equal(features, before[0]) and torch.equal(labels, before[1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
    def test_labels_of_every_integer_type(self, place: Place, dtype: torch.dtype) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 5, 6, 8), seed=19))
        expected = local_contrastive_loss(features, labels, block_size=4)
        assert torch.equal(local_contrastive_loss(features, labels.to(dtype), block_size=4), expected)

    def test_labels_far_apart_and_negative(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 5, 6, 8), seed=20))
        far = torch.tensor([0, -(2**62), 2**62], device=place.device)[labels]
        expected = local_contrastive_loss(features, labels, reduction="none")
        check_close(local_contrastive_loss(features, far, reduction="none"), expected, 1e-6)


class TestDeterminism:
    @needs_native
    @pytest.mark.parametrize("layout", ["blocks", "strides", "dense"])
    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    def test_one_thread_two_threads_and_repeats_agree_bit_for_bit(self, layout: str, temperature: float) -> None:
        features, labels = draw_maps((4, 16, 40, 36), seed=21)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, *[2] * 10):
                torch.set_num_threads(count)
                options = {"temperature": temperature, **LAYOUTS[layout]}
                results.append(with_gradient(local_contrastive_loss, features, labels=labels, **options))
        finally:
            torch.set_num_threads(threads)
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_threads_do_not_matter_between_views(self, symmetric: bool) -> None:
        first, second = torch.randn(2, 700, 33, generator=torch.Generator().manual_seed(22))
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, *[2] * 10):
                torch.set_num_threads(count)
                a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
                loss = cross_view_loss(a, b, symmetric=symmetric, temperature=0.1)
                results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for run in results for a, b in zip(run, results[0], strict=True))

    def test_repeats_agree_bit_for_bit(self, place: Place) -> None:
        first, second = (torch.randn(70, 33, device=place.device) for _ in range(2))
        runs = [with_gradient(cross_view_loss, first, second) for _ in range(10)]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
