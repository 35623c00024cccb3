# SPDX-License-Identifier: MIT
"""What commands write to the screen, or to the file or pipe in its place."""

from __future__ import annotations

import copy

from rich.console import Console
from rich.table import Table

WIDE = 10_000  # columns of a file or a pipe: wider than any line


def new_console(*, stderr: bool = False) -> Console:
    """A console that shows names as they are spelt: square brackets are no markup, words between colons no emoji. It breaks and
    cuts lines on a terminal only."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.file.isatty():
        console.width = WIDE
    return console


def print_line(text: str, style: str = "", *, stderr: bool = False) -> None:
    """Writes one line, which a terminal may wrap and nothing else does."""
    new_console(stderr=stderr).print(text, style=style, soft_wrap=True)


def print_table(table: Table) -> None:
    """Writes a table with its title above and its notes below, which rich would break at the table's width."""
    bare = copy.copy(table)
    bare.title = bare.caption = None
    if table.title:
        print_line(str(table.title), "italic")
    new_console().print(bare)
    if table.caption:
        print_line(str(table.caption), "dim italic")
