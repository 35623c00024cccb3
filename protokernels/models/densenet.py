# SPDX-License-Identifier: MIT
"""DenseNet121 as an encoder, from MONAI."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import IMAGENET_MEAN, IMAGENET_STD, pooled
from .weights import check_names, read_weights


class DenseNetEncoder(nn.Module):
    """DenseNet121 (G. Huang et al., CVPR 2017) without its classifier, on images in [0, 1] that are normalised as ImageNet's.

    Args:
        channels: image channels, 1 or 3.

    Shape: [B, C, H, W], sides of at least 32 -> [B, 1024], float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        from monai.networks.nets import DenseNet121  # slow to import

        self.channels, self.dim = channels, 1024
        self.features = DenseNet121(spatial_dims=2, in_channels=channels, out_channels=1).features
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            statistics = torch.tensor(values)
            statistics = statistics.mean().reshape(1) if channels == 1 else statistics
            self.register_buffer(name, statistics.reshape(1, channels, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return pooled(F.relu(self.features((images - self.mean) / self.std)))

    def load_imagenet_weights(self, path: str | Path) -> None:
        """Loads a DenseNet121 from a local file with torchvision's names, such as ``densenet121-a639ec97.pth``, old or new.

        The file is opened with ``weights_only=True``: it cannot run code. The classifier is left out. For grey images the first
        convolution is summed over colours.

        Raises:
            ValueError: names or shapes in the file differ.
            FileNotFoundError: there is no such file.
        """
        own = self.features.state_dict()
        state = {}
        for key, value in read_weights(Path(path).expanduser(), "DenseNet121", "densenet121-a639ec97.pth").items():
            if key.startswith("features."):
                inner = re.sub(
                    r"(denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", key.removeprefix("features.")
                )
                state[inner] = value
        first = state.get("conv0.weight", torch.empty(0))
        if self.channels == 1 and first.shape[1:2] == (3,):
            state["conv0.weight"] = first.sum(dim=1, keepdim=True)
        check_names(own, state, Path(path), "DenseNet121")
        self.features.load_state_dict({**own, **state})
