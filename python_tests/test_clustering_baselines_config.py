# SPDX-License-Identifier: MIT
"""VAESim's baselines: presets, what they refuse, and how they come back from a run folder."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels.baselines import CLUSTERING_BASELINES, vae_kmeans


def config_of(name: str) -> Any:
    return importlib.import_module(f"protokernels.baselines.{name}").BASELINE.CONFIG


class TestConfig:
    @pytest.mark.parametrize("name", CLUSTERING_BASELINES)
    @pytest.mark.parametrize("data", ["digits", "mnist", "pneumoniamnist"])
    def test_presets_come_back_from_json(self, name: str, data: str) -> None:
        for preset in config_of(name).PRESETS:
            config = config_of(name).preset(preset, data)
            assert config.preset_name == preset and config.data == data
            assert config_of(name).from_dict(json.loads(json.dumps(asdict(config)))) == config

    def test_published_settings(self) -> None:
        official = vae_kmeans.VAEKMeansConfig.preset("official", "pneumoniamnist")
        assert (official.beta, official.prior_std, official.learning_rate, official.batch_size) == (
            1.0,
            1.0,
            1e-4,
            2000,
        )
        assert (official.epochs, official.knn_k, official.networks) == (20, 10, "official-pneumonia")
        assert official.candidates == (2, 4, 5, 8, 10, 12, 15, 18, 20, 25, 30, 40, 50)
        assert official.learning_rate_factor(19) == 1.0
        assert vae_kmeans.VAEKMeansConfig.preset("paper", "mnist").batch_size == 2048  # the text's, not the code's
        matched = vae_kmeans.VAEKMeansConfig.preset("matched", "mnist")
        assert (matched.beta, matched.prior_std, matched.candidates) == (0.16, 0.8, (5, 10, 15, 20, 25, 30, 35, 40, 50))

    def test_a_transferred_network_keeps_its_rate_in_the_paper_preset_only(self) -> None:
        paper, fair = (config_of("resnet_transfer").preset(name, "pneumoniamnist") for name in ("paper", "fair"))
        assert (paper.epochs, paper.learning_rate, paper.image_size) == (10, 1e-4, 224)
        assert {paper.learning_rate_factor(epoch) for epoch in range(10)} == {1.0}
        assert fair.learning_rate_factor(0) == 1 and fair.learning_rate_factor(fair.epochs - 1) < 0.1

    @pytest.mark.parametrize("name", CLUSTERING_BASELINES)
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epochs": 0}, "epochs must be positive; got 0"),
            ({"learning_rate": math.nan}, "learning_rate must be finite; got nan"),
            ({"batch_size": -1}, "batch_size must be positive"),
            ({"knn_k": 0}, "knn_k must be positive"),
        ],
    )
    def test_shared_refusals(self, name: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            config_of(name).preset("fair", **changes)
        with pytest.raises(ValueError, match=r"expected one of .*fair; got 'best'"):
            config_of(name).preset("best")
        with pytest.raises(ValueError, match="unknown fields speed"):
            config_of(name).from_dict({"speed": 1})

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("vae_kmeans", {"candidates": ()}, "rising order; got"),
            ("vae_kmeans", {"candidates": (5, 5)}, "rising order; got"),
            ("vae_kmeans", {"candidates": (0, 5)}, "at least 1"),
            ("vae_kmeans", {"beta": -0.1}, "beta must not be negative"),
            ("vae_kmeans", {"prior_std": 0.0}, "prior_std must be positive"),
            ("gmvae", {"end_temperature": 2.0}, "falls from start_temperature"),
            ("gmvae", {"end_temperature": 0.0}, "end_temperature must be positive"),
            ("gmvae", {"temperature_rate": -1.0}, "temperature_rate of at least 0"),
            ("gmvae", {"num_clusters": 0}, "num_clusters must be positive"),
            ("vade", {"pretraining_epochs": -1}, "pretraining_epochs must not be negative"),
            ("vade", {"hidden": ()}, "hidden must hold at least one"),
            ("vade", {"decay": 0.0}, "decay must lie in"),
            ("resnet_transfer", {"image_size": 28}, "at least 32 pixels; got 28"),
            ("resnet_transfer", {"frozen": True}, "frozen network needs initial_weights"),
        ],
    )
    def test_refusals(self, name: str, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            config_of(name).preset("fair", **changes)
