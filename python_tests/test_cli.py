# SPDX-License-Identifier: MIT
"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels import __version__, _native
from protokernels.cli import main
from protokernels.commands import BASELINES, TrainOptions, find_paper, parse_options
from protokernels.papers import PAPERS
from protokernels.sweeps import SweepOptions
from protokernels.tables import TableOptions, chosen_values, table_of
from protokernels.training.runs import RunSettings
from python_tests import forks

SMALL = ["--epochs", "1", "--batch-size", "200", "--num-prototypes", "12", "--image-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run, in the folder that it chose itself below an empty one."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "vaesim", *SMALL]) == 0
    return folder / "runs" / "vaesim-digits-fair"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, for the test alone."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestWords:
    def test_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        assert "train vaesim" in capsys.readouterr().out
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == __version__
        assert main([]) == 2

    def test_capitals_of_a_data_set_make_no_difference(self) -> None:
        names = {name: "digits" for name in (*PAPERS, *BASELINES) if name != "local_contrast"}
        for name, small in {**names, "vaesim": "pneumoniamnist_64", "local_contrast": "mmwhs"}.items():
            paper = find_paper(name)
            for command in ("train", "sweep", "ablate"):
                config = parse_options([name, "--data", small.upper()], paper, command, TrainOptions())[-1]
                assert config == paper.CONFIG.preset("fair", data=small) and config.data == small
            assert paper.CONFIG.preset("fair", data="Data/Mine.npz").data == "Data/Mine.npz"
        for options in (
            TableOptions(data=("DIGITS", "Data/Mine.npz")),
            TableOptions(only=("data=DIGITS,Data/Mine.npz",)),
        ):
            assert chosen_values(table_of("vaesim"), options) == {"data": ["digits", "Data/Mine.npz"]}

    def test_a_list_may_be_given_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def parsed(name: str, files: TrainOptions, *words: str) -> tuple[Any, Any]:
            options, _, config = parse_options([name, *words], find_paper(name), "sweep", files)
            return options, config

        for words in (
            ["--over", "a=1", "b=2", "--grid", "--over", "c=3", "--epochs", "2"],
            ["--over=a=1", "--epochs", "2", "--over", "b=2", "c=3", "--grid"],
        ):
            options, config = parsed("vaesim", SweepOptions(), *words)
            assert options.over == ("a=1", "b=2", "c=3") and options.grid and config.epochs == 2
        assert parsed("vaesim", SweepOptions())[0].over == () == parsed("vaesim", SweepOptions(), "--over")[0].over
        for hidden in (["--hidden", "8", "9", "--hidden", "7"], ["--hidden=8", "9", "--knn_k", "3", "--hidden", "7"]):
            assert parsed("vade", TrainOptions(), *hidden)[1].hidden == (8, 9, 7)
        range_of_two = (
            "--augment-scale",
            "1",
            "2",
            "--augment_scale",
            "0.5",
            "3",
        )  # a pair: the last one, as of a number
        assert parsed("local_contrast", TrainOptions(), *range_of_two)[1].augment_scale == (0.5, 3)

        seen: list[TableOptions] = []
        monkeypatch.setattr("protokernels.tables.run_table", lambda described, options: seen.append(options) or 0)
        words = ["runs/a", "b.json", "--data", "x", "--only", "paper=vade", "--add", "--set", "a=1", "--set=b=2"]
        assert main(["table", "vaesim", *words, "--data", "y", "--only", "preset=fair", "--preset=fair"]) == 0
        expected = TableOptions(
            sources=(Path("runs/a"), Path("b.json")),
            data=("x", "y"),
            only=("paper=vade", "preset=fair"),
            set=("a=1", "b=2"),
            preset=("fair",),
            add=True,
        )
        assert seen == [expected]

    def test_help_of_train_shows_the_presets_values(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["train", "vaesim", "--preset", "official", "--data", "mnist", "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert "--num-prototypes" in text and "official-mnist" in text and "--resume" in text

    @pytest.mark.parametrize("words", [["fly"], ["train"], ["train", "fly"], ["doctor", "fly"]])
    def test_wrong_words(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out + captured.err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train", "vaesm"], "train: unknown paper or baseline 'vaesm'; expected one of vaesim, "),
            (["ablate", "vaesim"], "ablate: unknown paper with ablations 'vaesim'; expected one of "),
            (["predict", "vaesim"], "predict: unknown paper that segments 'vaesim'; expected one of local-contrast"),
        ],
    )
    def test_an_unknown_name_is_named(self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 2
        assert message in capsys.readouterr().err
        assert main(words[:1]) == 2 and capsys.readouterr().err == ""
        assert main([words[0], "--help"]) == 0 and capsys.readouterr().err == ""

    def test_predict_takes_both_spellings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("local_contrast", "local-contrast"):
            assert main(["predict", name, "--checkpoint", str(tmp_path), str(tmp_path / "absent.nii")]) == 1
            assert "absent.nii" in capsys.readouterr().err

    def test_an_option_without_its_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        for option in ("--preset", "--data"):
            with pytest.raises(SystemExit) as stop:
                main(["train", "vaesim", option])
            assert stop.value.code == 2
            assert f"protokernels train vaesim: error: argument {option}: expected" in capsys.readouterr().err

    def test_problems_are_one_line_on_stderr(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for words, message in (
            (["evaluate", str(tmp_path)], "holds no run"),
            (["train", "vaesim", "--preset", "best"], "paper, official, fair"),
            (["train", "vaesim", "--out", str(tmp_path / "x"), "--data", "imagenet"], "digits"),
            (["train", "vaesim", "--out", str(tmp_path / "x"), "--precision", "fp16", "--device", "cpu"], "bf16"),
        ):
            assert main(words) == 1, words
            captured = capsys.readouterr()
            assert message in captured.err and "Traceback" not in captured.err and captured.out == ""

    @pytest.mark.parametrize(
        ("command", "words", "got"),
        [
            ("train vade", ["--seed", str(2**32)], "runs 1 from seed 4294967296"),
            ("train vaesim", ["--seed", str(2**32 - 1), "--runs", "2"], "runs 2 from seed 4294967295"),
            ("train vaesim", ["--seed", "9" * 30], f"runs 1 from seed {'9' * 30}"),
            ("sweep vaesim", ["--seed", "-1"], "runs 1 from seed -1"),
            ("ablate local-contrast", ["--runs", "0"], "runs 0 from seed 0"),
            ("table optiml", ["--data", "digits", "--seed", str(2**32 - 1)], "runs 1 from seed 4294967296"),
        ],
    )
    def test_seeds_that_nothing_takes(
        self,
        command: str,
        words: list[str],
        got: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            sys.exit(main([*command.split(), *words]))  # parsing words ends in a SystemExit of its own
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert f"every seed at least 0 and below 2**32; got {got}" in said and "Traceback" not in said
        assert not list(tmp_path.iterdir())
        assert RunSettings(seed=2**32 - 1).seeds == [2**32 - 1]

    @pytest.mark.parametrize("dim", [10**11, 10**17])  # more than there is, and more than can be counted
    def test_too_little_memory_is_one_line(self, dim: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "vaesim", "--latent-dim", str(dim), "--out", str(tmp_path / "x")]) == 1
        error = capsys.readouterr().err
        assert "not enough memory (" in error and "smaller sizes" in error and error.count("\n") == 1
        assert not (tmp_path / "x").exists()

    def test_a_reader_that_has_seen_enough_is_no_error(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "protokernels", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does, before a word is written
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 1

    def test_what_an_encoding_lacks_is_no_error(self, finished: Path) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        words = [sys.executable, "-m", "protokernels", "table", "vaesim", str(finished)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "" and "\\u2500" in done.stdout

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("PROTOKERNELS_CPU_LEVEL", "foo", "protokernels: PROTOKERNELS_CPU_LEVEL must be "),
            ("PROTOKERNELS_DATA", "~nobody-here/x", "protokernels: mnist: no file train-images"),
            (
                "PROTOKERNELS_BACKEND",
                "foo",
                "protokernels: PROTOKERNELS_BACKEND: expected one of auto, native, reference; got",
            ),
        ],
    )
    def test_a_wrong_variable_is_one_line(self, name: str, value: str, message: str, tmp_path: Path) -> None:
        if name == "PROTOKERNELS_CPU_LEVEL" and _native.LIBRARY is None:
            pytest.skip("nothing native reads it")
        words = ["train", "vaesim", *SMALL, "--out", str(tmp_path / "x"), "--quiet"]
        words += ["--data", "mnist"] if name == "PROTOKERNELS_DATA" else []
        done = subprocess.run(
            [sys.executable, "-m", "protokernels", *words],
            env={**os.environ, name: value},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1

    def test_the_installed_script_names_a_wrong_backend_in_one_line(self, tmp_path: Path) -> None:
        script = tmp_path / "protokernels"
        script.write_text("import sys\nfrom protokernels.cli import main\nsys.exit(main())\n")
        environment = {**os.environ, "PROTOKERNELS_BACKEND": "foo"}
        done = subprocess.run(
            [sys.executable, str(script), "doctor"], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == "protokernels: PROTOKERNELS_BACKEND: expected one of auto, native, reference; got 'foo'\n"

    def test_doctor_needs_no_extra_and_a_missing_extra_is_named(self, tmp_path: Path) -> None:
        """In a Python where nothing of the extra can be imported."""
        code = (
            "import sys\n"
            "for name in ('tyro', 'rich', 'accelerate', 'sklearn', 'matplotlib', 'medmnist', 'monai', 'nibabel', 'scipy'):\n"
            "    sys.modules[name] = None\n"
            "from protokernels.cli import main\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        doctor, train = (
            forks.Fork(f"import sys\nsys.argv = {['', *words]}\n{code}", tmp_path, os.environ).finish(seconds=120)
            for words in (["doctor"], ["train", "vaesim"])
        )
        assert "Traceback" not in doctor.stderr and "torch" in doctor.stdout
        assert train.returncode == 1
        assert 'pip install "protokernels[train]"' in train.stderr and "Traceback" not in train.stderr


class TestRun:
    def test_train_ends_with_a_table_and_the_figures_paths(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "run"
        assert main(["train", "vaesim", "--out", str(folder), "--runs", "2", *SMALL]) == 0
        text = capsys.readouterr().out
        for expected in ("statistical", "kNN", "linear", "majority", "val+test (538)", "±", "results.json", "tsne.png"):
            assert expected in text, expected
        assert len(list((folder / "figures").glob("*.png"))) == 7
        assert json.loads((folder / "config.json").read_text())["config"]["epochs"] == 1

    def test_a_second_run_does_not_overwrite_the_first(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (run / "results.json").read_bytes()
        assert main(["train", "vaesim", "--out", str(run), *SMALL]) == 1
        assert "--resume" in capsys.readouterr().err
        assert main(["train", "vaesim", "--out", str(run), "--resume", *SMALL]) == 0  # finished: shows the table again
        assert (run / "results.json").read_bytes() == before

    def test_evaluate_gives_the_same_scores_and_figures_draws_again(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = json.loads((run / "results.json").read_text())
        capsys.readouterr()
        assert main(["evaluate", str(run)]) == 0
        assert "kNN" in capsys.readouterr().out
        assert json.loads((run / "results.json").read_text()) == before
        for path in (run / "figures").glob("*.png"):
            path.unlink()
        assert main(["figures", str(run)]) == 0
        printed = capsys.readouterr().out.split()
        assert len(printed) == 7 and all(Path(path).stat().st_size > 1000 for path in printed)

    def test_ctrl_c_leaves_a_usable_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "run"
        words = ["train", "vaesim", "--out", str(folder), *SMALL, "--epochs", "6", "--no-figures"]
        process = subprocess.Popen(
            [sys.executable, "-m", "protokernels", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/*.pt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "--resume continues from it" in errors and "Traceback" not in errors
        capsys.readouterr()
        assert main(["evaluate", str(folder)]) == 0
        assert "NOT FINISHED" in capsys.readouterr().out
        assert not json.loads((folder / "results.json").read_text())["complete"]
        assert main([*words, "--resume"]) == 0  # an evaluation in between does not make it count as finished
        assert "NOT FINISHED" not in capsys.readouterr().out
        assert json.loads((folder / "results.json").read_text())["complete"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
        assert not [path for path in folder.rglob("*") if path.suffix == ".partial"]

    def test_default_folder_is_a_free_one(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = tmp_path / "runs"
        shutil.copytree(finished, runs / finished.name)
        before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
        monkeypatch.chdir(tmp_path)
        assert main(["train", "vaesim", "--no-figures", "--quiet", *SMALL]) == 0
        assert sorted(path.name for path in runs.iterdir()) == ["vaesim-digits-fair", "vaesim-digits-fair-2"]
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_names_are_printed_as_they_are_spelt(
        self, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = Path(shutil.copytree(finished, tmp_path / "a[b] :smile: [red]x"))
        results = json.loads((run / "results.json").read_text())
        (run / "results.json").write_text(json.dumps({**results, "protocol": {"name": "[p] :key:"}}))
        assert main(["train", "vaesim", "--out", str(run), "--resume", *SMALL]) == 0  # finished: shows the table
        text = capsys.readouterr().out
        assert f"results  {run / 'results.json'}\n" in text and "protocol: name [p] :key:\n" in text
