# SPDX-License-Identifier: MIT
"""Every baseline from the command line on the embedded digits: folders, resuming, evaluation, several seeds, ImageNet weights."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels import cli
from protokernels.baselines import BASELINES
from protokernels.data import DataError, ImageDataset, Split, load_dataset
from protokernels.models import ResNet18
from protokernels.training import RunFolder, synchronize_batch_norm
from protokernels.training import transfer_scoring as scoring
from protokernels.training.distributed import SynchronizedBatchNorm
from protokernels.training.self_supervised import PretrainingConfig
from protokernels.training.summary import summarize_runs
from protokernels.training.transfer_report import results_table

TINY = {"epochs": 2, "warmup_epochs": 1, "image_size": 16, "width": 4, "batch_size": 250, "transfer": "probe"}
TRAINED = tuple(name for name in BASELINES if name != "random_init")


def baseline(name: str) -> Any:
    return importlib.import_module(f"protokernels.baselines.{name}").BASELINE


def options(**values: Any) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def train_tiny(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    keywords = {key: changes.pop(key) for key in ("seed", "runs", "resume", "precision") if key in changes}
    data = changes.pop("data", "digits")
    config = baseline(name).CONFIG.preset("fair", data, **{**TINY, **changes})
    results: dict[str, Any] = baseline(name).train(config, folder, figures=False, quiet=True, device="cpu", **keywords)
    return results


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose weights are all that matters."""
    nothing = {"splits": {}, "images": {}, "protocol": {}}
    monkeypatch.setattr("protokernels.training.self_supervised.transfer_scores", lambda *_a: nothing)


def final_model(folder: Path) -> dict[str, torch.Tensor]:
    state = RunFolder(folder).checkpoints.load()
    assert state is not None
    return dict(state["model"])


class TestCommands:
    @pytest.mark.parametrize("name", BASELINES)
    def test_train(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "run"
        words = ["train", name, "--out", str(out), *options(**TINY), "--device", "cpu", "--quiet", "--no-figures"]
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert f"{name}, preset fair, digits: macro AUROC" in shown and "linear probe" in shown
        stored = json.loads((out / "results.json").read_text())
        probe = stored["splits"]["test"]["labels"]["probe"]
        assert list(probe) == ["1%", "5%", "10%", "30%", "100%"] and stored["complete"] is True
        assert [probe[key]["images"] for key in probe] == [13, 63, 126, 378, 1259]
        assert probe["100%"]["macro_auroc"] > 0.75
        assert set(stored["splits"]["test"]) == {"labels"} and stored["splits"]["test"]["labels"]["fine_tune"] == {}

    @pytest.mark.usefixtures("few_digits")
    @pytest.mark.parametrize("name", ["random_init", "swav"])
    def test_evaluate_and_figures(self, name: str, tmp_path: Path) -> None:
        out = tmp_path / "run"
        assert cli.main(["train", name, "--out", str(out), *options(**TINY), "--device", "cpu", "--quiet"]) == 0
        stored = json.loads((out / "results.json").read_text())
        assert (out / "figures" / "losses.png").exists() == (name != "random_init")
        assert (out / "figures" / "fractions_test_labels.png").exists()
        assert cli.main(["evaluate", str(out)]) == 0
        again = json.loads((out / "results.json").read_text())
        assert again["splits"] == stored["splits"]
        assert cli.main(["figures", str(out)]) == 0

    def test_an_unknown_name_lists_papers_and_baselines(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "moco"]) == 2
        shown = capsys.readouterr().out
        assert "baselines: random_init, supervised, simclr" in shown and "vaesim" in shown


class TestRuns:
    @pytest.mark.usefixtures("unscored", "few_digits")
    @pytest.mark.parametrize("name", TRAINED)
    def test_resume_to_the_bit(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stops in the second epoch by an error, as a crash would: teachers and queues must come back too."""
        kind = importlib.import_module(f"protokernels.baselines.{name}").BASELINE.build
        train_tiny(name, tmp_path / "whole", epochs=2, batch_size=100)
        forward, calls = kind.forward, 0

        def crash(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("power cut")
            return forward(*arguments)

        monkeypatch.setattr(kind, "forward", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(name, tmp_path / "cut", epochs=2, batch_size=100)
        monkeypatch.setattr(kind, "forward", forward)
        train_tiny(name, tmp_path / "cut", epochs=2, batch_size=100, resume=True)
        whole, cut = final_model(tmp_path / "whole"), final_model(tmp_path / "cut")
        assert whole.keys() == cut.keys() and all(torch.equal(value, cut[key]) for key, value in whole.items())

    @pytest.mark.usefixtures("unscored")
    def test_labels_reach_the_supervised_method_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digits = load_dataset("digits")
        shuffled = replace(digits, train=Split(digits.train.images, np.roll(digits.train.labels, 7)))
        for name, same in (("simclr", True), ("supervised", False)):
            train_tiny(name, tmp_path / f"{name}-a", epochs=1)
            with monkeypatch.context() as patch:
                patch.setattr("protokernels.training.experiment.load_dataset", lambda *_a, **_k: shuffled)
                train_tiny(name, tmp_path / f"{name}-b", epochs=1)
            a, b = final_model(tmp_path / f"{name}-a"), final_model(tmp_path / f"{name}-b")
            assert torch.equal(a["encoder.conv1.weight"], b["encoder.conv1.weight"]) == same

    def test_several_seeds_and_the_table(self, tmp_path: Path) -> None:
        results = train_tiny("random_init", tmp_path / "runs", runs=2)
        assert results["number_of_runs"] == 2 and results["complete"]
        cell = results["splits"]["test"]["labels"]["probe"]["100%"]["macro_auroc"]
        assert cell["runs"] == 2 and cell["std"] > 0
        table = results_table(results)
        assert [str(column.header) for column in table.columns][1:] == [
            "1%\n(13)",
            "5%\n(63)",
            "10%\n(126)",
            "30%\n(378)",
            "100%\n(1259)",
        ]

    def test_bf16(self, tmp_path: Path) -> None:
        results = train_tiny("vicreg", tmp_path / "run", precision="bf16", epochs=1)
        assert results["splits"]["test"]["labels"]["probe"]["100%"]["macro_auroc"]["mean"] > 0.75

    def test_random_init_trains_nothing(self) -> None:
        config = baseline("random_init").CONFIG.preset("fair", "digits", epochs=3, warmup_epochs=2)
        assert (config.epochs, config.warmup_epochs) == (0, 0)

    def test_unknown_data(self, tmp_path: Path) -> None:
        for name in ("random_init", "supervised", "byol"):
            with pytest.raises(DataError, match="digits"):
                train_tiny(name, tmp_path / "run", data="imagenet")
        assert not (tmp_path / "run").exists()


class TestImageNet:
    OPTIONS = ("--width", "64", "--stem", "imagenet", "--image-size", "32", "--transfer", "probe")

    def test_from_a_local_file(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        source = ResNet18(channels=3)
        torch.save(
            {**source.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "w.pth"
        )
        out = tmp_path / "run"
        words = ["train", "random_init", "--initial-weights", str(tmp_path / "w.pth"), "--out", str(out), *self.OPTIONS]
        assert cli.main([*words, "--device", "cpu", "--quiet"]) == 0
        loaded = final_model(out)
        assert torch.equal(loaded["encoder.layer4.1.conv2.weight"], source.layer4[1].conv2.weight)
        torch.testing.assert_close(loaded["encoder.conv1.weight"], source.conv1.weight.sum(dim=1, keepdim=True))
        (tmp_path / "w.pth").unlink()  # the checkpoint holds all weights
        np.save(tmp_path / "images.npy", load_dataset("digits").test.images[:3])
        assert cli.main(["embed", str(out), str(tmp_path / "images.npy"), "--device", "cpu"]) == 0
        assert np.load(tmp_path / "images-embeddings.npy").shape == (3, 512)

    def test_a_missing_file_says_what_to_do(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [
            "train",
            "random_init",
            "--initial-weights",
            str(tmp_path / "none.pth"),
            "--out",
            str(tmp_path / "run"),
        ]
        assert cli.main([*words, *self.OPTIONS]) == 1
        message = capsys.readouterr().err
        assert "none.pth" in message and "nothing is downloaded" in message
        assert not (tmp_path / "run").exists()


class TestScoring:
    def dataset(self, val: bool = True, groups: bool = False) -> ImageDataset:
        def split(count: int, start: int) -> Split:
            images = np.zeros((count, 8, 8), dtype=np.uint8)
            labels = np.arange(count, dtype=np.int64) % 2
            images[:, :, :4] = (40 + 150 * labels)[:, None, None]
            images[:, 0, 0] = np.arange(start, start + count)
            findings = np.stack([labels, 1 - labels, np.zeros_like(labels)], axis=1).astype(np.uint8)
            patients = np.array([f"{start + index // 3}" for index in range(count)])
            return Split(images, labels, findings, patients if groups else None)

        return ImageDataset(
            "made",
            split(60, 0),
            split(20, 60) if val else None,
            split(20, 80),
            ("no", "yes"),
            target_names=("a", "b", "c"),
        )

    def score(self, dataset: ImageDataset, selection: bool = False) -> dict[str, Any]:
        torch.manual_seed(0)
        config = PretrainingConfig(image_size=8, stem="small", width=4, transfer="probe", selection=selection)
        return scoring.transfer_scores(config.make_encoder(1).eval(), dataset, config, seed=0)

    def test_labels_and_findings(self) -> None:
        results = self.score(self.dataset())
        tasks = results["splits"]["test"]
        assert tasks["labels"]["probe"]["100%"]["accuracy"] == 1.0
        row = tasks["targets"]["probe"]["100%"]
        assert row["auroc"] == {"a": 1.0, "b": 1.0} and row["left_out"] == ["c"] and "accuracy" not in row
        assert results["images"] == {"train": 60, "val": 20, "test": 20}
        assert results["left_out"] == {"test": ["c"]}
        assert results["protocol"]["transfer"] == "probe"
        json.dumps(results, allow_nan=False)

    def test_the_table_says_which_classes_have_no_area(self) -> None:
        dataset = self.dataset()
        one_class = replace(dataset.test, labels=np.zeros_like(dataset.test.labels))
        results = self.score(replace(dataset, test=one_class))
        config = {"preset_name": "fair", "data": "made"}
        runs = {"paper": "byol", "config": config, "number_of_runs": 2, "complete": True}
        splits = summarize_runs([results["splits"]] * 2)  # of several runs: without the lists
        table = results_table({**results, **runs, "splits": splits})
        assert list(table.columns[-1].cells) == ["", "1.000 ±.000"]  # one label per image, and findings
        assert "left out of the means in test, where no image has them or all: c, yes" in str(table.caption)

    def test_the_scored_copy_waits_for_no_other_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Several processes train with synchronised norms; only the main one scores."""
        torch.manual_seed(0)
        config = PretrainingConfig(image_size=8, stem="small", width=4, transfer="probe")
        encoder = synchronize_batch_norm(config.make_encoder(1)).eval()
        scored: list[torch.nn.Module] = []
        monkeypatch.setattr(scoring, "evaluate_transfer", lambda given, *_a, **_k: scored.append(given) or {})
        scoring.transfer_scores(encoder, self.dataset(), config, seed=0)
        for copy in scored:
            assert not any(isinstance(module, SynchronizedBatchNorm) for module in copy.modules())
            assert any(type(module) is torch.nn.BatchNorm2d for module in copy.modules())
            state = copy.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
        assert scored and any(isinstance(module, SynchronizedBatchNorm) for module in encoder.modules())

    def test_selection_never_touches_the_test_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for val in (True, False):
            dataset = self.dataset(val)
            seen: list[np.ndarray] = []
            convert = scoring.to_tensor

            def watch(images: np.ndarray, size: int, *, convert: Any = convert, seen: Any = seen) -> torch.Tensor:
                seen.append(images[:, 0, 0])
                return convert(images, size=size)

            with monkeypatch.context() as patch:
                patch.setattr(scoring, "to_tensor", watch)
                results = self.score(dataset, selection=True)
            assert list(results["splits"]) == (["val"] if val else ["held-out"])
            assert max(map(max, seen)) < 80 and sum(map(len, seen)) == len(set(np.concatenate(seen)))

    def test_without_a_validation_split_a_sixth_chooses(self) -> None:
        assert self.score(self.dataset(val=False))["images"] == {"train": 50, "val": 10, "test": 20}

    @pytest.mark.parametrize("groups", [False, True])
    def test_hold_out(self, groups: bool) -> None:
        split = self.dataset(groups=groups).train
        rest, held = scoring.hold_out(split, num_classes=2)
        again = scoring.hold_out(split, num_classes=2)[1]
        assert np.array_equal(held.images, again.images) and len(rest) + len(held) == 60 and 9 <= len(held) <= 12
        if groups:
            assert rest.groups is not None and held.groups is not None and not set(rest.groups) & set(held.groups)
        else:
            assert np.bincount(held.labels).tolist() == [5, 5]

    def test_one_group_cannot_be_split(self) -> None:
        split = replace(self.dataset(groups=True).train, groups=np.full(60, "same"))
        with pytest.raises(DataError, match=r"all 60 are of one group .*; add images .* or a validation split"):
            scoring.hold_out(split, num_classes=2)

    def test_nothing_to_choose_with_is_found_before_training(self, tmp_path: Path) -> None:
        dataset = self.dataset(val=False, groups=True)
        dataset = replace(dataset, train=replace(dataset.train, groups=np.full(60, "same")))
        config = baseline("simclr").CONFIG.preset("fair", **TINY)
        with pytest.raises(DataError, match="are of one group"):
            baseline("simclr").train(config, tmp_path / "run", dataset=dataset, quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()
