# SPDX-License-Identifier: MIT
"""Labelled points for the tests of `protokernels.evaluation`."""

from __future__ import annotations

import torch
from torch import Tensor


def blobs(count: int, dim: int = 8, classes: int = 4, *, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gaussian classes whose means do not depend on ``seed``; overlapping, so that predictions are not trivial."""
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return means[labels] + spread * torch.randn(count, dim, generator=generator), labels
