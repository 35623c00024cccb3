# SPDX-License-Identifier: MIT
"""The JSON file that benchmarks add rows to: what may go into it, what is refused before anything is measured, and the table of it."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.results_file import ResultsError, check_target, machine, read, target, write

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
WRITTEN = [path for path in sorted(RESULTS.glob("*.json")) if '"contender"' in path.read_text()]
TIMES = {"min_ms": 1.0, "p25_ms": 1.0, "median_ms": 2.0, "p75_ms": 3.0}
ROW = {"what": "step", "case": "8x2", "contender": "torch", "order": 0, "ratio": 2.0, "ours": TIMES, **TIMES}


def a_run(date: str = "first", threads: int = 2, model: str = "A processor", **more: Any) -> dict[str, Any]:
    processor = {"model": model, "family_model_stepping": "1/2/3"}
    return {
        "date": date, "commit": "abc", "processor": processor, "threads": threads, "allocator": {}, "load_average": [0.1],
        "versions": {"torch": "2"}, "library": {"cpu_level": "avx2"}, "ceilings": {"mm_gflops": 1.0, "copy_gb_per_s": 1.0}, **more,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "rows.json", a_run(), ROW)
    return tmp_path / "rows.json"


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_what_is_kept_comes_from_one_machine(path: Path) -> None:
    machines = [machine(run) for run in read(path)["runs"].values()]
    assert machines and all(other == machines[0] for other in machines)


def test_a_later_run_on_the_same_machine_adds_and_replaces(path: Path) -> None:
    check_target(path, a_run("second"))
    write(path, a_run("second"), {**ROW, "contender": "protokernels"})
    assert read(path)["runs"].keys() == {"first", "second"}
    write(path, a_run("second"), ROW)
    assert read(path)["runs"].keys() == {"second"} and len(read(path)["rows"]) == 2


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (a_run(model="Another"), r"processor: A processor \(1/2/3\) there, Another \(1/2/3\) here"),
        (a_run(threads=16), "threads: 2 there, 16 here"),
        (a_run(allocator={"MALLOC_CONF": "x"}), "allocator: {} there, {'MALLOC_CONF': 'x'} here"),
        (a_run(device={"name": "A GPU"}), "GPU: None there, A GPU here"),
    ],
    ids=["processor", "threads", "allocator", "GPU"],
)
def test_rows_of_another_machine_are_not_added_to(path: Path, run: dict[str, Any], named: str) -> None:
    before = path.read_text()
    with pytest.raises(ResultsError, match=f"run first of something else .*{named}.*name another file"):
        check_target(path, run)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "text", ['{"runs": {}, "ro', "[]", '{"rows": [{"case": 1}]}', '{"runs": {}, "rows": [1]}', "\x00"]
)
def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=r"other\.json (cannot be read as JSON|was not written by a benchmark)"):
        check_target(path, a_run())
    assert table.main([str(path)]) == 1 and str(path) in capsys.readouterr().err
    assert path.read_text() == text


def test_a_place_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "rows.json", tmp_path):
        with pytest.raises(ResultsError, match=r"cannot be (read|written): .*irectory"):
            check_target(path, a_run())
    check_target(tmp_path / "new" / "rows.json", a_run())


def test_a_table_of_ones_own(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([str(path)]) == 0
    assert "| 8x2 | torch | 2 | 1 | 1 to 3 | 2 | 2 (1) |" in capsys.readouterr().out
    assert table.main([str(path.with_name("absent.json"))]) == 1
    assert "there is no " in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(path.read_text())

    def full(*_: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write(path, a_run("second"), ROW)
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize("text", ["{", "not JSON at all"])
def test_an_out_that_is_something_else_is_refused_with_the_command_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    for path in (tmp_path / "README.md", tmp_path, tmp_path / "README.md" / "x.json"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be (read|written)"):
            target(str(path))
    assert (tmp_path / "README.md").read_text() == text
    assert target(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"


@pytest.mark.parametrize(
    ("script", "kind", "part"),
    [
        ("trainer_steps", "fair", ["--lines", "vaesim"]),
        ("trainer_steps", "fair", ["--ways", "ours"]),
        ("local_contrast_steps", "fair, hippocampus", ["--lines", "global"]),
    ],
)
def test_a_part_does_not_take_the_place_of_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    kind: str,
    part: list[str],
) -> None:
    pytest.importorskip("accelerate", reason="the scripts need the extra protokernels[train]")
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({kind: {"rows": []}}))
    monkeypatch.setattr("sys.argv", [script, *part, "--out", str(path)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"benchmarks.{script}").main()
    assert f"steps.json holds '{kind}', and a part would take the place of the whole" in capsys.readouterr().err
