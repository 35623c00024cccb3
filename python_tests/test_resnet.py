# SPDX-License-Identifier: MIT
"""ResNet18: sizes, torchvision's names, and weight files that fit or do not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protokernels.models import ResNet18, pooled
from protokernels.models.resnet import BasicBlock


def weight_file(path: Path, **changes: Tensor | None) -> dict[str, Tensor]:
    """A file as torchvision makes it: colour images, with the classifier."""
    torch.manual_seed(0)
    state = dict(ResNet18(3).state_dict())
    state |= {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}
    state = {name: value for name, value in (state | changes).items() if value is not None}
    torch.save(state, path)
    return state


class TestNetwork:
    def test_standard_size_and_names(self) -> None:
        encoder = ResNet18(3)
        assert sum(p.numel() for p in encoder.parameters()) == 11_689_512 - 513_000  # published, without the classifier
        names = encoder.state_dict().keys()
        assert len(names) == 120
        for name in ("conv1.weight", "bn1.running_mean", "layer1.1.bn2.bias", "layer2.0.downsample.0.weight"):
            assert name in names
        assert "layer1.0.downsample.0.weight" not in names and "layer4.1.conv2.weight" in names

    @pytest.mark.parametrize(
        ("changes", "side", "expected"),
        [
            ({}, 224, 7),
            ({"width": 16, "last_stride": 1}, 112, 7),
            ({"width": 16, "stem": "small"}, 56, 7),
            ({"width": 16, "stem": "small"}, 32, 4),
            ({"width": 5, "stem": "small"}, 1, 1),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_shapes(self, changes: dict[str, Any], side: int, expected: int, channels: int) -> None:
        encoder = ResNet18(channels, **changes).eval()
        dense = encoder(torch.rand(2, channels, side, side))
        assert dense.shape == (2, encoder.dim, expected, expected) and encoder.dim == 8 * encoder.width
        assert pooled(dense).shape == (2, encoder.dim)
        if side % encoder.stride == 0:
            assert side // encoder.stride == expected

    def test_equals_the_equations(self) -> None:
        """One block written out: relu(bn(conv(relu(bn(conv(x))))) + projection)."""
        encoder = ResNet18(1, width=4, stem="small").double()
        block = encoder.layer2[0]
        x = torch.randn(3, 4, 6, 6, dtype=torch.float64)

        def norm(value: Tensor) -> Tensor:
            mean, variance = value.mean((0, 2, 3), keepdim=True), value.var((0, 2, 3), unbiased=False, keepdim=True)
            return (value - mean) / (variance + 1e-5).sqrt()

        conv = torch.nn.functional.conv2d
        assert isinstance(block.downsample, torch.nn.Sequential)
        inner = norm(conv(x, block.conv1.weight, stride=2, padding=1)).relu()
        outer = norm(conv(inner, block.conv2.weight, padding=1)) + norm(conv(x, block.downsample[0].weight, stride=2))
        torch.testing.assert_close(block(x), outer.relu())

    def test_images_are_normalised_inside(self) -> None:
        colour = ResNet18(3, width=4, stem="small")
        constant = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None].expand(2, 3, 8, 8)
        assert torch.allclose(colour.eval()(constant), torch.zeros(()), atol=1e-5)

    @pytest.mark.parametrize("width", [4, 8, 16])
    def test_gradients_do_not_depend_on_the_layout(self, width: int) -> None:
        """Nor do they corrupt memory: see the slice in `BasicBlock`."""
        torch.manual_seed(0)
        block, x = BasicBlock(width, 2 * width, stride=2), torch.randn(16, width, 56, 56)
        exact = copy.deepcopy(block).double()
        wanted = torch.autograd.grad(exact(x.double()).square().mean(), list(exact.parameters()))
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.nn.Module.to(block, memory_format=layout)  # type: ignore[call-overload]
            output = block(x.contiguous(memory_format=layout))
            for gradient, other in zip(
                torch.autograd.grad(output.square().mean(), block.parameters()), wanted, strict=True
            ):  # type: ignore[arg-type]
                torch.testing.assert_close(gradient.double(), other, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("changes", [{"channels": 2}, {"stem": "large"}, {"width": 0}, {"last_stride": 3}])
    def test_refusals(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="ResNet18"):
            ResNet18(**changes)


class TestWeights:
    def test_a_fitting_file_is_loaded(self, tmp_path: Path) -> None:
        state = weight_file(tmp_path / "resnet18.pth", **{"bn1.bias": torch.arange(64.0)})
        encoder = ResNet18(3)
        encoder.load_imagenet_weights(tmp_path / "resnet18.pth")
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, state[name]), name

    def test_grey_images_see_the_sum_over_colours(self, tmp_path: Path) -> None:
        state = weight_file(tmp_path / "resnet18.pth")
        grey, colour = ResNet18(1), ResNet18(3)
        for encoder in (grey, colour):
            encoder.load_imagenet_weights(tmp_path / "resnet18.pth")
        torch.testing.assert_close(grey.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
        x = torch.randn(1, 1, 16, 16)
        torch.testing.assert_close(grey.conv1(x), colour.conv1(x.expand(1, 3, 16, 16)), rtol=1e-4, atol=1e-4)

    def test_older_files_without_counters(self, tmp_path: Path) -> None:
        names = [name for name in ResNet18(3).state_dict() if name.endswith("num_batches_tracked")]
        weight_file(tmp_path / "resnet18.pth", **dict.fromkeys(names))
        ResNet18(3).load_imagenet_weights(tmp_path / "resnet18.pth")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer3.0.conv1.weight": None}, "1 tensors are missing, the first is 'layer3.0.conv1.weight'"),
            ({"layer3.2.conv1.weight": torch.zeros(1)}, "does not have, the first is 'layer3.2.conv1.weight'"),
            ({"bn1.weight": torch.zeros(65)}, r"bn1.weight must have shape \[64\]; got \[65\]"),
        ],
    )
    def test_other_networks_are_refused_and_change_nothing(
        self, tmp_path: Path, changes: dict[str, Tensor | None], message: str
    ) -> None:
        weight_file(tmp_path / "resnet18.pth", **changes)
        encoder = ResNet18(3)
        before = encoder.conv1.weight.clone()
        with pytest.raises(ValueError, match=message):
            encoder.load_imagenet_weights(tmp_path / "resnet18.pth")
        assert torch.equal(encoder.conv1.weight, before)

    def test_missing_damaged_and_strange_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
            ResNet18(3).load_imagenet_weights(tmp_path / "none.pth")
        damaged, listed, pickled, wrapped = (tmp_path / name for name in ("d.pth", "list.pth", "pickle.pth", "w.pth"))
        damaged.write_bytes(b"PK\x03\x04 no")
        torch.save([torch.zeros(1)], listed)
        torch.save({"state_dict": ResNet18(3).state_dict(), "epoch": 3}, wrapped)
        pickled.write_bytes(pickle.dumps({"conv1.weight": Path("x")}))
        for path, message in (
            (damaged, "cannot be read"),
            (listed, "dictionary of tensors by name, and nothing else; got list"),
            (wrapped, "got a dictionary with OrderedDict under 'state_dict'"),
            (pickled, "cannot be read"),
        ):
            with pytest.raises(ValueError, match=message):
                ResNet18(3).load_imagenet_weights(path)

    def test_only_the_standard_network(self, tmp_path: Path) -> None:
        for encoder in (ResNet18(3, width=16), ResNet18(3, stem="small")):
            with pytest.raises(ValueError, match="standard ResNet18"):
                encoder.load_imagenet_weights(tmp_path / "x.pth")
