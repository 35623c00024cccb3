# SPDX-License-Identifier: MIT
"""The op `sinkhorn` where potentials are large, or move further in one iteration than exponentials reach."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from protokernels import sinkhorn
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import check, draw, on, solve_batch

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
