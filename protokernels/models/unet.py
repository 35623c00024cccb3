# SPDX-License-Identifier: MIT
"""A 2D U-Net in two halves, so that each can be trained and loaded by itself, and the heads that go on top of it.

O. Ronneberger, P. Fischer, T. Brox. U-Net: convolutional networks for biomedical image segmentation. MICCAI 2015, in the
shape that X. Hu et al. (MICCAI 2021) released: normalisation in the encoder only, plain convolutions in the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

GlobalHead = Literal["linear", "mlp"]
LocalHead = Literal["mlp", "cls"]
SLOPE = 0.01  # of the LeakyReLU on the negative side


class UNetEncoder(nn.Module):
    """The way down, with the centre and its up-convolution: what global contrast trains.

    Level l has two Conv3x3 -> InstanceNorm (no affine) -> LeakyReLU of ``width * 2**l`` channels, then MaxPool2. The
    centre has two Conv3x3 -> ReLU without normalisation, of twice the channels of the last level, and a transposed
    convolution back to the last level's channels and resolution.

    Args:
        channels: of the image.
        width: channels of the first level.
        depth: number of levels.

    Shape: images [B, C, H, W], sides multiples of ``2**depth`` -> list of ``depth`` skip maps, finest first, level l as
    [B, width * 2**l, H / 2**l, W / 2**l]; and the centre [B, dim, H / 2**(depth-1), W / 2**(depth-1)].
    """

    def __init__(self, channels: int = 1, *, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        if min(channels, width) < 1 or not 1 <= depth <= 6:
            raise ValueError(
                f"UNetEncoder: channels and width must be at least 1 and depth between 1 and 6; got {channels}, {width} "
                f"and {depth}"
            )
        self.channels, self.width, self.depth = channels, width, depth
        widths = [width * 2**level for level in range(depth)]
        self.dim = widths[-1]  # channels of the centre, what the global head takes
        self.levels = nn.ModuleList(
            nn.Sequential(*_normalised(before, after), *_normalised(after, after))
            for before, after in zip((channels, *widths), widths, strict=False)
        )
        self.centre = nn.Sequential(
            nn.Conv2d(self.dim, 2 * self.dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * self.dim, 2 * self.dim, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * self.dim, self.dim, 2, stride=2),
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:  # [B, C, H, W]
        factor = 2**self.depth
        if images.ndim != 4 or images.shape[1] != self.channels or any(side % factor for side in images.shape[2:]):
            raise ValueError(
                f"U-Net of depth {self.depth}: expected images [B, {self.channels}, H, W] with sides that are multiples of "
                f"{factor}; got {list(images.shape)}; resize them, or take a smaller depth"
            )
        skips, x = [], images
        for level in self.levels:
            skips.append(level(x))
            x = self.pool(skips[-1])
        return skips, self.centre(x)


class UNetDecoder(nn.Module):
    """The way up: at every level the map from below beside the skip map, two Conv3x3 -> LeakyReLU, then a transposed
    convolution (kernel 2, stride 2, no activation) to the next finer level.

    Args:
        width: channels of the last, finest map.
        depth: number of levels.

    Shape: what :class:`UNetEncoder` returns -> ``depth`` maps, coarsest first; the last is f^1 [B, width, H, W].
    """

    def __init__(self, *, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in reversed(range(depth))]
        self.levels = nn.ModuleList(nn.Sequential(*_plain(2 * each, each), *_plain(each, each)) for each in widths)
        self.rises = nn.ModuleList(nn.ConvTranspose2d(each, each // 2, 2, stride=2) for each in widths[:-1])

    def forward(self, skips: list[Tensor], centre: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        x = centre
        for index, level in enumerate(self.levels):
            if index:
                x = self.rises[index - 1](maps[-1])
            maps.append(level(torch.cat([x, skips[-1 - index]], dim=1)))
        return maps


class UNet(nn.Module):
    """Encoder and decoder; 31,030,528 parameters at depth 4 and width 64, without a head.

    Args:
        channels: of the image.
        width: channels of the finest level.
        depth: number of levels, 3 (the paper's text) or 4 (the released code).

    Shape: images [B, C, H, W], sides multiples of ``2**depth`` -> decoder maps, coarsest first: level l as
    [B, width * 2**l, H / 2**l, W / 2**l], the last one f^1 [B, width, H, W].

    Raises:
        ValueError: sides that do not divide, or wrong channels.

    Example:
        >>> import torch
        >>> from protokernels.models import UNet
        >>> maps = UNet(width=8, depth=3)(torch.rand(2, 1, 64, 64))
        >>> [list(each.shape) for each in maps]
        [[2, 32, 16, 16], [2, 16, 32, 32], [2, 8, 64, 64]]
    """

    def __init__(self, channels: int = 1, *, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.channels, self.width, self.depth = channels, width, depth
        self.encoder = UNetEncoder(channels, width=width, depth=depth)
        self.decoder = UNetDecoder(width=width, depth=depth)

    def forward(self, images: Tensor) -> list[Tensor]:  # [B, C, H, W]
        maps: list[Tensor] = self.decoder(*self.encoder(images))
        return maps


def global_head(dim: int, kind: GlobalHead = "linear") -> nn.Sequential:
    """h_1: average over the map, two linear layers. ``"linear"``: no activation between them, as in the released code; ``"mlp"``: a
    ReLU between them, the multi-layer perceptron of the paper's text.

    Shape: [B, dim, h, w] -> [B, dim / 2].
    """
    if kind not in get_args(GlobalHead):
        raise ValueError(f'global_head: kind must be "linear" or "mlp"; got {kind!r}')
    between = [nn.ReLU()] if kind == "mlp" else []
    pool, first, second = nn.AdaptiveAvgPool2d(1), nn.Linear(dim, dim), nn.Linear(dim, max(1, dim // 2))
    return nn.Sequential(pool, nn.Flatten(), first, *between, second)


def local_head(width: int, kind: LocalHead = "mlp") -> nn.Sequential:
    """h_2: point-wise convolutions. ``"mlp"``: to 4 and then 2 times the channels, no activation between them (the paper's two
    layers, as the released code has them); ``"cls"``: one convolution to 2 times the channels.

    Shape: [B, width, H, W] -> [B, 2 * width, H, W].
    """
    if kind == "mlp":
        return nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, 2 * width, 1))
    if kind == "cls":
        return nn.Sequential(nn.Conv2d(width, 2 * width, 1))
    raise ValueError(f'local_head: kind must be "mlp" or "cls"; got {kind!r}')


def load_part(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Loads the tensors of ``state`` whose names begin with ``prefix`` into ``module``, all of them or none.

    What else is in ``state``, such as another stage's head, is left out on purpose; a tensor of ``module`` that is not there
    is an error: training would go on from random weights and nobody would know.

    Args:
        module: such as a :class:`UNet` or its ``encoder``.
        state: parameters by name, as from a checkpoint; a ``"module."`` in front, which wrappers add, is dropped.
        prefix: of the module's parameters in ``state``, such as ``"encoder."``.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    module.load_state_dict(fitting_part(module, state, prefix))


def fitting_part(module: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of ``state`` that :func:`load_part` loads into ``module``, which may be on the device ``"meta"``, without
    memory; raises what that raises."""
    given = {name.removeprefix("module."): value for name, value in state.items()}
    part = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    own = module.state_dict()
    if missing := sorted(own.keys() - part.keys()):
        raise ValueError(
            f"load_part: {len(missing)} of {len(own)} tensors are missing, the first is {prefix + missing[0]!r}; the state "
            f"begins with {', '.join(sorted(given)[:3]) or 'nothing'}"
        )
    for name, value in own.items():
        if part[name].shape != value.shape:
            raise ValueError(
                f"load_part: {prefix + name} must have shape {list(value.shape)}; got {list(part[name].shape)}; were width, "
                "depth and channels the same?"
            )
    return {name: part[name] for name in own}


def _normalised(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    return convolution, nn.InstanceNorm2d(channels_out), nn.LeakyReLU(SLOPE)


def _plain(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.LeakyReLU(SLOPE)
