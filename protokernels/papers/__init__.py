# SPDX-License-Identifier: MIT
"""The paper reproductions, one file each: citation, configuration with its presets, model, loss and loop.

They need the extra ``protokernels[train]``. Every module offers the same functions, which the command line calls:
``train``, ``evaluate`` and ``draw_figures``.
"""

from __future__ import annotations

PAPERS = ("vaesim", "optiml", "local_contrast", "optimized_views", "contrastive_autoencoder")

__all__ = ["PAPERS"]
