# SPDX-License-Identifier: MIT
"""ResNet18 with a dense output map, for self-supervised learning.

K. He, X. Zhang, S. Ren, J. Sun. Deep Residual Learning for Image Recognition. CVPR 2016.

Parameters carry torchvision's names (``conv1.weight``, ``layer1.0.bn2.bias``, ...), so that the usual ImageNet weight
files load; torchvision itself is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import check_names, read_weights

Stem = Literal["imagenet", "small"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STANDARD_WIDTH = 64


class BasicBlock(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))), where x' is x, or its 1x1 projection if the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.downsample is not None:
            # A stride of the 1x1 convolution, written as a slice: for channels-last input with fewer than 16 channels
            # the gradient of oneDNN's strided one writes past its memory (oneDNN issue 6035).
            shortcut = self.downsample(x[:, :, :: self.stride, :: self.stride])
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """The convolutional part of ResNet18: images in [0, 1] to a dense map, normalised inside by ImageNet's statistics.

    ====================  ============  ===========  ==================
    stem                  last_stride   image side   h = w of the map
    ====================  ============  ===========  ==================
    ``"imagenet"``        2             224          7
    ``"imagenet"``        1             112          7
    ``"small"``           2             56           7
    ====================  ============  ===========  ==================

    Args:
        channels: image channels, 1 or 3. Grey images are normalised by the mean of the colour statistics.
        width: channels of the first stage, 64 in the standard network; the map has 8 times as many.
        stem: ``"imagenet"``: 7x7 convolution of stride 2, then 3x3 maximum of stride 2; ``"small"``: one 3x3
            convolution of stride 1.
        last_stride: of the fourth stage, 2 in the standard network; 1 keeps a map twice as fine at the same parameters.

    Shape: images [B, C, H, W] in [0, 1] -> map [B, 8 * width, h, w].

    Raises:
        ValueError: other values of channels, width, stem or last_stride.

    Example:
        >>> import torch
        >>> from protokernels.models import ResNet18
        >>> encoder = ResNet18(channels=1, width=16, stem="small")
        >>> encoder(torch.rand(2, 1, 56, 56)).shape, encoder.dim
        (torch.Size([2, 128, 7, 7]), 128)
    """

    mean: Tensor  # [1, C, 1, 1]
    std: Tensor  # [1, C, 1, 1]

    def __init__(
        self, channels: int = 3, *, width: int = STANDARD_WIDTH, stem: Stem = "imagenet", last_stride: int = 2
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"ResNet18: expected 1 (grey) or 3 (colour) channels; got {channels}")
        if stem not in get_args(Stem):
            raise ValueError(f"ResNet18: stem must be one of {', '.join(get_args(Stem))}; got {stem!r}")
        if width < 1 or last_stride not in (1, 2):
            raise ValueError(
                f"ResNet18: width must be at least 1 and last_stride 1 or 2; got {width} and {last_stride}"
            )
        self.channels, self.width, self.stem, self.dim = channels, width, stem, 8 * width
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, last_stride)
        self.stride = (4 if stem == "imagenet" else 1) * 4 * last_stride  # image pixels per position of the map
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            statistics = torch.tensor(values)
            statistics = statistics.mean().reshape(1) if channels == 1 else statistics
            self.register_buffer(name, statistics.reshape(1, channels, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 8 * width, h, w]
        x = (images - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        dense: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return dense

    def load_imagenet_weights(self, path: str | Path) -> None:
        """Loads a ResNet18 from a local file, such as torchvision's ``resnet18-f37072fd.pth``.

        The file is opened with ``weights_only=True``: it cannot run code. The classifier ``fc`` is left out. For grey
        images the first convolution is summed over colours, which is what it computes on three equal channels (up to
        the colours' slightly different normalisation).

        Raises:
            ValueError: another width or stem than the standard network has (any ``last_stride`` will do), or names or shapes in the file
                differ.
            FileNotFoundError: there is no such file.
        """
        path = Path(path).expanduser()
        if (self.width, self.stem) != (STANDARD_WIDTH, "imagenet"):
            raise ValueError(
                f'ImageNet weights fit the standard ResNet18 (width {STANDARD_WIDTH}, stem "imagenet"); this one has '
                f'width {self.width} and stem "{self.stem}"'
            )
        state = read_weights(path, "ResNet18", "resnet18-f37072fd.pth")
        if self.channels == 1 and state.get("conv1.weight", torch.empty(0)).shape[1:2] == (3,):
            state["conv1.weight"] = state["conv1.weight"].sum(dim=1, keepdim=True)
        own = self.state_dict()
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        check_names(own, state, path, "ResNet18")
        self.load_state_dict({**own, **state})


def pooled(dense: Tensor) -> Tensor:  # [B, D, h, w] -> [B, D]
    """Global average pooling in float32."""
    return dense.float().mean(dim=(2, 3))


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride), BasicBlock(channels_out, channels_out, 1))
