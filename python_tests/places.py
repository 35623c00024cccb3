# SPDX-License-Identifier: MIT
"""Where tests of ops run: on a device, by the kernels or by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from protokernels import _native, backend


@dataclass(frozen=True)
class Place:
    """Where a test runs: a device and one of the two backends."""

    device: str
    backend: str

    @contextmanager
    def selected(self) -> Iterator[Place]:
        with backend.use(self.backend):
            yield self

    def seeded(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The type that torch gives new tensors which name none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


needs_native = pytest.mark.skipif(_native.LIBRARY is None, reason=f"the native library is not built: {_native.PROBLEM}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
PLACES = [
    pytest.param(Place("cpu", "native"), id="cpu-native", marks=needs_native),
    pytest.param(Place("cpu", "reference"), id="cpu-reference"),
    pytest.param(Place("cuda", "native"), id="cuda-native", marks=[pytest.mark.cuda, needs_native, needs_gpu]),
]
NATIVE_PLACES = [p for p in PLACES if p.id != "cpu-reference"]
