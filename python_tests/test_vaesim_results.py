# SPDX-License-Identifier: MIT
"""The collection of VAESim's results: seeds trained at different times become one row."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from benchmarks.vaesim_results import PROTOCOLS, joined, summary

CONFIG = {"data": "made", "epochs": 3}


def row(seeds: list[int], accuracies: list[float], **changes: Any) -> dict[str, Any]:
    splits = {"test": {**{protocol: summary(accuracies) for protocol in PROTOCOLS}, "majority_rate": 0.6}}
    return {
        "data": "made", "preset": "paper", "config": CONFIG, "protocol": {"knn_k": 5}, "images": {"test": 10}, "precision": "bf16",
        "precisions": ["bf16"], "processors": ["AVX2"], "commits": ["a"], "backends": ["auto"], "seeds": seeds, "splits": splits,
        "environment": {"cpu_capability": "AVX2"}, **changes,
    }  # fmt: skip


def older(before: dict[str, Any]) -> dict[str, Any]:
    """As files without single values have it."""
    splits = {
        "test": {
            name: {k: v for k, v in value.items() if k != "values"} if isinstance(value, dict) else value
            for name, value in before["splits"]["test"].items()
        }
    }
    return {
        key: value for key, value in {**before, "splits": splits}.items() if key not in ("precisions", "processors")
    }


@pytest.mark.parametrize("accuracies", [[0.7], [0.7, 0.9]])
@pytest.mark.parametrize("old", [True, False])
def test_seeds_join(accuracies: list[float], old: bool) -> None:
    before = row(list(range(len(accuracies))), accuracies)
    now = row([5, 6], [0.8, 0.6], precisions=["fp32"], commits=["b"])
    both = joined(older(before) if old else before, now)
    assert both["seeds"] == [*range(len(accuracies)), 5, 6]
    assert both["precisions"] == ["bf16", "fp32"] and both["commits"] == ["a", "b"]
    everyone = [*accuracies, 0.8, 0.6]
    for protocol in PROTOCOLS:
        entry = both["splits"]["test"][protocol]
        assert entry["mean"] == pytest.approx(statistics.fmean(everyone))
        assert entry["std"] == pytest.approx(statistics.stdev(everyone))


def test_what_does_not_belong_together_is_refused() -> None:
    before = row([0, 1, 2], [0.7, 0.8, 0.9])
    with pytest.raises(ValueError, match=r"the file has seeds \[2\] already"):
        joined(before, row([2], [0.5]))
    with pytest.raises(ValueError, match="config differs"):
        joined(before, row([3], [0.5], config={**CONFIG, "epochs": 4}))
    with pytest.raises(ValueError, match="3 seeds cannot be told"):
        joined(older(before), row([3], [0.5]))
