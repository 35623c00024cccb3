# SPDX-License-Identifier: MIT
"""The collection of VAESim's results: seeds trained at different times become one row."""

from __future__ import annotations

import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vaesim_results
from benchmarks.vaesim_results import (
    PROTOCOLS,
    ROWS,
    accuracies,
    chosen_rows,
    joined,
    merged,
    method_of,
    module,
    summary,
    table,
)
from protokernels.papers._vaesim_published import PAPER, PUBLISHED

CONFIG = {"data": "made", "epochs": 3}


def row(seeds: list[int], accuracies: list[float], **changes: Any) -> dict[str, Any]:
    splits = {"test": {**{protocol: summary(accuracies) for protocol in PROTOCOLS}, "majority_rate": 0.6}}
    return {
        "data": "made", "preset": "paper", "config": CONFIG, "protocol": {"knn_k": 5}, "images": {"test": 10}, "precision": "bf16",
        "precisions": ["bf16"], "processors": ["AVX2"], "commits": ["a"],
        "seconds": [1.0] * len(seeds), "collapsed": [], "backends": ["auto"], "seeds": seeds, "splits": splits,
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


def test_a_field_that_came_later_does_not_separate_seeds() -> None:
    before = row([0], [0.7])
    both = joined(before, row([1], [0.8], config={**CONFIG, "augment": False}))
    assert both["seeds"] == [0, 1] and both["seconds"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="made vaesim paper: config differs"):
        joined(before, row([1], [0.8], config={**CONFIG, "augment": True}))


def test_rows_are_told_apart_by_method() -> None:
    old, vade = row([0], [0.7]), row([0], [0.6], method="vade", paper="vade")
    newer = row([1], [0.9], method="vaesim", paper="vaesim")
    assert merged([old], [vade]) == [old, vade]
    assert merged([old, vade], [newer]) == [newer, vade]


def scores(accuracy: float, **kinds: Any) -> dict[str, Any]:
    return {key: {"accuracy": accuracy, "majority_rate": 0.625} for key in ("knn", "linear")} | kinds


def test_a_supervised_network_has_no_clusters() -> None:
    result = {"splits": {"test": scores(0.8, supervised={"accuracy": 0.9, "majority_rate": 0.625})}}
    values = accuracies([result], "test")
    assert set(values) == {"knn", "linear", "supervised", "majority_rate"} and values["supervised"]["mean"] == 0.9
    for weights, name in (("", "resnet50_random_init"), ("w.pth", "resnet50_imagenet")):
        config = {"depth": 50, "initial_weights": weights}
        assert method_of({"paper": "resnet_transfer", "config": config}) == name


def test_the_table_shows_what_was_published_what_was_logged_and_the_larger_class() -> None:
    split = {
        **{key: summary([0.7, 0.8]) for key in PROTOCOLS},
        "majority_rate": 0.625,
        "clusters_used": summary([9, 10]),
    }
    config = {"data": "pneumoniamnist", "epochs": 300, "pretraining_epochs": 50}
    changes = {"data": "pneumoniamnist", "method": "vade", "paper": "vade", "preset": "pytorch", "config": config}
    network = {"knn": summary([0.8]), "supervised": summary([0.85]), "majority_rate": 0.625}
    random = {"data": "pneumoniamnist", "method": "resnet50_random_init", "paper": "resnet_transfer"}
    text = table(
        [
            {**row([0, 1], [0.5]), **changes, "splits": {"test": split, "val": {**split, "majority_rate": 0.742}}},
            {**row([0], [0.5]), **changes, "preset": "fair", "collapsed": [0], "splits": {"test": split}},
            {**row([0], [0.5]), **random, "splits": {"test": network}},
        ]
    )
    lines = text.splitlines()
    assert "| the larger class | | test | 0.625 | 0.625 | | | 0.625 | | | |" in lines
    assert "| the larger class | | val | 0.742 | 0.742 | | | 0.742 | | | |" in lines
    assert "| vade | *paper, Table 1* | test | | 0.625 ± 0.001 | 0.747 ± 0.012 | 0.590 ± 0.116 |  | | 10 | |" in lines
    assert "| vade | *authors' logs* | test | | 0.625 | 0.747 | 0.590 |  | |  | |" in lines
    mean = "0.750 ± 0.071"
    assert f"| vade | `pytorch` | val | 0.742 | {mean} | {mean} | {mean} |  | 9.5 | 2 | 50 + 300 |" in lines
    assert any("9.5 (collapsed: 1)" in line and "`fair`" in line for line in lines)
    assert "| resnet_transfer | *paper, Table 1* | test | |  |  |  | 0.850 | |  | |" in lines
    assert any(
        line.startswith("| resnet50_random_init | `paper` | test | 0.625 |  | 0.800 |  | 0.850 |") for line in lines
    )
    header = next(line for line in lines if line.startswith("| method"))
    assert all(line.count("|") == header.count("|") for line in lines if line.startswith("|"))


def test_every_row_can_be_run_and_published_numbers_belong_to_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for method, preset in ROWS:
        assert module(method).CONFIG.preset(preset, "pneumoniamnist").preset_name == preset
    for data, published in PUBLISHED.items():
        assert {row.method for row in published} == set(vaesim_results.METHODS)
        for row in published:
            if row.source == PAPER and "knn" in row.accuracies:
                assert module(row.method).PAPER_RESULTS[data] == (row.split, row.accuracies)
    called: list[list[str]] = []

    def ran(words: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        called.append(words)
        return subprocess.CompletedProcess(words, 1 if "gmvae" in words else 0)

    monkeypatch.setattr(subprocess, "run", ran)
    rows = chosen_rows(["gmvae:paper", "vade:fair"])
    assert vaesim_results.run("mnist", rows, 3, tmp_path, ["--precision", "bf16"]) == 1  # and the second one ran
    assert called[1][3:] == [
        *("train", "vade", "--data", "mnist", "--preset", "fair", "--runs", "3", "--resume"),
        *("--out", str(tmp_path / "vade-mnist-fair"), "--precision", "bf16"),
    ]
    with pytest.raises(ValueError, match=r"unknown rows vade:best; expected some of vaesim:official"):
        chosen_rows(["vade:best"])
