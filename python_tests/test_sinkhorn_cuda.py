# SPDX-License-Identifier: MIT
"""The op `sinkhorn` on CUDA beyond its values: streams, graphs, waiting for the device, repetition; large problems."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import sinkhorn, sinkhorn_divergence, sinkhorn_features
from protokernels.nn import SinkhornAssignment
from python_tests.cuda_contract import CudaContract, need_memory, nothing_waits
from python_tests.places import needs_gpu, needs_native
from python_tests.sinkhorn_oracle import check, draw, norm_error, solve_batch

pytestmark = [pytest.mark.cuda, needs_native, needs_gpu]


def clouds(B: int, N: int, M: int, D: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(B, n, D, generator=generator) / math.sqrt(D) for n in (N, M))
    _, a, b = draw(B, N, M, seed, torch.float32)
    return x, y, a, b


class TestValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("B", "N", "M"), [(64, 49, 49), (200, 7, 12), (16, 196, 196), (3, 500, 260), (2, 1024, 1024), (1, 3000, 2100)]
    )
    def test_small_ones_on_chip_and_large_ones_streamed(self, B: int, N: int, M: int, dtype: torch.dtype) -> None:
        cost, a, b = draw(B, N, M, dtype=dtype)
        epsilon = torch.full((B,), 0.05, dtype=dtype)
        result = sinkhorn(cost.cuda(), a.cuda(), b.cuda(), epsilon=0.05, num_iters=20)
        kept = range(0, B, max(1, B // 3))
        answers = solve_batch(*(x[kept] for x in (cost, a, b, epsilon)), 20)
        part = sinkhorn(*(x[kept].cuda() for x in (cost, a, b)), epsilon=0.05, num_iters=20)
        check(part, answers, cost[kept], epsilon[kept], a[kept])
        assert torch.equal(part.f, result.f[kept]) and torch.equal(part.entropic_value, result.entropic_value[kept])

    def test_every_problem_stops_on_its_own(self) -> None:
        cost, a, b = draw(6, 700, 500)
        epsilon = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
        result = sinkhorn(cost.cuda(), a.cuda(), b.cuda(), epsilon=epsilon.cuda(), num_iters=60, tol=1e-3)
        check(result, solve_batch(cost, a, b, epsilon, 60, tol=1e-3), cost, epsilon, a)

    @pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
    @pytest.mark.parametrize(("B", "N", "M", "D"), [(2, 1000, 777, 64), (1, 4096, 4096, 33), (8, 49, 49, 512)])
    def test_features_as_on_the_cpu(self, B: int, N: int, M: int, D: int, cost: str) -> None:
        points = clouds(B, N, M, D, 0)
        found = [
            sinkhorn_features(*(t.to(device) for t in points), cost=cost, epsilon=0.1, num_iters=10)  # type: ignore[arg-type]
            for device in ("cpu", "cuda")
        ]
        torch.testing.assert_close(found[1].f.cpu(), found[0].f, rtol=0, atol=2e-5)
        torch.testing.assert_close(found[1].entropic_value.cpu(), found[0].entropic_value, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_features_of_many_tiles_stop_each_on_its_own(self, precision: str) -> None:
        """Blocks of one launch end one tile, begin another, and skip what has stopped."""
        x, y, a, b = clouds(6, 700, 1900, 64, 0)
        epsilon = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.03, 0.02])
        options: dict[str, Any] = {"num_iters": 40, "tol": 8e-3, "precision": precision}
        points = [t.cuda() for t in (x, y, a, b)]
        result = sinkhorn_features(*points, epsilon=epsilon.cuda(), **options)
        again = sinkhorn_features(*points, epsilon=epsilon.cuda(), **options)
        exact = sinkhorn_features(*(t.double() for t in points), epsilon=epsilon.double().cuda(), **options)
        assert torch.equal(result.f, again.f) and torch.equal(result.entropic_value, again.entropic_value)
        assert torch.equal(result.iterations, exact.iterations)
        error = 2e-5 if precision == "highest" else 2e-3
        torch.testing.assert_close(result.f.double(), exact.f, rtol=0, atol=error)
        torch.testing.assert_close(result.g.double(), exact.g, rtol=0, atol=error)
        torch.testing.assert_close(result.entropic_value.double(), exact.entropic_value, rtol=0, atol=error)

    def test_features_take_memory_in_proportion_to_the_points(self) -> None:
        points = tuple(t.cuda() for t in clouds(1, 16384, 16384, 64, 0))
        sinkhorn_features(*points, num_iters=2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sinkhorn_features(*points, num_iters=2)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 64e6  # the cost would take 1074 MB


class TestGradient:
    @pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
    @pytest.mark.parametrize(("B", "N", "M"), [(8, 49, 49), (3, 196, 180), (2, 600, 515)])
    def test_the_same_gradients_as_on_the_cpu(self, B: int, N: int, M: int, gradient: str) -> None:
        found = []
        for device in ("cpu", "cuda"):
            point = tuple(x.to(device).requires_grad_() for x in draw(B, N, M))
            num_iters = 200 if gradient == "implicit" else 15
            result = sinkhorn(*point, epsilon=0.2, num_iters=num_iters, gradient=gradient)  # type: ignore[arg-type]
            loss = result.entropic_value.sum()
            if gradient != "envelope":
                loss = loss + (result.plan * point[0].detach()).square().sum() * N * M
            cost, a, b = torch.autograd.grad(loss, point)
            found.append((cost, a.unsqueeze(2) + b.unsqueeze(1) if gradient == "implicit" else torch.cat([a, b], 1)))
        for a, b in zip(*found, strict=True):
            assert norm_error(b, a) < 1e-7

    @pytest.mark.parametrize("cost", ["cosine", "sqeuclidean"])
    def test_features(self, cost: str) -> None:
        found = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
            points = tuple(t.to(device, dtype).requires_grad_() for t in clouds(2, 777, 500, 33, 0))
            result = sinkhorn_features(*points, cost=cost, epsilon=0.1, num_iters=10)  # type: ignore[arg-type]
            found.append(torch.autograd.grad(result.entropic_value.sum(), points))
        for exact, double, single in zip(*found, strict=True):
            assert norm_error(double, exact) < 1e-10 and norm_error(single, exact) < 1e-4


class TestContract(CudaContract):
    """Everything on chip, one launch each way."""

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        return draw(64, 49, 49, seed, torch.float32)

    def work(self, cost: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        found = []
        for gradient in ("unrolled", "implicit", "envelope"):
            result = sinkhorn(cost, a, b, num_iters=20, gradient=gradient)  # type: ignore[arg-type]
            loss = result.entropic_value.sum()
            if gradient != "envelope":
                loss = loss + result.plan.square().sum()
            found += [result.f, result.plan, result.converged, *torch.autograd.grad(loss, (cost, a, b))]
        return found

    def test_modules_and_options_wait_for_nothing(self) -> None:
        cost, a, b = (x.cuda() for x in self.draw(0))
        mask = torch.rand(64, 49, device="cuda") < 0.7
        epsilon = torch.tensor(0.05, device="cuda")
        assign = SinkhornAssignment()

        def step() -> None:
            result = sinkhorn(cost, row_mask=mask, column_mask=mask, epsilon=epsilon, tol=1e-3, annealing=0.5)
            result.apply(cost)
            sinkhorn(cost, a, b, marginal_penalty=0.5, init=result.g)
            assign(cost[0])

        step()
        with nothing_waits():
            step()


class TestLarge(CudaContract):
    """Problems that stream, and features."""

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        return (*draw(2, 600, 515, seed, torch.float32), *clouds(2, 600, 515, 33, seed)[:2])

    def work(self, cost: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        result = sinkhorn(cost, a, b, num_iters=6, tol=1e-3)
        streamed = sinkhorn_features(x, y, a, b, num_iters=6)
        loss = result.plan.square().sum() + (streamed.entropic_value + sinkhorn_divergence(x, y, num_iters=6)).sum()
        return [result.f, result.iterations, streamed.g, *torch.autograd.grad(loss, (cost, a, b, x, y))]

    def test_more_elements_than_a_32_bit_index(self) -> None:
        need_memory(60)
        B, N = 33, 8192  # 2.2e9 pairs
        cost = torch.rand(B, N, N, device="cuda")
        whole = sinkhorn(cost, num_iters=2)
        alone = sinkhorn(cost[-1], num_iters=2)
        assert torch.equal(whole.f[-1], alone.f) and torch.equal(whole.transport_cost[-1], alone.transport_cost)


class TestDeterminism:
    def test_twenty_repeats_agree_to_the_bit(self) -> None:
        inputs = tuple(x.cuda().requires_grad_() for x in TestLarge().draw(0))
        first = TestLarge().work(*inputs)
        for _ in range(19):
            for a, b in zip(first, TestLarge().work(*inputs), strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize(("N", "M"), [(1024, 700), (1024, 1024), (300, 3000), (1100, 4097)])
    def test_all_iterations_in_one_launch_or_not_to_the_bit(self, N: int, M: int) -> None:
        """A single problem finds a place on the GPU as a whole; sixteen together do not and go iteration by iteration."""
        cost, a, b = (x.cuda() for x in draw(16, N, M, dtype=torch.float32))
        epsilon = torch.linspace(0.02, 0.3, 16, device="cuda")
        whole = sinkhorn(cost, a, b, epsilon=epsilon, num_iters=30, tol=1e-3)
        for index in (0, 7, 15):
            part = slice(index, index + 1)
            alone = sinkhorn(cost[part], a[part], b[part], epsilon=epsilon[part], num_iters=30, tol=1e-3)
            for name in ("f", "g", "transport_cost", "entropic_value", "marginal_error", "iterations"):
                assert torch.equal(getattr(alone, name), getattr(whole, name)[part]), name
        assert whole.iterations.min() < whole.iterations.max()

    def test_streamed_against_float64_where_sums_leave_their_range(self) -> None:
        """Small epsilon, tiny masses and unbalanced problems: rows and columns whose sums are made again in the log domain."""
        cost, a, b = draw(2, 700, 900, dtype=torch.float32)
        b[:, ::7] *= 1e-18
        b /= b.sum(1, keepdim=True)
        for eps, options in ((0.0005, {}), (0.05, {}), (0.02, {"marginal_penalty": (0.3, 0.2)})):
            rho = options.get("marginal_penalty", (math.inf, math.inf))
            result = sinkhorn(cost.cuda(), a.cuda(), b.cuda(), epsilon=eps, num_iters=12, **options)  # type: ignore[arg-type]
            epsilon = torch.full((2,), eps)
            check(result, solve_batch(cost, a, b, epsilon, 12, rho=rho), cost, epsilon, a)
