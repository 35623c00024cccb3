# SPDX-License-Identifier: MIT
"""The CUDA kernels of `nearest`, run on the CPU by the emulator: indices and distances bit for bit as defined.

Cases run under several seeds (orders of threads and blocks) with memory watched: a missing barrier, a race, a read before a
write or an access out of bounds fails here without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .emulator.build import SEEDS, load, missing_tools, poisoned
from .nearest_oracle import draw, expected

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

KINDS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in KINDS.items()}
METRICS = ["sqeuclidean", "cosine"]

# (N, M, D, k): one of each; a tile of queries and a chunk of the bank, less and more by one; two blocks of dimensions in registers, several
# slices of more; all rows of the bank; k where selection leaves the registers, and the largest
SIZES = [
    (1, 1, 1, 1), (1, 2, 3, 2), (5, 50, 31, 1), (31, 127, 2, 5), (33, 129, 33, 5), (32, 128, 64, 8), (9, 257, 129, 9),
    (35, 150, 300, 3), (40, 300, 8, 64), (33, 33, 5, 33), (3, 64, 7, 64),
]  # fmt: skip


def as_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def run(
    emulator: Any, queries: Tensor, bank: Tensor, k: int, metric: str, D: int | None = None
) -> tuple[Any, Any, int]:
    """Distances, indices, and how many queries the filter could not decide. Columns from D on are a gap between rows."""
    wide = torch.float64 in (queries.dtype, bank.dtype)
    distances = poisoned((len(queries), k), np.float64 if wide else np.float32)
    indices = poisoned((len(queries), k), np.int64)
    search = getattr(emulator, f"search_{NAMES[queries.dtype]}_{NAMES[bank.dtype]}")
    columns = queries.shape[1] if D is None else D
    left = search(as_numpy(queries), as_numpy(bank), columns, k, metric == "cosine", distances, indices)
    return distances, indices, left


def check(emulator: Any, queries: Tensor, bank: Tensor, k: int, metric: str, D: int | None = None) -> int:
    distances, indices, left = run(emulator, queries, bank, k, metric, D)
    values, order = expected(queries[:, :D], bank[:, :D], k, metric)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(distances, values)
    return left


@pytest.fixture
def emulator() -> Any:
    module = load("nearest")
    module.configure(seed=1)
    return module


class TestValue:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_every_size(self, emulator: Any, size: tuple[int, int, int, int], metric: str) -> None:
        N, M, D, k = size
        queries, bank = draw(N, M, D, seed=N + M + D)
        for seed in SEEDS[:2]:
            emulator.configure(seed=seed)
            check(emulator, queries, bank, k, metric)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("k", [1, 5, 20])
    def test_every_seed(self, emulator: Any, k: int, metric: str) -> None:
        queries, bank = draw(45, 200, 11, seed=k)
        for seed in SEEDS:
            emulator.configure(seed=seed)
            check(emulator, queries, bank, k, metric)

    @pytest.mark.parametrize("bank_kind", list(KINDS))
    @pytest.mark.parametrize("query_kind", list(KINDS))
    def test_every_pair_of_types(self, emulator: Any, query_kind: str, bank_kind: str) -> None:
        queries, bank = draw(17, 90, 12, seed=3)
        for metric in METRICS:
            check(emulator, queries.to(KINDS[query_kind]), bank.to(KINDS[bank_kind]), 3, metric)

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_rows_with_gaps_between_them(self, emulator: Any, kind: str) -> None:
        for gap, offset in ((3, 0), (4, 1)):
            emulator.configure(seed=2, element_offset=offset)
            try:
                queries, bank = (x.to(KINDS[kind]) for x in draw(17, 140, 20 + gap, seed=4))
                check(emulator, queries, bank, 3, "sqeuclidean", D=20)
                check(emulator, queries, bank, 3, "cosine", D=20)
            finally:
                emulator.configure(seed=1)

    @pytest.mark.parametrize("metric", METRICS)
    def test_several_blocks_of_queries(self, emulator: Any, metric: str) -> None:
        check(emulator, *draw(300, 700, 32, seed=5), 5, metric)

    @pytest.mark.parametrize(("N", "M", "D", "k"), [(3, 4100, 16, 5), (40, 3000, 40, 1), (2, 3000, 70, 64)])
    def test_parts_of_the_bank_are_merged(self, emulator: Any, N: int, M: int, D: int, k: int) -> None:
        for metric in METRICS:
            check(emulator, *draw(N, M, D, seed=6), k, metric)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("k", [1, 5, 12])
    def test_a_bank_sorted_by_distance(self, emulator: Any, sign: int, k: int) -> None:
        queries, bank = draw(64, 900, 9, seed=7)
        order = (sign * (bank - queries[0]).square().sum(1)).argsort()
        assert check(emulator, queries, bank[order], k, "sqeuclidean") == 0

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(
        ("D", "k"), [(4, 5), (10, 8), (11, 5), (21, 5), (22, 5), (50, 8), (130, 5), (16, 20), (9, 64)]
    )
    def test_random_rows_are_decided_by_the_filter(self, emulator: Any, D: int, k: int, metric: str) -> None:
        """A failure here is one of speed."""
        queries, bank = draw(40, 700, D, seed=8)
        assert check(emulator, queries, bank, k, metric) == 0
        assert check(emulator, queries + 50, bank + 50, k, "sqeuclidean") == 0  # far from the origin
        assert check(emulator, bank[:40] + 1e-3 * queries, bank, k, metric) == 0  # next to one of them
        clusters = bank[torch.arange(700) % 4] + (0.1 if D <= 21 else 0.5) * bank
        assert check(emulator, clusters[:40], clusters, k, metric) == 0


class TestTies:
    @pytest.mark.parametrize("k", [1, 4, 30])
    @pytest.mark.parametrize("metric", METRICS)
    def test_equal_distances_are_ranked_by_index(self, emulator: Any, metric: str, k: int) -> None:
        generator = torch.Generator().manual_seed(5)
        bank = torch.randint(-2, 3, (260, 3), generator=generator).float()
        queries = torch.randint(-2, 3, (40, 3), generator=generator).float()
        check(emulator, queries, bank, k, metric)

    @pytest.mark.parametrize("k", [1, 5, 64])
    def test_lists_that_overflow(self, emulator: Any, k: int) -> None:
        """Equal rows, more than a list holds: some queries are left to the comparison with the whole bank, others are not."""
        queries, bank = draw(70, 1500, 7, seed=9)
        bank[::2] = bank[0]
        queries[::3] = bank[0] + 1e-3 * queries[::3]
        assert check(emulator, queries, bank, k, "sqeuclidean") > 20
        assert check(emulator, queries, bank, k, "cosine") > 20

    def test_overflow_in_some_parts_only(self, emulator: Any) -> None:
        queries, bank = draw(5, 4100, 7, seed=10)
        bank[500:900] = queries[1]
        assert check(emulator, queries, bank, 5, "sqeuclidean") == 1

    @pytest.mark.parametrize(("size", "k"), [(2562, 5), (2600, 64)])
    def test_no_part_of_the_bank_is_smaller_than_k(self, emulator: Any, size: int, k: int) -> None:
        """128 rows at a time in five parts would leave 2 or 40 to the last: too few to say which are the k nearest of a part."""
        queries, bank = draw(40, size, 7, seed=11)
        assert check(emulator, queries, bank, k, "sqeuclidean") <= 1

    def test_neighbours_closer_than_float32_can_tell(self, emulator: Any) -> None:
        generator = torch.Generator().manual_seed(6)
        bank = 100 + 1e-5 * torch.randn(400, 16, generator=generator)
        spread = torch.cat([bank, 1e4 * torch.randn(50, 16, generator=generator)])
        for k in (1, 5):
            check(emulator, bank[::9].contiguous(), bank, k, "sqeuclidean")
            check(emulator, spread[::9].contiguous(), spread, k, "sqeuclidean")


class TestNumbers:
    @pytest.mark.parametrize("k", [1, 5])
    def test_rows_of_very_different_length(self, emulator: Any, k: int) -> None:
        queries, bank = draw(65, 300, 12, seed=7)
        lengths = torch.logspace(-18, 18, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
        for metric in METRICS:
            check(emulator, queries * torch.logspace(-17, 17, 65)[:, None], bank * lengths[:, None], k, metric)

    @pytest.mark.parametrize("scale", [1e-43, 1e-30, 1e18, 1e30])
    def test_squares_beyond_the_range_of_float32(self, emulator: Any, scale: float) -> None:
        queries, bank = draw(33, 200, 9, seed=8)
        for metric in METRICS:
            check(emulator, scale * queries, scale * bank, 3, metric)

    @pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-160, 1e140, 1e160, 1e200, 1e307])
    def test_squares_beyond_the_range_of_float64(self, emulator: Any, scale: float) -> None:
        queries, bank = draw(20, 150, 5, seed=8, dtype=torch.float64)
        for metric in METRICS:
            check(emulator, scale * queries, scale * bank, 3, metric)
            check(emulator, queries, scale * bank, 3, metric)

    def test_one_row_whose_square_is_beyond_float64(self, emulator: Any) -> None:
        queries, bank = draw(40, 60, 6, seed=12, dtype=torch.float64)
        bank[7] *= 1e200  # its norm is infinite, its cosine 0 / infinity
        for metric in METRICS:
            check(emulator, queries, bank, 40, metric)
            check(emulator, bank[:20], bank, 40, metric)

    def test_one_outlier_in_bank_and_queries(self, emulator: Any) -> None:
        queries, bank = draw(40, 300, 9, seed=11)
        for size in (1e3, 1e7, 1e20, 3e38):
            queries[3], bank[17] = size, -size
            for metric in METRICS:
                left = check(emulator, queries, bank, 5, metric)
                assert left <= 1 or (metric == "sqeuclidean" and size > 1e7)

    def test_zero_vectors_are_at_cosine_distance_one(self, emulator: Any) -> None:
        queries, bank = draw(20, 50, 6, seed=9)
        queries[3], bank[7], bank[11], bank[13] = 0, 0, 1e-13, float("nan")
        for k in (1, 5, 50):
            check(emulator, queries, bank, k, "cosine")
            check(emulator, queries.double(), bank, k, "cosine")
        bank[0] = float("nan")  # also at distance one from a zero vector
        check(emulator, queries, bank, 5, "cosine")
        bank[20] = torch.tensor([1e-12, 0, 0, 0, 0, 0])  # as long as the line between zero and something
        check(emulator, queries, bank, 5, "cosine")

    @pytest.mark.parametrize("metric", METRICS)
    def test_what_is_not_finite_comes_last(self, emulator: Any, metric: str) -> None:
        queries, bank = draw(21, 40, 5, seed=11)
        bank[4, 2], bank[9, 0], bank[17] = float("nan"), float("inf"), float("-inf")
        queries[2, 2], queries[5, 1] = float("nan"), float("inf")
        for k in (1, 5, 38, 40):
            check(emulator, queries, bank, k, metric)

    @pytest.mark.parametrize("metric", METRICS)
    def test_no_columns_and_no_queries(self, emulator: Any, metric: str) -> None:
        _, indices, _ = run(emulator, torch.zeros(3, 1), torch.zeros(300, 1), 4, metric, D=0)
        assert indices.tolist() == [[0, 1, 2, 3]] * 3
        distances, _, _ = run(emulator, torch.zeros(0, 4), torch.zeros(3, 4), 2, metric)
        assert distances.shape == (0, 2)
