# SPDX-License-Identifier: MIT
"""`protokernels.cluster`: k-means against scikit-learn and its own definition, and the elbow against closed forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sklearn.base
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from protokernels.cluster import Elbow, KMeans, choose_n_clusters, find_elbow
from python_tests.places import PLACES, Place, default_dtype


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def blobs(count: int, D: int, per: int, *, apart: float = 8.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``per`` rows around each of ``count`` centers, and the cluster of each row."""
    generator = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(count, D, generator=generator)
    rows = centers.repeat_interleave(per, 0) + torch.randn(count * per, D, generator=generator)
    return rows, torch.arange(count).repeat_interleave(per)


def inertia(x: Tensor, model: KMeans) -> float:
    return float((x.double() - model.cluster_centers_.double()[model.labels_]).square().sum())


class TestKMeans:
    def test_clusters_far_apart_are_found(self, place: Place) -> None:
        x, truth = (t.to(place.device) for t in blobs(7, 5, 40))
        model = KMeans(7, random_state=1).fit(x)
        pairs = torch.stack([truth, model.labels_]).unique(dim=1)
        assert pairs.shape[1] == 7  # one label for each cluster
        means = torch.stack([x[model.labels_ == label].double().mean(0) for label in range(7)])
        torch.testing.assert_close(model.cluster_centers_.double(), means, rtol=1e-6, atol=1e-6)
        assert model.inertia_ == pytest.approx(inertia(x, model), rel=1e-6)
        assert model.inertia_ < 7 * 40 * 5 * 1.1

    def test_the_end_is_a_fixed_point(self, place: Place) -> None:
        x = torch.randn(500, 4, generator=torch.Generator().manual_seed(2)).to(place.device)
        model = KMeans(9, n_init=1, tol=0.0).fit(x)
        assert torch.equal(model.predict(x), model.labels_)
        again = KMeans(9, init=model.cluster_centers_, tol=0.0).fit(x)
        assert torch.equal(again.cluster_centers_, model.cluster_centers_) and again.n_iter_ == 1

    def test_inertia_falls_with_every_iteration(self, place: Place) -> None:
        x = torch.randn(400, 3, generator=torch.Generator().manual_seed(3)).to(place.device)
        start = x[:6].clone()
        falling = [KMeans(6, init=start, max_iter=n, tol=0.0).fit(x).inertia_ for n in range(1, 12)]
        assert all(b <= a * (1 + 1e-6) for a, b in pairwise(falling))

    def test_as_good_as_scikit_learn(self, place: Place) -> None:
        cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
        x, _ = blobs(12, 6, 50, apart=2.0)
        ours = KMeans(12, n_init=10).fit(x.to(place.device)).inertia_
        theirs = [cluster.KMeans(12, n_init=10, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3)]
        assert ours <= 1.02 * min(theirs)

    def test_from_the_same_start_scikit_learn_ends_at_the_same_centers(self, place: Place) -> None:
        cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
        x, _ = blobs(5, 8, 60, apart=3.0, seed=4)
        start = x[::60].contiguous()
        ours = KMeans(5, init=start.to(place.device), tol=0.0).fit(x.to(place.device))
        theirs = cluster.KMeans(5, init=start.numpy(), n_init=1, tol=0.0, algorithm="lloyd").fit(x.numpy())
        torch.testing.assert_close(
            ours.cluster_centers_.cpu(), torch.from_numpy(theirs.cluster_centers_), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(ours.labels_.cpu(), torch.from_numpy(theirs.labels_).long())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_every_type(self, place: Place, dtype: torch.dtype) -> None:
        x = blobs(3, 4, 30)[0].to(place.device, dtype)
        model = KMeans(3).fit(x)
        assert model.cluster_centers_.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert model.labels_.bincount().tolist() == [30, 30, 30]

    def test_as_many_clusters_as_rows(self, place: Place) -> None:
        x = torch.randn(20, 3).to(place.device)
        model = KMeans(20).fit(x)
        assert model.inertia_ == 0 and model.labels_.sort().values.tolist() == list(range(20))

    def test_one_cluster_is_the_mean(self, place: Place) -> None:
        x = torch.randn(133, 3, dtype=torch.float64).to(place.device)
        model = KMeans(1).fit(x)
        torch.testing.assert_close(model.cluster_centers_[0], x.mean(0))
        assert model.inertia_ == pytest.approx(float(x.var(0, correction=0).sum() * 133), rel=1e-12)

    def test_a_center_without_rows_takes_the_farthest_row(self, place: Place) -> None:
        x = torch.tensor([[0.0], [1.0], [2.0], [50.0]], device=place.device)
        model = KMeans(2, init=torch.tensor([[20.0], [1000.0]])).fit(x)
        assert model.cluster_centers_.flatten().tolist() == [1.0, 50.0]

    def test_no_start_ends_with_a_center_that_could_have_rows(self, place: Place) -> None:
        x = torch.tensor([[3.0], [1.0], [6.0], [7.0], [3.0]], device=place.device)
        model = KMeans(4, init=torch.tensor([[6.0], [2.0], [0.0], [1.0]])).fit(x)  # two rows at 3 are farthest at first
        assert model.inertia_ == 0 and len(model.labels_.unique()) == 4
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.float32, torch.float64):
            for _ in range(100):
                x = torch.randint(0, 8, (9, 1), generator=generator).to(place.device, dtype)
                start = torch.randint(0, 8, (5, 1), generator=generator).to(place.device, dtype)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = KMeans(5, init=start).fit(x)
                assert len(model.labels_.unique()) == min(5, len(x.unique()))

    def test_too_few_iterations_for_a_center_without_rows(self, place: Place) -> None:
        x = torch.tensor([[3.0], [1.0], [6.0], [7.0], [3.0]], device=place.device)
        with pytest.warns(RuntimeWarning, match="1 of 4 clusters have no rows: .* max_iter = 1 .*; raise max_iter"):
            KMeans(4, init=torch.tensor([[6.0], [2.0], [0.0], [1.0]]), max_iter=1).fit(x)

    def test_rows_that_repeat_in_float64_end(self, place: Place) -> None:
        x = torch.tensor([[0.1], [0.7], [1.3]], dtype=torch.float64, device=place.device).repeat(
            7, 1
        )  # means are not exact
        with pytest.warns(RuntimeWarning, match="3 of 6 clusters have no rows: there are fewer distinct rows"):
            model = KMeans(6).fit(x)
        assert model.inertia_ < 1e-30 and model.n_iter_ < 20

    def test_fewer_distinct_rows_than_clusters(self, place: Place) -> None:
        x = torch.tensor([[0.0, 1.0], [2.0, 3.0]], device=place.device).repeat(10, 1)
        with pytest.warns(RuntimeWarning, match="2 of 4 clusters have no rows: there are fewer distinct rows"):
            model = KMeans(4).fit(x)
        assert model.inertia_ == 0 and len(model.labels_.unique()) == 2

    def test_outliers_do_not_spoil_the_others(self, place: Place) -> None:
        x = torch.cat([blobs(3, 2, 50)[0], torch.tensor([[1e15, -1e15]])]).to(place.device)
        model = KMeans(4).fit(x)
        assert int((model.labels_ == model.labels_[-1]).sum()) == 1

    def test_predict_and_transform(self, place: Place) -> None:
        x = blobs(4, 3, 20)[0].to(place.device)
        model = KMeans(4).fit(x)
        new = torch.randn(33, 3, device=place.device)
        distances = model.transform(new)
        torch.testing.assert_close(distances, torch.cdist(new, model.cluster_centers_), rtol=1e-4, atol=1e-4)
        assert torch.equal(distances.argmin(1), model.predict(new))
        assert torch.equal(KMeans(4).fit_predict(x), model.labels_)

    def test_distances_to_float64_centers_that_float32_cannot_hold(self, place: Place) -> None:
        x = 1e8 + torch.randn(60, 2, device=place.device, generator=place.seeded(0), dtype=torch.float64)
        model, rows = KMeans(5).fit(x), x[:9].float()
        distances = model.transform(rows)
        expected = (rows.double()[:, None] - model.cluster_centers_).square().sum(2).sqrt()
        assert distances.dtype == torch.float64
        torch.testing.assert_close(distances, expected, rtol=1e-12, atol=0)
        assert torch.equal(distances.argmin(1), model.predict(rows))

    def test_scikit_learns_tools_know_it(self, place: Place) -> None:
        x = torch.randn(20, 3, device=place.device, generator=place.seeded(0))
        model = KMeans(
            np.int64(3), n_init=2, tol=np.float32(0.5), random_state=np.int64(1)
        )  # as a search over parameters hands them over
        copy = sklearn.base.clone(model).set_params(n_clusters=4)
        assert copy.get_params() == {**model.get_params(), "n_clusters": 4}
        assert repr(copy).startswith("KMeans(n_clusters=4, init='k-means++'")
        assert torch.equal(copy.fit_transform(x, None), copy.transform(x)) and copy.cluster_centers_.shape == (4, 3)
        assert copy.score(x) == pytest.approx(-copy.inertia_)
        with pytest.raises(ValueError, match="unknown parameters clusters; known are n_clusters, "):
            copy.set_params(clusters=3)
        with pytest.raises(ValueError, match="n_clusters must be a positive integer; got 0"):
            copy.set_params(n_clusters=0)

    def test_scikit_learn_fits_scores_and_searches_it(self) -> None:
        x = blobs(3, 2, 12)[0][torch.randperm(36, generator=torch.Generator().manual_seed(0))]
        steps = StandardScaler(), FunctionTransformer(torch.from_numpy), KMeans(3, n_init=1)
        pipeline = make_pipeline(*steps).fit(x.numpy())
        apart = torch.from_numpy(StandardScaler().fit_transform(x.numpy()))
        assert torch.equal(pipeline.predict(x.numpy()), KMeans(3, n_init=1).fit(apart).predict(apart))
        assert pipeline.transform(x.numpy()).shape == (len(x), 3) and sklearn.base.is_clusterer(pipeline)
        assert "KMeans" in pipeline._repr_html_()
        scores = cross_val_score(KMeans(3, n_init=1), x, cv=3, error_score="raise")
        assert scores.shape == (3,) and (scores < 0).all()
        search = GridSearchCV(pipeline, {"kmeans__n_clusters": [1, 3]}, cv=3, error_score="raise").fit(x.numpy())
        assert search.best_params_ == {"kmeans__n_clusters": 3}
        check_is_fitted(search.best_estimator_[-1])
        with pytest.raises(NotFittedError):
            check_is_fitted(KMeans(3))

    def test_rows_too_large_for_their_type_are_refused(self, place: Place) -> None:
        x = torch.randn(9, 2, device=place.device, generator=place.seeded(0)) * 1e25
        with pytest.raises(ValueError, match=r"more than float32 can hold; scale x, or pass x\.double\(\)"):
            KMeans(2).fit(x)
        assert math.isfinite(KMeans(2).fit(x.double()).inertia_)

    def test_rows_too_small_for_their_type_are_refused(self, place: Place) -> None:
        x = torch.randn(9, 2, device=place.device, generator=place.seeded(0))
        with pytest.raises(ValueError, match=r"less than float32 can hold; scale x, or pass x\.double\(\)"):
            KMeans(2).fit(x * 1e-25)
        assert torch.equal(KMeans(2).fit((x * 1e-25).double()).labels_, KMeans(2).fit(x.double()).labels_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows that are all the same are another thing
            assert KMeans(2).fit(torch.ones_like(x)).inertia_ == 0

    def test_the_input_is_not_modified(self, place: Place) -> None:
        x = blobs(4, 3, 20)[0].to(place.device)
        copy = x.clone()
        KMeans(4).fit(x)
        assert torch.equal(x, copy)

    @pytest.mark.parametrize(
        ("work", "error", "says"),
        [
            (lambda: KMeans(0), ValueError, "n_clusters must be a positive integer; got 0"),
            (lambda: KMeans(2, n_init=1.5), ValueError, "n_init must be"),  # type: ignore[arg-type]
            (lambda: KMeans(2, tol=-1.0), ValueError, "tol must be"),
            (lambda: KMeans(2, tol=True), TypeError, "tol must be a number; got bool"),
            (lambda: KMeans(2, tol=10**400), ValueError, "tol must be a number that float64 can hold"),
            (lambda: KMeans(2, random_state=0.5), TypeError, "random_state must be a whole number"),  # type: ignore[arg-type]
            (lambda: KMeans(2, random_state=2**64), ValueError, "random_state must be"),
            (lambda: KMeans(2).fit(torch.randn(9, 0)), ValueError, "at least one column; got float32 .9, 0."),
            (lambda: KMeans(2, init="random"), ValueError, "'k-means.+' or a tensor"),
            (
                lambda: KMeans(2, init=torch.zeros(3, 2)).fit(torch.randn(9, 2)),
                ValueError,
                "init must hold finite centers",
            ),
            (lambda: KMeans(5).fit(torch.randn(4, 2)), ValueError, "5 clusters need as many rows; got float32 .4, 2."),
            (lambda: KMeans(2).fit(torch.tensor([[1.0], [math.nan]])), ValueError, "x holds NaN or infinity"),
            (lambda: KMeans(2).fit([[1.0], [2.0]]), TypeError, "x must be a torch.Tensor"),  # type: ignore[arg-type]
            (lambda: KMeans(2).fit(torch.randn(4)), ValueError, "x must have shape .N, D."),
            (lambda: KMeans(2).predict(torch.randn(4, 2)), RuntimeError, "call fit first"),
            (lambda: KMeans(2).fit(torch.randn(9, 2)).predict(torch.randn(4, 3)), ValueError, "must have 2 columns"),
        ],
    )
    def test_bad_arguments(self, work: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=f"KMeans.*{says}"):
            work()


class TestDeterminism:
    def test_seed_and_threads(self, place: Place) -> None:
        x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(5)).to(place.device)
        before, models = torch.get_num_threads(), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                models.append(KMeans(12, n_init=2, random_state=3).fit(x))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(models[0].cluster_centers_, models[1].cluster_centers_)
        assert torch.equal(models[0].labels_, models[1].labels_) and models[0].inertia_ == models[1].inertia_
        assert not torch.equal(KMeans(12, n_init=2, random_state=4).fit(x).cluster_centers_, models[0].cluster_centers_)

    def test_torchs_defaults_do_not_matter(self, place: Place) -> None:
        x = torch.randn(300, 3, generator=torch.Generator().manual_seed(5)).to(place.device)
        expected = KMeans(5, n_init=2).fit(x)
        with default_dtype(torch.float64):
            found = [KMeans(5, n_init=2).fit(x)]
        with torch.device("meta"):
            found.append(KMeans(5, n_init=2).fit(x))
        for model in found:
            assert torch.equal(model.cluster_centers_, expected.cluster_centers_)
            assert torch.equal(model.labels_, expected.labels_) and model.inertia_ == expected.inertia_

    def test_the_global_generator_is_left_alone(self) -> None:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        KMeans(3).fit(blobs(3, 2, 9)[0])
        assert torch.equal(torch.rand(3), expected)


class TestElbow:
    def test_a_broken_line_has_its_elbow_where_it_breaks(self) -> None:
        assert find_elbow([2, 3, 4, 5, 6, 7], [100, 60, 20, 18, 16, 14]) == 4
        assert find_elbow(range(1, 11), [1000 / n for n in range(1, 11)]) == 3  # 1/n: 1 - y - x is largest at sqrt(10)

    def test_arrays_and_tensors_are_lists_of_numbers(self) -> None:
        numbers, inertias = [2, 3, 4, 5, 6], [100.0, 40.0, 10.0, 8.0, 7.0]
        assert find_elbow(np.array(numbers), np.array(inertias, np.float32)) == 4
        assert find_elbow(torch.tensor(numbers), torch.tensor(inertias)) == 4
        assert find_elbow(np.array(numbers, np.float32), np.array(inertias)) == 4  # whole, though of another type

    def test_no_elbow(self) -> None:
        assert find_elbow([2, 4, 6, 8], [8.0, 6.0, 4.0, 2.0]) is None  # a straight line
        assert find_elbow([2, 3, 4], [5.0, 5.0, 5.0]) is None

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0.0, 1e6), min_size=4, max_size=20), st.floats(0.5, 2.0), st.floats(-1e3, 1e3))
    def test_the_scale_of_the_curve_does_not_matter(self, falls: list[float], scale: float, shift: float) -> None:
        curve = [float(sum(sorted(falls)[: len(falls) - i])) for i in range(len(falls))]
        numbers = list(range(2, 2 + len(curve)))
        assert find_elbow(numbers, curve) == find_elbow([10 * n for n in numbers], [4 * y for y in curve]) or (
            find_elbow(numbers, curve) is not None
            and find_elbow([10 * n for n in numbers], [4 * y for y in curve]) == 10 * find_elbow(numbers, curve)  # type: ignore[operator]
        )

    def test_as_kneed_where_it_is_installed(self) -> None:
        kneed = pytest.importorskip("kneed", reason="kneed, the criterion's own package, is not installed")
        generator = torch.Generator().manual_seed(6)
        for _ in range(100):
            falls = torch.rand(12, generator=generator).pow(3).sort(descending=True).values
            curve = (falls.sum() - falls.cumsum(0) + 1).tolist()
            theirs = kneed.KneeLocator(list(range(2, 14)), curve, curve="convex", direction="decreasing").knee
            assert find_elbow(range(2, 14), curve) == (None if theirs is None else int(theirs))

    def test_the_number_of_blobs(self, place: Place) -> None:
        generator = torch.Generator().manual_seed(7)
        corners = 10 * torch.eye(5).repeat_interleave(60, 0)  # each as far from all others
        x = (corners + torch.randn(300, 5, generator=generator)).to(place.device)
        found = choose_n_clusters(x, range(2, 12), n_init=3)
        assert isinstance(found, Elbow) and found.found and found.chosen == 5
        assert found.model.n_clusters == 5 and len(found.inertias) == len(found.n_clusters) == 10

    @pytest.mark.parametrize("fallback", [2, np.int64(2)])
    def test_the_fallback(self, fallback: int) -> None:
        x = torch.arange(64.0)[:, None].expand(64, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = choose_n_clusters(x[:3], [1, 2, 3], fallback=fallback)
        assert not found.found and found.chosen == 2 and found.model.n_clusters == 2

    @pytest.mark.parametrize(
        ("candidates", "message"), [(range(2, 60), "59 clusters need as many rows"), ([2, 2, 3], "must ascend; got")]
    )
    def test_nothing_is_fitted_in_vain(self, candidates: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(KMeans, "fit", lambda *_: pytest.fail("it was fitted"))
        with pytest.raises(ValueError, match=message):
            choose_n_clusters(torch.randn(50, 2), candidates)

    @pytest.mark.parametrize(
        ("work", "says"),
        [
            (lambda: find_elbow([2, 3], [1.0, 0.0]), "at least three points"),
            (lambda: find_elbow([2, 3, 4], [1.0, 0.0]), "got 3 and 2"),
            (lambda: find_elbow([2, 4, 3], [3.0, 1.0, 0.0]), "must ascend"),
            (lambda: find_elbow([2.5, 3.5, 4.5, 5.5, 6.5], [100, 1, 0.5, 0.2, 0]), "must be whole numbers; got .2.5"),
            (lambda: find_elbow([2, 3, math.inf], [3.0, 1.0, 0.0]), "must be whole numbers"),
            (lambda: find_elbow([2, 3, 4], [3.0, math.nan, 0.0]), "must be finite"),
            (lambda: find_elbow([2, 3, 4], [math.inf, 1.0, 0.0]), "must be finite"),
            (lambda: choose_n_clusters(torch.randn(9, 2), [2, 3]), "at least three candidates"),
            (lambda: choose_n_clusters(torch.randn(9, 2), [2, 3, 4], fallback=5), "fallback must be a candidate"),
        ],
    )
    def test_bad_arguments(self, work: Any, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            work()
