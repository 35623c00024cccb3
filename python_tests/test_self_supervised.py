# SPDX-License-Identifier: MIT
"""The loop of all two-view methods, its settings and optimisers, on a small method."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.baselines import barlow_twins, byol, densecl, simclr, swav, vicreg
from protokernels.data import ImageDataset, load_dataset
from protokernels.models import pooled
from protokernels.nn import ViewStrength
from protokernels.papers import optiml
from protokernels.training import Interrupted, RunFolder, Session
from protokernels.training.optimizers import LARS, make_optimizer, warmup_cosine
from protokernels.training.self_supervised import (
    Method,
    PretrainingConfig,
    SelfSupervised,
    frozen_copy,
    load_method,
    move_towards,
)
from protokernels.training.views import two_views

METHODS = (
    *(barlow_twins.BarlowTwinsConfig, byol.BYOLConfig, densecl.DenseCLConfig, optiml.OPTiMLConfig),
    *(simclr.SimCLRConfig, swav.SwAVConfig, vicreg.VICRegConfig),
)


@dataclass(frozen=True)
class ToyConfig(PretrainingConfig):
    momentum: float = 0.9
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"momentum": 0.5}}


class Toy(Method):
    """Two views near each other and near a teacher's view of the first."""

    def __init__(self, config: ToyConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.teacher = frozen_copy(self.encoder, lambda: config.make_encoder(channels))
        self.momentum = config.momentum

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        one, two = pooled(self.encoder(first)), pooled(self.encoder(second))
        with torch.no_grad():
            target = pooled(self.teacher(first))
        near, taught = (one - two).square().mean(), (two - target).square().mean()
        return {"loss": near + taught, "near": near, "taught": taught}

    def after_step(self, progress: float) -> None:
        assert 0 <= progress < 1
        move_towards(self.teacher, self.encoder, self.momentum)


TINY = ToyConfig.preset("fair", epochs=2, width=2, image_size=8, batch_size=500)


class ToyExperiment(SelfSupervised[ToyConfig]):
    def score_model(self, model: Method, dataset: ImageDataset, config: ToyConfig, seed: int) -> dict[str, Any]:
        total = sum(float(p.detach().double().sum()) for p in model.encoder.parameters())
        return {"splits": {"test": {"sum": total, "seed": seed}}, "images": {"test": len(dataset.test)}, "protocol": {}}


EXPERIMENT = ToyExperiment("toy", ToyConfig, Toy)


def run(out: Path, config: ToyConfig = TINY, **more: Any) -> dict[str, Any]:
    return EXPERIMENT.train(config, out, figures=False, quiet=True, device="cpu", **more)


def state_of(folder: Path) -> dict[str, Tensor]:
    state = RunFolder.open(folder).checkpoints.load()
    assert state is not None
    return state["model"]


class TestConfig:
    def test_presets(self) -> None:
        paper, fair = (ToyConfig.preset(name, "chest_nih") for name in ("paper", "fair"))  # type: ignore[arg-type]
        assert (paper.image_size, paper.width, paper.optimizer, paper.momentum) == (224, 64, "lars", 0.5)
        assert (fair.image_size, fair.width, fair.last_stride, fair.momentum) == (112, 16, 1, 0.9)
        assert ToyConfig.preset("paper", "chest_nih", epochs=7).epochs == 7
        assert paper.views().size == (224, 224) and [s.crop_scale for s in paper.views().strengths] == [(0.08, 1.0)] * 2
        assert ToyConfig.from_dict({**TINY.__dict__}) == TINY

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"learning_rate": math.nan}, "learning_rate must be finite"),
            ({"weight_decay": -1.0}, "weight_decay"),
            ({"warmup_epochs": 3}, "between 0 and epochs; got 3 of 2"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)

    def test_one_image_is_no_contrast(self) -> None:
        with pytest.raises(ValueError, match=r"SimCLRConfig: batch_size must be at least 2, .*; got 1"):
            simclr.SimCLRConfig(batch_size=1)

    @pytest.mark.parametrize("config", METHODS, ids=lambda config: config.__name__)
    def test_what_a_method_needs_is_positive(self, config: type[PretrainingConfig]) -> None:
        own = {field.name for field in fields(config)} - {field.name for field in fields(PretrainingConfig)}
        sizes = {name for name in own if name.endswith("_dim") or name.startswith("num_")} | own & {
            "temperature",
            "epsilon",
        }
        assert sizes == set(config.POSITIVE)
        for name in config.POSITIVE:
            with pytest.raises(ValueError, match=f"{config.__name__}: {name} must be positive"):
                config(**{name: 0})

    def test_names(self) -> None:
        with pytest.raises(ValueError, match="expected one of paper, fair; got 'best'"):
            ToyConfig.preset("best")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="unknown fields speed"):
            ToyConfig.from_dict({"speed": 1})


class TestViews:
    def test_strengths(self) -> None:
        """SimCLR's on grey images; blur and solarisation differ between the views. What published results were trained with."""
        first, second = PretrainingConfig(image_size=112, crop_scale=0.3).views().strengths
        shared = ViewStrength(
            crop=1.0, crop_scale=(0.3, 1.0), crop_ratio=(3 / 4, 4 / 3), hflip=0.5, vflip=0.0, rotate=0.0, jitter=0.8, brightness=0.4,
            contrast=0.4, offset=0.0, gamma=0.0, blur_sigma=(0.05, 1.0), noise=0.0,
        )  # fmt: skip
        assert first == replace(shared, blur=1.0, solarise=0.0) and second == replace(shared, blur=0.1, solarise=0.2)

    def test_options(self) -> None:
        config = PretrainingConfig()
        assert [s.blur for s in replace(config, blur=False).views().strengths] == [0.0, 0.0]
        assert [s.solarise for s in replace(config, solarise=False).views().strengths] == [0.0, 0.0]

    def test_a_record_without_the_maker_is_of_an_earlier_version_and_is_not_continued(self, tmp_path: Path) -> None:
        record = {name: value for name, value in TINY.__dict__.items() if name != "view_maker"}
        earlier = ToyConfig.from_dict(record)
        assert earlier.view_maker == "matrices" and earlier != TINY
        with pytest.raises(ValueError, match="views by matrices are those of an earlier version"):
            run(tmp_path / "earlier", earlier)

    def test_an_image_has_the_same_views_in_any_number_of_processes(self) -> None:
        images, views = torch.randint(256, (9, 1, 12, 12), dtype=torch.uint8), PretrainingConfig(image_size=8).views()
        indices = torch.tensor([4, 0, 7, 2, 5])

        def made(rank: int, processes: int) -> tuple[Tensor, Tensor]:
            step = SimpleNamespace(indices=indices[rank::processes], batch=5, rank=rank, processes=processes)
            session = SimpleNamespace(shared_generator=lambda step, purpose: torch.Generator().manual_seed(3))
            return two_views(views, images, step, session)  # type: ignore[arg-type]

        whole = made(0, 1)
        for rank in (0, 1):
            for all_of_them, part in zip(whole, made(rank, 2), strict=True):
                assert torch.equal(all_of_them[rank::2], part)
        assert not torch.equal(*whole)


class TestOptimizers:
    def test_lars_by_hand(self) -> None:
        weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
        optimizer = LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1, eta=0.01)
        velocity, plain = torch.zeros(1, 2), torch.zeros(1)
        for _ in range(2):
            before, old_bias = weight.detach().clone(), bias.detach().clone()
            weight.grad, bias.grad = torch.tensor([[0.3, -0.4]]), torch.tensor([2.0])
            gradient = weight.grad + 0.1 * before
            scaled = 0.01 * before.norm() / gradient.norm() * gradient
            velocity, plain = 0.9 * velocity + scaled, 0.9 * plain + 2.0
            optimizer.step()
            torch.testing.assert_close(weight.detach(), before - 0.5 * velocity)
            torch.testing.assert_close(bias.detach(), old_bias - 0.5 * plain)

    def test_lars_at_zero(self) -> None:
        weight = nn.Parameter(torch.zeros(2, 2))
        optimizer = LARS([weight], lr=0.5)
        weight.grad = torch.zeros(2, 2)
        optimizer.step()
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))  # no scaling where there is no length

    @pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
    def test_decay_spares_vectors_and_frozen_parameters_stay_out(self, name: Any) -> None:
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        optimizer = make_optimizer(module, name, learning_rate=0.1, weight_decay=0.5)
        decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays == {(2, 2): 0.5, (2,): 0.0}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="adamw, sgd, lars"):
            make_optimizer(nn.Linear(1, 1), "adam", learning_rate=1, weight_decay=0)  # type: ignore[arg-type]

    def test_schedule(self) -> None:
        factor = warmup_cosine(12, 2, end=0.0)
        assert [factor(epoch) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1, 1, 0.5, 0])
        assert warmup_cosine(1, 1)(0) == 1 and warmup_cosine(1, 0)(0) == 1


class TestLoop:
    def test_a_run_leaves_metrics_and_results(self, tmp_path: Path) -> None:
        results = run(tmp_path / "run", runs=2)
        assert results["number_of_runs"] == 2 and results["complete"]
        assert results["splits"]["test"]["seed"] == {"mean": 0.5, "std": pytest.approx(0.5**0.5), "runs": 2}
        lines = RunFolder.open(tmp_path / "run" / "seed-0").metrics()
        assert len(lines) == 2 and {"loss", "near", "taught"} <= lines[0].keys()
        assert lines[0]["loss"] == pytest.approx(lines[0]["near"] + lines[0]["taught"])

    def test_the_last_smaller_batch_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []
        forward = Toy.forward

        def watched(self: Toy, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            sizes.append(len(first))
            return forward(self, first, second)

        monkeypatch.setattr(Toy, "forward", watched)
        run(tmp_path / "run", replace(TINY, epochs=1, warmup_epochs=0))  # 1,259 images
        assert sizes == [500, 500]

    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(tmp_path / "whole")
        record, calls = Session.record, []

        def interrupting(self: Session, step: Any, **values: Any) -> None:
            record(self, step, **values)
            calls.append(step)
            if len(calls) == 3:  # within the second epoch
                self._signal = 2

        monkeypatch.setattr(Session, "record", interrupting)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts")
        monkeypatch.undo()
        run(tmp_path / "parts", resume=True)
        whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())

    def test_methods_start_from_the_same_encoder_and_the_teacher_follows(self, tmp_path: Path) -> None:
        run(tmp_path / "a", replace(TINY, momentum=0.0))
        run(tmp_path / "b", replace(TINY, momentum=1.0))
        follows, stays = state_of(tmp_path / "a"), state_of(tmp_path / "b")
        torch.testing.assert_close(follows["teacher.conv1.weight"], follows["encoder.conv1.weight"])
        assert not torch.equal(stays["teacher.conv1.weight"], stays["encoder.conv1.weight"])
        torch.manual_seed(0)
        assert torch.equal(stays["teacher.conv1.weight"], TINY.make_encoder(1).conv1.weight)

    @pytest.mark.usefixtures("few_digits")
    @pytest.mark.filterwarnings("ignore:batch_size is 500:RuntimeWarning")
    def test_a_batch_of_more_images_than_there_are_is_kept_with_the_results(self, tmp_path: Path) -> None:
        found = [run(tmp_path / str(size), replace(TINY, epochs=2, batch_size=size)) for size in (500, 300)]
        assert found[0]["data_warnings"] == [
            "batch_size is 500, but there are 315 training images: every step takes them all, as with batch_size 315"
        ]
        assert found[1]["data_warnings"] == []

    def test_evaluation_again_gives_the_same(self, tmp_path: Path) -> None:
        results = run(tmp_path / "run")
        again = EXPERIMENT.evaluate(tmp_path / "run")
        assert again["splits"] == results["splits"]
        method = load_method(RunFolder.open(tmp_path / "run"), Toy(TINY, 1))
        assert not method.training and not method.teacher.conv1.weight.requires_grad  # type: ignore[union-attr]

    def test_a_missing_weight_file_is_noticed_first(self, tmp_path: Path) -> None:
        config = replace(TINY, width=64, stem="imagenet", initial_weights=str(tmp_path / "none.pth"))
        with pytest.raises(FileNotFoundError, match=r"none\.pth"):
            run(tmp_path / "run", config)
        assert not (tmp_path / "run").exists()

    def test_the_weight_file_is_needed_at_the_start_only(self, tmp_path: Path) -> None:
        config = replace(TINY, width=64, stem="imagenet")
        method, folder = Toy(config, 1), RunFolder.create(tmp_path / "run", {"config": {}})
        folder.checkpoints.save({"model": method.state_dict()}, epoch=0)
        gone = replace(config, initial_weights=str(tmp_path / "gone.pth"))
        loaded = EXPERIMENT.load_model(folder, gone, load_dataset("digits"))
        assert torch.equal(loaded.encoder.conv1.weight, method.encoder.conv1.weight)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "run", {"config": {}})
        with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
            load_method(folder, Toy(TINY, 1))
