# SPDX-License-Identifier: MIT
"""The benchmark of the trainers' steps runs in every line, and its transcription of the released prototypes is ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from benchmarks.trainer_steps import LINES, UNCOUNTED, ReleasedPrototypes, cells, measure
from protokernels import nn

SMALL: dict[str, dict[str, Any]] = {
    "vaesim": {"batch_size": 8, "num_prototypes": 4},
    "contrastive_autoencoder": {"batch_size": 8},
    "optiml": {"batch_size": 4, "image_size": 32, "width": 2, "expander_dim": 16},
    "optimized_views": {"batch_size": 4, "image_size": 16, "width": 2, "m_width": 2},
    "local_contrast, global": {"width": 2, "image_size": 32, "global_batch_size": 4},
    "local_contrast, block": {"width": 2, "image_size": 32},
    "local_contrast, stride": {"width": 2, "image_size": 32},
}


@pytest.mark.usefixtures("own_threads")
def test_every_line() -> None:
    rows = [measure(name, "ours", "fair", UNCOUNTED + 1, **SMALL[name]) for name in LINES]
    rows += [measure("vaesim", way, "fair", UNCOUNTED + 1, **SMALL["vaesim"]) for way in ("plain", "released")]
    assert all(row["least_ms"] > 0 and row["steps"] == 1 and row["peak_mib"] > 0 for row in rows)
    assert all((row["views_ms"] is not None) == bool(LINES[row["line"]].views) for row in rows)
    rows[0]["share_of_kernels"] = measure("vaesim", "ours", "fair", UNCOUNTED + 1, True, **SMALL["vaesim"])[
        "share_of_kernels"
    ]
    assert 0 < rows[0]["share_of_kernels"] < 1
    head, *body = cells(rows)
    assert [line[0] for line in body] == list(LINES) and {len(line) for line in body} == {len(head)}
    assert sum("x)" in cell for line in body for cell in line) == 2


def test_the_released_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator)
    start = torch.randn(5, 6, generator=generator)
    released, ours = (kind(5, 6, similarity="dot", new_weight=0.9) for kind in (ReleasedPrototypes, nn.Prototypes))
    for prototypes in (released, ours):
        prototypes.load_state_dict({**prototypes.state_dict(), "prototypes": start, "initialized": torch.tensor(True)})
    torch.testing.assert_close(released(z), ours(z))
    torch.testing.assert_close(released.prototypes, ours.prototypes)
