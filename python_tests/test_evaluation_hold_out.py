# SPDX-License-Identifier: MIT
"""Linear evaluation inside hold-out sets: against scikit-learn by hand, groups, what cannot be scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the linear evaluation needs scikit-learn")

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from protokernels.evaluation import cross_validated_auc, hold_out_sets, linear_evaluation


def made(count: int = 120, strength: float = 1.0) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features whose first column tells the class a little; four images a group; a quarter positive."""
    generator = np.random.default_rng(0)
    labels = (np.arange(count) % 4 == 0).astype(np.int64)
    features = generator.normal(size=(count, 5)) * [1, 10, 0.1, 1, 1]
    features[:, 0] += strength * labels
    groups = np.array([f"p{index}" for index in np.arange(count) // 4])
    return torch.tensor(features), labels, groups


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs in the right order, ties half."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


class TestHoldOut:
    @pytest.mark.parametrize("grouped", [True, False])
    def test_against_scikit_learn_by_hand(self, grouped: bool) -> None:
        features, labels, groups = made()
        of = groups if grouped else None
        kind = StratifiedGroupKFold if grouped else StratifiedKFold
        result = linear_evaluation(features, labels, of, seed=4)
        x, means = features.numpy(), []
        for number, (_, held) in enumerate(kind(3, shuffle=True, random_state=4).split(x, labels, of), start=1):
            held, areas = np.sort(held), []
            own = None if of is None else of[held]
            for train, test in kind(3, shuffle=True, random_state=4).split(x[held], labels[held], own):
                part = x[held][train]
                mean, deviation = part.mean(axis=0), part.std(axis=0)
                probe = LogisticRegression(max_iter=1000).fit((part - mean) / deviation, labels[held][train])
                scores = (x[held][test] - mean) / deviation @ probe.coef_[0]
                areas.append(area(scores, labels[held][test]))
            row = result["sets"][str(number)]
            assert row["auc"] == pytest.approx(np.mean(areas), abs=1e-12)
            assert (row["images"], row["positive"], row["folds"]) == (len(held), labels[held].sum(), 3)
            means.append(np.mean(areas))
        assert result["auc"] == pytest.approx(np.mean(means)) and result["auc_std"] == pytest.approx(
            np.std(means, ddof=1)
        )

    @pytest.mark.parametrize("kind", [np.uint8, np.int32, bool, torch.tensor, list])
    def test_labels_are_whole_numbers_of_any_type(self, kind: Any) -> None:
        features, labels, groups = made()
        given = labels.astype(kind) if isinstance(kind, type) and kind is not list else kind(labels)
        assert linear_evaluation(features, given, list(groups)) == linear_evaluation(features, labels, groups)
        assert cross_validated_auc(features, given, list(groups)) == cross_validated_auc(features, labels, groups)

    def test_sets_share_no_group_and_hold_everything(self) -> None:
        _, labels, groups = made()
        parts = hold_out_sets(labels, groups)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        owners = [set(groups[part]) for part in parts]
        assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
        again = hold_out_sets(labels, groups)
        assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))

    def test_a_repeated_image_helps_nobody_when_groups_are_kept(self) -> None:
        """Features that name the patient and nothing else: with groups the probe can only guess."""
        generator = np.random.default_rng(0)
        owners = np.arange(360) // 12
        labels = generator.integers(0, 2, 30)[owners]
        features = torch.tensor(generator.normal(size=(30, 40))[owners])
        kept = linear_evaluation(features, labels, owners.astype(str))["auc"]
        assert linear_evaluation(features, labels)["auc"] > 0.9 and kept < 0.75

    def test_perfect_and_useless_features(self) -> None:
        _, labels, groups = made()
        assert linear_evaluation(torch.tensor(labels, dtype=torch.float32)[:, None], labels, groups)["auc"] == 1
        assert linear_evaluation(torch.zeros(120, 3), labels, groups)["auc"] == 0.5

    def test_folds_with_one_class_are_left_out(self) -> None:
        features, _, groups = made(36)
        labels = (groups == "p0").astype(np.int64)  # all positive images belong to one patient
        areas = cross_validated_auc(features, labels, groups)
        assert areas == []
        assert "auc" not in linear_evaluation(features, labels, groups, sets=1 + 1, folds=2)

    def test_nothing_is_modified_and_refusals(self) -> None:
        features, labels, groups = made()
        before = features.clone()
        linear_evaluation(features, labels, groups)
        assert torch.equal(features, before)
        with pytest.raises(ValueError, match="diverged"):
            linear_evaluation(features * torch.nan, labels, groups)
        with pytest.raises(ValueError, match="3 parts need at least 3 groups; got 2"):
            hold_out_sets(labels[:8], groups[:8])
        with pytest.raises(ValueError, match="images of a class; got 2"):
            hold_out_sets(labels[:8])
        with pytest.raises(ValueError, match="labels"):
            cross_validated_auc(features, labels + 1, groups)
