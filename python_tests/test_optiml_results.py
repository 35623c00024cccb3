# SPDX-License-Identifier: MIT
"""The collector of OPTiML and its baselines: what counts, what stays, and that the order is by score whoever wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "accelerate", reason="the collector imports the baselines, which need the extra protokernels[train]"
)

from benchmarks import optiml_results


def write_run(folder: Path, paper: str, score: float, *, complete: bool = True, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    row = {"images": 7, "macro_auroc": score, "auroc": {"Mass": score}, "left_out": ["Hernia"]}
    results: dict[str, Any] = {
        "paper": paper,
        "config": {"data": "chest_nih", "preset_name": "fair", "epochs": 30},
        "protocol": {"transfer": "fair"},
        "precision": "fp32",
        "seed": seed,
        "images": {"train": 710},
        "data_warnings": [],
        "complete": complete,
        "splits": {"test": {"targets": {"probe": {"1%": row}, "fine_tune": {}}}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps({"commit": "abc", "backend": "native"}))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "seconds": 2.0}) + "\n")
    return folder


class TestCollect:
    def test_the_better_one_is_first(self, tmp_path: Path) -> None:
        rows = [
            optiml_results.collect_run(write_run(tmp_path / name, name, score))
            for name, score in (("optiml", 0.6), ("simclr", 0.7), ("supervised", 0.65))
        ]
        lines = optiml_results.tables([row for row in rows if row]).splitlines()
        order = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "0." in line]
        assert order == ["simclr", "supervised (has seen all labels)", "**optiml**"]
        assert "| 1% (7) |" in "\n".join(lines) and lines[-1].endswith("Hernia.")

    def test_finished_seeds_only(self, tmp_path: Path) -> None:
        for seed, complete in ((0, True), (1, True), (2, False)):
            write_run(tmp_path / "byol" / f"seed-{seed}", "byol", 0.5 + 0.1 * seed, complete=complete, seed=seed)
        row = optiml_results.collect_run(tmp_path / "byol")
        assert row is not None and row["seeds"] == [0, 1] and row["pretraining_seconds"] == [2.0, 2.0]
        value = row["splits"]["test"]["targets"]["probe"]["1%"]["macro_auroc"]
        assert value["mean"] == pytest.approx(0.55) and value["runs"] == 2
        assert optiml_results.collect_run(tmp_path) is None

    def test_an_ablation_carries_its_folders_name(self, tmp_path: Path) -> None:
        row = optiml_results.collect_run(write_run(tmp_path / "optiml-mse", "optiml", 0.6))
        assert row is not None and row["method"] == "optiml-mse"

    def test_rows_that_are_not_at_hand_stay(self) -> None:
        before = [{"data": "d", "preset": "fair", "method": method, "value": 1} for method in "ab"]
        now = [{"data": "d", "preset": "fair", "method": method, "value": 2} for method in "bc"]
        assert [(row["method"], row["value"]) for row in optiml_results.merged(before, now)] == [
            ("a", 1),
            ("b", 2),
            ("c", 2),
        ]
