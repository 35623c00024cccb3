# SPDX-License-Identifier: MIT
"""What a paper says about its table: what is run for it, what a row is, what the columns are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..data.datasets import data_title
from .finished import FinishedRun, find_finished
from .rows import ResultRow, common_row, grouped, merged
from .scores import main_scores
from .tables import ResultTable

Values = dict[str, Any]  # axis -> value


class Recipe(NamedTuple):
    """What is trained for one combination of the axes' values."""

    module: str  # of a paper or baseline
    preset: str
    changes: Values = {}  # noqa: RUF012 - fields of the preset's configuration


def _of_the_paper(values: Values, paper: str) -> Recipe:
    return Recipe(
        paper, values["preset"], {key: value for key, value in values.items() if key not in ("data", "preset")}
    )


def folder_of_data(values: Values, data: str, preset: str = "fair") -> Path:
    """Where the runs of some data and preset lie below a table's folder: those of the paper's own in the folder itself.

    >>> folder_of_data({"data": "a/b.npz", "preset": "fair"}, "chest_nih").name
    'b-fair'
    """
    if (values["data"], values["preset"]) == (data, preset):
        return Path()
    return Path(f"{data_title(values['data'])}-{values['preset']}")


@dataclass(frozen=True)
class PaperTable:
    """The table of one paper, declared beside it as ``TABLE`` in ``papers/_<paper>_table.py``.

    What is common to all papers (finding runs, merging, files, locks, printing) is in this package; a paper gives what is
    its own. An axis is something the rows differ in: ``data``, mostly ``preset``, and the paper's own, such as ``method``.
    """

    paper: str  # its module in protokernels.papers
    axes: Mapping[str, Sequence[Any]]  # axis -> the values that are run unless others are asked for; the first is data
    row_key: tuple[str, ...]  # the fields of a row that tell it from the others
    identity: Callable[[FinishedRun], Values]  # the values of these fields for a run
    tables: Callable[[Sequence[ResultRow]], list[ResultTable]]  # from the rows in the order of the file
    folder: Callable[[Values, int], Path]  # values of the axes, seed -> the run's folder below that of the table
    modules: Sequence[str] = ()  # whose runs count: the paper itself, and baselines
    axes_of_data: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    # data -> axis -> the values that are run on these data instead, unless others are asked for
    runs: int = 1  # seeds of each, unless another number is asked for
    details: Callable[[Sequence[FinishedRun]], Values] = lambda runs: {}  # fields of a row beside the common ones
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields that older rows lack
    recipe: Callable[[Values, str], Recipe | None] = _of_the_paper
    # values of the axes, paper -> what is trained; none: this combination is not part of the table
    computed: Mapping[str, Callable[[str, Path | None, bool], ResultRow]] = field(default_factory=dict)
    # preset -> (data, data root, download) -> a row that needs no training, such as raw pixels
    order: Callable[[ResultRow], Any] | None = None  # sorts the rows of the file; none: new ones at the end
    join: Callable[[ResultRow, ResultRow], ResultRow] | None = None  # adds the seeds of the second row to the first's
    compare: Callable[[Sequence[FinishedRun], Path, Path | None], list[Path]] | None = None
    # runs, folder, data root -> pictures of several rows side by side
    main_scores: Callable[[Mapping[str, Any]], Mapping[str, Any]] = main_scores
    # for `protokernels sweep`: of one scored set, name -> mean, std, runs
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # field -> values, where none are asked for
    check: Callable[[Any], Any] = lambda config: None  # raises for a configuration that cannot be trained

    def key(self, row: ResultRow) -> tuple[Any, ...]:
        """What tells a row of the file from the others."""
        return tuple(self.value(row, name) for name in self.row_key)

    def value(self, row: ResultRow, name: str) -> Any:
        """A field of a row, or of an older row what it stands for."""
        return row.get(name, self.defaults.get(name))

    def combinations(self, chosen: Mapping[str, Sequence[Any]]) -> list[Values]:
        """Every combination of the values of the axes, the last axis fastest; ``chosen`` replaces the values of an axis.

        Raises:
            ValueError: an axis that the table does not have.
        """
        if unknown := [name for name in chosen if name not in self.axes]:
            raise ValueError(f"unknown axis {', '.join(unknown)}; the table of {self.paper} has {', '.join(self.axes)}")
        asked = {name: values for name, values in chosen.items() if values}
        combinations: list[Values] = []
        for data in asked.get("data", self.axes["data"]):
            axes = {**self.axes, **self.axes_of_data.get(data, {}), **asked, "data": (data,)}
            combinations += [dict(zip(axes, each, strict=True)) for each in product(*axes.values())]
        return combinations

    def collect(
        self, folders: Sequence[Path], config_of: Callable[[FinishedRun], Values] = lambda run: run.config
    ) -> list[ResultRow]:
        """One row for the finished runs below ``folders`` that have the same identity, and the same configuration by
        ``config_of``."""
        runs = find_finished(folders, self.modules or (self.paper,))
        groups = grouped(runs, lambda run: self.key(self.identity(run)), config_of)
        rows = []
        for group in groups:
            identity = self.identity(group[0])
            rows.append(
                {**identity, **common_row(group), **self.details(group), **identity}
            )  # what tells it apart stays
        return sorted(rows, key=self._place)

    def merge(self, before: Sequence[ResultRow], now: Sequence[ResultRow], *, add: bool = False) -> list[ResultRow]:
        """The rows of a file with new ones.

        Args:
            before: rows of the file.
            now: new rows; they replace those of the same key.
            add: instead of replacing them, join their seeds.

        Raises:
            ValueError: with ``add``, rows that cannot be joined.
        """
        if add and self.join is None:
            raise ValueError(f"--add: the rows of {self.paper} cannot be joined; collect all their runs at once")
        if add and self.join is not None:
            known = {self.key(row): row for row in before}
            now = [self.join(known[self.key(row)], row) if self.key(row) in known else row for row in now]
        rows = merged(before, now, self.key)
        return rows if self.order is None else sorted(rows, key=self.order)

    def _place(self, row: ResultRow) -> tuple[tuple[int, str], ...]:
        """Where the axes put a row: known values in their order, others behind them by name."""
        known = {axis: [str(value) for value in values] for axis, values in self.axes.items()}
        texts = ((values, str(self.value(row, axis))) for axis, values in known.items())
        return tuple((values.index(text), "") if text in values else (len(values), text) for values, text in texts)
