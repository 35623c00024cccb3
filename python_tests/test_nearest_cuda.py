# SPDX-License-Identifier: MIT
"""The op `nearest` on CUDA beyond its values: streams, graphs, no waiting for the device, real tensor cores, large problems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import _native, nearest
from protokernels.cluster import KMeans
from python_tests.cuda_contract import ELEMENTS_OF_INT32, CudaContract, need_memory
from python_tests.nearest_oracle import check, draw
from python_tests.places import needs_gpu, needs_native

pytestmark = [pytest.mark.cuda, needs_native, needs_gpu]
METRICS = ["sqeuclidean", "cosine"]


def on_gpu(N: int, M: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    queries, bank = draw(N, M, D, seed)
    return queries.cuda(), bank.cuda()


class TestValue:
    def test_the_library_holds_cuda_kernels(self) -> None:
        assert _native.build_info()["cuda_archs"], "the library in use was built without CUDA kernels"

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(
        ("N", "M", "D", "k"),
        [(3000, 10000, 32, 5), (3000, 50, 32, 1), (500, 7001, 64, 8), (300, 5000, 129, 5), (200, 3000, 600, 3), (1, 30000, 32, 5),
         (700, 6000, 16, 64), (400, 4000, 32, 20)],
    )  # fmt: skip
    def test_large_problems(self, N: int, M: int, D: int, k: int, metric: str) -> None:
        check(*on_gpu(N, M, D), k, metric)

    @pytest.mark.parametrize("D", [7, 32, 64, 200, 2048])
    def test_the_bounds_hold_where_all_terms_have_one_sign(self, D: int) -> None:
        """Sums that only grow are cut off at every step of a tensor core, always to the same side."""
        generator = torch.Generator().manual_seed(D)
        bank = torch.rand(3000, D, generator=generator) + 1
        bank[0] = -40  # the center is not the mean any more
        near = bank[:100] + 2e-3 * torch.rand(100, D, generator=generator)
        for metric in METRICS:
            check(near.cuda(), bank.cuda(), 5, metric)
        close = 1 + 1e-3 * torch.rand(3000, D, generator=generator)
        for metric in METRICS:
            check(close[:100].cuda(), close.cuda(), 5, metric)

    def test_lists_that_overflow(self) -> None:
        queries, bank = on_gpu(500, 9000, 7)
        bank[::2] = bank[0]
        queries[::3] = bank[0] + 1e-3 * queries[::3]
        for k in (1, 5, 64):
            check(queries, bank, k, "sqeuclidean")

    def test_more_neighbours_than_the_kernels_have(self) -> None:
        check(*on_gpu(50, 400, 9), 65, "sqeuclidean")

    def test_the_same_bits_as_on_the_cpu(self) -> None:
        queries, bank = draw(20000, 10000, 32)
        for metric in METRICS:
            here, there = (
                nearest(queries, bank, 5, metric=metric),
                nearest(queries.cuda(), bank.cuda(), 5, metric=metric),
            )  # type: ignore[arg-type]
            assert torch.equal(here.indices, there.indices.cpu()) and torch.equal(here.distances, there.distances.cpu())

    def test_kmeans_labels_are_nearest_centers(self) -> None:
        x = on_gpu(5000, 1, 16)[0]
        model = KMeans(20, n_init=1, random_state=0).fit(x)
        assert torch.equal(model.labels_, nearest(x, model.cluster_centers_, 1).indices[:, 0])


class TestContract(CudaContract):
    def draw(self, seed: int) -> tuple[Tensor, ...]:
        return draw(3000, 2000, 32, seed)

    def work(self, *inputs: Tensor) -> list[Tensor]:
        queries, bank = (x.detach() for x in inputs)
        results: list[Any] = [
            nearest(queries, bank, 5),
            nearest(queries[:40], bank, 64, metric="cosine"),
            nearest(queries, bank[:50], 1),
        ]
        return [tensor for result in results for tensor in (result.distances, result.indices)]


class TestDeterminism:
    def test_twenty_repeats_agree_to_the_bit(self) -> None:
        """The order of a list's candidates is no part of the result, nor is that of the queries which are left."""
        queries, bank = on_gpu(20000, 10000, 32)
        bank[::3] = bank[0]
        first = nearest(queries, bank, 5)
        for _ in range(19):
            again = nearest(queries, bank, 5)
            assert torch.equal(first.indices, again.indices) and torch.equal(first.distances, again.distances)


class TestPast2To31Elements:
    """Offsets that 32 bits do not hold; the last rows show it."""

    def test_queries(self) -> None:
        need_memory(20)
        D, bank = 128, on_gpu(1, 50, 128)[1]
        queries = torch.zeros(ELEMENTS_OF_INT32 // D + 1000, D, dtype=torch.bfloat16, device="cuda")
        queries[-500:] = bank[torch.arange(500, device="cuda") % 50].bfloat16()
        found = nearest(queries, bank, 1)
        assert torch.equal(found.indices[-500:, 0], torch.arange(500, device="cuda") % 50)

    def test_bank(self) -> None:
        need_memory(20)
        D = 128
        bank = torch.zeros(ELEMENTS_OF_INT32 // D + 1000, D, dtype=torch.bfloat16, device="cuda")
        bank[-500:] = on_gpu(1, 500, D)[1].bfloat16()
        found = nearest(bank[-100:], bank, 1)
        expected = torch.arange(len(bank) - 100, len(bank), device="cuda")
        assert torch.equal(found.indices[:, 0], expected)
