# SPDX-License-Identifier: MIT
"""What holds for the op `sinkhorn` on any problem: invariants and closed forms on sizes, masses and seeds that hypothesis chooses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import sinkhorn, sinkhorn_divergence
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import Weights, check, draw, gradients, modulo_constants, norm_error, solve_batch

# One fixture serves all examples of a test: it only selects the backend.
COMMON = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(COMMON, max_examples=10)

ODD = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 49, 65, 130])
SMALL = st.integers(1, 9)
SEEDS = st.integers(0, 2**31 - 1)
EPSILONS = st.sampled_from([0.005, 0.05, 0.3, 3.0])
TYPES = st.sampled_from([torch.float32, torch.float64])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def problem(place: Place, B: int, N: int, M: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    cost, a, b = draw(B, N, M, seed)
    return cost.to(place.device), a.to(place.device), b.to(place.device)


class TestValue:
    @COMMON
    @given(B=st.integers(1, 4), N=ODD, M=ODD, eps=EPSILONS, num_iters=st.integers(1, 20), dtype=TYPES, seed=SEEDS)
    def test_float64_agrees(
        self, place: Place, B: int, N: int, M: int, eps: float, num_iters: int, dtype: Any, seed: int
    ) -> None:
        cost, a, b = draw(B, N, M, seed, dtype)
        generator = torch.Generator().manual_seed(seed)
        cost[torch.rand(B, N, M, generator=generator) < 0.1] = math.inf
        cost[:, 0] = cost[:, :, 0] = 0.5
        rows = torch.rand(B, N, generator=generator) < 0.9
        rows[:, 0] = True
        # the masses of the masked rows go to the first
        a = torch.where(rows, a, 0.0)
        a[:, 0] += 1 - a.sum(1)
        epsilon = torch.full((B,), eps, dtype=dtype)
        result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=eps, num_iters=num_iters)
        check(result, solve_batch(cost, a, b, epsilon, num_iters), cost, epsilon, a)

    @COMMON
    @given(N=ODD, M=ODD, eps=EPSILONS, num_iters=st.integers(1, 40), seed=SEEDS)
    def test_a_plan_is_positive_with_exact_columns(
        self, place: Place, N: int, M: int, eps: float, num_iters: int, seed: int
    ) -> None:
        cost, a, b = problem(place, 2, N, M, seed)
        result = sinkhorn(cost, a, b, epsilon=eps, num_iters=num_iters)
        assert (result.plan >= 0).all()
        torch.testing.assert_close(result.plan.sum(1), b, rtol=1e-10, atol=1e-15)
        rows = (result.plan.sum(2) - a).abs().sum(1)
        torch.testing.assert_close(result.marginal_error, rows, rtol=1e-6, atol=1e-11)

    @FEW
    @given(N=ODD, M=ODD, eps=EPSILONS, seed=SEEDS)
    def test_more_iterations_leave_a_smaller_error(self, place: Place, N: int, M: int, eps: float, seed: int) -> None:
        cost, a, b = problem(place, 2, N, M, seed)
        errors = [sinkhorn(cost, a, b, epsilon=eps, num_iters=t).marginal_error for t in (1, 2, 3, 5, 8, 13, 21)]
        for before, after in itertools.pairwise(errors):
            assert (after <= before + 1e-12).all()

    @FEW
    @given(N=SMALL, M=SMALL, seed=SEEDS)
    def test_at_convergence_the_value_is_the_smallest(self, place: Place, N: int, M: int, seed: int) -> None:
        """At most that of a b^T, and weak duality is tight: <f, a> + <g, b> - eps = <P, C> + eps sum P (log P - 1)."""
        cost, a, b = problem(place, 2, N, M, seed)
        result = sinkhorn(cost, a, b, epsilon=0.2, num_iters=2000)
        product = a.unsqueeze(2) * b.unsqueeze(1)
        of_product = (product * cost).sum((1, 2)) + 0.2 * (product * (product.log() - 1)).sum((1, 2))
        assert (result.entropic_value <= of_product + 1e-9).all()
        assert (result.transport_cost <= (product * cost).sum((1, 2)) + 1e-9).all()
        dual = (result.f * a).sum(1) + (result.g * b).sum(1) - 0.2
        torch.testing.assert_close(dual, result.entropic_value, rtol=0, atol=1e-7)

    @FEW
    @given(N=ODD, M=SMALL, seed=SEEDS)
    def test_transposing_transposes_at_convergence(self, place: Place, N: int, M: int, seed: int) -> None:
        cost, a, b = problem(place, 2, N, M, seed)
        one = sinkhorn(cost, a, b, epsilon=0.3, num_iters=500)
        other = sinkhorn(cost.mT, b, a, epsilon=0.3, num_iters=500)
        torch.testing.assert_close(other.plan.mT, one.plan, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(other.entropic_value, one.entropic_value, rtol=1e-8, atol=1e-10)

    @COMMON
    @given(N=ODD, M=ODD, eps=EPSILONS, seed=SEEDS)
    def test_order_shifts_and_units_do_not_matter(self, place: Place, N: int, M: int, eps: float, seed: int) -> None:
        cost, a, b = problem(place, 2, N, M, seed)
        plan = sinkhorn(cost, a, b, epsilon=eps, num_iters=6).plan
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.randperm(n, generator=generator).to(place.device) for n in (N, M))
        permuted = sinkhorn(cost[:, rows][:, :, columns], a[:, rows], b[:, columns], epsilon=eps, num_iters=6).plan
        torch.testing.assert_close(permuted, plan[:, rows][:, :, columns], rtol=1e-9, atol=1e-15)
        shifts = torch.randn(2, N, 1, generator=generator, dtype=torch.float64).to(place.device)
        shifted = sinkhorn(cost + shifts, a, b, epsilon=eps, num_iters=6)  # taken up by f at once
        torch.testing.assert_close(shifted.plan, plan, rtol=1e-8, atol=1e-15)
        torch.testing.assert_close(
            sinkhorn(7 * cost, a, b, epsilon=7 * eps, num_iters=6).plan, plan, rtol=1e-8, atol=1e-15
        )
        scaled = sinkhorn(cost, 3 * a, 3 * b, epsilon=eps, num_iters=6).plan
        torch.testing.assert_close(scaled, 3 * plan, rtol=1e-9, atol=1e-15)

    @FEW
    @given(N=SMALL, M=SMALL, seed=SEEDS, extra=st.integers(1, 5))
    def test_a_row_cut_into_pieces_is_the_same_row(self, place: Place, N: int, M: int, seed: int, extra: int) -> None:
        cost, a, b = problem(place, 1, N, M, seed)
        whole = sinkhorn(cost, a, b, epsilon=0.1, num_iters=9)
        shares = torch.rand(extra + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        shares = (shares / shares.sum()).to(place.device)
        pieces = sinkhorn(
            torch.cat([cost, cost[:, -1:].expand(1, extra, M)], dim=1),
            torch.cat([a[:, :-1], a[:, -1:] * shares], dim=1),
            b,
            epsilon=0.1,
            num_iters=9,
        )
        torch.testing.assert_close(pieces.plan[:, N - 1 :].sum(1), whole.plan[:, -1], rtol=1e-10, atol=0)
        torch.testing.assert_close(pieces.transport_cost, whole.transport_cost, rtol=1e-10, atol=0)

    @FEW
    @given(N=SMALL, D=st.integers(1, 4), seed=SEEDS)
    def test_diracs(self, place: Place, N: int, D: int, seed: int) -> None:
        """One point to many: the plan is the masses, whatever epsilon; between two points the divergence is their distance squared."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 1, D, generator=generator, dtype=torch.float64).to(place.device)
        y = torch.randn(1, N, D, generator=generator, dtype=torch.float64).to(place.device)
        cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)
        result = sinkhorn(cost, num_iters=1)
        torch.testing.assert_close(result.transport_cost, cost.mean((1, 2)), rtol=1e-12, atol=1e-14)
        value = sinkhorn_divergence(x, y[:, :1], epsilon=0.3)
        torch.testing.assert_close(value, cost[:, 0, 0], rtol=1e-10, atol=1e-12)

    @FEW
    @given(N=st.integers(2, 17), seed=SEEDS)
    def test_sorted_points_are_matched_in_order(self, place: Place, N: int, seed: int) -> None:
        """Points at least .5 apart on a line, moved by less than .2: the plan is the identity for a small epsilon."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.arange(N, dtype=torch.float64) + 0.2 * torch.rand(N, generator=generator, dtype=torch.float64)
        y = x + 0.2 * torch.rand(N, generator=generator, dtype=torch.float64)
        cost = (x.unsqueeze(1) - y).square().to(place.device)
        result = sinkhorn(cost, epsilon=0.01, num_iters=50)
        torch.testing.assert_close(
            result.plan, torch.eye(N, dtype=torch.float64, device=place.device) / N, rtol=0, atol=1e-6
        )


class TestGradient:
    @FEW
    @given(B=st.integers(1, 3), N=SMALL, M=SMALL, seed=SEEDS)
    def test_three_gradients_agree_at_convergence(self, place: Place, B: int, N: int, M: int, seed: int) -> None:
        weights = Weights.draw(B, N, M, seed, gauge_free=True)
        everything, values = [], []
        for gradient in ("unrolled", "implicit", "envelope"):
            point = tuple(x.requires_grad_() for x in problem(place, B, N, M, seed))
            result = sinkhorn(*point, epsilon=0.3, num_iters=400, gradient=gradient)
            values.append(torch.autograd.grad(result.entropic_value.sum(), point))
            if gradient != "envelope":
                result = sinkhorn(*point, epsilon=0.3, num_iters=400, gradient=gradient)
                everything.append(gradients(result, weights, point))
        scale = 1e-6 * (1 + float(everything[0][0].abs().max()))
        torch.testing.assert_close(everything[1][0], everything[0][0], rtol=1e-6, atol=scale)
        for found in values[1:]:
            torch.testing.assert_close(found[0], values[0][0], rtol=1e-6, atol=1e-9)
            masses = [modulo_constants(*x[1:]) for x in (found, values[0])]
            assert norm_error(*masses) < 1e-6 or float((masses[0] - masses[1]).abs().max()) < 1e-8

    @FEW
    @given(N=ODD, M=ODD, seed=SEEDS)
    def test_adding_to_a_row_of_the_cost_changes_no_plan(self, place: Place, N: int, M: int, seed: int) -> None:
        cost, a, b = problem(place, 1, N, M, seed)
        weight = Weights.draw(1, N, M, seed).plan.to(place.device)
        for gradient in ("unrolled", "implicit"):
            cost.requires_grad_()
            result = sinkhorn(cost, a, b, epsilon=0.3, num_iters=30, gradient=gradient)
            (found,) = torch.autograd.grad((result.plan * weight).sum(), cost)
            assert float(found.sum(2).abs().max()) <= 1e-9 * (1 + float(found.abs().sum()))
            if N > 200:
                break
