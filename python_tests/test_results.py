# SPDX-License-Identifier: MIT
"""What the papers' tables share: cells and formats, finished runs, rows, the results file, runs that fail or are taken."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("accelerate", reason="run folders need the extra protokernels[train]")

from protokernels.results import (
    Job,
    ResultTable,
    Row,
    Score,
    find_finished,
    read_finished,
    read_rows,
    rendered,
    run_jobs,
    update_rows,
)
from protokernels.results.fields import as_record, changed, field_name, field_value, named_values
from protokernels.results.jobs import check_folders, is_finished
from protokernels.results.rows import common_row, grouped, merged
from protokernels.results.scores import main_scores
from protokernels.results.tables import literal
from protokernels.training import RunFolder, RunFolderError
from protokernels.training.files import exclusive
from protokernels.training.runs import RunSettings, update_results

from .run_folders import vaesim_splits, write_run


class TestTables:
    TABLE = ResultTable(
        ("", "AUC", "seeds", "majority"),
        (Row("**ours**", (Score(0.8125, 0.05, 3), 3, None), {"k": 5}), Row("`other`", (Score(0.7), 1, "*0.6*"))),
        title="test",
        group="made, preset `fair`",
        notes=("A note on **ours**.",),
    )

    def test_markdown(self) -> None:
        assert rendered([self.TABLE, self.TABLE], "markdown").split("\n\n") == [
            "### made, preset `fair`",  # once
            *(
                "**test**",
                "| | AUC | seeds | majority |\n|---|---|---|---|\n"
                "| **ours** | 0.812 ± 0.050 | 3 | |\n| `other` | 0.700 | 1 | *0.6* |",
                "A note on **ours**.",
            )
            * 2,
        ]

    def test_text_is_aligned_and_has_no_marks(self) -> None:
        lines = rendered([self.TABLE], "text").splitlines()
        assert lines[0] == "made, preset fair" and lines[2] == "test" and lines[-1] == "A note on ours."
        ours, other = (next(line for line in lines if name in line) for name in ("ours ", "other"))
        assert ours.split() == ["ours", "0.812", "±", "0.050", "3"] and other.split() == ["other", "0.700", "1", "0.6"]
        assert ours.index("3") < len(other) and "*" not in "".join(lines) and "`" not in "".join(lines)

    def test_json_has_numbers_runs_and_protocol(self) -> None:
        (table,) = json.loads(rendered([self.TABLE], "json"))
        assert table["rows"][0] == {
            "name": "ours",
            "cells": {"AUC": {"mean": 0.8125, "std": 0.05, "runs": 3}, "seeds": 3, "majority": None},
            "protocol": {"k": 5},
        }
        assert table["rows"][1]["cells"]["majority"] == "0.6"

    def test_names_are_shown_as_they_are_spelt(self) -> None:
        name = r"a*b|`c`\d"
        shown = literal(name)
        row = Row(f"**{shown}**", (shown, None))
        table = ResultTable((shown, "x|y", "z"), (row,), title=shown, group=shown, notes=(f"A note on {shown}.",))
        text, (read,) = rendered([table], "text"), json.loads(rendered([table], "json"))
        assert text.count(name) == 6 and "\\*" not in text
        assert [read[key] for key in ("title", "group")] == [name, name] and read["columns"] == [name, "x|y", "z"]
        assert read["rows"] == [{"name": name, "cells": {"x|y": name, "z": None}, "protocol": {}}]
        assert rendered([table], "markdown").splitlines()[4:7] == [
            r"| a\*b\|\`c\`\\d | x\|y | z |",
            "|---|---|---|",
            r"| **a\*b\|\`c\`\\d** | a\*b\|\`c\`\\d | |",
        ]

    def test_scores(self) -> None:
        assert str(Score.over([0.1, -0.1], signed=True)) == "+0.000 ± 0.141" and Score.over([]) is None
        assert str(Score.over([4.125], digits=2)) == "4.12" and Score.of({"mean": None}) is None
        assert Score.of({"mean": 1.0, "std": None, "values": [1.0]}) == Score(1.0, None, 1)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="expected 1 cells behind each name"):
            ResultTable(("", "a"), (Row("x", ()),))
        with pytest.raises(ValueError, match="expected one of text, markdown, json"):
            rendered([self.TABLE], "html")  # type: ignore[arg-type]


class TestFinishedRuns:
    def test_everything_below_a_folder_that_is_complete(self, tmp_path: Path) -> None:
        for seed, complete in ((0, True), (1, False), (10, True)):
            write_run(tmp_path / "a" / f"seed-{seed}", "vaesim", {}, vaesim_splits(0.5), seed=seed, complete=complete)
        write_run(tmp_path / "deep" / "er" / "b", "vaesim", {}, vaesim_splits(0.5))
        write_run(tmp_path / "c", "optiml", {}, vaesim_splits(0.5))
        (tmp_path / "a" / "results.json").write_text(
            json.dumps({"paper": "vaesim", "complete": True, "seeds": [0, 10]})
        )
        runs = find_finished([tmp_path, tmp_path / "a"], ["vaesim"])  # a is in both
        assert [(run.name, run.seed) for run in runs] == [("a", 0), ("a", 10), ("b", 0)]
        assert runs[0].environment["commit"] == "abc" and runs[0].metrics == [{"epoch": 1, "seconds": 2.0}]
        assert read_finished(tmp_path / "nothing") is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"complete": tr', "is not valid JSON"),
            ("[]", "expected an object with the results of a run; got list"),
            ('{"complete": true, "paper": "vaesim"}', "has no config, seed, splits; remove it and continue the run"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path: Path, content: str, message: str) -> None:
        folder = write_run(tmp_path / "a", "vaesim", {}, {})
        (folder / "results.json").write_text(content)
        with pytest.raises(ValueError, match=f"{folder / 'results.json'}.*{message}"):
            find_finished([tmp_path], ["vaesim"])

    def test_lock_files_beside_runs_are_passed_over(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", "vaesim", {}, {})
        (tmp_path / "a.lock").touch()
        assert [run.path for run in find_finished(sorted(tmp_path.iterdir()), ["vaesim"])] == [folder]

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere is no folder"):
            find_finished([tmp_path / "nowhere"], ["vaesim"])


class TestRows:
    def test_runs_of_one_row(self, tmp_path: Path) -> None:
        for seed, score in ((3, 0.7), (0, 0.5)):
            write_run(tmp_path / f"seed-{seed}", "vaesim", {}, vaesim_splits(score), seed=seed)
        (group,) = grouped(find_finished([tmp_path], ["vaesim"]), lambda run: (run.config["data"],))
        row = common_row(group)
        assert (
            row["seeds"] == [0, 3] and row["data"] == "made" and row["preset"] == "fair" and row["commits"] == ["abc"]
        )
        knn = row["splits"]["test"]["knn"]["accuracy"]
        assert knn["mean"] == pytest.approx(0.6) and knn["runs"] == 2

    def test_what_does_not_belong_together_is_refused(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "vaesim", {}, vaesim_splits(0.5))
        write_run(tmp_path / "b", "vaesim", {}, vaesim_splits(0.5))
        runs = find_finished([tmp_path], ["vaesim"])
        with pytest.raises(ValueError, match=r"a and .*b hold the same seed 0"):
            grouped(runs, lambda run: ())
        write_run(tmp_path / "c", "vaesim", {"epochs": 4}, vaesim_splits(0.5), seed=1)
        runs = find_finished([tmp_path / "a", tmp_path / "c"], ["vaesim"])
        with pytest.raises(ValueError, match=r"different configurations \(epochs\)"):
            grouped(runs, lambda run: ())
        for seed in (2, 3):
            path = write_run(tmp_path / str(seed), "vaesim", {}, vaesim_splits(0.5), seed=seed) / "environment.json"
            path.write_text(json.dumps({"data": {"md5s": {"made.npz": str(seed)}}}))
        runs = find_finished([tmp_path / "a", tmp_path / "2", tmp_path / "3"], ["vaesim"])
        with pytest.raises(
            ValueError, match=r"2 and .*3 hold runs of different data \(made\.npz\) and would be one row"
        ):
            grouped(runs, lambda run: ())

    def test_configurations_may_be_completed(self, tmp_path: Path) -> None:
        write_run(tmp_path / "old", "made", {}, {"test": {}})
        write_run(tmp_path / "new", "made", {"later": 0}, {"test": {}}, seed=1)
        runs = find_finished([tmp_path], ["made"])
        with pytest.raises(ValueError, match="later"):
            grouped(runs, lambda run: ())
        (group,) = grouped(runs, lambda run: (), lambda run: {"later": 0, **run.config})
        assert [run.seed for run in group] == [0, 1]

    def test_rows_that_are_not_at_hand_stay(self) -> None:
        before = [{"name": name, "value": 1} for name in "ab"]
        now = [{"name": name, "value": 2} for name in "bc"]
        rows = merged(before, now, lambda row: row["name"])
        assert [(row["name"], row["value"]) for row in rows] == [("a", 1), ("b", 2), ("c", 2)]

    def test_a_results_file_that_is_none(self, tmp_path: Path) -> None:
        for content, message in (("{", "not valid JSON"), ("{}", "holds no rows"), ('[{"a": 1}]', "holds no rows")):
            (tmp_path / "a.json").write_text(content)
            with pytest.raises(ValueError, match=message):
                read_rows(tmp_path / "a.json")
        with pytest.raises(ValueError, match="does not exist"):
            read_rows(tmp_path / "b.json")

    def test_processes_that_update_one_file_wait_for_each_other(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        path = tmp_path / "results" / "a.json"
        processes = [context.Process(target=_append, args=(path, number)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(row["number"] for row in read_rows(path)) == [number for number in range(4) for _ in range(20)]

    def test_the_file_keeps_its_form(self, tmp_path: Path) -> None:
        source = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
        for name in ("vaesim", "optiml", "local_contrast", "optimized_views"):
            path = tmp_path / f"{name}.json"
            path.write_bytes((source / f"{name}.json").read_bytes())
            update_rows(path, lambda rows: rows)
            assert path.read_bytes() == (source / f"{name}.json").read_bytes()

    def test_data_that_rows_have_in_common_is_written_once(self, tmp_path: Path) -> None:
        def row(number: int, *files: str) -> dict[str, Any]:
            return {"number": number, "environment": {"started": number, "data": {"files": list(files)}}, "splits": {}}

        rows = [row(0, "a"), row(1, "b"), row(2, "a"), {"number": 3, "splits": {}}, row(4, "b"), row(5, "c")]
        path = tmp_path / "rows.json"
        assert update_rows(path, lambda before: rows) == rows == read_rows(path)
        stored = json.loads(path.read_text())
        assert stored[2]["environment"] == {"started": 2, "data": {"as_in_row": 0}} and stored[:2] == rows[:2]
        assert update_rows(path, lambda before: before[1:]) == rows[1:] == read_rows(path)  # the numbers change
        assert path.read_text().count('"b"') == 1


def _append(path: Path, number: int) -> None:
    for _ in range(20):
        update_rows(path, lambda rows: [*rows, {"number": number, "splits": {}}])


@dataclass(frozen=True)
class Config:
    """Of a paper that trains nothing."""

    data: str = "made"
    preset_name: str = "fair"
    num_things: int = 4
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: float | None = None
    order: tuple[str, ...] = ("x", "y")

    def __post_init__(self) -> None:
        if self.num_things < 1:
            raise ValueError(f"Config: num_things must be positive; got {self.num_things}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


class TestFields:
    def test_names(self) -> None:
        assert field_name(Config(), "rate") == "rate" and field_name(Config(), "things") == "num_things"
        assert field_name(Config(), "num-things") == "num_things"
        with pytest.raises(ValueError, match="has no field 'rte'; did you mean rate"):
            field_name(Config(), "rte")
        with pytest.raises(ValueError, match="expected one of num_things, rate, kind"):
            field_name(Config(), "preset_name")  # chosen by --preset

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("num_things", "3", 3),
            ("rate", "1e-3", 1e-3),
            ("kind", "b", "b"),
            ("flag", "True", True),
            ("limit", "none", None),
            ("limit", "2", 2.0),
            ("data", "digits", "digits"),
            ("order", '["y"]', ("y",)),
        ],
    )
    def test_values(self, name: str, text: str, value: Any) -> None:
        assert field_value(Config(), name, text) == value

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("num_things", "2.5", "takes a whole number; got '2.5'"),
            ("rate", "nan", "takes a number; got 'nan'"),
            ("kind", "c", "takes one of a, b; got 'c'"),
            ("flag", "1", "takes true or false"),
            ("limit", "x", "takes a number or none"),
            ("order", "x", "takes a JSON list"),
        ],
    )
    def test_wrong_values(self, name: str, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"Config: {name} {message}"):
            field_value(Config(), name, text)

    def test_a_value_that_the_configuration_refuses_is_named(self) -> None:
        assert changed(Config(), rate=0.5) == Config(rate=0.5)
        with pytest.raises(ValueError, match="num_things=0: Config: num_things must be positive"):
            changed(Config(), num_things=0)

    def test_words(self) -> None:
        assert named_values(["a=1,2", "b=x"], "--over") == {"a": ["1", "2"], "b": ["x"]}
        for words in (["a"], ["a="], ["=1"], ["a=1", "a=2"]):
            with pytest.raises(ValueError, match="--over"):
                named_values(words, "--over")


class Paper:
    """Its ``train`` writes a run, or fails where the configuration says so."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.loaded: list[float] = []

    def data_key(self, config: Config) -> int:
        return config.num_things

    def load(self, config: Config, data_root: Path | None, *, download: bool) -> str:
        self.loaded.append(config.rate)
        return f"data {config.rate}"

    def check_data(self, folder: Path, config: Config, dataset: str) -> None:
        pass

    def train(self, config: Config, out: Path, *, settings: RunSettings, **more: Any) -> dict[str, Any]:
        self.trained.append(out.name)
        record = {"paper": "made", "config": {**vars(config), "order": list(config.order)}, "seed": settings.seed}
        run = RunFolder.create(out, record | {"precision": settings.precision}, resume=settings.resume)
        if config.rate == 0.13:
            raise FloatingPointError("the loss is nan")
        run.append_metrics({"epoch": 1, "seconds": 1.0})
        update_results(
            run, {"splits": {"test": {"accuracy": config.rate}}, "data": str(more.get("dataset"))}, {}, epochs=1
        )
        return {**(run.results() or {}), "folder": str(out)}


def jobs(paper: Paper, folder: Path, **rates: float) -> list[Job]:
    settings = RunSettings(resume=True)
    return [Job(name, "made", paper, Config(rate=rate), folder / name, settings) for name, rate in rates.items()]


class TestJobs:
    def test_what_is_finished_is_passed_over_and_what_fails_stops_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paper, seen = Paper(), []
        work = jobs(paper, tmp_path, a=0.1, bad=0.13, c=0.3)
        outcome = run_jobs(work, after=lambda job, results: seen.append((job.name, results["splits"])))
        assert paper.trained == ["a", "bad", "c"] and outcome.failed == {"bad": "the loss is nan"} and not outcome.busy
        assert [name for name, _ in seen] == ["a", "c"]
        outcome.report()
        assert "not finished: bad: the loss is nan\nrun the same command again" in capsys.readouterr().err
        run_jobs(work, after=lambda job, results: seen.append((job.name, results["splits"])))
        assert paper.trained == ["a", "bad", "c", "bad"]
        assert seen[-1] == (
            "c",
            {"test": {"accuracy": {"mean": 0.3, "std": None, "runs": 1}}},
        )  # also what was finished

    def test_a_run_that_another_process_is_at_is_left_to_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paper = Paper()
        with exclusive(tmp_path / "a.lock"):
            outcome = run_jobs(jobs(paper, tmp_path, a=0.1, b=0.2))
        assert outcome.busy == ["a"] and paper.trained == ["b"] and not (tmp_path / "a").exists()
        outcome.report()
        assert "left to another process: a" in capsys.readouterr().err

    def test_another_run_in_the_folder_is_refused_before_anything_is_trained(self, tmp_path: Path) -> None:
        paper = Paper()
        run_jobs(jobs(paper, tmp_path, b=0.2))
        with pytest.raises(RunFolderError, match=r"b holds another run than b \(rate: 0.2 there, 0.5 now\)"):
            run_jobs(jobs(paper, tmp_path, a=0.1, b=0.5))
        assert paper.trained == ["b"]
        assert not run_jobs(jobs(paper, tmp_path, a=0.1, b=0.5), keep_finished=True).failed
        assert paper.trained == ["b", "a"]
        (tmp_path / "b" / "results.json").unlink()
        with pytest.raises(RunFolderError, match="rate"):  # what has not ended cannot go on as another
            check_folders(jobs(paper, tmp_path, b=0.5), keep_finished=True)
        twice = jobs(paper, tmp_path, b=0.2) + jobs(paper, tmp_path, b=0.3)
        with pytest.raises(RunFolderError, match="would both lie in"):
            check_folders(twice)

    @pytest.mark.parametrize(
        ("before", "now", "message"),
        [
            ({"seed": 0}, {"seed": 5}, r"seeds: \[0\] there, \[5\] now"),
            ({"seed": 0}, {"runs": 2}, r"seeds: \[0\] there, \[0, 1\] now"),
            ({"runs": 3}, {"runs": 2}, r"seeds: \[0, 1, 2\] there, \[0, 1\] now"),
            ({"runs": 2}, {"seed": 0}, r"seeds: \[0, 1\] there, \[0\] now"),
        ],
    )
    def test_runs_of_other_seeds_are_not_what_is_asked_for(
        self, before: dict[str, int], now: dict[str, int], message: str, tmp_path: Path
    ) -> None:
        seeds = RunSettings(**before).seeds
        there: dict[str, Any] = {"seed": 0} if len(seeds) == 1 else {"seeds": seeds}
        (tmp_path / "a").mkdir()
        record = {"paper": "made", "config": as_record(Config()), "precision": "fp32", **there}
        (tmp_path / "a" / "config.json").write_text(json.dumps(record))
        check_folders([Job("a", "made", Paper(), Config(), tmp_path / "a", RunSettings(**before, resume=True))])
        with pytest.raises(RunFolderError, match=f"a holds another run than a .{message}"):
            check_folders([Job("a", "made", Paper(), Config(), tmp_path / "a", RunSettings(**now, resume=True))])

    def test_a_field_newer_than_the_run_has_its_default(self, tmp_path: Path) -> None:
        (work,) = jobs(Paper(), tmp_path, a=0.1)
        run_jobs([work])
        record = json.loads((tmp_path / "a" / "config.json").read_text())
        del record["config"]["limit"]
        (tmp_path / "a" / "config.json").write_text(json.dumps(record))
        check_folders([work])

    def test_a_broken_results_file_fails_its_run_only(self, tmp_path: Path) -> None:
        paper = Paper()
        run_jobs(jobs(paper, tmp_path, a=0.1))
        (tmp_path / "a" / "results.json").write_text("{")
        outcome = run_jobs(jobs(paper, tmp_path, a=0.1, b=0.2))
        assert list(outcome.failed) == ["a"] and "a/results.json is not valid JSON" in outcome.failed["a"]
        assert paper.trained == ["a", "b"]

    def test_data_of_one_key_is_loaded_once(self, tmp_path: Path) -> None:
        paper = Paper()
        run_jobs(jobs(paper, tmp_path, a=0.1, b=0.2))
        assert paper.loaded == [0.1] and json.loads((tmp_path / "b" / "results.json").read_text())["data"] == "data 0.1"

    def test_several_seeds_are_finished_together(self, tmp_path: Path) -> None:
        job = Job("a", "made", Paper(), Config(), tmp_path, RunSettings(seed=3, runs=2, resume=True))
        write_run(tmp_path / "seed-3", "made", {}, {})
        assert not is_finished(job)
        write_run(tmp_path / "seed-4", "made", {}, {}, seed=4)
        assert is_finished(job)


def test_main_scores_of_every_kind() -> None:
    score = {"mean": 0.8, "std": None, "runs": 1}
    splits = {
        "knn": {"accuracy": score, "confusion": {"a": score}},
        "majority": {"accuracy": score},
        "labels": {"probe": {"1%": {"macro_auroc": score, "images": score}}},
        "hold_out": {"auc": score, "sets": {"0": {"auc": score}}},
    }
    assert list(main_scores(splits)) == ["knn", "labels, probe, 1%", "hold_out"]
