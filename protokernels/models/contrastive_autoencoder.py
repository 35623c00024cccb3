# SPDX-License-Identifier: MIT
"""The networks of the contrastive autoencoder (Ferrante et al. 2022): encoder, projector, and a decoder that can be given a
condition later.

Sizes that the text leaves open are those of the authors' released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ENCODER_WIDTHS = (32, 64, 128)
DECODER_WIDTHS = (128, 64, 32)


def contrastive_encoder(
    channels: int, image_size: int, latent_dim: int, *, widths: Sequence[int] = ENCODER_WIDTHS
) -> nn.Sequential:
    """h = e(x): three times [4x4 convolution of stride 2, GELU, batch normalisation], 2x2 average, one linear layer.

    Args:
        channels: image channels, 1 or 3.
        image_size: side of the square image in pixels, a multiple of 2 ** (number of convolutions + 1).
        latent_dim: D.
        widths: output channels of the convolutions.

    Shape: images [B, C, H, W] -> h [B, D].

    Example:
        >>> from protokernels.models import contrastive_encoder
        >>> sum(parameter.numel() for parameter in contrastive_encoder(1, 32, 128).parameters())
        230688
    """
    side = _checked_side(image_size, len(widths) + 1)
    layers: list[nn.Module] = []
    for width_in, width_out in zip((channels, *widths), widths, strict=False):
        layers += [nn.Conv2d(width_in, width_out, kernel_size=4, stride=2, padding=1), nn.GELU()]
        layers.append(nn.BatchNorm2d(width_out))
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(widths[-1] * side**2, latent_dim))


def contrastive_projector(latent_dim: int, *, hidden: int = 256, output: int = 128) -> nn.Sequential:
    """z = p(h): three linear layers with ReLU between them, without normalisation.

    Shape: h [B, D] -> z [B, output].

    Example:
        >>> from protokernels.models import contrastive_projector
        >>> sum(parameter.numel() for parameter in contrastive_projector(128).parameters())
        131712
    """
    return nn.Sequential(
        nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, output)
    )


class PhasedDecoder(nn.Module):
    """y = d(h), and from :meth:`add_condition` on y = d(h, c).

    A linear layer makes ``seed_channels`` small maps of h, transposed convolutions of stride 2 (each with batch normalisation and
    GELU) enlarge them to the image, a 3x3 one and a sigmoid end it. The condition becomes one more small map; a 3x3 convolution,
    the mix, makes ``seed_channels`` of them all again. The sigmoid is taken in float32 under autocast too.

    Args:
        channels: image channels, 1 or 3.
        image_size: side of the square image in pixels, a multiple of 2 ** len(widths).
        latent_dim: D.
        seed_channels: small maps made of h; 1 in the released code, where all of an image is 16 numbers at side 4.
        widths: output channels of the 4x4 transposed convolutions.

    Shape: h [B, D] -> images [B, C, H, W] in (0, 1); with a condition, h [B, D] and c [B, K].
    """

    condition: nn.Linear | None
    mix: nn.Conv2d | None

    def __init__(
        self,
        channels: int,
        image_size: int,
        latent_dim: int,
        *,
        seed_channels: int = 1,
        widths: Sequence[int] = DECODER_WIDTHS,
    ) -> None:
        super().__init__()
        self.side, self.seed_channels = _checked_side(image_size, len(widths)), seed_channels
        self.latent = nn.Linear(latent_dim, seed_channels * self.side**2)
        self.condition = self.mix = None
        layers: list[nn.Module] = []
        for width_in, width_out in zip((seed_channels, *widths), widths, strict=False):
            layers.append(nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1))
            layers += [nn.BatchNorm2d(width_out), nn.GELU()]
        layers.append(nn.ConvTranspose2d(widths[-1], channels, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def add_condition(self, condition_dim: int, *, ignored: bool = False, unchanged: bool = False) -> None:
        """Adds the layers that process a condition of length K = ``condition_dim``, on the decoder's device, initialised from torch's
        generator for the CPU.

        ``ignored``: as in the released code the mix sees h alone, and c has no influence. ``unchanged``: the mix starts by passing on the
        maps of h and nothing of c, so that training goes on from the images that the decoder has made so far.

        Raises:
            ValueError: there is a condition already, or K is below 1.
        """
        if self.condition is not None or condition_dim < 1:
            raise ValueError(
                f"PhasedDecoder: a condition is added once, with at least one entry; got {condition_dim}, and "
                f"{'one is' if self.condition is not None else 'none is'} there"
            )
        device, maps = self.latent.weight.device, self.seed_channels
        self.condition = nn.Linear(condition_dim, self.side**2).to(device)
        self.mix = nn.Conv2d(maps + (0 if ignored else 1), maps, kernel_size=3, padding=1).to(device)
        if unchanged:
            with torch.no_grad():
                self.mix.weight.zero_()
                nn.init.dirac_(self.mix.weight[:, :maps])
                nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor, c: Tensor | None = None) -> Tensor:  # [B, D], [B, K] -> [B, C, H, W]
        if (c is None) != (self.condition is None):
            raise ValueError(
                "PhasedDecoder: a condition c [B, K] is needed from add_condition on, and not before; got "
                f"{'none' if c is None else list(c.shape)}"
            )
        x = self.latent(h).unflatten(1, (self.seed_channels, self.side, self.side))
        if self.condition is not None and self.mix is not None:
            if self.mix.in_channels > self.seed_channels:
                x = torch.cat([x, self.condition(c).unflatten(1, (1, self.side, self.side))], dim=1)
            x = self.mix(x)
        return torch.sigmoid(self.layers(x).float())


def _checked_side(image_size: int, halvings: int) -> int:
    factor: int = 2**halvings
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"these networks halve the image {halvings} times and need a side that is a multiple of {factor}; got {image_size}"
        )
    return image_size // factor
