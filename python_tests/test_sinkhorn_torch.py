# SPDX-License-Identifier: MIT
"""The op `sinkhorn` under torch's machinery: opcheck, compile, export, autocast; and under every CPU instruction set."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from protokernels import SinkhornResult, sinkhorn, sinkhorn_divergence, sinkhorn_features
from python_tests.cpu_levels import AtEveryLevel
from python_tests.places import NATIVE_PLACES, PLACES, Place, needs_native
from python_tests.sinkhorn_oracle import draw

DTYPES = [torch.float32, torch.float64]
OPS = torch.ops.protokernels


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def arguments(place: Place, dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
    """cost, a, b and epsilon, with a forbidden pair and an absent row."""
    cost, a, b = draw(2, 9, 12, dtype=dtype)
    cost[0, 3, 4] = math.inf
    a[1, 0] += a[1, 2]
    a[1, 2] = 0
    epsilon = torch.tensor([0.1, 0.2], dtype=dtype)
    return tuple(x.to(place.device).requires_grad_(grad) for x in (cost, a, b, epsilon))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 1, 1), (3, 2, 31), (2, 33, 129)])
def test_masses_that_fit(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """One pass of the operator lets pass what is finite, not negative and, if balanced, of equal totals, and nothing else."""
    B, N, M = sizes
    a, b = (torch.rand(B, n, dtype=dtype).add(0.1) for n in (N, M))
    a[:, 0] = 0.0 if N > 1 else a[:, 0]
    b *= a.sum(1, keepdim=True) / b.sum(1, keepdim=True)
    fit = OPS.sinkhorn_masses_fit
    assert fit(a, b, True) and fit(a.double(), b.double(), True)
    for problem in range(B):
        for mass in (a, b):
            for place in (0, mass.shape[1] // 2, mass.shape[1] - 1):
                for wrong in (-1e-30, -math.inf, math.inf, math.nan):
                    kept, mass[problem, place] = mass[problem, place].clone(), wrong
                    assert not fit(a, b, True) and not fit(a, b, False), (problem, place, wrong)
                    mass[problem, place] = kept
        heavier = b.clone()
        heavier[problem] *= 1.0002
        assert fit(a, heavier, False) and not fit(a, heavier, True) and not fit(heavier, a, True)
        heavier[problem] = b[problem] * 1.00005
        assert fit(a, heavier, True)


@pytest.mark.parametrize("place", NATIVE_PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
class TestOpcheck:
    @pytest.mark.parametrize("history", [False, True])
    def test_forward(self, place: Place, dtype: torch.dtype, history: bool) -> None:
        point = arguments(place, dtype, grad=True)
        start = torch.zeros(2, 12, dtype=dtype, device=place.device)
        # potentials of absent rows are -inf: only what is finite goes through the comparison of gradients
        whole = [x.detach()[:1].clone() for x in point]
        whole[0][0, 3, 4] = 0.5
        leaves = [x.requires_grad_() for x in whole]
        torch.library.opcheck(OPS.sinkhorn_forward, (*leaves, None, 3, 0.0, math.inf, math.inf, history))
        if history:
            torch.library.opcheck(OPS.sinkhorn_forward, (*leaves, start[:1], 2, 0.0, 0.5, math.inf, True))
        detached = [x.detach() for x in point]
        torch.library.opcheck(OPS.sinkhorn_forward, (*detached, start, 3, 0.0, 0.5, 2.0, history))

    @pytest.mark.parametrize("implicit", [False, True])
    def test_backward(self, place: Place, dtype: torch.dtype, implicit: bool) -> None:
        point = arguments(place, dtype, grad=False)
        f, g, value, _, _, iterations, _, history = OPS.sinkhorn_forward(
            *point, None, 3, 0.0, math.inf, math.inf, not implicit
        )
        grads = (torch.randn_like(f), None, torch.randn_like(value), torch.randn_like(value))
        torch.library.opcheck(
            OPS.sinkhorn_backward, (*point, None, f, g, iterations, history, *grads, implicit, math.inf, math.inf)
        )

    def test_plan_and_envelope(self, place: Place, dtype: torch.dtype) -> None:
        cost, a, b, epsilon = arguments(place, dtype, grad=False)
        f, g, value, *_ = OPS.sinkhorn_forward(cost, a, b, epsilon, None, 3, 0.0, math.inf, math.inf, False)
        plan = OPS.sinkhorn_plan(cost, f, g, epsilon)
        torch.library.opcheck(OPS.sinkhorn_plan, (cost, f, g, epsilon))
        leaves = [x[:1].clone() for x in (cost, f, g, epsilon)]
        leaves[0][0, 3, 4] = 0.5
        torch.library.opcheck(OPS.sinkhorn_plan, tuple(x.requires_grad_() for x in leaves))
        torch.library.opcheck(OPS.sinkhorn_plan_backward, (torch.randn_like(plan), plan, cost, f, g, epsilon))
        torch.library.opcheck(OPS.sinkhorn_envelope_backward, (cost, f, g, epsilon, torch.randn_like(value)))

    @pytest.mark.parametrize("cosine", [False, True])
    def test_features(self, place: Place, dtype: torch.dtype, cosine: bool) -> None:
        _, a, b, epsilon = arguments(place, dtype, grad=True)
        a = a.detach()[:1].expand(2, 9).clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        x, y = (
            torch.randn(2, n, 5, generator=generator, dtype=torch.float64).to(place.device, dtype).requires_grad_()
            for n in (9, 12)
        )
        options = (None, cosine, 3, 0.0, math.inf, math.inf, 1)
        torch.library.opcheck(OPS.sinkhorn_features_forward, (x, y, a, b, epsilon, *options))
        x, y, a, b, epsilon = (t.detach() for t in (x, y, a, b, epsilon))
        f, g, _, value, *_ = OPS.sinkhorn_features_forward(x, y, a, b, epsilon, *options)
        for grad in (torch.randn_like(value), None):
            torch.library.opcheck(OPS.sinkhorn_features_backward, (x, y, f, g, epsilon, grad, cosine))


class TestContract:
    @pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
    def test_compile_without_graph_breaks(self, place: Place, gradient: Any) -> None:
        # the reference is traced through every iteration, which takes the compiler seconds each
        options: dict[str, Any] = (
            {"num_iters": 1} if place.backend == "reference" else {"num_iters": 2, "annealing": 0.03}
        )

        def step(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
            result = sinkhorn(2 * cost, a.softmax(1), b.softmax(1), epsilon=epsilon, gradient=gradient, **options)
            loss = result.entropic_value.sum()
            if gradient != "envelope":
                loss = loss + result.plan.square().sum() + result.transport_cost.sum()
            return loss, result.f, result.iterations, result.converged, result.apply(cost.mT)

        self._compare(step, place, "aot_eager")

    def test_compile_features(self, place: Place) -> None:
        def step(x: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
            y = 2 * x.flip(1)[:, :, :5] + 1
            options: dict[str, Any] = {"epsilon": epsilon, "num_iters": 1}
            result = sinkhorn_features(x[:, :, :5], y, a.softmax(1), None, **options)
            apart = sinkhorn_divergence(x[:, :, :5], y, cost="cosine", **options)
            return (result.entropic_value + apart).sum(), result.f, b.detach()

        self._compare(step, place, "aot_eager")

    @needs_native
    @pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
    )
    def test_compile_with_inductor(self) -> None:
        def step(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
            result = sinkhorn(cost.tanh(), a.softmax(1), b.softmax(1), epsilon=epsilon, num_iters=4)
            return result.plan.square().sum(), result.f

        self._compare(step, Place("cpu", "native"), "inductor")

    @staticmethod
    def _compare(function: Any, place: Place, compiler: str) -> None:
        """Values and gradients of the compiled function equal those of the function."""
        torch.compiler.reset()
        results = []
        for run in (function, torch.compile(function, fullgraph=True, backend=compiler)):
            cost, a, b = (x.to(place.device).requires_grad_() for x in draw(3, 9, 12, dtype=torch.float32))
            epsilon = torch.tensor(0.2, device=place.device, requires_grad=True)
            loss, *rest = run(cost, a, b, epsilon)
            grads = torch.autograd.grad(loss, (cost, a, b, epsilon), allow_unused=True)
            results.append([loss, *rest, *(g for g in grads if g is not None)])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_compile_for_any_size(self, place: Place) -> None:
        torch.compiler.reset()
        compiled = torch.compile(
            lambda cost: sinkhorn(cost, num_iters=1).plan, fullgraph=True, backend="aot_eager", dynamic=True
        )
        for B, N, M in ((2, 9, 12), (3, 33, 31), (5, 7, 130)):
            cost = draw(B, N, M, dtype=torch.float32)[0].to(place.device)
            torch.testing.assert_close(compiled(cost), sinkhorn(cost, num_iters=1).plan, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_compile_with_a_mask_that_comes_with_another_batch(self, place: Place) -> None:
        """Then torch knows the batch of the costs as a symbol, that of the mask as a number."""
        torch.compiler.reset()

        def values(cost: Tensor, mask: Tensor | None) -> Tensor:
            return sinkhorn(cost, row_mask=mask, num_iters=2).transport_cost

        compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
        with place.selected():
            for B, masked in ((4, False), (3, True), (2, True), (5, False), (1, True)):
                cost = draw(B, 9, 12, dtype=torch.float32)[0].to(place.device)
                mask = torch.arange(9, device=place.device).expand(B, 9) < 7 if masked else None
                torch.testing.assert_close(compiled(cost, mask), values(cost, mask), rtol=1e-5, atol=1e-6)
            with pytest.raises(Exception, match=r"row_mask must be a bool tensor of shape \[B, N\] = \[5, 9\]"):
                compiled(draw(5, 9, 12, dtype=torch.float32)[0].to(place.device), mask.new_ones(3, 9))

    def test_a_result_may_leave_the_compiled_function(self, place: Place) -> None:
        torch.compiler.reset()
        cost = draw(2, 9, 12, dtype=torch.float32)[0].to(place.device)
        compiled = torch.compile(lambda cost: sinkhorn(cost, num_iters=2), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(cost).plan, sinkhorn(cost, num_iters=2).plan, rtol=1e-5, atol=1e-8)

    def test_fake_tensors_have_no_values_to_look_at(self, place: Place) -> None:
        with FakeTensorMode():
            cost, a, b = (torch.rand(shape, device=place.device) for shape in ((4, 5, 6), (4, 5), (4, 6)))
            result = sinkhorn(cost, a, b, epsilon=a[:, 0], num_iters=2)
            assert result.plan.shape == (4, 5, 6) and result.entropic_value.shape == (4,)
            masked = sinkhorn(cost, a, row_mask=a > 0.5, num_iters=2)
            assert masked.f.shape == (4, 5)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
    def test_a_trace_does_not_look_at_values(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(2, 9, 12, dtype=torch.float32))
        traced = torch.jit.trace(lambda *problem: sinkhorn(*problem, num_iters=2).f, (cost, a, b))
        torch.testing.assert_close(
            traced(2 * cost, a, b), sinkhorn(2 * cost, a, b, num_iters=2).f, rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("features", [False, True])
    def test_a_result_of_compiled_code_outlives_what_was_solved(self, place: Place, features: bool) -> None:
        """As after an optimiser's step; uncompiled, to read the plan then is an error."""
        torch.compiler.reset()

        def solve(cost: Tensor, a: Tensor) -> SinkhornResult:
            if features:
                return sinkhorn_features(cost, cost.flip(1), a, num_iters=2)
            return sinkhorn(cost, a, num_iters=2)

        cost = draw(2, 9, 12, dtype=torch.float32)[0].to(place.device)
        a = torch.full((2, 9), 1 / 9, device=place.device)
        expected, result = solve(cost, a), torch.compile(solve, fullgraph=True, backend="aot_eager")(cost, a)
        plan, converged = expected.plan, expected.converged
        cost.mul_(2)
        a.mul_(1e6)
        torch.testing.assert_close(result.plan, plan, rtol=1e-5, atol=1e-8)
        assert torch.equal(result.converged, converged)

    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        class Matcher(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                result = sinkhorn(1 - x @ y.mT, num_iters=2, tol=1e-3)
                streamed = sinkhorn_features(x, y, num_iters=2)
                return result.plan, result.converged, streamed.entropic_value

        x, y = torch.rand(2, 9, 5, device=place.device), torch.rand(2, 7, 5, device=place.device)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(Matcher(), (x, y), dynamic_shapes=({0: batch}, {0: batch}))
        x, y = torch.rand(6, 9, 5, device=place.device), torch.rand(6, 7, 5, device=place.device)
        for a, b in zip(exported.module()(x, y), Matcher()(x, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        if place.backend == "native":
            assert "protokernels.sinkhorn_forward" in exported.graph_module.code

    def test_autocast(self, place: Place) -> None:
        cost, a, b = (x.to(place.device) for x in draw(2, 9, 12, dtype=torch.float32))
        points = torch.randn(2, 12, 5, device=place.device)
        linear = nn.Linear(12, 12).to(place.device)
        with torch.autocast(place.device, torch.bfloat16):
            half = linear(cost)
            assert half.dtype == torch.bfloat16
            result = sinkhorn(half, a, b, num_iters=9)
            moved = result.apply(points)
        # what came in is half precision; everything after it is computed and returned in float32
        assert result.plan.dtype == moved.dtype == torch.float32
        assert torch.equal(result.plan, sinkhorn(half.float(), a, b, num_iters=9).plan)
        torch.testing.assert_close(moved, result.plan @ points)
        result.transport_cost.sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.isfinite().all() and linear.weight.grad.any()

    def test_no_gradient_is_recorded_where_none_is_wanted(self, place: Place) -> None:
        cost = draw(2, 9, 12)[0].to(place.device).requires_grad_()
        with torch.no_grad():
            result = sinkhorn(cost)
        assert not (result.f.requires_grad or result.plan.requires_grad)
        result = sinkhorn(cost)
        with torch.no_grad():
            assert not result.plan.requires_grad
        assert result.plan.requires_grad
        with torch.inference_mode():
            other = sinkhorn(cost)
            torch.testing.assert_close(other.plan, result.plan.detach())


class TestInstructionSets(AtEveryLevel):
    """Values, gradients and edges."""

    FILES = ("test_sinkhorn", "test_sinkhorn_gradient", "test_sinkhorn_edges", "test_sinkhorn_features")
    SECONDS = 600
