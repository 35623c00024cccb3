# SPDX-License-Identifier: MIT
"""Modules: one thin class per function of ``protokernels.ops``."""

from .prototypes import LinearTemperature, Prototypes

__all__ = ["LinearTemperature", "Prototypes"]
