# SPDX-License-Identifier: MIT
"""What commands print: whole where it goes to a file or a pipe, and names as they are spelt."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rich", reason="the commands need the extra protokernels[train]")
pytest.importorskip("accelerate", reason="the commands need the extra protokernels[train]")

from rich.table import Table

from protokernels.papers import _local_contrast_report as report
from protokernels.training import screen

CLASSES = ["[lowercase]", ":heart:", "[red]left[/red] ventricle", *(f"structure number {index}" for index in range(12))]


def results(data: str) -> dict[str, Any]:
    score = {"mean": 0.5, "std": 0.1}
    row = {"mean": score, "classes": dict.fromkeys(CLASSES, score)}
    config = {"labelled": 0.05, "method": "random", "preset_name": "fair", "data": data, "fold": 0}
    splits = {"test": {key: row for key, _ in report.SCORES}}
    volumes = {"labelled": 1, "train": 20, "test": 5}
    return {"config": config, "volumes": volumes, "splits": splits, "number_of_runs": 2, "complete": True}


def test_a_table_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours are wanted; it is a pipe all the same
    data = f"{'a long folder/' * 10}[x] :smile:.npz"
    screen.print_table(report.results_table(results(data), {}))
    lines = capsys.readouterr().out.splitlines()
    assert any(data in line for line in lines)
    (heads,) = [line for line in lines if "scored on" in line]
    assert [name for name in CLASSES if name not in heads] == []
    assert sum(line.count("0.500 ±.100") for line in lines) == (len(CLASSES) + 1) * len(report.SCORES)
    assert not any("…" in line for line in lines)


def test_a_line_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for stderr in (False, True):
        screen.print_line(text := f"results  {'long name ' * 30}a[b] [bold] :smile:", "yellow", stderr=stderr)
        assert capsys.readouterr()[stderr] == f"{text}\n"


def test_printing_leaves_the_table_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", title="above", caption="below")
    screen.print_table(table)
    assert (table.title, table.caption) == ("above", "below")
    words = capsys.readouterr().out.split()
    assert (words[0], words[-1]) == ("above", "below")
