# SPDX-License-Identifier: MIT
"""The op `contrastive` where little is left to contrast, and where arguments are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from python_tests.contrastive_oracle import FORMS, brute_force, check_close, draw_maps
from python_tests.places import PLACES, Place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def nothing(loss: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """An exact 0 in the graph, with a gradient of zeros."""
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf)
    assert value.requires_grad and not value.any()
    value.sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()


class TestValue:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "options", [{}, {"block_size": 2}, {"stride": 2}, {"reduction": "none"}, {"scope": "image"}]
    )
    def test_without_anchors_it_is_zero(self, place: Place, form: Any, options: dict[str, Any]) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 3, 4, 4), seed=1))
        distinct = torch.arange(32, device=place.device).view(2, 4, 4)
        cases = {
            "background only": torch.zeros_like(labels),
            "one pixel of every class": distinct,
            "everything ignored": torch.full_like(labels, 7),
        }
        for classes in cases.values():
            nothing(
                lambda x, y=classes: local_contrastive_loss(x, y, form=form, background=0, ignore_index=7, **options),
                features,
            )
        nothing(lambda x: local_contrastive_loss(x, labels[:1, :1, :1], form=form, **options), features[:1, :, :1, :1])

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 4, 4)])
    @pytest.mark.parametrize(
        "options", [{}, {"block_size": 2}, {"stride": 2}, {"block_size": 3, "drop_remainder": True}]
    )
    def test_empty_maps(self, place: Place, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=place.device)
        features = torch.zeros(shape, device=place.device)
        nothing(lambda x: local_contrastive_loss(x, labels, **options), features)
        nothing(lambda x: local_contrastive_loss(x, None, **options), features)

    def test_blocks_larger_than_the_map(self, place: Place) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 3, 4, 5), seed=2))
        dense = local_contrastive_loss(features, labels)
        assert torch.equal(local_contrastive_loss(features, labels, block_size=16), dense)
        nothing(lambda x: local_contrastive_loss(x, labels, block_size=16, drop_remainder=True), features)

    def test_no_embeddings_and_one_pair(self, place: Place) -> None:
        for N in (0, 1):
            x = torch.randn(N, 4, device=place.device)
            labels = torch.zeros(N, dtype=torch.int64, device=place.device)
            other = torch.randn_like(x)
            nothing(lambda e, y=labels: supcon_loss(e, y), x)
            nothing(lambda e, y=labels: supcon_loss(e, y, reduction="none"), x)
            for denominator in ("all", "negatives"):
                nothing(lambda e, o=other, d=denominator: nt_xent_loss(e, o, denominator=d), x)  # type: ignore[arg-type]
                nothing(lambda e, o=other, d=denominator: cross_view_loss(e, o, denominator=d), x)  # type: ignore[arg-type]

    @pytest.mark.parametrize("form", ["supcon", "in"])
    def test_one_class_alone_keeps_its_anchors(self, place: Place, form: Any) -> None:
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
        labels = torch.ones(9, dtype=torch.int64)
        expected = brute_force(x[..., None], labels[:, None], temperature=0.1, form=form, background=None)
        check_close(supcon_loss(x.to(place.device), labels.to(place.device), form=form), expected, 1e-5)
        for other in ("paper", "negout"):
            assert supcon_loss(x.to(place.device), labels.to(place.device), form=other).item() == 0  # type: ignore[arg-type]

    @pytest.mark.parametrize("form", FORMS)
    def test_duplicates_and_opposites(self, place: Place, form: Any) -> None:
        """Scores at both ends of their range, also where 2 / temperature nears the largest for which no maximum is kept."""
        x = torch.tensor([[3.0, 4.0], [3.0, 4.0], [-3.0, -4.0], [6.0, 8.0], [-3.0, -4.0]], device=place.device)
        labels = torch.tensor([1, 1, 2, 2, 2], device=place.device)
        for temperature in (0.0251, 0.0249, 1.0):
            options = {"temperature": temperature, "form": form}
            expected = brute_force(x[..., None], labels[:, None], background=None, reduction="anchor", **options)
            check_close(supcon_loss(x, labels, **options), expected, 3e-6 / temperature)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32])
    def test_labels_of_every_whole_type(self, place: Place, dtype: torch.dtype) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 3, 4, 5), seed=2))
        assert torch.equal(local_contrastive_loss(features, labels.to(dtype)), local_contrastive_loss(features, labels))
        x, classes = features[0].flatten(1).T, labels[0].flatten()
        assert torch.equal(supcon_loss(x, classes.to(dtype)), supcon_loss(x, classes))
        with pytest.raises(TypeError, match=r"labels must be an integer tensor .* that int64 can hold; got uint64"):
            supcon_loss(x, classes.to(torch.uint64))

    def test_a_zero_vector_is_at_right_angles_to_all(self, place: Place) -> None:
        x = torch.randn(6, 4, device=place.device)
        x[2] = 0
        x[3] = 1e-30
        labels = torch.arange(6, device=place.device) % 2
        leaf = x.clone().requires_grad_()
        loss = supcon_loss(leaf, labels)
        loss.backward()
        check_close(
            loss.detach(),
            brute_force(x[..., None], labels[:, None], temperature=0.1, background=None, reduction="anchor"),
            1e-5,
        )
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert not leaf.grad[2:4].any() and leaf.grad[[0, 1, 4, 5]].any(dim=1).all()

    @pytest.mark.parametrize("length", [1e-20, 1e18])
    def test_tiny_and_huge_vectors_have_a_direction(self, place: Place, length: float) -> None:
        """Below 1e-12 a vector counts as zero; squares that float32 cannot hold do not matter."""
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
        labels = torch.arange(8) % 2
        expected = brute_force(x[..., None], labels[:, None], temperature=0.1, background=None)
        loss = supcon_loss((x * length).to(place.device), labels.to(place.device))
        if length < 1e-12:
            expected = torch.tensor(math.log(7))
        check_close(loss, expected, 1e-5)

    @pytest.mark.parametrize("form", FORMS)
    def test_scores_near_the_end_of_the_range(self, form: Any) -> None:
        """All scores of some anchors lie below -1e300, or below -1e38 in float32."""
        x = torch.tensor([[1.0, 0.2], [-0.9, -0.1], [0.8, -0.3], [-0.7, 0.1], [0.6, 0.5]], dtype=torch.float64)
        labels = torch.tensor([0, 0, 1, 1, 2])
        small = supcon_loss(x * 1e10, labels, form=form, normalize=False, temperature=1.0)
        for dtype, length in ((torch.float64, 1e153), (torch.float32, 1e19)):
            loss = supcon_loss(x.to(dtype) * length, labels, form=form, normalize=False, temperature=1.0)
            assert float(loss) / length**2 == pytest.approx(float(small) / 1e20, rel=1e-5)

    @pytest.mark.parametrize("others", [1, 40])
    @pytest.mark.parametrize("form", FORMS)
    def test_scores_beyond_the_range_are_not_left_out(self, place: Place, form: Any, others: int) -> None:
        """-infinity among the positives of two rows: their loss is infinite; the other rows have none."""
        x = torch.tensor([[1e20], [-1e20], *[[0.0]] * others], device=place.device)
        labels = torch.tensor([0, 0, *range(1, others + 1)], device=place.device)
        with place.selected():
            losses = supcon_loss(x, labels, form=form, normalize=False, temperature=1.0, reduction="none")
        assert losses.tolist() == [math.inf, math.inf, *[0.0] * others]

    def test_subnormal_numbers_of_the_caller_stay(self, place: Place) -> None:
        """The CPU kernels flush them to zero while they work: on every thread that they ran on this must be over afterwards."""
        x, labels = torch.randn(600, 64, device=place.device), torch.arange(600, device=place.device) % 7
        supcon_loss(x.requires_grad_(), labels, temperature=0.005).backward()
        assert (torch.full((1 << 18,), 1e-40) * 0.5).all()  # on all threads

    @pytest.mark.parametrize("normalize", [True, False])
    def test_nan_is_not_hidden(self, place: Place, normalize: bool) -> None:
        features, labels = (x.to(place.device) for x in draw_maps((2, 3, 4, 8), seed=5))
        features[0, 1, 2, 1] = math.nan
        labels[0, 2, 1] = 1
        losses = local_contrastive_loss(features, labels, block_size=4, normalize=normalize, reduction="none")
        assert losses[0, 2, 1].isnan()
        assert losses[:, :, :4][labels[:, :, :4] != 0].isnan().all()  # every anchor of its block meets it
        assert losses[:, :, 4:].isfinite().all()


class TestContract:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"features": "x"}, TypeError, "features must be a floating-point tensor"),
            ({"features": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "got int64"),
            ({"features": torch.zeros(2, 3, 4)}, ValueError, r"must have shape \[N, C, H, W\]"),
            ({"features": torch.zeros(2, 0, 4, 4)}, ValueError, "at least one channel"),
            ({"labels": torch.zeros(2, 4, 4)}, TypeError, "labels must be an integer tensor"),
            ({"temperature": "cold"}, TypeError, "temperature must be a positive number; got str"),
            ({"labels": torch.zeros(2, 4, 5, dtype=torch.int64)}, ValueError, r"labels must have shape \[2, 4, 4\]"),
            ({"temperature": 0.0}, ValueError, "temperature must be positive"),
            (
                {"temperature": torch.tensor(0.1)},
                TypeError,
                "to learn it, multiply the vectors, for cosines those of length 1, by",
            ),
            ({"block_size": 0}, ValueError, "block_size must be a positive integer"),
            ({"block_size": np.int64(2)}, ValueError, r"got numpy.int64; pass int\(...\)"),
            ({"stride": (1, np.int64(2))}, ValueError, r"got numpy.int64; pass int\(...\)"),
            (
                {"labels": torch.zeros(2, 4, 4, dtype=torch.int64, device="meta")},
                ValueError,
                r"e.g. labels.to\(features.device\)",
            ),
            ({"block_size": (4, 4, 4)}, ValueError, "one for each of the 2 axes"),
            ({"stride": 1.5}, ValueError, "stride must be a positive integer"),
            ({"stride": 2, "block_size": 2}, ValueError, "not both"),
            ({"form": "out"}, ValueError, "form must be one of 'supcon', 'in', 'paper', 'negout'"),
            ({"scope": "batch"}, ValueError, "scope must be one of"),
            ({"reduction": "mean"}, ValueError, "reduction must be one of"),
            ({"precision": "low"}, ValueError, "precision must be one of"),
            ({"background": 0.0}, TypeError, "background must be an integer or None"),
            ({"ignore_index": True}, TypeError, "ignore_index must be an integer or None"),
            ({"labels": None, "features": torch.zeros(3, 2, 4, 4)}, ValueError, "N must be even"),
            ({"labels": None, "scope": "image"}, ValueError, "scope 'group'"),
        ],
    )
    def test_an_error_says_what_was_expected(self, change: dict[str, Any], error: type[Exception], words: str) -> None:
        arguments: dict[str, Any] = {
            "features": torch.zeros(2, 3, 4, 4),
            "labels": torch.zeros(2, 4, 4, dtype=torch.int64),
            **change,
        }
        with pytest.raises(error, match=f"local_contrastive_loss: .*{words}"):
            local_contrastive_loss(arguments.pop("features"), arguments.pop("labels"), **arguments)

    def test_errors_of_embeddings(self) -> None:
        x, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"supcon_loss: labels must have shape \[4\]"):
            supcon_loss(x, labels[:3])
        with pytest.raises(ValueError, match=r"supcon_loss: embeddings must have shape \[N, D\]"):
            supcon_loss(x[0], labels)
        with pytest.raises(ValueError, match="supcon_loss: gather must be one of False, True, 'ring'"):
            supcon_loss(x, labels, gather=1)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="init_process_group first"):
            supcon_loss(x, labels, gather=True)
        with pytest.raises(ValueError, match="nt_xent_loss: first and second must have the same shape"):
            nt_xent_loss(x, x[:2])
        with pytest.raises(ValueError, match="denominator must be one of 'all', 'negatives'"):
            nt_xent_loss(x, x, denominator="positives")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="cross_view_loss: temperature must be positive"):
            cross_view_loss(x, x, temperature=-1)
        with pytest.raises(TypeError, match=r"cross_view_loss: second must be a torch\.Tensor"):
            cross_view_loss(x, None)  # type: ignore[arg-type]


class TestIgnored:
    @pytest.mark.parametrize("thing", [float("nan"), float("inf")])
    def test_what_takes_no_part_gets_no_gradient_whatever_it_holds(self, place: Place, thing: float) -> None:
        labels = torch.tensor([1, 1, 0, 2, 2, 1, 0, 2], device=place.device)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(place.device)
        x[3] = 0  # a vector without a direction, beside one that is no vector
        broken = x.clone()
        broken[2, 1] = broken[6, 0] = thing
        maps = [v.view(2, 2, 2, 4).movedim(-1, 1).contiguous() for v in (x, broken)]
        grid = labels.view(2, 2, 2)
        for whole, part, call in (
            (x, broken, lambda v: supcon_loss(v, labels, ignore_index=0)),
            (*maps, lambda v: local_contrastive_loss(v, grid, ignore_index=0, background=None)),
        ):
            gradients, losses = [], []
            for value in (whole, part):
                value = value.clone().requires_grad_()
                loss = call(value)
                losses.append(loss.detach())
                gradients.append(torch.autograd.grad(loss, value)[0])
            assert torch.equal(*losses) and torch.equal(*gradients)
            absent = (labels == 0) if whole is x else (grid == 0).unsqueeze(1).expand_as(whole)
            assert gradients[0].abs().sum() > 0 and torch.equal(
                gradients[0][absent], torch.zeros_like(gradients[0][absent])
            )

    def test_embeddings_of_no_dimension_are_named(self, place: Place) -> None:
        with pytest.raises(ValueError, match=r"embeddings must have shape \[N, D\] with D at least 1; got \[3, 0\]"):
            supcon_loss(torch.rand(3, 0, device=place.device), torch.zeros(3, dtype=torch.int64, device=place.device))
