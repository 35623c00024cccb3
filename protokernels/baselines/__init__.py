# SPDX-License-Identifier: MIT
"""What a self-supervised paper is compared with, one file per method: its loss with equation and source, its heads, its settings.

``BASELINES`` have the same encoder, views, optimiser and number of epochs, and are judged by the same evaluation; they differ
in nothing but what their files say. ``RESNET18_BASELINES`` stand beside the contrastive autoencoder: a frozen ResNet18 with a
linear layer or with KMeans. They need the extra ``protokernels[train]``. Every module has a ``BASELINE``, which offers
what a paper's module does: ``CONFIG``, ``train``, ``evaluate``, ``draw_figures``.
"""

from __future__ import annotations

BASELINES = ("random_init", "supervised", "simclr", "byol", "barlow_twins", "vicreg", "swav", "densecl")
RESNET18_BASELINES = ("resnet18_transfer", "resnet18_kmeans")

__all__ = ["BASELINES", "RESNET18_BASELINES"]
