# SPDX-License-Identifier: MIT
"""`sinkhorn_features` against `sinkhorn` on the cost written out in float64, and the debiased divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import sinkhorn, sinkhorn_divergence, sinkhorn_features
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import as_numpy, draw, norm_error, solve_batch

COSTS = ["cosine", "sqeuclidean"]
EPSILONS = {"cosine": (0.3, 0.02), "sqeuclidean": (2.0, 0.3)}
# (B, N, M, D)
SIZES = [
    (1, 1, 1, 1),
    (2, 1, 5, 3),
    (2, 15, 17, 2),
    (3, 33, 31, 16),
    (2, 49, 49, 33),
    (1, 130, 151, 64),
    (1, 9, 260, 7),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def clouds(B: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """x, y, a, b; points about 1 apart whatever D is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, D, generator=generator, dtype=torch.float64) / math.sqrt(2 * D)
    y = torch.randn(B, M, D, generator=generator, dtype=torch.float64) / math.sqrt(2 * D) + 0.1
    _, a, b = draw(B, N, M, seed)
    return tuple(t.to(dtype) for t in (x, y, a, b))


def plain_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """As a reader would write it, for vectors that are not zero."""
    if cost == "cosine":
        return 1 - (x / x.norm(dim=2, keepdim=True)) @ (y / y.norm(dim=2, keepdim=True)).mT
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(3)


def on(place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(place.device).requires_grad_() for t in tensors)


def check_against_dense(place: Place, result: Any, x: Tensor, y: Tensor, dense: Any, size: float) -> None:
    """Potentials and values to what float32 or float64 knows of a cost of this size over epsilon."""
    rounding = torch.finfo(x.dtype).eps * 40 * (size + 10)
    torch.testing.assert_close(result.f.double(), dense.f, rtol=0, atol=rounding)
    torch.testing.assert_close(result.g.double(), dense.g, rtol=0, atol=rounding)
    for name in ("transport_cost", "entropic_value"):
        torch.testing.assert_close(
            getattr(result, name).double(), getattr(dense, name), rtol=20 * rounding, atol=rounding
        )
    assert torch.equal(result.iterations, dense.iterations) and torch.equal(result.feasible, dense.feasible)
    torch.testing.assert_close(
        result.marginal_error.double(), dense.marginal_error, rtol=20 * rounding, atol=20 * rounding
    )


class TestValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("cost", COSTS)
    @pytest.mark.parametrize(("B", "N", "M", "D"), SIZES)
    def test_the_oracle_agrees(
        self, place: Place, B: int, N: int, M: int, D: int, cost: Any, dtype: torch.dtype
    ) -> None:
        x, y, a, b = clouds(B, N, M, D, dtype)
        C = plain_cost(x.double(), y.double(), cost)
        for eps in EPSILONS[cost]:
            result = sinkhorn_features(
                *(t.to(place.device) for t in (x, y, a, b)), cost=cost, epsilon=eps, num_iters=15
            )
            answers = solve_batch(C, a, b, torch.full((B,), eps, dtype=dtype), 15)
            # the cost, a sum of D products, is rounded; what it is off by, potentials are off by, at most
            rounding = torch.finfo(dtype).eps * (8 + math.sqrt(D)) * 4 * (float(C.max()) + 1) * math.sqrt(30)
            for index, answer in enumerate(answers):
                np.testing.assert_allclose(as_numpy(result.f[index]), answer.f, rtol=0, atol=rounding)
                np.testing.assert_allclose(as_numpy(result.g[index]), answer.g, rtol=0, atol=rounding)
                bound = 4 * rounding / eps * (float(C.max()) + 1) + 4 * rounding
                np.testing.assert_allclose(
                    as_numpy(result.transport_cost[index]), answer.transport_cost, rtol=0, atol=bound
                )
                np.testing.assert_allclose(
                    as_numpy(result.entropic_value[index]), answer.entropic_value, rtol=0, atol=bound
                )
                np.testing.assert_allclose(
                    as_numpy(result.plan[index]), answer.plan, rtol=8 * rounding / eps, atol=1e-30
                )

    @pytest.mark.parametrize("cost", COSTS)
    def test_everything_sinkhorn_can_do(self, place: Place, cost: Any) -> None:
        x, y, a, b = (t.to(place.device) for t in clouds(3, 33, 31, 7))
        dense_cost = plain_cost(x, y, cost)
        generator = torch.Generator().manual_seed(1)
        mask = (torch.rand(3, 33, generator=generator) < 0.7).to(place.device)
        columns = (torch.rand(3, 31, generator=generator) < 0.7).to(place.device)
        start = torch.randn(3, 31, generator=generator, dtype=torch.float64).to(place.device)
        epsilon = torch.tensor([0.5, 0.1, 0.05], dtype=torch.float64, device=place.device)
        cases: list[dict[str, Any]] = [
            {"epsilon": epsilon},
            {"tol": 1e-3},
            {"marginal_penalty": (0.3, 2.0)},
            {"marginal_penalty": (math.inf, 0.5)},
            {"init": start},
        ]
        for options in cases:
            result = sinkhorn_features(x, y, a, b, cost=cost, num_iters=60, **options)
            dense = sinkhorn(dense_cost, a, b, num_iters=60, **options)
            check_against_dense(place, result, x, y, dense, 400.0)
        result = sinkhorn_features(x, y, cost=cost, row_mask=mask, column_mask=columns)
        check_against_dense(place, result, x, y, sinkhorn(dense_cost, row_mask=mask, column_mask=columns), 400.0)
        annealed = sinkhorn_features(x, y, cost=cost, epsilon=0.02, num_iters=20, annealing=0.5)
        plain = sinkhorn_features(x, y, cost=cost, epsilon=0.02, num_iters=20)
        assert (annealed.marginal_error < plain.marginal_error).all()

    @pytest.mark.parametrize("cost", COSTS)
    def test_plan_and_apply(self, place: Place, cost: Any) -> None:
        x, y, a, b = (t.to(place.device) for t in clouds(2, 33, 31, 7))
        values = torch.randn(2, 31, 3, dtype=torch.float64, device=place.device)
        dense = sinkhorn(plain_cost(x, y, cost), a, b)
        streamed = sinkhorn_features(x, y, a, b, cost=cost).apply(values)  # before the plan exists
        torch.testing.assert_close(streamed, dense.plan @ values, rtol=1e-9, atol=1e-12)
        result = sinkhorn_features(x[0], y[0], a[0], b[0], cost=cost)
        torch.testing.assert_close(result.apply(values[0]), dense.plan[0] @ values[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.plan, dense.plan[0], rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(result.apply(values[0]), streamed[0], rtol=1e-9, atol=1e-12)

    def test_apply_takes_rows_in_blocks(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        from protokernels.ops import _sinkhorn_result

        x, y, a, b = (t.to(place.device) for t in clouds(2, 33, 31, 7))
        values = torch.randn(2, 31, 3, dtype=torch.float64, device=place.device)
        whole = sinkhorn_features(x, y, a, b).apply(values)
        monkeypatch.setattr(_sinkhorn_result, "ROWS_AT_ONCE", 5 * 2 * 31)
        torch.testing.assert_close(sinkhorn_features(x, y, a, b).apply(values), whole, rtol=1e-13, atol=1e-15)

    def test_zero_vectors_are_at_cosine_zero(self, place: Place) -> None:
        x, y, _, _ = (t.to(place.device) for t in clouds(1, 5, 6, 3))
        x[0, 2], y[0, 4] = 0, 0
        unit = plain_cost(x, y, "cosine").nan_to_num(nan=1.0)
        result, dense = sinkhorn_features(x, y), sinkhorn(unit)
        torch.testing.assert_close(result.plan, dense.plan, rtol=1e-9, atol=0)
        x, y = on(place, x, y)
        for found in torch.autograd.grad(sinkhorn_features(x, y).entropic_value.sum(), (x, y)):
            assert found.isfinite().all()
        (found,) = torch.autograd.grad(sinkhorn_features(x, y).entropic_value.sum(), x)
        assert not found[0, 2].any() and found[0, 1].any()

    def test_the_longest_vectors_of_float32_have_a_direction(self) -> None:
        """1 / 2e38 is subnormal there. On a GPU vectors are squared in float32: see the limits in the README."""
        x, y, _, _ = (t.float() for t in clouds(1, 5, 6, 3))
        x, y = (torch.nn.functional.normalize(t, dim=2).requires_grad_() for t in (x, y))
        found = sinkhorn_features(x * 2e38, y, num_iters=20).entropic_value.sum()
        expected = sinkhorn_features(x, y, num_iters=20).entropic_value.sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        (grad,), (other,) = torch.autograd.grad(found, y), torch.autograd.grad(expected, y)
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("x", "y", "a", "b", "epsilon"),
        [
            ([0.6, 2.5, 4.3], [2.8, 2.5, 1.7], [0.2, 0.3, 0.5], [1.0, 1e-15, 1e-18], 0.01),
            ([3.0, 1.0], [0.0, 1.0], [1.0, 1e-20], [0.5, 0.5], 0.02),  # a scale of 1e-40 and its sum of 1e20
        ],
    )
    def test_masses_far_apart(
        self, place: Place, x: list[float], y: list[float], a: list[float], b: list[float], epsilon: float
    ) -> None:
        """Half-steps that sum scales and half-steps in logarithms take turns."""
        points = [torch.tensor(t, device=place.device).view(1, -1, 1) for t in (x, y)]
        masses = [torch.tensor(t, device=place.device).view(1, -1) for t in (a, b)]
        cost = plain_cost(points[0].double(), points[1].double(), "sqeuclidean")
        for num_iters in range(1, 9):
            result = sinkhorn_features(*points, *masses, cost="sqeuclidean", epsilon=epsilon, num_iters=num_iters)
            dense = sinkhorn(cost, masses[0].double(), masses[1].double(), epsilon=epsilon, num_iters=num_iters)
            torch.testing.assert_close(result.f.double(), dense.f, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result.g.double(), dense.g, rtol=1e-5, atol=1e-5)

    def test_half_precision_and_mixed_types(self, place: Place) -> None:
        x, y, a, b = (t.to(place.device) for t in clouds(2, 9, 12, 5, torch.float32))
        for dtype in (torch.bfloat16, torch.float16):
            half = sinkhorn_features(x.to(dtype), y.to(dtype), a, b)
            full = sinkhorn_features(x.to(dtype).float(), y.to(dtype).float(), a, b)
            assert half.f.dtype == torch.float32 and torch.equal(half.entropic_value, full.entropic_value)
            leaf = x.to(dtype).requires_grad_()
            (found,) = torch.autograd.grad(sinkhorn_features(leaf, y, a, b).entropic_value.sum(), leaf)
            assert found.dtype == dtype and found.isfinite().all()
        assert sinkhorn_features(x, y.double(), a, b).f.dtype == torch.float64


class TestPrecision:
    @pytest.mark.parametrize("cost", COSTS)
    @pytest.mark.parametrize(("B", "N", "M", "D"), [(2, 33, 31, 3), (3, 300, 270, 64), (1, 130, 600, 100)])
    def test_what_it_costs(self, place: Place, B: int, N: int, M: int, D: int, cost: Any) -> None:
        x, y, a, b = clouds(B, N, M, D, torch.float32)
        points = tuple(t.to(place.device) for t in (x, y, a, b))
        dense = sinkhorn(plain_cost(x.double(), y.double(), cost), a, b, epsilon=0.1, num_iters=20)
        exact = sinkhorn_features(*points, cost=cost, epsilon=0.1, num_iters=20)
        for precision in ("highest", "high", "medium"):
            result = sinkhorn_features(*points, cost=cost, epsilon=0.1, num_iters=20, precision=precision)  # type: ignore[arg-type]
            if place.device == "cpu" or precision == "highest":
                assert torch.equal(result.f, exact.f) and torch.equal(result.entropic_value, exact.entropic_value)
            # 2^-11 |x| |y| / sqrt(D) is what a cost is off by: 3e-4 at most here
            torch.testing.assert_close(result.f.cpu().double(), dense.f, rtol=0, atol=1e-3)
            torch.testing.assert_close(result.g.cpu().double(), dense.g, rtol=0, atol=1e-3)
            torch.testing.assert_close(result.transport_cost.cpu().double(), dense.transport_cost, rtol=0, atol=1e-3)
            torch.testing.assert_close(result.marginal_error.cpu().double(), dense.marginal_error, rtol=0, atol=5e-3)
            # the last half-step is of full precision: columns are exact whatever came before
            torch.testing.assert_close(result.plan.sum(1), points[3], rtol=1e-4, atol=1e-7)

    def test_of_a_divergence(self, place: Place) -> None:
        x, y, _, _ = (t.to(place.device) for t in clouds(2, 200, 170, 64, torch.float32))
        exact, fast = (sinkhorn_divergence(x, y, epsilon=0.3, precision=name) for name in ("highest", "high"))
        torch.testing.assert_close(fast, exact, rtol=0, atol=1e-3)


class TestGradient:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("cost", COSTS)
    @pytest.mark.parametrize(("B", "N", "M", "D"), SIZES)
    def test_the_envelope_through_the_cost(
        self, place: Place, B: int, N: int, M: int, D: int, cost: Any, dtype: torch.dtype
    ) -> None:
        eps = EPSILONS[cost][0]
        found = []
        for kind in (dtype, torch.float64):
            x, y, a, b = on(place, *(t.to(kind) for t in clouds(B, N, M, D, dtype)))
            epsilon = torch.full((B,), eps, dtype=kind, device=place.device, requires_grad=True)
            if not found:
                result = sinkhorn_features(x, y, a, b, cost=cost, epsilon=epsilon, num_iters=20)
            else:
                result = sinkhorn(plain_cost(x, y, cost), a, b, epsilon=epsilon, num_iters=20, gradient="envelope")
            weights = torch.linspace(1, 2, B, dtype=kind, device=place.device)
            found.append(torch.autograd.grad((result.entropic_value * weights).sum(), (x, y, a, b, epsilon)))
        size = 5.0 / eps + math.sqrt(D) + 20
        for name, actual, expected in zip(("x", "y", "a", "b", "epsilon"), *found, strict=True):
            assert actual.dtype == dtype
            # D = 1: the direction of a number has no derivative, and the rest cancels
            if float(expected.norm()) < 1e-12:
                assert float(actual.norm()) < 1e-5 if dtype == torch.float32 else 1e-12, name
            else:
                assert norm_error(actual, expected) < 30 * size * torch.finfo(dtype).eps, name

    @pytest.mark.parametrize("cost", COSTS)
    def test_a_plan_from_features_has_no_gradient(self, place: Place, cost: Any) -> None:
        x, y, a, b = on(place, *clouds(1, 5, 6, 3))
        result = sinkhorn_features(x, y, a, b, cost=cost)
        for name in ("f", "g", "transport_cost", "plan"):
            assert not getattr(result, name).requires_grad
        values = torch.randn(1, 6, 2, dtype=torch.float64, device=place.device, requires_grad=True)
        sinkhorn_features(x, y, a, b, cost=cost).apply(values).sum().backward()
        assert values.grad is not None and x.grad is None

    def test_gradients_of_other_kinds_are_refused(self) -> None:
        x, y, _, _ = clouds(1, 5, 6, 3)
        for gradient in ("unrolled", "implicit"):
            with pytest.raises(ValueError, match=r"^sinkhorn_features: gradient must be 'envelope'.*build the cost"):
                sinkhorn_features(x, y, gradient=gradient)  # type: ignore[arg-type]


class TestDivergence:
    @pytest.mark.parametrize("cost", COSTS)
    def test_equal_clouds_are_nothing_apart(self, place: Place, cost: Any) -> None:
        for dtype in (torch.float32, torch.float64):
            x, _, a, _ = on(place, *clouds(3, 33, 31, 7, dtype))
            value = sinkhorn_divergence(x, x, a, a, cost=cost, epsilon=0.1)
            assert value.shape == (3,) and (value == 0).all()
            (found,) = torch.autograd.grad(value.sum(), x)
            assert found.abs().max() < 100 * torch.finfo(dtype).eps
        y = x.detach().clone()
        value = sinkhorn_divergence(x, y, a, a, cost=cost, epsilon=0.1, num_iters=3000)
        assert (value.abs() < 1e-12).all()
        (found,) = torch.autograd.grad(value.sum(), x)
        assert found.abs().max() < 1e-7  # the smallest value there is

    @pytest.mark.parametrize("cost", COSTS)
    def test_other_clouds_are_apart(self, place: Place, cost: Any) -> None:
        x, y, a, b = (t.to(place.device) for t in clouds(3, 33, 31, 7))
        values = [
            sinkhorn_divergence(x, y + shift, a, b, cost=cost, epsilon=0.1, num_iters=300) for shift in (0.0, 0.5, 1.0)
        ]
        assert (values[0] > 0).all() and (values[1] > values[0]).all() and (values[2] > values[1]).all()
        other = sinkhorn_divergence(y, x, b, a, cost=cost, epsilon=0.1, num_iters=300)
        torch.testing.assert_close(other, values[0], rtol=1e-6, atol=1e-9)

    def test_a_shift_is_its_square(self, place: Place) -> None:
        """For the squared distance S(x, x + d) = |d|^2 at any epsilon: the shift separates from the rest."""
        x = clouds(2, 33, 31, 3)[0].to(place.device)
        shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64, device=place.device)
        value = sinkhorn_divergence(x, x + shift, epsilon=0.2, num_iters=3000)
        torch.testing.assert_close(value, torch.full_like(value, 0.09 + 0.16 + 1.44), rtol=1e-9, atol=0)

    def test_gaussians(self, place: Place) -> None:
        """On a fine grid the debiased value of two normal distributions is known (Janati et al., NeurIPS 2020)."""
        grid = torch.linspace(-14, 14, 251, dtype=torch.float64, device=place.device)
        s1, s2, mean, eps = 1.0, 1.6, 0.7, 0.5

        def mass(m: float, s: float) -> Tensor:
            return torch.softmax(-((grid - m) ** 2) / (2 * s * s), 0)

        def gap(p: float, q: float) -> float:
            """OT between centred normals of variances p and q, up to what cancels."""
            root = math.sqrt(4 * p * q + eps**2 / 4)
            return p + q - root + eps / 2 * math.log(root / eps + 0.5)

        expected = mean**2 + gap(s1**2, s2**2) - (gap(s1**2, s1**2) + gap(s2**2, s2**2)) / 2
        value = sinkhorn_divergence(
            grid[:, None], grid[:, None], mass(0.0, s1), mass(mean, s2), epsilon=eps, num_iters=600
        )
        assert float(value) == pytest.approx(expected, rel=1e-5)

    def test_gradients_are_finite_differences(self, place: Place) -> None:
        x, y, a, b = on(place, *clouds(1, 4, 3, 2))

        def value(x: Tensor, y: Tensor, qa: Tensor, qb: Tensor) -> Tensor:
            return sinkhorn_divergence(x, y, qa.softmax(1), qb.softmax(1), epsilon=0.5, num_iters=100)

        assert torch.autograd.gradcheck(value, (x, y, a, b), rtol=1e-5, atol=1e-8)

    def test_one_pair_and_masks(self, place: Place) -> None:
        x, y, _, _ = (t.to(place.device) for t in clouds(2, 9, 8, 3))
        rows = torch.arange(9, device=place.device) < 6
        columns = torch.arange(8, device=place.device) < 7
        masked = sinkhorn_divergence(x, y, row_mask=rows, column_mask=columns)
        cut = sinkhorn_divergence(x[:, :6], y[:, :7])
        torch.testing.assert_close(masked, cut, rtol=1e-9, atol=1e-12)
        one = sinkhorn_divergence(x[0], y[0])
        assert one.shape == () and torch.allclose(one, sinkhorn_divergence(x, y)[0], rtol=1e-12)


class TestContract:
    @pytest.mark.parametrize("function", [sinkhorn_features, sinkhorn_divergence])
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"x": [[1.0]]}, TypeError, r"x must be a torch.Tensor of shape \[B, N, D\] or \[N, D\]; got list"),
            ({"y": torch.ones(2, 4, 3, dtype=torch.int64)}, TypeError, r"y must be float32.*got int64"),
            ({"y": torch.ones(2, 4, 5)}, ValueError, r"must share B and D; got \[2, 3, 3\] and \[2, 4, 5\]"),
            ({"y": torch.ones(4, 3)}, ValueError, r"must share B and D"),
            ({"y": torch.ones(1, 4, 3)}, ValueError, r"must share B and D"),
            ({"y": torch.ones(2, 0, 3)}, ValueError, r"at least one vector of at least one dimension.*\[2, 0, 3\]"),
            ({"y": torch.ones(2, 4, 3, device="meta")}, ValueError, r"x is on cpu and y on meta; move one"),
            ({"cost": "l1"}, ValueError, r"cost must be 'cosine' or 'sqeuclidean'; got 'l1'"),
            ({"epsilon": -1.0}, ValueError, r"epsilon must be positive and finite; got -1.0"),
            ({"precision": "low"}, ValueError, r"precision must be one of"),
            ({"a": torch.ones(3)}, ValueError, r"same total mass"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, function: Any, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        arguments: dict[str, Any] = {"x": torch.ones(2, 3, 3), "y": torch.ones(2, 4, 3), **changes}
        with pytest.raises(error, match=f"^{function.__name__}: .*{message}"):
            function(arguments.pop("x"), arguments.pop("y"), **arguments)

    def test_no_clouds(self, place: Place) -> None:
        x = torch.empty(0, 3, 5, device=place.device, requires_grad=True)
        y = torch.empty(0, 4, 5, device=place.device)
        result = sinkhorn_features(x, y)
        assert result.f.shape == (0, 3) and result.plan.shape == (0, 3, 4)
        (result.entropic_value.sum() + sinkhorn_divergence(x, y).sum()).backward()
        assert x.grad is not None and x.grad.shape == (0, 3, 5)

    def test_any_strides(self, place: Place) -> None:
        x, y, a, b = (t.to(place.device) for t in clouds(2, 33, 31, 7, torch.float32))
        expected = sinkhorn_features(x, y, a, b)
        result = sinkhorn_features(x.mT.contiguous().mT, y.transpose(0, 1).contiguous().transpose(0, 1), a, b)
        assert torch.equal(result.f, expected.f) and torch.equal(result.entropic_value, expected.entropic_value)

    def test_nan_stays_in_its_problem(self, place: Place) -> None:
        x, y, a, b = clouds(4, 33, 31, 7, torch.float32)
        clean = sinkhorn_features(*(t.to(place.device) for t in (x, y, a, b)))
        x[2, 5, 3] = math.nan
        points = on(place, x, y, a, b)
        result = sinkhorn_features(*points)
        good = [0, 1, 3]
        assert result.entropic_value[2].isnan()
        torch.testing.assert_close(result.f[good], clean.f[good], rtol=1e-6, atol=1e-7)
        for found in torch.autograd.grad(result.entropic_value.sum(), points):
            assert found[good].isfinite().all()


class TestDeterminism:
    @pytest.mark.parametrize("cost", COSTS)
    @pytest.mark.parametrize(("B", "N", "M", "D"), [(9, 49, 33, 16), (1, 700, 530, 33)])
    def test_repeats_and_any_number_of_threads_agree_to_the_bit(
        self, place: Place, B: int, N: int, M: int, D: int, cost: Any
    ) -> None:
        threads = torch.get_num_threads()
        points = on(place, *clouds(B, N, M, D, torch.float32))
        results = []
        try:
            for repeat in range(4):
                torch.set_num_threads(1 + repeat % 2 if place.backend == "native" else 1)
                result = sinkhorn_features(*points, cost=cost, num_iters=5)
                found = torch.autograd.grad(result.entropic_value.sum(), points)
                results.append([result.f, result.g, result.entropic_value, result.marginal_error, *found])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for p, q in zip(results[0], other, strict=True):
                assert torch.equal(p, q)
