# SPDX-License-Identifier: MIT
"""Rows of results: made from the finished runs of one configuration, kept in a JSON file, merged with what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..training.files import exclusive, make_folder, read_json, write_bytes
from ..training.runs import changed_data
from ..training.summary import summarize_runs
from .finished import FinishedRun

ResultRow = dict[str, Any]
AS_IN_ROW = "as_in_row"  # in a file, instead of data that an earlier row has as well: the number of that row


def grouped(
    runs: Iterable[FinishedRun],
    key: Callable[[FinishedRun], tuple[Any, ...]],
    config_of: Callable[[FinishedRun], dict[str, Any]] = lambda run: run.config,
) -> list[list[FinishedRun]]:
    """The runs of each key, by seed; ``config_of`` gives the configuration in which they have to agree.

    Raises:
        ValueError: runs of one key have different configurations or data, or the same seed.
    """
    groups: dict[tuple[Any, ...], dict[int, FinishedRun]] = {}
    for run in runs:
        group = groups.setdefault(key(run), {})
        for other in group.values():
            config, before = config_of(run), config_of(other)
            if differing := [name for name in config | before if config.get(name) != before.get(name)]:
                raise ValueError(
                    f"{other.path} and {run.path} hold runs of different configurations ({', '.join(differing)}) and would "
                    "be one row; collect them apart"
                )
            if changed := changed_data(*(each.environment.get("data") or {} for each in (other, run))):
                raise ValueError(
                    f"{other.path} and {run.path} hold runs of different data ({', '.join(changed)}) and would be one row; collect "
                    "them apart"
                )
        if run.seed in group:
            raise ValueError(
                f"{group[run.seed].path} and {run.path} hold the same seed {run.seed} of one row; leave one of them out"
            )
        group[run.seed] = run
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def common_row(runs: Sequence[FinishedRun]) -> ResultRow:
    """What every row has: the module that made it, data, preset, configuration, seeds, where it was made, and scores as mean,
    standard deviation and number of runs."""
    first = runs[0].results
    environments = [run.environment for run in runs]
    return {
        "paper": first["paper"],
        "data": first["config"]["data"],
        "preset": first["config"]["preset_name"],
        "config": first["config"],
        "protocol": first.get("protocol", {}),
        "precision": first.get("precision"),
        "precisions": sorted({str(run.results.get("precision")) for run in runs}),
        "seeds": [run.seed for run in runs],
        "data_warnings": first.get("data_warnings", []),
        "environment": environments[0],
        "commits": sorted({str(environment.get("commit")) for environment in environments}),
        "backends": sorted({str(environment.get("backend")) for environment in environments}),
        "splits": summarize_runs([run.results["splits"] for run in runs]),
    }


def seconds_of(runs: Sequence[FinishedRun]) -> list[float]:
    """Seconds of training by run."""
    return [round(sum(line.get("seconds", 0) for line in run.metrics), 1) for run in runs]


def any_row(row: ResultRow) -> None:
    """Has nothing against a row."""


def read_rows(path: Path, check: Callable[[ResultRow], None] = any_row) -> list[ResultRow]:
    """The rows in a results file.

    Args:
        path: of the file.
        check: raises ``ValueError`` for a row that does not belong there, such as one of another paper.

    Raises:
        ValueError: the file is missing, does not parse, or holds something else.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a results file (.json)")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a results file (.json) or folders with runs")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "splits" in row for row in rows):
        raise ValueError(f"{path} holds no rows of results; expected a list of objects with splits")
    for number, row in enumerate(rows):
        try:
            check(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return [_with_data(row, rows) for row in rows]


def merged(before: Sequence[ResultRow], now: Sequence[ResultRow], key: Callable[[ResultRow], Any]) -> list[ResultRow]:
    """The rows of ``before`` with those of ``now`` in their place or at the end."""
    return list({key(row): row for row in [*before, *now]}.values())


def update_rows(
    path: Path,
    change: Callable[[list[ResultRow]], list[ResultRow]],
    check: Callable[[ResultRow], None] = any_row,
) -> list[ResultRow]:
    """Replaces the rows of a results file by ``change`` of them, and returns those; an absent file has none. With a row that
    ``check`` refuses the file stays as it is.

    Other processes that do the same wait; the file is whole at every moment.
    """
    if path.exists():
        read_rows(path, check)  # one that is refused gets no lock file
    make_folder(path.parent, parents=True)
    with exclusive(path.with_name(f"{path.name}.lock")):
        rows = change(read_rows(path, check) if path.exists() else [])
        short = [_without_repetition(row, rows) for row in rows]
        write_bytes(path, (json.dumps(short, indent=1, allow_nan=False) + "\n").encode())
    return rows


def _data_of(row: ResultRow) -> Any:
    """Where a row's images came from: with a name for every file, most of a row of volumes."""
    return row.get("environment", {}).get("data")


def _without_repetition(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow:
    """``row`` as it is written: data that an earlier row has as well is that row's number, ``{"as_in_row": 0}``."""
    data = _data_of(row)
    first = next(index for index, other in enumerate(rows) if _data_of(other) == data)
    if not data or rows[first] is row:
        return row
    return {**row, "environment": {**row["environment"], "data": {AS_IN_ROW: first}}}


def _with_data(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow:
    """The opposite of :func:`_without_repetition`."""
    data = _data_of(row)
    if not isinstance(data, dict) or AS_IN_ROW not in data:
        return row
    return {**row, "environment": {**row["environment"], "data": _data_of(rows[data[AS_IN_ROW]])}}
