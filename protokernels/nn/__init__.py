# SPDX-License-Identifier: MIT
"""Modules: one thin class per function of ``protokernels.ops``; and losses in plain PyTorch that methods share."""

from .contrastive import CrossViewLoss, LocalContrastiveLoss, NTXentLoss, SupConLoss
from .prototypes import LinearTemperature, Prototypes
from .sinkhorn import SinkhornAssignment, SinkhornLoss
from .variance_covariance import variance_covariance_loss

__all__ = [
    "CrossViewLoss",
    "LinearTemperature",
    "LocalContrastiveLoss",
    "NTXentLoss",
    "Prototypes",
    "SinkhornAssignment",
    "SinkhornLoss",
    "SupConLoss",
    "variance_covariance_loss",
]
