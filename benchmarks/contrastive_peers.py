# SPDX-License-Identifier: MIT
"""Other people's ways to a supervised contrastive loss, each as its users write it: value and gradient by the features.

A function of `LOCAL` takes a `LocalProblem`, one of `EMBEDDINGS` an `EmbeddingProblem`, one of `VIEWS` a `ViewsProblem`, and gives a call
that runs forward and backward from the features as they come. The first two compute Khosla's L_out with the positives in the denominator,
mean over the anchors of a block, then over blocks; the third InfoNCE between two views, in both directions or from the first to the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    symmetric: bool = True


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


ViewsLoss = Callable[[Tensor, Tensor, float, bool], Tensor]


def plain_info_nce(first: Tensor, second: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """As open_clip has it: one matrix of scores, cross-entropy of its rows and of its columns."""
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    own = torch.arange(len(first), device=first.device)
    one_way = F.cross_entropy(scores, own)
    return (one_way + F.cross_entropy(scores.T, own)) / 2 if symmetric else one_way


def of_views(loss: ViewsLoss, compiled: bool = False) -> Callable[[ViewsProblem], Call]:
    def prepare(p: ViewsProblem) -> Call:
        leaves = [x.detach().clone().requires_grad_() for x in (p.first, p.second)]
        run = torch.compile(loss, dynamic=False) if compiled else loss
        return lambda: torch.cat(torch.autograd.grad(run(*leaves, p.temperature, p.symmetric), leaves))

    return prepare


# ----------------------------------------------------------------------------------------- less than float32, on CUDA


def in_tf32(prepare: Callable[[Any], Call]) -> Callable[[Any], Call]:
    """Products of torch in tf32, forward and backward."""

    def prepared(p: Any) -> Call:
        call, settings = prepare(p), torch.backends.cuda.matmul

        def run() -> Any:
            before, settings.allow_tf32 = settings.allow_tf32, True
            try:
                return call()
            finally:
                settings.allow_tf32 = before

        return run

    return prepared


def in_bf16(prepare: Callable[[Any], Call]) -> Callable[[Any], Call]:
    """Under autocast, as in mixed-precision training: products in bfloat16, and the scores too."""

    def prepared(p: Any) -> Call:
        call = prepare(p)

        def run() -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                return call()

        return run

    return prepared


def inf_cl(p: ViewsProblem) -> Call:
    """One call for each direction, as in its example. It computes in tf32 whatever the type of its input."""
    from inf_cl import cal_inf_loss  # type: ignore[import-not-found, unused-ignore]

    own = torch.arange(len(p.first), device=p.first.device)
    scale = torch.tensor(1 / p.temperature, device=p.first.device)

    def loss(first: Tensor, second: Tensor, _temperature: float, symmetric: bool) -> Tensor:
        q, k = F.normalize(first, dim=1), F.normalize(second, dim=1)
        one_way: Tensor = cal_inf_loss(q, k, labels=own, scale=scale, head_dim=q.shape[1])
        if not symmetric:
            return one_way
        return (one_way + cal_inf_loss(k, q, labels=own, scale=scale, head_dim=q.shape[1])) / 2

    return of_views(loss)(p)


def cut_cross_entropy(p: ViewsProblem, filter_eps: str | None = None) -> Call:
    """The one view as embeddings, the other as classifier, and the other way round; it takes bfloat16, so unit vectors are rounded."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found, unused-ignore]

    own = torch.arange(len(p.first), device=p.first.device)

    def loss(first: Tensor, second: Tensor, temperature: float, symmetric: bool) -> Tensor:
        e = (F.normalize(first, dim=1) / temperature).to(torch.bfloat16)
        c = F.normalize(second, dim=1).to(torch.bfloat16)
        one_way: Tensor = linear_cross_entropy(e, c, own, filter_eps=filter_eps)
        return (one_way + linear_cross_entropy(c, e, own, filter_eps=filter_eps)) / 2 if symmetric else one_way

    return of_views(loss)(p)


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


# ---------------------------------------------------------------------------------------------------- further ones on CUDA


@dataclass(frozen=True)
class CudaPeer:
    """A peer that is measured on CUDA alone, against ours at the precision it works in."""

    module: str
    prepare: Callable[[Any], Call]
    rate: str  # of `Ceilings.rates`
    in_graph: bool = True  # False: it waits for the device, which a graph cannot hold
    allowed: float | None = None  # how far its gradient may be from ours, if not as far as the rate explains
    compared: bool = True
    leaves_out: str = ""
    largest: int = 1 << 30  # numbers in a matrix of all scores, for those who keep several; 0: it keeps none


CUDA_EMBEDDINGS = {
    "torch, tf32": CudaPeer("torch", in_tf32(of_embeddings(plain_supcon)), "tf32"),
    "torch, bf16": CudaPeer("torch", in_bf16(of_embeddings(plain_supcon)), "bf16"),
    "pytorch-metric-learning": CudaPeer(
        "pytorch_metric_learning", metric_learning_supcon, "3xtf32", in_graph=False, largest=1 << 27
    ),
}
CUDA_VIEWS = {
    "torch, tf32": CudaPeer("torch", in_tf32(of_views(plain_info_nce)), "tf32"),
    "torch, bf16": CudaPeer("torch", in_bf16(of_views(plain_info_nce)), "bf16"),
    "inf-cl": CudaPeer("inf_cl", inf_cl, "tf32", largest=0),
    # Its gradients are sums of hundreds of terms in bfloat16.
    "cut-cross-entropy": CudaPeer(
        "cut_cross_entropy", cut_cross_entropy, "bf16", in_graph=False, allowed=0.05, largest=0
    ),
    "cut-cross-entropy, filtered": CudaPeer(
        "cut_cross_entropy",
        partial(cut_cross_entropy, filter_eps="high"),
        "bf16",
        in_graph=False,
        compared=False,
        leaves_out="no gradient of blocks of scores whose derivatives are all below 0.00024",
        largest=0,
    ),
}
