# SPDX-License-Identifier: MIT
"""ResNet18 and ResNet50 as encoders for transfer, from MONAI."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .resnet import IMAGENET_MEAN, IMAGENET_STD, pooled
from .weights import check_names, read_weights

Depth = Literal[18, 50]
PUBLISHED = {18: "resnet18-f37072fd.pth", 50: "resnet50-0676ba61.pth"}


class ResNetEncoder(nn.Module):
    """ResNet (K. He et al., CVPR 2016) without its classifier, on images in [0, 1] that are normalised as ImageNet's.

    The stride of a stage lies in the 3 x 3 convolution of its first block, as in torchvision.

    Args:
        depth: 18 or 50.
        channels: image channels, 1 or 3. Grey images are normalised by the mean of the colour statistics.

    Shape: [B, C, H, W], sides of at least 32 -> [B, 512] (18) or [B, 2048] (50), float32.

    Raises:
        ValueError: another depth or number of channels.

    Example:
        >>> import torch
        >>> ResNetEncoder(18, channels=1)(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 512])
    """

    mean: Tensor  # [1, C, 1, 1]
    std: Tensor  # [1, C, 1, 1]

    def __init__(self, depth: Depth = 50, channels: int = 3) -> None:
        super().__init__()
        if depth not in get_args(Depth):
            raise ValueError(f"ResNetEncoder: depth must be 18 or 50; got {depth}")
        if channels not in (1, 3):
            raise ValueError(f"ResNetEncoder: expected 1 (grey) or 3 (colour) channels; got {channels}")
        from monai.networks.nets import resnet18, resnet50  # slow to import

        self.depth, self.channels, self.dim = depth, channels, 512 if depth == 18 else 2048
        build = resnet18 if depth == 18 else resnet50
        self.network = build(
            spatial_dims=2, n_input_channels=channels, conv1_t_stride=2, bias_downsample=False, feed_forward=False
        )
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            statistics = torch.tensor(values)
            statistics = statistics.mean().reshape(1) if channels == 1 else statistics
            self.register_buffer(name, statistics.reshape(1, channels, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, dim]
        net = self.network
        x = net.maxpool(net.act(net.bn1(net.conv1((images - self.mean) / self.std))))
        return pooled(net.layer4(net.layer3(net.layer2(net.layer1(x)))))

    def load_imagenet_weights(self, path: str | Path) -> None:
        """Loads a ResNet from a local file with torchvision's names, such as ``resnet50-0676ba61.pth``.

        The file is opened with ``weights_only=True``: it cannot run code. The classifier ``fc`` is left out. For grey images the
        first convolution is summed over colours.

        Raises:
            ValueError: names or shapes in the file differ.
            FileNotFoundError: there is no such file.
        """
        path, own = Path(path).expanduser(), self.network.state_dict()
        network = f"ResNet{self.depth}"
        state = {
            name: value
            for name, value in read_weights(path, network, PUBLISHED[self.depth]).items()
            if not name.startswith("fc.")
        }
        first = state.get("conv1.weight", torch.empty(0))
        if self.channels == 1 and first.shape[1:2] == (3,):
            state["conv1.weight"] = first.sum(dim=1, keepdim=True)
        check_names(own, state, path, network)
        self.network.load_state_dict({**own, **state})
