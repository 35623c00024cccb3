# SPDX-License-Identifier: MIT
"""What all papers and baselines share around their algorithms, on an experiment that trains two numbers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.commands import BASELINES, find_paper
from protokernels.data import ImageDataset, Split, load_dataset
from protokernels.papers import PAPERS, local_contrast
from protokernels.training import RunFolder, RunFolderError, Session
from protokernels.training.checkpoints import CheckpointError
from protokernels.training.configuration import RunConfig
from protokernels.training.experiment import Experiment, training_images
from python_tests.data_files import make_arrays, save
from python_tests.places import default_dtype


@dataclass(frozen=True)
class Config(RunConfig):
    """Of :class:`Brightness`."""

    epochs: int = 2
    batch_size: int = 500
    decay: float = 0.0
    widths: tuple[int, ...] = (1,)
    selection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("epochs", "batch_size")
        self.check_not_negative("decay")


class Brightness(Experiment[Config]):
    """Learns the mean brightness of the images."""

    def __init__(self) -> None:
        super().__init__("brightness", Config)
        self.loaded = 0

    def load(self, config: Config, data_root: str | Path | None = None, *, download: bool = False) -> ImageDataset:
        self.loaded += 1
        return load_dataset(config.data, data_root, download=download)

    def check(self, config: Config, dataset: ImageDataset) -> None:
        if dataset.channels != 1:
            raise ValueError("one channel")

    def new_model(self, config: Config, dataset: ImageDataset) -> nn.Module:
        return nn.Linear(1, 1)

    def optimizer(self, model: nn.Module, config: Config) -> tuple[Optimizer, LRScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return optimizer, LambdaLR(optimizer, lambda epoch: 1.0)

    def fit_split(self, model: nn.Module, split: Split, session: Session, config: Config) -> None:
        images = training_images(split, 8, session)
        for _ in session.epochs():
            for step in session.steps():
                brightness = images[step.indices].mean(dim=(1, 2, 3))[:, None]
                loss = (session.model(torch.zeros_like(brightness)) - brightness).square().mean()
                session.optimise(loss, step)
                session.record(step, loss=loss)

    def score_model(self, model: nn.Module, dataset: ImageDataset, config: Config, seed: int) -> dict[str, Any]:
        weight, bias = (float(value.detach().sum()) for value in model.parameters())
        return {"splits": {"test": {"bias": bias, "weight": weight, "seed": seed}}, "images": {}, "protocol": {}}

    def draw(self, folder: Path, run: RunFolder, config: Config, dataset: ImageDataset) -> list[Path]:
        (folder / "figures").mkdir(exist_ok=True)
        path = folder / "figures" / f"{run.config()['seed']}-{len(dataset.test)}.png"
        path.touch()
        return [path]


class TestExperiment:
    def test_train_evaluate_and_draw(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        experiment = Brightness()
        results = experiment.train(Config(preset_name="mine"), runs=2, seed=3, quiet=True, device="cpu")
        assert results["folder"] == "runs/brightness-digits-mine" and results["seeds"] == [3, 4] and results["complete"]
        assert experiment.loaded == 1  # for training, scores and figures
        run = RunFolder.open(Path(results["folder"]) / "seed-4")
        assert run.config() == {
            "paper": "brightness", "config": {**Config(preset_name="mine").record(), "widths": [1]}, "precision": "fp32",
            "processes": 1, "seed": 4,
        }  # fmt: skip
        assert [line["epoch"] for line in run.metrics()] == [1, 2]
        assert [path.name for path in (tmp_path / results["folder"] / "figures").iterdir()] == ["3-359.png"]
        run.write_results({**(run.results() or {}), "splits": {}})
        assert experiment.evaluate(results["folder"])["splits"] == results["splits"] and experiment.loaded == 3
        assert experiment.draw_figures(results["folder"])[0].is_file()

    def test_data_at_hand_is_not_loaded(self, tmp_path: Path) -> None:
        experiment, dataset = Brightness(), load_dataset("digits")
        results = experiment.train(Config(epochs=1), tmp_path / "run", dataset=dataset, quiet=True, device="cpu")
        assert experiment.evaluate(tmp_path / "run", dataset=dataset)["splits"] == results["splits"]
        assert experiment.loaded == 0 and len(list((tmp_path / "run" / "figures").iterdir())) == 1

    def test_what_the_caller_has_set_neither_matters_nor_changes(self, tmp_path: Path) -> None:
        """As in a search that draws the next configuration after every training, in float64 and without gradients."""
        experiment = Brightness()
        expected = experiment.train(Config(), tmp_path / "first", quiet=True, device="cpu")
        random.seed(1)
        torch.manual_seed(2)
        flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        states = random.getstate(), torch.get_rng_state()
        for mode in (torch.no_grad, torch.inference_mode):
            with default_dtype(torch.float64), mode():
                results = experiment.train(Config(), tmp_path / mode.__name__, quiet=True, device="cpu")
                experiment.evaluate(results["folder"])
                experiment.draw_figures(results["folder"])
                assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
            assert results["splits"] == expected["splits"]
        assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == flags

    def test_values_of_numpy_and_paths_are_read_back(self, tmp_path: Path) -> None:
        """As a search hands them over; written as text, the run could not be read again."""
        save(tmp_path / "mine.npz", make_arrays())
        changes: dict[str, Any] = {"epochs": np.int64(1), "decay": np.float32(0.5), "widths": [np.int64(2), 3]}
        config = Config(data=tmp_path / "mine.npz", batch_size=6, **changes)  # type: ignore[arg-type]
        results = Brightness().train(config, tmp_path / "run", seed=np.int64(3), quiet=True, device="cpu")
        assert config == Config(str(tmp_path / "mine.npz"), epochs=1, batch_size=6, decay=0.5, widths=(2, 3))
        assert RunFolder.open(tmp_path / "run").config_as(Config) == config and results["seeds"] == [3]
        assert Brightness().evaluate(tmp_path / "run")["splits"] == results["splits"]
        preset = find_paper("vaesim").CONFIG.preset("fair", data=tmp_path / "mine.npz")
        assert preset.data == str(tmp_path / "mine.npz")

    def test_arguments_of_another_kind_are_named(self, tmp_path: Path) -> None:
        for config, more, message in (
            ("digits", {}, "brightness: expected a Config; got str"),
            (Config(), {"settings": {"seed": 1}}, "brightness: expected a RunSettings; got dict"),
        ):
            with pytest.raises(TypeError, match=message):
                Brightness().train(config, tmp_path / "run", **more)  # type: ignore[arg-type]
        for wrong, message in (
            ({"seed": 1.5}, "seed must be a whole number; got 1.5"),
            ({"runs": "2"}, "runs must be a whole number; got '2'"),
            ({"device": "cuda"}, "device must be one of auto, cpu; got 'cuda'"),
            ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        ):
            with pytest.raises(ValueError, match=f"RunSettings: {message}"):
                Brightness().train(Config(), tmp_path / "run", **wrong)  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()

    def test_what_does_not_fit_is_noticed_before_there_is_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        experiment = Brightness()
        monkeypatch.setattr(ImageDataset, "channels", 3)
        with pytest.raises(ValueError, match="one channel"):
            experiment.train(Config(), tmp_path / "run", quiet=True, device="cpu")
        monkeypatch.setattr(experiment, "no_download", "ask its owner")
        with pytest.raises(ValueError, match="brightness: ask its owner"):
            experiment.train(Config(), tmp_path / "run", download=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("vaesim", {"image_size": 30}, "a multiple of 8; got 30"),
            ("vaesim", {"knn_k": 1260}, "knn_k must be at most 1259, .*; got 1260"),
            ("contrastive_autoencoder", {"image_size": 30}, "a multiple of 16; got 30"),
            ("contrastive_autoencoder", {"knn_k": 1300}, "knn_k must be at most 1259, .*; got 1300"),
            ("vae_kmeans", {"image_size": 30}, "a multiple of 8; got 30"),
            ("gmvae", {"knn_k": 100_000}, "knn_k must be at most 1259, .*; got 100000"),
            (
                "optimized_views",
                {"encoder": "densenet121", "image_size": 32, "initial_weights": "absent.pth"},
                "absent.pth",
            ),
            ("simclr", {"view_maker": "matrices"}, "views by matrices"),
            ("simclr", {"epochs": 0, "warmup_epochs": 0}, "epochs and batch_size must be at least 1"),
            ("random_init", {"initial_weights": "absent.pth"}, "standard ResNet18"),
        ],
    )
    def test_a_configuration_that_cannot_be_trained_leaves_no_folder(
        self, name: str, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        paper = find_paper(name)
        config = replace(paper.CONFIG.preset("fair", data="digits"), **changes)
        with pytest.raises((ValueError, OSError), match=message):
            paper.train(config, tmp_path / "run", dataset=load_dataset("digits"), quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()

    def test_local_contrast_builds_its_networks_before_there_is_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise ValueError("no such head")

        monkeypatch.setattr(local_contrast, "local_head", refuse)
        config = local_contrast.CONFIG.preset("fair", data="phantoms")
        with pytest.raises(ValueError, match="no such head"):
            local_contrast.train(config, tmp_path / "run", quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()

    def test_nothing_to_evaluate(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "run", {"config": Config().record(), "seed": 0})
        with pytest.raises(FileNotFoundError, match="run has no checkpoint yet; continue the run with --resume"):
            Brightness().evaluate(tmp_path / "run")

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"paper": "brightness"}, "is incomplete: expected an object with paper, config and seed; got paper"),
            ({"config": {}}, "is incomplete: .* got config"),
            ({"config": 3, "seed": 0}, "is incomplete"),
            ({"config": {"epochs": "x"}, "seed": 0}, "epochs takes a value of type int; got 'x'"),
            ({"config": {"data": None}, "seed": 0}, "data takes a value of type str; got None"),
            ({"config": {"epochs": -1}, "seed": 0}, "epochs must be positive"),
            ({"config": {"speed": 1}, "seed": 0}, "unknown fields speed"),
        ],
    )
    def test_an_incomplete_configuration_is_named_with_its_file(
        self, record: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        RunFolder.create(tmp_path / "run", record)
        for command in (Brightness().evaluate, Brightness().draw_figures):
            with pytest.raises(RunFolderError, match=rf"config\.json.* {message}"):
                command(tmp_path / "run")

    def test_a_finished_run_whose_checkpoint_is_gone_or_damaged(self, tmp_path: Path) -> None:
        """It is not told to --resume, which leaves a finished run as it is."""
        run = RunFolder.create(tmp_path / "run", {"config": Config().record(), "seed": 0})
        run.write_results({"complete": True})
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint any more: .*train anew, into another folder"
        ) as gone:
            Brightness().evaluate(tmp_path / "run")
        run.checkpoints.save({"model": {}}, epoch=1).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"can be used .*train anew, into another folder") as damaged:
            Brightness().evaluate(tmp_path / "run")
        for message in map(str, (gone.value, damaged.value)):
            assert "resume" not in message and "remove" not in message


class TestRunConfig:
    def test_comes_back_from_a_run_folder(self) -> None:
        assert Config.from_dict({"data": "mnist", "widths": [2, 3]}) == Config("mnist", widths=(2, 3))
        with pytest.raises(
            ValueError, match="Config: unknown fields pace, speed; the run was written by another version"
        ):
            Config.from_dict({"speed": 1, "pace": 2})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epochs": "3"}, "epochs takes a value of type int; got '3'"),
            ({"epochs": 1.5}, "epochs takes a value of type int; got 1.5"),
            ({"selection": "no"}, "selection takes a value of type bool; got 'no'"),
            ({"decay": None}, "decay takes a value of type float; got None"),
            ({"decay": True}, "decay takes a value of type float; got True"),
            ({"widths": 3}, r"widths takes a value of type tuple\[int, \.\.\.\]; got 3"),
            ({"widths": (1, 2.5)}, r"widths takes a value of type tuple\[int, \.\.\.\]; got \(1, 2.5\)"),
        ],
    )
    def test_refuses_values_of_another_type(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"Config: {message}"):
            Config(**changes)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, value: float) -> None:
        with pytest.raises(ValueError, match=f"Config: decay must be finite; got {value}"):
            Config(decay=value)
        with pytest.raises(ValueError, match=f"Config: widths must be finite; got {value}"):
            Config(widths=(1, value))  # type: ignore[arg-type]

    def test_refuses_what_int64_does_not_hold(self) -> None:
        with pytest.raises(ValueError, match=f"Config: epochs must lie between .*; got {2**63}"):
            Config(epochs=2**63)

    @pytest.mark.parametrize("name", sorted({*PAPERS, *BASELINES} - {"random_init"}))
    def test_no_number_of_any_configuration_may_be_infinite(self, name: str) -> None:
        config = find_paper(name).CONFIG.preset("fair")
        numbers = [name for name, value in vars(config).items() if isinstance(value, float)]
        for field in numbers:
            with pytest.raises(ValueError, match=f"{field} must be finite; got inf"):
                replace(config, **{field: math.inf})  # random_init ignores what the others were told

    @pytest.mark.parametrize("value", [0, -1])
    def test_refuses_what_is_no_size(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"Config: epochs must be positive; got {value}"):
            Config(epochs=value)
        with pytest.raises(ValueError, match=r"Config: decay must not be negative; got -1"):
            Config(decay=value or -1)
