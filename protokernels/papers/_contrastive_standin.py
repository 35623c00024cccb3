# SPDX-License-Identifier: MIT
"""Plain PyTorch in place of ``protokernels.local_contrastive_loss`` and ``nt_xent_loss``, until those are there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent_loss(first: Tensor, second: Tensor, *, temperature: float = 0.5, denominator: str = "all") -> Tensor:
    count = len(first)
    z = F.normalize(torch.cat([first, second]), dim=1)
    scores = z @ z.T / temperature
    scores = scores.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * count, device=z.device).roll(count))


def local_contrastive_loss(
    features: Tensor,  # [N, C, H, W]
    labels: Tensor | None,  # [N, H, W]
    *,
    temperature: float = 0.1,
    block_size: int | None = None,
    stride: int | None = None,
    form: str = "supcon",
    scope: str = "group",
    reduction: str = "group",
    background: int | None = 0,
    drop_remainder: bool = False,
    **_more: Any,
) -> Tensor:
    N, _, H, W = features.shape
    if stride:
        features = features[..., ::stride, ::stride]
        labels = labels[..., ::stride, ::stride] if labels is not None else None
        return _group(features, labels, temperature, form, background)[0]
    block_size = block_size or max(H, W)
    losses = []
    for top in range(0, H, block_size):
        for left in range(0, W, block_size):
            rows, columns = slice(top, top + block_size), slice(left, left + block_size)
            part = labels[:, rows, columns] if labels is not None else None
            loss, anchors = _group(features[:, :, rows, columns], part, temperature, form, background)
            if anchors:
                losses.append(loss)
    return torch.stack(losses).mean() if losses else features.sum() * 0


def _group(
    features: Tensor, labels: Tensor | None, temperature: float, form: str, background: int | None
) -> tuple[Tensor, int]:
    N = len(features)
    f = F.normalize(features.movedim(1, -1).reshape(-1, features.shape[1]), dim=1)
    if labels is None:
        half = len(f) // 2
        y, anchors = torch.arange(half).repeat(2), torch.ones(2 * half, dtype=torch.bool)
        background = None
    else:
        y = labels.reshape(-1)
        anchors = y != background if background is not None else torch.ones_like(y, dtype=torch.bool)
    counts = torch.bincount(y)[y]
    rows = (anchors & (counts > 1)).nonzero()[:, 0]
    if not len(rows):
        return features.sum() * 0, 0
    scores = f[rows] @ f.T / temperature
    itself = torch.zeros_like(scores, dtype=torch.bool)
    itself[torch.arange(len(rows)), rows] = True
    positive = (y[rows, None] == y) & ~itself
    if form == "paper":
        ratio = scores.masked_fill(y[rows, None] == y, -torch.inf).logsumexp(1) - scores.masked_fill(~positive, -torch.inf).logsumexp(1)
        return (ratio / positive.sum(1)).mean(), len(rows)
    sums = torch.zeros(int(y.max()) + 1, f.shape[1]).index_add(0, y, f)
    together = ((f[rows] * sums[y[rows]]).sum(1) - f[rows].square().sum(1)) / temperature / (counts[rows] - 1)
    return (scores.masked_fill(itself, -torch.inf).logsumexp(1) - together).mean(), len(rows)
