# SPDX-License-Identifier: MIT
"""The op `sinkhorn` on what goes wrong easily: masks, forbidden pairs, blocked rows, NaN, ranges, penalties.

`test_sinkhorn_absent.py` has what may stand in rows and columns without mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import sinkhorn
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import (
    Weights,
    as_numpy,
    check,
    directional,
    draw,
    gradients,
    modulo_constants,
    norm_error,
    on,
    solve,
    solve_batch,
    with_holes,
)

DTYPES = [torch.float32, torch.float64]
GRADIENTS = ["unrolled", "implicit", "envelope"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("B", "N", "M"), [(3, 5, 6), (2, 33, 31), (1, 49, 130)])
    def test_holes_within_rounding_of_float64(self, place: Place, B: int, N: int, M: int, dtype: torch.dtype) -> None:
        cost, a, b = with_holes(B, N, M, dtype)
        for eps in (0.3, 0.02, 0.005):
            epsilon = torch.full((B,), eps, dtype=dtype)
            result = sinkhorn(*on(place, cost, a, b), epsilon=eps, num_iters=20)
            assert result.feasible.all()
            check(result, solve_batch(cost, a, b, epsilon, 20), cost, epsilon, a)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_mask_is_cutting_out(self, place: Place, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(5)
        cost, _, _ = draw(3, 33, 49, dtype=dtype)
        rows, columns = torch.rand(3, 33, generator=generator) < 0.6, torch.rand(3, 49, generator=generator) < 0.6
        for eps in (0.1, 0.005):
            result = sinkhorn(
                cost.to(place.device),
                epsilon=eps,
                num_iters=15,
                row_mask=rows.to(place.device),
                column_mask=columns.to(place.device),
            )
            for index in range(3):
                cut = cost[index][rows[index]][:, columns[index]]
                alone = sinkhorn(cut.to(place.device), epsilon=eps, num_iters=15)
                inside = result.plan[index].cpu()[rows[index]][:, columns[index]]
                close: dict[str, Any] = (
                    {"rtol": 3e-3, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 0}
                )
                torch.testing.assert_close(inside, alone.plan.cpu(), **close)
                torch.testing.assert_close(result.f[index].cpu()[rows[index]], alone.f.cpu(), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(result.transport_cost[index], alone.transport_cost, rtol=1e-4, atol=1e-6)
                assert (result.f[index].cpu()[~rows[index]] == -math.inf).all()
                assert (result.g[index].cpu()[~columns[index]] == -math.inf).all()
                assert not result.plan[index].cpu()[~rows[index]].any()
                assert not result.plan[index].cpu()[:, ~columns[index]].any()
        assert result.feasible.all()

    def test_masses_given_are_masked_and_not_rescaled(self, place: Place) -> None:
        cost, a, b = draw(2, 5, 6)
        mask = torch.tensor([True, False, True, True, False])
        b = b * (a * mask).sum(1, keepdim=True)
        cost, a, b, mask = (x.to(place.device) for x in (cost, a, b, mask))
        masked, zeroed = sinkhorn(cost, a, b, row_mask=mask), sinkhorn(cost, a * mask, b)
        assert torch.equal(masked.plan, zeroed.plan) and torch.equal(masked.entropic_value, zeroed.entropic_value)

    def test_nobody_there(self, place: Place) -> None:
        cost = torch.rand(2, 3, 4, device=place.device, requires_grad=True)
        nobody = torch.zeros(2, 1, dtype=torch.bool, device=place.device)
        nobody[1] = True
        result = sinkhorn(cost, row_mask=nobody.expand(2, 3), column_mask=nobody.expand(2, 4))
        assert (result.f[0] == -math.inf).all() and (result.g[0] == -math.inf).all() and not result.plan[0].any()
        assert result.feasible.all() and result.transport_cost[0] == result.entropic_value[0] == 0
        alone = sinkhorn(cost[1])
        torch.testing.assert_close(result.plan[1], alone.plan)
        (result.plan.square().sum() + result.entropic_value.sum()).backward()
        assert cost.grad is not None and cost.grad.isfinite().all() and not cost.grad[0].any()

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_a_blocked_row_is_left_empty_and_flagged(self, place: Place, gradient: Any) -> None:
        cost, a, b = draw(3, 5, 6)
        cost[0, 2] = math.inf  # a row without a partner
        cost[1, :, 3] = math.inf  # a column without one
        b[2, 3] = 0
        b[2] /= b[2].sum()
        cost[2, 4] = math.inf
        cost[2, 4, 3] = 0.5  # the only partner of this row is absent
        cost, a, b = on(place, cost, a, b)
        result = sinkhorn(cost, a, b, num_iters=7, gradient=gradient)
        assert result.feasible.tolist() == [False, False, False]
        assert result.f[0, 2] == result.f[2, 4] == result.g[1, 3] == -math.inf
        assert not result.plan[0, 2].any() and not result.plan[2, 4].any() and not result.plan[1, :, 3].any()
        assert not result.plan.isnan().any() and result.entropic_value.isfinite().all()
        lost = torch.stack([a[0, 2], b[1, 3], a[2, 4]])
        assert (result.marginal_error >= lost - 1e-12).all() and not result.converged.any()
        epsilon = torch.full((3,), 0.05, dtype=torch.float64)
        check(result, solve_batch(cost, a, b, epsilon, 7), cost, epsilon, a)
        for found in torch.autograd.grad(result.entropic_value.sum(), (cost, a, b)):
            assert found.isfinite().all()

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("shape", [(1, 1), (2, 2), (33, 49)])
    def test_a_problem_whose_pairs_are_all_forbidden_is_empty(
        self, place: Place, gradient: Any, shape: tuple[int, int]
    ) -> None:
        cost, a, b = draw(2, *shape)
        cost[0] = math.inf
        cost, a, b = on(place, cost, a, b)
        result = sinkhorn(cost, a, b, num_iters=5, gradient=gradient)
        assert result.feasible.tolist() == [False, True]
        assert (result.f[0] == -math.inf).all() and (result.g[0] == -math.inf).all() and not result.plan[0].any()
        assert result.transport_cost[0] == result.entropic_value[0] == 0 and abs(result.marginal_error[0] - 2) < 1e-14
        for found in torch.autograd.grad(result.entropic_value.sum(), (cost, a, b)):
            assert found.isfinite().all() and not found[0].any()

    def test_masses_that_differ_are_flagged_where_they_are_not_looked_at(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 5, 6))
        a[1] *= 1.001
        b[2] *= 1.00005  # within what is allowed
        if place.device == "cpu":
            with pytest.raises(ValueError, match="problem 1 has sum"):
                sinkhorn(cost, a, b)
            with torch.no_grad():
                torch.compiler.reset()
                solver = torch.compile(
                    lambda *x: sinkhorn(*x, num_iters=3).feasible, fullgraph=True, backend="aot_eager"
                )
                assert solver(cost, a, b).tolist() == [True, False, True]
        else:
            assert sinkhorn(cost, a, b).feasible.tolist() == [True, False, True]
        assert sinkhorn(cost, a, b, marginal_penalty=1.0).feasible.all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays_in_its_problem(self, place: Place, dtype: torch.dtype) -> None:
        cost, a, b = draw(5, 33, 49, dtype=dtype)
        clean = sinkhorn(*(x.clone().to(place.device) for x in (cost, a, b)))
        cost[1, 3, 4] = math.nan
        cost[3] = math.nan
        for gradient in GRADIENTS:
            spoilt, mass_a, mass_b = on(place, cost, a, b)
            result = sinkhorn(spoilt, mass_a, mass_b, gradient=gradient)  # type: ignore[arg-type]
            assert result.transport_cost[[1, 3]].isnan().all() and result.entropic_value[[1, 3]].isnan().all()
            good = [0, 2, 4]
            torch.testing.assert_close(result.plan[good], clean.plan[good], rtol=1e-5, atol=0)
            assert not result.converged[[1, 3]].any()
            for found in torch.autograd.grad(result.entropic_value.sum(), (spoilt, mass_a, mass_b)):
                assert found[good].isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_start_that_is_not_a_number_is_not_hidden(self, place: Place, dtype: torch.dtype) -> None:
        """As from a warm start by a result that had diverged: one entry, or all of them."""
        cost, a, b = (x.to(place.device) for x in draw(3, 6, 5, dtype=dtype))
        start = torch.zeros(3, 5, dtype=dtype, device=place.device)
        start[1, 2], start[2] = math.nan, math.nan
        result = sinkhorn(cost, a, b, init=start)
        assert result.transport_cost.isnan().tolist() == result.entropic_value.isnan().tolist() == [False, True, True]
        assert result.feasible.all() and result.converged.tolist()[1:] == [False, False]
        torch.testing.assert_close(result.plan[0], sinkhorn(cost[0], a[0], b[0]).plan)

    def test_any_range_of_costs(self, place: Place) -> None:
        cost, a, b = draw(3, 33, 49, dtype=torch.float32)
        for scale, shift in ((1e6, 0.0), (1e20, 0.0), (1e4, 0.0), (1.0, 1e4), (1e-20, 0.0), (1e3, -3e3)):
            result = sinkhorn(*(x.to(place.device) for x in (cost * scale + shift, a, b)), num_iters=5)
            assert result.f.isfinite().all() and result.g.isfinite().all()
            # log P is the difference of numbers of this size; where float32 resolves it, the last half-step holds
            error = 8 * (scale + abs(shift)) / 0.05 * 2.0**-24
            if error < 0.2:
                torch.testing.assert_close(result.plan.sum(1).cpu(), b, rtol=error, atol=1e-6)
                assert result.entropic_value.isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tiny_masses_and_far_points(self, place: Place, dtype: torch.dtype) -> None:
        """Absorbed kernels under- and overflow here: one row far from everything, masses down to 1e-20."""
        cost, a, b = draw(2, 33, 31, dtype=dtype)
        cost[:, 5] += 40.0
        cost[:, :, 7] += 25.0
        a[0, :4] = torch.tensor([1e-20, 1e-12, 1e-8, 1e-4], dtype=dtype)
        a = a / a.sum(1, keepdim=True)
        epsilon = torch.full((2,), 0.01, dtype=dtype)
        result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=0.01, num_iters=20)
        check(result, solve_batch(cost, a, b, epsilon, 20), cost, epsilon, a)

    def test_a_column_that_scales_up_past_what_the_kernel_holds(self, place: Place) -> None:
        """The second column's scale becomes 1e27 at once, and no other leaves its range: unless that is noticed, the entry
        that holds .4 of the mass in the end stays what it was next to the first scales, exp(-87) / 2, a zero in float32."""
        cost, a, b = torch.tensor([[[0.0, 63.0], [0.0, 87.0]]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.1, 0.9]])
        epsilon = torch.ones(1)
        for C, rows, columns in ((cost, a, b), (cost.mT.contiguous(), b, a)):
            for num_iters in (12, 15, 18, 40):
                result = sinkhorn(*on(place, C, rows, columns), epsilon=1.0, num_iters=num_iters)
                check(result, solve_batch(C, rows, columns, epsilon, num_iters), C, epsilon, rows)

    def test_a_sum_of_what_the_kernel_hardly_holds(self, place: Place) -> None:
        """The second column's sum is exp(-86) / 2, and another twelfth that is a zero in float32 next to the first column."""
        cost, a = torch.tensor([[[0.0, 86.0], [0.0, 88.5]]]), torch.tensor([[0.5, 0.5]])
        epsilon = torch.ones(1)
        result = sinkhorn(*on(place, cost, a, a), epsilon=1.0, num_iters=1)
        check(result, solve_batch(cost, a, a, epsilon, 1), cost, epsilon, a)

    def test_no_problems(self, place: Place) -> None:
        for gradient in GRADIENTS:
            cost = torch.empty(0, 3, 4, device=place.device, requires_grad=True)
            result = sinkhorn(cost, gradient=gradient)  # type: ignore[arg-type]
            assert result.plan.shape == (0, 3, 4) and result.f.shape == (0, 3) and result.iterations.shape == (0,)
            result.entropic_value.sum().backward()
            assert cost.grad is not None and cost.grad.shape == (0, 3, 4)

    def test_any_strides(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 33, 49, dtype=torch.float32))
        expected = sinkhorn(cost, a, b)
        wide = torch.full((6, 40, 50), math.nan, device=place.device)
        wide[::2, 3:36, 1:] = cost
        for name, strided in {"a part": wide[::2, 3:36, 1:], "transposed": cost.mT.contiguous().mT}.items():
            assert torch.equal(strided, cost) and not strided.is_contiguous()
            result = sinkhorn(strided, a.T.contiguous().T, b)
            assert torch.equal(result.plan, expected.plan), name
        repeated = sinkhorn(cost[:1].expand(4, 33, 49), a[:1].expand(4, 33), b[0])
        assert torch.equal(repeated.plan[3], repeated.plan[0])


class TestUnbalanced:
    RHOS = ((0.5, 0.5), (0.05, 3.0), (0.3, math.inf), (math.inf, 0.3))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rho", RHOS)
    def test_within_rounding_of_float64(self, place: Place, rho: tuple[float, float], dtype: torch.dtype) -> None:
        cost, a, b = draw(3, 33, 31, dtype=dtype)
        a, b = 3 * a, 0.5 * b
        a[0, 4] = b[1, 6] = 0
        cost[2, 1, 3:] = math.inf
        for eps in (0.2, 0.02):
            epsilon = torch.full((3,), eps, dtype=dtype)
            result = sinkhorn(
                *(x.to(place.device) for x in (cost, a, b)), epsilon=eps, num_iters=25, marginal_penalty=rho
            )
            assert result.feasible.all()
            check(result, solve_batch(cost, a, b, epsilon, 25, rho=rho), cost, epsilon, a)

    def test_the_error_where_a_row_has_lost_its_column(self, place: Place) -> None:
        """The second row's only near column has hardly any mass: its sum under the last scales is 1e-30, and u is found anew."""
        cost, a, b = (
            torch.tensor([[[0.0, 100.0], [100.0, 0.0]]]),
            torch.tensor([[0.5, 0.5]]),
            torch.tensor([[1.0, 1e-33]]),
        )
        epsilon = torch.ones(1)
        result = sinkhorn(*on(place, cost, a, b), epsilon=1.0, num_iters=1, marginal_penalty=10.0)
        check(result, solve_batch(cost, a, b, epsilon, 1, rho=(10.0, 10.0)), cost, epsilon, a)

    def test_one_number_is_for_both_sides(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(2, 5, 6))
        one, two = (sinkhorn(cost, a, 2 * b, marginal_penalty=rho) for rho in (0.7, (0.7, 0.7)))
        assert torch.equal(one.plan, two.plan)

    def test_it_minimises_what_it_says(self, place: Place) -> None:
        """At convergence no small change of the plan makes the entropic value smaller."""
        cost, a, b = draw(1, 5, 6)
        result = sinkhorn(*(x.to(place.device) for x in (cost, 2 * a, b)), num_iters=2000, marginal_penalty=(0.4, 0.2))
        plan = result.plan[0].cpu().requires_grad_()

        def kl(p: Tensor, q: Tensor) -> Tensor:
            return (p * (p / q).log() - p + q).sum()

        value = (plan * cost[0]).sum() + 0.05 * (plan * (plan.log() - 1)).sum()
        value = value + 0.4 * kl(plan.sum(1), 2 * a[0]) + 0.2 * kl(plan.sum(0), b[0])
        torch.testing.assert_close(value.detach(), result.entropic_value[0].cpu(), rtol=1e-11, atol=0)
        assert torch.autograd.grad(value, plan)[0].abs().max() < 1e-9

    def test_a_high_penalty_is_balanced(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(2, 9, 12))
        exact = sinkhorn(cost, a, b, epsilon=0.1, num_iters=300)
        for rho, tolerance in ((1e3, 1e-2), (1e6, 1e-5), (math.inf, 1e-14)):
            near = sinkhorn(cost, a, b, epsilon=0.1, num_iters=300, marginal_penalty=rho)
            torch.testing.assert_close(near.plan, exact.plan, rtol=tolerance, atol=0)

    @pytest.mark.parametrize("rho", RHOS)
    def test_gradients(self, place: Place, rho: tuple[float, float]) -> None:
        cost, a, b = draw(1, 5, 6)
        b = 1.5 * b
        weights, epsilon = Weights.draw(1, 5, 6), torch.tensor([0.1], dtype=torch.float64)
        values = tuple(as_numpy(x[0]) for x in (cost, a, b, epsilon))
        direction = tuple(np.random.default_rng(k).standard_normal(x.shape) for k, x in enumerate(values))
        point = on(place, cost, a, b, epsilon)
        result = sinkhorn(*point[:3], epsilon=point[3], num_iters=3, marginal_penalty=rho)
        found = gradients(result, weights, point)
        actual = sum(float((as_numpy(g[0]) * d).sum()) for g, d in zip(found, direction, strict=True))
        expected = directional(lambda *x: weights.of_answer(solve(*x, 3, rho=rho)), values, direction)
        assert actual == pytest.approx(expected, rel=1e-9)

        result = sinkhorn(*point[:3], epsilon=point[3], num_iters=3000, marginal_penalty=rho, gradient="envelope")
        found = torch.autograd.grad(result.entropic_value.sum(), point)
        actual = sum(float((as_numpy(g[0]) * d).sum()) for g, d in zip(found, direction, strict=True))
        expected = directional(lambda *x: solve(*x, 3000, rho=rho).entropic_value, values, direction)
        assert actual == pytest.approx(expected, rel=1e-7)


class TestGradient:
    @pytest.mark.parametrize("num_iters", [1, 12])
    def test_unrolled_with_holes(self, place: Place, num_iters: int) -> None:
        B, N, M = 2, 9, 12
        cost, a, b = with_holes(B, N, M)
        epsilon = torch.tensor([0.1, 0.3], dtype=torch.float64)
        point, weights = on(place, cost, a, b, epsilon), Weights.draw(B, N, M)
        found = gradients(sinkhorn(*point[:3], epsilon=point[3], num_iters=num_iters), weights, point)
        assert not found[0][cost == math.inf].any() and not found[1][a == 0].any() and not found[2][b == 0].any()
        assert not found[0][(a == 0).unsqueeze(2).expand(B, N, M)].any()
        for index in range(B):
            values = tuple(as_numpy(x[index]) for x in point)
            random = np.random.default_rng(index)
            direction = tuple(random.standard_normal(x.shape) * (x != 0) for x in values)
            expected = directional(lambda *x, i=index: weights.of_answer(solve(*x, num_iters), i), values, direction)
            actual = sum(float((as_numpy(g[index]) * d).sum()) for g, d in zip(found, direction, strict=True))
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-11)

    def test_implicit_with_holes(self, place: Place) -> None:
        B, N, M = 2, 9, 12
        cost, a, b = with_holes(B, N, M)
        epsilon = torch.tensor([0.1, 0.3], dtype=torch.float64)
        base = Weights.draw(B, N, M)
        # potentials count where there is mass, and as much on both sides
        f, g = base.f * (a > 0), base.g * (b > 0)
        g = g * (f.sum(1) / g.sum(1)).unsqueeze(1)
        weights = Weights(f, g, base.transport_cost, base.entropic_value, base.plan)
        found = []
        for gradient in ("unrolled", "implicit"):
            point = on(place, cost, a, b, epsilon)
            result = sinkhorn(*point[:3], epsilon=point[3], num_iters=3000, gradient=gradient)  # type: ignore[arg-type]
            assert (result.marginal_error < 1e-9).all()
            found.append(gradients(result, weights, point))
        pairs = ((a > 0).unsqueeze(2) & (b > 0).unsqueeze(1)).to(place.device)
        for index in (0, 3):
            assert norm_error(found[1][index], found[0][index]) < 1e-6
        both = [modulo_constants(*x[1:3])[pairs] for x in found]
        assert norm_error(both[1], both[0]) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_implicit_where_forbidden_pairs_cut_the_problem_in_two(self, place: Place, dtype: torch.dtype) -> None:
        """Two blocks that do not touch: the linear system is singular twice."""
        cost, a, b = draw(1, 10, 8, uniform=True, dtype=dtype)
        cost[:, :5, 4:] = cost[:, 5:, :4] = math.inf
        point = on(place, cost, a, b)
        weight = Weights.draw(1, 10, 8).plan.to(place.device, dtype)
        whole = sinkhorn(*point, epsilon=0.2, num_iters=500, gradient="implicit")
        (found,) = torch.autograd.grad((whole.plan * weight).sum() + whole.transport_cost.sum(), point[0])
        assert found.isfinite().all() and not found[cost.to(place.device) == math.inf].any()
        for rows, columns in ((slice(0, 5), slice(0, 4)), (slice(5, 10), slice(4, 8))):
            block = on(place, cost[:, rows, columns], a[:, rows], b[:, columns])
            part = sinkhorn(*block, epsilon=0.2, num_iters=500, gradient="implicit")
            (expected,) = torch.autograd.grad(
                (part.plan * weight[:, rows, columns]).sum() + part.transport_cost.sum(), block[0]
            )
            assert norm_error(found[:, rows, columns], expected) < (1e-4 if dtype == torch.float32 else 1e-9)

    @pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
    def test_a_small_epsilon_gives_finite_gradients(self, place: Place, gradient: Any) -> None:
        cost, a, b = on(place, *draw(3, 33, 31, dtype=torch.float32))
        epsilon = torch.full((3,), 0.002, device=place.device, requires_grad=True)
        result = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=50, gradient=gradient)
        assert (result.plan == 0).any()  # where P log P is 0 times -infinity
        for found in torch.autograd.grad(
            result.plan.square().sum() + result.entropic_value.sum(), (cost, a, b, epsilon)
        ):
            assert found.isfinite().all()
