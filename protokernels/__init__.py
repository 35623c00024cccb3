# SPDX-License-Identifier: MIT
"""Kernels for representation learning on medical images, and the papers built on them.

The ground floor needs torch and numpy only:

    >>> import torch, protokernels
    >>> z, prototypes = torch.randn(8, 32), torch.randn(4, 32)
    >>> protokernels.soft_assign(z, prototypes, temperature=0.1).shape
    torch.Size([8, 4])

Modules: ``protokernels.nn`` (torch modules), ``protokernels.reference`` (the same equations in plain PyTorch), ``protokernels.backend``
(which of the two runs), ``protokernels.papers`` (the reproductions; needs the extra ``protokernels[train]``).
"""

from __future__ import annotations

from . import _threads as _threads  # before torch
from . import backend, cluster, nn, reference
from ._version import __version__
from .ops.contrastive import cross_view_loss, local_contrastive_loss, nt_xent_loss, supcon_loss
from .ops.nearest import NearestResult, nearest
from .ops.prototypes import (
    PrototypeStep,
    PrototypeUpdate,
    SoftAssignment,
    prototype_step,
    soft_assign,
    update_prototypes,
    update_prototypes_,
)
from .ops.sinkhorn import SinkhornResult, sinkhorn, sinkhorn_divergence, sinkhorn_features
from .ops.warp import affine_warp, blend_flip, gaussian_blur, gaussian_noise, rotate, soft_crop, transform

__all__ = [
    "NearestResult",
    "PrototypeStep",
    "PrototypeUpdate",
    "SinkhornResult",
    "SoftAssignment",
    "__version__",
    "affine_warp",
    "backend",
    "blend_flip",
    "cluster",
    "cross_view_loss",
    "gaussian_blur",
    "gaussian_noise",
    "local_contrastive_loss",
    "nearest",
    "nn",
    "nt_xent_loss",
    "prototype_step",
    "reference",
    "rotate",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_features",
    "soft_assign",
    "soft_crop",
    "supcon_loss",
    "transform",
    "update_prototypes",
    "update_prototypes_",
]
