# SPDX-License-Identifier: MIT
"""The contrastive autoencoder's settings: presets, refusals, and the views that they describe."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="the papers need the extra protokernels[train]")

from protokernels.papers.contrastive_autoencoder import CONFIG

TINY = CONFIG.preset(
    "paper", "digits", epochs=3, warmup_epochs=2, ramp_epochs=1, batch_size=300, image_size=16, latent_dim=8,
    encoder_widths=(4, 8, 8), decoder_widths=(8, 4), most_clusters=6, subset=200,
)  # fmt: skip


def images(number: int, side: int = 16) -> Tensor:
    return torch.rand(number, 1, side, side, generator=torch.Generator().manual_seed(number))


class TestViews:
    def test_the_papers_transformations_half_of_the_time_each(self) -> None:
        views = CONFIG.preset("paper").views()
        drawn = views.draw(20_000, generator=torch.Generator().manual_seed(0))
        turned, blurred, noisy = drawn.angle != 0, drawn.sigma != 0, drawn.noise_std != 0
        cropped = drawn.box[:, 2:].prod(dim=1) < 1
        for happens in (turned, blurred, noisy, cropped, drawn.mirror[:, 0]):
            assert happens.double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert drawn.angle.abs().max().item() == pytest.approx(math.radians(30), rel=1e-3)
        assert drawn.sigma[blurred].min() >= 0.1 and drawn.sigma.max() <= 2 and drawn.noise_std.max() <= 0.1
        assert drawn.box[:, 2:].prod(dim=1).min() >= 0.48  # half of the area, sides cut to the image's
        assert not drawn.mirror[:, 1].any() and (drawn.brightness == 1).all()

    def test_the_blur_has_five_taps_where_the_text_or_the_code_is_followed(self) -> None:
        for preset, radius in (("paper", 2), ("official", 2), ("fair", None)):
            for strength in CONFIG.preset(preset).views().strengths:  # type: ignore[arg-type]
                assert strength.blur_radius == radius
        record = asdict(CONFIG.preset("fair"))
        del record["blur_radius"]  # of a run that is older than the field
        assert CONFIG.from_dict(record) == CONFIG.preset("fair")

    def test_switched_off_they_leave_an_image_as_it_is(self) -> None:
        still = replace(TINY, view_probability=0.0, blur_sigma=0.0, noise_std=0.0)
        x = images(5)
        for view in still.views()(x):
            torch.testing.assert_close(view, x, rtol=0, atol=1e-6)
        assert not replace(TINY, flip=False).views().draw(100).mirror.any()


class TestConfig:
    def test_presets(self) -> None:
        shared = (
            "epochs",
            "warmup_epochs",
            "optimizer",
            "first_rate",
            "learning_rate",
            "last_rate",
            "ramp_epochs",
            "alpha",
        )
        for name in ("paper", "official"):
            config = CONFIG.preset(name, "pneumoniamnist")  # type: ignore[arg-type]
            assert [getattr(config, key) for key in shared] == [100, 50, "lars", 0.01, 0.25, 0.05, 10, 0.1]
            assert (config.temperature, config.denominator, config.image_size, config.latent_dim) == (
                0.5,
                "all",
                32,
                128,
            )
            assert (config.batch_size, config.subset, config.label_share, config.knn_k) == (500, 3000, 0.2, 5)
            assert CONFIG.preset(name, "mnist").batch_size == 1000  # type: ignore[arg-type]
        paper_, official = CONFIG.preset("paper"), CONFIG.preset("official")
        assert (paper_.condition, paper_.refresh_prototypes, paper_.cluster_on) == ("concatenated", False, "views")
        assert (official.condition, official.refresh_prototypes, official.similarity) == ("ignored", True, "dot")
        assert CONFIG.preset("fair", "pneumoniamnist", epochs=30).epochs == 30
        assert CONFIG.from_dict({**asdict(TINY), "encoder_widths": [4, 8, 8]}) == TINY  # lists, as JSON gives them

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"learning_rate": math.nan}, "learning_rate must be finite"),
            ({"alpha": -1.0}, "alpha must not be negative"),
            ({"warmup_epochs": 3}, "got 3 of 3"),
            ({"batch_size": 1}, "batch_size must be at least 2, .*; got 1"),
            ({"most_clusters": 3}, "three candidates"),
            ({"label_share": 0.0}, "label_share"),
            ({"subset": 4}, "too small"),
            ({"noise_std": -1.0}, "noise_std"),
            ({"blur_radius": -1}, r"blur_radius must lie in \[0, 64\]; got -1"),
            ({"crop_scale": 0.0}, "crop_scale"),
            ({"knn_k": 0}, "knn_k must be positive"),  # else an error after training
            ({"latent_dim": 0}, "latent_dim must be positive"),
            ({"seed_channels": -1}, "seed_channels must be positive"),
            ({"encoder_widths": ()}, "encoder_widths must hold at least one width"),
            ({"encoder_widths": (4.5,)}, r"encoder_widths takes a value of type tuple\[int, \.\.\.\]; got \(4.5,\)"),
            ({"decoder_widths": (4, 0)}, r"decoder_widths must hold .* of at least 1; got \(4, 0\)"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)

    def test_other_refusals(self) -> None:
        with pytest.raises(ValueError, match="paper, official, fair"):
            CONFIG.preset("best")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="unknown fields speed"):
            CONFIG.from_dict({"speed": 1})
