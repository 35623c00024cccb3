# SPDX-License-Identifier: MIT
"""The loss of stage 2 of ``protokernels.papers.local_contrast``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import protokernels

from ._local_contrast_config import LocalContrastConfig


def local_loss(f: Tensor, labels: Tensor | None, config: LocalContrastConfig) -> Tensor:  # [2B, C, H, W], [2B, H, W]
    """Eq. 2 and 3, in blocks or on a grid (section 2.3); for the method without labels, a pixel against all others."""
    in_blocks = config.recipe.local_contrast == "block"
    by_block = in_blocks and labels is not None and config.reduction == "image"
    loss = protokernels.local_contrastive_loss(
        f,
        labels,
        temperature=config.temperature,
        block_size=config.block_size if in_blocks else None,
        stride=None if in_blocks else config.stride,
        form=config.local_form,
        scope=config.local_scope,
        reduction="none" if by_block else config.reduction,
        drop_remainder=config.drop_remainder,
    )
    return mean_over_blocks(loss, labels, config) if by_block and labels is not None else loss


def mean_over_blocks(losses: Tensor, labels: Tensor, config: LocalContrastConfig) -> Tensor:  # [N, H, W] each -> []
    """Eq. 3 of every block, the mean over the anchors of a map and then over the maps that have any, averaged over the blocks with
    anchors (section 2.3)."""
    size = config.block_size
    H, W = labels.shape[1:]
    if config.drop_remainder:
        losses, labels = (x[:, : H // size * size, : W // size * size] for x in (losses, labels))

    def sums(x: Tensor, of_all_maps: bool = False) -> Tensor:  # over the pixels of a block: [N, H / size, W / size]
        below, right = (-length % size for length in x.shape[1:])
        whole = F.pad(x, (0, right, 0, below))
        blocks: Tensor = whole.unflatten(2, (-1, size)).unflatten(1, (-1, size)).sum(dim=(2, 4))
        return blocks.sum(dim=0, keepdim=True).expand_as(blocks) if of_all_maps else blocks

    def at_pixels(x: Tensor) -> Tensor:  # a block's number at each of its pixels: [N, H, W]
        wide: Tensor = x.repeat_interleave(size, 1).repeat_interleave(size, 2)
        return wide[:, : labels.shape[1], : labels.shape[2]]

    together = config.scope == "group"  # a pixel meets those of all maps
    everyone = at_pixels(sums(torch.ones_like(losses), together))
    anchors = torch.zeros_like(losses)
    for label in labels.unique().tolist():
        own = (labels == label).to(losses.dtype)
        peers = at_pixels(sums(own, together))
        counts = (peers > 1) & (label != 0)
        if config.local_form in ("paper", "negout"):
            counts &= everyone > peers
        anchors += own * counts
    number = sums(anchors)
    has = number > 0
    of_maps = sums(losses * anchors) / number.clamp(min=1)  # Eq. 3, inside
    of_blocks = of_maps.sum(dim=0) / has.sum(dim=0).clamp(min=1)
    mean: Tensor = of_blocks.sum() / has.any(dim=0).sum().clamp(min=1)
    return mean
