# SPDX-License-Identifier: MIT
"""Normal noise that a counter determines: Philox4x32-10 and the Box-Muller transform, in plain PyTorch.

J. Salmon, M. Moraes, R. Dror, D. Shaw. Parallel random numbers: as easy as 1, 2, 3. SC 2011. A number depends on the sample's seed and on
its place in the sample and on nothing else: not on the batch, the order of computation or the device.

One round on the counter (c0, c1, c2, c3) with the key (k0, k1), where (h0, l0) and (h1, l1) are the high and low halves of M0 c0 and M1 c2:

    (c0, c1, c2, c3) <- (h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0)        (k0, k1) <- (k0 + W0, k1 + W1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 of 32-bit words that are held in int64 tensors; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # modulo 2^64: the sign is the 64th bit
        high0, high1 = (first >> 32) & MASK, (second >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, second & MASK, high0 ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def normal(
    seed: Tensor,  # [B] int64
    count: int,
) -> Tensor:  # [B, count] float64
    """``count`` standard normal numbers for each seed.

    Number i takes word i mod 4 of the counter (i / 4 low, i / 4 high, 0, 0): words 0 and 1 give, with u1 = (w0 + 1/2) / 2^32 and
    u2 = w1 / 2^32, sqrt(-2 ln u1) times cos(2 pi u2) and sin(2 pi u2); words 2 and 3 likewise.
    """
    block = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    key = ((seed & MASK).unsqueeze(1), ((seed >> 32) & MASK).unsqueeze(1))
    w0, w1, w2, w3 = philox((block & MASK, block >> 32, zero, zero), key)
    numbers = (*_box_muller(w0, w1), *_box_muller(w2, w3))
    return torch.stack(numbers, dim=2).flatten(1)[:, :count]


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    length = (-2.0 * ((first.double() + 0.5) / 2**32).log()).sqrt()
    angle = second.double() * (2 * math.pi / 2**32)
    return length * angle.cos(), length * angle.sin()
