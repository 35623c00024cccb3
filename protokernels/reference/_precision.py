# SPDX-License-Identifier: MIT
"""The floating-point type that matrix products of the reference keep."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AUTOCAST = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone", "maia")
    if torch.amp.is_autocast_available(name)
)
"""Asked at import, because torch.compile cannot trace the question in torch 2.10 and 2.11."""


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, where that kind of device has any: a product keeps the type of its factors."""
    known = device_type in _AUTOCAST
    if not known and not torch.compiler.is_compiling():
        known = torch.amp.is_autocast_available(device_type)  # a device registered under a name of its own
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
