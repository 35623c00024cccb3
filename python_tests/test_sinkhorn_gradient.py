# SPDX-License-Identifier: MIT
"""The three gradients of the op `sinkhorn` against complex steps through the oracle, and against each other at convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import backend, sinkhorn
from python_tests.places import PLACES, Place
from python_tests.sinkhorn_oracle import (
    Weights,
    as_numpy,
    directional,
    draw,
    gradients,
    inputs,
    log_error,
    modulo_constants,
    norm_error,
    solve,
    solve_batch,
)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestGradient:
    @pytest.mark.parametrize(("B", "N", "M"), [(1, 1, 1), (2, 3, 4), (1, 1, 5), (1, 5, 1), (2, 7, 2)])
    def test_gradcheck_unrolled(self, place: Place, B: int, N: int, M: int) -> None:
        def outputs(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
            result = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=4)
            return result.f, result.g, result.transport_cost, result.entropic_value, result.plan

        assert torch.autograd.gradcheck(outputs, inputs(place, B, N, M))

    @pytest.mark.parametrize("num_iters", [1, 2, 25])
    @pytest.mark.parametrize(("B", "N", "M"), [(2, 1, 1), (2, 15, 17), (1, 33, 31), (2, 49, 49), (1, 3, 130)])
    def test_unrolled_is_the_derivative_of_the_iterations(
        self, place: Place, B: int, N: int, M: int, num_iters: int
    ) -> None:
        point = inputs(place, B, N, M, seed=N)
        weights = Weights.draw(B, N, M)
        result = sinkhorn(*point[:3], epsilon=point[3], num_iters=num_iters)
        found = [as_numpy(g) for g in gradients(result, weights, point)]
        values = [as_numpy(x) for x in point]
        random = np.random.default_rng(1)
        for index in range(B):
            at = tuple(x[index] for x in values)

            def loss(*x: Any, index: int = index) -> Any:
                return weights.of_answer(solve(*x, num_iters), index)

            for part in range(5):  # each input alone, then all together
                direction = tuple(
                    random.standard_normal(np.shape(x)) * (part in (k, 4)) * (x if k < 3 else 1.0)
                    for k, x in enumerate(at)
                )
                expected = directional(loss, at, direction)
                terms = [g[index] * d for g, d in zip(found, direction, strict=True)]
                scale = sum(float(np.abs(t).sum()) for t in terms)
                assert abs(sum(float(t.sum()) for t in terms) - expected) <= 1e-10 * scale + 1e-12

    @pytest.mark.parametrize(("B", "N", "M"), [(2, 4, 5), (1, 1, 3), (2, 15, 17), (1, 49, 49)])
    def test_implicit_is_unrolled_at_convergence(self, place: Place, B: int, N: int, M: int) -> None:
        weights = Weights.draw(B, N, M, gauge_free=True)
        found = []
        for gradient in ("unrolled", "implicit"):
            point = inputs(place, B, N, M, seed=N)
            result = sinkhorn(*point[:3], epsilon=point[3], num_iters=400, gradient=gradient)
            assert (result.marginal_error < 1e-9).all()
            found.append(gradients(result, weights, point))
        for index in (0, 3):
            assert norm_error(found[1][index], found[0][index]) < 1e-6
        assert norm_error(modulo_constants(*found[1][1:3]), modulo_constants(*found[0][1:3])) < 1e-6

    @pytest.mark.parametrize("apart", [False, True], ids=["one component", "two components and absent entries"])
    @pytest.mark.parametrize("epsilon", [1.0, 0.0001])
    def test_implicit_for_hundreds_of_entries(self, place: Place, epsilon: float, apart: bool) -> None:
        """Beyond 256 the native CPU kernel starts with conjugate gradients and factors the matrix where these would take long, as among
        points on a line that meet their neighbours alone."""
        if place.backend == "reference":
            pytest.skip("the reference is what is compared with")
        N, M = (280, 260) if apart else (260, 280)
        cost = (
            torch.linspace(0, 1, N, dtype=torch.float64)[:, None] - torch.linspace(0, 1, M, dtype=torch.float64)
        ).square()[None]
        _, a, b = draw(1, N, M, uniform=True)
        if apart:
            cost[:, :140, 130:] = cost[:, 140:, :130] = math.inf
            a[:, 7::20], b[:, 3::60] = 0.0, 0.0
            a = a / a.sum(1, keepdim=True)
            for rows, columns in ((slice(0, 140), slice(0, 130)), (slice(140, N), slice(130, M))):
                b[:, columns] *= a[:, rows].sum(1) / b[:, columns].sum(1)
        weight = Weights.draw(1, N, M).plan
        found = []
        for backend_name, device in (("reference", torch.device("cpu")), (place.backend, place.device)):
            with backend.use(backend_name):
                leaf = cost.to(device).requires_grad_()
                result = sinkhorn(leaf, a.to(device), b.to(device), epsilon=epsilon, num_iters=50, gradient="implicit")
                plan = (result.plan * weight.to(device)).sum()
                found.append(torch.autograd.grad(plan + result.transport_cost.sum(), leaf)[0].cpu())
        assert found[1].isfinite().all()
        assert norm_error(found[1], found[0]) < 1e-6

    def test_envelope_is_the_derivative_of_the_entropic_value_at_convergence(self, place: Place) -> None:
        found = []
        for gradient in ("unrolled", "implicit", "envelope"):
            point = inputs(place, 3, 9, 12)
            result = sinkhorn(*point[:3], epsilon=point[3], num_iters=400, gradient=gradient)
            found.append(torch.autograd.grad(result.entropic_value.sum(), point))
            plan, f, g = result.plan.detach(), result.f.detach(), result.g.detach()
        for other in found[:2]:
            torch.testing.assert_close(found[2][0], other[0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found[2][3], other[3], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(
                modulo_constants(*found[2][1:3]), modulo_constants(*other[1:3]), rtol=1e-6, atol=1e-9
            )
        expected = (plan, f, g, (plan * (plan.log() - 1)).sum((1, 2)))
        for a, e in zip(found[2], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert (
            all(torch.equal(a, b) for a, b in zip(found[1][:1], found[2][:1], strict=True))
            or place.backend == "reference"
        )

    def test_through_a_softmax_the_constants_drop_out(self, place: Place) -> None:
        found = []
        for gradient in ("unrolled", "implicit", "envelope"):
            generator = torch.Generator().manual_seed(6)
            q = torch.randn(2, 21, generator=generator, dtype=torch.float64).to(place.device).requires_grad_()
            cost, _, _ = draw(2, 9, 12)
            result = sinkhorn(
                cost.to(place.device), q[:, :9].softmax(1), q[:, 9:].softmax(1), num_iters=1500, gradient=gradient
            )
            found.append(torch.autograd.grad(result.entropic_value.sum(), q)[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-9)

    def test_by_the_envelope_nothing_else_has_a_gradient(self, place: Place) -> None:
        point = inputs(place, 2, 3, 4)
        result = sinkhorn(*point[:3], epsilon=point[3], gradient="envelope")
        assert result.entropic_value.requires_grad
        for name in ("f", "g", "transport_cost", "plan", "marginal_error"):
            assert not getattr(result, name).requires_grad, name
        with pytest.raises(RuntimeError, match="does not require grad"):
            result.transport_cost.sum().backward()

    @pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
    @pytest.mark.parametrize(("B", "N", "M"), [(2, 15, 17), (4, 49, 49), (1, 129, 33)])
    def test_float32_follows_float64(self, place: Place, gradient: Any, B: int, N: int, M: int) -> None:
        weights = Weights.draw(B, N, M, gauge_free=True)
        found = []
        for dtype in (torch.float32, torch.float64):
            point = tuple(x.detach().to(dtype).requires_grad_() for x in inputs(place, B, N, M, torch.float32, seed=N))
            result = sinkhorn(*point[:3], epsilon=point[3], num_iters=60, gradient=gradient)
            if gradient == "envelope":
                found.append(torch.autograd.grad(result.entropic_value.sum(), point))
            else:
                found.append(gradients(result, weights, point))
        answers = solve_batch(*(x.detach() for x in point), 60)
        # every factor of the backward pass is a plan known to this relative error
        error = max(
            log_error(x, as_numpy(point[0][i]), float(point[3][i].detach()), torch.float32, 60)
            for i, x in enumerate(answers)
        )
        for actual, expected in zip(found[0], found[1], strict=True):
            assert actual.dtype == torch.float32 and norm_error(actual, expected) < 4 * error

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gets_gradients_of_its_type(self, place: Place, dtype: torch.dtype) -> None:
        cost, _, _ = draw(2, 9, 12, dtype=torch.float32)
        half = cost.to(place.device, dtype).requires_grad_()
        full = half.detach().float().requires_grad_()
        grads = [torch.autograd.grad(sinkhorn(x).plan.square().sum(), x)[0] for x in (half, full)]
        assert grads[0].dtype == dtype
        assert norm_error(grads[0], grads[1]) < 2 * torch.finfo(dtype).eps

    def test_the_default_gradient_is_unrolled(self, place: Place) -> None:
        found = []
        for options in ({}, {"gradient": "unrolled"}):
            point = inputs(place, 2, 9, 12)
            found.append(
                gradients(sinkhorn(*point[:3], epsilon=point[3], num_iters=5, **options), Weights.draw(2, 9, 12), point)
            )
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        "wanted", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
    )
    @pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
    def test_only_what_needs_a_gradient_gets_one(self, place: Place, gradient: Any, wanted: tuple[bool, ...]) -> None:
        everything = inputs(place, 2, 5, 6)
        some = [x.detach().clone().requires_grad_(want) for x, want in zip(everything, wanted, strict=True)]
        for point in (everything, some):
            sinkhorn(*point[:3], epsilon=point[3], num_iters=9, gradient=gradient).entropic_value.sum().backward()
        for want, full, x in zip(wanted, everything, some, strict=True):
            if want:
                assert x.grad is not None and full.grad is not None and torch.equal(x.grad, full.grad)
            else:
                assert x.grad is None

    def test_a_second_derivative_is_refused_natively_and_right_in_the_reference(self, place: Place) -> None:
        cost, a, b, _ = inputs(place, 1, 3, 4)
        if place.backend == "reference":
            assert torch.autograd.gradgradcheck(lambda c: sinkhorn(c, a, b, epsilon=0.2, num_iters=3).plan, (cost,))
            return
        (gradient,) = torch.autograd.grad(sinkhorn(cost, a, b).transport_cost.sum(), cost, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative; .*unrolled.*reference"):
            gradient.sum().backward()
