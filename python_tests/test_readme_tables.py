# SPDX-License-Identifier: MIT
"""The tables of results in README.md and benchmarks/results/README.md are those that the files in benchmarks/results make, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the tables need the extra protokernels[train]")

from benchmarks import paper_tables, pivots, readme
from protokernels.cli import main
from protokernels.results import read_rows, rendered
from protokernels.tables import papers_with_a_table, table_of

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {file: (ROOT / file).read_text() for file in (readme.SHORT, readme.WHOLE)}
MADE = readme.made_tables()


@pytest.mark.parametrize("place", MADE, ids=" ".join)
def test_the_tables_are_made_of_the_results(place: readme.Place) -> None:
    text = TEXTS[place.file]
    shown = readme.tables_in(text[readme.section(text, place)])
    assert [cells for _, cells in shown] == [cells for _, cells in MADE[place]]
    assert all(title in ("", other) for (title, _), (other, _) in zip(shown, MADE[place], strict=True))


@pytest.mark.parametrize("file", TEXTS)
def test_the_text_is_what_the_command_writes(file: str) -> None:
    assert readme.replaced(file, TEXTS[file]) == TEXTS[file], "run: python benchmarks/readme.py"


@pytest.mark.parametrize("file", TEXTS)
@pytest.mark.parametrize("part", ["Papers", "Benchmarks"])
def test_no_table_of_results_is_made_by_hand(file: str, part: str) -> None:
    text = TEXTS[file].replace(readme.gallery.as_markdown(), "")
    (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    number = sum(len(tables) for place, tables in MADE.items() if place[:2] == (file, part))
    assert len(readme.tables_in(text)) == number, "describe the new table in benchmarks/readme.py"


def test_every_paper_with_a_table_has_one() -> None:
    assert set(readme.PAPERS.values()) == set(papers_with_a_table())


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
        pivots.Column("ours", "step", shows="limit"),
        pivots.Column("torch", "step", "torch"),
        pivots.Column("MB", "step", "torch", shows="memory"),
        pivots.Column("loop", "step", "loop"),
    )

    def test_cases_go_down_and_contenders_across(self) -> None:
        pivot = pivots.Pivot("rows", self.COLUMNS, words={("big", "loop"): "NaN"})
        assert pivot.cells(self.ROWS) == [
            ["rows", "ours", "torch", "MB", "loop"],
            ["small", "", "0.500 (1.07x)", "", ""],
            ["big", "2 (50%)", "31 (15x)", "7", "NaN"],
        ]

    def test_cases_left_out(self) -> None:
        assert len(pivots.Pivot("rows", self.COLUMNS, without="^big$").cells(self.ROWS)) == 2

    def test_losses_keep_two_digits(self) -> None:
        assert [pivots.times(ratio) for ratio in (0.446, 0.98, 1.2, 9.94, 9.96)] == [
            "0.45x",
            "0.98x",
            "1.2x",
            "9.9x",
            "10x",
        ]


class TestHeadlines:
    def test_every_case_was_measured_on_the_cpu(self) -> None:
        rows = pivots.held("cascade_lake")["rows"]
        measured = {(row["what"], row["case"]) for row in rows if row["contender"] == pivots.OURS}
        assert {(what, case) for _, what, case in pivots.HEADLINES} <= measured

    def test_the_strongest_peer_speaks_for_all(self) -> None:
        (label, what, case), *_ = pivots.HEADLINES
        peers = {"torch argmax + index_add": 3.0, "torch.compile": 2.0, "faiss, flat": 5.0, "POT": 4.0}
        rows = [{"what": what, "case": case, "contender": pivots.OURS, "median_ms": 1.0, "ratio": 1.0}]
        rows += [
            {**rows[0], "contender": name, "median_ms": 2 * ratio, "ratio": ratio} for name, ratio in peers.items()
        ]
        rows += [{**rows[0], "contender": "torch, bf16", "ratio": 0.5, "against": f"{pivots.OURS}, bf16"}]
        assert pivots.headline_cells(rows, [])[1] == [label, "1", "torch.compile: 4 (2.0x)", "POT: 8 (4.0x)", "", ""]


class TestDice:
    HEAD = ("Dice", "paper (4 folds)", "folds")

    def test_the_papers_numbers_stand_beside_ours(self) -> None:
        one = [["a, 5 %", *self.HEAD], ["Random", "0.5", "0.6", "4"], ["Global", "0.7", "0.8", "4"]]
        other = [["b, 10 %", "Dice", "folds"], ["Random", "0.1", "4"], ["Global", "0.2", "4"]]
        assert paper_tables.dice_cells([("test", one), ("test", other)]) == [
            ["Dice", "a, 5 %", "*paper (4 folds)*", "b, 10 %"],
            ["Random", "0.5", "0.6", "0.1"],
            ["Global", "0.7", "0.8", "0.2"],
        ]

    def test_rows_in_another_order_are_an_error(self) -> None:
        one = [["a, 5 %", *self.HEAD], ["Random", "0.5", "0.6", "4"], ["Global", "0.7", "0.8", "4"]]
        with pytest.raises(ValueError, match="other methods"):
            paper_tables.dice_cells([("test", one), ("test", [one[0], one[2], one[1]])])


class TestShortTables:
    """README's tables of the papers: what the long ones say, the published number beside ours."""

    def test_vaesim_stands_beside_the_paper(self) -> None:
        head = ["method", "preset", "set", "statistical", "kNN", "linear", "supervised"]
        long = [
            head,
            ["the larger class", "", "test", "0.6", "", "", ""],
            ["vaesim", "*paper, Table 1*", "val+test", "0.1", "0.2", "0.3", ""],
            ["vaesim", "`official`", "val", "0.9", "0.9", "0.9", ""],
            ["vaesim", "`official`", "val+test", "0.11", "0.21", "", ""],
            ["vaesim", "`fair`", "test", "0.4", "", "", ""],
            ["vade", "*paper, Table 1*", "test", "0.5", "", "", ""],
            ["vade", "`pytorch`", "test", "0.51", "", "", ""],
            ["raw pixels", "", "test", "", "0.7", "", ""],
            ["resnet_transfer", "*paper, Table 1*", "test", "", "", "", "0.8"],
            ["resnet50_random_init", "`fair`", "test", "", "0.1", "", "0.81"],
        ]
        assert paper_tables.vaesim_cells(long) == [
            ["", "set", "score", "paper", "released code", "`paper`", "`fair`"],
            ["VAESim", "val+test", "statistical", "0.1", "0.11", "", ""],
            ["VAESim", "val+test", "kNN", "0.2", "0.21", "", ""],
            ["VAESim", "test", "statistical", "", "", "", "0.4"],
            ["VaDE", "test", "statistical", "0.5", "0.51", "", ""],
            ["ResNet50, all labels", "test", "supervised", "0.8", "", "", "0.81"],
            ["the larger class", "test", "any", "0.6", "0.6", "0.6", "0.6"],
        ]

    def test_the_autoencoder_by_presets(self) -> None:
        long = [
            ["", "accuracy"],
            ["most frequent class", "0.1"],
            ["paper, kNN on h", "0.8"],
            ["paper, ResNet18", "0.9"],
        ]
        long += [["kNN on h, `fair`", "0.7"], ["kNN on z, `paper`", "0.6"]]
        assert paper_tables.autoencoder_cells(long) == [
            ["accuracy", "paper", "`paper`", "`fair`"],
            ["kNN on h", "0.8", "", "0.7"],
            ["kNN on z", "", "0.6", ""],
        ]


class TestReplacing:
    def test_an_unknown_section_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="wanted one section"):
            readme.section(TEXTS[readme.SHORT], readme.Place(readme.SHORT, "Papers", "No such paper"))

    def test_a_stale_number_is_replaced_and_named(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for file, text in TEXTS.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        text = TEXTS[readme.WHOLE]
        place = readme.section(text, readme.Place(readme.WHOLE, "Benchmarks", "Prototypes"))
        stale = text[: place.start] + text[place].replace("| 2048x32x10 |", "| 1x1x1 |") + text[place.stop :]
        assert stale != text
        (tmp_path / readme.WHOLE).write_text(stale)
        monkeypatch.setattr(readme, "ROOT", tmp_path)
        assert readme.main(["--check"]) == 1
        assert "Prototypes" in capsys.readouterr().out
        assert readme.main([]) == 0
        assert {file: (tmp_path / file).read_text() for file in TEXTS} == TEXTS
        assert readme.main(["--check"]) == 0
