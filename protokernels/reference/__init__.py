# SPDX-License-Identifier: MIT
"""The equations of every op in plain PyTorch: the oracle of the tests and a backend of its own, without tricks."""

from . import contrastive, nearest, prototypes, sinkhorn, warp

__all__ = ["contrastive", "nearest", "prototypes", "sinkhorn", "warp"]
