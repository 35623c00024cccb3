# SPDX-License-Identifier: MIT
"""SwAV: one view's balanced cluster assignment is predicted from the other view.

M. Caron, I. Misra, J. Mairal, P. Goyal, P. Bojanowski, A. Joulin. Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments. NeurIPS 2020. With unit embeddings z and unit prototypes c_k (Eq. 1 and 2):

    p_k = softmax_k(z . c_k / tau),   q = the balanced assignment of the batch (Eq. 3-5: entropic transport of z . c_k,
    equal shares for all prototypes),   L = -(1 / 2) mean [ sum_k q2_k log p1_k + sum_k q1_k log p2_k ]

q is computed by :class:`protokernels.nn.SinkhornAssignment` and has no gradient. Two full views only: the paper's smaller
crops, and its queue for batches with fewer images than prototypes, are left out; so there are fewer prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import mlp_head, pooled
from ..nn import SinkhornAssignment
from ..training.self_supervised import Method, PretrainingConfig
from .common import Baseline, in_float32, spread


@dataclass(frozen=True)
class SwAVConfig(PretrainingConfig):
    """The shared settings and SwAV's own."""

    num_prototypes: int = 32  # K
    temperature: float = 0.1  # tau
    epsilon: float = 0.05  # entropy of the assignment
    num_iters: int = 3  # Sinkhorn iterations
    hidden_dim: int = 256
    output_dim: int = 128

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"num_prototypes": 64, "hidden_dim": 2048}}
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "num_prototypes",
        "temperature",
        "epsilon",
        "num_iters",
        "hidden_dim",
        "output_dim",
    )


@in_float32
def swapped_loss(
    first: Tensor,  # [N, K], z . c of the first view
    second: Tensor,  # [N, K]
    first_assignment: Tensor,  # [N, K], rows sum to 1
    second_assignment: Tensor,  # [N, K]
    temperature: float,
) -> Tensor:  # []
    """Eq. 1 and 2, averaged over the two orders."""
    one = F.cross_entropy(first / temperature, second_assignment)
    return (one + F.cross_entropy(second / temperature, first_assignment)) / 2


class SwAV(Method):
    """Encoder, projector and prototypes."""

    def __init__(self, config: SwAVConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.projector = mlp_head(self.encoder.dim, config.hidden_dim, config.output_dim, layers=2)
        self.prototypes = nn.Parameter(torch.randn(config.num_prototypes, config.output_dim))
        self.assignment = SinkhornAssignment(epsilon=config.epsilon, num_iters=config.num_iters)
        self.temperature = config.temperature

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        z_first, z_second = (self.projector(pooled(self.encoder(view))) for view in (first, second))
        first_scores, second_scores = (_cosines(z, self.prototypes) for z in (z_first, z_second))
        first_assignment, second_assignment = (self.assignment(s.detach()) for s in (first_scores, second_scores))
        loss = swapped_loss(first_scores, second_scores, first_assignment, second_assignment, self.temperature)
        used = first_assignment.argmax(dim=1).unique().numel()
        return {"loss": loss, "spread": spread(z_first), "prototypes_used": loss.new_tensor(float(used))}


@in_float32
def _cosines(z: Tensor, prototypes: Tensor) -> Tensor:  # [N, D], [K, D] -> [N, K]
    return F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T


BASELINE = Baseline("swav", SwAVConfig, SwAV, __doc__)
