# SPDX-License-Identifier: MIT
"""Random changes of images: equalisation against NumPy, the drawn maps, identity, processes, and VAESim with them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protokernels.data.augmentations import Augmentation, augment, draw, equalise
from python_tests.places import default_dtype

STILL = Augmentation(equalise=0, rotation=0, scale=0, translation=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_default_type_makes_no_difference() -> None:
    images = torch.rand(4, 1, 12, 10, generator=generator())
    expected = augment(images, Augmentation(), generator(1))
    with default_dtype(torch.float64):
        assert torch.equal(augment(images, Augmentation(), generator(1)), expected)


class TestEqualise:
    def test_against_numpy(self) -> None:
        images = torch.rand(3, 2, 9, 7, generator=generator()) ** 3
        result = equalise(images)
        for index in np.ndindex(3, 2):
            levels = np.rint(images[index].numpy() * 255).astype(int)
            distribution = np.cumsum(np.bincount(levels.ravel(), minlength=256)) / levels.size
            lowest = distribution[levels.min()]
            expected = (distribution[levels] - lowest) / (1 - lowest)
            np.testing.assert_allclose(result[index].numpy(), expected, rtol=0, atol=1e-6)

    def test_range_order_and_flatness(self) -> None:
        image = torch.linspace(0, 1, 4096).view(1, 1, 64, 64) ** 4
        flat = equalise(image)
        assert float(flat.min()) == 0 and float(flat.max()) == 1
        assert bool((flat.flatten().diff() >= 0).all())
        even = torch.linspace(0, 1, 256).view(1, 1, 16, 16)  # every level once: already flat
        torch.testing.assert_close(equalise(even), even, rtol=0, atol=1e-6)

    def test_a_constant_image_stays(self) -> None:
        images = torch.cat([torch.full((1, 1, 4, 4), 0.3), torch.rand(1, 1, 4, 4)])
        result = equalise(images)
        assert torch.equal(result[0], images[0]) and not torch.equal(result[1], images[1])

    def test_the_input_is_left_alone(self) -> None:
        images = torch.rand(4, 1, 8, 8)
        before = images.clone()
        augment(images, Augmentation(equalise=1), generator())
        assert torch.equal(images, before)


class TestAugment:
    def test_no_strength_is_the_identity(self) -> None:
        images = torch.rand(5, 3, 12, 10)
        assert torch.equal(augment(images, STILL, generator()), images)

    def test_drawn_values_stay_inside_and_fill_the_range(self) -> None:
        chosen, matrix = draw(Augmentation(), 4000, (20, 40), generator())
        assert float(chosen.float().mean()) == pytest.approx(0.5, abs=0.03)
        zoom = 1 / torch.linalg.det(matrix[:, :, :2].double()).sqrt()
        angle = torch.rad2deg(torch.atan2(matrix[:, 0, 1], matrix[:, 0, 0]))
        for values, largest in ((angle, 15.0), (zoom - 1, 0.1), (matrix[:, 0, 2], 4.0), (matrix[:, 1, 2], 2.0)):
            assert largest * 0.99 < float(values.abs().max()) <= largest * (1 + 1e-5)
            assert abs(float(values.mean())) < 0.05 * largest

    def test_a_quarter_turn_a_shift_and_a_zoom(self) -> None:
        """The extremes of the drawn numbers, against rot90, a moved image and torch's own resampling."""
        image = torch.rand(1, 1, 8, 8)
        turned = augment(image, replace(STILL, rotation=90), always(1.0))
        torch.testing.assert_close(turned, torch.rot90(image, -1, dims=(2, 3)), rtol=0, atol=1e-5)
        shifted = augment(image, replace(STILL, translation=0.25), always(1.0))
        torch.testing.assert_close(shifted[..., :6, :6], image[..., 2:, 2:], rtol=0, atol=1e-5)
        assert float(shifted[..., 6:, :].abs().max()) == 0
        theta = torch.tensor([[[1 / 1.5, 0.0, 0.0], [0.0, 1 / 1.5, 0.0]]])
        grid = torch.nn.functional.affine_grid(theta, [1, 1, 8, 8], align_corners=False)
        expected = torch.nn.functional.grid_sample(image, grid, align_corners=False)
        torch.testing.assert_close(augment(image, replace(STILL, scale=0.5), always(1.0)), expected, rtol=0, atol=1e-5)

    def test_processes_share_a_batch(self) -> None:
        images = torch.rand(7, 1, 10, 10)
        whole = augment(images, Augmentation(), generator(3))
        assert torch.equal(whole, augment(images, Augmentation(), generator(3)))
        assert not torch.equal(whole, augment(images, Augmentation(), generator(4)))
        for rank in (0, 1):
            part = augment(images[rank::2], Augmentation(), generator(3), rank=rank, processes=2, batch=7)
            assert torch.equal(part, whole[rank::2])

    @pytest.mark.parametrize(
        "changes", [{"equalise": 1.1}, {"rotation": -1.0}, {"scale": 1.0}, {"translation": 2.0}, {"scale": math.nan}]
    )
    def test_refusals(self, changes: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="Augmentation: equalise and translation must lie in"):
            Augmentation(**changes)


def always(value: float) -> Any:
    """A generator whose uniform numbers are all this one (just below 1 for 1)."""
    return _Always(value)


class _Always:
    def __init__(self, value: float) -> None:
        self.value = value


@pytest.fixture(autouse=True)
def chosen_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets :func:`always` stand for a generator."""
    rand = torch.rand

    def replaced(*size: Any, generator: Any = None, **keywords: Any) -> torch.Tensor:
        if isinstance(generator, _Always):
            return torch.full(size, generator.value)
        return rand(*size, generator=generator, **keywords)

    monkeypatch.setattr(torch, "rand", replaced)


class TestVAESim:
    def test_the_preset_is_official_with_augmentation(self) -> None:
        vaesim = pytest.importorskip("protokernels.papers.vaesim", reason="VAESim needs the extra protokernels[train]")
        for data in ("mnist", "digits", "pneumoniamnist"):
            official = vaesim.VAESimConfig.preset("official", data)
            assert vaesim.VAESimConfig.preset("augmented", data) == replace(
                official, preset_name="augmented", augment=True
            )

    def test_training_sees_the_changed_images_and_evaluation_does_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vaesim = pytest.importorskip("protokernels.papers.vaesim", reason="VAESim needs the extra protokernels[train]")
        config = vaesim.VAESimConfig.preset(
            "fair", epochs=2, batch_size=500, num_prototypes=12, latent_dim=8, image_size=16, augment=True
        )
        seen: list[torch.Tensor] = []
        loss = vaesim.vaesim_loss

        def watch(images: torch.Tensor, *rest: Any) -> Any:
            seen.append(images)
            return loss(images, *rest)

        monkeypatch.setattr(vaesim, "vaesim_loss", watch)
        for name in "ab":
            vaesim.train(config, tmp_path / name, figures=False, quiet=True, device="cpu")
        half = len(seen) // 2
        assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))  # the seed decides
        plain = vaesim.train(replace(config, augment=False), tmp_path / "c", figures=False, quiet=True, device="cpu")
        assert not torch.equal(seen[0], seen[-half]) and plain["config"]["augment"] is False
        monkeypatch.setattr(vaesim, "augment", None)
        assert vaesim.evaluate(tmp_path / "a")["complete"]
