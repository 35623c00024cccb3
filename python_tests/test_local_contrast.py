# SPDX-License-Identifier: MIT
"""Local contrast: losses, views, volumes of the stages, the two baselines of the third stage, presets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="local contrast needs the extra protokernels[train]")

from protokernels.data.volumes import LabelledVolume, SegmentationDataset, load_segmentation
from protokernels.models import UNet
from protokernels.papers._local_contrast_baselines import (
    MeanTeacher,
    Transformation,
    draw_share,
    mixup_losses,
    tcsm_losses,
    tcsm_weight,
)
from protokernels.papers._local_contrast_segmenter import Segmenter, load_segmenter, new_segmenter, stage_volumes
from protokernels.papers.local_contrast import (
    ABLATIONS,
    METHODS,
    PAPER_RESULTS,
    GlobalContrast,
    LocalContrast,
    LocalContrastConfig,
    local_loss,
)
from protokernels.training import RunFolder
from protokernels.training.checkpoints import CheckpointError, CheckpointStore
from protokernels.training.segmentation import segmentation_losses, soft_dice_loss

TINY = LocalContrastConfig.preset("fair", width=3, depth=2, image_size=16)
PRETRAINED = [name for name, recipe in METHODS.items() if recipe.global_contrast or recipe.local_contrast]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 4, side: int = 16, classes: int = 3) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 1, side, side, generator=generator())
    return images, torch.randint(classes, (count, side, side), generator=generator(1))


def tiny_dataset(count: int = 260) -> SegmentationDataset:
    """As many volumes as the paper has, of one slice each, split 3:1:1."""
    image, label = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
    volumes = tuple(LabelledVolume(f"v{index}", f"v{index}", image, label) for index in range(count))
    part = count // 5
    return SegmentationDataset(
        "tiny", volumes[: 3 * part], volumes[3 * part : 4 * part], volumes[4 * part :], ("0", "1")
    )


class TestLosses:
    def test_global_is_equation_1(self) -> None:
        torch.manual_seed(0)
        model = GlobalContrast(UNet(width=3, depth=2).encoder, replace(TINY, global_temperature=0.3))
        first, second = batch(3)[0], batch(3)[0].flip(2)
        z = model.head(model.encoder(torch.cat([first, second]))[1])
        z = z / z.norm(dim=1, keepdim=True)
        terms = []
        for i in range(6):
            others = [(z[i] @ z[k] / 0.3).exp() for k in range(6) if k != i]
            terms.append(-((z[i] @ z[(i + 3) % 6] / 0.3).exp() / torch.stack(others).sum()).log())
        loss, spread = model(first, second)
        torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(spread, 1 - z.detach().mean(dim=0).square().sum(), rtol=1e-3, atol=1e-5)
        one = first[:1].expand(3, -1, -1, -1)
        assert model(one, one)[1] < 1e-5  # all embeddings have one direction

    def test_local_is_equations_2_and_3(self) -> None:
        """The text's form: positives and negatives from all maps, the mean over a map's foreground, then over maps."""
        config = replace(TINY, method="local-stride", stride=2, form="paper", reduction="image", temperature=0.5)
        f = torch.randn(4, 5, 4, 4, generator=generator(), dtype=torch.float64)
        y = torch.randint(3, (4, 4, 4), generator=generator(2))
        unit = (f / f.norm(dim=1, keepdim=True))[..., ::2, ::2].movedim(1, -1)
        grid = y[..., ::2, ::2]
        vectors, labels = unit.reshape(-1, 5), grid.reshape(-1)
        owner = torch.arange(4).repeat_interleave(4)
        losses: dict[int, list[Tensor]] = {}
        for i in range(len(labels)):
            positive = [k for k in range(len(labels)) if labels[k] == labels[i] and k != i]
            negative = [k for k in range(len(labels)) if labels[k] != labels[i]]
            if labels[i] == 0 or not positive or not negative:
                continue
            s = (vectors @ vectors[i] / 0.5).exp()
            ratio = s[positive].sum() / s[negative].sum()
            losses.setdefault(int(owner[i]), []).append(-ratio.log() / len(positive))
        expected = torch.stack([torch.stack(each).mean() for each in losses.values()]).mean()
        torch.testing.assert_close(local_loss(f, y, config), expected)

    def test_blocks_and_grids(self) -> None:
        f, y = torch.randn(4, 3, 16, 16, generator=generator()), batch(4)[1]
        whole = local_loss(f, y, replace(TINY, method="local-block", block_size=16))
        torch.testing.assert_close(whole, local_loss(f, y, replace(TINY, method="local-stride", stride=1)))
        corner = local_loss(f[..., :8, :8], y[..., :8, :8], replace(TINY, method="local-block", block_size=8))
        parts = local_loss(f, y, replace(TINY, method="local-block", block_size=8))
        assert corner != parts and parts != whole
        self_supervised = local_loss(f, None, replace(TINY, method="global+local-self"))
        thinned = local_loss(f[..., ::4, ::4], None, replace(TINY, method="global+local-self", stride=1))
        torch.testing.assert_close(self_supervised, thinned)

    @pytest.mark.parametrize("preset", ["paper", "official", "fair"])
    def test_without_labels_the_positive_is_in_the_denominator(self, preset: Any) -> None:
        """Of every pixel of the grid: -log of its share of the same pixel of the other view among all other pixels."""
        config = LocalContrastConfig.preset(preset, method="global+local-self", stride=2, temperature=0.5)
        f = torch.randn(4, 5, 4, 4, generator=generator(), dtype=torch.float64)
        vectors = (f / f.norm(dim=1, keepdim=True))[..., ::2, ::2].movedim(1, -1).reshape(-1, 5)
        s, count = (vectors @ vectors.T / 0.5).exp(), len(vectors)
        terms = [-(s[i, (i + count // 2) % count] / (s[i].sum() - s[i, i])).log() for i in range(count)]
        torch.testing.assert_close(local_loss(f, None, config), torch.stack(terms).mean())

    @pytest.mark.parametrize("method", ["local-block", "local-stride", "global+local-self"])
    def test_steps_of_stage_2_lower_the_loss(self, method: str) -> None:
        torch.manual_seed(0)
        config = replace(TINY, method=method, block_size=8)  # type: ignore[arg-type]
        model = LocalContrast(UNet(width=4, depth=2), config)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        images, labels = batch(2)
        labels = None if method.endswith("self") else labels  # type: ignore[assignment]
        losses = []
        for _ in range(4):
            loss = model(images, images + 0.05 * torch.randn(images.shape, generator=generator()), labels, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] and all(math.isfinite(value) for value in losses)

    def test_a_batch_without_foreground_gives_zero_and_no_gradient(self) -> None:
        model = LocalContrast(UNet(width=2, depth=2), replace(TINY, method="local-block"))
        images, labels = batch(2)
        loss = model(images, images, labels * 0, labels * 0)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())

    def test_soft_dice(self) -> None:
        """Two pixels: sure and right, and sure and wrong about class 1; class 2 neither there nor predicted."""
        logits = torch.tensor([[0.0, 0.0], [60.0, 60.0], [-60.0, -60.0]])[None, :, None]  # [1, 3, 1, 2]
        labels = torch.tensor([[[1, 0]]])
        expected = ((1 - (2 * 1 + 1) / (2 + 1 + 1)) + 0) / 2
        assert soft_dice_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)
        losses = segmentation_losses(logits, labels)
        assert losses["loss"].item() == pytest.approx(losses["cross_entropy"].item() + expected, abs=1e-4)


class TestVolumes:
    def test_labelled_counts_of_the_paper(self) -> None:
        dataset = tiny_dataset()
        for share, count in ((0.05, 7), (0.1, 15), (0.2, 31)):
            stages = stage_volumes(dataset, replace(TINY, labelled=share))
            assert (len(stages["fine_tune"]), len(stages["local"]), len(stages["global"])) == (count, count, 156)
            assert stages["fine_tune"] == dataset.train[:count]
            assert len(stages["unlabelled"]) == 156 - count

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("fold", [0, 3])
    def test_no_stage_sees_a_test_or_validation_volume(self, method: str, fold: int) -> None:
        dataset = load_segmentation("phantoms", image_size=16, fold=fold, split="paper")
        hidden = {volume.name for volume in (*dataset.val, *dataset.test)}
        for preset in ("paper", "fair"):
            config = LocalContrastConfig.preset(preset, method=method, fold=fold)  # type: ignore[arg-type]
            stages = stage_volumes(dataset, config)
            for name, volumes in stages.items():
                assert not hidden & {volume.name for volume in volumes}, name
            count = max(1, int(config.labelled * len(dataset.train)))
            labelled = {volume.name for volume in dataset.train[:count]}
            seen = {volume.name for volume in stages["local"]}
            assert seen == ({v.name for v in dataset.train} if method.endswith("self") else labelled)
            assert config.warnings() == []

    def test_the_released_leak_is_named(self) -> None:
        dataset = tiny_dataset(20)
        config = LocalContrastConfig.preset("official", method="global+local-block")
        stages = stage_volumes(dataset, config)
        assert len(stages["global"]) == 20 and not {*stages["local"], *stages["fine_tune"]} & {
            *dataset.test,
            *dataset.val,
        }
        words = [sentence.split(":")[0] for sentence in config.warnings()]
        assert words == ["transductive", "identical_views", "train_global_head"]
        assert replace(config, method="random").warnings() == []
        assert [s.split(":")[0] for s in replace(config, method="local-block").warnings()] == ["identical_views"]


class Pointwise(nn.Module):
    """Logits that depend on a pixel alone: they move along with the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)  # type: ignore[no-any-return]


class TestMixup:
    def test_the_formula(self) -> None:
        images, labels = batch(5)
        model = Pointwise()
        losses = mixup_losses(model, images, labels, 1.0, generator(3))
        drawn = generator(3)
        share, partner = draw_share(1.0, drawn), torch.randperm(5, generator=drawn)
        logits = model(share * images + (1 - share) * images[partner])
        for name, value in losses.items():
            own, other = (segmentation_losses(logits, target)[name] for target in (labels, labels[partner]))
            torch.testing.assert_close(value, share * own + (1 - share) * other)
        assert 0 < share < 1 and losses["loss"].requires_grad

    def test_the_share_has_its_distribution(self) -> None:
        drawn = generator()
        uniform, narrow = ([draw_share(alpha, drawn) for _ in range(2000)] for alpha in (1.0, 20.0))
        assert np.mean(uniform) == pytest.approx(0.5, abs=0.03) and np.var(uniform) == pytest.approx(1 / 12, abs=0.01)
        assert np.var(narrow) == pytest.approx(1 / (4 * 41), abs=0.002)


class TestMeanTeacher:
    def losses(self, noise: float = 0.0, weight: float = 1.0) -> tuple[MeanTeacher, dict[str, Tensor]]:
        model = MeanTeacher(Pointwise(), Pointwise)
        with torch.no_grad():
            model.teacher.layer.weight.mul_(3)  # type: ignore[union-attr, operator]
        images, labels = batch(3)
        unlabelled = torch.rand(2, 1, 16, 16, generator=generator(5))
        losses = tcsm_losses(
            model, model, images, labels, unlabelled, weight=weight, noise=noise, counts=(3, 2), generator=generator(7)
        )
        return model, losses

    def test_the_consistency_has_a_gradient_for_the_student_only(self) -> None:
        """The released code computes it without any."""
        model, losses = self.losses()
        losses["consistency"].backward()
        gradient = model.student.layer.weight.grad  # type: ignore[union-attr]
        assert gradient is not None and gradient.abs().sum() > 0  # type: ignore[operator]
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())

    def test_the_loss_is_the_sum(self) -> None:
        model, losses = self.losses(weight=0.3)
        images, labels = batch(3)
        plain = segmentation_losses(model(images), labels)
        torch.testing.assert_close(losses["loss"], plain["loss"] + 0.3 * losses["consistency"])

    def test_the_noise_of_one_process(self) -> None:
        """One drawing for labelled and unlabelled images, as ever: what was trained before comes out to the bit."""
        model, losses = self.losses(noise=0.5)
        x, drawn = torch.cat([batch(3)[0], torch.rand(2, 1, 16, 16, generator=generator(5))]), generator(7)
        transformation = Transformation.draw(drawn)
        first, second = (0.5 * torch.randn(x.shape, generator=drawn) for _ in range(2))
        student, teacher = (
            torch.softmax(y, dim=1) for y in (model(x + first), model.teacher(transformation(x) + second))
        )
        expected = (transformation(student) - teacher).square().sum(dim=1).mean()
        assert torch.equal(losses["consistency"], expected)

    def test_a_student_like_its_teacher_is_consistent(self) -> None:
        """Pointwise outputs move with the image; scaling interpolates, so that only flips and rotations agree exactly."""
        images = batch(2)[0]
        model = Pointwise()
        for quarters in range(4):
            for flip in (False, True):
                transformation = Transformation(quarters, flip, 1.0)
                torch.testing.assert_close(transformation(model(images)), model(transformation(images)))

    def test_the_transformation(self) -> None:
        image = torch.arange(16.0).view(1, 1, 4, 4)
        torch.testing.assert_close(Transformation(1, False, 1.0)(image), image.rot90(1, (2, 3)))
        torch.testing.assert_close(Transformation(0, True, 1.0)(image), image.flip(3))
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        assert Transformation(0, False, 1.1)(mask).sum() == pytest.approx(16**2 * 1.1**2, rel=0.02)
        drawn = [Transformation.draw(generator(seed)) for seed in range(60)]
        assert {each.quarters for each in drawn} == {0, 1, 2, 3} and {each.flip for each in drawn} == {False, True}
        assert all(0.9 <= each.scale <= 1.1 for each in drawn)

    def test_the_teacher_follows(self) -> None:
        model = MeanTeacher(Pointwise(), Pointwise)
        values = [model.student.layer.bias.clone()]  # type: ignore[union-attr, operator]
        for step in range(3):
            with torch.no_grad():
                model.student.layer.bias.add_(step + 1)  # type: ignore[union-attr, operator]
            values.append(model.student.layer.bias.clone())  # type: ignore[union-attr, operator]
            model.after_step(0.999)
        mean = torch.stack(values).mean(dim=0)  # 1 - 1 / (t + 1): the plain average at first
        torch.testing.assert_close(model.teacher.layer.bias, mean)  # type: ignore[union-attr]
        model.after_step(0.25)
        torch.testing.assert_close(model.teacher.layer.bias, 0.25 * mean + 0.75 * values[-1])  # type: ignore[union-attr]
        assert int(model.steps) == 4 and "steps" in model.state_dict()

    def test_the_weight_rises_to_its_end(self) -> None:
        assert tcsm_weight(0.0, 2.0) == pytest.approx(2 * math.exp(-5))
        assert tcsm_weight(0.375, 2.0) == pytest.approx(2 * math.exp(-1.25))
        assert tcsm_weight(0.75, 2.0) == tcsm_weight(0.99, 2.0) == 2.0


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
            ({"fine_tune_learning_rate": math.nan}, "fine_tune_learning_rate must be positive"),
            ({"image_size": 30}, r"multiple of 2\*\*depth = 4"),
            ({"keep": "first"}, "keep must be one of best, last"),
            ({"global_head": "cls"}, "global_head must be one of linear, mlp"),
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
        assert own.stage_record("local") == replace(own, form="paper").stage_record("local")

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
        assert isinstance(model, Segmenter) and model(batch(2)[0]).shape == (2, 4, 16, 16)


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

    def test_a_run_of_another_paper(self, tmp_path: Path) -> None:
        run = RunFolder.create(tmp_path / "run", {"paper": "vaesim", "config": {}, "seed": 0})
        run.write_results({"complete": True})
        with pytest.raises(ValueError, match="run is a run of vaesim; expected the folder of a run of local_contrast"):
            load_segmenter(run.path)
        stage = RunFolder.create(tmp_path / "stage", {"stage": "global", "seed": 0})
        with pytest.raises(ValueError, match="stage is no run of a paper"):
            load_segmenter(stage.path)
