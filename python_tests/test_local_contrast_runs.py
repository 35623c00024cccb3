# SPDX-License-Identifier: MIT
"""Local contrast end to end on phantoms, through the command line: stages, resuming to the bit, results, figures, ablations,
and the table over folds and methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="local contrast needs the extra protokernels[train]")

from benchmarks import local_contrast_results
from protokernels.cli import main
from protokernels.papers import local_contrast
from protokernels.papers.local_contrast import LocalContrastConfig, load_segmenter
from protokernels.training import RunFolder

SMALL = {
    "image_size": 16,
    "width": 2,
    "depth": 2,
    "global_steps": 6,
    "local_steps": 12,
    "fine_tune_steps": 6,
    "labelled": 0.3,
    "validations": 2,
}
WORDS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
WORDS += ["--device", "cpu", "--quiet"]


def weights(folder: Path) -> set[str]:
    """Names of the kept files, which hold digests of their content."""
    return {path.name for path in (folder / "weights").iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole method."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", "local-contrast", "--out", str(folder), *WORDS, "--no-figures"]) == 0
    return folder


def started_again(trained: Path, folder: Path) -> None:
    """``folder`` becomes the run as it was before its first step."""
    folder.mkdir()
    for name in ("config.json", "environment.json"):
        shutil.copy(trained / name, folder / name)


class Killed(BaseException):
    """In place of a signal that ends the process at once."""


class TestRun:
    def test_results(self, trained: Path) -> None:
        results = json.loads((trained / "results.json").read_text())
        assert results["complete"] and set(results["splits"]) == {"test"}
        scores = results["splits"]["test"]
        assert {"pooled_dice", "volume_dice", "hausdorff95", "unit", "volumes"} <= scores.keys()
        assert 0 <= scores["pooled_dice"]["mean"] <= 1
        assert results["volumes"] == {"train": 12, "val": 4, "test": 4, "labelled": 3}
        assert set(results["stages"]) == {"global", "local", "fine_tune"}
        for stage in results["stages"].values():
            assert stage["steps"] >= 6 and stage["last_epoch"]["loss"] > 0
        metrics = RunFolder.open(trained).metrics()
        assert sum("val_dice" in line for line in metrics) == 2 and "val_dice" in metrics[-1]

    def test_the_best_epoch_is_kept(self, trained: Path) -> None:
        best = max(RunFolder.open(trained).metrics(), key=lambda line: line.get("val_dice", -1))
        (name,) = sorted(weights(trained))[-1:]
        state = torch.load(trained / "weights" / name, weights_only=True)
        assert state["val_dice"] == best["val_dice"] and name.startswith(f"epoch-{best['epoch']:04d}")
        assert state["class_names"] == ["background", "phantom ellipse", "phantom lesion"]

    @pytest.mark.parametrize("stage", ["global", "local", "fine_tune"])
    def test_a_killed_run_goes_on_to_the_same_bits(
        self, stage: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "run"
        started_again(trained, folder)
        loop = {"global": "contrast_globally", "local": "contrast_locally", "fine_tune": "fine_tune"}[stage]
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(local_contrast, loop, _killed_in_its_second_epoch(getattr(local_contrast, loop)))
            main(["train", "local-contrast", "--out", str(folder), *WORDS, "--no-figures", "--resume"])
        assert not (folder / "results.json").exists()
        assert main(["train", "local-contrast", "--out", str(folder), *WORDS, "--no-figures", "--resume"]) == 0
        assert weights(folder) == weights(trained)
        one, other_results = (json.loads((path / "results.json").read_text()) for path in (folder, trained))
        assert one["splits"] == other_results["splits"]

    def test_evaluate_and_figures(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = json.loads((trained / "results.json").read_text())
        assert main(["evaluate", str(trained)]) == 0
        after = json.loads((trained / "results.json").read_text())
        assert after["splits"] == before["splits"] and after["complete"] and after["stages"] == before["stages"]
        text = capsys.readouterr().out
        assert "Global+local(block)" in text and "Dice, pooled" in text and "3 of 12" in text
        assert "phantoms: made volumes" in text.replace("\n", " ")
        assert main(["figures", str(trained)]) == 0
        names = {Path(line).name for line in capsys.readouterr().out.split()}
        assert names == {
            "losses_global.png",
            "losses_local.png",
            "losses_fine_tune.png",
            "overlays.png",
            "features.png",
        }
        assert all((trained / "figures" / name).stat().st_size > 5000 for name in names)

    def test_prediction_from_a_run_and_from_a_file(self, trained: Path, tmp_path: Path) -> None:
        nibabel = pytest.importorskip("nibabel", reason="prediction reads NIfTI volumes")
        volume = np.random.default_rng(0).random((20, 24, 3), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "a.nii.gz")
        labels = []
        for number, checkpoint in enumerate((trained, trained / "weights" / sorted(weights(trained))[-1])):
            out = tmp_path / f"{number}.nii.gz"
            words = ["predict", "local-contrast", "--checkpoint", str(checkpoint), str(tmp_path / "a.nii.gz")]
            assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
            labels.append(nibabel.load(out).get_fdata())
        assert labels[0].shape == volume.shape and np.array_equal(*labels) and labels[0].max() <= 2

    def test_what_cannot_be_loaded(self, trained: Path, tmp_path: Path) -> None:
        checkpoint = next((trained / "checkpoints").iterdir())
        with pytest.raises(ValueError, match="no segmentation network with its configuration"):
            load_segmenter(checkpoint)
        (tmp_path / "text.pt").write_text("nothing")
        with pytest.raises(ValueError, match="cannot be read as a file of weights"):
            load_segmenter(tmp_path / "text.pt")
        started_again(trained, tmp_path / "early")
        with pytest.raises(FileNotFoundError, match="no weights yet"):
            load_segmenter(tmp_path / "early")
        state = torch.load(trained / "weights" / sorted(weights(trained))[-1], weights_only=True)
        del state["model"]["backbone.encoder.levels.0.0.weight"]
        torch.save(state, tmp_path / "part.pt")
        with pytest.raises(ValueError, match=r"missing, the first is 'backbone.encoder.levels.0.0.weight'"):
            load_segmenter(tmp_path / "part.pt")


def _killed_in_its_second_epoch(loop: Any) -> Any:
    """The loop of a stage, stopped between two steps without a checkpoint of them."""

    def broken(*arguments: Any) -> None:
        session = next(each for each in arguments if hasattr(each, "steps_per_epoch"))
        steps, seen = session.steps, 0

        def limited() -> Any:
            nonlocal seen
            for step in steps():
                seen += 1
                if seen > session.steps_per_epoch + 1:
                    raise Killed
                yield step

        session.steps = limited
        loop(*arguments)
        raise AssertionError("the stage was to be killed")

    return broken


class TestTable:
    OPTIONS = ("--data", "phantoms", "--folds", "0", "1", "--labelled", "0.3", "--device", "cpu")
    METHODS = ("random", "global", "global+local-self", "mixup", "tcsm", "local-stride")

    def test_all_methods_share_the_global_stage_and_nothing_is_done_twice(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = [f"{name}={value}" for name, value in SMALL.items() if name != "labelled"]
        words = ["run", *self.OPTIONS, "--out", str(tmp_path / "table"), "--set", *changes]
        assert local_contrast_results.main([*words, "--methods", *self.METHODS]) == 0
        stages = sorted(path.name.split("-")[0] for path in (tmp_path / "table" / "stages").iterdir() if path.is_dir())
        assert stages == ["global"] * 2 + ["local"] * 4  # of two folds: global, and local of "self" and "stride"
        results = {path: path.read_bytes() for path in (tmp_path / "table").glob("fold-*/30%/*/results.json")}
        assert len(results) == 12
        assert local_contrast_results.main([*words, "--methods", *self.METHODS]) == 0
        assert all(path.read_bytes() == content for path, content in results.items())

        out = tmp_path / "table.json"
        capsys.readouterr()
        assert local_contrast_results.main(["collect", str(tmp_path / "table"), "--out", str(out)]) == 0
        text = capsys.readouterr().out
        rows = json.loads(out.read_text())
        assert len(rows) == 12 and {row["fold"] for row in rows} == {0, 1}
        assert [row["method"] for row in rows[:4]] == ["random", "random", "global", "global"]
        assert "| Random | 0." in text and "30% (3 volumes)" in text and "epochs = " in text
        assert local_contrast_results.main(["figures", str(tmp_path / "table"), "--labelled", "0.3"]) == 0
        assert (tmp_path / "table" / "figures" / "features_tcsm.png").stat().st_size > 5000

    def test_the_papers_numbers_stand_beside_ours(self) -> None:
        def row(method: str, fold: int, dice: float) -> dict[str, Any]:
            score = {"mean": dice, "classes": {}}
            return {
                "data": "hippocampus",
                "preset": "fair",
                "labelled": 0.05,
                "method": method,
                "fold": fold,
                "seed": 0,
                "volumes": {"labelled": 7},
                "splits": {"test": {key: score for key, _ in local_contrast_results.SCORES} | {"unit": "mm"}},
                "stages": {"fine_tune": {"epochs": 4, "steps": 100, "batch_size": 8}},
                "config": {"width": 16, "depth": 3, "image_size": 64, "keep": "best"},
                "data_warnings": [],
            }

        rows = [row("random", 0, 0.7), row("random", 1, 0.8), row("global+local-block", 0, 0.75)]
        text = local_contrast_results.tables(local_contrast_results.merged([], rows))
        assert "| Random | 0.750 ± 0.071 | 0.788 |  | 2 |" in text
        assert "| Global+local(block) | 0.750 | 0.824 | 0.050 | 1 |" in text  # against Random on the same fold
        again = local_contrast_results.merged(rows, [row("random", 1, 0.9)])
        assert len(again) == 3 and "0.800 ± 0.141" in local_contrast_results.tables(again)

    def test_a_run_that_another_process_is_at_is_left_to_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from protokernels.training.files import exclusive

        folder = local_contrast_results.run_folder(tmp_path, 0, 0.3, "random")
        folder.parent.mkdir(parents=True)
        words = ["run", *self.OPTIONS[:-2], "--folds", "0", "--methods", "random", "--out", str(tmp_path)]
        with exclusive(folder.with_name("random.lock")):
            assert local_contrast_results.main(words) == 0
        assert "left to another process" in capsys.readouterr().err and not folder.exists()


class TestOfficial:
    def test_its_errors_are_recorded(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--preset", "official", *WORDS, "--global-batch-size", "40", "--no-figures"]
        assert main(["train", "local_contrast", "--out", str(tmp_path / "run"), *words]) == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        recorded = [sentence.split(":")[0] for sentence in results["data_warnings"]]
        assert {"transductive", "identical_views", "train_global_head"} <= set(recorded)
        assert results["stages"]["global"]["images"] == 20 * 8  # all volumes
        assert results["volumes"]["train"] == 10 and len(weights(tmp_path / "run")) == 1  # the last epoch
        text = " ".join(capsys.readouterr().out.split())
        assert "saw the slices of the validation and test volumes" in text


class TestAblations:
    def test_a_sweep(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["ablate", "local-contrast", "--out", str(tmp_path), *WORDS, "--runs", "2"]
        assert main([*words, "--only", "block-8", "full"]) == 0
        text = capsys.readouterr().out
        assert "block-8" in text and "Dice per volume" in text
        assert (tmp_path / "figures" / "sweep_block_size.png").stat().st_size > 5000
        assert len(list((tmp_path / "stages").glob("global-*/config.json"))) == 2  # one per seed, for both ablations
        assert main([*words, "--only", "magic"]) == 1

    def test_help_names_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["ablate", "local-contrast", "--help"])
        text = capsys.readouterr().out
        assert "temperature-0.05" in text and "--block-size" in text


def test_the_command_line_takes_the_defaults_of_the_data(tmp_path: Path) -> None:
    assert local_contrast.DEFAULT_DATA == "phantoms"
    assert LocalContrastConfig.preset("fair").data == "phantoms"
