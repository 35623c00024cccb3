# SPDX-License-Identifier: MIT
"""DenseCL: contrastive learning of whole images and of corresponding positions of the dense maps.

X. Wang, R. Zhang, C. Shen, T. Kong, L. Li. Dense Contrastive Learning for Self-Supervised Visual Pre-Training. CVPR 2021. On
MoCo's frame (a key encoder that follows by moving average, queues of former keys as negatives), with unit vectors:

    L = (1 - lambda) L_q + lambda L_r                                                                  (Eq. 3)
    L_q: InfoNCE of the pooled query against the other view's pooled key, negatives from the queue     (Eq. 1)
    L_r: the same per position s of the map: the positive is the key r_{c(s)} of the other view, the negatives are
         pooled dense keys of other images; mean over positions                                        (Eq. 2)
    c(s) = argmax_s' f_s . f'_s', the most similar position of the two encoders' maps (section 3.3)

    InfoNCE = -log( exp(q . k / tau) / (exp(q . k / tau) + sum_{k-} exp(q . k- / tau)) )

The first view is the query, the second the key, as there. Keys are gathered over processes; batches are not shuffled between
them, because their batch normalisation is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import pooled
from ..training import gather_batch
from ..training.self_supervised import Method, PretrainingConfig, frozen_copy, move_towards
from .common import Baseline, in_float32, spread


@dataclass(frozen=True)
class DenseCLConfig(PretrainingConfig):
    """The shared settings and DenseCL's own."""

    temperature: float = 0.2  # tau
    dense_weight: float = 0.5  # lambda
    momentum: float = 0.99  # of the key encoder; the paper's 0.999 is for 1000 times as many steps
    queue_size: int = 512
    hidden_dim: int = 256
    output_dim: int = 128

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"momentum": 0.999, "queue_size": 65536, "hidden_dim": 2048}
    }
    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature", "hidden_dim", "output_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1 or not 0 <= self.dense_weight <= 1 or self.queue_size < 1:
            raise ValueError(
                "DenseCLConfig: momentum and dense_weight must lie in [0, 1] and queue_size be at least 1; got "
                f"{self.momentum}, {self.dense_weight}, {self.queue_size}"
            )


@in_float32
def info_nce(
    query: Tensor,  # [N, D] unit vectors
    key: Tensor,  # [N, D] unit vectors, no gradient
    negatives: Tensor,  # [Q, D] unit vectors, no gradient
    temperature: float,
) -> Tensor:  # []
    """Eq. 1, mean over queries."""
    positive = (query * key.detach()).sum(dim=1, keepdim=True)
    scores = torch.cat([positive, query @ negatives.detach().T], dim=1) / temperature
    return F.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))


@in_float32
def correspondence(query_map: Tensor, key_map: Tensor) -> Tensor:  # [B, D, S], [B, D, S'] -> [B, S] int64
    """Section 3.3: for every position of the query's map the most similar one of the key's; ties go to the lower index."""
    similarity = F.normalize(query_map, dim=1).transpose(1, 2) @ F.normalize(key_map, dim=1)
    return similarity.argmax(dim=2)


class Heads(nn.Module):
    """The global head on the pooled map and the dense head on every position.

    Shape: [B, C, h, w] -> [B, D] and [B, D, h * w], unit vectors along D.
    """

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))
        self.dense = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out, 1))

    def forward(self, dense_map: Tensor) -> tuple[Tensor, Tensor]:
        whole, positions = self.whole(pooled(dense_map)), self.dense(dense_map).flatten(2)
        return F.normalize(whole.float(), dim=1), F.normalize(positions.float(), dim=1)


class DenseCL(Method):
    """Query encoder and heads, key encoder and heads, two queues."""

    whole_queue: Tensor  # [Q, D]
    dense_queue: Tensor  # [Q, D]
    position: Tensor  # [] int64: where the next keys go

    def __init__(self, config: DenseCLConfig, channels: int) -> None:
        super().__init__()
        self.encoder = config.make_encoder(channels)

        def heads() -> Heads:
            return Heads(self.encoder.dim, config.hidden_dim, config.output_dim)

        self.heads = heads()
        self.key_encoder = frozen_copy(self.encoder, lambda: config.make_encoder(channels))
        self.key_heads = frozen_copy(self.heads, heads)
        for name in ("whole_queue", "dense_queue"):  # random directions until the first keys have replaced them
            self.register_buffer(name, F.normalize(torch.randn(config.queue_size, config.output_dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.temperature, self.dense_weight, self.momentum = config.temperature, config.dense_weight, config.momentum

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        query_map = self.encoder(first)
        whole, dense = self.heads(query_map)
        with torch.no_grad():
            key_map = self.key_encoder(second)
            whole_key, dense_key = self.key_heads(key_map)
            match = correspondence(query_map.flatten(2), key_map.flatten(2))  # [B, S]
            matched = dense_key.gather(2, match[:, None].expand(-1, dense_key.shape[1], -1))
        negatives = self.whole_queue.clone(), self.dense_queue.clone()  # the backward pass needs them as they are now
        whole_loss = info_nce(whole, whole_key, negatives[0], self.temperature)
        queries, keys = (x.transpose(1, 2).flatten(0, 1) for x in (dense, matched))
        dense_loss = info_nce(queries, keys, negatives[1], self.temperature)
        self._enqueue(whole_key, F.normalize(dense_key.mean(dim=2), dim=1))
        loss = (1 - self.dense_weight) * whole_loss + self.dense_weight * dense_loss
        return {"loss": loss, "whole": whole_loss, "dense": dense_loss, "spread": spread(whole)}

    @torch.no_grad()
    def _enqueue(self, whole: Tensor, dense: Tensor) -> None:  # [B, D] each
        """The newest keys replace the oldest; of a batch larger than the queue the last ones stay."""
        if not self.training:
            return
        size = len(self.whole_queue)
        whole, dense = (gather_batch(keys)[-size:] for keys in (whole, dense))
        places = (self.position + torch.arange(len(whole), device=whole.device)) % size
        self.whole_queue.index_copy_(0, places, whole)
        self.dense_queue.index_copy_(0, places, dense)
        self.position.add_(len(whole)).remainder_(size)

    def after_step(self, progress: float) -> None:
        move_towards(self.key_encoder, self.encoder, self.momentum)
        move_towards(self.key_heads, self.heads, self.momentum)


BASELINE = Baseline("densecl", DenseCLConfig, DenseCL, __doc__)
