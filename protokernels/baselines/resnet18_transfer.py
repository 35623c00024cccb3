# SPDX-License-Identifier: MIT
"""ResNet18 transfer: everything before the pooling frozen, one new linear layer on its output, trained with all labels.

The supervised baseline of Ferrante et al. 2022 (contrastive autoencoder, section 2 and Table 1): ImageNet weights, 100 epochs of Adam
with a learning rate of 1e-4. The frozen part stays in evaluation mode, so its output is computed once. Not given there, and our choice:
images of 224 pixels, grey repeated to three channels, batches of 128. VAESim's transfer, which trains the whole network,
is :mod:`protokernels.baselines.resnet_transfer`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..evaluation import GradientProtocol, LinearProbe, linear_probe
from .resnet18_common import FrozenResNet18, FrozenResNet18Config


@dataclass(frozen=True)
class ResNet18TransferConfig(FrozenResNet18Config):
    """The network, and how its new layer is trained."""

    epochs: int = 100
    learning_rate: float = 1e-4  # of Adam
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(
                "ResNet18TransferConfig: epochs, batch_size and learning_rate must be positive; got "
                f"{self.epochs}, {self.batch_size} and {self.learning_rate}"
            )


def fit(x: Tensor, labels: Tensor, classes: int, config: ResNet18TransferConfig, seed: int) -> dict[str, Tensor]:
    """The new layer, from features [N, 512]."""
    protocol = GradientProtocol(config.learning_rate, config.epochs, config.batch_size)
    probe = linear_probe(x, labels, num_classes=classes, protocol=protocol, seed=seed)
    return {"weight": probe.weight, "bias": probe.bias}


def predict(fitted: dict[str, Tensor], x: Tensor) -> tuple[Tensor, None]:
    """Classes of features [M, 512]."""
    return LinearProbe(fitted["weight"], fitted["bias"], "paper").predict(x), None


BASELINE = FrozenResNet18("resnet18_transfer", ResNet18TransferConfig, fit, predict, __doc__)
