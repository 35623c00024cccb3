# SPDX-License-Identifier: MIT
"""Mixup and TCSM as third stages of ``protokernels.papers.local_contrast``.

They stand beside the paper and not among the baselines of the package: those learn an encoder without labels and are judged
by its features, these change how a segmentation network is trained, and share everything else with the paper's third stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.distributed import own_rows, whole_batch
from ..training.segmentation import segmentation_losses
from ..training.self_supervised import frozen_copy, move_towards


def mixup_losses(
    model: nn.Module,
    images: Tensor,  # [B, 1, H, W]
    labels: Tensor,  # [B, H, W]
    alpha: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """lambda L(f(x), y) + (1 - lambda) L(f(x), y'), x = lambda x_a + (1 - lambda) x_b, lambda from Beta(alpha, alpha).

    H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz. mixup: Beyond empirical risk minimization. ICLR 2018. One lambda for
    the batch; the partners are a permutation of it, of the batch of all processes; L is cross-entropy plus soft Dice.
    """
    share = draw_share(alpha, generator)
    everyone, their_labels = whole_batch(images), whole_batch(labels)
    partner = own_rows(torch.randperm(len(everyone), generator=generator)).to(images.device)
    logits = model(share * images + (1 - share) * everyone[partner])
    own, other = segmentation_losses(logits, labels), segmentation_losses(logits, their_labels[partner])
    return {name: share * own[name] + (1 - share) * other[name] for name in own}


def draw_share(alpha: float, generator: torch.Generator) -> float:
    """One number from Beta(alpha, alpha)."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


class Transformation(NamedTuple):
    """pi of TCSM: the same for all images of a batch."""

    quarters: int  # rotation by so many right angles
    flip: bool  # of the columns, before the rotation
    scale: float  # about the centre, after it

    @classmethod
    def draw(cls, generator: torch.Generator) -> Transformation:
        chance = torch.rand(3, generator=generator).tolist()
        return cls(int(4 * chance[0]), chance[1] < 0.5, 0.9 + 0.2 * chance[2])

    def __call__(self, maps: Tensor) -> Tensor:  # [B, C, H, H] -> the same
        """pi(maps); differentiable. Beyond the border, its nearest pixel."""
        turned = torch.rot90(maps.flip(3) if self.flip else maps, self.quarters, dims=(2, 3))
        theta = turned.new_tensor([[1 / self.scale, 0, 0], [0, 1 / self.scale, 0]]).expand(len(maps), 2, 3)
        grid = F.affine_grid(theta, list(turned.shape), align_corners=False)
        return F.grid_sample(turned, grid, padding_mode="border", align_corners=False)


class MeanTeacher(nn.Module):
    """TCSM: a student that is trained and a teacher that follows it as a moving average.

    X. Li, L. Yu, H. Chen, C.-W. Fu, L. Xing, P.-A. Heng. Transformation-consistent self-ensembling model for semisupervised
    medical image segmentation. IEEE TNNLS 32 (2020), 523-534. The released code takes the consistency of both networks
    without gradient, so that it does nothing; here the student's has one, as the paper says. The network is the same U-Net
    as everywhere; the teacher predicts.

    Args:
        student: [B, 1, H, W] -> logits [B, K, H, W].
        build: makes another network like the student, for the teacher.

    Shape: as the student.
    """

    steps: Tensor  # [] int64

    def __init__(self, student: nn.Module, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.student = student
        self.teacher = frozen_copy(student, build)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.student(images)
        return logits

    def after_step(self, momentum: float) -> None:
        """teacher <- m teacher + (1 - m) student with m = min(1 - 1 / (t + 1), momentum): at first the plain average."""
        self.steps += 1
        move_towards(self.teacher, self.student, min(1 - 1 / (int(self.steps) + 1), momentum))


def tcsm_losses(
    model: nn.Module,  # the mean teacher, perhaps wrapped for several processes
    bare: MeanTeacher,
    images: Tensor,  # [B, 1, H, W]
    labels: Tensor,  # [B, H, W]
    unlabelled: Tensor,  # [U, 1, H, W]
    *,
    weight: float,
    noise: float,
    counts: tuple[int, int],  # images and unlabelled of all processes
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """L(f(x), y) + weight |pi(f(x + n)) - f'(pi(x) + n')|^2, over labelled and unlabelled images.

    f and f' are the softmax outputs of student and teacher, n and n' Gaussian noise, pi one rotation, flip and scale per
    batch; the square is summed over classes and averaged over pixels. The noise is drawn for the images of all processes.
    """
    x = torch.cat([images, unlabelled])
    transformation = Transformation.draw(generator)
    drawn = (torch.randn(sum(counts), *x.shape[1:], generator=generator).split(counts) for _ in range(2))
    first, second = (noise * torch.cat([own_rows(part) for part in parts]).to(x.device) for parts in drawn)
    logits = model(x + first)
    losses = segmentation_losses(logits[: len(images)], labels)
    with torch.no_grad():
        target = torch.softmax(bare.teacher(transformation(x) + second).float(), dim=1)
    consistency = (transformation(torch.softmax(logits.float(), dim=1)) - target).square().sum(dim=1).mean()
    return {**losses, "loss": losses["loss"] + weight * consistency, "consistency": consistency}


def tcsm_weight(progress: float, largest: float) -> float:
    """largest exp(-5 (1 - t / T)^2), T three quarters of the training (epoch 600 of 800), then largest."""
    return largest * math.exp(-5 * (1 - min(1.0, progress / 0.75)) ** 2)
