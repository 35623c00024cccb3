# SPDX-License-Identifier: MIT
"""Networks that several papers share."""

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
    "pooled",
]
