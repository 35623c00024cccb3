# SPDX-License-Identifier: MIT
"""Which implementation runs: the compiled kernels or the same equations in plain PyTorch.

``auto`` (the default) takes the native kernels where they are built for the tensor's device and the reference
elsewhere; ``native`` insists and
says what is missing; ``reference`` never touches native code. The environment variable ``PROTOKERNELS_BACKEND`` sets the start value.

    >>> import protokernels
    >>> with protokernels.backend.use("reference"):
    ...     protokernels.backend.get()
    'reference'
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from . import _native

NAMES = ("auto", "native", "reference")


class NativeUnavailableError(RuntimeError):
    """The native backend was asked for and cannot serve this call."""


def _checked(name: str, where: str = "backend") -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}; got {name!r}")
    return name


def _start_value() -> str:
    """Of the environment. A wrong one ends the command ``protokernels`` here: its ``main`` is not imported yet, and cannot
    report it."""
    try:
        return _checked(os.environ.get("PROTOKERNELS_BACKEND", "auto"), "PROTOKERNELS_BACKEND")
    except ValueError as error:
        script, words = "".join(sys.argv[:1]), sys.orig_argv
        if Path(script).name == "protokernels" or ("-m", "protokernels") in pairwise(words):
            raise SystemExit(f"protokernels: {error}") from None
        raise


_current = _start_value()
_cuda_built: bool | None = None


def get() -> str:
    """The backend selected: ``auto``, ``native`` or ``reference``."""
    return _current


def set(name: str) -> None:  # reads as backend.set("reference")
    """Selects the backend for the whole process; ``ValueError`` for an unknown name."""
    global _current
    _current = _checked(name)


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
    """
    if _current == "reference":
        return False
    if device.type == "cpu" and _native.LIBRARY is not None:
        return True
    reason = unavailable_reason(device.type)
    if reason is None:
        return True
    if _current == "native":
        raise NativeUnavailableError(f"backend 'native' cannot serve {device}: {reason}")
    if device.type == "cuda" and not torch.compiler.is_compiling():
        warnings.warn(
            f"protokernels runs its plain PyTorch reference on {device}: {reason}", RuntimeWarning, stacklevel=3
        )
    return False
