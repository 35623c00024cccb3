# SPDX-License-Identifier: MIT
"""SimCLR: two views of an image attract, all other views of the batch repel.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton. A Simple Framework for Contrastive Learning of Visual Representations. ICML
2020. Eq. 1 (NT-Xent), for the 2N views of N images, with p(i) the other view of view i's image and unit vectors z:

    l_i = -log( exp(z_i . z_p(i) / tau) / sum_{k != i} exp(z_i . z_k / tau) ),   L = mean_i l_i

The projector has two layers, as there (section 4.2). On several processes the negatives come from all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import protokernels

from ..models import mlp_head, pooled
from ..training import process_count
from ..training.self_supervised import Method, PretrainingConfig
from .common import Baseline, spread


@dataclass(frozen=True)
class SimCLRConfig(PretrainingConfig):
    """The shared settings and SimCLR's own."""

    temperature: float = 0.5
    hidden_dim: int = 256
    output_dim: int = 128

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {"hidden_dim": 512}}
    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature", "hidden_dim", "output_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pairs()


class SimCLR(Method):
    """Encoder and projector."""

    def __init__(self, config: SimCLRConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)
        self.projector = mlp_head(self.encoder.dim, config.hidden_dim, config.output_dim, layers=2)
        self.temperature = config.temperature

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        z_first, z_second = (self.projector(pooled(self.encoder(view))) for view in (first, second))
        gather = process_count() > 1
        loss = protokernels.nt_xent_loss(z_first, z_second, temperature=self.temperature, gather=gather)
        return {"loss": loss, "spread": spread(z_first)}


BASELINE = Baseline("simclr", SimCLRConfig, SimCLR, __doc__)
