# SPDX-License-Identifier: MIT
"""The op `sinkhorn` on rows and columns without mass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import sinkhorn
from protokernels.nn import SinkhornLoss
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import draw

GRADIENTS = ["unrolled", "implicit", "envelope"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestAbsent:
    """Rows and columns without mass: the costs and features there may be anything, in values and in gradients."""

    @pytest.mark.parametrize("penalty", [None, 1.0])
    @pytest.mark.parametrize("how", ["mask", "mass"])
    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf])
    def test_costs_that_are_nothing(
        self, place: Place, junk: float, gradient: Any, how: str, penalty: float | None
    ) -> None:
        if penalty is not None and gradient == "implicit":
            pytest.skip("the implicit gradient is for exact marginals")
        cost, _, _ = draw(2, 5, 7)
        present = cost[:, :4, :6].clone().to(place.device).requires_grad_()
        cost[:, 4], cost[:, :, 6] = junk, junk
        whole = cost.to(place.device).requires_grad_()
        rows, columns = torch.arange(5, device=place.device) < 4, torch.arange(7, device=place.device) < 6
        given: dict[str, Tensor] = {"row_mask": rows, "column_mask": columns}
        if how == "mass":
            given = {"a": rows.double() / 4, "b": columns.double() / 6}
        found = []
        for leaf, arguments in ((whole, given), (present, {})):
            result = sinkhorn(leaf, epsilon=0.3, num_iters=20, gradient=gradient, marginal_penalty=penalty, **arguments)
            bare = sinkhorn(leaf.detach(), epsilon=0.3, num_iters=20, marginal_penalty=penalty, **arguments)
            torch.testing.assert_close(bare.entropic_value, result.entropic_value.detach(), rtol=1e-10, atol=1e-12)
            loss = result.entropic_value.sum()
            if gradient != "envelope":
                loss = loss + result.transport_cost.sum() + result.plan.square().sum()
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[0][1][:, :4, :6], found[1][1], rtol=1e-9, atol=1e-12)
        assert not found[0][1][:, 4].any() and not found[0][1][:, :, 6].any()

    @pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
    @pytest.mark.parametrize(
        ("value", "gradient"),
        [("transport", "unrolled"), ("transport", "implicit"), ("entropic", "envelope"), ("divergence", "envelope")],
    )
    def test_padded_features(self, place: Place, value: Any, gradient: Any, cost: Any) -> None:
        loss = SinkhornLoss(epsilon=0.5, num_iters=20, cost=cost, value=value, gradient=gradient)
        generator = torch.Generator().manual_seed(2)
        x, y = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64).to(place.device) for n in (3, 5))
        present = [x[:, :2].clone().requires_grad_(), y[:, :4].clone().requires_grad_()]
        x[:, 2], y[:, 4] = math.nan, math.inf
        masks = {f"{k}_mask": torch.arange(n, device=place.device) < n - 1 for k, n in (("row", 3), ("column", 5))}
        torch.testing.assert_close(loss(x, y, **masks), loss(*present).detach(), rtol=1e-10, atol=1e-12)
        whole = [x.requires_grad_(), y.requires_grad_()]
        found, expected = (torch.autograd.grad(loss(*p, **m), p) for p, m in ((whole, masks), (present, {})))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[:, :-1], other, rtol=1e-9, atol=1e-12)
            assert not mine[:, -1].any()

    def test_a_start_that_knows_nothing_of_a_column(self, place: Place) -> None:
        """Such as the potentials of a problem in which it was absent."""
        cost = draw(1, 3, 4)[0].to(place.device)
        before = sinkhorn(cost, column_mask=torch.tensor([True, False, True, True], device=place.device)).g
        assert before[0, 1] == -math.inf
        for start in (before, torch.full_like(before, -math.inf)):
            result = sinkhorn(cost, init=start, num_iters=300)
            assert result.feasible.all()
            torch.testing.assert_close(result.plan, sinkhorn(cost, num_iters=300).plan)
