# SPDX-License-Identifier: MIT
"""Run folders as training leaves them, without the training, and the command that makes tables of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]  # words of `protokernels table` -> status, output, errors

ENVIRONMENT = {"commit": "abc", "backend": "native", "cpu_capability": "AVX2", "threads": 1}


def write_run(
    folder: Path,
    paper: str,
    config: dict[str, Any],
    splits: dict[str, Any],
    *,
    seed: int = 0,
    complete: bool = True,
    metrics: tuple[dict[str, Any], ...] = ({"epoch": 1, "seconds": 2.0},),
    **more: Any,
) -> Path:
    """One run of one seed."""
    folder.mkdir(parents=True)
    results = {
        "paper": paper,
        "config": {"data": "made", "preset_name": "fair", "epochs": 3, **config},
        "protocol": {},
        "precision": "fp32",
        "seed": seed,
        "images": {"train": 70, "test": 10},
        "data_warnings": [],
        "complete": complete,
        "splits": splits,
        **more,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def vaesim_splits(score: float) -> dict[str, Any]:
    """What VAESim's evaluation gives for one set, as far as its table reads it."""
    return {"test": {name: {"accuracy": score, "majority_rate": 0.6} for name in ("statistical", "knn", "linear")}}


def transfer_splits(score: float, **more: Any) -> dict[str, Any]:
    """What the transfer to few labels gives."""
    row = {"images": 7, "macro_auroc": score, "auroc": {"Mass": score}, "left_out": ["Hernia"]}
    return {"test": {"targets": {"probe": {"1%": row, **more}, "fine_tune": {}}}}


def table_command(capsys: pytest.CaptureFixture[str]) -> Run:
    """`protokernels table`, as a function of its words."""

    def called(*words: object) -> tuple[int, str, str]:
        from protokernels.cli import main

        capsys.readouterr()
        status = main(["table", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return called
