# SPDX-License-Identifier: MIT
"""Other people's ways to a supervised contrastive loss, each as its users write it: value and gradient by the features.

A function of `LOCAL` takes a `LocalProblem`, one of `EMBEDDINGS` an `EmbeddingProblem`, one of `VIEWS` a `ViewsProblem`, and gives a call
that runs forward and backward from the features as they come. The first two compute Khosla's L_out with the positives in the denominator,
mean over the anchors of a block, then over blocks; the third InfoNCE between two views in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class LocalProblem:
    features: Tensor  # [N, C, H, W]
    labels: Tensor  # [N, H, W], 0 is background
    block: int  # 0: one block
    stride: int
    temperature: float


@dataclass(frozen=True)
class EmbeddingProblem:
    embeddings: Tensor  # [N, D]
    labels: Tensor  # [N]
    temperature: float


@dataclass(frozen=True)
class ViewsProblem:
    first: Tensor  # [N, D]
    second: Tensor  # [N, D]
    temperature: float


def masked_losses(
    f: Tensor, y: Tensor, anchors: Tensor, temperature: float
) -> Tensor:  # [..., S, C], [..., S] -> [...]
    """Mean over the anchors of every group, from the matrix of all scores and two masks."""
    s = f @ f.mT / temperature
    others = ~torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    same = (y.unsqueeze(-1) == y.unsqueeze(-2)) & others
    log_p = s - s.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    count = same.sum(-1)
    losses = -torch.where(same, log_p, 0.0).sum(-1) / count.clamp(min=1)
    kept = anchors & (count > 0)
    return torch.where(kept, losses, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


def blocks(p: LocalProblem, x: Tensor) -> Tensor:  # [N, C, H, W] -> [groups, S, C]
    N, C, H, W = x.shape
    if not p.block:
        return x[:, :, :: p.stride, :: p.stride].permute(0, 2, 3, 1).reshape(1, -1, C)
    b = p.block
    return x.view(N, C, H // b, b, W // b, b).permute(2, 4, 0, 3, 5, 1).reshape(-1, N * b * b, C)


def all_blocks_at_once(p: LocalProblem, x: Tensor) -> Tensor:
    f, y = F.normalize(blocks(p, x), dim=-1), blocks(p, p.labels.unsqueeze(1).float()).squeeze(-1)
    losses = masked_losses(f, y, y > 0, p.temperature)
    filled = (y > 0).any(-1)
    return losses.sum() / filled.sum().clamp(min=1)


def block_by_block(p: LocalProblem, x: Tensor) -> Tensor:
    """The loop of the released code: for every block with foreground a matrix of all its pixels by a 1 x 1 convolution, exponentials of
    it without a maximum, masks, logarithms."""
    f, y = F.normalize(x, dim=1), p.labels
    b = p.block or max(x.shape[2:])
    if not p.block:
        f, y = f[:, :, :: p.stride, :: p.stride], y[:, :: p.stride, :: p.stride]
    losses = []
    for top in range(0, f.shape[2], b):
        for left in range(0, f.shape[3], b):
            part, classes = f[:, :, top : top + b, left : left + b], y[:, top : top + b, left : left + b].flatten()
            if not classes.any():
                continue
            vectors = part.permute(0, 2, 3, 1).flatten(0, 2)  # [S, C]
            s = F.conv2d(vectors.T[None, :, :, None], vectors[:, :, None, None])[0, :, :, 0] / p.temperature
            others = 1 - torch.eye(len(classes))
            same = (classes[:, None] == classes[None, :]).float() * others
            log_p = s - ((s.exp() * others).sum(1, keepdim=True)).log()
            foreground = classes > 0
            losses.append(-((same * log_p).sum(1) / same.sum(1))[foreground].mean())
    return torch.stack(losses).mean()


def of_local(loss: Callable[[LocalProblem, Tensor], Tensor], compiled: bool = False) -> Callable[[LocalProblem], Call]:
    def prepare(p: LocalProblem) -> Call:
        leaf = p.features.detach().clone().requires_grad_()
        run = torch.compile(loss, dynamic=False) if compiled else loss
        return lambda: torch.autograd.grad(run(p, leaf), leaf)[0]

    return prepare


def plain_supcon(x: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return masked_losses(F.normalize(x, dim=1), labels, torch.ones_like(labels, dtype=torch.bool), temperature)


def of_embeddings(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[EmbeddingProblem], Call]:
    def prepare(p: EmbeddingProblem) -> Call:
        leaf = p.embeddings.detach().clone().requires_grad_()
        return lambda: torch.autograd.grad(loss(leaf, p.labels, p.temperature), leaf)[0]

    return prepare


def compiled_supcon(p: EmbeddingProblem) -> Call:
    return of_embeddings(torch.compile(plain_supcon, dynamic=False))(p)


def metric_learning_supcon(p: EmbeddingProblem) -> Call:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=p.temperature)
    return of_embeddings(lambda x, labels, _temperature: loss(x, labels))(p)


def plain_info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """As open_clip has it: one matrix of scores, cross-entropy of its rows and of its columns."""
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    own = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def of_views(loss: Callable[[Tensor, Tensor, float], Tensor], compiled: bool = False) -> Callable[[ViewsProblem], Call]:
    def prepare(p: ViewsProblem) -> Call:
        leaves = [x.detach().clone().requires_grad_() for x in (p.first, p.second)]
        run = torch.compile(loss, dynamic=False) if compiled else loss
        return lambda: torch.cat(torch.autograd.grad(run(*leaves, p.temperature), leaves))

    return prepare


LOCAL: dict[str, tuple[str, Callable[[LocalProblem], Call]]] = {
    "torch": ("torch", of_local(all_blocks_at_once)),
    "torch.compile": ("torch", of_local(all_blocks_at_once, compiled=True)),
    "torch, block by block": ("torch", of_local(block_by_block)),
}
EMBEDDINGS: dict[str, tuple[str, Callable[[EmbeddingProblem], Call]]] = {
    "torch": ("torch", of_embeddings(plain_supcon)),
    "torch.compile": ("torch", compiled_supcon),
    "pytorch-metric-learning": ("pytorch_metric_learning", metric_learning_supcon),
}
VIEWS: dict[str, tuple[str, Callable[[ViewsProblem], Call]]] = {
    "torch": ("torch", of_views(plain_info_nce)),
    "torch.compile": ("torch", of_views(plain_info_nce, compiled=True)),
}
