# SPDX-License-Identifier: MIT
"""Which implementation runs: the compiled kernels or the same equations in plain PyTorch.

``auto`` (the default) takes the native kernels where they are built for the tensor's device and the reference
elsewhere; ``native`` insists and says what is missing; ``reference`` never touches native code. The environment variable
``PROTOKERNELS_BACKEND`` sets the start value, which is checked where it is used first.

    >>> import protokernels
    >>> with protokernels.backend.use("reference"):
    ...     protokernels.backend.get()
    'reference'
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _native

NAMES = ("auto", "native", "reference")


class NativeUnavailableError(RuntimeError):
    """The native backend was asked for and cannot serve this call."""


_current = os.environ.get("PROTOKERNELS_BACKEND", "auto")
_cuda_built: bool | None = None


def get() -> str:
    """The backend selected: ``auto``, ``native`` or ``reference``; ``ValueError`` where ``PROTOKERNELS_BACKEND`` says something else."""
    if _current not in NAMES:
        raise ValueError(f"PROTOKERNELS_BACKEND: expected one of {', '.join(NAMES)}; got {_current!r}")
    return _current


def set(name: str) -> None:  # reads as backend.set("reference")
    """Selects the backend for the whole process; ``ValueError`` for an unknown name."""
    global _current
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
    _current = name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Selects the backend inside a ``with`` block and restores the previous one after it."""
    previous = get()
    set(name)
    try:
        yield
    finally:
        set(previous)


def unavailable_reason(device_type: str = "cpu") -> str | None:
    """Why native kernels cannot serve tensors on ``device_type``, or ``None`` if they can."""
    global _cuda_built
    if _native.LIBRARY is None:
        return _native.PROBLEM
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        if _cuda_built is None:
            _cuda_built = bool(_native.build_info()["cuda_archs"])
        if _cuda_built:
            return None
        return "the package was built without CUDA kernels; install nvcc and rebuild with PROTOKERNELS_CUDA=on"
    return f"there are no native kernels for device type {device_type!r}"


def native_serves(device: torch.device) -> bool:
    """Whether a call on ``device`` runs native kernels under the backend selected.

    Raises:
        NativeUnavailableError: the backend is ``native`` and cannot serve this device; the message says why.
        ValueError: the environment names no backend.
    """
    selected = get()
    if selected == "reference":
        return False
    if device.type == "cpu" and _native.LIBRARY is not None:
        return True
    reason = unavailable_reason(device.type)
    if reason is None:
        return True
    if selected == "native":
        raise NativeUnavailableError(f"backend 'native' cannot serve {device}: {reason}")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        warnings.warn(
            f"protokernels runs its plain PyTorch reference on {device}: {reason}", RuntimeWarning, stacklevel=3
        )
    return False
