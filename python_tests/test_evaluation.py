# SPDX-License-Identifier: MIT
"""Evaluation: closed forms, scikit-learn as the oracle, no leak from the test split, the same numbers on every run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch import Tensor, nn

from protokernels.evaluation import (
    AdamWProtocol,
    EvaluationConfig,
    Labelled,
    LinearProbe,
    LinearProtocol,
    Representation,
    TransferConfig,
    auroc,
    classification_scores,
    clustering_scores,
    evaluate_representation,
    evaluate_transfer,
    fine_tune,
    knn_predict,
    label_subsets,
    linear_probe,
    statistical_mapping,
    tsne_embedding,
)
from python_tests.blobs import blobs


def representations() -> tuple[Representation, Representation]:
    """A train and a test split with 6 clusters."""
    splits = []
    for seed, count in ((1, 300), (2, 120)):
        embeddings, labels = blobs(count, seed=seed)
        centers = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
        splits.append(Representation(embeddings, labels, torch.cdist(embeddings, centers).argmin(dim=1)))
    return splits[0], splits[1]


class TestRepresentation:
    def test_refuses_other_shapes_and_dtypes(self) -> None:
        x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
        assert len(Representation(x, y, y)) == 3
        for bad in ((x[0], y, None), (x.long(), y, None), (x, y.int(), None), (x, y[:2], None), (x, y, y[:, None])):
            with pytest.raises(ValueError, match="Representation"):
                Representation(*bad)
        with pytest.raises(ValueError, match="clusters must not be negative; the smallest is -1"):
            Representation(x, y, y - 1)


class TestStatisticalMapping:
    def test_by_hand(self) -> None:
        clusters = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
        labels = torch.tensor([2, 2, 1, 1, 0, 2, 2, 1, 1])
        train = Representation(torch.zeros(9, 1), labels, clusters)
        # cluster 0: mode 2; 1: tie of 0 and 1, the smaller; 2: tie of 1 and 2, the smaller; 3, 4: empty, global tie of 1 and 2 (4 each): 1
        assert statistical_mapping(train, 3, 5).tolist() == [2, 0, 1, 1, 1]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
    def test_equals_counting_in_python(self, seed: int, count: int, classes: int, clusters: int) -> None:
        generator = np.random.default_rng(seed)
        labels, members = generator.integers(0, classes, count), generator.integers(0, clusters, count)
        train = Representation(torch.zeros(count, 1), torch.from_numpy(labels), torch.from_numpy(members))

        def mode(values: list[int]) -> int:
            return min(set(values), key=lambda value: (-values.count(value), value))

        expected = [
            mode(labels[members == cluster].tolist()) if (members == cluster).any() else mode(labels.tolist())
            for cluster in range(clusters)
        ]
        assert statistical_mapping(train, classes, clusters).tolist() == expected

    def test_refusals(self) -> None:
        train, _ = representations()
        assert train.clusters is not None
        with pytest.raises(ValueError, match="no clusters"):
            statistical_mapping(replace(train, clusters=None), 4, 6)
        with pytest.raises(ValueError, match=r"clusters must lie in 0\.\.1"):
            statistical_mapping(train, 4, 2)
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            statistical_mapping(train, 3, 6)
        empty = torch.zeros(0, dtype=torch.int64)
        with pytest.raises(ValueError, match="empty"):
            statistical_mapping(Representation(torch.zeros(0, 2), empty, empty), 4, 6)


class TestScores:
    @settings(max_examples=80, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 6))
    def test_equals_sklearn(self, seed: int, count: int, classes: int) -> None:
        generator = np.random.default_rng(seed)
        target = generator.integers(0, classes, count)
        prediction = np.where(generator.random(count) < 0.5, target, generator.integers(0, classes, count))
        scores = classification_scores(torch.from_numpy(prediction), torch.from_numpy(target), classes)
        assert scores["accuracy"] == pytest.approx(accuracy_score(target, prediction))
        for average in ("macro", "weighted"):
            expected = precision_recall_fscore_support(target, prediction, average=average, zero_division=0)
            for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
                assert scores[f"{average}_{name}"] == pytest.approx(value)
        assert scores["majority_rate"] == pytest.approx(np.bincount(target).max() / count)

    def test_by_hand(self) -> None:
        # class 0: 2 present, predicted once, rightly; class 1: 3 present, 2 hits in 3 predictions; one prediction of no class
        scores = classification_scores(torch.tensor([0, 1, 1, 1, 7]), torch.tensor([0, 0, 1, 1, 1]), 2)
        expected = {
            "accuracy": 3 / 5,
            "macro_precision": (1 + 2 / 3) / 2,
            "macro_recall": (1 / 2 + 2 / 3) / 2,
            "macro_f1": (2 / 3 + 2 / 3) / 2,
            "weighted_precision": 2 / 5 * 1 + 3 / 5 * 2 / 3,
            "weighted_recall": 3 / 5,
            "weighted_f1": 2 / 3,
            "majority_rate": 3 / 5,
        }
        assert scores == pytest.approx(expected)

    def test_refusals(self) -> None:
        y = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="at least one sample"):
            classification_scores(y[:0], y[:0], 2)
        for prediction in (y[:1], y.float(), y - 1):
            with pytest.raises(ValueError, match="prediction must be"):
                classification_scores(prediction, y, 2)
        with pytest.raises(ValueError, match=r"target must lie in 0\.\.0"):
            classification_scores(y, y, 1)


class TestClusteringScores:
    def test_renamed_classes_are_perfect(self) -> None:
        target = torch.tensor([0, 0, 1, 1, 2, 2])
        scores = clustering_scores(torch.tensor([7, 7, 3, 3, 900, 900]), target)
        assert scores == pytest.approx({"nmi": 1, "ari": 1, "hungarian_accuracy": 1, "clusters_used": 3})

    def test_more_clusters_than_classes(self) -> None:
        # four pure clusters, two classes: one to one, only one cluster per class counts
        scores = clustering_scores(torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        assert scores["hungarian_accuracy"] == pytest.approx(5 / 8)
        entropy = -sum(share * math.log(share) for share in (3 / 8, 1 / 8, 2 / 8, 2 / 8))
        assert scores["nmi"] == pytest.approx(math.log(2) / ((entropy + math.log(2)) / 2))

    def test_fewer_clusters_than_classes(self) -> None:
        target = torch.tensor([0, 0, 1, 2])
        one = clustering_scores(torch.zeros(4, dtype=torch.int64), target)
        assert one == pytest.approx({"nmi": 0, "ari": 0, "hungarian_accuracy": 0.5, "clusters_used": 1})

    def test_the_matching_is_optimal(self) -> None:
        # greedy matching (cluster 0 to class 0 with 4) reaches 4 + 0; the best is 3 + 3
        clusters = torch.tensor([0] * 7 + [1] * 3)
        target = torch.tensor([0] * 4 + [1] * 3 + [0] * 3)
        assert clustering_scores(clusters, target)["hungarian_accuracy"] == pytest.approx(6 / 10)

    def test_independent_clusters_have_no_information(self) -> None:
        clusters, target = torch.arange(4).repeat(100), torch.arange(4).repeat_interleave(100)
        scores = clustering_scores(clusters, target)
        assert scores["nmi"] == pytest.approx(0, abs=1e-12) and scores["hungarian_accuracy"] == pytest.approx(0.25)

    def test_refusals(self) -> None:
        y = torch.tensor([0, 1])
        for clusters, target in ((y[:0], y[:0]), (y[:1], y), (y.float(), y)):
            with pytest.raises(ValueError, match="clustering_scores"):
                clustering_scores(clusters, target)


class TestEvaluateRepresentation:
    def test_agrees_with_its_parts(self) -> None:
        train, test = representations()
        assert test.clusters is not None
        config = EvaluationConfig(knn_k=7, linear_protocol="fair")
        scores = evaluate_representation(train, test, num_classes=4, num_clusters=6, config=config, seed=1)
        assert list(scores) == ["statistical", "knn", "linear", "clustering", "majority"]
        mapping = statistical_mapping(train, 4, 6)
        neighbours = knn_predict(train.embeddings, train.labels, test.embeddings, k=7, num_classes=4)
        assert scores["statistical"] == classification_scores(mapping[test.clusters], test.labels, 4)
        assert scores["knn"] == classification_scores(neighbours, test.labels, 4)
        assert scores["clustering"] == clustering_scores(test.clusters, test.labels)
        majority = int(torch.bincount(train.labels).argmax())
        assert scores["majority"]["accuracy"] == pytest.approx(float((test.labels == majority).float().mean()))
        assert scores["majority"]["accuracy"] < scores["linear"]["accuracy"]

    @pytest.mark.parametrize("protocol", ["paper", "official", "fair"])
    def test_test_labels_change_no_prediction(self, protocol: LinearProtocol, monkeypatch: pytest.MonkeyPatch) -> None:
        train, test = representations()
        config = EvaluationConfig(linear_protocol=protocol)
        seen: list[Tensor] = []

        def spy(prediction: Tensor, target: Tensor, num_classes: int) -> dict[str, float]:
            seen.append(prediction.clone())
            return classification_scores(prediction, target, num_classes)

        monkeypatch.setattr("protokernels.evaluation.evaluate.classification_scores", spy)
        for labels in (test.labels, 3 - test.labels, torch.zeros_like(test.labels)):
            evaluate_representation(train, replace(test, labels=labels), num_classes=4, config=config)
        assert len(seen) == 12
        for first, second, third in zip(seen[:4], seen[4:8], seen[8:], strict=True):
            assert torch.equal(first, second) and torch.equal(first, third)

    def test_the_rest_of_the_test_split_changes_no_prediction(self) -> None:
        # one sample scored alone is predicted as within the split
        train, test = representations()
        assert test.clusters is not None
        config = EvaluationConfig(linear_protocol="fair")
        hits = torch.zeros(3)
        for index in range(20):
            one = Representation(test.embeddings[index, None], test.labels[index, None], test.clusters[index, None])
            scores = evaluate_representation(train, one, num_classes=4, num_clusters=6, config=config)
            hits += torch.tensor([scores[name]["accuracy"] for name in ("statistical", "knn", "linear")])
        part = Representation(test.embeddings[:20], test.labels[:20], test.clusters[:20])
        scores = evaluate_representation(train, part, num_classes=4, num_clusters=6, config=config)
        together = torch.tensor([20 * scores[name]["accuracy"] for name in ("statistical", "knn", "linear")])
        torch.testing.assert_close(hits, together)

    def test_same_seed_same_numbers(self) -> None:
        train, test = representations()
        first, second, other = (evaluate_representation(train, test, num_classes=4, seed=seed) for seed in (1, 1, 2))
        assert first == second
        assert {key: value for key, value in first.items() if key != "linear"} == {
            key: value for key, value in other.items() if key != "linear"
        }

    def test_without_clusters_and_with_unseen_ones(self) -> None:
        train, test = representations()
        assert test.clusters is not None
        plain = evaluate_representation(replace(train, clusters=None), replace(test, clusters=None), num_classes=4)
        assert list(plain) == ["knn", "linear", "majority"]
        unseen = replace(test, clusters=test.clusters + 100)
        scores = evaluate_representation(train, unseen, num_classes=4)
        assert scores["statistical"] == scores["majority"]  # every cluster unseen: the global mode

    def test_collapsed_model(self) -> None:
        train, test = representations()
        flat = [
            Representation(torch.zeros_like(split.embeddings), split.labels, torch.zeros_like(split.labels))
            for split in (train, test)
        ]
        scores = evaluate_representation(*flat, num_classes=4)
        assert scores["statistical"] == scores["majority"]
        assert all(math.isfinite(value) for group in scores.values() for value in group.values())

    def test_refusals(self) -> None:
        train, test = representations()
        nothing = Representation(test.embeddings[:0], test.labels[:0])
        diverged = replace(test, embeddings=test.embeddings * torch.nan)
        for left, right, reason in (
            (train, replace(test, clusters=None), "for one only"),
            (train, nothing, "test split is empty"),
            (train, diverged, "must be finite"),
            (diverged, test, "must be finite"),
        ):
            with pytest.raises(ValueError, match=reason):
                evaluate_representation(left, right, num_classes=4)
        with pytest.raises(ValueError, match=r"test clusters must lie in 0\.\.5"):
            assert test.clusters is not None
            high = replace(test, clusters=test.clusters + 6)
            evaluate_representation(train, high, num_classes=4, num_clusters=6)


class TestTsne:
    def test_separates_groups_and_keeps_indices(self) -> None:
        x, y = blobs(150, classes=3, spread=0.05)
        result = tsne_embedding(x, perplexity=20, max_samples=90, extra=x[:3])
        assert result.points.shape == (90, 2) and result.perplexity == 20
        assert result.extra_points is not None and result.extra_points.shape == (3, 2)
        assert result.indices.tolist() == sorted(set(result.indices.tolist())) and len(result.indices) == 90
        labels = y[result.indices]
        nearest = knn_predict(result.points, labels, result.extra_points, k=5, num_classes=3)
        assert torch.equal(nearest, y[:3])  # rows embedded jointly land among their class

    def test_far_from_0_the_neighbours_are_the_same(self) -> None:
        """float32 holds multiples of 64 there."""
        x, y = blobs(60, classes=2)
        points = tsne_embedding(x.double() + 1e9, perplexity=10).points
        assert torch.equal(y[torch.cdist(points, points).topk(2, largest=False).indices[:, 1]], y)

    def test_same_seed_same_map(self) -> None:
        x, _ = blobs(80)
        first, second, other = (tsne_embedding(x, seed=seed, max_samples=60) for seed in (1, 1, 2))
        assert torch.equal(first.points, second.points) and torch.equal(first.indices, second.indices)
        assert not torch.equal(first.indices, other.indices)
        assert first.perplexity == pytest.approx(59 / 3)

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 10])
    @pytest.mark.parametrize("constant", [True, False])
    @pytest.mark.parametrize("dim", [1, 3])
    def test_few_samples_and_constant_ones(self, count: int, constant: bool, dim: int) -> None:
        x = torch.ones(count, dim) if constant else torch.randn(count, dim, generator=torch.Generator().manual_seed(0))
        result = tsne_embedding(x)
        assert result.points.shape == (count, 2) and bool(torch.isfinite(result.points).all())

    def test_refusals(self) -> None:
        x, _ = blobs(10)
        with pytest.raises(ValueError, match="must be finite"):
            tsne_embedding(x / 0.0)
        with pytest.raises(ValueError, match=r"extra must have the shape \[E, 8\]"):
            tsne_embedding(x, extra=x[:, :2])
        with pytest.raises(ValueError, match="must be positive"):
            tsne_embedding(x, perplexity=0)


class TestNumPysArrays:
    """Tensors are expected; an array is named, and how to pass it."""

    @pytest.mark.parametrize(
        "work",
        [
            lambda x, y: Representation(x, y),
            lambda x, y: Representation(torch.from_numpy(x), y),
            lambda x, y: knn_predict(x, torch.from_numpy(y), torch.from_numpy(x), num_classes=2),
            lambda x, y: knn_predict(torch.from_numpy(x), y, torch.from_numpy(x), num_classes=2),
            lambda x, y: knn_predict(torch.from_numpy(x), torch.from_numpy(y), x, k=1, num_classes=2),
            lambda x, y: linear_probe(x, torch.from_numpy(y), num_classes=2),
            lambda x, y: LinearProbe(torch.ones(2, 2), torch.ones(2), "fair").predict(x),
            lambda x, y: classification_scores(y, torch.from_numpy(y), 2),
            lambda x, y: classification_scores(torch.from_numpy(y), y, 2),
            lambda x, y: clustering_scores(y, y),
            lambda x, y: auroc(x, torch.from_numpy(y), ["a", "b"]),
            lambda x, y: auroc(torch.from_numpy(x), y, ["a", "b"]),
            lambda x, y: auroc(torch.from_numpy(x), np.eye(2)[y], ["a", "b"]),
            lambda x, y: label_subsets(y, [1.0], num_classes=2),
            lambda x, y: tsne_embedding(x),
            lambda x, y: Labelled(torch.from_numpy(x), y),
        ],
    )
    def test_they_are_refused_by_name(self, work: Callable[[np.ndarray, np.ndarray], object]) -> None:
        with pytest.raises(ValueError, match=r"got a numpy.ndarray .*; pass torch.from_numpy\(...\) of it"):
            work(np.zeros((4, 2), np.float32), np.arange(4) % 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transfer_trains_also_where_gradients_are_off(mode: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    encoder, images, targets = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()),
        torch.rand(24, 1, 6, 6),
        torch.arange(24) % 2,
    )
    parts = [Labelled(images[start::3], targets[start::3]) for start in range(3)]
    protocol = AdamWProtocol(learning_rate=1e-2, epochs=2, patience=2, batch_size=4)
    config = TransferConfig(fractions=(1.0,), fine_tune_fractions=(1.0,), fine_tune=protocol)
    with mode():
        found = evaluate_transfer(encoder, *parts, class_names=["even", "odd"], config=config)
    assert found == evaluate_transfer(encoder, *parts, class_names=["even", "odd"], config=config)


def test_fine_tuning_names_targets_that_do_not_fit() -> None:
    """They were an IndexError of the loss."""
    images, labels, protocol = torch.rand(6, 1, 8, 8), torch.arange(6) % 3, AdamWProtocol(1e-3, 1, 1, 4)
    train, several = Labelled(images, labels), Labelled(images, F.one_hot(labels).float())
    with pytest.raises(ValueError, match=r"fine_tune: targets must lie in 0\.\.1; got 0\.\.2"):
        fine_tune(nn.Flatten(), train, train, 2, protocol)
    with pytest.raises(ValueError, match=r"fine_tune: targets must be .* zeros and ones of shape \[6, 2\]"):
        fine_tune(nn.Flatten(), several, several, 2, protocol)
    with pytest.raises(
        ValueError, match="fine_tune: train and val must both have one label per image, or both several"
    ):
        fine_tune(nn.Flatten(), train, several, 3, protocol)
