# SPDX-License-Identifier: MIT
"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; afterwards each of its parts is in the mode it was in, which ``model.train()`` would not give back
    to a part that differs from the whole, such as batch normalisation with frozen statistics."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
