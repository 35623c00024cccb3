# SPDX-License-Identifier: MIT
"""Tables of finished runs: a paper's numbers beside ours. What a paper says about its own table is a :class:`PaperTable`."""

from .description import PaperTable, Recipe, Values
from .finished import FinishedRun, find_finished, read_finished
from .jobs import Job, Outcome, run_jobs
from .rows import ResultRow, common_row, read_rows, seconds_of, update_rows
from .tables import Cell, Format, ResultTable, Row, Score, rendered

__all__ = [
    "Cell",
    "FinishedRun",
    "Format",
    "Job",
    "Outcome",
    "PaperTable",
    "Recipe",
    "ResultRow",
    "ResultTable",
    "Row",
    "Score",
    "Values",
    "common_row",
    "find_finished",
    "read_finished",
    "read_rows",
    "rendered",
    "run_jobs",
    "seconds_of",
    "update_rows",
]
