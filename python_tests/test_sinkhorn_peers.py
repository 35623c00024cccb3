# SPDX-License-Identifier: MIT
"""The op `sinkhorn` against other people's implementations, where they are installed: the same numbers for the same problem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from protokernels import sinkhorn, sinkhorn_divergence
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import as_numpy, draw


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def installed(module: str, package: str) -> Any:
    return pytest.importorskip(module, reason=f"{package} is not installed; pip install {package}")


class TestPot:
    def test_plan_and_potentials(self, place: Place) -> None:
        ot = installed("ot", "POT")
        cost, a, b = draw(3, 33, 31)
        result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=0.05, num_iters=2000)
        for index in range(3):
            plan = ot.sinkhorn(
                *(as_numpy(x[index]) for x in (a, b, cost)), 0.05, method="sinkhorn_log", stopThr=1e-13, numItermax=9000
            )
            np.testing.assert_allclose(as_numpy(result.plan[index]), plan, rtol=1e-7, atol=1e-15)

    def test_batches(self, place: Place) -> None:
        batch = installed("ot.batch", "POT")
        cost, a, b = draw(3, 33, 31)
        theirs = batch.solve_batch(cost, reg=0.05, a=a, b=b, max_iter=50, tol=0, method="log_sinkhorn")
        ours = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=0.05, num_iters=50)
        torch.testing.assert_close(ours.plan.cpu(), theirs.plan, rtol=1e-9, atol=1e-15)

    def test_unbalanced(self, place: Place) -> None:
        ot = installed("ot", "POT")
        cost, a, b = draw(2, 17, 12)
        b = 1.7 * b
        result = sinkhorn(
            *(x.to(place.device) for x in (cost, a, b)), epsilon=0.1, num_iters=3000, marginal_penalty=0.6
        )
        for index in range(2):
            plan = ot.unbalanced.sinkhorn_unbalanced(
                *(as_numpy(x[index]) for x in (a, b, cost)),
                0.1,
                0.6,
                reg_type="entropy",
                stopThr=1e-14,
                numItermax=9000,
            )
            np.testing.assert_allclose(as_numpy(result.plan[index]), plan, rtol=1e-6, atol=1e-15)

    def test_one_dimension_exactly(self, place: Place) -> None:
        ot = installed("ot", "POT")
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.rand(25, generator=generator, dtype=torch.float64) for _ in range(2))
        exact = float(ot.wasserstein_1d(as_numpy(x), as_numpy(y), p=2))
        cost = (x.unsqueeze(1) - y).square().to(place.device)
        result = sinkhorn(cost, epsilon=1e-3, num_iters=3000, annealing=0.5)
        slack = float(result.marginal_error)
        assert exact - slack <= float(result.transport_cost) <= exact + 1e-3 * np.log(25) + slack


class TestGeomloss:
    def test_the_divergence(self, place: Place) -> None:
        """Their cost is |x - y|^2 / 2 and their epsilon blur^2: twice their value is ours at epsilon = 2 blur^2."""
        geomloss = installed("geomloss", "geomloss")
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (33, 31))
        blur = 0.4
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.999, backend="tensorized")
        ours = sinkhorn_divergence(x.to(place.device), y.to(place.device), epsilon=2 * blur**2, num_iters=2000)
        torch.testing.assert_close(ours.cpu(), 2 * loss(x, y), rtol=1e-4, atol=1e-6)


class TestOtt:
    @pytest.fixture
    def jax(self) -> Iterator[Any]:
        installed("ott", "ott-jax")
        jax = installed("jax", "ott-jax")
        jax.config.update("jax_enable_x64", True)
        yield jax
        jax.config.update("jax_enable_x64", False)

    def test_value_and_its_gradient(self, place: Place, jax: Any) -> None:
        from ott.geometry import geometry  # type: ignore[import-not-found, unused-ignore]
        from ott.problems.linear import linear_problem  # type: ignore[import-not-found, unused-ignore]
        from ott.solvers.linear import sinkhorn as ott  # type: ignore[import-not-found, unused-ignore]

        cost, a, b = draw(1, 33, 31)

        def solve(c: Any) -> Any:
            problem = linear_problem.LinearProblem(geometry.Geometry(c, epsilon=0.05), as_numpy(a[0]), as_numpy(b[0]))
            return ott.Sinkhorn(threshold=1e-12, max_iterations=9000)(problem)

        theirs = solve(as_numpy(cost[0]))
        leaf = cost.to(place.device).requires_grad_()
        ours = sinkhorn(leaf, a.to(place.device), b.to(place.device), num_iters=2000, gradient="envelope")
        np.testing.assert_allclose(as_numpy(ours.plan[0]), np.asarray(theirs.matrix), rtol=1e-6, atol=1e-14)
        (found,) = torch.autograd.grad(ours.entropic_value.sum(), leaf)
        expected = jax.grad(lambda c: solve(c).reg_ot_cost)(as_numpy(cost[0]))
        np.testing.assert_allclose(as_numpy(found[0]), np.asarray(expected), rtol=1e-6, atol=1e-14)

    def test_the_implicit_gradient_of_the_transport_cost(self, place: Place, jax: Any) -> None:
        from ott.geometry import geometry  # type: ignore[import-not-found, unused-ignore]
        from ott.problems.linear import linear_problem  # type: ignore[import-not-found, unused-ignore]
        from ott.solvers.linear import sinkhorn as ott  # type: ignore[import-not-found, unused-ignore]

        cost, a, b = draw(1, 9, 12)

        def transport(c: Any) -> Any:
            problem = linear_problem.LinearProblem(geometry.Geometry(c, epsilon=0.1), as_numpy(a[0]), as_numpy(b[0]))
            return (ott.Sinkhorn(threshold=1e-13, max_iterations=9000)(problem).matrix * c).sum()

        expected = np.asarray(jax.grad(transport)(as_numpy(cost[0])))
        leaf = cost.to(place.device).requires_grad_()
        result = sinkhorn(
            leaf, a.to(place.device), b.to(place.device), epsilon=0.1, num_iters=2000, gradient="implicit"
        )
        (found,) = torch.autograd.grad(result.transport_cost.sum(), leaf)
        assert np.linalg.norm(as_numpy(found[0]) - expected) < 1e-5 * np.linalg.norm(expected)
