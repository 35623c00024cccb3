# SPDX-License-Identifier: MIT
"""The collector of Ruppli et al. 2022, and the benchmark of its steps: what counts, what stays, what is subtracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the collector imports the paper, which needs the extra protokernels[train]")

from benchmarks import optimized_views_results as results
from benchmarks import optimized_views_steps as steps
from protokernels.papers.optimized_views import STRATEGIES, OptimizedViewsConfig


def write_run(
    folder: Path, strategy: str, score: float, *, seed: int = 0, complete: bool = True, **config: Any
) -> Path:
    folder.mkdir(parents=True)
    probe = {"images": 7, "macro_auroc": score - 0.1, "left_out": []}
    content = {
        "paper": "optimized_views",
        "config": {"data": "brain_tumor", "preset_name": "fair", "strategy": strategy, **config},
        "protocol": {},
        "precision": "fp32",
        "seed": seed,
        "images": {"train": 70, "labelled": 7},
        "data_warnings": [],
        "complete": complete,
        "splits": {
            "test": {"hold_out": {"auc": score, "sets": {}}, "untrained": {"auc": 0.6}, "probe": {"10%": probe}}
        },
    }
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "environment.json").write_text(json.dumps({"commit": "abc", "backend": "native"}))
    lines = [{"epoch": 1, "seconds": 2.0}, {"epoch": 2, "seconds": 2.0, "auc": score}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class TestCollect:
    def test_the_better_one_is_first_and_differences_are_by_seed(self, tmp_path: Path) -> None:
        for seed, (ours, other) in enumerate([(0.8, 0.9), (0.7, 0.75)]):
            write_run(tmp_path / results.OURS / f"seed-{seed}", results.OURS, ours, seed=seed)
            write_run(tmp_path / "simclr" / f"seed-{seed}", "simclr", other, seed=seed)
        rows = [results.collect_run(tmp_path / name) for name in (results.OURS, "simclr")]
        text = results.tables([row for row in rows if row])
        order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "0." in line]
        assert order == ["simclr", f"**{results.OURS}**"]
        assert f"- {results.OURS} minus simclr: -0.075 ± 0.035 (by seed: -0.100, -0.050)" in text
        assert "Untrained encoder, hold-out: 0.600" in text

    def test_finished_seeds_only(self, tmp_path: Path) -> None:
        for seed, complete in ((0, True), (1, True), (2, False)):
            write_run(tmp_path / "random" / f"seed-{seed}", "random", 0.5 + 0.1 * seed, seed=seed, complete=complete)
        row = results.collect_run(tmp_path / "random")
        assert row is not None and row["seeds"] == [0, 1] and row["pretraining_seconds"] == [4.0, 4.0]
        assert row["splits"]["test"]["hold_out"]["auc"]["mean"] == pytest.approx(0.55)
        assert row["curves"] == [[[2, 0.5]], [[2, 0.6]]] and row["by_seed"] == {"0": 0.5, "1": 0.6}
        assert results.collect_run(tmp_path) is None

    def test_runs_of_two_configurations_are_not_one_row(self, tmp_path: Path) -> None:
        write_run(tmp_path / "random" / "seed-0", "random", 0.5, epochs=3)
        write_run(tmp_path / "random" / "seed-1", "random", 0.5, seed=1, epochs=4)
        with pytest.raises(ValueError, match="different configurations"):
            results.collect_run(tmp_path / "random")

    def test_rows_that_are_not_at_hand_stay(self) -> None:
        before = [{"data": "d", "preset": "fair", "name": name, "value": 1} for name in "ab"]
        now = [{"data": "d", "preset": "fair", "name": name, "value": 2} for name in "bc"]
        assert [(row["name"], row["value"]) for row in results.merged(before, now)] == [("a", 1), ("b", 2), ("c", 2)]

    def test_every_strategy_is_run(self) -> None:
        assert (
            sorted(results.STRATEGIES) == sorted(STRATEGIES) and results.STRATEGIES[0] == "self-supervised+supervision"
        )


class TestSteps:
    def test_table_and_lines(self) -> None:
        config = OptimizedViewsConfig.preset("fair", data="digits", image_size=16, width=2, m_width=2, batch_size=8)
        times = steps.measure(config, "cpu", 1)
        assert list(times) == ["random", "M", "M-shared", "M-every-4", "M-twice", "M-alone"] and min(times.values()) > 0
        run = {
            "config": config.record(),
            "ms": {"random": 100, "M": 150, "M-shared": 120, "M-every-4": 112, "M-twice": 170, "M-alone": 9},
        }
        assert "| 100 ms | +50 % | +20 % | +12 % | +70 % | 9 % |" in steps.table({"fair, digits": run})
