# SPDX-License-Identifier: MIT
"""Heads on top of an encoder's pooled output."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation that uses its running statistics for a batch of one, which has no variance of its own."""

    def forward(self, x: Tensor) -> Tensor:  # [B, D]
        if self.training and len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def mlp_head(
    channels_in: int, hidden: int, channels_out: int, *, layers: int = 3, norm_last: bool = False
) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them, and neither after the last.

    A batch of one image is normalised by the running statistics. Projectors, expanders and predictors are such a head: SimCLR's
    and BYOL's have two layers, VICReg's expander three.

    Args:
        channels_in: width of the input.
        hidden: width of the hidden layers.
        channels_out: width of the output.
        layers: number of linear layers, at least 1.
        norm_last: normalise the last layer's output as well.

    Shape: [B, channels_in] -> [B, channels_out].
    """
    if layers < 1:
        raise ValueError(f"mlp_head: layers must be at least 1; got {layers}")
    widths = [channels_in, *[hidden] * (layers - 1), channels_out]
    modules: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        last = index == layers - 1
        modules.append(nn.Linear(before, after, bias=last and not norm_last))  # normalisation has a bias of its own
        if not last or norm_last:
            modules.append(BatchNorm1d(after))
        if not last:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)
