# SPDX-License-Identifier: MIT
"""The benchmark of a step of Hu et al. runs in every line, and its transcription of the released loss is ours."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

import protokernels
from benchmarks.local_contrast_steps import LINES, ellipses, measure, released_loss, table
from protokernels.papers.local_contrast import LocalContrastConfig


@pytest.mark.usefixtures("own_threads")
def test_every_line() -> None:
    config = LocalContrastConfig.preset("fair", data="phantom", image_size=32, width=2, depth=3)
    lines = [measure(line, config, rounds=1) for line in LINES]
    assert all(line["step_ms"] > 0 and line["loss_ms"] > 0 and line["views_ms"] > 0 for line in lines)
    text = table(lines)
    assert all(f"| {line} |" in text for line in LINES) and text.count("times as long") == 2


@pytest.mark.parametrize("places", [{"block_size": 8}, {"stride": 4}])
def test_the_released_loss(places: dict[str, int]) -> None:
    f = torch.randn(4, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    y = ellipses(2, 32).repeat(2, 1, 1)
    expected = released_loss(f, y, temperature=0.1, block_size=places.get("block_size"), stride=places.get("stride"))
    torch.testing.assert_close(protokernels.local_contrastive_loss(f, y, temperature=0.1, **places), expected)
