# SPDX-License-Identifier: MIT
"""M, f, g and p of Ruppli et al. 2022, and what keeps the one still while the other learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

import protokernels

from ..models import pooled
from ..models.densenet import DenseNetEncoder
from ..training import RunFolder
from ..training.checkpoints import fitting
from ._optimized_views_config import PARAMETERS, TRANSFORMATIONS, OptimizedViewsConfig


class TransformationNetwork(nn.Module):
    """M: two blocks of one convolution each, then one linear layer to Lambda; at the beginning all of Lambda is near 1/2.

    The paper says "two convolutional blocks with one convolutional layer". Channels 16 and 32, batch normalisation, ReLU and the mean over
    positions are ours; a block halves the image by the stride of its convolution, a quarter of the cost of a maximum behind it.

    Args:
        channels: image channels.
        width: channels of the first block; the second has twice as many.

    Shape: [B, C, H, W] -> [B, 7] in (0, 1), float32.
    """

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*_layer(channels, width, stride=2), *_layer(width, 2 * width, stride=2))
        self.head = nn.Linear(2 * width, len(PARAMETERS))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(pooled(self.blocks(images))).float()
        return torch.sigmoid(logits)


class ConvolutionalEncoder(nn.Module):
    """f for BraTS: four blocks of two convolutions each, then the mean over positions.

    Widths w, 2w, 4w, 8w, batch normalisation, ReLU and maximum over 2 x 2 at a block's end are ours; the paper gives no widths.

    Shape: [B, C, H, W] -> [B, 8w], float32.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (channels, *(width * 2**block for block in range(4)))
        self.blocks = nn.Sequential(*(layer for a, b in pairwise(widths) for layer in _block(a, b, b)))
        self.dim = widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        return pooled(self.blocks(images))


class Latents(NamedTuple):
    """f(X) and g(f(X)), float32."""

    h: Tensor  # [B, d]
    z: Tensor  # [B, e]


class OptimizedViews(nn.Module):
    """The four networks; M only for strategies that optimise it. f, g and p come first: all strategies start from the same ones.

    Args:
        config: see :class:`OptimizedViewsConfig`.
        channels: image channels, 1 or 3.
    """

    def __init__(self, config: OptimizedViewsConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        self.f: ConvolutionalEncoder | DenseNetEncoder
        if config.encoder == "densenet121":
            self.f = DenseNetEncoder(channels)
            if config.initial_weights:
                self.f.load_imagenet_weights(config.initial_weights)
        else:
            self.f = ConvolutionalEncoder(channels, config.width)
        dim = self.f.dim
        hidden = 512 if config.encoder == "densenet121" else dim
        self.g = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 128))
        self.p = nn.Linear(dim, 1)
        self.M = TransformationNetwork(channels, config.m_width) if config.recipe.views == "M" else None

    def embed(self, images: Tensor) -> Latents:  # [B, C, H, W]
        """f and g of a batch."""
        h = self.f(images.contiguous(memory_format=torch.channels_last))  # faster, on the CPU too
        return Latents(h, self.g(h).float())

    def classify(self, h: Tensor) -> Tensor:  # [B, d] -> [B]
        """The logit of p."""
        logits: Tensor = self.p(h).float().squeeze(1)
        return logits

    def transform(
        self,
        images: Tensor,  # [B, C, H, W] in [0, 1]
        Lambda: Tensor,  # [B, 7]
        seed: Tensor,  # [B] int64, of the noise
        enabled: Tensor | None = None,  # [B, 6] bool
    ) -> Tensor:  # [B, C, H, W]
        """X_M = T_Lambda(X), Eq. 3."""
        return protokernels.transform(images, Lambda, order=self.config.order, enabled=enabled, seed=seed)  # type: ignore[arg-type]

    def parts(self) -> list[nn.Module]:
        """f, g and p."""
        return [self.f, self.g, self.p]


def new_model(config: OptimizedViewsConfig, channels: int) -> OptimizedViews:
    """The networks with their initial weights, in the layout that their convolutions prefer."""
    model = OptimizedViews(config, channels)
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def load_model(run: RunFolder, channels: int) -> tuple[OptimizedViews, OptimizedViewsConfig]:
    """The model of the newest sound checkpoint of a run, in evaluation mode, with its configuration."""
    config = run.config_as(OptimizedViewsConfig)
    model = new_model(replace(config, initial_weights=""), channels)
    state = run.checkpoint()
    with fitting(run.checkpoints):
        model.load_state_dict(state["model"])
    model.config = config
    return model.eval(), config


def drawn_parameters(
    count: int, half: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:  # [count, 7], [count, 6] bool
    """Lambda, uniform in [0, 1]^7, and with ``half`` which transformations act, each with probability 1/2."""
    Lambda = torch.rand(count, len(PARAMETERS), generator=generator)
    acting = torch.rand(count, len(TRANSFORMATIONS), generator=generator) < 0.5
    return Lambda, acting if half else None


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, ``modules`` are constants: their parameters get no gradient and their running statistics stay. Batch normalisation goes on
    with the statistics of the batch, as in training."""
    parameters = [
        each for module in modules if module is not None for each in module.parameters() if each.requires_grad
    ]
    with still(*modules):
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def still(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the running statistics of ``modules`` stay as they are."""
    norms = [
        each
        for module in modules
        if module is not None
        for each in module.modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _block(*widths: int) -> list[nn.Module]:
    """Convolutions, and the maximum over 2 x 2."""
    return [*(layer for before, after in pairwise(widths) for layer in _layer(before, after)), nn.MaxPool2d(2)]


def _layer(before: int, after: int, *, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
