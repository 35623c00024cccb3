# SPDX-License-Identifier: MIT
"""The op `sinkhorn`: when every problem stops, and from where it starts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from protokernels import sinkhorn
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import (
    Weights,
    as_numpy,
    check,
    directional,
    draw,
    gradients,
    on,
    solve,
    solve_batch,
    with_holes,
)

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestStops:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_problem_stops_on_its_own(self, place: Place, dtype: torch.dtype) -> None:
        cost, a, b = draw(6, 33, 31, dtype=dtype)
        epsilon = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02, 0.01], dtype=dtype)
        tol = 1e-3
        result = sinkhorn(
            *(x.to(place.device) for x in (cost, a, b)), epsilon=epsilon.to(place.device), num_iters=60, tol=tol
        )
        answers = solve_batch(cost, a, b, epsilon, 60, tol=tol)
        check(result, answers, cost, epsilon, a)
        iterations = result.iterations.tolist()
        assert iterations[0] < 5 and iterations == sorted(iterations) and iterations[-1] == 60
        assert result.converged.tolist() == [error <= tol for error in result.marginal_error.tolist()]
        for index, taken in enumerate(iterations):  # the same as that many iterations
            fixed = sinkhorn(
                *(x[index].to(place.device) for x in (cost, a, b)), epsilon=float(epsilon[index]), num_iters=taken
            )
            torch.testing.assert_close(result.f[index], fixed.f, rtol=1e-5, atol=1e-6)

    def test_the_gradient_is_that_of_the_iterations_made(self, place: Place) -> None:
        weights = Weights.draw(3, 9, 12)
        found = []
        cost, a, b = draw(3, 9, 12)
        epsilon = torch.tensor([0.5, 0.1, 0.05], dtype=torch.float64)
        for stopped in (True, False):
            point = on(place, cost, a, b, epsilon)
            if stopped:
                result = sinkhorn(*point[:3], epsilon=point[3], num_iters=100, tol=1e-4)
                taken = result.iterations.tolist()
                assert len(set(taken)) == 3 and max(taken) < 100
                found.append(gradients(result, weights, point))
            else:
                parts = []
                for index, num_iters in enumerate(taken):
                    one = tuple(x[index : index + 1].detach().requires_grad_() for x in point)
                    part = Weights(*(w[index : index + 1] for w in vars(weights).values()))
                    parts.append(gradients(sinkhorn(*one[:3], epsilon=one[3], num_iters=num_iters), part, one))
                found.append(tuple(torch.cat(x) for x in zip(*parts, strict=True)))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)

    def test_no_tolerance_never_stops(self, place: Place) -> None:
        result = sinkhorn(torch.ones(2, 3, 4, device=place.device), num_iters=9)
        assert result.iterations.tolist() == [9, 9] and result.converged.all()


class TestStarts:
    def test_a_start_goes_on_where_the_other_left_off(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 33, 31))
        epsilon = 2.0**-5  # a power of two: g / epsilon is exact
        first = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=50)
        second = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=50, init=first.g)
        whole = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=100)
        for name in ("f", "g", "plan", "entropic_value"):
            torch.testing.assert_close(getattr(second, name), getattr(whole, name), rtol=1e-11, atol=1e-13)
        assert second.iterations.tolist() == [50, 50, 50]

    def test_a_start_is_not_differentiated_and_gradients_follow_the_iterations_from_it(self, place: Place) -> None:
        cost, a, b = draw(1, 5, 6)
        start = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        weights, epsilon = Weights.draw(1, 5, 6), torch.tensor([0.1], dtype=torch.float64)
        point = on(place, cost, a, b, epsilon)
        init = start.to(place.device).requires_grad_()
        result = sinkhorn(*point[:3], epsilon=point[3], num_iters=2, init=init)
        found = gradients(result, weights, point)
        with pytest.raises(RuntimeError, match=r"does not require grad|not have been used in the graph"):
            torch.autograd.grad(weights.of_result(sinkhorn(*point[:3], epsilon=point[3], init=init)), init)
        values = tuple(as_numpy(x[0]) for x in point)
        direction = tuple(np.random.default_rng(k).standard_normal(x.shape) for k, x in enumerate(values))
        expected = directional(lambda *x: weights.of_answer(solve(*x, 2, start=as_numpy(start[0]))), values, direction)
        actual = sum(float((as_numpy(g[0]) * d).sum()) for g, d in zip(found, direction, strict=True))
        assert actual == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("factor", [0.5, 0.8])
    def test_annealing_leads_to_the_same_plan_sooner(self, place: Place, factor: float) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 33, 31))
        epsilon = 0.01
        exact = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=5000)
        assert (exact.marginal_error < 1e-5).all()
        plain = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=30)
        annealed = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=30, annealing=factor)
        assert (annealed.marginal_error < plain.marginal_error).all()
        assert annealed.iterations.tolist() == [30, 30, 30]
        long = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=5000, annealing=factor)
        torch.testing.assert_close(long.plan, exact.plan, rtol=0, atol=1e-5)

    def test_annealing_looks_at_pairs_that_count(self, place: Place) -> None:
        cost, a, b = with_holes(2, 9, 12)
        cut = cost.clone()
        cut[(a == 0).unsqueeze(2).expand_as(cost)] = 1e5  # absent rows
        point = [x.to(place.device) for x in (cost, a, b)]
        one = sinkhorn(*point, annealing=0.5, num_iters=3)
        other = sinkhorn(cut.to(place.device), *point[1:], annealing=0.5, num_iters=3)
        torch.testing.assert_close(one.plan, other.plan, rtol=1e-12, atol=0)
