# SPDX-License-Identifier: MIT
"""The configuration of Hu et al. 2021 and the runs that cannot be loaded: presets, schedules, stages, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="local contrast needs the extra protokernels[train]")

from protokernels.models import UNet
from protokernels.papers._local_contrast_report import ablation_tables
from protokernels.papers._local_contrast_segmenter import Segmenter, load_segmenter, new_segmenter
from protokernels.papers.local_contrast import (
    ABLATIONS,
    METHODS,
    PAPER_RESULTS,
    GlobalContrast,
    LocalContrastConfig,
)
from protokernels.training import RunFolder
from protokernels.training.checkpoints import CheckpointError, CheckpointStore

TINY = LocalContrastConfig.preset("fair", width=3, depth=2, image_size=16)
STAGES = ("global", "local", "fine_tune")
WRONG_SCALES = ((1.9, 0.5), (0.0, 1.0), (-1.0, 2.0), (0.5, 0.9))


class TestConfig:
    def test_presets(self) -> None:
        paper, official, fair = (LocalContrastConfig.preset(p, "hippocampus") for p in ("paper", "official", "fair"))  # type: ignore[arg-type]
        assert (paper.width, paper.depth, paper.image_size) == (64, 3, 64)
        assert (paper.global_epochs, paper.local_epochs, paper.fine_tune_epochs) == (70, 70, 120)
        assert (paper.global_learning_rate, paper.local_learning_rate, paper.fine_tune_learning_rate) == (
            1e-4,
            1e-4,
            1e-5,
        )
        assert (paper.form, paper.reduction, paper.keep, paper.split) == ("paper", "image", "last", "paper")
        assert (official.width, official.depth, official.split, official.keep) == (64, 4, "official", "last")
        assert (official.global_epochs, official.local_epochs, official.fine_tune_epochs) == (100, 60, 120)
        assert (official.global_learning_rate, official.local_weight_decay, official.fine_tune_learning_rate) == (
            3e-4,
            1e-4,
            5e-4,
        )
        assert official.transductive and official.identical_views and not official.train_global_head
        assert (fair.width, fair.image_size, fair.keep, fair.form) == (16, 64, "best", "supcon")
        assert not fair.transductive and not fair.identical_views and fair.train_global_head
        assert (fair.validation_volumes, fair.tcsm_noise, fair.tcsm_momentum) == (12, 0.1, 0.99)
        assert (paper.validation_volumes, paper.tcsm_noise, paper.tcsm_momentum) == (0, 0.5, 0.999)
        for config in (paper, official, fair):
            assert (config.temperature, config.block_size, config.stride, config.method) == (
                0.1,
                16,
                4,
                "global+local-block",
            )
        assert LocalContrastConfig.preset("paper", "mmwhs").image_size == 160

    def test_the_global_head(self) -> None:
        """A multi-layer perceptron in the text, linear in the released code and in all that ``fair`` has trained."""
        for preset, kind in (("paper", "mlp"), ("official", "linear"), ("fair", "linear")):
            config = replace(LocalContrastConfig.preset(preset), width=2)  # type: ignore[arg-type]
            head = GlobalContrast(UNet(width=2, depth=config.depth).encoder, config).head
            assert config.global_head == kind and any(isinstance(layer, nn.ReLU) for layer in head) == (kind == "mlp")
        record = TINY.record()
        assert record.pop("global_head") == "linear"
        assert LocalContrastConfig.from_dict(record) == TINY  # of a run that is older than the field
        assert "global_head" not in TINY.stage_record("global")  # nor do its stages have another name now

    def test_the_number_of_epochs_follows_the_steps(self) -> None:
        stage = replace(TINY, fine_tune_steps=100, fine_tune_batch_size=8).stage("fine_tune")
        plans = [stage.plan(count, 0, "fine_tune") for count in (5, 80, 85)]
        assert [(plan.epochs, plan.batch_size) for plan in plans] == [(100, 5), (10, 8), (10, 8)]
        assert replace(TINY, fine_tune_steps=0, fine_tune_epochs=7).stage("fine_tune").plan(80, 0, "").epochs == 7

    def test_learning_rates(self) -> None:
        module = nn.Linear(1, 1)

        def rates(config: LocalContrastConfig, stage: Any, epochs: int) -> list[float]:
            settings = config.stage(stage)
            factor = settings.scheduler(settings.optimizer(module), epochs).lr_lambdas[0]
            return [factor(epoch) for epoch in range(epochs)]

        official = LocalContrastConfig.preset("official")
        flat = rates(official, "global", 30)
        assert (
            flat[:11] == [1.0] * 11 and flat[20] == pytest.approx(0.5, abs=1e-3) and flat == sorted(flat, reverse=True)
        )
        assert rates(official, "fine_tune", 5) == [1.0] * 5
        assert rates(TINY, "fine_tune", 5)[-1] < 0.15

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "magic"}, "method must be one of random, global"),
            ({"labelled": 0.0}, r"labelled must lie in \(0, 1\]"),
            ({"labelled": 5.0}, r"labelled must lie in \(0, 1\]"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"local_batch_size": 0}, "local_batch_size must be positive"),
            ({"global_batch_size": 1}, "global_batch_size must be at least 2, .*; got 1"),
            ({"fine_tune_learning_rate": math.nan}, "fine_tune_learning_rate must be finite"),
            ({"image_size": 30}, r"multiple of 2\*\*depth = 4"),
            ({"keep": "first"}, "keep must be one of best, last"),
            ({"global_head": "cls"}, "global_head must be one of linear, mlp"),
            # Later stages would refuse these after hours, or take them without a word.
            *(({f"{stage}_steps": -1}, f"{stage}_steps must not be negative") for stage in STAGES),
            *(({f"{stage}_weight_decay": -1.0}, f"{stage}_weight_decay must not be negative") for stage in STAGES),
            ({"global_flat_epochs": -1}, "global_flat_epochs must not be negative"),
            ({"validation_volumes": -1}, "validation_volumes must not be negative"),
            ({"tcsm_weight": -1.0}, "tcsm_weight must not be negative"),
            ({"tcsm_noise": -1.0}, "tcsm_noise must not be negative"),
            ({"tcsm_momentum": 3.0}, r"tcsm_momentum must lie in \[0, 1\]; got 3"),
            *(({"augment_scale": scale}, r"augment_scale must be \(low, high\)") for scale in WRONG_SCALES),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)

    def test_a_record_that_comes_back(self) -> None:
        config = replace(TINY, stages="somewhere")
        assert "stages" not in config.record()
        assert LocalContrastConfig.from_dict(config.record()) == TINY
        with pytest.raises(ValueError, match="unknown fields magic"):
            LocalContrastConfig.from_dict({"magic": 1})
        with pytest.raises(ValueError, match="expected one of paper, official, fair"):
            LocalContrastConfig.preset("best")  # type: ignore[arg-type]

    def test_what_stages_depend_on(self) -> None:
        """Runs that differ elsewhere share a stage; those that differ in anything it reads do not."""

        def changed(stage: Any, **changes: Any) -> bool:
            return replace(TINY, **changes).stage_record(stage) != TINY.stage_record(stage)

        for changes in ({"fine_tune_learning_rate": 1.0}, {"augment": False}, {"selection": True}, {"stages": "x"}):
            assert not changed("global", **changes) and not changed("local", **changes)
        for changes in ({"labelled": 0.5}, {"block_size": 8}, {"temperature": 1.0}, {"local_steps": 3}, {"form": "in"}):
            assert not changed("global", **changes) and changed("local", **changes)
        for changes in (
            {"fold": 1},
            {"width": 5},
            {"global_steps": 3},
            {"transductive": True},
            {"data": "acdc"},
            {"global_head": "mlp"},
        ):
            assert changed("global", **changes) and changed("local", **changes)
        assert not changed("local", stride=2)  # of another method
        assert not changed("global", method="global+local-self") and changed("local", method="local-block")
        own = replace(TINY, method="global+local-self")
        assert own.stage_record("local") == replace(own, labelled=0.5).stage_record("local")  # it reads no label
        assert own.stage_record("local") == replace(own, form="paper", scope="image").stage_record("local")

    def test_every_method_has_its_published_numbers(self) -> None:
        assert len(METHODS) == 9
        for rows in PAPER_RESULTS.values():
            assert all(list(row) == list(METHODS) for row in rows.values())
        assert PAPER_RESULTS["hippocampus"]["5%"]["global+local-block"] == 0.824
        assert PAPER_RESULTS["mmwhs"]["40%"]["mixup"] == 0.755

    def test_ablations_change_the_configuration(self) -> None:
        fair = LocalContrastConfig.preset("fair")
        same = [name for name, changes in ABLATIONS.items() if replace(fair, **changes) == fair]
        assert same == ["full", "block-16", "temperature-0.1"]

    def test_the_network(self) -> None:
        model = new_segmenter(TINY, 4)
        assert isinstance(model, Segmenter) and model(torch.zeros(2, 1, 16, 16)).shape == (2, 4, 16, 16)


class TestWhatCannotBeLoaded:
    """Of a run folder, without a training."""

    def test_a_finished_run_whose_weights_are_gone_or_damaged(self, tmp_path: Path) -> None:
        run = RunFolder.create(tmp_path / "run", {"paper": "local_contrast", "config": TINY.record(), "seed": 0})
        with pytest.raises(FileNotFoundError, match="no weights yet; continue the run with --resume"):
            load_segmenter(run.path)
        run.write_results({"complete": True})
        with pytest.raises(FileNotFoundError, match=r"no weights any more: .*weights is gone or empty; .*train anew"):
            load_segmenter(run.path)
        CheckpointStore(run.path / "weights").save({}, epoch=1).write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"can be used .*train anew, into another folder"):
            load_segmenter(run.path)

    def test_weights_that_lack_their_configuration(self, tmp_path: Path) -> None:
        """In a file whose digest is right."""
        run = RunFolder.create(tmp_path / "run", {"paper": "local_contrast", "config": TINY.record(), "seed": 0})
        state = {"model": new_segmenter(TINY, 2).state_dict(), "config": TINY.record(), "class_names": ["a", "b"]}
        for name in state:
            lacking = {key: value for key, value in state.items() if key != name}
            CheckpointStore(run.path / "weights").save(lacking, epoch=1)
            with pytest.raises(ValueError, match="weights holds no segmentation network with its configuration; give"):
                load_segmenter(run.path)
        CheckpointStore(run.path / "weights").save(state, epoch=1)
        assert load_segmenter(run.path)[1] == TINY

    def test_a_run_of_another_paper(self, tmp_path: Path) -> None:
        run = RunFolder.create(tmp_path / "run", {"paper": "vaesim", "config": {}, "seed": 0})
        run.write_results({"complete": True})
        with pytest.raises(ValueError, match="run is a run of vaesim; expected the folder of a run of local_contrast"):
            load_segmenter(run.path)
        stage = RunFolder.create(tmp_path / "stage", {"stage": "global", "seed": 0})
        with pytest.raises(ValueError, match="stage is no run of a paper"):
            load_segmenter(stage.path)


@pytest.mark.parametrize("unit", ["mm", "pixels"])
def test_the_table_of_ablations_says_what_the_distance_is_in(unit: str) -> None:
    score = {"mean": {"mean": 2.5, "std": None, "runs": 1}, "classes": {}}
    splits = {"test": {"pooled_dice": score, "volume_dice": score, "hausdorff95": score, "unit": unit}}
    run = {"config": {"data": "x", "labelled": 0.1, "fold": 0}, "number_of_runs": 1, "splits": splits}
    (table,) = ablation_tables({"full": run})
    assert [column.header for column in table.columns][-1] == f"HD95 ({unit})"
