# SPDX-License-Identifier: MIT
"""A table of results, and the three ways it is written: text, Markdown, JSON."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Format = Literal["text", "markdown", "json"]
_BEGINNING = re.compile(
    r"(### .+\n\n)?(\*\*.+\*\*\n\n)?\|.*\|\n(\|---)+\|\n"  # Markdown
    r"|(.+\n\n)?(.+\n){1,2} ?─[─ ]+\n"  # text
)


class Score(NamedTuple):
    """Mean and sample standard deviation over runs; no deviation for one run."""

    mean: float
    std: float | None = None
    runs: int | None = None  # over how many; none: not known
    digits: int = 3  # shown behind the point
    signed: bool = False  # show a plus as well

    @classmethod
    def over(cls, values: Sequence[float], *, digits: int = 3, signed: bool = False) -> Score | None:
        """The score of single values; none of none.

        >>> from protokernels.results import Score
        >>> str(Score.over([0.5, 0.7]))
        '0.600 ± 0.141'
        """
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values), digits, signed)

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None, *, digits: int = 3) -> Score | None:
        """The score of an entry of :func:`protokernels.training.summarize_runs`; none where there is none."""
        if not entry or entry.get("mean") is None:
            return None
        runs = entry.get("runs", len(entry["values"]) if "values" in entry else None)
        return cls(entry["mean"], entry.get("std"), runs, digits)

    def __str__(self) -> str:
        mean = f"{self.mean:{'+' if self.signed else ''}.{self.digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{self.digits}f}"


Cell = Score | str | int | None


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str  # Markdown, such as **ours** or `fair`
    cells: tuple[Cell, ...]  # for the columns behind the name
    protocol: Mapping[str, Any] = field(default_factory=dict)  # how it was scored; in the JSON


@dataclass(frozen=True)
class ResultTable:
    """A table with what stands above and below it."""

    columns: tuple[str, ...]  # the first is that of the names
    rows: tuple[Row, ...]
    title: str = ""
    group: str = ""  # a heading over several tables
    notes: tuple[str, ...] = ()  # sentences below, Markdown

    def __post_init__(self) -> None:
        wrong = [row.name for row in self.rows if len(row.cells) + 1 != len(self.columns)]
        if wrong:
            raise ValueError(
                f"ResultTable: expected {len(self.columns) - 1} cells behind each name, one per column; got another "
                f"number for {', '.join(wrong)}"
            )


def rendered(tables: Sequence[ResultTable], how: Format) -> str:
    """All tables as one text. ``ValueError`` for an unknown format."""
    if how not in get_args(Format):
        raise ValueError(f"unknown format {how!r}; expected one of {', '.join(get_args(Format))}")
    if how == "json":
        return json.dumps([as_json(table) for table in tables], indent=1, allow_nan=False)
    parts, group = [], ""
    for table in tables:
        if table.group and table.group != group:
            parts.append(f"### {table.group}" if how == "markdown" else plain(table.group))
        group = table.group
        parts.append(as_markdown(table) if how == "markdown" else as_text(table))
    return "\n\n".join(parts)


def is_rendered(text: str) -> bool:
    """Whether ``text`` begins as what :func:`rendered` makes: a heading, a title, the columns and the rule below them; or is its
    JSON."""
    if _BEGINNING.match(text):
        return True
    try:
        tables = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys = {"group", "title", "columns", "rows", "notes"}
    return isinstance(tables, list) and all(isinstance(each, dict) and each.keys() == keys for each in tables)


def as_markdown(table: ResultTable) -> str:
    """Title in bold, table, notes."""
    lines = [_markdown_line(table.columns), "|---" * len(table.columns) + "|"]
    lines += [_markdown_line([row.name, *map(shown, row.cells)]) for row in table.rows]
    parts = [f"**{table.title}**"] if table.title else []
    parts.append("\n".join(lines))
    if table.notes:
        parts.append("\n".join(f"- {note}" for note in table.notes) if len(table.notes) > 1 else table.notes[0])
    return "\n\n".join(parts)


def as_text(table: ResultTable) -> str:
    """The same in aligned columns, without Markdown's marks."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.columns):
        drawn.add_column(Text(plain(name)), justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text(text) for text in map(plain, (row.name, *map(shown, row.cells)))))
    buffer = io.StringIO()
    Console(file=buffer, width=10_000, color_system=None, force_terminal=False).print(drawn)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    title = [plain(table.title)] if table.title else []
    return "\n".join([*title, *(line for line in lines if line), *map(plain, table.notes)])


def as_json(table: ResultTable) -> dict[str, Any]:
    """Numbers as numbers: a score is an object with mean, std and runs."""
    columns = [plain(name) for name in table.columns]
    return {
        "group": plain(table.group),
        "title": plain(table.title),
        "columns": columns,
        "rows": [
            {
                "name": plain(row.name),
                "cells": {column: _value(cell) for column, cell in zip(columns[1:], row.cells, strict=True)},
                "protocol": dict(row.protocol),
            }
            for row in table.rows
        ],
        "notes": [plain(note) for note in table.notes],
    }


def shown(cell: Cell) -> str:
    """What stands in a table for a cell."""
    return "" if cell is None else str(cell)


def literal(name: Any) -> str:
    """A name that somebody chose, as Markdown that shows it as it is spelt.

    >>> literal("a*b.npz"), plain(literal("a*b.npz"))
    ('a\\\\*b.npz', 'a*b.npz')
    """
    return re.sub(r"[\\*`]", r"\\\g<0>", str(name))


def plain(text: str) -> str:
    """Without the marks of bold, italic and code, and with the signs of :func:`literal` as they are."""
    return re.sub(r"\\([\\*`])|[*`]", lambda found: found[1] or "", text)


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = (text.replace("|", r"\|") for text in cells)
    return "|" + "".join(f" {text} |" if text else " |" for text in escaped)


def _value(cell: Cell) -> Any:
    if not isinstance(cell, Score):
        return plain(cell) if isinstance(cell, str) else cell
    return {"mean": cell.mean, "std": cell.std, "runs": cell.runs}
