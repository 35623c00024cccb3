# SPDX-License-Identifier: MIT
"""Contrastive losses pixel by pixel, pair by pair, in float64: what the tests of the op `contrastive` compare with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

FORMS = ("supcon", "in", "paper", "negout")


def draw_maps(
    shape: Sequence[int],  # N, C, then two or three axes
    classes: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Features that lean towards a direction of their class, and labels in patches, so that classes are met unevenly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    means = torch.randn(classes, shape[1], generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (noise + means[labels].movedim(-1, 1)).to(dtype), labels


def brute_force(
    features: Tensor,  # [N, C, ...]
    labels: Tensor,  # [N, ...]
    *,
    temperature: float,
    block_size: Any = None,
    stride: Any = None,
    form: str = "supcon",
    scope: str = "group",
    reduction: str = "group",
    background: int | None = 0,
    ignore_index: int | None = None,
    normalize: bool = True,
    drop_remainder: bool = False,
) -> Tensor:  # [] or the shape of the labels
    """One anchor after the other. Differentiable, in float64."""
    N, axes = labels.shape[0], labels.shape[1:]
    block = [block_size] * len(axes) if isinstance(block_size, int) else block_size
    step = [stride] * len(axes) if isinstance(stride, int) else stride or [1] * len(axes)
    x = features.double()
    vectors: dict[tuple[int, ...], Tensor] = {}
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for place in product(range(N), *(range(length) for length in axes)):
        n, *at = place
        if any(position % every for position, every in zip(at, step, strict=True)):
            continue
        if ignore_index is not None and int(labels[place]) == ignore_index:
            continue
        corner = [position // edge for position, edge in zip(at, block, strict=True)] if block else [0] * len(at)
        whole = not block or all((c + 1) * e <= length for c, e, length in zip(corner, block, axes, strict=True))
        if drop_remainder and not whole:
            continue
        vector = x[(n, slice(None), *at)]
        length = vector.norm()
        if normalize:
            vector = vector / length if length > 1e-12 else vector * 0
        vectors[place] = vector
        groups[(*corner, n if scope == "image" else 0)].append(place)
    losses: dict[tuple[int, ...], Tensor] = {}
    group_of: dict[tuple[int, ...], Any] = {}
    for group, members in groups.items():
        stacked = torch.stack([vectors[place] for place in members])
        classes = [int(labels[place]) for place in members]
        for i, place in enumerate(members):
            positives = [j for j in range(len(members)) if j != i and classes[j] == classes[i]]
            negatives = [j for j in range(len(members)) if classes[j] != classes[i]]
            if classes[i] == background or not positives or (form in ("paper", "negout") and not negatives):
                continue
            losses[place] = anchor_loss(stacked[i] @ stacked.T / temperature, positives, negatives, form)
            group_of[place] = group
    if reduction == "none":
        zero = x.flatten()[:0].sum()
        return torch.stack([losses.get(place, zero) for place in product(range(N), *map(range, axes))]).view(
            labels.shape
        )
    key = {"group": group_of.get, "image": lambda place: place[0], "anchor": lambda place: 0}[reduction]
    sets = defaultdict(list)
    for place, loss in losses.items():
        sets[key(place)].append(loss)
    if not sets:
        return x.flatten()[:0].sum()
    return torch.stack([torch.stack(members).mean() for members in sets.values()]).mean()


def anchor_loss(s: Tensor, positives: list[int], negatives: list[int], form: str) -> Tensor:
    p, mean = s[positives].logsumexp(0), s[positives].mean()
    n = s[negatives].logsumexp(0) if negatives else torch.tensor(-math.inf, dtype=s.dtype)
    everyone = s[positives + negatives].logsumexp(0)
    if form == "supcon":
        return everyone - mean
    if form == "in":
        return everyone - p + math.log(len(positives))
    return (n - p) / len(positives) if form == "paper" else n - mean


def rounding(dtype: torch.dtype, channels: int, temperature: float) -> float:
    """How far a loss may be off: a score is a product of unit vectors over the temperature, its rounding that of ``channels`` additions."""
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return unit * (channels**0.5 + 8) * (1 + 1 / temperature)


def check_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every number within ``tolerance`` of the largest (and of 1)."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double().cpu() - expected.double().cpu()).abs().max().item() if actual.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if actual.numel() else 1.0
    assert error <= tolerance * scale, f"off by {error:.3g}, allowed {tolerance * scale:.3g}"
