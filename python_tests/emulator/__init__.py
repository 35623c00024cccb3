# SPDX-License-Identifier: MIT
"""Runs the CUDA kernels on the host; see `python_tests/emulator/build.py`."""

from __future__ import annotations

from python_tests.emulator.build import (
    SEEDS,
    BuildError,
    Variant,
    build,
    load,
    missing_tools,
    operations,
    poisoned,
    run_under_address_sanitizer,
)

__all__ = [
    "SEEDS",
    "BuildError",
    "Variant",
    "build",
    "load",
    "missing_tools",
    "operations",
    "poisoned",
    "run_under_address_sanitizer",
]
