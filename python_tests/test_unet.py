# SPDX-License-Identifier: MIT
"""The U-Net: sizes against the released network, shapes, refusals, and loading in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from protokernels.models import UNet, UNetEncoder, global_head, load_part, local_head


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestSize:
    def test_the_released_network(self) -> None:
        """Numbers of the released code: 31,030,528, of which global contrast trains 20,939,712."""
        with torch.device("meta"):
            network = UNet(width=64, depth=4)
            assert parameters(network) == 31_030_528
            assert parameters(network.encoder) == 20_939_712
            assert parameters(global_head(network.encoder.dim)) == 512 * 512 + 512 + 512 * 256 + 256
            assert parameters(local_head(64, "mlp")) == 64 * 256 + 256 + 256 * 128 + 128
            assert parameters(local_head(64, "cls")) == 64 * 128 + 128

    @pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("size", [(32, 32), (64, 32)])
    def test_maps_from_coarse_to_fine(self, depth: int, size: tuple[int, int]) -> None:
        network = UNet(2, width=3, depth=depth)
        images = torch.rand(2, 2, *size)
        expected = [[2, 3 * 2**level, size[0] >> level, size[1] >> level] for level in reversed(range(depth))]
        assert [list(each.shape) for each in network(images)] == expected
        skips, centre = network.encoder(images)
        assert [list(each.shape) for each in skips] == expected[::-1]
        assert centre.shape == skips[-1].shape and network.encoder.dim == centre.shape[1]

    @pytest.mark.parametrize("kind", ["mlp", "cls"])
    def test_heads(self, kind: str) -> None:
        assert local_head(6, kind)(torch.rand(2, 6, 8, 4)).shape == (2, 12, 8, 4)  # type: ignore[arg-type]
        assert global_head(24)(torch.rand(2, 24, 4, 4)).shape == (2, 12)

    def test_global_heads_without_and_with_a_nonlinearity(self) -> None:
        maps = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
        for kind in ("linear", "mlp"):
            torch.manual_seed(0)
            head = global_head(6, kind)  # type: ignore[arg-type]
            first, second = (layer for layer in head if isinstance(layer, nn.Linear))
            hidden = first(maps.mean(dim=(2, 3)))
            assert (hidden < 0).any()
            torch.testing.assert_close(head(maps), second(hidden.relu() if kind == "mlp" else hidden))


class TestBehaviour:
    def test_the_encoder_does_not_see_contrast_and_brightness_of_a_slice(self) -> None:
        """Instance normalisation without affine parameters: a shift is taken out by the first level, a factor nearly so."""
        torch.manual_seed(0)
        encoder = UNetEncoder(width=4, depth=2)
        x = torch.rand(2, 1, 16, 16)
        inner = encoder.levels[0][0].bias
        assert inner is not None and not any(isinstance(m, nn.InstanceNorm2d) and m.affine for m in encoder.modules())
        one, other = (encoder.levels[0](value)[..., 2:-2, 2:-2] for value in (x, 3 * x))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)

    def test_slices_do_not_meet(self) -> None:
        torch.manual_seed(0)
        network = UNet(width=4, depth=3)
        x = torch.rand(3, 1, 16, 16)
        torch.testing.assert_close(network(x)[-1][1:2], network(x[1:2])[-1], rtol=1e-4, atol=1e-5)

    def test_every_parameter_has_a_gradient(self) -> None:
        network = UNet(width=4, depth=3)
        network(torch.rand(2, 1, 16, 16))[-1].square().mean().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 1, 20, 16), "multiples of 8; got"),
            ((1, 2, 16, 16), r"expected images \[B, 1, H, W\]"),
            ((1, 16, 16), r"\[1, 16, 16\]"),
        ],
    )
    def test_images_that_do_not_fit(self, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            UNet(width=2, depth=3)(torch.rand(shape))

    def test_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="depth between 1 and 6"):
            UNet(depth=0)
        with pytest.raises(ValueError, match='kind must be "mlp" or "cls"'):
            local_head(4, "linear")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match='kind must be "linear" or "mlp"'):
            global_head(4, "cls")  # type: ignore[arg-type]


class TestLoading:
    def state(self, prefix: str = "") -> tuple[UNet, dict[str, Tensor]]:
        torch.manual_seed(1)
        source = UNet(width=2, depth=2)
        return source, {prefix + name: value for name, value in source.state_dict().items()}

    @pytest.mark.parametrize("wrapper", ["", "module."])
    def test_the_encoder_of_a_stage_with_another_head(self, wrapper: str) -> None:
        source, state = self.state(wrapper)
        state[f"{wrapper}head.weight"] = torch.zeros(3)
        target = UNet(width=2, depth=2)
        before = {name: value.clone() for name, value in target.decoder.state_dict().items()}
        load_part(target.encoder, state, "encoder.")
        for name, value in target.encoder.state_dict().items():
            assert torch.equal(value, source.encoder.state_dict()[name])
        assert all(torch.equal(value, before[name]) for name, value in target.decoder.state_dict().items())

    def test_a_missing_tensor_is_an_error_and_changes_nothing(self) -> None:
        """The released loader passes over missing names, so that training goes on from random weights."""
        _, state = self.state()
        target = UNet(width=2, depth=2)
        before = {name: value.clone() for name, value in target.state_dict().items()}
        missing = {name: value for name, value in state.items() if name != "decoder.levels.0.0.weight"}
        with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing, the first is 'decoder.levels.0.0.weight'"):
            load_part(target, missing)
        with pytest.raises(ValueError, match="tensors are missing"):
            load_part(target, {f"backbone.{name}": value for name, value in state.items()})
        with pytest.raises(ValueError, match=r"must have shape .*were width, depth and channels the same"):
            load_part(UNet(width=3, depth=2), state)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
