# SPDX-License-Identifier: MIT
"""`protokernels table`: what is trained, collected, merged and printed, paper by paper."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels.data import load_dataset
from protokernels.papers import PAPERS
from protokernels.results import update_rows
from protokernels.results.tables import is_rendered
from protokernels.tables import TableOptions, chosen_values, draw, job_of, papers_with_a_table, table_of, train_missing
from protokernels.training.files import exclusive

from .run_folders import Run, table_command, vaesim_splits, write_run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`protokernels table ...` -> status, output, errors."""
    return table_command(capsys)


class TestCommand:
    def test_every_paper_has_a_table(self) -> None:
        assert papers_with_a_table() == list(PAPERS)
        for paper in PAPERS:
            described = table_of(paper)
            assert described.paper == paper and next(iter(described.axes)) == "data" and "preset" in described.axes

    def test_words(self, run: Run) -> None:
        status, out, _ = run("--help")
        assert status == 0 and "papers: vaesim, optiml" in out
        status, out, err = run("fly")
        assert status == 2 and "unknown paper 'fly'; expected one of vaesim, " in err and "papers: vaesim" in out
        assert run()[0] == 2
        assert run("local-contrast", "--only", "fold")[0] == 1  # hyphens as in train

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--only", "size=3"], "unknown axis size; the table of vaesim has data, paper, preset"),
            (
                ["nowhere", "--only", "preset=paper", "--preset", "fair"],
                "--preset asks for fair and --only for paper; give one",
            ),
            (
                ["--only", "data=mnist", "--data", "mnist", "digits"],
                "--data asks for mnist, digits and --only for mnist",
            ),
            (["--add"], "name it with --results"),
            (["--runs", "0"], "--runs must be at least 1; got 0"),
            (["--figures", "f"], "vaesim has no pictures of several rows"),
            (["nowhere"], "nowhere is no folder"),
            (["nowhere.json"], "nowhere.json does not exist"),
            (["--preset", "best"], "no run of the table has preset best; it has some of fair, official"),
            (["--data", "mnist", "digits", "--preset", "best"], "no run of the table has preset best; it has some of"),
            (["--only", "paper=magic"], "unknown paper magic; expected some of vaesim"),
            (["--only", "paper=vaesim", "--preset", "fair", "--set", "latent=3"], "did you mean latent_dim"),
            (["--only", "paper=vaesim", "--preset", "fair", "--set", "latent_dim=0"], "latent_dim must be positive"),
            (["--data", "imagenet", "--preset", "fair", "--runs", "1"], "digits"),
        ],
    )
    def test_problems_are_named_and_nothing_is_trained(
        self, words: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        status, out, err = run("vaesim", *words)
        assert status == 1 and message in err and "Traceback" not in err and out == ""
        assert not list(tmp_path.rglob("config.json"))

    def test_formats_and_files(self, run: Run, tmp_path: Path) -> None:
        write_run(tmp_path / "runs" / "a", "vaesim", {"data": "mnist"}, vaesim_splits(0.9))
        _, text, _ = run("vaesim", tmp_path / "runs")
        assert text.startswith("mnist\n") and "0.830 ± 0.010" in text and "0.900" in text  # the paper's and ours
        _, text, _ = run("vaesim", tmp_path / "runs", "--format", "markdown", "--out", tmp_path / "a.md")
        assert text == "" and "| `fair` | test | 0.600 | 0.900 |" in (tmp_path / "a.md").read_text()
        _, text, _ = run("vaesim", tmp_path / "runs", "--format", "json")
        (table,) = json.loads(text)
        names = [row["name"] for row in table["rows"]]
        assert names[:6] == [
            "the larger class",
            *["vaesim"] * 4,
            "vae_kmeans",
        ]  # of vaesim: paper, logs, paper (aug), ours
        assert names[-1] == "resnet_transfer" and len(names) == 12  # what else was published
        assert table["rows"][1]["cells"]["kNN"] == {"mean": 0.97, "std": 0.001, "runs": 10}
        assert table["rows"][4]["cells"]["kNN"] == {"mean": 0.9, "std": None, "runs": 1}

    def test_an_earlier_table_is_replaced_and_nothing_else(self, run: Run, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", "vaesim", {"data": "x"}, vaesim_splits(0.5))
        results, out = tmp_path / "rows.json", tmp_path / "table"
        assert run("vaesim", folder, "--results", results)[0] == 0
        for how in ("text", "markdown", "json", "text"):
            assert run("vaesim", folder, "--format", how, "--out", out)[0] == 0
            written = out.read_text()
            assert run("vaesim", folder, "--format", how)[1] == written
        notes = tmp_path / "README.md"
        notes.write_text("# Mine\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
        (tmp_path / "link").symlink_to(results)
        for words, path, message in (
            ([results], results, "is also what the rows are read from or kept in"),
            ([folder, "--results", results], tmp_path / "link", "is also what the rows are read from or kept in"),
            (
                [folder, "--results", tmp_path / "new"],
                tmp_path / "new",
                "is also what the rows are read from or kept in",
            ),
            ([folder], results, "holds something else than a table"),
            ([folder], folder / "results.json", "holds something else than a table"),
            ([folder], folder / "metrics.jsonl", "holds something else than a table"),
            ([results], notes, "holds something else than a table"),
        ):
            before = path.read_bytes() if path.exists() else None
            status, text, err = run("vaesim", *words, "--out", path)
            assert status == 1 and f"--out {path} {message}" in err and text == ""
            assert (path.read_bytes() if path.exists() else None) == before

    @pytest.mark.parametrize("paper", PAPERS)
    @pytest.mark.parametrize("how", ["text", "markdown", "json"])
    def test_every_papers_table_is_known_again(self, paper: str, how: str, run: Run) -> None:
        source = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / f"{paper}.json"
        status, text, _ = run(paper, source, "--format", how)
        assert status == 0 and is_rendered(text) and not is_rendered(source.read_text())

    def test_a_combination_that_the_table_lacks_is_named(self, run: Run, tmp_path: Path) -> None:
        described = replace(table_of("vaesim"), recipe=lambda values, _paper: None)
        with pytest.raises(ValueError, match="no run of the table has preset fair; it has some of fair, official"):
            train_missing(described, tmp_path, {"preset": ["fair"]}, TableOptions())
        pixels = {"preset": ["pixels"], "data": ["digits"]}
        assert not train_missing(described, tmp_path, pixels, TableOptions()).failed

    @pytest.mark.parametrize(
        ("paper", "data", "words", "message"),
        [
            (
                "optimized-views",
                "digits",
                ["strategy=simclr"],
                r"strategy=simclr makes the row of strategy .* that of simclr",
            ),
            ("local-contrast", "phantoms", ["width=4", "fold=2"], "width=4 fold=2 makes the row of fold 0 that of 2"),
            (
                "local-contrast",
                "phantoms",
                ["method=global"],
                "method=global makes the row of method random that of global",
            ),
            ("local-contrast", "phantoms", ["labelled=0.2"], "makes the row of labelled 0.05 that of 0.2"),
            (
                "contrastive-autoencoder",
                "digits",
                ["warmup_epochs=0"],
                "makes the row of preset fair that of untrained",
            ),
        ],
    )
    def test_what_makes_the_rows_cannot_be_set(
        self, paper: str, data: str, words: list[str], message: str, run: Run, tmp_path: Path
    ) -> None:
        status, out, err = run(paper, "--data", data, "--folder", tmp_path, "--device", "cpu", "--set", *words)
        assert status == 1 and re.search(f"--set: .*{message}.*; leave that out, and choose rows by --only", err)
        assert out == "" and not list(tmp_path.iterdir())

    def test_values_are_set_together(self, tmp_path: Path) -> None:
        described, options = table_of("vaesim"), TableOptions(data=("digits",), set=("batch_size=8", "prototypes=6"))
        values = described.combinations(chosen_values(described, options))[0]
        job = job_of(described, values, 0, tmp_path, options)
        assert job is not None and (job.config.batch_size, job.config.num_prototypes) == (
            8,
            6,
        )  # 8 is below the 40 of the preset

    def test_an_older_run_and_a_newer_one_are_one_row(self, run: Run, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "vaesim", {}, vaesim_splits(0.5))
        write_run(tmp_path / "b", "vaesim", {"knn_k": 5}, vaesim_splits(0.6), seed=1)  # what `a` has by default
        status, text, _ = run("vaesim", tmp_path)
        assert status == 0 and "0.550 ± 0.071" in text

    def test_results_are_merged_and_chosen(self, run: Run, tmp_path: Path) -> None:
        results = tmp_path / "results.json"
        for data, preset, score in (("x", "fair", 0.5), ("x", "paper", 0.6), ("y", "fair", 0.7)):
            config = {"data": data, "preset_name": preset}
            write_run(tmp_path / f"{data}-{preset}", "vaesim", config, vaesim_splits(score))
        assert run("vaesim", tmp_path / "x-fair", tmp_path / "y-fair", "--results", results)[0] == 0
        status, text, _ = run("vaesim", tmp_path / "x-paper", "--results", results, "--format", "markdown")
        assert status == 0 and text.count("**") == 4 and "`paper`" in text
        assert [(row["data"], row["preset"]) for row in json.loads(results.read_text())] == [
            ("x", "fair"),
            ("y", "fair"),
            ("x", "paper"),
        ]
        _, text, _ = run("vaesim", results, "--data", "x", "--preset", "paper", "--format", "json")
        assert [row["cells"]["preset"] for table in json.loads(text) for row in table["rows"]] == [None, "paper"]
        status, _, err = run("vaesim", results, "--data", "z")
        assert status == 1 and "no finished run of vaesim" in err
        status, _, err = run("optiml", tmp_path / "x-fair", "--results", tmp_path / "o.json", "--add")
        assert status == 1 and "cannot be joined" in err

    def test_a_results_file_of_another_paper_is_refused_and_stays(self, run: Run, tmp_path: Path) -> None:
        """Also the older files, whose rows do not say of which paper they are."""
        source = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
        runs = write_run(tmp_path / "run", "vaesim", {"data": "x"}, vaesim_splits(0.5))
        for name in PAPERS:
            content = (source / f"{name}.json").read_bytes()
            for paper in PAPERS:
                path = tmp_path / f"{name}-{paper}.json"
                path.write_bytes(content)
                status, out, err = run(paper, path)
                assert (status == 0) == (name == paper) and "Traceback" not in err
                if name != paper:
                    assert out == "" and f"{path}, row 0: it is " in err and "pass a results file of this paper" in err
                    assert run(paper, runs, "--results", path)[0] == 1 and path.read_bytes() == content
                    assert run(paper, "--results", path, "--folder", tmp_path / "none")[0] == 1  # nothing is trained
        assert not list(tmp_path.glob("*.lock")) and not (tmp_path / "none").exists()

    def test_rows_say_of_which_paper_they_are(self, run: Run, tmp_path: Path) -> None:
        write_run(tmp_path / "runs", "vade", {"data": "x"}, vaesim_splits(0.5))
        assert run("vaesim", tmp_path / "runs", "--results", tmp_path / "r.json")[0] == 0
        (row,) = json.loads((tmp_path / "r.json").read_text())
        assert row["paper"] == "vade"
        (tmp_path / "r.json").write_text(json.dumps([{**row, "paper": "byol"}]))
        status, _, err = run("vaesim", tmp_path / "r.json")
        assert status == 1 and "it is of byol; the table of vaesim has rows of vaesim, vae_kmeans" in err

    def test_values_that_no_row_has_are_named_with_those_that_there_are(self, run: Run, tmp_path: Path) -> None:
        for data, preset in (("mnist", "fair"), ("x", "paper")):
            write_run(tmp_path / data, "vaesim", {"data": data, "preset_name": preset}, vaesim_splits(0.5))
        assert run("vaesim", tmp_path, "--results", tmp_path / "r.json")[0] == 0
        for words, message in (
            (["--data", "mnsit"], "has data mnsit; there are mnist, x"),
            (["--data", "mnist", "mnsit"], "has data mnsit; there are mnist, x"),
            (["--preset", "nope"], "has preset nope; there are fair, paper"),
            (["--preset", "official"], "has preset official; there are fair, paper"),
            (["--only", "paper=nope"], "has paper nope; there are vaesim"),
            (["--data", "x", "--preset", "fair"], "has data x and preset fair together"),
            (["--set", "nope=1"], "--set changes what is trained"),
        ):
            for source in (tmp_path, tmp_path / "r.json"):
                status, out, err = run("vaesim", source, *words, "--results", tmp_path / "new.json")
                assert status == 1 and message in err and out == ""
        (tmp_path / "empty").mkdir()
        status, _, err = run("vaesim", tmp_path / "empty", "--results", tmp_path / "new.json")
        assert status == 1 and f"no finished run of vaesim was found in {tmp_path / 'empty'}" in err
        assert not list(tmp_path.glob("new*"))
        status, out, _ = run(
            "vaesim", tmp_path, "--preset", "fair", "official"
        )  # official: of the table, not trained yet
        assert status == 0 and "mnist" in out
        assert run("vaesim", tmp_path, "--only", "preset=fair", "--preset", "fair")[0] == 0

    def test_a_folder_is_no_results_file_and_gets_no_lock(self, run: Run, tmp_path: Path) -> None:
        write_run(tmp_path / "run", "vaesim", {"data": "x"}, vaesim_splits(0.5))
        (tmp_path / "sub").mkdir()
        for option in ("--results", "--out"):
            status, out, err = run("vaesim", tmp_path / "run", option, tmp_path / "sub")
            assert status == 1 and f"{tmp_path / 'sub'} is a folder; pass the name of a file" in err and out == ""
        with pytest.raises(ValueError, match="sub is a folder"):
            update_rows(tmp_path / "sub", lambda rows: rows)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "sub"]

    def test_figures_need_runs(self, run: Run, tmp_path: Path) -> None:
        source = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "optimized_views.json"
        status, _, err = run("optimized-views", source, "--figures", tmp_path / "f")
        assert status == 1 and "a results file has no weights" in err


class TestTraining:
    """On the smallest real runs."""

    SMALL = ("epochs=1", "num_prototypes=12", "image_size=16", "batch_size=200")
    WORDS = (
        "vaesim",
        "--data",
        "digits",
        "--only",
        "paper=vaesim",
        "--preset",
        "fair",
        "--device",
        "cpu",
        "--quiet",
        "--set",
        *SMALL,
    )

    def test_what_is_missing_is_trained_once(self, run: Run, tmp_path: Path) -> None:
        words = (*self.WORDS, "--folder", tmp_path / "table")
        with exclusive(self.lock(tmp_path / "table", 1)):
            status, text, err = run(*words, "--runs", 2)
        assert status == 0 and "2 runs below" in err and "left to another process: vaesim-digits-fair/seed-1" in err
        assert re.search(r"vaesim +fair +test .* 1 +1\n", text)  # one seed, one epoch
        first = (tmp_path / "table" / "vaesim-digits-fair" / "seed-0" / "results.json").read_bytes()
        status, text, err = run(*words, "--runs", 2, "--results", tmp_path / "r.json", "--format", "json")
        assert (
            status == 0 and "1 of them finished" in err and str(tmp_path / "table/vaesim-digits-fair/seed-0") not in err
        )
        assert (tmp_path / "table" / "vaesim-digits-fair" / "seed-0" / "results.json").read_bytes() == first
        (row,) = json.loads((tmp_path / "r.json").read_text())
        assert row["seeds"] == [0, 1] and row["config"]["image_size"] == 16
        knn = row["splits"]["test"]["knn"]
        assert knn["mean"] == pytest.approx(statistics.fmean(knn["values"])) and len(set(knn["values"])) <= 2
        assert json.loads(text)[0]["rows"][-1]["cells"]["kNN"]["runs"] == 2
        status, _, err = run(*self.WORDS[:-4], "epochs=2", "--folder", tmp_path / "table", "--runs", 1)
        assert status == 1 and "epochs: 1 there, 2 now" in err and "--keep takes finished runs as they are" in err
        status, text, _ = run(*self.WORDS[:-4], "epochs=2", "--folder", tmp_path / "table", "--runs", 1, "--keep")
        assert status == 0 and " 2" in text  # both finished seeds count

    @pytest.mark.parametrize("keep", [False, True])
    def test_a_row_of_two_configurations_or_data_is_refused_before_training(
        self, keep: bool, run: Run, tmp_path: Path
    ) -> None:
        words = (*self.WORDS, "--folder", tmp_path, *["--keep"] * keep)
        place = tmp_path / "vaesim-digits-fair"
        assert run(*words, "--runs", 1)[0] == 0
        status, _, err = run(*words, "--runs", 1, "--seed", 1, "--set", "latent_dim=3")
        assert status == 1 and "seed-0 holds another run than" in err and "latent_dim: " in err and "3 now" in err
        environment = json.loads((place / "seed-0" / "environment.json").read_text())
        environment["data"]["content_md5"] = "0" * 32
        (place / "seed-0" / "environment.json").write_text(json.dumps(environment))
        status, _, err = run(*words, "--runs", 1, "--seed", 1)
        assert status == 1 and "seed-0 was begun with other data" in err
        status, _, err = run(*words, "--runs", 2)
        assert status == 1 and "seed-0 was begun with other data" in err
        assert not (place / "seed-1").exists()

    def test_pixels_of_other_data_are_refused(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        data = load_dataset("digits")

        def save(path: str, count: int) -> None:
            Path(path).parent.mkdir(exist_ok=True)
            parts = {"train": data.train, "test": data.test}
            np.savez(path, **{f"{name}_images": part.images[:count] for name, part in parts.items()},
                     **{f"{name}_labels": part.labels[:count] for name, part in parts.items()})  # fmt: skip

        words = ("vaesim", "--preset", "pixels", "--folder", "table", "--data")
        save("a/mine.npz", 60)
        assert run(*words, "a/mine.npz")[0] == 0
        save("a/mine.npz", 50)
        status, out, err = run(*words, "a/mine.npz")
        assert status == 1 and "mine-pixels.json was computed of other data" in err and not out
        assert run(*words, "a/mine.npz", "--keep")[0] == 0
        save("b/mine.npz", 60)
        status, _, err = run(*words, "b/mine.npz")
        assert status == 1 and "mine-pixels.json holds the row of a/mine.npz, not of b/mine.npz" in err
        save("a/mine.npz", 60)
        assert run(*words, "a/mine.npz")[0] == 0
        Path("a/mine.npz").unlink()  # what was computed can be shown all the same
        assert run(*words, "a/mine.npz")[0] == 0

    def test_pixels_need_no_training_and_are_computed_once(self, run: Run, tmp_path: Path) -> None:
        words = ("vaesim", "--data", "digits", "--preset", "pixels", "--folder", tmp_path, "--format", "markdown")
        status, text, err = run(*words)
        assert (
            status == 0
            and re.search(r"\| raw pixels \| \| test \| \| \| 0\.9\d\d \| 0\.9\d\d \| \| \| 1 \| \|", text)
            and err == ""
        )
        kept = tmp_path / "computed" / "digits-pixels.json"
        kept.write_text(kept.read_text().replace("0.9", "0.1"))
        assert "| 0.1" in run(*words)[1]

    def test_a_run_that_fails_is_named_and_the_others_are_shown(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from protokernels.papers import vaesim

        trained = vaesim.train

        def train(config: Any, out: Path, **more: Any) -> dict[str, Any]:
            if more["settings"].seed == 0:
                raise FloatingPointError("the loss is nan")
            return trained(config, out, **more)

        monkeypatch.setattr(vaesim, "train", train)
        status, text, err = run(*self.WORDS, "--folder", tmp_path, "--runs", 2)
        assert status == 1 and "not finished: vaesim-digits-fair/seed-0: the loss is nan" in err and "kNN" in text

    def lock(self, folder: Path, seed: int) -> Path:
        (folder / "vaesim-digits-fair").mkdir(parents=True)
        return folder / "vaesim-digits-fair" / f"seed-{seed}.lock"


def test_pictures_put_runs_of_one_data_set_side_by_side(tmp_path: Path) -> None:
    runs = [("digits", "fair"), ("a/mine.npz", "fair"), ("b/mine.npz", "fair"), ("digits", "paper"), ("digits", "fair")]
    for index, (data, preset) in enumerate(runs):
        config = {"data": data, "preset_name": preset, "strategy": "simclr"}
        write_run(tmp_path / "runs" / f"{index}" / "simclr", "optimized_views", config, {}, seed=index)
    drawn: dict[str, list[int]] = {}

    def compare(members: Any, out: Path, data_root: Path | None) -> list[Path]:
        drawn[str(out.relative_to(tmp_path))] = [run.seed for run in members]
        return [out / "auc.png"]

    described = replace(table_of("optimized_views"), compare=compare)
    assert len(draw(described, [tmp_path / "runs"], {}, tmp_path / "out", None)) == 4
    assert drawn == {
        "out/digits-fair": [0, 4], "out/mine-fair": [1], "out/mine-fair-2": [2], "out/digits-paper": [3],
    }  # fmt: skip
    drawn.clear()
    draw(described, [tmp_path / "runs"], {"data": ["digits"], "preset": ["fair"]}, tmp_path / "out", None)
    assert drawn == {"out": [0, 4]}
