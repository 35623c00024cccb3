# SPDX-License-Identifier: MIT
"""An iteration of k-means (`protokernels.ops.nearest.assign`): labels and distances by the definition, bit for bit; sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import backend, nearest
from protokernels.cluster import KMeans
from protokernels.ops import nearest as op
from protokernels.ops.nearest import assign
from python_tests.nearest_oracle import draw, expected
from python_tests.places import PLACES, Place, needs_native

# (N, K, D): one; a vector's width less and more than one; panels of one, two and three vectors at every level; more columns than
# are summed in one go, and a remainder of them; more centers than bits of a mask; one to ten behind whole vectors, long rows
SIZES = [
    (1, 1, 1), (5, 2, 3), (100, 8, 7), (333, 9, 33), (130, 17, 32), (97, 20, 127), (97, 24, 128), (65, 31, 129), (50, 50, 300),
    (700, 65, 16), (300, 129, 8), (40, 520, 5), (3, 7, 600), (60, 19, 700), (49, 21, 641), (75, 38, 657), (50, 9, 1000), (99, 10, 1024),
    (33, 5, 3000),
]  # fmt: skip


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def check_assign(x: Tensor, centers: Tensor) -> None:
    """Labels and distances are the definition's bits, sums are right up to the rounding of float64, counts are exact."""
    found = assign(x, centers, with_sums=True, with_distances=True)
    values, indices = expected(x, centers, 1, "sqeuclidean")
    assert found.distances is not None and found.sums is not None and found.counts is not None
    assert found.labels.dtype == torch.int64 and found.distances.dtype == x.dtype
    np.testing.assert_array_equal(found.labels.cpu().numpy(), indices[:, 0])
    np.testing.assert_array_equal(found.distances.cpu().numpy(), values[:, 0])
    rows = x.double().cpu().numpy()
    np.testing.assert_array_equal(found.counts.cpu().numpy(), np.bincount(indices[:, 0], minlength=len(centers)))
    with np.errstate(invalid="ignore"):
        for k in range(len(centers)):
            own = rows[indices[:, 0] == k]
            bound = len(own) * 2.0**-52 * np.abs(own).sum(0)
            difference = np.abs(found.sums[k].cpu().numpy() - own.sum(0))
            assert ((difference <= bound) | ~np.isfinite(own).all(0)).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    N, K, D = draw(st.integers(1, 90)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, centers = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, K))
    if draw(st.booleans()):  # a grid: equal distances everywhere
        x, centers = x.round(), centers.round()
    shift, scale = draw(st.sampled_from([0.0, 1.0, 1e3, 1e6])), draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e17]))
    x, centers = shift + scale * x, shift + scale * centers
    if draw(st.booleans()):
        centers[:: draw(st.integers(2, 9))] *= draw(st.sampled_from([0.0, -1.0, 100.0, 1e6, 1 + 2.0**-22]))
    if draw(st.booleans()):  # near ties: every center twice, one of them moved by little more than nothing
        centers[K // 2 :] = centers[: K - K // 2] * (1 + draw(st.sampled_from([0.0, 2.0**-23, 2.0**-50])))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return x.to(dtype), centers.to(dtype)


class TestValue:
    @pytest.mark.parametrize(("N", "K", "D"), SIZES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sizes(self, place: Place, N: int, K: int, D: int, dtype: torch.dtype) -> None:
        x, centers = (t.to(place.device) for t in draw(N, K, D, seed=N, dtype=dtype))
        check_assign(x, centers)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ties_go_to_the_first(self, place: Place, dtype: torch.dtype) -> None:
        x, centers = (t.round().to(place.device, dtype) for t in draw(400, 30, 3, seed=1))
        check_assign(x, centers)
        check_assign(x, centers.repeat(3, 1))
        check_assign(x.repeat(1, 200), centers[:18].repeat(1, 200))
        check_assign(x, x[:50].clone())

    @pytest.mark.parametrize("D", [20, 600])
    def test_differences_below_float32(self, place: Place, D: int) -> None:
        """Rows far from the origin, centers a unit in the last place apart."""
        x, centers = (1000 + 1e-4 * t.to(place.device) for t in draw(500, 40, D, seed=2))
        check_assign(x, centers)
        close = centers[:1] * (1 + 2.0**-23 * torch.arange(40, device=place.device)[:, None])
        check_assign(x, close)

    @pytest.mark.parametrize("far", [1e6, 1e15, 3e19, 3e38])
    def test_outliers(self, place: Place, far: float) -> None:
        """Among rows, among centers, and in both; squares of the last two are too large for float32."""
        x, centers = (t.to(place.device) for t in draw(200, 20, 9, seed=3))
        for target in ((x,), (centers,), (x, centers)):
            spoiled = [x.clone(), centers.clone()]
            for t in target:
                spoiled[0 if t is x else 1][-1, ::2] = far
            check_assign(*spoiled)

    def test_not_finite(self, place: Place) -> None:
        x, centers = (t.to(place.device) for t in draw(150, 20, 9, seed=4))
        x[3, 2], x[5, 0], x[7, 8], x[9] = np.nan, np.inf, -np.inf, np.nan
        check_assign(x, centers)
        centers[0, 1], centers[5, 3] = np.nan, np.inf
        check_assign(x, centers)

    def test_very_small(self, place: Place) -> None:
        """Squares that underflow in float32."""
        x, centers = (1e-25 * t.to(place.device) for t in draw(150, 20, 9, seed=5))
        check_assign(x, centers)
        check_assign(x, torch.cat([centers, torch.ones_like(centers)]))
        check_assign(torch.zeros_like(x), torch.zeros_like(centers))

    def test_any_strides(self, place: Place) -> None:
        x, centers = (t.to(place.device) for t in draw(120, 30, 40, seed=6))
        check_assign(x[::2, :20], centers[:, 20:])
        check_assign(x.T.contiguous().T, centers[:1].expand(5, 40))

    def test_no_rows(self, place: Place) -> None:
        x, centers = (t.to(place.device) for t in draw(0, 4, 3))
        found = assign(x, centers, with_sums=True)
        assert found.sums is not None and found.counts is not None
        assert found.labels.shape == (0,) and not found.sums.any() and found.counts.tolist() == [0] * 4

    @settings(max_examples=150, deadline=None)
    @given(problems())
    def test_exactly_the_definition(self, problem: tuple[Tensor, Tensor]) -> None:
        check_assign(*problem)

    def test_many_centers_take_the_other_way(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(op, "MOST_CENTERS", 10)
        check_assign(*(t.to(place.device) for t in draw(60, 11, 5)))


@needs_native
class TestContract:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("asked", [(False, False), (True, False), (True, True)])
    def test_opcheck(self, dtype: torch.dtype, asked: tuple[bool, bool]) -> None:
        torch.library.opcheck(torch.ops.protokernels.nearest_assign, (*draw(33, 5, 7, dtype=dtype), *asked))

    @pytest.mark.parametrize(
        "arguments",
        [
            lambda: (torch.randn(4, 3), torch.randn(2, 4)),
            lambda: (torch.randn(4, 3), torch.randn(0, 3)),
            lambda: (torch.randn(4, 0), torch.randn(2, 0)),
            lambda: (torch.randn(4, 3), torch.randn(2, 3).double()),
            lambda: (torch.randn(4, 3).half(), torch.randn(2, 3).half()),
        ],
    )
    def test_what_would_reach_beyond_memory_is_refused(self, arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=r"nearest_assign: x (\[N, D\] )?and centers"):
            torch.ops.protokernels.nearest_assign(*arguments(), True, True)

    def test_on_cuda_it_is_put_together_from_the_two_kernels(self) -> None:
        """The composition CUDA runs, here on the CPU's kernels: the same bits as the one pass."""
        x, centers = draw(500, 30, 20, seed=7)
        for asked in ((False, False), (True, False), (True, True)):
            for a, b in zip(op._assign_in_torch(x, centers, *asked), _one_pass(x, centers, *asked), strict=True):
                assert a.shape == b.shape and torch.equal(a, b)


def _one_pass(x: Tensor, centers: Tensor, *asked: bool) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = torch.ops.protokernels.nearest_assign(x, centers, *asked)
    return outputs


@needs_native
class TestDeterminism:
    @pytest.mark.parametrize(("N", "K", "D"), [(9000, 50, 32), (3000, 20, 300), (5000, 300, 8), (50, 7, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_threads_and_the_way_of_two_kernels(self, N: int, K: int, D: int, dtype: torch.dtype) -> None:
        """Labels, sums, counts and distances: the same bits for any number of threads, and those of nearest and update_prototypes."""
        x, centers = draw(N, K, D, seed=8, dtype=dtype)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(_one_pass(x, centers, True, True))
        finally:
            torch.set_num_threads(before)
        results.append(op._assign_in_torch(x, centers, True, True))
        for found in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@needs_native
class TestKMeans:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["noise", "grid", "few distinct", "outlier", "warm"])
    def test_one_pass_and_two_kernels_give_the_same_clusters(
        self, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = draw(2000, 1, 6, seed=9, dtype=dtype)[0]
        if kind == "grid":
            x = x.round()
        if kind == "few distinct":
            x = x[:5].repeat(100, 1)
        if kind == "outlier":
            x[17] = 1e14
        start: Any = x[:12].clone() if kind == "warm" else "k-means++"
        if kind == "warm":
            start[3] = 1e3  # a cluster without rows

        def fit() -> KMeans:
            return KMeans(12, init=start, n_init=2, max_iter=40, tol=0.0, random_state=1).fit(x)

        with pytest.warns(RuntimeWarning) if kind == "few distinct" else nullcontext():
            one = fit()
            monkeypatch.setattr(op, "MOST_CENTERS", 0)
            two = fit()
        assert torch.equal(one.cluster_centers_, two.cluster_centers_) and torch.equal(one.labels_, two.labels_)
        assert one.inertia_ == two.inertia_ and one.n_iter_ == two.n_iter_
        with backend.use("reference"):  # its sums are taken in another order: a last bit of a center may differ
            torch.testing.assert_close(nearest(x, one.cluster_centers_, 1).indices[:, 0], one.labels_, rtol=0, atol=0)

    def test_predict_takes_data_of_another_type(self) -> None:
        x = draw(100, 1, 4, seed=10, dtype=torch.float64)[0]
        model = KMeans(5, n_init=1).fit(x)
        assert torch.equal(model.predict(x), model.labels_)
        assert torch.equal(model.predict(x.float()), nearest(x.float(), model.cluster_centers_, 1).indices[:, 0])
