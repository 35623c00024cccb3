# SPDX-License-Identifier: MIT
"""Randomness as a function of (seed, purpose, position), so that a resumed run and a run on more processes draw the
same numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def derived_seed(seed: int, *position: int | str) -> int:
    """A 63-bit seed for one purpose at one position of a run, e.g. ``derived_seed(0, "noise", epoch, step)``."""
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_generator(seed: int, *position: int | str) -> torch.Generator:
    """A CPU generator started from :func:`derived_seed`; the same numbers on every device and in every process."""
    return torch.Generator().manual_seed(derived_seed(seed, *position))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:  # [count] int64
    """The order in which an epoch visits ``count`` images: a permutation that depends on nothing but seed and epoch."""
    return torch.randperm(count, generator=derived_generator(seed, "order", epoch))


def seed_everything(seed: int) -> None:
    """Seeds Python and torch on all devices and asks cuDNN for deterministic algorithms."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def own_settings() -> Iterator[None]:
    """Around what a run does: with gradients and float32 as torch's defaults, whatever the caller has set; afterwards the
    caller's random numbers and settings are as they were."""
    state, dtype = random_state(), torch.get_default_dtype()
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
        set_random_state(state)


def random_state() -> dict[str, Any]:
    """The state of the global generators of Python and torch, in types that a ``weights_only`` checkpoint may hold."""
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned; device generators only where the number of devices is the same."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
