# SPDX-License-Identifier: MIT
"""Networks that several papers share."""

from .heads import mlp_head
from .resnet import ResNet18, Stem, pooled
from .vae import NETWORKS, ConditionalDecoder, GaussianEncoder, NetworkName, build_networks

__all__ = [
    "NETWORKS",
    "ConditionalDecoder",
    "GaussianEncoder",
    "NetworkName",
    "ResNet18",
    "Stem",
    "build_networks",
    "mlp_head",
    "pooled",
]
