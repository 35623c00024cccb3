# SPDX-License-Identifier: MIT
"""Modules: one thin class per function of ``protokernels.ops``; and losses in plain PyTorch that methods share."""

from .contrastive import CrossViewLoss, LocalContrastiveLoss, NTXentLoss, SupConLoss
from .prototypes import LinearTemperature, Prototypes
from .random_views import RandomViews
from .sinkhorn import SinkhornAssignment, SinkhornLoss
from .variance_covariance import variance_covariance_loss
from .view_strength import ViewStrength
from .warp import DifferentiableTransform

__all__ = [
    "CrossViewLoss",
    "DifferentiableTransform",
    "LinearTemperature",
    "LocalContrastiveLoss",
    "NTXentLoss",
    "Prototypes",
    "RandomViews",
    "SinkhornAssignment",
    "SinkhornLoss",
    "SupConLoss",
    "ViewStrength",
    "variance_covariance_loss",
]
