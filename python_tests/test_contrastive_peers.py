# SPDX-License-Identifier: MIT
"""The op `contrastive` against other people's losses where they mean the same: pytorch-metric-learning, if installed, and the SupCon that
was released."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels import nt_xent_loss, supcon_loss
from python_tests.places import PLACES, Place

N, D = 24, 9


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


@pytest.fixture
def peers() -> Any:
    return pytest.importorskip(
        "pytorch_metric_learning.losses",
        reason="pytorch-metric-learning is not installed; pip install pytorch-metric-learning",
    )


def draw(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(place: Place, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    """Values and gradients of N embeddings."""
    x, y = draw().to(place.device).requires_grad_(), draw().requires_grad_()
    found, expected = ours(x), theirs(y)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=0)
    (by_ours,), (by_theirs,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, y)
    torch.testing.assert_close(by_ours.cpu(), by_theirs, rtol=1e-8, atol=1e-12)


def released_supcon(x: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The class SupConLoss that Khosla et al. released, of unit vectors, with its two temperatures equal: the largest score of a row is
    subtracted, the row itself masked out, and the mean taken over all rows, of which each has a positive where there are two views."""
    z = torch.nn.functional.normalize(x, dim=1)
    logits = z @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype)
    positives = (labels[:, None] == labels).to(z.dtype) * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_prob).sum(1) / positives.sum(1)).mean()


class TestValue:
    @pytest.mark.parametrize("temperature", [0.07, 0.1, 0.7])
    def test_supcon_of_two_views_as_released(self, place: Place, temperature: float) -> None:
        labels = (torch.arange(N // 2) % 5).repeat(2)
        agree(
            place,
            lambda x: supcon_loss(x, labels.to(place.device), temperature=temperature),
            lambda x: released_supcon(x, labels, temperature),
        )

    @pytest.mark.parametrize("temperature", [0.07, 0.1, 0.7])
    def test_supcon_of_pytorch_metric_learning(self, place: Place, peers: Any, temperature: float) -> None:
        labels = torch.tensor([*range(4)] * 5 + [10, 11, 12, 13])  # the last four have no partner and are left out
        agree(
            place,
            lambda x: supcon_loss(x, labels.to(place.device), temperature=temperature),
            lambda x: peers.SupConLoss(temperature=temperature)(x, labels),
        )

    @pytest.mark.parametrize("temperature", [0.07, 0.5])
    def test_nt_xent_of_pytorch_metric_learning(self, place: Place, peers: Any, temperature: float) -> None:
        pairs = torch.arange(N // 2).repeat(2)
        agree(
            place,
            lambda x: nt_xent_loss(*x.chunk(2), temperature=temperature),
            lambda x: peers.NTXentLoss(temperature=temperature)(x, pairs),
        )
