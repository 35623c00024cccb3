# SPDX-License-Identifier: MIT
"""Barlow Twins: the embeddings' dimensions agree between the views and say different things.

J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny. Barlow Twins: Self-Supervised Learning via Redundancy Reduction. ICML 2021.
Eq. 1 and 2, with the cross-correlation C [D, D] of the two views' embeddings over the batch:

    C_ij = sum_n z1_ni z2_nj / N  for embeddings with mean 0 and deviation 1 in every dimension
    L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2

The released code scales L by a constant for LARS; AdamW does not feel it. Correlations are of the images of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..models import mlp_head, pooled
from ..training import whole_batch
from ..training.self_supervised import Method, PretrainingConfig
from .common import Baseline, in_float32, spread


@dataclass(frozen=True)
class BarlowTwinsConfig(PretrainingConfig):
    """The shared settings and Barlow Twins' own."""

    redundancy: float = 0.0051  # lambda
    hidden_dim: int = 512
    output_dim: int = 512

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"hidden_dim": 8192, "output_dim": 8192}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("hidden_dim", "output_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("redundancy")


@in_float32
def barlow_twins_loss(first: Tensor, second: Tensor, redundancy: float) -> dict[str, Tensor]:  # [N, D] each
    """Eq. 1: ``loss``, and its two sums ``invariance`` and ``redundancy`` (without lambda). A dimension that is constant over
    the batch has correlation 0; one image, or collapsed embeddings: D, without a gradient."""
    first, second = (_standardised(z) for z in (first, second))
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    invariance = (1 - diagonal).square().sum()
    rest = correlation.square().sum() - diagonal.square().sum()
    return {"loss": invariance + redundancy * rest, "invariance": invariance, "redundancy": rest}


def _standardised(z: Tensor) -> Tensor:  # [N, D]
    z = z - z.mean(dim=0)
    return z / (z.square().mean(dim=0) + 1e-5).sqrt()  # as batch normalisation does


class BarlowTwins(Method):
    """Encoder and a projector of three layers."""

    def __init__(self, config: BarlowTwinsConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.projector = mlp_head(self.encoder.dim, config.hidden_dim, config.output_dim)
        self.redundancy = config.redundancy

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        z_first, z_second = (
            whole_batch(self.projector(pooled(self.encoder(view))).float()) for view in (first, second)
        )
        return {**barlow_twins_loss(z_first, z_second, self.redundancy), "spread": spread(z_first)}


BASELINE = Baseline("barlow_twins", BarlowTwinsConfig, BarlowTwins, __doc__)
