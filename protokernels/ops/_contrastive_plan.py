# SPDX-License-Identifier: MIT
"""Which vectors meet which, worked out from the labels in torch: the oracle of the native plans.

A plan is four tensors, as csrc/ops/contrastive.h describes them: ``order`` [R] int64, the place of every row in the flattened labels;
``groups`` [G, 6] int32, first row, end of the anchors and end of the rows of every group, then the same of its columns; ``ranges`` [R,
3] int32, the columns of a row's own class and the column that is the row itself; ``weights`` [R] float64, a row's part in the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.contrastive import FORMS, NEEDS_NEGATIVES

REDUCTIONS = ("group", "anchor", "image")
"""The order is that of the native enumeration."""


class Plan(NamedTuple):
    """See the module's docstring."""

    order: Tensor  # [R] int64
    groups: Tensor  # [G, 6] int32
    ranges: Tensor  # [R, 3] int32
    weights: Tensor  # [R] float64


def blocks_of(length: int, block: int, stride: int, drop_remainder: bool) -> tuple[int, int, int]:
    """Along one axis: places on the grid that take part, places in a block, number of blocks."""
    grid = (length + stride - 1) // stride
    if block == 0:
        return grid, max(grid, 1), min(grid, 1)
    edge = max(block // stride, 1)
    count = grid // edge if drop_remainder else (grid + edge - 1) // edge
    return count * edge if drop_remainder else grid, edge, count


def plan_sizes(
    shape: Sequence[int], block: Sequence[int], stride: Sequence[int], per_image: bool, drop_remainder: bool
) -> tuple[int, int]:
    """Numbers of rows and of groups, R and G."""
    rows, groups = shape[0], shape[0] if per_image else 1
    for length, edge, step in zip(shape[1:], block, stride, strict=True):
        kept, _, count = blocks_of(length, edge, step, drop_remainder)
        rows, groups = rows * kept, groups * count
    return rows, groups


def plan_in_torch(
    labels: Tensor,  # [N, D, H, W] int64
    block: Sequence[int],
    stride: Sequence[int],
    per_image: bool,
    drop_remainder: bool,
    background: int | None,
    ignore_index: int | None,
    form: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What contrastive_plan returns: rows sorted by group, role and class; groups run over blocks and, if ``per_image``, over maps."""
    N, device = labels.shape[0], labels.device
    _, G = plan_sizes(labels.shape, block, stride, per_image, drop_remainder)
    place = torch.arange(labels.numel(), device=device).view(labels.shape)
    group = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (edge, step) in enumerate(zip(block, stride, strict=True)):
        kept, edge, count = blocks_of(labels.shape[1 + axis], edge, step, drop_remainder)
        place = place.narrow(1 + axis, 0, labels.shape[1 + axis])[
            (slice(None),) * (1 + axis) + (slice(None, None, step),)
        ]
        place = place.narrow(1 + axis, 0, kept)
        index = torch.arange(kept, device=device) // edge
        group = group * count + index.view(-1, *(1,) * (2 - axis))
    image = torch.arange(N, device=device).view(-1, 1, 1, 1)
    group = (group * N + image if per_image else group).expand(place.shape).flatten()
    place = place.flatten()
    label = labels.flatten()[place]

    role = torch.zeros_like(label)  # 0: has anchors, 1: background, 2: ignored
    if background is not None:
        role = role.masked_fill(label == background, 1)
    if ignore_index is not None:
        role = role.masked_fill(label == ignore_index, 2)
    by_label = label.argsort(stable=True)
    key = group * 3 + role
    order = by_label[key[by_label].argsort(stable=True)]
    place, label, key = place[order], label[order], key[order]

    starts = torch.arange(G, device=device) * 3
    limits = torch.searchsorted(key, torch.stack([starts, starts + 1, starts + 2], dim=1))  # [G, 3]
    groups = torch.cat([limits, limits], dim=1).to(torch.int32)
    rows = torch.arange(len(key), device=device)
    changes = torch.ones(len(key), dtype=torch.bool, device=device)
    changes[1:] = (key[1:] != key[:-1]) | (label[1:] != label[:-1])
    begin = torch.where(changes, rows, 0).cummax(0).values if len(key) else rows
    last = torch.roll(changes, -1, 0)  # the last row of a class comes before a change; the first row always is one
    end = torch.where(last, rows + 1, len(key)).flip(0).cummin(0).values.flip(0) if len(key) else rows
    takes_part = key % 3 != 2
    none = torch.tensor(0, device=device)
    ranges = torch.stack(
        [
            torch.where(takes_part, begin, none),
            torch.where(takes_part, end, none),
            torch.where(takes_part, rows, none - 1),
        ],
        dim=1,
    ).to(torch.int32)

    in_class = end - begin
    of_group = key // 3
    anchors = (key % 3 == 0) & (in_class > 1)
    if FORMS[form] in NEEDS_NEGATIVES and G:
        anchors = anchors & (limits[of_group, 2] - limits[of_group, 0] > in_class)
    weights = _weights(
        anchors, of_group, place // max(labels[0].numel(), 1) if N else place, G, N, REDUCTIONS[reduction]
    )
    return place, groups, ranges, weights


def _weights(anchors: Tensor, group: Tensor, image: Tensor, G: int, N: int, reduction: str) -> Tensor:
    if reduction == "anchor":
        return anchors / anchors.sum().clamp(min=1).double()
    of, sets = (group, G) if reduction == "group" else (image, N)
    counts = torch.zeros(sets, dtype=torch.int64, device=of.device).index_add(0, of, anchors.long())
    share = 1 / (counts.clamp(min=1).double() * (counts > 0).sum().clamp(min=1))
    return torch.where(anchors, share[of], 0.0)


def pairs_plan(count: int, device: torch.device) -> Plan:
    """What contrastive_views returns. Two views, stacked: every row's class is itself and its partner, next to each other."""
    rows = torch.arange(2 * count, device=device)
    order = (rows % 2) * count + rows // 2
    ranges = torch.stack([rows // 2 * 2, rows // 2 * 2 + 2, rows], dim=1).to(torch.int32)
    weights = torch.full((2 * count,), 1 / max(2 * count, 1), dtype=torch.float64, device=device)
    return Plan(order, _one_group(2 * count, device), ranges, weights)


def crossing_plan(count: int, symmetric: bool, device: torch.device) -> Plan:
    """What contrastive_views returns, crossing. Two views of ``count`` images, stacked: a row meets the other view only, and its class is
    its partner. Rows of the second view are anchors if ``symmetric``."""
    rows = torch.arange(2 * count, device=device)
    partner = (rows + count) % max(2 * count, 1)
    ranges = torch.stack([partner, partner + 1, rows], dim=1).to(torch.int32)
    anchors = 2 * count if symmetric else count
    first, second = (0, count, count), (count, anchors, 2 * count)
    groups = torch.tensor([[*first, *second], [*second, *first]], dtype=torch.int32).to(device)
    weights = torch.zeros(2 * count, dtype=torch.float64, device=device)
    weights[:anchors] = 1 / max(anchors, 1)
    return Plan(rows, groups, ranges, weights)


def _one_group(rows: int, device: torch.device) -> Tensor:  # [1, 6]
    return torch.tensor([[0, rows, rows] * 2], dtype=torch.int32).to(device)
