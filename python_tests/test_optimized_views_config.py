# SPDX-License-Identifier: MIT
"""Optimized views: strategies, whose labels they see, presets, refusals, ablations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="optimized views need the extra protokernels[train]")

from protokernels.data import DataError, ImageDataset, Split
from protokernels.papers import optimized_views as paper
from protokernels.papers._optimized_views_networks import drawn_parameters
from protokernels.papers._optimized_views_scoring import hidden_labels, labelled_images
from protokernels.papers.optimized_views import ABLATIONS, STRATEGIES, OptimizedViewsConfig
from python_tests.data_files import make_arrays, save
from python_tests.test_optimized_views import SMALL, batch, model


class TestStrategies:
    def test_table(self) -> None:
        assert {name: (s.views, s.labels) for name, s in STRATEGIES.items()} == {
            "random": ("uniform", "none"),
            "random+supervision": ("uniform", "share"),
            "self-supervised": ("M", "none"),
            "self-supervised+supervision": ("M", "share"),
            "simclr": ("half", "none"),
            "supervised": ("half", "share"),
            "supervised-all": ("half", "all"),
            "supervised-contrastive": ("half", "share"),
        }
        assert STRATEGIES["self-supervised+supervision"].alphas == (1, 10, 1, 1, 1)
        assert STRATEGIES["random+supervision"].alphas == (0, 0, 1, 10, 10)

    def test_drawn_parameters(self) -> None:
        Lambda, acting = drawn_parameters(4000, True, torch.Generator().manual_seed(0))
        assert acting is not None and acting.shape == (4000, 6)
        assert (acting.double().mean(0) - 0.5).abs().max() < 0.04 and (Lambda.mean(0) - 0.5).abs().max() < 0.03
        again, nothing = drawn_parameters(4000, False, torch.Generator().manual_seed(0))
        assert nothing is None and torch.equal(again, Lambda)

    def test_the_losses_without_pairs(self) -> None:
        x, y, _ = batch()
        network = model(replace(SMALL, strategy="supervised"))
        losses = paper.encoder_losses(network, network.embed(x), None, y)
        assert losses["loss"].item() == pytest.approx(math.log(2), abs=0.3)
        network = model(replace(SMALL, strategy="supervised-contrastive"))
        losses = paper.encoder_losses(network, network.embed(x.flip(2)), network.embed(x), y.clamp(min=0))
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"]) and network.f.blocks[0].weight.grad is not None  # type: ignore[union-attr]

    def test_labels_are_drawn_by_the_seed(self) -> None:
        labels = (np.arange(200) % 4 == 0).astype(np.int64)
        split = Split(np.zeros((200, 4, 4), np.uint8), labels)
        chosen = [labelled_images(split, replace(SMALL, labelled=0.1), seed) for seed in range(3)]
        assert [len(one) for one in chosen] == [20] * 3 and [int(labels[one].sum()) for one in chosen] == [5] * 3
        assert set(chosen[0].tolist()) != set(chosen[1].tolist())
        np.testing.assert_array_equal(chosen[0], labelled_images(split, replace(SMALL, labelled=0.1), 0))
        hidden = hidden_labels(split, chosen[0])
        assert int((hidden >= 0).sum()) == 20 and hidden[chosen[0]].tolist() == labels[chosen[0]].tolist()
        assert len(labelled_images(split, replace(SMALL, strategy="simclr"), 0)) == 0
        assert len(labelled_images(split, replace(SMALL, strategy="supervised-all"), 0)) == 200


class TestConfig:
    def test_presets(self) -> None:
        brats, chest, fair = (
            OptimizedViewsConfig.preset(name, data=data)  # type: ignore[arg-type]
            for name, data in (("paper", "brats"), ("paper", "chest_nih"), ("fair", "brain_tumor"))
        )
        assert (brats.encoder, brats.width, brats.batch_size, brats.epochs, brats.learning_rate) == (
            "convolutional",
            32,
            32,
            100,
            1e-4,
        )
        assert (chest.encoder, chest.batch_size, chest.labelled) == ("densenet121", 16, 0.1)
        assert (brats.rate_of_m, replace(brats, strategy="self-supervised").rate_of_m) == (1e-3, 1e-4)
        assert (brats.normalize, brats.temperature, brats.denominator, brats.sign) == (False, 1.0, "negatives", "text")
        assert (fair.image_size, fair.encoder, fair.normalize, fair.temperature) == (64, "convolutional", True, 0.5)

    def test_official_does_not_exist(self) -> None:
        with pytest.raises(
            ValueError, match="expected one of paper, fair; got 'official': the authors have not released"
        ):
            OptimizedViewsConfig.preset("official")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"strategy": "magic"}, "strategy must be one of random, random\\+supervision"),
            ({"sign": "plus"}, "sign must be one of text, printed"),
            ({"labelled": 0.0}, r"labelled must lie in \(0, 1\]"),
            ({"order": ("blur", "blur")}, "order must name some of blur, noise"),
            ({"order": ()}, "got nothing"),
            ({"order": ("solarise",)}, "got solarise"),
            ({"alphas": (1, 1, 1, 1)}, r"alphas takes a value of type tuple.*; got \(1, 1, 1, 1\)"),
            ({"alphas": (1, 1, -1, 1, 1)}, "alphas must not be negative"),
            ({"m_learning_rate": "high"}, "m_learning_rate takes a value of type float \\| None; got .high."),
            ({"alphas": (1, 1, 1, 1, 1), "strategy": "supervised"}, "the strategy supervised does not minimise"),
            (
                {"alphas": (0, 0, 1, 10, 10), "strategy": "random"},
                "alpha_3, alpha_4 would weigh nothing: the strategy random",
            ),
            ({"alphas": (1, 0, 1, 1, 0), "strategy": "random+supervision"}, "alpha_0 would weigh nothing"),
            ({"alphas": (1, 10, 1, 0, 0), "strategy": "self-supervised"}, "alpha_1 would weigh nothing"),
            ({"image_size": 8}, "at least 16"),
            ({"initial_weights": "x.pth"}, "no ImageNet weights"),
            ({"batch_size": 1}, "batch_size must be at least 2, .*; got 1"),
            ({"batch_size": 1, "strategy": "supervised-contrastive"}, "batch_size must be at least 2, .*; got 1"),
            ({"m_every": 0}, "m_every must be positive"),
            ({"m_learning_rate": 0.0}, "m_learning_rate must be positive or none"),
            ({"temperature": math.nan}, "temperature must be finite"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)

    def test_goes_through_json(self) -> None:
        config = replace(SMALL, alphas=(0.1, 10, 1, 1, 1), order=("crop", "blur"))
        assert OptimizedViewsConfig.from_dict(json.loads(json.dumps(config.record()))) == config
        with pytest.raises(ValueError, match="unknown fields magic"):
            OptimizedViewsConfig.from_dict({"magic": 1})

    def test_ablations_hold_table_2_and_the_readings(self) -> None:
        assert {
            "M-0.1-10-1-1-1",
            "random-0-0-1-10-10",
            "simclr",
            "simclr-order-reversed",
            "sign-printed",
            "sum",
        } <= ABLATIONS.keys()
        base = OptimizedViewsConfig.preset("fair", data="brain_tumor")
        for name, changes in ABLATIONS.items():
            assert (replace(base, **changes) == base) == (name == "full"), name
        assert len([name for name in ABLATIONS if name.startswith(("M-0", "M-1", "random-0"))]) == 6

    def test_more_than_two_classes_are_refused(self, tmp_path: Any) -> None:
        path = save(tmp_path / "three.npz", make_arrays(classes=3))
        with pytest.raises(DataError, match=r"with two classes; .* has 3"):
            paper.load_presence(str(path))
        digits = paper.load_presence("digits")
        assert digits.class_names == ("even", "odd") and set(digits.test.labels.tolist()) == {0, 1}


class TestOwnData:
    """What cannot be trained or scored is named before there is a folder."""

    def own(self, count: int, classes: int = 2, groups: np.ndarray | None = None) -> ImageDataset:
        split = Split(np.zeros((count, 16, 16), np.uint8), np.arange(count) % classes, groups=groups)
        return ImageDataset("mine", split, None, split, tuple("abc"[:classes]))

    @pytest.mark.parametrize(
        ("count", "classes", "patients", "message"),
        [
            (60, 3, None, "asks for the presence of one thing, with two classes; mine has 3: a, b, c"),
            (
                16,
                2,
                None,
                r"cuts the test set into 3 parts and each of them into 3 folds, for which at least 9 images of every class",
            ),
            (
                18,
                2,
                6,
                r"and as many patients where these are known, are needed \(hold_out_sets: 3 parts need at least 3 groups",
            ),
        ],
    )
    def test_refusals(self, count: int, classes: int, patients: int | None, message: str, tmp_path: Path) -> None:
        groups = None if patients is None else (np.arange(count) % patients).astype(str)
        config = OptimizedViewsConfig.preset("fair", image_size=16, width=2, batch_size=8)
        with pytest.raises(DataError, match=message):
            paper.train(config, tmp_path / "run", dataset=self.own(count, classes, groups), quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()

    def test_one_patient_leaves_nobody_to_choose_with(self, tmp_path: Path) -> None:
        config = OptimizedViewsConfig.preset("fair", image_size=16, width=2, batch_size=8)
        dataset = self.own(36, groups=(np.arange(36) // 2).astype(str))
        dataset = replace(dataset, train=replace(dataset.train, groups=np.full(36, "same")))
        with pytest.raises(DataError, match="are of one group"):
            paper.train(config, tmp_path / "run", dataset=dataset, quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()

    def test_enough_is_enough(self) -> None:
        config = OptimizedViewsConfig.preset("fair", image_size=16, width=2, batch_size=8)
        for dataset in (self.own(18), self.own(36, groups=(np.arange(36) // 2).astype(str))):
            paper.EXPERIMENT.check(config, dataset)
