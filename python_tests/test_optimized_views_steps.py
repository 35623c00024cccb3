# SPDX-License-Identifier: MIT
"""The benchmark of a step of optimised views: what is timed and what is subtracted."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="the benchmark imports the paper, which needs the extra protokernels[train]")

from benchmarks import optimized_views_steps as steps
from protokernels.papers.optimized_views import OptimizedViewsConfig


def test_table_and_lines() -> None:
    config = OptimizedViewsConfig.preset("fair", data="digits", image_size=16, width=2, m_width=2, batch_size=8)
    times = steps.measure(config, "cpu", 1)
    assert list(times) == ["random", "M", "M-shared", "M-every-4", "M-twice", "M-alone"] and min(times.values()) > 0
    run = {
        "config": config.record(),
        "ms": {"random": 100, "M": 150, "M-shared": 120, "M-every-4": 112, "M-twice": 170, "M-alone": 9},
    }
    assert "| 100 ms | +50 % | +20 % | +12 % | +70 % | 9 % |" in steps.table({"fair, digits": run})
