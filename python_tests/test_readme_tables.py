# SPDX-License-Identifier: MIT
"""The README's tables of results are those that the files in benchmarks/results make, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the tables need the extra protokernels[train]")

from benchmarks import readme
from protokernels.cli import main
from protokernels.results import read_rows, rendered
from protokernels.tables import papers_with_a_table, table_of

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MADE = readme.made_tables()


@pytest.mark.parametrize("place", MADE, ids=" ".join)
def test_the_readmes_tables_are_made_of_the_results(place: tuple[str, str]) -> None:
    shown = readme.tables_in(README[readme.section(README, *place)])
    assert [cells for _, cells in shown] == [cells for _, cells in MADE[place]]
    assert all(title in ("", other) for (title, _), (other, _) in zip(shown, MADE[place], strict=True))


def test_the_readme_is_what_the_command_writes() -> None:
    assert readme.replaced(README) == README, "run: python benchmarks/readme.py"


@pytest.mark.parametrize("part", ["Papers", "Benchmarks"])
def test_no_table_of_results_is_made_by_hand(part: str) -> None:
    text = README.replace(readme.gallery.as_markdown(), "")
    (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    number = sum(len(tables) for (where, _), tables in MADE.items() if where == part)
    assert len(readme.tables_in(text)) == number, "describe the new table in benchmarks/readme.py"


def test_every_paper_with_a_table_has_one() -> None:
    assert {paper for paper, _ in readme.PAPERS.values()} == set(papers_with_a_table())


def test_the_command_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    path = readme.RESULTS / "vaesim.json"
    assert main(["table", "vaesim", str(path), "--format", "markdown"]) == 0
    assert capsys.readouterr().out == rendered(table_of("vaesim").tables(read_rows(path)), "markdown") + "\n"


def test_a_changed_number_is_seen() -> None:
    text = "**a**\n\n| | x |\n|---|---|\n| b | 0.5 |\n\ntext\n\n|  | x |\n|---|---|\n| b | |\n"
    assert readme.tables_in(text) == [("a", [["", "x"], ["b", "0.5"]]), ("", [["", "x"], ["b", ""]])]
    assert readme.tables_in(text) != readme.tables_in(text.replace("0.5", "0.6"))


class TestPivot:
    ROWS = (
        {
            "what": "step",
            "case": "big",
            "order": 2,
            "contender": "protokernels",
            "median_ms": 2.0,
            "share_of_limit": 0.5,
        },
        {
            "what": "step",
            "case": "big",
            "order": 2,
            "contender": "torch",
            "median_ms": 31.0,
            "ratio": 15.2,
            "peak_mb": 7.4,
        },
        {"what": "step", "case": "small", "order": 1, "contender": "torch", "median_ms": 0.5, "ratio": 1.07},
    )
    COLUMNS = (
        readme.Column("ours", "step", shows="limit"),
        readme.Column("torch", "step", "torch"),
        readme.Column("MB", "step", "torch", shows="memory"),
        readme.Column("loop", "step", "loop"),
    )

    def test_cases_go_down_and_contenders_across(self) -> None:
        pivot = readme.Pivot("rows", self.COLUMNS, words={("big", "loop"): "NaN"})
        assert pivot.cells(self.ROWS) == [
            ["rows", "ours", "torch", "MB", "loop"],
            ["small", "", "0.500 (1.07x)", "", ""],
            ["big", "2 (50%)", "31 (15x)", "7", "NaN"],
        ]

    def test_cases_left_out(self) -> None:
        assert len(readme.Pivot("rows", self.COLUMNS, without="^big$").cells(self.ROWS)) == 2

    def test_losses_keep_two_digits(self) -> None:
        assert [readme.times(ratio) for ratio in (0.446, 0.98, 1.2, 9.94, 9.96)] == [
            "0.45x",
            "0.98x",
            "1.2x",
            "9.9x",
            "10x",
        ]


class TestReplacing:
    def test_an_unknown_section_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="wanted one section"):
            readme.section(README, "Papers", "No such paper")

    def test_a_stale_number_is_replaced_and_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place = readme.section(README, "Benchmarks", "Prototypes")
        stale = README[: place.start] + README[place].replace("| 2048x32x10 |", "| 1x1x1 |") + README[place.stop :]
        assert stale != README
        (tmp_path / "README.md").write_text(stale)
        monkeypatch.setattr(readme, "ROOT", tmp_path)
        assert readme.main(["--check"]) == 1
        assert "Prototypes" in capsys.readouterr().out
        assert readme.main([]) == 0
        assert (tmp_path / "README.md").read_text() == README
        assert readme.main(["--check"]) == 0
