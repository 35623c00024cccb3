# SPDX-License-Identifier: MIT
"""The op `sinkhorn` where potentials are large, or move further in one iteration than exponentials reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import backend, sinkhorn, sinkhorn_features
from python_tests.places import PLACES, Place, needs_native
from python_tests.sinkhorn_oracle import Weights, check, draw, gradients, inputs, norm_error, on, solve_batch

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rho", [10.0, (10.0, 1.0), (1.0, math.inf)], ids=str)
    @pytest.mark.parametrize(("offset", "start"), [(3000.0, 0.0), (9000.0, 0.0), (0.0, 500.0), (0.0, 4000.0)])
    def test_potentials_that_move_far(
        self, place: Place, offset: float, start: float, rho: float | tuple[float, float], dtype: torch.dtype
    ) -> None:
        """A damped potential comes from afar: scales around the one of the iteration before are nothing or infinite."""
        cost, a, b = draw(2, 5, 21, dtype=dtype)
        cost = cost + offset
        epsilon, init = torch.ones(2, dtype=dtype), torch.full((2, 21), start, dtype=dtype)
        both = rho if isinstance(rho, tuple) else (rho, rho)
        for num_iters in (1, 2, 3):
            result = sinkhorn(
                *on(place, cost, a, b),
                epsilon=1.0,
                num_iters=num_iters,
                marginal_penalty=rho,
                init=init.to(place.device),
            )
            assert result.feasible.all()
            check(result, solve_batch(cost, a, b, epsilon, num_iters, rho=both, start=init), cost, epsilon, a)

    def test_a_sum_of_products_that_the_type_hardly_holds(self, place: Place) -> None:
        """Next to no mass in a row, and little in the columns, which are exact: scales of 1e-12 times elements of 1e-27."""
        cost, _, _ = draw(1, 2, 100, dtype=torch.float32)
        a, b, epsilon = torch.tensor([[1.0, 5e-27]]), torch.full((1, 100), 1e-14), torch.ones(1)
        rho = (10.0, 1e6)
        result = sinkhorn(*on(place, cost, a, b), epsilon=1.0, num_iters=2, marginal_penalty=rho)
        answer = solve_batch(cost, a, b, epsilon, 2, rho=rho)[0]
        torch.testing.assert_close(result.f.double().cpu()[0], torch.from_numpy(answer.f), rtol=0, atol=1e-4)

    def test_a_plan_that_vanishes_stops_by_its_potentials(self, place: Place) -> None:
        """Elements of 1e-130 have no sums in float32; how far potentials move is found from their logarithms."""
        cost, a, b = draw(2, 5, 21, dtype=torch.float32)
        cost, epsilon, rho = cost + 300, torch.ones(2), (0.05, 0.05)
        result = sinkhorn(*on(place, cost, a, b), epsilon=1.0, num_iters=40, marginal_penalty=rho, tol=1e-2)
        check(result, solve_batch(cost, a, b, epsilon, 40, rho=rho, tol=1e-2), cost, epsilon, a)
        x, y = (torch.tensor([[start], [start + 1]]).expand(2, 3) for start in (0.0, 20.0))
        options = {"epsilon": 1.0, "num_iters": 40, "marginal_penalty": rho, "tol": 1e-2}
        dense = sinkhorn(*on(place, torch.cdist(x, y).square()), **options)
        features = sinkhorn_features(*on(place, x, y), cost="sqeuclidean", **options)
        assert int(features.iterations) == int(dense.iterations) < 10
        torch.testing.assert_close(features.marginal_error, dense.marginal_error, rtol=0, atol=1e-3)


class TestGradient:
    @pytest.mark.parametrize("start", [150.0, -150.0, 500.0])
    def test_of_potentials_that_move_far(self, place: Place, start: float) -> None:
        """Factors of the softmaxes around one iteration's potentials are nothing or infinite at the one before."""
        weights, found = Weights.draw(1, 5, 6), []
        for name, dtype in (("reference", torch.float64), (place.backend, torch.float32)):
            with backend.use(name):
                point = inputs(place, 1, 5, 6, dtype)
                init = torch.full((1, 6), 0.08 * start, dtype=dtype, device=place.device)
                result = sinkhorn(*point[:3], epsilon=point[3], num_iters=6, marginal_penalty=0.1, init=init)
                found.append(gradients(result, weights, point))
        for actual, expected in zip(found[1], found[0], strict=True):
            assert norm_error(actual, expected) < 1e-3

    @pytest.mark.parametrize("backend_name", [pytest.param("native", marks=needs_native), "reference"])
    @pytest.mark.parametrize(("N", "M"), [(7, 9), (31, 33), (16, 130)])
    def test_large_potentials(self, backend_name: str, N: int, M: int) -> None:
        """Potentials of thousands are rounded by 1e-4 and more in float32. What cancels in float64 has to cancel all the same."""

        def of(name: str, dtype: torch.dtype, num_iters: int) -> Tensor:
            cost, a, b = (x.to(dtype) for x in draw(3, N, M, seed=N, dtype=torch.float32))
            cost.requires_grad_()
            with backend.use(name):
                result = sinkhorn(cost, a, b, epsilon=1e-4, num_iters=num_iters)
                return torch.autograd.grad(result.transport_cost.sum(), cost)[0]

        for num_iters in (2, 10, 50, 200):
            error = norm_error(of(backend_name, torch.float32, num_iters), of("reference", torch.float64, num_iters))
            assert error < 2e-3

    @pytest.mark.parametrize("smallest", [1e-15, 1e-30])
    @pytest.mark.parametrize("dtype", DTYPES)
    @needs_native
    def test_implicit_where_masses_are_far_apart(self, smallest: float, dtype: torch.dtype) -> None:
        """The last entries are the lightest: they do not hold the others, nor does what is added to all swallow what these get."""
        cost, a, b = draw(1, 9, 7)
        for mass in (a, b):
            mass[:, -3:] = torch.tensor([smallest, 10 * smallest, smallest])
            mass[:, :-3] /= mass[:, :-3].sum()
        epsilon, weights = torch.tensor([0.3], dtype=torch.float64), Weights.draw(1, 9, 7, gauge_free=True)

        def of(name: str, gradient: Any, kind: torch.dtype, part: str) -> tuple[Tensor, ...]:
            point = tuple(x.to(kind).requires_grad_() for x in (cost, a, b, epsilon))
            with backend.use(name):
                result = sinkhorn(*point[:3], epsilon=point[3], num_iters=1000, gradient=gradient)
                f, g, plan = ((getattr(weights, k).to(kind) * getattr(result, k)).sum() for k in ("f", "g", "plan"))
                loss = {"transport": result.transport_cost.sum(), "potentials": f + g, "plan": plan}[part]
                return torch.autograd.grad(loss, (point[0], point[3]))

        for part in ("transport", "potentials", "plan"):
            found, expected = of("native", "implicit", dtype, part), of("reference", "unrolled", torch.float64, part)
            for x, y in zip(found, expected, strict=True):
                assert norm_error(x, y) < (1e-4 if dtype == torch.float32 else 1e-11)

    @pytest.mark.parametrize("smallest", [1e-15, 1e-30])
    @pytest.mark.parametrize("dtype", DTYPES)
    @needs_native
    def test_implicit_of_many_entries_whose_masses_are_far_apart(self, smallest: float, dtype: torch.dtype) -> None:
        """Beyond 256 entries the system is solved by iterations; they must not end once the lightest entries are met."""
        cost, a, b = draw(1, 270, 260)
        for mass in (a, b):
            mass[:, -3:] = torch.tensor([smallest, 10 * smallest, smallest])
            mass[:, :-3] /= mass[:, :-3].sum()
        weights = Weights.draw(1, 270, 260, gauge_free=True)

        def of(gradient: Any, kind: torch.dtype) -> Tensor:
            point = cost.to(kind).requires_grad_()
            with backend.use("native"):
                result = sinkhorn(point, a.to(kind), b.to(kind), epsilon=0.3, num_iters=200, gradient=gradient)
                loss = sum((getattr(weights, k).to(kind) * getattr(result, k)).sum() for k in ("f", "g"))
                return torch.autograd.grad(loss, point)[0]

        error = norm_error(of("implicit", dtype), of("unrolled", torch.float64))
        assert error < (1e-4 if dtype == torch.float32 else 1e-11)

    @pytest.mark.parametrize("smallest", [1e-9, 1e-16])
    @pytest.mark.parametrize("N", [9, 270])
    @pytest.mark.parametrize("dtype", DTYPES)
    @needs_native
    def test_implicit_gradients_of_masses_that_are_far_apart(self, smallest: float, N: int, dtype: torch.dtype) -> None:
        """Through a softmax. The constant between both sides is no larger than most of them, whatever a light entry gets."""
        cost, a, b = draw(1, N, N - 2)
        for mass in (a, b):
            mass[:, -3:] = torch.tensor([smallest, 10 * smallest, smallest])
            mass[:, :-3] /= mass[:, :-3].sum()
        weights = Weights.draw(1, N, N - 2, gauge_free=True)

        def of(gradient: Any, kind: torch.dtype, part: str) -> tuple[Tensor, ...]:
            logits = tuple(x.log().to(kind).requires_grad_() for x in (a, b))
            with backend.use("native"):
                masses = (x.softmax(1) for x in logits)
                result = sinkhorn(cost.to(kind), *masses, epsilon=0.3, num_iters=300, gradient=gradient)
                f, g, plan = ((getattr(weights, k).to(kind) * getattr(result, k)).sum() for k in ("f", "g", "plan"))
                loss = {"transport": result.transport_cost.sum(), "potentials": f + g, "plan": plan}[part]
                return torch.autograd.grad(loss, logits)

        for part in ("transport", "potentials", "plan"):
            for x, y in zip(of("implicit", dtype, part), of("unrolled", torch.float64, part), strict=True):
                assert norm_error(x, y) < (1e-4 if dtype == torch.float32 else 1e-8)

    @pytest.mark.parametrize("N", [20, 1100])
    @pytest.mark.parametrize("dtype", DTYPES)
    @needs_native
    def test_implicit_of_a_loss_that_shifts_parts_against_each_other(self, N: int, dtype: torch.dtype) -> None:
        """Along the constants of the parts it has no derivative, and what is left a convention decides; but it is not large."""
        cost, a, b = draw(1, N, N, uniform=True, dtype=dtype)
        cost[0, : N // 2, N // 2 :] = cost[0, N // 2 :, : N // 2] = math.inf
        weights = Weights.draw(1, N, N, gauge_free=True)

        def of(gradient: Any) -> Tensor:
            point = cost.clone().requires_grad_()
            with backend.use("native"):
                result = sinkhorn(point, a, b, epsilon=0.3, num_iters=60, gradient=gradient)
                loss = sum((getattr(weights, k).to(dtype) * getattr(result, k)).sum() for k in ("f", "g"))
                return torch.autograd.grad(loss, point)[0]

        assert of("implicit").norm() < 2 * of("unrolled").norm()
