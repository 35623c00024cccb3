# SPDX-License-Identifier: MIT
"""Loads the native library ``_C.abi3.so`` if it is there, and remembers why when it is not. Importing this never fails."""

from __future__ import annotations

import importlib.machinery
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY: Path | None = None
PROBLEM: str | None = None


def _find() -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        candidate = folder / f"_C{suffix}"
        if candidate.is_file():
            return candidate
    return None


def _load() -> tuple[Path | None, str | None]:
    path = _find()
    if path is None:
        return None, (
            "the package was installed without its native library (no _C.abi3.so beside protokernels/__init__.py); "
            "a C++20 compiler was missing when it was built. Install one and run `pip install --force-reinstall protokernels`"
        )
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # an unloadable file must not take the reference backend down with it
        return None, f"{path} does not load beside torch {torch.__version__}: {error}"
    return path, None


LIBRARY, PROBLEM = _load()


def build_info() -> dict[str, Any]:
    """What the library in use was built with: torch, compiler, CUDA architectures, CPU levels. Empty without a library."""
    if LIBRARY is None:
        return {}
    info: dict[str, Any] = json.loads(torch.ops.protokernels.build_info())
    return info
