# SPDX-License-Identifier: MIT
"""Local contrast: losses, views, volumes of the stages, the two baselines of the third stage."""

from __future__ import annotations

import math
from dataclasses import replace
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
from protokernels.papers._local_contrast_segmenter import stage_volumes
from protokernels.papers.local_contrast import (
    METHODS,
    GlobalContrast,
    LocalContrast,
    LocalContrastConfig,
    local_loss,
)
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


def by_hand(f: Tensor, y: Tensor, temperature: float) -> Tensor | None:  # [N, C, h, w], [N, h, w]
    """Eq. 2 and 3 of the text, pixel by pixel; None where there is no anchor."""
    unit = f / f.norm(dim=1, keepdim=True)
    vectors, labels = unit.movedim(1, -1).reshape(-1, f.shape[1]), y.reshape(-1)
    owner = torch.arange(len(y)).repeat_interleave(y[0].numel())
    losses: dict[int, list[Tensor]] = {}
    for i in range(len(labels)):
        positive = [k for k in range(len(labels)) if labels[k] == labels[i] and k != i]
        negative = [k for k in range(len(labels)) if labels[k] != labels[i]]
        if labels[i] == 0 or not positive or not negative:
            continue
        s = (vectors @ vectors[i] / temperature).exp()
        ratio = s[positive].sum() / s[negative].sum()
        losses.setdefault(int(owner[i]), []).append(-ratio.log() / len(positive))
    return torch.stack([torch.stack(each).mean() for each in losses.values()]).mean() if losses else None


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
        torch.testing.assert_close(local_loss(f, y, config), by_hand(f[..., ::2, ::2], y[..., ::2, ::2], 0.5))

    @pytest.mark.parametrize("drop", [False, True])
    @pytest.mark.parametrize("scope", ["group", "image"])
    def test_in_blocks_both_are_those_of_every_block(self, scope: Any, drop: bool) -> None:
        """Section 2.3: calculated within each block only and then averaged across all the blocks."""
        config = LocalContrastConfig.preset(
            "paper", method="local-block", block_size=3, temperature=0.5, scope=scope, drop_remainder=drop
        )
        f = torch.randn(4, 5, 7, 8, generator=generator(), dtype=torch.float64).requires_grad_()
        y = torch.randint(3, (4, 7, 8), generator=generator(2))
        y[:, :3, :3] = 0  # a block without anchors
        y[1, 3:6, :3], y[2, :3, 3:6] = 0, 1  # a map without anchors in a block, and one without negatives of its own
        blocks = []
        for top in range(0, 6 if drop else 7, 3):
            for left in range(0, 6 if drop else 8, 3):
                part = (slice(top, top + 3), slice(left, left + 3))
                maps = [slice(None)] if scope == "group" else [slice(k, k + 1) for k in range(4)]
                each = [by_hand(f[(k, slice(None), *part)], y[(k, *part)], 0.5) for k in maps]
                if found := [loss for loss in each if loss is not None]:
                    blocks.append(torch.stack(found).mean())
        expected = torch.stack(blocks).mean()
        loss = local_loss(f, y, config)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(torch.autograd.grad(loss, f), torch.autograd.grad(expected, f), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_blocks_of_background_have_a_loss_of_0(self) -> None:
        config = LocalContrastConfig.preset("paper", method="local-block", block_size=4)
        f = torch.randn(2, 3, 8, 8, generator=generator()).requires_grad_()
        loss = local_loss(f, torch.zeros(2, 8, 8, dtype=torch.int64), config)
        (gradient,) = torch.autograd.grad(loss, f)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(f))

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
        assert local_loss(f, None, replace(config, scope="image")) == local_loss(
            f, None, config
        )  # refused after stage 1 before

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
