# SPDX-License-Identifier: MIT
"""VICReg: views agree (invariance), every dimension varies (variance), no two dimensions say the same (covariance).

A. Bardes, J. Ponce, Y. LeCun. VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning. ICLR 2022.
Eq. 1-6, for embeddings Z, Z' [N, D]:

    L = lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]
    s = mean over images and dimensions of (Z - Z')^2
    v(Z) = mean_d max(0, 1 - sqrt(Var_d + 1e-4)),   c(Z) = sum_{i != j} Cov_ij^2 / D

The paper's s is a mean over images of the squared distance; its released code also divides by D and halves v(Z) + v(Z'), and
is what the published weights 25, 25, 1 belong to: so do we. Statistics are of the images of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..models import mlp_head, pooled
from ..nn import variance_covariance_loss
from ..training import whole_batch
from ..training.self_supervised import Method, PretrainingConfig
from .common import Baseline, in_float32, spread


@dataclass(frozen=True)
class VICRegConfig(PretrainingConfig):
    """The shared settings and VICReg's own."""

    invariance_weight: float = 25.0  # lambda
    variance_weight: float = 25.0  # mu, of the mean over the two views
    covariance_weight: float = 1.0  # nu
    hidden_dim: int = 512
    output_dim: int = 512

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"hidden_dim": 8192, "output_dim": 8192}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("hidden_dim", "output_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("invariance_weight", "variance_weight", "covariance_weight")


@in_float32
def vicreg_loss(first: Tensor, second: Tensor, weights: tuple[float, float, float]) -> dict[str, Tensor]:
    """Eq. 6 for [N, D] embeddings and its terms: ``loss``, ``invariance``, ``variance``, ``covariance``."""
    invariance = (first - second).square().mean()
    (variance_1, covariance_1), (variance_2, covariance_2) = map(variance_covariance_loss, (first, second))
    variance, covariance = (variance_1 + variance_2) / 2, covariance_1 + covariance_2
    loss = weights[0] * invariance + weights[1] * variance + weights[2] * covariance
    return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}


class VICReg(Method):
    """Encoder and an expander of three layers."""

    def __init__(self, config: VICRegConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.expander = mlp_head(self.encoder.dim, config.hidden_dim, config.output_dim)
        self.weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        z_first, z_second = (whole_batch(self.expander(pooled(self.encoder(view))).float()) for view in (first, second))
        return {**vicreg_loss(z_first, z_second, self.weights), "spread": spread(z_first)}


BASELINE = Baseline("vicreg", VICRegConfig, VICReg, __doc__)
