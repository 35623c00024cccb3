# SPDX-License-Identifier: MIT
"""Networks that several papers share."""

from .contrastive_autoencoder import PhasedDecoder, contrastive_encoder, contrastive_projector
from .heads import mlp_head
from .resnet import ResNet18, Stem, pooled
from .unet import GlobalHead, LocalHead, UNet, UNetDecoder, UNetEncoder, global_head, load_part, local_head
from .vae import NETWORKS, ConditionalDecoder, GaussianEncoder, NetworkName, build_networks

__all__ = [
    "NETWORKS",
    "ConditionalDecoder",
    "GaussianEncoder",
    "GlobalHead",
    "LocalHead",
    "NetworkName",
    "PhasedDecoder",
    "ResNet18",
    "Stem",
    "UNet",
    "UNetDecoder",
    "UNetEncoder",
    "build_networks",
    "contrastive_encoder",
    "contrastive_projector",
    "global_head",
    "load_part",
    "local_head",
    "mlp_head",
    "pooled",
]
