# SPDX-License-Identifier: MIT
"""Loads the native library ``_C.abi3.so`` if it is there, and remembers why when it is not. Importing this never fails."""

from __future__ import annotations

import importlib.machinery
import json
import struct
from pathlib import Path
from typing import Any

import torch

OPERATORS = (
    "build_info",
    "prototypes_forward",
    "prototypes_backward",
    "prototypes_backward_resident",
    "prototypes_accumulate",
    "prototypes_blend",
    "sinkhorn_masses_fit",
    "sinkhorn_forward",
    "sinkhorn_backward",
    "sinkhorn_plan",
    "sinkhorn_plan_backward",
    "sinkhorn_envelope_backward",
    "sinkhorn_features_forward",
    "sinkhorn_features_backward",
    "contrastive_plan",
    "contrastive_views",
    "contrastive_pack",
    "contrastive_unpack",
    "contrastive_forward",
    "contrastive_backward",
    "contrastive_losses",
    "contrastive_losses_backward",
    "warp_forward",
    "warp_backward",
    "warp_affine_forward",
    "warp_affine_backward",
    "nearest_search",
    "nearest_assign",
    "nearest_seed",
)
"""What the library must hold; the schemas stand in csrc/library.cpp."""

REINSTALL = "run `pip install --force-reinstall protokernels`"


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
    damage = _damage(path)
    if damage is not None:
        return None, f"{path} does not load: {damage}; {REINSTALL}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # an unloadable file must not take the reference backend down with it
        reason = error.__cause__ or error  # torch names the file only, the system's loader what is wrong with it
        return None, f"{path} does not load beside torch {torch.__version__}: {reason}; {REINSTALL}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.protokernels, name)]
    if missing:
        return None, f"{path} does not load: it is from another version and lacks {', '.join(missing)}; {REINSTALL}"
    return path, None


def _damage(path: Path) -> str | None:
    """What is wrong with the file as a whole. The system's loader would end the process over a truncated one."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "it is not a library"
    (table,) = struct.unpack_from("<Q", header, 40)  # the section table is the last part of a 64-bit ELF file
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    expected, actual = table + entry_size * entries, path.stat().st_size
    return f"it is truncated ({actual} of {expected} bytes)" if actual < expected else None


LIBRARY, PROBLEM = _load()


def build_info() -> dict[str, Any]:
    """What the library in use was built with: torch, compiler, CUDA architectures, CPU levels. Empty without a library."""
    if LIBRARY is None:
        return {}
    info: dict[str, Any] = json.loads(torch.ops.protokernels.build_info())
    return info
