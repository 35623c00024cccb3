# SPDX-License-Identifier: MIT
"""Networks that several papers share."""

from .vae import NETWORKS, ConditionalDecoder, GaussianEncoder, NetworkName, build_networks

__all__ = ["NETWORKS", "ConditionalDecoder", "GaussianEncoder", "NetworkName", "build_networks"]
