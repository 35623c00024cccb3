# SPDX-License-Identifier: MIT
"""Convolutional encoders and conditional decoders of the VAE family.

Every network halves the image side with 4x4 convolutions of stride 2 and doubles it with their transposes, so the side
must be a multiple of 2 ** (number of convolutions). Grey and colour images alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

NetworkName = Literal["paper", "official-mnist", "official-pneumonia", "small"]


class GaussianEncoder(nn.Module):
    """Convolutions, then two linear heads: mean and log-variance of a diagonal Gaussian over the latent vector.

    Args:
        channels: image channels, 1 or 3.
        image_size: side of the square image in pixels.
        latent_dim: D.
        widths: output channels of the 4x4 stride-2 convolutions.
        activated: Conv -> ReLU -> BatchNorm (the paper); ``False``: bare convolutions, which make the encoder an affine
            map (the released code).

    Shape: images [B, C, H, W] -> mean [B, D] and log-variance [B, D].
    """

    def __init__(
        self, channels: int, image_size: int, latent_dim: int, *, widths: Sequence[int], activated: bool
    ) -> None:
        super().__init__()
        side = _checked_side(image_size, len(widths))
        layers: list[nn.Module] = []
        for width_in, width_out in zip((channels, *widths), widths, strict=False):
            layers.append(nn.Conv2d(width_in, width_out, kernel_size=4, stride=2, padding=1))
            if activated:
                layers += [nn.ReLU(), nn.BatchNorm2d(width_out)]
        self.features = nn.Sequential(*layers)
        self.mean = nn.Linear(widths[-1] * side * side, latent_dim)
        self.log_variance = nn.Linear(widths[-1] * side * side, latent_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images).flatten(1)
        return self.mean(features), self.log_variance(features)


class ConditionalDecoder(nn.Module):
    """Image from a latent vector and a condition: each goes through a linear layer, the results are concatenated as
    channels.

    The condition becomes one extra channel; with ``condition_dim`` 0 there is none. The sigmoid is taken in float32 under
    autocast too, so that grey levels keep their precision.

    Args:
        channels: image channels, 1 or 3.
        image_size: side of the square image in pixels.
        latent_dim: D.
        condition_dim: K, length of the condition (VAESim: the soft assignment); 0: a plain decoder.
        seed_channels: channels that the latent vector is mapped to, at side ``image_size / 2 ** len(widths)``.
        widths: output channels of the 4x4 stride-2 transposed convolutions.
        activated: ConvTranspose -> BatchNorm -> GELU; ``False``: bare transposed convolutions.

    Shape: latent [B, D], condition [B, K], or None where K is 0 -> images [B, C, H, W] in (0, 1).

    Raises:
        ValueError: no condition where K is not 0.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        latent_dim: int,
        condition_dim: int,
        *,
        seed_channels: int,
        widths: Sequence[int],
        activated: bool,
    ) -> None:
        super().__init__()
        self.side = _checked_side(image_size, len(widths))
        self.seed_channels = seed_channels
        self.latent = nn.Linear(latent_dim, seed_channels * self.side**2)
        self.condition = nn.Linear(condition_dim, self.side**2) if condition_dim else None
        layers: list[nn.Module] = []
        for width_in, width_out in zip((seed_channels + (condition_dim > 0), *widths), widths, strict=False):
            layers.append(nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1))
            if activated:
                layers += [nn.BatchNorm2d(width_out), nn.GELU()]
        layers.append(nn.ConvTranspose2d(widths[-1], channels, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor, condition: Tensor | None = None) -> Tensor:  # [B, D], [B, K] -> [B, C, H, W]
        seed = self.latent(latent).unflatten(1, (self.seed_channels, self.side, self.side))
        if self.condition is not None:
            if condition is None:
                raise ValueError(
                    f"ConditionalDecoder: a condition [B, {self.condition.in_features}] is needed; got none"
                )
            condition_map = self.condition(condition).unflatten(1, (1, self.side, self.side))
            seed = torch.cat([seed, condition_map], dim=1)
        return torch.sigmoid(self.layers(seed).float())


@dataclass(frozen=True)
class NetworkShape:
    """What tells one pair of networks from another; see :data:`NETWORKS`."""

    encoder_widths: tuple[int, ...]
    encoder_activated: bool
    seed_channels: int
    decoder_widths: tuple[int, ...]
    decoder_activated: bool


NETWORKS: dict[str, NetworkShape] = {
    # Appendix A: ReLU and batch normalisation, decoder "almost symmetrical".
    "paper": NetworkShape((64, 128, 256), True, 256, (256, 128, 64), True),
    # Released MNIST networks: affine up to the sigmoid; 1,983,169 parameters with K = 40 and D = 32.
    "official-mnist": NetworkShape((64, 128, 256), False, 128, (128, 256), False),
    # Released Pneumonia networks: affine encoder; 4,814,161 parameters with K = 40 and D = 32.
    "official-pneumonia": NetworkShape((128, 256, 384), False, 32, (384, 256, 128), True),
    # Ours: the paper's design at a quarter of the width, for two CPU cores.
    "small": NetworkShape((32, 64, 128), True, 64, (64, 32, 16), True),
}


def build_networks(
    name: NetworkName, *, channels: int, image_size: int, latent_dim: int, condition_dim: int
) -> tuple[GaussianEncoder, ConditionalDecoder]:
    """The encoder and decoder called ``name`` (a key of :data:`NETWORKS`).

    Raises:
        ValueError: unknown name, channels other than 1 or 3, or an image side that the convolutions cannot halve.

    Example:
        >>> from protokernels.models import build_networks
        >>> sizes = {"channels": 1, "image_size": 32, "latent_dim": 32, "condition_dim": 40}
        >>> sum(p.numel() for network in build_networks("official-mnist", **sizes) for p in network.parameters())
        1983169
    """
    if name not in NETWORKS:
        raise ValueError(f"build_networks: expected one of {', '.join(NETWORKS)}; got {name!r}")
    if channels not in (1, 3):
        raise ValueError(f"build_networks: expected 1 (grey) or 3 (colour) channels; got {channels}")
    shape = NETWORKS[name]
    encoder = GaussianEncoder(
        channels, image_size, latent_dim, widths=shape.encoder_widths, activated=shape.encoder_activated
    )
    decoder = ConditionalDecoder(
        channels,
        image_size,
        latent_dim,
        condition_dim,
        seed_channels=shape.seed_channels,
        widths=shape.decoder_widths,
        activated=shape.decoder_activated,
    )
    return encoder, decoder


def _checked_side(image_size: int, halvings: int) -> int:
    factor: int = 2**halvings
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"networks with {halvings} convolutions of stride 2 need an image side that is a multiple of {factor}; "
            f"got {image_size}"
        )
    return image_size // factor
