# SPDX-License-Identifier: MIT
"""Finished runs below folders, wherever they lie and however many seeds share a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..training.files import read_object
from ..training.run_folder import RunFolder

REQUIRED = ("paper", "config", "seed", "splits")
"""What the results of a finished run hold, of every paper."""


@dataclass(frozen=True)
class FinishedRun:
    """A run of one seed that is complete."""

    path: Path
    results: dict[str, Any]  # of results.json

    @property
    def name(self) -> str:
        """The folder's name, or that of the folder around it where it is called after its seed."""
        return self.path.parent.name if re.fullmatch(r"seed-\d+", self.path.name) else self.path.name

    @property
    def seed(self) -> int:
        """What its random numbers started from."""
        return int(self.results["seed"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        config: dict[str, Any] = self.results["config"]
        return config

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware; empty where nothing was written."""
        return RunFolder(self.path).environment()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """A line per epoch."""
        return RunFolder(self.path).metrics()


def read_results(folder: Path) -> dict[str, Any] | None:
    """What ``results.json`` in ``folder`` holds; none where there is no such file. ``ValueError`` where it is broken."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    remedy = "remove it and continue the run, or leave the folder out"
    results = read_object(path, "the results of a run", remedy)
    if not results.get("complete") or "seeds" in results:
        return results
    if missing := [key for key in REQUIRED if key not in results]:
        raise ValueError(f"{path} says that the run is complete, but has no {', '.join(missing)}; {remedy}")
    return results


def read_finished(folder: Path) -> FinishedRun | None:
    """The run in ``folder``; none where none is finished, and for the summary over seeds. ``ValueError`` where its results
    are broken."""
    results = read_results(folder)
    if results is None or not results.get("complete") or "seeds" in results:
        return None
    return FinishedRun(folder, results)


def find_finished(
    folders: Iterable[Path], papers: Collection[str], wanted: Callable[[FinishedRun], bool] = lambda run: True
) -> list[FinishedRun]:
    """The finished runs of ``papers`` in and below ``folders``, sorted by path. Lock files, which ``runs/*`` matches too, are
    passed over.

    Raises:
        ValueError: a folder does not exist, or a results file is broken.
    """
    found: dict[Path, FinishedRun] = {}
    for folder in folders:
        if folder.suffix == ".lock" and folder.is_file():
            continue
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected a results file (.json) or folders with runs")
        for path in sorted(folder.rglob("results.json")):
            run = read_finished(path.parent)
            if run is not None and run.results["paper"] in papers and wanted(run):
                found[path.parent.resolve()] = run
    return [found[path] for path in sorted(found)]
