# SPDX-License-Identifier: MIT
"""Files of results: the JSON that the benchmarks of ops add to with --results, row by row, and what a script may write with --out."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

IDENTITY = ("what", "case", "contender")
"""What tells a row from others of its file."""


class ResultsError(Exception):
    """A results file cannot be read, written, or added to by this run; the message says why and what to do."""


def json_of(path: Path) -> Any:
    """What a JSON file holds; None where there is no file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise ResultsError(f"{path} cannot be read as JSON: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """A results file: facts of every run, and rows that name their run. Empty where there is none.

    Raises:
        ResultsError: the file cannot be read, or holds something else.
    """
    found = json_of(path)
    if found is None:
        return {"runs": {}, "rows": []}
    rows = found.get("rows") if isinstance(found, dict) and isinstance(found.get("runs"), dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {*IDENTITY, "run"} <= row.keys() for row in rows
    ):
        raise ResultsError(f"{path} was not written by a benchmark with --results")
    results: dict[str, Any] = found
    return results


def machine(run: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a file have in common: times taken elsewhere neither replace one another nor stand in one table."""
    if "device" in run:
        return {"GPU": run["device"]["name"]}
    found = run["processor"]
    return {
        "processor": f"{found['model']} ({found.get('family_model_stepping', '?')})",
        "threads": run["threads"],
        "allocator": run["allocator"],
        "CPU level": run["library"].get("cpu_level"),
    }


def check_target(path: Path, run: dict[str, Any]) -> None:
    """Before anything is measured: can this run's rows go into this file?

    Raises:
        ResultsError: they cannot; also where its rows come from another machine, number of threads or allocator.
    """
    here = machine(run)
    for name, other in read(path)["runs"].items():
        there = machine(other)
        if apart := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
            differences = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in apart)
            raise ResultsError(f"{path} holds the run {name} of something else ({differences}); name another file")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error}") from None


def target(text: str) -> Path:
    """The JSON file of an option --out, as argparse's type: refused with the command line, not when all is measured."""
    path = Path(text)
    try:
        json_of(path)
        _check_writable(path)
    except ResultsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in IDENTITY)


def write(path: Path, run: dict[str, Any], row: dict[str, Any]) -> None:
    """Adds a row to a results file in place of the one of the same case and contender; runs without rows go."""
    old = read(path)
    rows = [other for other in old["rows"] if identity(other) != identity(row)] + [{**row, "run": run["date"]}]
    rows.sort(key=lambda row: (row["what"], row["order"], row["median_ms"]))
    used = {row["run"] for row in rows}
    runs = {name: facts for name, facts in {**old["runs"], run["date"]: run}.items() if name in used}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
