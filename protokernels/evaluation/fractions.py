# SPDX-License-Identifier: MIT
"""Subsets of the labelled images for the question how few labels are enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .roc import as_multi_hot


def label_subsets(
    targets: Tensor,  # [N] int64, or [N, K] with 0 and 1
    fractions: Sequence[float],
    *,
    num_classes: int,
    seed: int = 0,
) -> dict[float, Tensor]:  # fraction -> [n] int64 indices, ascending
    """Nested stratified subsets: all fractions are beginnings of one order of the images.

    Images with the same labels are a stratum. In random order, the r-th of a stratum's n images gets the key
    (r + U) / n with one U per stratum, uniform in [0, 1), and the images are ordered by key: every beginning then holds each
    stratum in its share, up to one image. In front of all come the few images needed for one image per class (rarest class
    first; "no class at all" counts as one where it occurs), so a subset may be a little larger than its fraction and its
    smallest classes over-represented.

    Args:
        targets: class numbers, or a 0/1 matrix.
        fractions: shares of the images in (0, 1].
        num_classes: K.
        seed: of the order. Torch's global generator is not touched.

    Returns:
        For every fraction the chosen images, ``max(1, round(fraction * N))`` of them or as many as one per class takes.

    Raises:
        ValueError: a fraction outside (0, 1], no image, targets of another kind.

    Example:
        >>> import torch
        >>> from protokernels.evaluation import label_subsets
        >>> subsets = label_subsets(torch.tensor([0, 1] * 50), [0.1, 1.0], num_classes=2)
        >>> len(subsets[0.1]), len(subsets[1.0])
        (10, 100)
    """
    caller = "label_subsets"
    if any(not 0.0 < fraction <= 1.0 for fraction in fractions):
        raise ValueError(f"{caller}: fractions must lie in (0, 1]; got {list(fractions)}")
    if len(targets) == 0:
        raise ValueError(f"{caller}: at least one image is needed; got none")
    has = as_multi_hot(caller, targets, len(targets), num_classes).cpu()
    order = _stratified_order(has, torch.Generator().manual_seed(seed))
    front = _one_per_class(has, order)
    order = torch.cat([front, order[~torch.isin(order, front)]])
    return {fraction: order[: max(1, len(front), round(fraction * len(order)))].sort().values for fraction in fractions}


def _stratified_order(has: Tensor, generator: torch.Generator) -> Tensor:  # [N, K] bool -> [N] int64
    _, stratum, sizes = torch.unique(has, dim=0, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(has), generator=generator)
    grouped = shuffled[stratum[shuffled].sort(stable=True).indices]  # stratum after stratum, shuffled within
    starts = sizes.cumsum(0) - sizes
    of = stratum[grouped]
    rank = torch.arange(len(has)) - starts[of]
    offset = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    return grouped[((rank + offset[of]) / sizes[of]).sort(stable=True).indices]


def _one_per_class(has: Tensor, order: Tensor) -> Tensor:  # -> [n] int64
    """The first image in ``order`` of every class that no image taken before has, rarest class first."""
    columns = torch.cat([has, ~has.any(dim=1, keepdim=True)], dim=1)[order]
    counts = columns.sum(dim=0)
    taken: list[int] = []
    for index in counts.sort(stable=True).indices.tolist():
        if counts[index] and not bool(columns[taken, index].any()):
            taken.append(int(columns[:, index].to(torch.int8).argmax()))
    return order[taken]
