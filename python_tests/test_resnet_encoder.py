# SPDX-License-Identifier: MIT
"""ResNet18 and ResNet50 as encoders for transfer: sizes, torchvision's names, weights, freezing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="these networks are MONAI's")
pytest.importorskip("accelerate", reason="the baselines need the extra protokernels[train]")

from protokernels.baselines.resnet_transfer import ResNetTransfer, ResNetTransferConfig
from protokernels.models import ResNet18, pooled
from protokernels.models.resnet_encoder import ResNetEncoder


class TestResNetEncoder:
    def test_depth_18_is_our_resnet18(self, tmp_path: Path) -> None:
        """The same weights under the same names give the same features."""
        torch.manual_seed(0)
        source = ResNet18(channels=3).eval()
        torch.save(
            {**source.state_dict(), "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "w"
        )
        for channels in (3, 1):
            encoder = ResNetEncoder(18, channels).eval()
            encoder.load_imagenet_weights(tmp_path / "w")
            ours = ResNet18(channels=channels).eval()
            ours.load_imagenet_weights(tmp_path / "w")
            x = torch.rand(2, channels, 40, 32)
            with torch.no_grad():
                torch.testing.assert_close(encoder(x), pooled(ours(x)), rtol=1e-4, atol=1e-5)

    def test_depth_50_has_torchvisions_size_and_names(self) -> None:
        encoder = ResNetEncoder(50, 3)
        assert sum(parameter.numel() for parameter in encoder.parameters()) == 25_557_032 - (
            2048 * 1000 + 1000
        )  # the published number without the classifier
        names = encoder.network.state_dict()
        assert names["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1) and "conv1.bias" not in names
        assert {"bn1.running_mean", "layer1.0.downsample.1.weight", "layer3.5.conv3.weight"} <= names.keys()
        assert encoder.network.layer2[0].conv2.stride == (2, 2) and encoder.network.layer2[0].conv1.stride == (1, 1)
        assert encoder.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 2048)

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="depth must be 18 or 50; got 34"):
            ResNetEncoder(34)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="grey"):
            ResNetEncoder(18, 2)
        with pytest.raises(FileNotFoundError, match=r"ResNet50 weights .*resnet50-0676ba61"):
            ResNetEncoder(50, 1).load_imagenet_weights(tmp_path / "none.pth")
        torch.save(ResNet18(channels=3).state_dict(), tmp_path / "w")
        with pytest.raises(ValueError, match=r"is not a ResNet50 .* tensors are missing"):
            ResNetEncoder(50, 3).load_imagenet_weights(tmp_path / "w")

    def test_a_frozen_network_keeps_everything_but_its_head(self, tmp_path: Path) -> None:
        torch.save(ResNet18(channels=3).state_dict(), tmp_path / "w")
        config = ResNetTransferConfig(depth=18, initial_weights=str(tmp_path / "w"), frozen=True)
        model = ResNetTransfer(config, 1, 2).train()
        before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
        model(torch.rand(4, 1, 32, 32)).sum().backward()
        assert model.head.weight.grad is not None
        assert all(parameter.grad is None for parameter in model.encoder.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
