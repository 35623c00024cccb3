# SPDX-License-Identifier: MIT
"""Local contrast end to end on phantoms, through the command line: stages, resuming to the bit, results, figures,
prediction, ablations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="local contrast needs the extra protokernels[train]")

from protokernels.cli import main
from protokernels.papers import local_contrast
from protokernels.papers.local_contrast import load_segmenter
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


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """t-SNE of 1,500 pixels takes seconds."""
    monkeypatch.setattr("protokernels.figures.local_contrast.PIXELS_PER_CLASS", 20)


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
        assert results["stages"]["global"]["images"] == 12 * 8 and results["stages"]["local"]["images"] == 3 * 8
        for stage in results["stages"].values():
            assert stage["steps"] >= 6 and stage["last_epoch"]["loss"] > 0
        for name in ("global", "local"):  # a run that is moved finds them
            assert (trained / results["stages"][name]["folder"]).parent == trained / "stages"
            assert not Path(results["stages"][name]["folder"]).is_absolute()
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
        assert (
            "Global+local(block)" in text and "Dice, pooled" in text and "HD95 (pixels)" in text and "3 of 12" in text
        )
        assert "phantoms: made volumes" in text.replace("\n", " ")
        assert main(["figures", str(trained)]) == 0
        names = {Path(line).name for line in capsys.readouterr().out.split()}
        assert names == {
            "losses_global.png",
            "losses_local.png",
            "losses_fine_tune.png",
            "overlays.png",
            "features.png",
            "architecture.png",
            "partners.png",
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
        words = ["ablate", "local-contrast", "--out", str(tmp_path), *WORDS]
        assert main([*words, "--only", "block-8", "full"]) == 0
        text = capsys.readouterr().out
        assert "block-8" in text and "Dice per volume" in text
        assert (tmp_path / "figures" / "sweep_block_size.png").stat().st_size > 5000
        assert len(list((tmp_path / "stages").glob("global-*/config.json"))) == 1  # for both
        assert main([*words, "--only", "magic"]) == 1

    @pytest.mark.parametrize(
        ("method", "blocks", "strides"),
        [("global+local-block", [16, 8, 32], [2, 8]), ("global+local-stride", [8, 32], [4, 2, 8]), ("random", [8, 32], [2, 8])],
    )  # fmt: skip
    def test_the_whole_run_is_in_the_curves_of_its_method(
        self, method: str, blocks: list[int], strides: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fair = local_contrast.LocalContrastConfig.preset("fair", method=method)  # type: ignore[arg-type]
        score = {"mean": {"mean": 0.5, "std": None}}
        results = {
            name: {
                "config": replace(fair, **local_contrast.ABLATIONS[name]).record(),
                "splits": {"test": {"pooled_dice": score, "volume_dice": score}},
            }
            for name in ("full", "block-8", "block-32", "stride-2", "stride-8", "temperature-0.5")
        }
        drawn: dict[str, list[Any]] = {}

        def sweep_figure(panels: Any, title: str) -> None:
            drawn.update((panel.label, list(panel.values)) for panel in panels)

        monkeypatch.setattr("protokernels.figures.sweeps.sweep_figure", sweep_figure)
        monkeypatch.setattr("protokernels.figures.save_figure", lambda figure, path: path)
        local_contrast.draw_ablations(results, tmp_path)
        expected = {"block size, pixels": blocks, "stride, pixels": strides, "temperature": [0.1, 0.5]}
        assert drawn == expected

    def test_help_names_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["ablate", "local-contrast", "--help"])
        text = capsys.readouterr().out
        assert "temperature-0.05" in text and "--block-size" in text
