# SPDX-License-Identifier: MIT
"""Nearest neighbours: scikit-learn and the definition as oracles, ties, cancellation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from protokernels.evaluation import knn_predict
from python_tests.blobs import blobs


def direct_knn(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int) -> Tensor:
    """The definition, one query at a time: exact for integers in float64."""
    prediction = []
    for query in queries.double():
        distances = (bank.double() - query).square().sum(dim=1)
        nearest = sorted(range(len(bank)), key=lambda index: (distances[index].item(), index))[:k]
        votes = torch.bincount(labels[nearest], minlength=classes).tolist()
        prediction.append(votes.index(max(votes)))
    return torch.tensor(prediction)


class TestKnn:
    @pytest.mark.parametrize("k", [1, 5, 10])
    @pytest.mark.parametrize("dim", [1, 8, 129])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_sklearn(self, k: int, dim: int, dtype: torch.dtype) -> None:
        bank, labels = blobs(700, dim)
        queries, _ = blobs(151, dim, seed=1)
        bank, queries = bank.to(dtype), queries.to(dtype)
        oracle = KNeighborsClassifier(k, algorithm="brute").fit(bank.double().numpy(), labels.numpy())
        expected = oracle.predict(queries.double().numpy())
        assert knn_predict(bank, labels, queries, k=k, num_classes=4).numpy().tolist() == expected.tolist()

    def test_vote_ties_go_to_the_smallest_label(self) -> None:
        bank = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        labels = torch.tensor([3, 1, 1, 3])
        assert knn_predict(bank, labels, torch.tensor([[0.0]]), k=4, num_classes=4).item() == 1
        assert knn_predict(bank, labels, torch.tensor([[0.0]]), k=1, num_classes=4).item() == 3

    def test_distance_ties_go_to_the_lower_index(self) -> None:
        bank = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        query = torch.tensor([[0.0]])
        assert knn_predict(bank, torch.tensor([2, 1, 0, 0]), query, k=1, num_classes=3).item() == 2
        assert knn_predict(bank, torch.tensor([2, 1, 1, 0]), query, k=3, num_classes=3).item() == 1

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 4), st.integers(1, 7))
    def test_whole_numbers_full_of_ties(self, seed: int, count: int, dim: int, k: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        bank = torch.randint(-2, 3, (count, dim), generator=generator).float()
        labels = torch.randint(3, (count,), generator=generator)
        queries = torch.randint(-2, 3, (7, dim), generator=generator).float()
        k = min(k, count)
        expected = direct_knn(bank, labels, queries, k, 3)
        assert torch.equal(knn_predict(bank, labels, queries, k=k, num_classes=3), expected)

    @pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
    def test_far_from_the_origin(self, offset: float) -> None:
        # |x|^2 + |y|^2 - 2 x.y alone would lose these distances: offset^2 swallows them
        bank, labels = blobs(300, 4)
        queries, _ = blobs(40, 4, seed=1)
        bank, queries = bank.double().round(decimals=3) + offset, queries.double().round(decimals=3) + offset
        expected = direct_knn(bank, labels, queries, 5, 4)
        assert torch.equal(knn_predict(bank, labels, queries, num_classes=4), expected)

    def test_two_far_groups_of_close_neighbours(self) -> None:
        # centring cannot help here; the exact comparison has to
        generator = torch.Generator().manual_seed(0)
        side = torch.tensor([-1.0, 1.0]).repeat_interleave(100)[:, None] * 1e8
        bank = side.double() + torch.randn(200, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (200,), generator=generator)
        queries = bank[::7] + 1e-3
        assert torch.equal(knn_predict(bank, labels, queries, num_classes=3), direct_knn(bank, labels, queries, 5, 3))

    def test_collapsed_embeddings(self) -> None:
        labels = torch.tensor([1] * 4 + [0] * 96)
        same = torch.full((100, 8), 0.1)
        assert knn_predict(same, labels, same[:5], k=5, num_classes=2).tolist() == [1] * 5  # indices 0 to 4

    def test_threads_and_repeats_do_not_show(self) -> None:
        before = torch.get_num_threads()
        bank, labels = blobs(2000, 16)
        queries, _ = blobs(301, 16, seed=1)
        expected = knn_predict(bank, labels, queries, num_classes=4)
        try:
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                assert torch.equal(knn_predict(bank, labels, queries, num_classes=4), expected)
        finally:
            torch.set_num_threads(before)

    def test_half_precision_and_gradients(self) -> None:
        bank, labels = blobs(50)
        prediction = knn_predict(bank.bfloat16().requires_grad_(), labels, bank.bfloat16(), k=1, num_classes=4)
        assert torch.equal(prediction, labels) and not prediction.requires_grad

    def test_degenerate_and_refused(self) -> None:
        x, y = blobs(10)
        assert knn_predict(x, y, x[:0], num_classes=4).shape == (0,)
        assert knn_predict(x[:1], y[:1], x, k=1, num_classes=4).tolist() == [y[0].item()] * 10
        poisoned = x.clone()
        poisoned[3, 1] = torch.nan
        for arguments, reason in (
            ((x, y, x, 11), r"k must lie in 1\.\.10, the size of the bank; got 11"),
            ((x, y, x, 0), "k must lie in"),
            ((poisoned, y, x, 5), r"train_embeddings must be finite; 1 of 10 rows .* \(the first is row 3\)"),
            ((x, y, poisoned / 0.0, 5), "queries must be finite"),
            ((x, y, x[:, :3], 5), r"queries must have the shape \[N, 8\]"),
            ((x, y + 4, x, 5), r"train_labels must lie in 0\.\.3"),
            ((x[:0], y[:0], x, 1), "at least 1"),
        ):
            bank, labels, queries, k = arguments
            with pytest.raises(ValueError, match=reason):
                knn_predict(bank, labels, queries, k=k, num_classes=4)
