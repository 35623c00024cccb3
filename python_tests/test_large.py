# SPDX-License-Identifier: MIT
"""More than 2^31 elements, or pairs: every product of sizes must be counted in 64 bits. What lies behind the end of 32 bits is looked at.

Skipped unless PROTOKERNELS_LARGE is set: each test needs up to 9 GB of memory and minutes. Inputs are zeros, which the system
does not store, with something in their last rows.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import protokernels
from python_tests.places import needs_native

pytestmark = [
    needs_native,
    pytest.mark.skipif(not os.environ.get("PROTOKERNELS_LARGE"), reason="9 GB and minutes; set PROTOKERNELS_LARGE=1"),
]

LIMIT = 2**31


def mostly_zero(rows: int, columns: int, last: Tensor) -> Tensor:
    x = torch.zeros(rows, columns, dtype=torch.bfloat16)
    x[-len(last) :] = last
    assert x.numel() > LIMIT
    return x


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_prototypes() -> None:
    last, prototypes = draw(100, 1024), torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    z = mostly_zero(LIMIT // 1024 + 500, 1024, last)
    step = protokernels.prototype_step(z, prototypes, temperature=0.1, new_weight=1.0)
    small = protokernels.prototype_step(last, prototypes, temperature=0.1, new_weight=1.0)
    assert torch.equal(step.assignment[-100:], small.assignment)
    torch.testing.assert_close(step.assignment[:-100], torch.full_like(step.assignment[:-100], 1 / 3))
    assert torch.equal(step.counts - small.counts, torch.tensor([len(z) - 100, 0, 0]))
    torch.testing.assert_close(step.sums, small.sums, rtol=1e-12, atol=1e-12)


def test_prototypes_with_more_assignments() -> None:
    z, prototypes = draw(70_000, 2), draw(LIMIT // 70_000 + 10, 2)
    c = protokernels.soft_assign(z, prototypes, temperature=1.0)
    assert isinstance(c, Tensor) and c.numel() > LIMIT
    assert torch.equal(c[-50:], protokernels.soft_assign(z[-50:].clone(), prototypes, temperature=1.0))


def test_nearest() -> None:
    last = draw(100, 1024)
    bank = mostly_zero(LIMIT // 1024 + 500, 1024, last)
    found = protokernels.nearest(last[:3] * 1.01, bank, k=1)
    assert found.indices[:, 0].tolist() == [len(bank) - 100, len(bank) - 99, len(bank) - 98]


def test_sinkhorn_features() -> None:
    x = draw(47_000, 2).float()
    result = protokernels.sinkhorn_features(x, x, cost="sqeuclidean", epsilon=10.0, num_iters=1)
    assert len(x) ** 2 > LIMIT
    v = torch.full((len(x),), 0.0, dtype=torch.float64)
    rows = torch.tensor(
        [0, 20_000, len(x) - 1]
    )  # after the only iteration: g = -epsilon LSE_i(u_i - C_ij / epsilon) + epsilon log b
    cost = (x[rows].double().unsqueeze(1) - x.double()).square().sum(2)
    f = -10.0 * ((v - cost / 10.0).logsumexp(1) + torch.tensor(float(len(x))).log())
    torch.testing.assert_close(result.f[rows].double(), f, rtol=1e-4, atol=1e-4)


def test_contrastive() -> None:
    x = draw(47_000, 4).float().requires_grad_()
    labels = torch.arange(len(x)) % 7
    losses = protokernels.supcon_loss(x, labels, temperature=0.5, reduction="none")
    losses[-1].backward()
    assert len(x) ** 2 > LIMIT and x.grad is not None and x.grad[-1].abs().sum() > 0
    unit = torch.nn.functional.normalize(x.detach().double(), dim=1)
    s = unit @ unit[-1] / 0.5
    same = labels == labels[-1]
    same[-1] = False
    expected = s[:-1].logsumexp(0) - s[same].mean()
    torch.testing.assert_close(losses[-1].double().detach(), expected, rtol=1e-5, atol=1e-5)


def test_warp() -> None:
    images = torch.zeros(LIMIT // (1 << 20) + 1, 1, 1024, 1024, dtype=torch.bfloat16)
    images[-1, 0] = draw(1024, 1024)
    assert images.numel() > LIMIT
    flipped = protokernels.blend_flip(images, 1.0)
    assert torch.equal(flipped[-1], images[-1].flip(-1)) and not flipped[:2].any()
