# SPDX-License-Identifier: MIT
"""What the papers are compared with, one file per method: its loss with equation and source, its networks, its settings.

``BASELINES`` stand beside a self-supervised paper: the same encoder, views, optimiser, number of epochs and evaluation; they
differ in nothing but what their files say. ``CLUSTERING_BASELINES`` stand beside VAESim: each with its own networks, judged by
VAESim's evaluation. ``RESNET18_BASELINES`` stand beside the contrastive autoencoder: a frozen ResNet18 with a linear layer or
with KMeans. They need the extra ``protokernels[train]``. Every module has a ``BASELINE``, which offers
what a paper's module does: ``CONFIG``, ``train``, ``evaluate``, ``draw_figures``.
"""

from __future__ import annotations

BASELINES = ("random_init", "supervised", "simclr", "byol", "barlow_twins", "vicreg", "swav", "densecl")
CLUSTERING_BASELINES = ("vae_kmeans", "gmvae", "vade", "resnet_transfer")
RESNET18_BASELINES = ("resnet18_transfer", "resnet18_kmeans")

__all__ = ["BASELINES", "CLUSTERING_BASELINES", "RESNET18_BASELINES"]
