# SPDX-License-Identifier: MIT
"""A round of k-means++ (`protokernels.ops.nearest.closer_to_candidates`): distances by the definition, bit for bit; their sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels.cluster import KMeans
from protokernels.ops.nearest import closer_to_candidates
from python_tests.places import PLACES, Place, needs_native

# (N, K, D): one; rows less and more than two vectors; tiles of every number of candidates; more columns than are summed in one go; several
# chunks of rows and a remainder
SIZES = [
    (1, 1, 1),
    (5, 2, 3),
    (31, 3, 16),
    (33, 4, 31),
    (129, 5, 33),
    (64, 8, 128),
    (70, 13, 129),
    (20, 21, 300),
    (1024, 2, 5),
    (2500, 7, 9),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def draw(N: int, K: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + K + D)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.randint(N, (K,), generator=generator)
    return x, x[rows], torch.rand(N, generator=generator, dtype=torch.float64).to(dtype) * 2 * D


def defined(x: Tensor, candidates: Tensor, closest: Tensor) -> np.ndarray:
    """The definition of ops/nearest.h: column by column, each product rounded before it is added."""
    rows, centers = x.numpy(), candidates.numpy()
    total = np.zeros((len(centers), len(rows)), rows.dtype)
    for j in range(rows.shape[1]):
        difference = rows[None, :, j] - centers[:, None, j]
        total += difference * difference
    return np.minimum(closest.numpy(), total)


class TestValue:
    @pytest.mark.parametrize(("N", "K", "D"), SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_matches_float64(self, place: Place, N: int, K: int, D: int, dtype: torch.dtype) -> None:
        inputs = draw(N, K, D, dtype)
        closer, totals = closer_to_candidates(*(t.to(place.device) for t in inputs))
        expected = defined(*(t.double() for t in inputs))
        assert closer.dtype == dtype and totals.dtype == torch.float64
        rtol = (D + 4) * torch.finfo(dtype).eps
        np.testing.assert_allclose(closer.cpu().double(), expected, rtol=rtol)
        np.testing.assert_allclose(totals.cpu(), expected.sum(1), rtol=rtol)

    @needs_native
    @pytest.mark.parametrize(("N", "K", "D"), SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_kernel_gives_the_definitions_bits(self, N: int, K: int, D: int, dtype: torch.dtype) -> None:
        inputs = draw(N, K, D, dtype)
        np.testing.assert_array_equal(closer_to_candidates(*inputs)[0].numpy(), defined(*inputs))

    def test_equal_rows_are_at_zero(self, place: Place) -> None:
        """Far from the origin, where the norms and products of a matrix product would leave thousands."""
        x = (torch.randn(40, 19) + 1e6).to(place.device)
        closer, _ = closer_to_candidates(x, x[:3], x.new_full((40,), torch.inf))
        assert (closer.diagonal() == 0).all() and (closer[0, 3:] > 0).all()

    @pytest.mark.parametrize("N", [0, 6])
    def test_no_rows_or_no_candidates(self, place: Place, N: int) -> None:
        x = torch.randn(6, 3, device=place.device)
        closer, totals = closer_to_candidates(x[:N], x[: 2 if N == 0 else 0], torch.zeros(N, device=place.device))
        assert closer.numel() == 0 and not totals.any() and len(closer) == len(totals) == (2 if N == 0 else 0)

    def test_any_strides(self, place: Place) -> None:
        x, candidates, closest = (t.to(place.device) for t in draw(70, 5, 12))
        expected = closer_to_candidates(x, candidates, closest)
        strided = (x.T.contiguous().T, candidates.repeat(1, 2)[:, :12], closest.repeat_interleave(2)[::2])
        assert not any(t.is_contiguous() for t in strided)
        for a, b in zip(closer_to_candidates(*strided), expected, strict=True):
            assert torch.equal(a, b)


@needs_native
class TestContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_opcheck(self, dtype: torch.dtype) -> None:
        torch.library.opcheck(torch.ops.protokernels.nearest_seed, draw(33, 5, 7, dtype))

    @pytest.mark.parametrize(
        "arguments",
        [
            lambda: (torch.randn(4, 3), torch.randn(2, 4), torch.randn(4)),
            lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(3)),
            lambda: (torch.randn(4, 0), torch.randn(2, 0), torch.randn(4)),
            lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(4).double()),
            lambda: (torch.randn(4, 3).half(), torch.randn(2, 3).half(), torch.randn(4).half()),
        ],
    )
    def test_what_would_reach_beyond_memory_is_refused(self, arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=r"nearest_seed: x.* candidates"):
            torch.ops.protokernels.nearest_seed(*arguments())


@needs_native
class TestDeterminism:
    @pytest.mark.parametrize(("N", "K", "D"), [(9000, 7, 32), (3000, 3, 300), (50, 7, 3)])
    def test_threads(self, N: int, K: int, D: int) -> None:
        inputs, before, results = draw(N, K, D), torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(closer_to_candidates(*inputs))
        finally:
            torch.set_num_threads(before)
        for closer, totals in results[1:]:
            assert torch.equal(closer, results[0][0]) and torch.equal(totals, results[0][1])


class TestStart:
    """k-means++ on it."""

    def test_every_group_gets_a_center(self, place: Place) -> None:
        groups = torch.arange(12.0).repeat_interleave(30)[:, None] * 100
        x = (groups + torch.rand(360, 4)).to(place.device)
        model = KMeans(12, n_init=1, max_iter=1, random_state=3).fit(x)
        assert model.labels_.cpu().unflatten(0, (12, 30)).unique(dim=1).shape == (12, 1)

    def test_a_row_is_chosen_once_as_long_as_others_differ(self, place: Place) -> None:
        x = torch.tensor([[0.0], [1.0], [1e3]]).repeat(50, 1).to(place.device)
        model = KMeans(3, n_init=1, max_iter=1, random_state=0).fit(x)
        assert model.inertia_ == 0 and sorted(model.cluster_centers_.flatten().tolist()) == [0.0, 1.0, 1e3]
