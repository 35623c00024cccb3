# SPDX-License-Identifier: MIT
"""Optimized views end to end on the embedded digits, through the command line: strategies, resuming to the bit, scores, figures,
ablations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="optimized views need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.evaluation import linear_evaluation
from protokernels.papers import optimized_views
from protokernels.papers._optimized_views_networks import load_model
from protokernels.papers._optimized_views_scoring import in_batches
from protokernels.papers.optimized_views import STRATEGIES
from protokernels.training import RunFolder
from python_tests.nifti_files import write_brats

WORDS = [
    "--image-size",
    "16",
    "--width",
    "2",
    "--m-width",
    "2",
    "--batch-size",
    "128",
    "--epochs",
    "2",
    "--evaluations",
    "2",
]
WORDS += ["--device", "cpu", "--quiet"]


def run(folder: Path, *more: str) -> int:
    return main(["train", "optimized-views", "--out", str(folder), *WORDS, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the paper's method."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, "--no-figures") == 0
    return folder


class Killed(BaseException):
    """In place of a signal that ends the process at once."""


class TestRun:
    def test_results(self, trained: Path) -> None:
        results = json.loads((trained / "results.json").read_text())
        assert results["complete"] and set(results["splits"]) == {"test"}
        scores = results["splits"]["test"]
        assert set(scores) == {"hold_out", "probe", "untrained"} and set(scores["probe"]) == {"10%", "100%"}
        assert set(scores["hold_out"]["sets"]) == {"1", "2", "3"}
        assert sum(row["images"] for row in scores["hold_out"]["sets"].values()) == results["images"]["test"] == 359
        assert results["images"]["labelled"] == scores["probe"]["10%"]["images"] == 126
        assert 0.4 < scores["hold_out"]["auc"] <= 1
        last = RunFolder.open(trained).metrics()[-1]
        assert last["auc"] == pytest.approx(scores["hold_out"]["auc"], abs=1e-9)
        assert {
            "m_contrast",
            "contrast",
            "cross_entropy",
            "view_cross_entropy",
            "mean_crop_x",
            "mean_rotation",
        } <= last.keys()

    def test_the_score_is_that_of_the_checkpoint_on_untransformed_images(self, trained: Path) -> None:
        dataset = optimized_views.load_presence("digits")
        model, config = optimized_views.load_model(RunFolder.open(trained), 1)
        test = dataset.test
        features = in_batches(model.f, test, config.image_size)
        x = torch.nn.functional.interpolate(torch.tensor(test.images[:5])[:, None] / 255, (16, 16), mode="bilinear")
        with torch.no_grad():
            torch.testing.assert_close(features[:5], model.f(x), rtol=1e-4, atol=1e-5)
        expected = linear_evaluation(features, test.labels)
        results = json.loads((trained / "results.json").read_text())
        assert results["splits"]["test"]["hold_out"]["auc"] == pytest.approx(expected["auc"], abs=1e-9)

    def test_what_M_chooses_is_counted_after_every_epoch(self, trained: Path) -> None:
        lines = [json.loads(line) for line in (trained / "parameters.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2]
        for line in lines:
            assert len(line["counts"]) == 7 and all(sum(counts) == 359 for counts in line["counts"].values())

    @pytest.mark.parametrize("strategy", ["self-supervised+supervision", "supervised-contrastive"])
    def test_a_killed_run_goes_on_to_the_same_bits(
        self, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ["--no-figures", "--strategy", strategy]
        whole, folder = tmp_path / "whole", tmp_path / "stopped"
        assert run(whole, *words) == 0
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(optimized_views, "fit", _killed_in_its_second_epoch(optimized_views.fit))
            run(folder, *words)
        assert not (folder / "results.json").exists()
        assert run(folder, *words, "--resume") == 0
        one, other = (RunFolder.open(path).checkpoints.load() for path in (folder, whole))
        assert one is not None and other is not None
        for name, value in other["model"].items():
            assert torch.equal(one["model"][name], value), name
        for key, moments in other["optimizer"]["state"].items():
            assert all(torch.equal(one["optimizer"]["state"][key][name], value) for name, value in moments.items())
        results = [json.loads((path / "results.json").read_text())["splits"] for path in (folder, whole)]
        assert results[0] == results[1]
        if strategy.startswith("self"):
            assert (folder / "parameters.jsonl").read_bytes() == (whole / "parameters.jsonl").read_bytes()

    def test_labels_that_may_not_be_seen_change_nothing(self, trained: Path, tmp_path: Path) -> None:
        """Training on other labels for the nine tenths that are hidden gives the same weights."""
        from protokernels.data import ImageDataset
        from protokernels.papers._optimized_views_scoring import labelled_images
        from protokernels.training.runs import RunSettings

        dataset = optimized_views.load_presence("digits")
        config = optimized_views.OptimizedViewsConfig.from_dict(RunFolder.open(trained).config()["config"])
        seen = labelled_images(dataset.train, config, 0)
        labels = 1 - dataset.train.labels
        labels[seen] = dataset.train.labels[seen]
        # The draw is stratified and so would differ: it is held still.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(optimized_views, "labelled_images", lambda *_: seen)
            changed: ImageDataset = replace(dataset, train=replace(dataset.train, labels=labels))
            settings = RunSettings(device="cpu", quiet=True)
            optimized_views.train(config, tmp_path / "run", figures=False, settings=settings, dataset=changed)
        one, other = (RunFolder.open(path).checkpoints.load() for path in (tmp_path / "run", trained))
        assert one is not None and other is not None
        assert all(torch.equal(one["model"][name], value) for name, value in other["model"].items())

    def test_images_of_one_class_have_no_area_and_the_table_says_so(self, tmp_path: Path) -> None:
        dataset = optimized_views.load_presence("digits")
        test = replace(dataset.test, labels=np.zeros_like(dataset.test.labels))
        config = optimized_views.CONFIG.preset(
            "fair", "digits", strategy="simclr", image_size=16, width=2, epochs=1, batch_size=300, evaluations=1
        )
        results = optimized_views.train(
            config, tmp_path / "run", figures=False, quiet=True, dataset=replace(dataset, test=test)
        )
        (name,) = dataset.class_names[1:]
        table = optimized_views.results_table(results, {})
        assert all(list(column.cells) == [""] for column in table.columns[1:])
        assert f"left out of the means in test, where no image has them or all: {name}" in str(table.caption)

    @pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "self-supervised+supervision"])
    def test_every_strategy_trains(self, strategy: str, tmp_path: Path) -> None:
        words = ["--epochs", "1", "--evaluations", "1", "--batch-size", "256"]
        assert run(tmp_path / "run", "--no-figures", "--strategy", strategy, *words) == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["images"]["labelled"] == {"none": 0, "share": 126, "all": 1259}[STRATEGIES[strategy].labels]
        assert (tmp_path / "run" / "parameters.jsonl").exists() == (STRATEGIES[strategy].views == "M")
        scores = results["splits"]["test"]
        assert ("classifier" in scores) == strategy.startswith("supervised") - (strategy == "supervised-contrastive")
        if "classifier" in scores:
            model, config = load_model(RunFolder.open(tmp_path / "run"), 1)
            test = optimized_views.load_presence("digits").test
            logits = in_batches(nn.Sequential(model.f, model.p), test, config.image_size).squeeze(1)
            pairs = logits[test.labels == 1][:, None] - logits[test.labels == 0]
            area = ((pairs > 0).double() + (pairs == 0) / 2).mean().item()
            assert scores["classifier"]["auc"] == pytest.approx(area, abs=1e-6)

    def test_M_every_third_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 4 steps an epoch, M makes the steps 0 and 3, then 2: and its means are over those."""
        turns: list[bool] = []
        losses: list[float] = []
        alternate = optimized_views.alternate

        def watched(*arguments: Any, turn_of_M: bool, **more: Any) -> dict[str, torch.Tensor]:
            result = alternate(*arguments, turn_of_M=turn_of_M, **more)
            turns.append("m_loss" in result)
            losses.append(float(result["m_loss"]) if turns[-1] else 0.0)
            return result

        monkeypatch.setattr(optimized_views, "alternate", watched)
        assert run(tmp_path / "run", "--no-figures", "--m-every", "3", "--batch-size", "300") == 0
        assert turns == [True, False, False, True, False, False, True, False]
        first, second = RunFolder.open(tmp_path / "run").metrics()
        assert first["m_loss"] == pytest.approx((losses[0] + losses[3]) / 2, rel=1e-6)
        assert second["m_loss"] == pytest.approx(losses[6], rel=1e-6) and 0.3 < first["mean_blur"] < 0.7

    def test_strategies_with_few_labels_see_those_alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        seen: list[np.ndarray] = []
        convert = optimized_views.to_tensor

        def recorded(images: np.ndarray, **more: Any) -> torch.Tensor:
            seen.append(np.asarray(images))
            return convert(images, **more)

        monkeypatch.setattr(optimized_views, "to_tensor", recorded)
        assert run(tmp_path / "run", "--no-figures", "--strategy", "supervised", "--labelled", "0.02") == 0
        different = {image.tobytes() for batch in seen for image in batch}
        assert len(different) <= round(0.02 * 1259) and sum(map(len, seen)) == 2 * (1259 // 128) * 128

    @pytest.mark.parametrize("few", [1, 7, 8, 21, 100])
    def test_few_images_are_gone_through_evenly(self, few: int) -> None:
        """In batches of 8 of two processes: nobody twice in a batch that could be without, all as often as the others but for one turn."""
        session: Any = SimpleNamespace(count=100, batch_size=8, seed=3)
        rows = torch.arange(1000, 1000 + few)
        batches = []
        for index in range(12):
            step = optimized_views.Step(1, index, 0.0, torch.arange(8 * index, 8 * index + 8), 8, 3, 0, 1)
            batch = optimized_views.images_of(step, rows, session)
            shares = [replace(step, indices=step.indices[rank::2], rank=rank, processes=2) for rank in (0, 1)]
            parts = [optimized_views.images_of(share, rows, session) for share in shares]
            assert torch.equal(torch.stack(parts, 1).flatten(), batch)
            assert len(batch) == 8 and len(batch.unique()) == min(few, 8)
            batches.append(batch)
        counts = (torch.cat(batches) - 1000).bincount(minlength=few)
        per_pass = max(1, few // 8)  # batches
        passes, copies = -(-12 // per_pass), -(-8 // few)
        assert counts.min() >= (12 if few <= 8 else 0) and counts.max() <= passes * copies
        assert few in (1, 100) or not torch.equal(batches[0], batches[per_pass])

    def test_evaluate_figures_and_selection(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = json.loads((trained / "results.json").read_text())
        assert main(["evaluate", str(trained)]) == 0
        after = json.loads((trained / "results.json").read_text())
        assert after["splits"] == before["splits"] and after["images"] == before["images"] and after["complete"]
        text = capsys.readouterr().out
        assert "hold-out" in text and "untrained" in text and "126 of 1259" in text
        assert main(["figures", str(trained)]) == 0
        paths = [Path(line) for line in capsys.readouterr().out.split()]
        assert {path.name for path in paths} == {"architecture.png", "losses.png", "views.png", "parameters.png"}
        assert all(path.stat().st_size > 5000 for path in paths)
        first = (trained / "figures" / "views.png").read_bytes()
        assert main(["figures", str(trained)]) == 0 and (trained / "figures" / "views.png").read_bytes() == first
        words = ["--selection", "--no-figures", "--epochs", "1", "--evaluations", "1", "--batch-size", "256"]
        assert run(tmp_path / "run", *words) == 0
        assert set(json.loads((tmp_path / "run" / "results.json").read_text())["splits"]) == {"val"}

    def test_ablate(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, words = tmp_path / "ablations", ["--epochs", "1", "--evaluations", "1", "--batch-size", "256"]
        names = ["full", "M-0.1-10-1-1-1", "simclr-order-reversed"]
        assert main(["ablate", "optimized-views", "--out", str(folder), *WORDS, *words, "--only", *names]) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in names) and "hold-out" in text
        config = json.loads((folder / names[2] / "config.json").read_text())["config"]
        assert config["order"][0] == "rotate" and config["strategy"] == "simclr"
        assert (folder / "figures" / "auc.png").stat().st_size > 5000

    def test_volumes_of_brats(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Made volumes in the Decathlon's layout; the linear evaluation needs 3 x 3 patients in the test set, a tenth of all."""
        write_brats(tmp_path / "Task01_BrainTumour", 90)
        words = ["--data", "brats", "--data-root", str(tmp_path), "--epochs", "1", "--evaluations", "1", "--no-figures"]
        assert run(tmp_path / "run", *words) == 0
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["images"] == {"train": 72 * 5, "val": 9 * 5, "test": 9 * 5, "labelled": 36}
        assert all(row["images"] == 15 for row in results["splits"]["test"]["hold_out"]["sets"].values())
        write_brats(tmp_path / "few" / "brats", 20)
        assert run(tmp_path / "second", *words[:2], "--data-root", str(tmp_path / "few"), "--no-figures") == 1
        assert "3 parts need at least 3 groups; got 2" in capsys.readouterr().err

    def test_wrong_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "optimized-views", "--preset", "official"]) == 1
        assert "the authors have not released their code" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["train", "optimized-views", "--help"])
        assert "--m-every" in capsys.readouterr().out


def _killed_in_its_second_epoch(fit: Callable[..., None]) -> Callable[..., None]:
    def stopped(*arguments: Any) -> None:
        *others, after_epoch = arguments
        session = others[4]

        def after(epoch: int) -> None:
            if epoch == 1:  # at its end, before the checkpoint
                raise Killed
            after_epoch(epoch)

        fit(*others[:4], session, after)

    return stopped


def test_folders_of_a_run_hold_nothing_else(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {"figures"}
    assert names == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "parameters.jsonl",
        "results.json",
        "checkpoints",
    }
    shutil.rmtree(trained / "figures", ignore_errors=True)
