# SPDX-License-Identifier: MIT
"""VAESim: networks, loss, prototype semantics, presets, and whole runs on the embedded digits."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

pytest.importorskip("accelerate", reason="VAESim needs the extra protokernels[train]")

from protokernels.data import DataError, ImageDataset, Split, load_dataset
from protokernels.models import NETWORKS, build_networks
from protokernels.papers import vaesim
from protokernels.papers.vaesim import VAESim, VAESimConfig
from protokernels.training import RunFolder, RunFolderError, derived_generator, epoch_order
from protokernels.training.scoring import evaluation_splits

TINY = VAESimConfig.preset(
    "fair", data="digits", epochs=2, batch_size=200, num_prototypes=12, latent_dim=8, image_size=16
)


def parameters(name: str, **sizes: int) -> int:
    sizes = {"channels": 1, "image_size": 32, "latent_dim": 32, "condition_dim": 40} | sizes
    return sum(p.numel() for network in build_networks(name, **sizes) for p in network.parameters())  # type: ignore[arg-type]


class TestNetworks:
    def test_released_sizes(self) -> None:
        assert parameters("official-mnist") == 1_983_169
        assert parameters("official-pneumonia") == 4_814_161

    def test_released_encoders_are_affine_and_the_papers_is_not(self) -> None:
        torch.manual_seed(0)
        x, y = torch.rand(2, 4, 1, 32, 32, dtype=torch.float64)
        for name, affine in (("official-mnist", True), ("official-pneumonia", True), ("paper", False)):
            encoder, _ = build_networks(name, channels=1, image_size=32, latent_dim=8, condition_dim=5)  # type: ignore[arg-type]
            encoder.double().eval()
            middle = encoder((x + y) / 2)[0]
            assert torch.allclose(middle, (encoder(x)[0] + encoder(y)[0]) / 2, atol=1e-9) == affine, name

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (3, 40), (1, 64)])
    def test_shapes(self, name: Any, channels: int, size: int) -> None:
        encoder, decoder = build_networks(name, channels=channels, image_size=size, latent_dim=6, condition_dim=5)
        mean, log_variance = encoder(torch.rand(2, channels, size, size))
        assert mean.shape == log_variance.shape == (2, 6)
        images = decoder(mean, torch.softmax(torch.randn(2, 5), dim=1))
        assert images.shape == (2, channels, size, size) and images.min() >= 0 and images.max() <= 1

    def test_condition_reaches_the_image(self) -> None:
        for name in NETWORKS:
            _, decoder = build_networks(name, channels=1, image_size=32, latent_dim=6, condition_dim=5)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"a condition \[B, 5\] is needed; got none"):
                decoder(torch.zeros(2, 6))
            decoder.eval()
            first, second = decoder(torch.zeros(2, 6), torch.eye(5)[:2])
            assert not torch.equal(first, second), name

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"channels": 2}, "grey"), ({"image_size": 28}, "multiple of 8"), ({"image_size": 4}, "multiple of 8")],
    )
    def test_refusals(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parameters("paper", **changes)
        with pytest.raises(ValueError, match="expected one of paper"):
            parameters("resnet")


class TestLoss:
    def test_kl_against_torch_distributions(self) -> None:
        torch.manual_seed(0)
        mean, log_variance = torch.randn(2, 7, 5, dtype=torch.float64)
        for prior_std in (1.0, 0.8):
            prior = Normal(torch.zeros(5, dtype=torch.float64), prior_std)
            expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), prior).sum(dim=1)
            torch.testing.assert_close(vaesim.kl_divergence(mean, log_variance, prior_std), expected)

    def test_released_weights_are_the_same_loss_in_other_units(self) -> None:
        """Mean squared error + 0.005 * mean KL, times the number of pixels, is Eq. 2 with beta = 0.16."""
        torch.manual_seed(0)
        config = VAESimConfig.preset("official", "mnist", ortho_weight=0.0)
        model = VAESim(config, channels=1)
        x = torch.rand(50, 1, 32, 32)
        output = model(x, torch.randn(50, 32))
        ours = vaesim.vaesim_loss(x, output, model.prototypes.prototypes, config)["loss"]
        kl = vaesim.kl_divergence(output.mean, output.log_variance, 0.8) / 32
        released = (x - output.reconstruction).square().mean() + 0.005 * kl.mean()
        torch.testing.assert_close(ours, 1024 * released)

    def test_orthogonality(self) -> None:
        assert vaesim.orthogonality(3 * torch.eye(4, 6)) == pytest.approx(0, abs=1e-10)
        assert vaesim.orthogonality(torch.ones(3, 6)) == pytest.approx(6)  # six off-diagonal ones

    def test_orthogonality_has_no_gradient_but_its_step_acts(self) -> None:
        config = replace(TINY, ortho_weight=1.0)
        model = VAESim(config, channels=1)
        x = torch.rand(40, 1, 16, 16)
        losses = vaesim.vaesim_loss(x, model(x, torch.randn(40, 8)), model.prototypes.prototypes, config)
        assert losses["orthogonality"] > 0 and not losses["orthogonality"].requires_grad
        before = vaesim.orthogonality(model.prototypes.prototypes)
        vaesim.orthogonality_step(model.prototypes, 1e-3)
        assert vaesim.orthogonality(model.prototypes.prototypes) < before


class TestModel:
    def test_algorithms_1_and_2(self) -> None:
        """Eq. 1 with the old Q; then Q_k <- eta mean + (1 - eta) Q_k for clusters with members, from this batch's z."""
        torch.manual_seed(0)
        config = replace(TINY, new_weight=0.95)
        model = VAESim(config, channels=1)
        x, noise = torch.rand(60, 1, 16, 16), torch.randn(60, 8)
        model(x, noise)
        model.prototypes.prototypes[5] = model.prototypes.prototypes[2]  # ties go to the lower index, so 5 stays empty
        Q = model.prototypes.prototypes.clone()
        model.prototypes.progress = 0.25
        tau = 1 + (0.01 - 1) * 0.5  # halfway down at a quarter of the training
        mean, log_variance = model.encode(x)
        output = model(x, noise)
        torch.testing.assert_close(output.z, mean + (log_variance / 2).exp() * noise, rtol=1e-5, atol=1e-5)
        unit = torch.nn.functional.normalize
        expected_c = torch.softmax(unit(output.z, dim=1) @ unit(Q, dim=1).T / tau, dim=1)
        torch.testing.assert_close(output.assignment, expected_c, rtol=1e-4, atol=1e-6)
        expected = Q.clone()
        labels = expected_c.argmax(dim=1)
        for k in labels.unique():
            expected[k] = 0.95 * output.z[labels == k].mean(dim=0) + 0.05 * Q[k]
        torch.testing.assert_close(model.prototypes.prototypes, expected.detach(), rtol=1e-4, atol=1e-5)
        assert 5 not in labels and torch.equal(model.prototypes.prototypes[5], Q[5])

    def test_prototypes_start_as_distinct_samples_of_the_first_batch(self) -> None:
        model = VAESim(replace(TINY, new_weight=0.0), channels=1)
        z = model(torch.rand(50, 1, 16, 16), torch.randn(50, 8)).z
        rows = [(z == q).all(dim=1).nonzero().item() for q in model.prototypes.prototypes]
        assert len(set(rows)) == 12

    def test_gradient_flows_through_the_assignment(self) -> None:
        model = VAESim(TINY, channels=1)
        output = model(torch.rand(40, 1, 16, 16), torch.randn(40, 8))
        (gradient,) = torch.autograd.grad(output.assignment[:, 0].sum(), output.mean)
        assert gradient.abs().sum() > 0

    def test_evaluation_changes_nothing(self) -> None:
        model = VAESim(TINY, channels=1)
        model(torch.rand(40, 1, 16, 16), torch.randn(40, 8))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
        split = Split(images, np.zeros(30, dtype=np.int64))
        first = vaesim.represent(model, split, TINY, name="test", seed=0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(first.embeddings, vaesim.represent(model, split, TINY, name="test", seed=0).embeddings)
        sampled = vaesim.represent(model, split, replace(TINY, embedding="sample"), name="test", seed=0)
        assert not torch.equal(first.embeddings, sampled.embeddings)

    def test_schedules(self) -> None:
        first, second = (vaesim.temperature_schedule(name) for name in ("algorithm-1", "section-3.2"))
        assert callable(first) and callable(second)
        assert [first(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.505, 0.01, 0.01])
        assert [second(p) for p in (0, 0.24, 0.25, 0.5, 0.75, 1)] == pytest.approx([5, 5, 1, 0.525, 0.05, 0.05])
        assert vaesim.temperature_schedule("constant") == 1.0


class TestConfig:
    def test_presets(self) -> None:
        official = VAESimConfig.preset("official", "pneumoniamnist")
        assert (official.networks, official.similarity, official.prior_std) == ("official-pneumonia", "dot", 0.8)
        assert (official.epochs, official.batch_size, official.knn_k, official.embedding) == (60, 2000, 10, "sample")
        assert (official.learning_rate, official.schedule, official.new_weight) == (1e-4, "step", 0.95)
        assert VAESimConfig.preset("official", "mnist").knn_k == 5
        paper = VAESimConfig.preset("paper", "mnist")
        assert (paper.networks, paper.similarity, paper.temperature) == ("paper", "cosine", "algorithm-1")
        assert (paper.prior_std, paper.linear_protocol, paper.epochs) == (1.0, "paper", 20)
        assert VAESimConfig.preset("fair", "bloodmnist", epochs=3).epochs == 3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_prototypes": 300, "batch_size": 200}, "batch_size must be at least num_prototypes"),
            ({"prior_std": 0.0}, "prior_std must be positive"),
            ({"beta": -1.0}, "beta must not be negative"),
            ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
        with pytest.raises(ValueError, match="paper, official, fair"):
            VAESimConfig.preset("best")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="unknown fields speed"):
            VAESimConfig.from_dict({"speed": 1})


class TestSplits:
    def dataset(self, val: bool) -> ImageDataset:
        def split(start: int, count: int) -> Split:
            images = np.arange(start, start + count, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), dtype=np.uint8)
            return Split(images, np.arange(count, dtype=np.int64) % 2)

        return ImageDataset("made", split(0, 12), split(12, 4) if val else None, split(16, 6), ("a", "b"))

    def test_sets_by_name(self) -> None:
        train, tests = evaluation_splits(self.dataset(val=True))
        assert {name: split.images[:, 0, 0].tolist() for name, split in tests.items()} == {
            "test": list(range(16, 22)),
            "val": list(range(12, 16)),
            "val+test": list(range(12, 22)),
        }
        assert len(train) == 12
        assert list(evaluation_splits(self.dataset(val=False))[1]) == ["test"]

    @pytest.mark.parametrize("val", [True, False])
    def test_selection_never_touches_the_test_set(self, val: bool) -> None:
        train, tests = evaluation_splits(self.dataset(val), selection=True)
        assert list(tests) == (["val"] if val else ["held-out"])
        scored = next(iter(tests.values())).images[:, 0, 0]
        assert max(scored) < 16 and not set(scored) & set(train.images[:, 0, 0])


def train_tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    keywords = {key: changes.pop(key) for key in ("seed", "runs", "resume", "precision") if key in changes}
    results: dict[str, Any] = vaesim.train(
        replace(TINY, **changes), folder, figures=False, quiet=True, device="cpu", **keywords
    )
    return results


def final_model(folder: Path) -> dict[str, torch.Tensor]:
    state = RunFolder(folder).checkpoints.load()
    assert state is not None
    return dict(state["model"])


class TestRuns:
    def test_from_python(self, tmp_path: Path) -> None:
        results = train_tiny(tmp_path / "run")
        run = RunFolder.open(tmp_path / "run")
        assert run.config()["config"]["num_prototypes"] == 12 and run.config()["seed"] == 0
        assert [line["epoch"] for line in run.metrics()] == [1, 2]
        assert run.metrics()[1]["reconstruction"] < run.metrics()[0]["reconstruction"]
        assert run.environment()["data"]["source"]
        knn = results["splits"]["test"]["knn"]["accuracy"]
        assert knn["mean"] > 0.5 > results["splits"]["test"]["majority"]["accuracy"]["mean"] and knn["std"] is None
        stored = json.loads((tmp_path / "run" / "results.json").read_text())
        assert stored["splits"]["test"]["knn"]["accuracy"] == knn["mean"]
        assert set(stored["splits"]) == {"test", "val", "val+test"}
        assert stored["protocol"] == {"embedding": "mean", "knn_k": 5, "linear_protocol": "fair"}

    def test_same_seed_same_bits_other_seed_other_bits(self, tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            train_tiny(tmp_path / name, seed=seed, epochs=1)
        a, b, c = (final_model(tmp_path / name) for name in "abc")
        assert all(torch.equal(value, b[name]) for name, value in a.items())
        assert not torch.equal(a["prototypes.prototypes"], c["prototypes.prototypes"])

    def test_labels_do_not_reach_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train_tiny(tmp_path / "a", epochs=1)
        digits = load_dataset("digits")
        shuffled = Split(digits.train.images, np.roll(digits.train.labels, 7))
        changed = replace(digits, train=shuffled)
        monkeypatch.setattr("protokernels.training.experiment.load_dataset", lambda *_args, **_keywords: changed)
        train_tiny(tmp_path / "b", epochs=1)
        a, b = final_model(tmp_path / "a"), final_model(tmp_path / "b")
        assert all(torch.equal(value, b[name]) for name, value in a.items())

    def test_resume_to_the_bit_from_an_earlier_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stops in the middle of an epoch by an error, as a crash would; sampled labels need the generators right."""
        expected = train_tiny(tmp_path / "whole", sample_labels=True, epochs=3)
        loss, calls = vaesim.vaesim_loss, 0

        def crash(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 10:
                raise RuntimeError("power cut")
            return loss(*arguments)

        monkeypatch.setattr(vaesim, "vaesim_loss", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(tmp_path / "cut", sample_labels=True, epochs=3)
        monkeypatch.setattr(vaesim, "vaesim_loss", loss)
        with pytest.raises(RunFolderError, match="--resume"):
            train_tiny(tmp_path / "cut", sample_labels=True, epochs=3)
        with pytest.raises(RunFolderError, match="another configuration"):
            train_tiny(tmp_path / "cut", sample_labels=True, epochs=4, resume=True)
        resumed = train_tiny(tmp_path / "cut", sample_labels=True, epochs=3, resume=True)
        a, b = final_model(tmp_path / "whole"), final_model(tmp_path / "cut")
        assert all(torch.equal(value, b[name]) for name, value in a.items())
        assert resumed["splits"] == expected["splits"]

    def test_several_runs_have_mean_deviation_and_number(self, tmp_path: Path) -> None:
        results = train_tiny(tmp_path / "runs", runs=2, seed=3, epochs=1)
        each = [RunFolder(tmp_path / "runs" / f"seed-{seed}").results() for seed in (3, 4)]
        values = [run["splits"]["test"]["knn"]["accuracy"] for run in each if run is not None]
        summary = results["splits"]["test"]["knn"]["accuracy"]
        assert results["seeds"] == [3, 4] and summary["runs"] == results["number_of_runs"] == 2
        assert summary["mean"] == pytest.approx(np.mean(values))
        assert summary["std"] == pytest.approx(np.std(values, ddof=1))
        assert vaesim.evaluate(tmp_path / "runs")["splits"] == results["splits"]

    def test_bf16_learns_too(self, tmp_path: Path) -> None:
        full, half = (
            train_tiny(tmp_path / precision, precision=precision, epochs=1)["splits"]["test"]["knn"]["accuracy"]["mean"]
            for precision in ("fp32", "bf16")
        )
        assert abs(full - half) < 0.1

    @pytest.mark.parametrize("preset", ["paper", "official"])
    def test_other_presets_run(self, tmp_path: Path, preset: Any) -> None:
        config = VAESimConfig.preset(preset, "digits", epochs=1, batch_size=400, image_size=16)
        results = vaesim.train(config, tmp_path / "run", figures=False, quiet=True, device="cpu")
        assert results["splits"]["test"]["linear"]["accuracy"]["mean"] > 0.1
        assert results["protocol"]["linear_protocol"] == preset

    def test_colour_images_of_another_size(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        arrays = {
            f"{name}_images": generator.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
            for name, count in (("train", 60), ("val", 10), ("test", 10))
        }
        arrays |= {
            name.replace("images", "labels"): (np.arange(len(images)) % 3).astype(np.uint8)[:, None]
            for name, images in arrays.items()
        }
        np.savez(tmp_path / "colour.npz", **arrays)
        config = replace(TINY, data=str(tmp_path / "colour.npz"), image_size=40, batch_size=30, epochs=1)
        results = vaesim.train(config, tmp_path / "run", figures=True, quiet=True, device="cpu")
        assert results["images"] == {"train": 60, "test": 10, "val": 10, "val+test": 20}
        assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 7

    def test_unknown_data_names_what_is_known(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="digits"):
            train_tiny(tmp_path / "run", data="imagenet")
        assert not (tmp_path / "run").exists()

    def test_order_and_noise_are_those_of_the_seed(self) -> None:
        """The run is a function of the seed that this library must not change by accident: the first numbers are pinned."""
        assert epoch_order(1000, 0, 0)[:5].tolist() == PINNED_ORDER
        noise = torch.randn(3, generator=derived_generator(0, "noise", 0, 0))
        torch.testing.assert_close(noise, torch.tensor(PINNED_NOISE), rtol=0, atol=1e-4)


PINNED_ORDER = [480, 911, 492, 868, 125]
PINNED_NOISE = [-1.42122, -0.58948, -2.29457]


@pytest.mark.skipif("PROTOKERNELS_DATA" not in os.environ, reason="PROTOKERNELS_DATA does not point at real data")
class TestRealData:
    def test_pneumonia_beats_the_papers_neighbours_after_one_epoch(self, tmp_path: Path) -> None:
        config = VAESimConfig.preset("fair", "pneumoniamnist", epochs=1)
        results = vaesim.train(config, tmp_path / "run", figures=False, quiet=True, device="cpu")
        split, paper = vaesim.PAPER_RESULTS["pneumoniamnist"]
        assert results["images"] == {"train": 4708, "test": 624, "val": 524, "val+test": 1148}
        assert results["splits"][split]["knn"]["accuracy"]["mean"] > paper["knn"][0]
        majority = results["splits"]["test"]["majority"]["accuracy"]["mean"]
        assert majority == pytest.approx(390 / 624)
