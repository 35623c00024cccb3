# SPDX-License-Identifier: MIT
"""The README's tables of results are those that `protokernels table` makes of the files in benchmarks/results.

Every table under "## Papers" belongs to a paper and is compared cell by cell, with the bold line above it where there is one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the tables need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.results import read_rows, rendered
from protokernels.tables import papers_with_a_table, table_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {  # heading -> paper
    "VAESim": "vaesim",
    "Contrastive autoencoder": "contrastive_autoencoder",
    "Local contrast": "local_contrast",
    "Optimised views": "optimized_views",
    "Baselines": "optiml",  # beside which it stands
}
Table = tuple[str, list[list[str]]]  # title and cells


def tables_in(markdown: str) -> list[Table]:
    """The tables of a Markdown text, without the lines between head and body, each with the bold line above it."""
    found: list[Table] = []
    for match in re.finditer(r"(?:^\*\*([^*\n]+)\*\*\n\n)?((?:^\|.*\|\n?)+)", markdown, flags=re.M):
        lines = [line for line in match[2].splitlines() if not re.fullmatch(r"[|\- ]+", line)]
        found.append((match[1] or "", [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]))
    return found


def sections() -> dict[str, str]:
    """Heading -> text of the parts of "## Papers"."""
    papers = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)
    (text,) = (part for part in papers if part.startswith("Papers\n"))
    heading, *rest = re.split(r"^### (.*)\n", text, flags=re.M)
    assert heading.strip() == "Papers"
    return dict(zip(rest[::2], rest[1::2], strict=True))


def paper_of(heading: str) -> str | None:
    return next((paper for start, paper in SECTIONS.items() if heading.startswith(f"{start}:")), None)


@pytest.mark.parametrize("paper", SECTIONS.values())
def test_the_readmes_tables_are_made_of_the_results(paper: str) -> None:
    shown = [table for heading, text in sections().items() if paper_of(heading) == paper for table in tables_in(text)]
    made = tables_in(rendered(table_of(paper).tables(read_rows(RESULTS / f"{paper}.json")), "markdown"))
    assert [cells for _, cells in shown] == [cells for _, cells in made]
    assert all(title in ("", other) for (title, _), (other, _) in zip(shown, made, strict=True))


def test_no_table_of_results_is_made_by_hand() -> None:
    unknown = [heading for heading, text in sections().items() if tables_in(text) and paper_of(heading) is None]
    assert unknown == [], f"tables under {', '.join(unknown)}: add the section and its paper to SECTIONS"
    assert set(SECTIONS.values()) <= set(papers_with_a_table())


def test_the_command_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    path = RESULTS / "vaesim.json"
    assert main(["table", "vaesim", str(path), "--format", "markdown"]) == 0
    assert capsys.readouterr().out == rendered(table_of("vaesim").tables(read_rows(path)), "markdown") + "\n"


def test_a_changed_number_is_seen() -> None:
    text = "**a**\n\n| | x |\n|---|---|\n| b | 0.5 |\n\ntext\n\n|  | x |\n|---|---|\n| b | |\n"
    assert tables_in(text) == [("a", [["", "x"], ["b", "0.5"]]), ("", [["", "x"], ["b", ""]])]
    assert tables_in(text) != tables_in(text.replace("0.5", "0.6"))
