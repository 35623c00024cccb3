# SPDX-License-Identifier: MIT
"""The op `nearest`: indices and distances bit for bit as defined, whatever the data do to the filter.

`test_nearest_properties.py` holds invariants on random problems, `test_nearest_torch.py` what torch does with the op,
`test_kmeans.py` the clustering on it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import nearest
from python_tests.nearest_oracle import check, draw
from python_tests.places import PLACES, Place, needs_native

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["sqeuclidean", "cosine"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (N, M, D, k): one of each, a register tile less and more than one, several tiles of the bank, all neighbours, few queries
SIZES = [
    (1, 1, 1, 1), (1, 2, 3, 2), (5, 1, 31, 1), (31, 33, 2, 33), (33, 31, 33, 5), (129, 129, 129, 1), (129, 600, 31, 5),
    (300, 3000, 32, 10), (4, 5000, 16, 5), (64, 700, 600, 3), (700, 50, 32, 1), (40, 900, 8, 64), (9, 400, 5, 200),
    (37, 3000, 6, 16), (37, 3000, 6, 17), (70, 6000, 9, 100), (33, 129, 33, 65), (6, 5000, 4, 1500),
]  # fmt: skip


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def on(place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(place.device) for tensor in tensors)


class TestValue:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(("N", "M", "D", "k"), SIZES)
    def test_every_size(self, place: Place, N: int, M: int, D: int, k: int, metric: str) -> None:
        check(*on(place, *draw(N, M, D, seed=N + M + D)), k, metric)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("bank_dtype", DTYPES)
    @pytest.mark.parametrize("query_dtype", DTYPES)
    def test_every_pair_of_types(
        self, place: Place, query_dtype: torch.dtype, bank_dtype: torch.dtype, metric: str
    ) -> None:
        queries, bank = draw(67, 333, 19, seed=3)
        for k in (1, 5, 18):
            check(*on(place, queries.to(query_dtype), bank.to(bank_dtype)), k, metric)

    @pytest.mark.parametrize("k", [1, 4, 41])
    @pytest.mark.parametrize("metric", METRICS)
    def test_equal_distances_are_ranked_by_index(self, place: Place, metric: str, k: int) -> None:
        generator = torch.Generator().manual_seed(5)
        bank = torch.randint(
            -2, 3, (500, 3), generator=generator
        ).float()  # 125 different rows: every one about four times
        queries = torch.randint(-2, 3, (100, 3), generator=generator).float()
        check(*on(place, queries, bank), k, metric)

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_a_bank_of_equal_rows(self, place: Place, k: int) -> None:
        queries, bank = draw(33, 1, 7)
        found = nearest(*on(place, queries, bank.expand(2000, 7)), k)
        assert (found.indices.cpu() == torch.arange(k)).all()

    @pytest.mark.parametrize("k", [1, 30])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("order", ["as drawn", "nearest last", "nearest first"])
    def test_some_of_many_rows_in_any_order(self, place: Place, order: str, metric: str, k: int) -> None:
        """Tiles of later rows are passed over where no row can count: here all of them count to some queries, or none."""
        queries, bank = draw(70, 4000, 9, seed=11)
        if order != "as drawn":
            bank = bank[(bank - queries[0]).norm(dim=1).argsort(descending=order == "nearest last")].contiguous()
            queries[1:] = queries[0] + 0.05 * queries[1:]
        check(*on(place, queries, bank), k, metric)

    @pytest.mark.parametrize("k", [1, 2, 17])
    def test_a_late_row_that_float32_takes_for_the_second(self, place: Place, k: int) -> None:
        """Every query has two rows beside it, an early one and a late one that is nearer by less than the filter can tell."""
        queries, bank = 10 * draw(40, 1, 16, seed=12)[0], 10 * draw(1, 4000, 16, seed=13)[1]
        ahead = draw(1, 40, 16, seed=14)[1]
        bank[100:140] = queries + ahead
        bank[1000:2480:37] = queries + (1 - 1e-6) * ahead
        check(*on(place, queries, bank), k, "sqeuclidean")

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_neighbours_closer_than_float32_can_tell(self, place: Place, k: int) -> None:
        """|b|^2 - 2 q.b of rows 1e-7 apart at length 100: all of them the same number in float32."""
        generator = torch.Generator().manual_seed(6)
        bank = 100 + 1e-5 * torch.randn(600, 16, generator=generator)
        check(*on(place, bank[::7].contiguous(), bank), k, "sqeuclidean")
        spread = torch.cat([bank, 1e4 * torch.randn(50, 16, generator=generator)])  # and the mean is far from them
        check(*on(place, spread[::7].contiguous(), spread), k, "sqeuclidean")

    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_rows_of_very_different_length(self, place: Place, k: int) -> None:
        queries, bank = draw(65, 900, 12, seed=7)
        lengths = torch.logspace(-18, 18, 900)[torch.randperm(900, generator=torch.Generator().manual_seed(1))]
        for metric in METRICS:
            check(*on(place, queries * torch.logspace(-17, 17, 65)[:, None], bank * lengths[:, None]), k, metric)

    @pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e30])
    def test_squares_beyond_the_range_of_float32(self, place: Place, scale: float) -> None:
        queries, bank = draw(33, 300, 9, seed=8)
        for k in (1, 3, 20):
            for metric in METRICS:
                check(*on(place, scale * queries, scale * bank), k, metric)

    def test_zero_vectors_are_at_cosine_distance_one(self, place: Place) -> None:
        queries, bank = draw(20, 50, 6, seed=9)
        queries[3], bank[7], bank[11] = 0, 0, 1e-13
        check(*on(place, queries, bank), 50, "cosine")
        found = nearest(*on(place, queries, bank), 50, metric="cosine")
        assert (found.distances[3] == 1).all() and (found.indices[3].cpu() == torch.arange(50)).all()

    def test_a_row_is_at_distance_zero_from_itself(self, place: Place) -> None:
        bank = draw(1, 257, 33, seed=10)[1]
        for metric in METRICS:
            found = nearest(*on(place, bank, bank), 1, metric=metric)  # type: ignore[arg-type]
            assert (found.indices[:, 0].cpu() == torch.arange(257)).all()
            assert (found.distances <= (0 if metric == "sqeuclidean" else 1e-15)).all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_what_is_not_finite_comes_last(self, place: Place, metric: str) -> None:
        queries, bank = draw(21, 40, 5, seed=11)
        bank[4, 2], bank[9, 0], bank[17] = float("nan"), float("inf"), float("-inf")
        queries[2, 2], queries[5, 1] = float("nan"), float("inf")
        for k in (1, 5, 40):
            check(*on(place, queries, bank), k, metric)

    def test_a_zero_query_is_as_near_to_what_is_no_number(self, place: Place) -> None:
        """At cosine distance 1 from every row, NaN rows among them."""
        queries, bank = draw(40, 20, 6, seed=15)
        queries[3], queries[8], bank[0], bank[5] = 0, 1e-12 / 6**0.5, float("nan"), 1e-12 / 6**0.5
        for k in (1, 5, 20):
            check(*on(place, queries, bank), k, "cosine")

    @pytest.mark.parametrize("metric", METRICS)
    def test_squares_beyond_the_range_of_float64(self, place: Place, metric: str) -> None:
        queries, bank = draw(30, 60, 6, seed=16, dtype=torch.float64)
        bank[7] *= 1e200
        queries[4], bank[9, 2] = bank[7], float("inf")
        for k in (1, 5, 40):
            check(*on(place, queries, bank), k, metric)
        single = draw(30, 60, 6, seed=17)
        single[1][7], single[0][4] = 3e38, 3e38
        single[1][8] = -3e38  # moved to the center it is beyond float32
        for k in (1, 5, 40):
            check(*on(place, *single), k, metric)

    def test_no_queries(self, place: Place) -> None:
        found = nearest(*on(place, *draw(0, 7, 3)), 2)
        assert found.distances.shape == found.indices.shape == (0, 2)

    @pytest.mark.parametrize("metric", METRICS)
    def test_no_columns(self, place: Place, metric: Any) -> None:
        found = nearest(
            torch.zeros(3, 0, device=place.device), torch.zeros(4, 0, device=place.device), 2, metric=metric
        )
        assert found.indices.tolist() == [[0, 1]] * 3
        assert (found.distances == (0 if metric == "sqeuclidean" else 1)).all()

    def test_any_strides(self, place: Place) -> None:
        queries, bank = on(place, *draw(66, 240, 20, seed=12))
        check(queries[::2, 3:11], bank.flip(0)[1::3, 3:11], 3, "sqeuclidean")
        check(queries.T.contiguous().T, bank.T.contiguous().T, 3, "cosine")
        check(queries[:1].expand(9, 20), bank, 3, "sqeuclidean")


class TestGradient:
    def test_distances_come_detached_and_gathered_ones_do_not(self, place: Place) -> None:
        queries, bank = (x.requires_grad_() for x in on(place, *draw(33, 70, 5)))
        found = nearest(queries, bank, 3)
        assert not found.distances.requires_grad
        again = (queries[:, None] - bank[found.indices]).square().sum(-1)
        torch.testing.assert_close(again, found.distances)
        again.sum().backward()
        assert queries.grad is not None and bank.grad is not None and bool(bank.grad.any())

    def test_differentiating_the_distances_raises(self, place: Place) -> None:
        queries, bank = on(place, *draw(9, 20, 5))
        with pytest.raises(RuntimeError, match="does not require grad"):
            nearest(queries.requires_grad_(), bank, 3).distances.sum().backward()


class TestContract:
    def test_the_inputs_are_not_modified(self, place: Place) -> None:
        queries, bank = on(place, *draw(33, 70, 5))
        copies = queries.clone(), bank.clone()
        nearest(queries, bank, 3, metric="cosine")
        assert torch.equal(queries, copies[0]) and torch.equal(bank, copies[1])

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "says"),
        [
            (([[1.0]], torch.zeros(2, 1)), {}, TypeError, "queries must be a torch.Tensor of shape .N, D.; got list"),
            ((torch.zeros(2, 1), torch.zeros(2, 1).long()), {}, TypeError, "bank must be float32.*got int64"),
            ((torch.zeros(3), torch.zeros(2, 3)), {}, ValueError, "queries must have shape .N, D..*pass queries.None."),
            ((torch.zeros(3, 2), torch.zeros(2, 3)), {}, ValueError, "the same D; got float32 .3, 2.*float32 .2, 3."),
            ((torch.zeros(3, 2), torch.zeros(2, 2)), {}, ValueError, "k must lie in 1..2, the rows of the bank; got 5"),
            ((torch.zeros(3, 2), torch.zeros(0, 2), 1), {}, ValueError, "k must lie in 1..0"),
            ((torch.zeros(3, 2), torch.zeros(2, 2), 0), {}, ValueError, "got 0"),
            ((torch.zeros(3, 2), torch.zeros(2, 2), 1.0), {}, TypeError, "k must be an integer; got float"),
            ((torch.zeros(3, 2), torch.zeros(2, 2), True), {}, TypeError, "k must be an integer; got bool"),
            (
                (torch.zeros(3, 2), torch.zeros(2, 2), 1),
                {"metric": "l2"},
                ValueError,
                "'sqeuclidean', 'cosine'; got 'l2'",
            ),
            ((torch.zeros(3, 2), torch.zeros(2, 2, device="meta"), 1), {}, ValueError, "is on cpu and bank on meta"),
        ],
    )
    def test_bad_arguments(self, arguments: Any, options: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=f"nearest: .*{says}"):
            nearest(*arguments, **options)


class TestDeterminism:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize(
        ("N", "M", "D", "k"),
        [(1000, 3000, 20, 7), (40, 20000, 6, 5), (2, 9000, 6, 3), (900, 40, 20, 1), (70, 9000, 6, 50)],
    )
    def test_any_number_of_threads(self, place: Place, N: int, M: int, D: int, k: int, metric: Any) -> None:
        """Many blocks of queries; few queries against parts of the bank, which are merged; a pair of them without the filter."""
        queries, bank = on(place, *draw(N, M, D, seed=13))
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(nearest(queries, bank, k, metric=metric))
        finally:
            torch.set_num_threads(before)
        for found in results[1:]:
            assert torch.equal(found.indices, results[0].indices) and torch.equal(found.distances, results[0].distances)
        check(queries[:50], bank, k, metric)

    def test_two_python_threads_at_once(self, place: Place) -> None:
        queries, bank = on(place, *draw(500, 800, 20, seed=14))
        alone, found = nearest(queries, bank, 5), [None, None]

        def work(slot: int) -> None:
            for _ in range(10):
                found[slot] = nearest(queries, bank, 5)  # type: ignore[call-overload]

        threads = [threading.Thread(target=work, args=(slot,)) for slot in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in found:
            assert result is not None and torch.equal(result.indices, alone.indices)

    @needs_native
    def test_memory_stays_small(self) -> None:
        """100,000 x 20,000 distances would be 8 GB; beyond inputs and outputs a call keeps a few megabytes."""
        code = (
            "import resource, torch, protokernels; torch.set_num_threads(2)\n"
            "q, b = torch.randn(100_000, 4), torch.randn(20_000, 4); protokernels.nearest(q[:9000], b[:9000], 5)\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak(); protokernels.nearest(q, b, 5); print(peak() - before)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stderr
        assert float(run.stdout) < 6 + 20  # megabytes; the outputs are 6
