# SPDX-License-Identifier: MIT
"""The baselines on a frozen ResNet18: features, linear layer, clusters; weight files; commands."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels import cli
from protokernels.baselines import RESNET18_BASELINES
from protokernels.baselines import resnet18_kmeans as kmeans
from protokernels.baselines import resnet18_transfer as transfer
from protokernels.baselines.resnet18_common import features
from protokernels.data import Split
from protokernels.embedding import embed_files
from protokernels.evaluation import GradientProtocol, linear_probe
from protokernels.models import ResNet18
from protokernels.training import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 64 + 16 + 16 small images of two kinds: bright above, bright below."""
    generator, arrays = np.random.default_rng(0), {}
    for name, count in (("train", 64), ("val", 16), ("test", 16)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 80, (count, 16, 16))
        images[labels == 0, :8] += 150
        images[labels == 1, 8:] += 150
        arrays |= {f"{name}_images": images.astype(np.uint8), f"{name}_labels": labels.astype(np.uint8)[:, None]}
    path: Path = tmp_path_factory.mktemp("data") / "halves.npz"
    np.savez(path, **arrays)
    return str(path)


def baseline(name: str) -> Any:
    return importlib.import_module(f"protokernels.baselines.{name}").BASELINE


def train(name: str, folder: Path, data: str, **changes: Any) -> dict[str, Any]:
    config = baseline(name).CONFIG.preset("fair", data, **{"image_size": 32, **changes})
    results: dict[str, Any] = baseline(name).train(config, folder, figures=True, quiet=True, device="cpu")
    return results


class TestParts:
    def test_features_are_the_pooled_map_of_three_equal_channels(self) -> None:
        torch.manual_seed(0)
        encoder = ResNet18(channels=3).eval()
        images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
        got = features(encoder, Split(images, np.zeros(3, dtype=np.int64)), 32)
        x = F.interpolate(torch.tensor(images)[:, None] / 255, (32, 32), mode="bilinear", align_corners=False)
        with torch.no_grad():
            expected = encoder(x.expand(-1, 3, -1, -1)).mean(dim=(2, 3))
        assert got.shape == (3, 512)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_transfer_is_adam_on_the_cross_entropy_of_one_layer(self) -> None:
        """From the same start, one epoch in one batch is one step of Adam: each entry moves by the learning rate against its gradient."""
        torch.manual_seed(0)
        x, labels = torch.randn(20, 6), torch.arange(20) % 3
        config = transfer.ResNet18TransferConfig(epochs=1, learning_rate=0.01, batch_size=20)
        start = linear_probe(x, labels, num_classes=3, protocol=GradientProtocol(0.0, 1, 20), seed=5)
        fitted = transfer.fit(x, labels, 3, config, seed=5)
        weight = start.weight.clone().requires_grad_()
        F.cross_entropy(F.linear(x, weight, start.bias), labels).backward()
        assert weight.grad is not None
        torch.testing.assert_close(fitted["weight"], start.weight - 0.01 * weight.grad.sign(), rtol=0, atol=1e-5)
        assert (config.epochs, transfer.ResNet18TransferConfig().epochs, config.PRESETS["paper"]) == (1, 100, {})

    def test_clusters_get_the_class_of_their_training_images(self) -> None:
        torch.manual_seed(0)
        centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
        which = torch.arange(80) % 4
        x, labels = centres[which] + 0.1 * torch.randn(80, 2), torch.tensor([0, 1, 1, 0])[which]
        fitted = kmeans.fit(x, labels, 2, kmeans.ResNet18KMeansConfig(most_clusters=8), seed=0)
        assert len(fitted["centres"]) == 4 and bool(fitted["elbow_found"]) and len(fitted["inertias"]) == 7
        prediction, clusters = kmeans.predict(fitted, centres + 0.3)
        assert prediction.tolist() == [0, 1, 1, 0] and len(clusters.unique()) == 4
        given = kmeans.fit(x, labels, 2, kmeans.ResNet18KMeansConfig(num_prototypes=2), seed=0)
        assert len(given["centres"]) == 2 and len(given["inertias"]) == 0

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("resnet18_transfer", {"epochs": 0}, "must be positive"),
            ("resnet18_transfer", {"learning_rate": float("nan")}, "must be finite"),
            ("resnet18_kmeans", {"most_clusters": 3}, "exceed least_clusters by 2"),
            ("resnet18_kmeans", {"subset": -1}, "must not be negative"),
            ("resnet18_kmeans", {"image_size": 0}, "image_size must be positive; got 0"),
        ],
    )
    def test_refusals(self, name: str, changes: dict[str, Any], message: str) -> None:
        config = baseline(name).CONFIG
        with pytest.raises(ValueError, match=message):
            config(**changes)
        with pytest.raises(ValueError, match="expected one of paper, fair; got 'best'"):
            config.preset("best")
        with pytest.raises(ValueError, match="unknown fields speed"):
            config.from_dict({"speed": 1})
        assert (config.preset("paper").image_size, config.preset("fair").image_size) == (224, 64)


class TestRuns:
    @pytest.mark.parametrize("name", RESNET18_BASELINES)
    def test_without_a_file_everything_says_random(
        self, name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        words = [
            "train",
            name.replace("_", "-"),
            "--data",
            data,
            "--image-size",
            "32",
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
        assert cli.main([*words, *(["--most-clusters", "6"] if "kmeans" in name else [])]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "random weights" in shown and "(random)" in shown and "val+test (32)" in shown
        stored = json.loads((out / "results.json").read_text())
        assert stored["weights"] == stored["protocol"]["weights"] == "random" and stored["complete"] is True
        assert set(stored["splits"]["test"]) >= {name, "majority"}
        assert stored["splits"]["test"]["majority"]["accuracy"] == 0.5
        assert stored["splits"]["test"][name]["accuracy"] > 0.9  # which half is bright shows without any training
        assert (out / "figures" / "elbow.png").exists() == ("kmeans" in name)
        assert cli.main(["evaluate", str(out)]) == 0
        assert json.loads((out / "results.json").read_text())["splits"] == stored["splits"]

    @pytest.mark.parametrize("name", RESNET18_BASELINES)
    def test_other_images_are_embedded_by_the_features_that_are_scored(
        self, name: str, data: str, tmp_path: Path
    ) -> None:
        train(name, tmp_path / "run", data, **({"num_prototypes": 4} if "kmeans" in name else {"epochs": 1}))
        images = np.load(data)["test_images"]
        np.save(tmp_path / "x.npy", images)
        clusters = tmp_path / "clusters.npy" if "kmeans" in name else None
        embed_files(tmp_path / "run", tmp_path / "x.npy", tmp_path / "z.npy", clusters)
        state = RunFolder(tmp_path / "run").checkpoint()
        encoder = ResNet18(channels=3).eval()
        encoder.load_state_dict(state["encoder"])
        expected = features(encoder, Split(images, np.zeros(len(images), dtype=np.int64)), 32)
        np.testing.assert_allclose(np.load(tmp_path / "z.npy"), expected.numpy(), rtol=1e-5, atol=1e-6)
        if clusters is not None:
            assert np.load(clusters).tolist() == kmeans.predict(state["fitted"], expected)[1].tolist()

    @pytest.mark.parametrize("name", RESNET18_BASELINES)
    def test_weights_come_from_the_file_and_name_it(self, name: str, data: str, tmp_path: Path) -> None:
        torch.manual_seed(7)
        source = ResNet18(channels=3)
        torch.save({**source.state_dict(), "fc.weight": torch.zeros(1000, 512)}, tmp_path / "weights.pth")
        changes: dict[str, Any] = {"num_prototypes": 4} if "kmeans" in name else {"epochs": 3}
        results = train(name, tmp_path / "run", data, initial_weights=str(tmp_path / "weights.pth"), **changes)
        assert results["weights"] == "weights.pth"
        state = torch.load(next((tmp_path / "run" / "checkpoints").iterdir()), weights_only=True)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in state["encoder"].items())
        again = train(name, tmp_path / "again", data, initial_weights=str(tmp_path / "weights.pth"), **changes)
        assert again["splits"] == results["splits"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"subset": 10}, "most_clusters must not exceed what is clustered; got 19 and 10 training images"),
            ({"num_prototypes": 5000}, "num_prototypes must not exceed what is clustered; got 5000 and"),
        ],
    )
    def test_too_many_clusters_are_noticed_before_a_folder_is_made(
        self, changes: dict[str, Any], message: str, data: str, tmp_path: Path
    ) -> None:
        config = kmeans.ResNet18KMeansConfig(data, image_size=32, **changes)
        with pytest.raises(ValueError, match=message):
            kmeans.BASELINE.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_missing_file_is_noticed_before_a_folder_is_made(self, data: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            train("resnet18_transfer", tmp_path / "run", data, initial_weights=str(tmp_path / "none.pth"))
        assert not (tmp_path / "run").exists()
