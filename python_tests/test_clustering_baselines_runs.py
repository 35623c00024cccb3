# SPDX-License-Identifier: MIT
"""VAESim's baselines from the command line: folders, resuming, evaluation, several seeds, labels, collapse, labelling of results."""

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
from protokernels.baselines import CLUSTERING_BASELINES
from protokernels.data import DataError, ImageDataset, Split, load_dataset
from protokernels.models import ResNet18
from protokernels.training import RunFolder, RunFolderError
from protokernels.training.session import Session

UNSUPERVISED = tuple(name for name in CLUSTERING_BASELINES if name != "resnet_transfer")
TINY: dict[str, dict[str, Any]] = {
    "vae_kmeans": {"image_size": 16, "latent_dim": 8, "candidates": (5, 10, 15, 20), "kmeans_starts": 2},
    "gmvae": {"image_size": 8, "hidden_dim": 32, "latent_dim": 8},
    "vade": {"image_size": 8, "hidden": (32, 16), "latent_dim": 5, "pretraining_epochs": 2},
    "resnet_transfer": {"depth": 18, "batch_size": 20},
}
FIGURES = {"vae_kmeans": 5, "gmvae": 4, "vade": 4, "resnet_transfer": 1}


def first_digits(path: Path, train: int, others: int) -> str:
    """The first images of each set of the embedded digits, as a file."""
    arrays: dict[str, Any] = {}
    for name, split in load_dataset("digits").splits.items():
        count = train if name == "train" else others
        arrays |= {
            f"{name}_images": split.images[:count],
            f"{name}_labels": split.labels[:count, None].astype(np.uint8),
        }
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return first_digits(tmp_path_factory.mktemp("data") / "small.npz", 300, 100)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For networks that take their time."""
    return first_digits(tmp_path_factory.mktemp("data") / "few.npz", 40, 20)


def baseline(name: str) -> Any:
    return importlib.import_module(f"protokernels.baselines.{name}").BASELINE


def tiny(name: str, data: str, **changes: Any) -> Any:
    return baseline(name).CONFIG.preset("fair", data, **{"epochs": 2, "batch_size": 64, **TINY[name], **changes})


def train_tiny(name: str, folder: Path, data: str, **changes: Any) -> dict[str, Any]:
    keywords = {key: changes.pop(key) for key in ("seed", "runs", "resume", "precision") if key in changes}
    config = tiny(name, data, **changes)
    results: dict[str, Any] = baseline(name).train(config, folder, figures=False, quiet=True, device="cpu", **keywords)
    return results


def options(name: str, data: str) -> list[str]:
    words = ["--data", data, "--epochs", "2", "--device", "cpu", "--quiet"]
    for key, value in TINY[name].items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def final_model(folder: Path) -> dict[str, torch.Tensor]:
    state = RunFolder(folder).checkpoints.load()
    assert state is not None
    return dict(state["model"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


class TestCommands:
    @pytest.mark.filterwarnings("ignore:resnet_transfer starts from random weights", "ignore:.*has collapsed")
    @pytest.mark.parametrize("name", CLUSTERING_BASELINES)
    def test_train_evaluate_and_figures(
        self, name: str, small: str, few: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, data = tmp_path / "run", small if name in UNSUPERVISED else few
        assert cli.main(["train", name.replace("_", "-"), "--out", str(out), *options(name, data)]) == 0
        shown = capsys.readouterr().out
        assert f"{name}, preset fair" in shown and "NOT FINISHED" not in shown
        expected = "RANDOM INITIALISATION" if name == "resnet_transfer" else "clusters used by test: "
        assert expected in shown
        stored = json.loads((out / "results.json").read_text())
        assert stored["complete"] and set(stored["splits"]) == {"test", "val", "val+test"}
        scores = stored["splits"]["test"]
        assert scores["knn"]["accuracy"] > (0.5 if name in UNSUPERVISED else 0.25) > scores["majority"]["accuracy"]
        kinds = {"statistical", "clustering"} if name in UNSUPERVISED else {"supervised"}
        assert scores.keys() == {"knn", "linear", "majority"} | kinds
        metrics = RunFolder(out).metrics()
        assert len(metrics) == (4 if name == "vade" else 2)
        measured = set(metrics[-1]) & {"clusters_used", "largest_cluster", "effective_clusters", "active_dimensions"}
        assert len(measured) == {"vae_kmeans": 1, "gmvae": 4, "vade": 4, "resnet_transfer": 0}[name]
        assert len(list((out / "figures").glob("*.png"))) == FIGURES[name]
        assert cli.main(["evaluate", str(out)]) == 0
        assert json.loads((out / "results.json").read_text()) == stored
        if name == "vae_kmeans":  # which has the most to find again
            assert cli.main(["figures", str(out)]) == 0
            assert capsys.readouterr().out.count(".png") >= FIGURES[name]

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            (
                "vae_kmeans",
                {"candidates": (5, 40, 41, 80)},
                r"at most 40, the number of training images; got \(5, 40, 41, 80\)",
            ),
            ("vade", {"num_clusters": 41}, "num_clusters must be at most 40, the number of training images; got 41"),
        ],
    )
    def test_more_clusters_than_images_are_refused_before_training(
        self, name: str, changes: dict[str, Any], message: str, few: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            train_tiny(name, tmp_path / "run", few, **changes)
        assert not (tmp_path / "run").exists()

    def test_an_unknown_name_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "idec"]) == 2
        assert "vae_kmeans, gmvae, vade, resnet_transfer" in capsys.readouterr().out

    @pytest.mark.parametrize("name", CLUSTERING_BASELINES)
    def test_a_wrong_configuration_is_one_line(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["train", name, "--preset", "best", "--out", str(tmp_path / "x")]) == 1
        assert "fair; got 'best'" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore:resnet_transfer starts from random weights", "ignore:.*has collapsed")
class TestRuns:
    @pytest.mark.parametrize(
        ("name", "steps"), [("vae_kmeans", 8), ("gmvae", 8), ("vade", 3), ("vade", 13), ("resnet_transfer", 4)]
    )
    def test_resume_to_the_bit(
        self, name: str, steps: int, small: str, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stops in the middle of an epoch by an error, as a crash would; VaDE in both stages."""
        small = small if name in UNSUPERVISED else few
        expected = train_tiny(name, tmp_path / "whole", small)
        optimise, calls = Session.optimise, 0

        def crash(self: Session, *arguments: Any, **keywords: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == steps:
                raise RuntimeError("power cut")
            optimise(self, *arguments, **keywords)

        monkeypatch.setattr(Session, "optimise", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(name, tmp_path / "cut", small)
        monkeypatch.setattr(Session, "optimise", optimise)
        with pytest.raises(RunFolderError, match="--resume"):
            train_tiny(name, tmp_path / "cut", small)
        resumed = train_tiny(name, tmp_path / "cut", small, resume=True)
        assert same(final_model(tmp_path / "whole"), final_model(tmp_path / "cut"))
        assert resumed["splits"] == expected["splits"]
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in RunFolder(tmp_path / "cut").metrics()]
        whole = [{k: v for k, v in line.items() if k != "seconds"} for line in RunFolder(tmp_path / "whole").metrics()]
        assert lines == whole

    def test_resume_inside_the_epoch_that_fits_the_mixture(
        self, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A signal writes a checkpoint between two steps; the mixture must not be fitted a second time."""
        from protokernels.baselines import vade
        from protokernels.training import Interrupted

        train_tiny("vade", tmp_path / "whole", small)
        loss = vade.vade_loss
        sessions: list[Session] = []
        start = Session.__init__

        def remember(self: Session, *arguments: Any, **keywords: Any) -> None:
            start(self, *arguments, **keywords)
            sessions.append(self)

        def interrupt(*arguments: Any) -> Any:
            sessions[-1]._signal = 2
            return loss(*arguments)

        monkeypatch.setattr(Session, "__init__", remember)
        monkeypatch.setattr(vade, "vade_loss", interrupt)
        with pytest.raises(Interrupted):
            train_tiny("vade", tmp_path / "cut", small)
        monkeypatch.setattr(vade, "vade_loss", loss)
        monkeypatch.setattr(vade, "initialize_mixture", lambda *_a: pytest.fail("fitted again"))
        train_tiny("vade", tmp_path / "cut", small, resume=True)
        assert same(final_model(tmp_path / "whole"), final_model(tmp_path / "cut"))

    @pytest.mark.parametrize("name", UNSUPERVISED)
    def test_labels_do_not_reach_training(
        self, name: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = load_dataset(small)
        shuffled = replace(dataset, train=Split(dataset.train.images, np.roll(dataset.train.labels, 7)))
        train_tiny(name, tmp_path / "a", small, epochs=1)
        monkeypatch.setattr("protokernels.training.experiment.load_dataset", lambda *_a, **_k: shuffled)
        train_tiny(name, tmp_path / "b", small, epochs=1)
        assert same(final_model(tmp_path / "a"), final_model(tmp_path / "b"))

    @pytest.mark.parametrize("name", UNSUPERVISED)
    def test_seeds_differ_and_are_summarised(self, name: str, small: str, tmp_path: Path) -> None:
        results = train_tiny(name, tmp_path / "runs", small, runs=2, seed=3, epochs=1)
        assert results["seeds"] == [3, 4] and results["splits"]["val"]["knn"]["accuracy"]["runs"] == 2
        a, b = (final_model(tmp_path / "runs" / f"seed-{seed}") for seed in (3, 4))
        assert not same(a, b)
        assert baseline(name).evaluate(tmp_path / "runs")["splits"] == results["splits"]

    @pytest.mark.parametrize("name", UNSUPERVISED)
    def test_selection_never_touches_the_test_set(self, name: str, small: str, tmp_path: Path) -> None:
        results = train_tiny(name, tmp_path / "run", small, selection=True, epochs=1)
        assert results["images"] == {"train": 300, "val": 100}

    def test_transductive_means_train_and_test(self, small: str) -> None:
        dataset = load_dataset(small)
        keras = baseline("vade").CONFIG.preset("keras", small)
        images = {
            (transductive, selection): len(
                baseline("vade").training_split(dataset, replace(keras, transductive=transductive, selection=selection))
            )
            for transductive in (True, False)
            for selection in (True, False)
        }
        assert images == {(True, False): 400, (True, True): 300, (False, False): 300, (False, True): 300}
        results = {"config": {"transductive": True, "selection": False}, "splits": {"test": {}}}
        assert any("test images too" in line for line in baseline("vade").remarks(results))

    @pytest.mark.parametrize("name", ["gmvae", "vade"])
    def test_bf16(self, name: str, small: str, tmp_path: Path) -> None:
        results = train_tiny(name, tmp_path / "run", small, precision="bf16")
        assert results["splits"]["test"]["knn"]["accuracy"]["mean"] > 0.4

    @pytest.mark.parametrize(
        ("name", "preset"),
        [("vae_kmeans", "matched"), ("gmvae", "paper"), ("vade", "keras")],
    )
    def test_other_presets_run(self, name: str, preset: str, small: str, tmp_path: Path) -> None:
        changes = {key: value for key, value in TINY[name].items() if key != "image_size"}
        if name == "vae_kmeans":
            changes["networks"] = "official-mnist"  # a third of the preset's
        config = baseline(name).CONFIG.preset(preset, small, epochs=1, batch_size=100, image_size=16, **changes)
        results = baseline(name).train(config, tmp_path / "run", figures=False, quiet=True, device="cpu")
        assert results["protocol"]["linear_protocol"] == "official" and results["protocol"]["knn_k"] == 10

    def test_unknown_data(self, tmp_path: Path) -> None:
        for name in CLUSTERING_BASELINES:
            with pytest.raises(DataError, match="digits"):
                train_tiny(name, tmp_path / "run", "imagenet")
        assert not (tmp_path / "run").exists()

    def test_an_unfinished_run_has_no_clusters_yet(
        self, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from protokernels.baselines import vade

        def crash(*_arguments: Any) -> None:
            raise RuntimeError("power cut")

        monkeypatch.setattr(vade, "initialize_mixture", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny("vade", tmp_path / "cut", small)
        results = baseline("vade").evaluate(tmp_path / "cut")
        assert not results["complete"] and "statistical" not in results["splits"]["test"]
        table = baseline("vade").results_table(results, {})
        assert "after epoch 2 of 4" in str(table.caption)
        assert {path.stem for path in baseline("vade").draw_figures(tmp_path / "cut")} == {"losses", "reconstructions"}


class TestCollapse:
    def test_it_is_said_three_times(self, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GMVAE whose component never learns: one cluster for everything."""
        from protokernels.baselines import gmvae

        def only_first(self: Any, images: torch.Tensor, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return images.flatten(1), torch.zeros(len(images), dtype=torch.int64)

        monkeypatch.setattr(gmvae.GMVAE, "represent", only_first)
        with pytest.warns(RuntimeWarning, match=r"gmvae has collapsed: 100\.0% of the training images"):
            results = train_tiny("gmvae", tmp_path / "run", small)
        assert results["collapsed"] is True and results["clusters"]["effective_clusters"] == 1.0
        assert "COLLAPSED to one cluster: 1 of 1 runs" in str(baseline("gmvae").results_table(results, {}).caption)
        assert results["splits"]["val"]["clustering"]["collapsed"]["mean"] == 1.0
        assert RunFolder(tmp_path / "run").metrics()[-1]["largest_cluster"] == 1.0


class TestTransfer:
    def test_weights_from_a_local_file(self, few: str, tmp_path: Path) -> None:
        torch.manual_seed(3)
        source = ResNet18(channels=3)
        torch.save({**source.state_dict(), "fc.weight": torch.zeros(10, 512)}, tmp_path / "w.pth")
        config = tiny("resnet_transfer", few, initial_weights=str(tmp_path / "w.pth"), frozen=True, epochs=1)
        results = baseline("resnet_transfer").train(config, tmp_path / "run", figures=False, quiet=True, device="cpu")
        assert results["protocol"]["initial weights"] == "ImageNet"
        trained = final_model(tmp_path / "run")
        assert torch.equal(trained["encoder.network.layer4.1.conv2.weight"], source.layer4[1].conv2.weight)
        remarks = baseline("resnet_transfer").remarks(results)
        assert remarks[0].startswith("supervised: test 0.") and not any("RANDOM" in line for line in remarks)

    def test_random_weights_are_called_so(self, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.warns(RuntimeWarning, match="random weights, which is no transfer"):
            results = baseline("resnet_transfer").train(
                tiny("resnet_transfer", few, epochs=1), figures=False, quiet=True, device="cpu"
            )
        assert results["folder"] == "runs/resnet18_random_init-few-fair"
        assert results["protocol"]["initial weights"] == "random" and results["protocol"]["labels"] == "all"
        assert "RANDOM INITIALISATION" in str(baseline("resnet_transfer").results_table(results, {}).caption)

    def test_a_missing_file_is_noticed_before_a_folder_is_made(self, few: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
            train_tiny("resnet_transfer", tmp_path / "run", few, initial_weights=str(tmp_path / "none.pth"))
        assert not (tmp_path / "run").exists()


def test_a_data_set_without_validation_data(small: str) -> None:
    """The loops ask for nothing that a data set may lack."""
    dataset: ImageDataset = replace(load_dataset(small), val=None)
    config = tiny("vade", small)
    assert len(baseline("vade").training_split(dataset, config)) == 300
    assert len(baseline("vade").training_split(dataset, replace(config, selection=True))) == 250
