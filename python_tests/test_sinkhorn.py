# SPDX-License-Identifier: MIT
"""The op `sinkhorn`: values against a float64 oracle and closed forms, wrong arguments, repetition.

`test_sinkhorn_gradient.py` holds the three gradients, `test_sinkhorn_edges.py` masks, forbidden pairs, NaN and unbalanced marginals,
`test_sinkhorn_absent.py` zero mass, `test_sinkhorn_stops.py` early stop and starts, `test_sinkhorn_features.py` clouds of features and
the divergence,
`test_sinkhorn_properties.py` invariants on random problems, `test_sinkhorn_torch.py` what torch does with the op,
`test_sinkhorn_peers.py` other libraries, `test_nn_sinkhorn.py` the modules.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import protokernels
from protokernels import backend, sinkhorn
from python_tests.places import PLACES, Place, needs_native
from python_tests.sinkhorn_oracle import SIZES, check, draw, inputs, solve_batch

EPSILONS = (0.5, 0.05, 0.005)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("B", "N", "M"), SIZES)
    def test_every_output_within_rounding_of_float64(
        self, place: Place, B: int, N: int, M: int, dtype: torch.dtype
    ) -> None:
        cost, a, b = draw(B, N, M, seed=N + M, dtype=dtype)
        for eps in EPSILONS:
            for num_iters in (1, 2, 30):
                epsilon = torch.full((B,), eps, dtype=dtype)
                result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=eps, num_iters=num_iters)
                assert result.plan.dtype == result.transport_cost.dtype == result.f.dtype == dtype
                check(result, solve_batch(cost, a, b, epsilon, num_iters), cost, epsilon, a)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_large_problems(self, place: Place, dtype: torch.dtype) -> None:
        cost, a, b = draw(1, 700, 530, dtype=dtype)
        epsilon = torch.tensor([0.02], dtype=dtype)
        result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=0.02, num_iters=12)
        check(result, solve_batch(cost, a, b, epsilon, 12), cost, epsilon, a)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_with_one_or_two_columns_behind_whole_vectors(self, place: Place, dtype: torch.dtype) -> None:
        """Which the CPU keeps apart; with many rows it adds them up in several pieces."""
        for N, M in (
            (5, 17),
            (23, 18),
            (12, 33),
            (31, 34),
            (49, 49),
            (50, 50),
            (7, 65),
            (64, 66),
            (9, 97),
            (3, 113),
            (6000, 49),
        ):
            cost, a, b = draw(2, N, M, seed=M, dtype=dtype)
            point = [x.to(place.device).requires_grad_() for x in (cost, a, b)]
            result = sinkhorn(*point, epsilon=0.05, num_iters=7)
            epsilon = torch.full((2,), 0.05, dtype=dtype)
            check(result, solve_batch(cost, a, b, epsilon, 7), cost, epsilon, a)
            found = torch.autograd.grad(result.transport_cost.sum(), point)
            with backend.use("reference"):
                wide = [x.double().requires_grad_() for x in (cost, a, b)]
                expected = torch.autograd.grad(sinkhorn(*wide, epsilon=0.05, num_iters=7).transport_cost.sum(), wide)
            for x, e in zip(found, expected, strict=True):
                error = (x.cpu().double() - e).abs().max() / e.abs().max()
                assert float(error) < (3e-5 if dtype == torch.float32 else 2e-13), (N, M, float(error))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_of_every_number_of_vectors(self, place: Place, dtype: torch.dtype) -> None:
        """The CPU has passes over the matrix for one to eight vectors a row, for more and for long rows, by four rows or eight."""
        for M in (*range(3, 76, 8), 100, 401):
            for N in (5, 12, 23):
                cost, a, b = draw(2, N, M, seed=M, dtype=dtype)
                epsilon = torch.full((2,), 0.05, dtype=dtype)
                result = sinkhorn(*(x.to(place.device) for x in (cost, a, b)), epsilon=0.05, num_iters=7)
                check(result, solve_batch(cost, a, b, epsilon, 7), cost, epsilon, a)

    def test_an_epsilon_for_each_problem(self, place: Place) -> None:
        cost, a, b = draw(4, 9, 12)
        epsilon = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
        moved = [x.to(place.device) for x in (cost, a, b, epsilon)]
        result = sinkhorn(*moved[:3], epsilon=moved[3], num_iters=20)
        check(result, solve_batch(cost, a, b, epsilon, 20), cost, epsilon, a)

    def test_one_problem_without_a_batch(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(1, 9, 12))
        result, batch = sinkhorn(cost[0], a[0], b[0]), sinkhorn(cost, a, b)
        for name in ("f", "g", "transport_cost", "entropic_value", "marginal_error", "iterations", "feasible", "plan"):
            assert torch.equal(getattr(result, name), getattr(batch, name)[0]), name
        assert result.plan.shape == (9, 12) and result.converged.shape == ()
        y = torch.randn(12, 3, dtype=torch.float64, device=place.device)
        torch.testing.assert_close(result.apply(y), batch.apply(y[None])[0], rtol=1e-13, atol=1e-15)

    def test_uniform_masses_are_the_default(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 9, 12, uniform=True, dtype=torch.float32))
        expected, result = sinkhorn(cost, a, b), sinkhorn(cost)
        torch.testing.assert_close(result.plan, expected.plan, rtol=1e-4, atol=0)
        shared = sinkhorn(cost, a[0], b[:1])  # masses for the whole batch
        assert torch.equal(shared.plan, expected.plan)

    def test_half_precision_is_computed_in_float32(self, place: Place) -> None:
        cost, a, b = draw(3, 9, 12, dtype=torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            half = cost.to(place.device, dtype)
            result = sinkhorn(half, a.to(place.device), b.to(place.device))
            expected = sinkhorn(half.float(), a.to(place.device), b.to(place.device))
            assert result.f.dtype == torch.float32
            assert torch.equal(result.plan, expected.plan) and torch.equal(
                result.entropic_value, expected.entropic_value
            )

    def test_columns_are_exact_and_rows_as_good_as_said(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 33, 31))
        errors = []
        for num_iters in (1, 4, 16, 64):
            result = sinkhorn(cost, a, b, epsilon=0.05, num_iters=num_iters)
            torch.testing.assert_close(result.plan.sum(1), b, rtol=1e-12, atol=0)
            rows = (result.plan.sum(2) - a).abs().sum(1)
            torch.testing.assert_close(result.marginal_error, rows, rtol=1e-8, atol=1e-14)
            errors.append(result.marginal_error)
        for before, after in pairwise(errors):
            assert (after < before).all()

    def test_apply_is_the_plan_times_y(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 9, 12))
        y = torch.randn(3, 12, 5, dtype=torch.float64, device=place.device, requires_grad=True)
        result = sinkhorn(cost, a, b)
        torch.testing.assert_close(result.apply(y), result.plan @ y, rtol=1e-14, atol=0)
        with pytest.raises(ValueError, match=r"apply: y must have shape \[B, M, D\] with \[B, M\] = \[3, 12\]; got"):
            result.apply(y[0])

    # --- closed forms

    def test_all_mass_on_one_side_goes_everywhere(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 1, 12))
        result = sinkhorn(cost, a, b, num_iters=1)
        torch.testing.assert_close(result.plan[:, 0], b, rtol=1e-13, atol=0)
        torch.testing.assert_close(result.transport_cost, (cost[:, 0] * b).sum(1), rtol=1e-13, atol=0)
        result = sinkhorn(cost.mT, b, a, num_iters=1)
        torch.testing.assert_close(result.plan[:, :, 0], b, rtol=1e-13, atol=0)

    def test_a_constant_cost_gives_the_product_at_once(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 9, 12))
        result = sinkhorn(torch.full_like(cost, 1.7), a, b, num_iters=1)
        torch.testing.assert_close(result.plan, a.unsqueeze(2) * b.unsqueeze(1), rtol=1e-12, atol=0)
        assert (result.marginal_error < 1e-12).all()

    def test_two_by_two(self, place: Place) -> None:
        """P_11 P_22 / (P_12 P_21) = exp(-D / eps), D = C_11 + C_22 - C_12 - C_21; so P_11 = s / (2 (1 + s)), s = exp(-D / 2 eps)."""
        cost = torch.tensor([[0.2, 0.9], [0.4, 0.3]], dtype=torch.float64, device=place.device)
        plan = sinkhorn(cost, epsilon=0.3, num_iters=400).plan
        s = math.exp(0.8 / 0.6)
        assert float(plan[0, 0]) == pytest.approx(s / (2 * (1 + s)), rel=1e-12)

    @pytest.mark.parametrize("code", [pytest.param("native", marks=needs_native), "reference"])
    def test_a_large_penalty_is_no_noise(self, code: Any) -> None:
        """rho (q log(q / a) - q + a), whose terms cancel. On a CPU; a GPU rounds it to 1e-7 rho."""
        cost, a, b = draw(2, 5, 6)
        options: dict[str, Any] = {"epsilon": 0.5, "num_iters": 100, "marginal_penalty": 1e6}
        with backend.use(code):
            found = sinkhorn(cost.float(), a.float(), b.float(), **options).entropic_value
            expected = sinkhorn(cost.double(), a.double(), b.double(), **options).entropic_value
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)

    def test_a_large_epsilon_gives_the_product(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(3, 9, 12))
        result = sinkhorn(cost, a, b, epsilon=1e6)
        torch.testing.assert_close(result.plan, a.unsqueeze(2) * b.unsqueeze(1), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_small_epsilon_gives_the_permutation(self, place: Place, dtype: torch.dtype) -> None:
        order = torch.randperm(31, generator=torch.Generator().manual_seed(2))
        cost = torch.rand(31, 31, generator=torch.Generator().manual_seed(3), dtype=dtype) + 0.5
        cost[torch.arange(31), order] -= 0.5
        cost[torch.arange(31), order] *= 0.1  # the only cheap assignment
        result = sinkhorn(cost.to(place.device), epsilon=2e-3, num_iters=200)
        expected = torch.zeros(31, 31, dtype=dtype)
        expected[torch.arange(31), order] = 1 / 31
        torch.testing.assert_close(result.plan.cpu(), expected, rtol=0, atol=1e-4)

    def test_points_on_a_line_are_matched_in_order(self, place: Place) -> None:
        generator = torch.Generator().manual_seed(4)
        x, y = (torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(2))
        cost = (x.unsqueeze(1) - y).square().to(place.device)
        expected = float((x.sort().values - y.sort().values).square().mean())
        result = sinkhorn(cost, epsilon=2e-3, num_iters=1000, annealing=0.5)
        assert bool(result.converged)
        # the entropy of a plan is at most log(20) above that of a permutation; rows may be off by the marginal error
        slack = float(result.marginal_error)
        assert expected - slack <= float(result.transport_cost) <= expected + 2e-3 * math.log(20) + slack


def call(**changes: Any) -> Any:
    """sinkhorn on a right problem, with some arguments changed."""
    arguments: dict[str, Any] = {"cost": torch.ones(2, 3, 4)}
    arguments.update(changes)
    return sinkhorn(arguments.pop("cost"), **arguments)


class TestContract:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"cost": [[1.0]]}, TypeError, r"cost must be a torch.Tensor of shape \[B, N, M\] or \[N, M\]; got list"),
            (
                {"cost": torch.ones(3, 4, dtype=torch.int64)},
                TypeError,
                r"cost must be float32.*got int64 \[3, 4\].*convert it",
            ),
            ({"cost": torch.ones(3)}, ValueError, r"cost must have shape \[B, N, M\] or \[N, M\]; got float32 \[3\]"),
            ({"cost": torch.ones(2, 0, 4)}, ValueError, r"at least one row and one column; got \[2, 0, 4\]"),
            (
                {"a": torch.ones(2, 4)},
                ValueError,
                r"a must be .*shape \[B, N\] = \[2, 3\] or \[N\] = \[3\]; got float32 \[2, 4\]",
            ),
            ({"b": [1.0]}, TypeError, r"b must be .*got list"),
            ({"b": torch.ones(4, dtype=torch.int64)}, TypeError, r"b must be a floating-point tensor.*got int64"),
            (
                {"a": torch.tensor([0.5, 0.7, -0.2])},
                ValueError,
                r"a must hold finite masses, 0 or more; got one that is -0.2",
            ),
            ({"a": torch.tensor([0.5, math.nan, 0.5])}, ValueError, r"a must hold finite masses.*NaN"),
            ({"b": torch.tensor([0.5, math.inf, 0.5, 0.0])}, ValueError, r"b must hold finite masses.*inf"),
            (
                {"a": torch.tensor([[1.0, 0, 0], [1.0, 1, 0]])},
                ValueError,
                r"same total mass; problem 1 has sum\(a\) = 2 and sum\(b\) = 1; normalise them in float32 or float64, or pass",
            ),
            (  # the sum of what was normalised and then rounded to eight bits
                {"a": torch.full((3,), 1 / 3, dtype=torch.bfloat16)},
                ValueError,
                r"sum\(a\) = 1.00195 and sum\(b\) = 1; normalise them in float32 or float64, or",
            ),
            (
                {"row_mask": torch.ones(3)},
                TypeError,
                r"row_mask must be a bool tensor.*got float32.*True marks what is present",
            ),
            (
                {"column_mask": torch.ones(5, dtype=torch.bool)},
                ValueError,
                r"column_mask must be .*\[B, M\] = \[2, 4\]",
            ),
            (
                {"a": torch.ones(3, device="meta")},
                ValueError,
                r"a is on meta and the problem on cpu; pass a.to\('cpu'\)",
            ),
            ({"epsilon": 0.0}, ValueError, r"epsilon must be positive and finite; got 0.0"),
            ({"epsilon": math.nan}, ValueError, r"epsilon must be positive and finite; got nan"),
            ({"epsilon": "small"}, TypeError, r"epsilon must be a positive number or a tensor; got str"),
            ({"epsilon": 1e38}, ValueError, r"epsilon must be .*; got 1e\+38 for float32, which must hold its inverse"),
            (
                {"epsilon": torch.tensor(1e38)},
                ValueError,
                r"got \[.*e\+3[78]\] for float32, which must hold its inverse",
            ),
            ({"epsilon": torch.tensor([0.1, -0.1])}, ValueError, r"epsilon must be positive and finite; got \[0.1"),
            ({"epsilon": torch.ones(3)}, ValueError, r"one element or of shape \[B\] = \[2\]; got float32 \[3\]"),
            ({"epsilon": torch.ones((), device="meta")}, ValueError, r"epsilon is on meta and the problem on cpu"),
            ({"num_iters": 0}, ValueError, r"num_iters must be at least 1; got 0"),
            ({"num_iters": 2.0}, TypeError, r"num_iters must be an integer.*got float"),
            ({"tol": -1e-3}, ValueError, r"tol must be finite and not negative.*got -0.001"),
            ({"tol": None}, TypeError, r"tol must be a number.*got NoneType"),
            ({"gradient": "exact"}, ValueError, r"gradient must be 'unrolled', 'implicit' or 'envelope'; got 'exact'"),
            (
                {"gradient": "implicit", "marginal_penalty": 1.0},
                ValueError,
                r"'implicit' is for exact marginals only; use gradient='unrolled' or 'envelope' with marginal_penalty",
            ),
            ({"marginal_penalty": 0.0}, ValueError, r"marginal_penalty must be positive, or None.*got 0.0"),
            ({"marginal_penalty": (1.0, 2.0, 3.0)}, ValueError, r"one number or two \(rows, columns\); got 3"),
            (
                {"marginal_penalty": "much"},
                TypeError,
                r"marginal_penalty must be a positive number or a tuple of two; got str",
            ),
            ({"init": torch.zeros(2, 3)}, ValueError, r"init must be .*\[B, M\] = \[2, 4\]"),
            ({"annealing": 1.0}, ValueError, r"annealing must lie in \(0, 1\).*got 1.0"),
            ({"annealing": True}, TypeError, r"annealing must be a number in \(0, 1\) or None; got bool"),
        ],
    )
    def test_wrong_arguments_are_named(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        assert call().plan.shape == (2, 3, 4)
        with pytest.raises(error, match=f"^sinkhorn: .*{message}"):
            call(**changes)

    def test_more_memory_than_there_is(self) -> None:
        """What the unrolled gradient keeps grows with the iterations."""
        if not protokernels.backend.native_serves(torch.device("cpu")):
            pytest.skip("needs the native library")
        with pytest.raises(RuntimeError, match=r"no memory for a tensor of shape \[1, 10000000000000, 7\]"):
            sinkhorn(torch.rand(3, 4).requires_grad_(), num_iters=10**13, tol=1e-3)

    def test_inputs_are_left_as_they_were(self, place: Place) -> None:
        point = inputs(place, 3, 33, 31)
        before = [x.detach().clone() for x in point]
        result = sinkhorn(*point[:3], epsilon=point[3], init=torch.zeros_like(point[2]), annealing=0.5)
        result.plan.square().sum().backward()
        for x, copy in zip(point, before, strict=True):
            assert torch.equal(x, copy)

    def test_the_result_is_frozen_and_says_what_it_is(self, place: Place) -> None:
        result = sinkhorn(torch.ones(2, 3, 4, device=place.device))
        assert isinstance(result, protokernels.SinkhornResult)
        with pytest.raises(AttributeError):
            result.f = result.g  # type: ignore[misc]
        assert repr(result) == f"SinkhornResult(2 x 3 x 4, float32 on {result.f.device})"
        assert result.plan is result.plan


class TestDeterminism:
    @pytest.mark.parametrize(("B", "N", "M"), [(64, 49, 49), (3, 130, 151), (1, 600, 515)])
    def test_repeats_and_any_number_of_threads_agree_to_the_bit(self, place: Place, B: int, N: int, M: int) -> None:
        threads = torch.get_num_threads()
        point = inputs(place, B, N, M, torch.float32)
        results = []
        try:
            for repeat in range(6):
                # what torch's own reductions give, which the reference is made of, depends on the number of threads
                torch.set_num_threads(1 + repeat % 2 if place.backend == "native" else 1)
                results.append(everything(point))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    def test_a_problem_does_not_depend_on_its_neighbours(self, place: Place) -> None:
        if place.backend == "reference":
            pytest.skip("torch's own reductions, which the reference is made of, depend on the number of problems")
        cost, a, b, _ = inputs(place, 7, 33, 49, torch.float32)
        whole = sinkhorn(cost, a, b, num_iters=20)
        for index in (0, 3, 6):
            alone = sinkhorn(cost[index], a[index], b[index], num_iters=20)
            assert torch.equal(alone.f, whole.f[index]) and torch.equal(
                alone.entropic_value, whole.entropic_value[index]
            )

    def test_two_python_threads_do_not_disturb_each_other(self, place: Place) -> None:
        problems = [inputs(place, 8, 49, 33, torch.float32, seed=seed) for seed in (1, 2)]
        expected = [everything(problem) for problem in problems]
        mistakes: list[str] = []
        start = threading.Barrier(2)

        def work(index: int) -> None:
            start.wait()
            for _ in range(5):
                for a, b in zip(everything(problems[index]), expected[index], strict=True):
                    if not torch.equal(a, b):
                        mistakes.append(f"thread {index}")

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not mistakes


def everything(point: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    for gradient in ("unrolled", "implicit"):
        result = sinkhorn(*point[:3], epsilon=point[3], num_iters=10, gradient=gradient)
        loss = result.plan.square().sum() + result.entropic_value.sum()
        found += [result.f, result.g, result.entropic_value, result.marginal_error, result.plan]
        found += list(torch.autograd.grad(loss, point))
        if point[0].shape[1] > 200:
            break  # the reference solves its linear system densely
    return found
