# SPDX-License-Identifier: MIT
"""BYOL: a student predicts what a slowly moving copy of itself says about the other view; there are no negatives.

J.-B. Grill et al. Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning. NeurIPS 2020. With the student's
prediction q(z) and the teacher's projection z' as unit vectors (Eq. 2), for both orders of the views:

    L = || q(z_1) - z'_2 ||^2 + || q(z_2) - z'_1 ||^2,     || q - z' ||^2 = 2 - 2 q . z'

After every step the teacher's weights move: xi <- m xi + (1 - m) theta (Eq. 1), m from ``momentum`` to 1 along half a cosine.
Constant embeddings minimise the loss (0); predictor and teacher are what keeps training away from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import mlp_head, pooled
from ..training.self_supervised import Method, PretrainingConfig, frozen_copy, move_towards
from .common import Baseline, in_float32, spread


@dataclass(frozen=True)
class BYOLConfig(PretrainingConfig):
    """The shared settings and BYOL's own."""

    momentum: float = 0.99  # of the teacher at the start; the paper's 0.996 is for 100 times as many steps
    hidden_dim: int = 512  # of projector and predictor
    output_dim: int = 128

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"momentum": 0.996, "hidden_dim": 4096, "output_dim": 256}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("hidden_dim", "output_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"BYOLConfig: momentum must lie in [0, 1]; got {self.momentum}")


@in_float32
def prediction_loss(prediction: Tensor, target: Tensor) -> Tensor:  # [N, D] each -> []
    """Eq. 2, one order of the views: squared distance of unit vectors; no gradient to the target."""
    return (2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=1)).mean()


class BYOL(Method):
    """Student (encoder, projector, predictor) and teacher (encoder, projector)."""

    def __init__(self, config: BYOLConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        sizes = (config.hidden_dim, config.output_dim)

        def projector() -> nn.Sequential:
            return mlp_head(self.encoder.dim, *sizes, layers=2)

        self.projector = projector()
        self.predictor = mlp_head(config.output_dim, *sizes, layers=2)
        self.teacher_encoder = frozen_copy(self.encoder, lambda: config.make_encoder(channels))
        self.teacher_projector = frozen_copy(self.projector, projector)
        self.momentum = config.momentum

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        z_first, z_second = (self.projector(pooled(self.encoder(view))) for view in (first, second))
        with torch.no_grad():
            targets = [self.teacher_projector(pooled(self.teacher_encoder(view))) for view in (first, second)]
        loss = prediction_loss(self.predictor(z_first), targets[1]) + prediction_loss(
            self.predictor(z_second), targets[0]
        )
        return {"loss": loss, "spread": spread(z_first)}

    def after_step(self, progress: float) -> None:
        momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        move_towards(self.teacher_encoder, self.encoder, momentum)
        move_towards(self.teacher_projector, self.projector, momentum)


BASELINE = Baseline("byol", BYOLConfig, BYOL, __doc__)
