# SPDX-License-Identifier: MIT
"""Invariants of the op `nearest` on random problems, drawn so that ties, outliers and cancellation are common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import backend, nearest
from python_tests.nearest_oracle import check
from python_tests.places import needs_native

METRIC = st.sampled_from(["sqeuclidean", "cosine"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    N, M, D = draw(st.integers(1, 70)), draw(st.integers(1, 300)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, bank = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, M))
    if draw(st.booleans()):  # a grid: equal distances everywhere
        queries, bank = queries.round(), bank.round()
    shift, scale = draw(st.sampled_from([0.0, 1.0, 1e3, 1e6])), draw(st.sampled_from([1e-6, 1e-2, 1.0, 1e4]))
    queries, bank = shift + scale * queries, shift + scale * bank
    if draw(st.booleans()):
        bank[:: draw(st.integers(2, 9))] *= draw(st.sampled_from([0.0, -1.0, 100.0, 1e6]))
    if draw(st.booleans()):  # queries are rows of the bank
        queries = bank[torch.randint(M, (N,), generator=generator)].clone()
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return queries.to(dtype), bank.to(dtype), draw(st.integers(1, min(M, draw(st.sampled_from([40, 300])))))


@needs_native
class TestProperties:
    @settings(max_examples=250, deadline=None)
    @given(problems(), METRIC)
    def test_exactly_the_definition(self, problem: tuple[Tensor, Tensor, int], metric: str) -> None:
        queries, bank, k = problem
        check(queries, bank, k, metric)

    @settings(max_examples=40, deadline=None)
    @given(problems(), METRIC)
    def test_the_reference_gives_the_same_bits(self, problem: tuple[Tensor, Tensor, int], metric: str) -> None:
        queries, bank, k = problem
        found = nearest(queries, bank, k, metric=metric)  # type: ignore[arg-type]
        with backend.use("reference"):
            again = nearest(queries, bank, k, metric=metric)  # type: ignore[arg-type]
        assert torch.equal(found.indices, again.indices)
        assert torch.equal(found.distances.nan_to_num(-1), again.distances.nan_to_num(-1))

    @settings(max_examples=40, deadline=None)
    @given(problems(), METRIC, st.integers(1, 5))
    def test_parts_of_the_bank_merge_into_the_whole(
        self, problem: tuple[Tensor, Tensor, int], metric: str, parts: int
    ) -> None:
        queries, bank, k = problem
        whole = nearest(queries, bank, k, metric=metric)  # type: ignore[arg-type]
        found, offset = [], 0
        for part in bank.chunk(parts):
            one = nearest(queries, part, min(k, len(part)), metric=metric)  # type: ignore[arg-type]
            found.append((one.distances, one.indices + offset))
            offset += len(part)
        distances, indices = (torch.cat(x, 1) for x in zip(*found, strict=True))
        order = distances.sort(dim=1, stable=True).indices[:, :k]
        assert torch.equal(distances.gather(1, order).nan_to_num(-1), whole.distances.nan_to_num(-1))
        if queries.dtype == torch.float64:  # rounded to float32, distances tie that do not tie in float64
            assert torch.equal(indices.gather(1, order), whole.indices)

    @settings(max_examples=40, deadline=None)
    @given(problems())
    def test_a_power_of_two_changes_nothing_but_the_scale(self, problem: tuple[Tensor, Tensor, int]) -> None:
        queries, bank, k = problem
        if queries.dtype in (torch.float16, torch.bfloat16):
            queries, bank = queries.float(), bank.float()
        found, scaled = nearest(queries, bank, k), nearest(4 * queries, 4 * bank, k)
        assert torch.equal(found.indices, scaled.indices)
        assert torch.equal((16 * found.distances).nan_to_num(-1), scaled.distances.nan_to_num(-1))

    @pytest.mark.parametrize("k", [1, 6])
    def test_a_permuted_bank_gives_permuted_indices(self, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        queries, bank = torch.randn(80, 9, generator=generator), torch.randn(500, 9, generator=generator)
        order = torch.randperm(500, generator=generator)
        assert torch.equal(order[nearest(queries, bank[order], k).indices], nearest(queries, bank, k).indices)
