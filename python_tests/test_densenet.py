# SPDX-License-Identifier: MIT
"""DenseNet121 as an encoder: shape, and weights under torchvision's names, old and new."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai", reason="DenseNet121 is MONAI's")

from protokernels.models.densenet import DenseNetEncoder


def torchvision_state(encoder: DenseNetEncoder, *, old: bool) -> dict[str, torch.Tensor]:
    """The state under the names of torchvision's files, with a first convolution for colours."""
    dot = "." if old else ""
    state = {
        "features." + re.sub(r"layers\.(norm|conv)([12])", rf"\g<1>{dot}\2", name): value.clone()
        for name, value in encoder.features.state_dict().items()
        if not (old and name.endswith("num_batches_tracked"))
    }
    first = state["features.conv0.weight"]
    state["features.conv0.weight"] = torch.cat([0.5 * first, 0.3 * first, 0.2 * first], dim=1)
    return state | {"classifier.weight": torch.zeros(1000, 1024), "classifier.bias": torch.zeros(1000)}


class TestDenseNet:
    def test_shape(self) -> None:
        encoder = DenseNetEncoder(3).eval()
        with torch.no_grad():
            assert encoder(torch.rand(2, 3, 32, 48)).shape == (2, 1024)

    @pytest.mark.parametrize("old", [True, False])
    def test_torchvisions_names(self, tmp_path: Path, old: bool) -> None:
        torch.manual_seed(0)
        source = DenseNetEncoder(1).eval()
        torch.save(torchvision_state(source, old=old), tmp_path / "weights.pth")
        loaded = DenseNetEncoder(1).eval()
        loaded.load_imagenet_weights(tmp_path / "weights.pth")
        x = torch.rand(1, 1, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), source(x), rtol=1e-4, atol=1e-5)

    def test_refusals(self, tmp_path: Path) -> None:
        encoder = DenseNetEncoder(1)
        with pytest.raises(FileNotFoundError, match=r"DenseNet121 weights .*densenet121-a639ec97"):
            encoder.load_imagenet_weights(tmp_path / "none.pth")
        state = torchvision_state(encoder, old=False)
        for changed, message in (
            ({key: value for key, value in state.items() if "denseblock3" not in key}, "tensors are missing"),
            (state | {"features.denseblock9.x": torch.zeros(1)}, "does not have"),
            (state | {"features.norm5.weight": torch.zeros(3)}, r"norm5\.weight must have shape \[1024\]; got \[3\]"),
        ):
            torch.save(changed, tmp_path / "weights.pth")
            with pytest.raises(ValueError, match=message):
                encoder.load_imagenet_weights(tmp_path / "weights.pth")
