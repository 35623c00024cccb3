# SPDX-License-Identifier: MIT
"""Contrastive losses in plain PyTorch: every group of vectors as a matrix of scores with a mask for each role.

For an anchor i and the vectors j it meets without itself, those of its own class P and the others N:

    s_ij = <f_i, f_j> / temperature          p = log sum_P exp s          n = log sum_N exp s

    supcon   logaddexp(p, n) - mean_P s      (Khosla et al. 2020, L_out; the code of Hu et al. 2021)
    in       logaddexp(p, n) - p + log |P|   (Khosla et al. 2020, L_in)
    paper    (n - p) / |P|                   (Hu et al. 2021, Eq. 2)
    negout   n - mean_P s                    (positives left out of the denominator)

Without positives a vector is no anchor, nor without negatives for ``paper`` and ``negout``. Half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from ._precision import without_autocast
from .prototypes import compute_dtype, unit_vectors

FORMS = ("supcon", "in", "paper", "negout")
"""The order is that of the native enumeration."""
NEEDS_NEGATIVES = ("paper", "negout")


def local_contrastive_loss(
    features: Tensor,  # [N, C, D, H, W]
    labels: Tensor,  # [N, D, H, W] int64
    *,
    temperature: float,
    block: Sequence[int],  # of each axis; 0: the whole axis
    stride: Sequence[int],  # of each axis
    per_image: bool,
    drop_remainder: bool,
    background: int | None,
    ignore_index: int | None,
    form: str,
    reduction: str,
    normalize: bool,
) -> Tensor:  # [], or [N, D, H, W] for the reduction "none"
    vectors = features.flatten(2).transpose(1, 2).flatten(0, 1)  # [N D H W, C]
    vectors = prepared(vectors, normalize)
    flat = labels.flatten()
    losses = connected_zero(vectors).expand(len(flat))
    anchors = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    means = []
    for group in positions(labels.shape, block, stride, per_image, drop_remainder, labels.device):
        if ignore_index is not None:
            group = group[flat[group] != ignore_index]
        group_losses, found = group_loss(vectors[group], flat[group], background, temperature, form)
        losses = losses.index_put((group,), group_losses)
        anchors[group] = found
        means.append((group_losses.sum(), found.sum()))
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "anchor":
        means = [(losses.sum(), anchors.sum())]
    elif reduction == "image":
        maps = (len(labels), math.prod(labels.shape[1:]))
        means = list(zip(losses.view(maps).sum(1), anchors.view(maps).sum(1), strict=True))
    return mean_of_means(means, vectors)


def supcon_loss(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    *,
    temperature: float,
    ignore_index: int | None,
    form: str,
    normalize: bool,
    reduction: str,
) -> Tensor:  # [], or [N]
    vectors = prepared(embeddings, normalize)
    kept = torch.arange(len(labels), device=labels.device)
    if ignore_index is not None:
        kept = kept[labels != ignore_index]
    losses, anchors = group_loss(vectors[kept], labels[kept], None, temperature, form)
    if reduction == "none":
        return connected_zero(vectors).expand(len(labels)).index_put((kept,), losses)
    return mean_of_means([(losses.sum(), anchors.sum())], vectors)


def cross_view_loss(
    first: Tensor,  # [N, D]
    second: Tensor,  # [N, D]
    *,
    temperature: float,
    form: str,
    normalize: bool,
) -> Tensor:  # []
    """From the first view to the second: the positive of row i is row i of the other view, the negatives are its other rows."""
    same = torch.eye(len(first), dtype=torch.bool, device=first.device)
    first, second = prepared(first, normalize), prepared(second, normalize)
    losses, anchors = pair_losses(first, second, same, ~same, temperature, form)
    return mean_of_means([(losses.sum(), anchors.sum())], losses)


def prepared(vectors: Tensor, normalize: bool) -> Tensor:  # [R, C] -> [R, C] float32 or float64
    vectors = vectors.to(compute_dtype(vectors))
    return unit_vectors(vectors) if normalize else vectors


def positions(
    shape: Sequence[int],  # of the labels: N, D, H, W
    block: Sequence[int],
    stride: Sequence[int],
    per_image: bool,
    drop_remainder: bool,
    device: torch.device,
) -> Iterator[Tensor]:  # [group size] int64
    """For every group the places of its vectors in the flattened labels."""
    place = torch.arange(math.prod(shape), device=device).view(*shape)
    place = place[:, :: stride[0], :: stride[1], :: stride[2]]
    grid = place.shape[1:]
    # a block counts places of the map, the grid has every stride-th of them
    edges = [max(1, edge // step if edge else length) for edge, step, length in zip(block, stride, grid, strict=True)]
    ends = [length // edge * edge if drop_remainder else length for edge, length in zip(edges, grid, strict=True)]
    corners = product(*(range(0, end, edge) for edge, end in zip(edges, ends, strict=True)))
    for z, y, x in corners:
        part = place[:, z : z + edges[0], y : y + edges[1], x : x + edges[2]]
        yield from part.flatten(1) if per_image else [part.flatten()]


def group_loss(
    vectors: Tensor,  # [S, C]
    labels: Tensor,  # [S]
    background: int | None,
    temperature: float,
    form: str,
) -> tuple[Tensor, Tensor]:  # losses [S], which of them are anchors [S]
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    losses, anchors = pair_losses(vectors, vectors, positive, ~same, temperature, form)
    if background is not None:
        anchors = anchors & (labels != background)
    return torch.where(anchors, losses, connected_zero(vectors)), anchors


def pair_losses(
    rows: Tensor,  # [R, C]
    columns: Tensor,  # [M, C]
    positive: Tensor,  # [R, M] bool
    negative: Tensor,  # [R, M] bool
    temperature: float,
    form: str,
) -> tuple[Tensor, Tensor]:  # losses [R], which of them are anchors [R]
    with without_autocast(rows.device.type):
        s = rows @ columns.T / temperature
    p, n = masked_logsumexp(s, positive), masked_logsumexp(s, negative)
    linear = torch.where(positive, s, 0.0).sum(1)
    return losses_of(p, n, linear, positive.sum(1), negative.sum(1), form)


def masked_logsumexp(s: Tensor, mask: Tensor) -> Tensor:  # [R, M], [R, M] -> [R]; -inf without any
    some = mask.any(1)
    kept = torch.where(some.unsqueeze(1), s.masked_fill(~mask, -torch.inf), 0.0)
    return torch.where(some, kept.logsumexp(1), -torch.inf) if s.shape[1] else s.new_full((len(s),), -torch.inf)


def losses_of(
    p: Tensor,  # [R]
    n: Tensor,  # [R]
    linear: Tensor,  # [R], sum of the scores of the positives
    positives: Tensor,  # [R] integer
    negatives: Tensor,  # [R] integer
    form: str,
) -> tuple[Tensor, Tensor]:  # losses [R], 0 where there is no anchor; which of them are anchors [R]
    """The four forms, from the statistics of every row."""
    anchors = positives > 0
    if form in NEEDS_NEGATIVES:
        anchors = anchors & (negatives > 0)
    count = positives.clamp(min=1).to(p.dtype)
    p = torch.where(anchors, p, 0.0)
    has_negatives = anchors & (negatives > 0)
    n = torch.where(has_negatives, n, 0.0)
    everyone = torch.where(has_negatives, torch.logaddexp(p, n), p)
    if form == "supcon":
        losses = everyone - linear / count
    elif form == "in":
        losses = everyone - p + count.log()
    elif form == "paper":
        losses = (n - p) / count
    else:
        losses = n - linear / count
    return torch.where(anchors, losses, 0.0), anchors


def mean_of_means(sums: Sequence[tuple[Tensor, Tensor]], vectors: Tensor) -> Tensor:  # (sum, count) each -> []
    """Mean over the sets that have anchors of the mean over a set's anchors; an exact 0 where none has."""
    if not sums:
        return connected_zero(vectors)
    total, count = (torch.stack(values) for values in zip(*sums, strict=True))
    means = total / count.clamp(min=1)
    return means.sum() / (count > 0).sum().clamp(min=1) + connected_zero(vectors)


def connected_zero(vectors: Tensor) -> Tensor:  # [R, C] -> []
    """A zero in the graph: its gradient is one of zeros."""
    return vectors[:0].sum()
