# SPDX-License-Identifier: MIT
"""The modules `protokernels.nn.SinkhornLoss` and `SinkhornAssignment`, the second also in two processes against one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protokernels import sinkhorn, sinkhorn_divergence, sinkhorn_features
from protokernels.nn import SinkhornAssignment, SinkhornLoss
from protokernels.reference.sinkhorn import cost_matrix
from python_tests import forks
from python_tests.distributed import sinkhorn_worker as worker
from python_tests.places import PLACES, Place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def clouds(place: Place, B: int = 3, N: int = 9, M: int = 7, D: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, n, D, generator=generator).to(place.device) for n in (N, M))  # type: ignore[return-value]


class TestLoss:
    def test_the_default_is_the_transport_cost_of_cosine_costs(self, place: Place) -> None:
        x, y = clouds(place)
        found = []
        for by_module in (True, False):
            x = x.detach().requires_grad_()
            loss = SinkhornLoss()(x, y) if by_module else sinkhorn(cost_matrix(x, y, "cosine")).transport_cost.mean()
            found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        assert found[0][1].any()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_value(self, place: Place, reduction: Any) -> None:
        x, y = clouds(place)
        rows = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)).add(0.1).to(place.device)
        rows = rows / rows.sum(1, keepdim=True)
        options: dict[str, Any] = {"epsilon": 0.2, "num_iters": 7, "reduction": reduction}
        cost = cost_matrix(x, y, "sqeuclidean")
        dense = sinkhorn(cost, rows, epsilon=0.2, num_iters=7)
        features = sinkhorn_features(x, y, rows, cost="sqeuclidean", epsilon=0.2, num_iters=7)
        cases = [
            (SinkhornLoss(cost="sqeuclidean", **options)(x, y, a=rows), dense.transport_cost),
            (SinkhornLoss(cost="sqeuclidean", value="entropic", **options)(x, y, a=rows), dense.entropic_value),
            (SinkhornLoss(cost=None, gradient="implicit", **options)(cost, a=rows), dense.transport_cost),
            (
                SinkhornLoss(cost="sqeuclidean", value="entropic", gradient="envelope", **options)(x, y, a=rows),
                features.entropic_value,
            ),
            (
                SinkhornLoss(cost="sqeuclidean", value="divergence", **options)(x, y, a=rows),
                sinkhorn_divergence(x, y, rows, cost="sqeuclidean", epsilon=0.2, num_iters=7),
            ),
        ]
        for actual, each in cases:
            expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)

    def test_masks_penalties_and_one_pair(self, place: Place) -> None:
        x, y = clouds(place)
        mask = torch.arange(9, device=place.device) < 6
        loss = SinkhornLoss(marginal_penalty=0.5, annealing=0.5, num_iters=5)
        expected = sinkhorn(
            cost_matrix(x, y, "cosine"), row_mask=mask, marginal_penalty=0.5, annealing=0.5, num_iters=5
        ).transport_cost
        torch.testing.assert_close(loss(x, y, row_mask=mask), expected.mean())
        torch.testing.assert_close(loss(x[0], y[0], row_mask=mask), expected[0])

    def test_no_pair_is_no_loss(self, place: Place) -> None:
        x = torch.empty(0, 9, 5, device=place.device, requires_grad=True)
        loss = SinkhornLoss()(x, torch.empty(0, 7, 5, device=place.device))
        loss.backward()
        assert float(loss.detach()) == 0 and x.grad is not None

    def test_it_trains(self, place: Place) -> None:
        torch.manual_seed(0)
        x, y = clouds(place)
        layer = nn.Linear(5, 5).to(place.device)
        loss, optimiser = SinkhornLoss(num_iters=30), torch.optim.Adam(layer.parameters(), lr=0.03)
        history = []
        for _ in range(30):
            value = loss(layer(x), y)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            history.append(float(value.detach()))
        assert history[-1] < 0.8 * history[0]

    def test_autocast(self, place: Place) -> None:
        x, y = clouds(place)
        layer = nn.Linear(5, 5).to(place.device)
        for options in ({}, {"value": "entropic", "gradient": "envelope"}, {"value": "divergence"}):
            with torch.autocast(place.device, torch.bfloat16):
                half = layer(x)
                assert half.dtype == torch.bfloat16
                loss = SinkhornLoss(num_iters=9, **options)(half, y)  # type: ignore[arg-type]
            assert loss.dtype == torch.float32
            expected = SinkhornLoss(num_iters=9, **options)(half.float(), y)  # type: ignore[arg-type]
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
            loss.backward()
            assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cost": "l2"}, "cost must be 'cosine', 'sqeuclidean' or None; got 'l2'"),
            ({"value": "plan"}, "value must be 'transport', 'entropic' or 'divergence'; got 'plan'"),
            ({"reduction": "max"}, "reduction must be 'mean', 'sum' or 'none'; got 'max'"),
            ({"gradient": "exact"}, "gradient must be"),
            ({"gradient": "envelope"}, "gradient='envelope' is the gradient of value='entropic' or 'divergence'"),
            ({"value": "divergence", "cost": None}, "value='divergence' is between features"),
            ({"value": "divergence", "marginal_penalty": 1.0}, "without marginal_penalty"),
            ({"gradient": "implicit", "marginal_penalty": 1.0}, "'implicit' is for exact marginals only"),
            ({"num_iters": 0}, "num_iters must be at least 1; got 0"),
            ({"tol": -1.0}, "tol must be finite and not negative"),
            ({"epsilon": -1.0}, "epsilon must be positive and finite; got -1.0"),
            ({"epsilon": float("nan")}, "epsilon must be positive and finite; got nan"),
            ({"annealing": 2.0}, r"annealing must lie in \(0, 1\)"),
        ],
    )
    def test_wrong_options_are_named(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^SinkhornLoss: .*{message}"):
            SinkhornLoss(**options)

    def test_epsilon_is_a_number_or_a_tensor(self) -> None:
        with pytest.raises(TypeError, match="SinkhornLoss: epsilon must be a number; got str"):
            SinkhornLoss("a")  # type: ignore[arg-type]
        assert SinkhornLoss(torch.tensor(0.1))(torch.ones(1, 2, 3), torch.ones(1, 2, 3)).isfinite()  # type: ignore[arg-type]

    def test_features_or_costs(self) -> None:
        with pytest.raises(TypeError, match="with cost='cosine', forward takes features x and y"):
            SinkhornLoss()(torch.ones(2, 3))
        with pytest.raises(TypeError, match="with cost=None, forward takes costs alone"):
            SinkhornLoss(cost=None)(torch.ones(2, 3), torch.ones(2, 3))
        assert "cost='cosine', value='transport', gradient='unrolled'" in repr(SinkhornLoss())


def as_swav_does(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """Plain exponentials and divisions, prototypes first, samples last."""
    q = (scores.double() / epsilon).exp().T
    q = q / q.sum()
    K, B = q.shape
    for _ in range(num_iters):
        q = q / q.sum(1, keepdim=True) / K
        q = q / q.sum(0, keepdim=True) / B
    return (q * B).T


class TestAssignment:
    @pytest.mark.parametrize(("B", "K"), [(1, 1), (1, 4), (4, 1), (33, 7), (256, 300)])
    @pytest.mark.parametrize("num_iters", [1, 3])
    def test_as_in_swav(self, place: Place, B: int, K: int, num_iters: int) -> None:
        scores = torch.rand(B, K, generator=torch.Generator().manual_seed(B)).mul(2).sub(1)
        expected = as_swav_does(scores, 0.05, num_iters)
        targets = SinkhornAssignment(num_iters=num_iters)(scores.to(place.device))
        assert targets.shape == (B, K) and targets.is_contiguous()
        torch.testing.assert_close(targets.cpu().double(), expected, rtol=3e-4, atol=1e-9)
        torch.testing.assert_close(targets.sum(1), torch.ones(B, device=place.device), rtol=2e-5, atol=0)

    def test_every_prototype_gets_its_share(self, place: Place) -> None:
        scores = torch.randn(120, 8, generator=torch.Generator().manual_seed(3)).to(place.device)
        scores[:, 2] += 5.0  # everybody's favourite
        targets = SinkhornAssignment(epsilon=0.5, num_iters=200)(scores)
        torch.testing.assert_close(targets.sum(0), torch.full((8,), 15.0, device=place.device), rtol=1e-3, atol=0)

    def test_scores_of_any_size(self, place: Place) -> None:
        scores = 1e3 * torch.randn(33, 7, generator=torch.Generator().manual_seed(3)).to(place.device)
        targets = SinkhornAssignment()(scores)  # exp(scores / .05) would be infinite
        assert targets.isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(33, device=place.device), rtol=0.05, atol=0)

    def test_no_gradient_no_samples_half_precision(self, place: Place) -> None:
        scores = torch.randn(33, 7, device=place.device, requires_grad=True)
        module = SinkhornAssignment()
        assert not module(scores).requires_grad
        assert module(scores[:0]).shape == (0, 7)
        half = module(scores.bfloat16())
        assert half.dtype == torch.float32 and torch.equal(half, module(scores.bfloat16().float()))
        assert repr(copy.deepcopy(module)) == "SinkhornAssignment(epsilon=0.05, num_iters=3)"

    def test_it_compiles(self, place: Place) -> None:
        torch.compiler.reset()
        scores = torch.randn(33, 7, device=place.device)
        module = SinkhornAssignment()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(scores), module(scores), rtol=1e-6, atol=1e-9)

    def test_wrong_options_and_input_are_named(self) -> None:
        with pytest.raises(ValueError, match="SinkhornAssignment: epsilon must be positive; got 0"):
            SinkhornAssignment(epsilon=0)
        with pytest.raises(ValueError, match="SinkhornAssignment: num_iters must be at least 1; got 0"):
            SinkhornAssignment(num_iters=0)
        with pytest.raises(ValueError, match=r"scores must have shape \[B, K\] with K >= 1; got \[4\]"):
            SinkhornAssignment()(torch.ones(4))


class TestProcesses:
    @pytest.mark.parametrize("world_size", [2, 4])
    def test_ranks_equal_one_with_the_whole_batch(self, tmp_path: Path, world_size: int) -> None:
        words = [(rank, world_size, tmp_path / "store", tmp_path / f"{rank}.pt") for rank in range(world_size)]
        forks.run_ranks(worker.__file__, tmp_path, words)
        ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
        module = SinkhornAssignment(epsilon=0.3, num_iters=4)
        for index, (scores, (_, cut)) in enumerate(zip(worker.batches(), worker.BATCHES, strict=True)):
            whole = module(scores.double()).float()  # ranks iterate in float64
            assert ranks[0][index].shape == (-(-cut // (world_size // 2)), worker.K)
            torch.testing.assert_close(torch.cat([rank[index] for rank in ranks]), whole, rtol=1e-6, atol=1e-9)
