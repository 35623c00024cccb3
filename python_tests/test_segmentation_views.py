# SPDX-License-Identifier: MIT
"""Views for segmentation: each change by hand, the draws against their ranges, labels where their pixels are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels.data.segmentation_views import (
    IntensityConfig,
    IntensityParameters,
    SpatialConfig,
    SpatialParameters,
    change_intensity,
    draw_intensity,
    draw_spatial,
    gaussian_matrix,
    intensity_views,
    move_pixels,
    sampling_grid,
    spatial_views,
    view_pair,
)
from python_tests.places import default_dtype

STILL = SpatialConfig(0.0, 0.0, rotation_probability=0.0, scale_probability=0.0, centre_distance=None)
SILENT = IntensityConfig(brightness_probability=0.0, gamma_probability=0.0, noise_probability=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 4, height: int = 12, width: int = 12) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 1, height, width, generator=generator())
    return images, torch.randint(5, (count, height, width), generator=generator())


def unmoved(count: int, height: int = 12, width: int = 12, **changes: Tensor) -> SpatialParameters:
    """Parameters that move nothing, but for ``changes``."""
    nothing = SpatialParameters(
        mirror=torch.zeros(count, dtype=torch.bool),
        alpha=torch.zeros(count),
        sigma=torch.ones(count),
        angle=torch.zeros(count),
        scale=torch.ones(count),
        shift=torch.zeros(count, 2),
        noise=torch.zeros(count, 2, height, width),
    )
    return nothing._replace(**changes)


class TestIntensity:
    def test_brightness_gamma_and_noise_by_hand(self) -> None:
        images = torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 2, 2).repeat(4, 1, 1, 1)
        noise = torch.tensor([1.0, -1.0, 2.0, 0.0]).reshape(1, 2, 2).repeat(4, 1, 1)
        parameters = IntensityParameters(
            shift=torch.tensor([0.5, 0.0, 0.0, -1.0]),
            gamma=torch.tensor([1.0, 2.0, 1.0, 0.5]),
            noise_std=torch.tensor([0.0, 0.0, 0.1, 0.2]),
            noise=noise,
        )
        expected = [
            [0.5, 0.75, 1.0, 1.5],
            [0.0, 0.0625, 0.25, 1.0],
            [0.1, 0.15, 0.7, 1.0],
            [-1.0 + 0.2, -0.5 - 0.2, -1 + math.sqrt(0.5) + 0.4, 0.0],
        ]
        torch.testing.assert_close(change_intensity(images, parameters).flatten(1), torch.tensor(expected))

    def test_constant_images_stay_constant_and_finite(self) -> None:
        images = torch.full((64, 1, 4, 4), 0.3)
        config = IntensityConfig(gamma_probability=1.0, noise_probability=0.0)
        views = intensity_views(images, config, generator())
        assert torch.isfinite(views).all() and torch.equal(views.amin((2, 3)), views.amax((2, 3)))

    def test_nothing_is_done_where_everything_is_off(self) -> None:
        images, _ = batch()
        assert torch.equal(intensity_views(images, SILENT, generator()), images)

    def test_draws(self) -> None:
        drawn = draw_intensity(IntensityConfig(), 20_000, 2, 2, generator())
        for value, rest in ((drawn.shift, 0), (drawn.gamma, 1), (drawn.noise_std, 0)):
            assert abs(float((value != rest).float().mean()) - 0.5) < 0.02
        shift, gamma, std = (
            value[value != rest] for value, rest in ((drawn.shift, 0), (drawn.gamma, 1), (drawn.noise_std, 0))
        )
        assert abs(float(shift.mean()) - 1) < 0.05 and abs(float(shift.std()) - 1) < 0.05
        assert 0.5 <= gamma.min() < 0.51 and 1.99 < gamma.max() <= 2
        assert abs(float((gamma < 1).float().mean()) - 0.5) < 0.02
        assert std.min() >= 0 and 0.0999 < std.max() <= 0.1 and abs(float(std.mean()) - 0.05) < 0.002
        assert abs(float(drawn.noise.std()) - 1) < 0.02


class TestSpatial:
    def test_nothing_moves_where_everything_is_off(self) -> None:
        images, labels = batch(4, 11, 14)
        view = spatial_views(images, labels, STILL, generator())
        torch.testing.assert_close(view.images, images, rtol=0, atol=5e-6)
        assert view.labels is not None and torch.equal(view.labels, labels) and view.labels.dtype == labels.dtype

    def test_mirror_quarter_turn_and_shift_are_exact_for_labels(self) -> None:
        images, labels = batch(3)
        parameters = unmoved(
            3,
            mirror=torch.tensor([True, False, False]),
            angle=torch.tensor([0.0, math.pi / 2, 0.0]),
            shift=torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, -1.0]]),
        )
        view = move_pixels(images, labels, parameters)
        assert view.labels is not None
        for moved, original in ((view.labels, labels), (view.images[:, 0], images[:, 0])):
            torch.testing.assert_close(moved[0], original[0].flip(1), rtol=0, atol=5e-6)
            torch.testing.assert_close(moved[1], original[1].rot90(-1), rtol=0, atol=5e-6)
            # row r shows row r + 2, column c shows column c - 1, and the border is repeated
            torch.testing.assert_close(moved[2, :-2, 1:], original[2, 2:, :-1], rtol=0, atol=5e-6)
            torch.testing.assert_close(moved[2, -2:, 0], original[2, -1, 0].expand(2), rtol=0, atol=5e-6)

    def test_scale_above_one_shows_more(self) -> None:
        """A square of side 6 in the middle has side 4 at scale 3/2 and side 12 at scale 1/2."""
        labels = torch.zeros(2, 24, 24, dtype=torch.int64)
        labels[:, 9:15, 9:15] = 1
        view = move_pixels(labels[:, None].float(), labels, unmoved(2, 24, 24, scale=torch.tensor([1.5, 0.5])))
        assert view.labels is not None
        assert view.labels.sum(dim=(1, 2)).tolist() == [16, 144]
        assert view.labels[1, 6:18, 6:18].all()

    def test_the_elastic_field_is_scipys_gaussian_filter(self) -> None:
        from scipy.ndimage import gaussian_filter

        height, width = 20, 30
        noise = 2 * torch.rand(2, 2, height, width, generator=generator()) - 1
        sigma, alpha = torch.tensor([2.5, 45.0]), torch.tensor([10.0, 700.0])
        parameters = unmoved(2, height, width, alpha=alpha, sigma=sigma, noise=noise)
        moved = sampling_grid(parameters, torch.device("cpu"))
        still = sampling_grid(unmoved(2, height, width), torch.device("cpu"))
        offset = (moved - still) * torch.tensor([width / 2, height / 2])
        for index in range(2):
            for axis in range(2):
                smooth = gaussian_filter(noise[index, axis].double().numpy(), float(sigma[index]), mode="constant")
                expected = float(alpha[index]) * smooth
                np.testing.assert_allclose(offset[index, :, :, 1 - axis].numpy(), expected, atol=2e-5, rtol=1e-4)

    def test_gaussian_matrix_loses_mass_at_the_border_only(self) -> None:
        rows = gaussian_matrix(torch.tensor([1.5]), 40)[0].sum(dim=1)
        torch.testing.assert_close(rows[8:-8], torch.ones(24))
        assert rows[0] < 0.7 and torch.equal(gaussian_matrix(torch.empty(0), 3), torch.empty(0, 3, 3))

    @pytest.mark.parametrize("preset", ["global", "segmentation"])
    def test_labels_go_where_their_pixels_go_and_no_class_is_made(self, preset: str) -> None:
        labels = torch.zeros(16, 40, 40, dtype=torch.int64)
        labels[:, 8:20, 10:30] = 3
        labels[:, 22:34, 5:18] = 7
        view = spatial_views((labels == 3).float()[:, None], labels, SpatialConfig.preset(preset), generator())
        assert view.labels is not None and set(view.labels.unique().tolist()) <= {0, 3, 7}
        # The nearest pixel has at least a quarter of the weight, so a value above 3/4 or below 1/4 tells its class.
        clear = (view.images[:, 0] - 0.5).abs() > 0.251
        agreeing = (view.images[:, 0] > 0.5) == (view.labels == 3)
        assert agreeing[clear].all() and clear.float().mean() > 0.8

    def test_each_image_has_its_own_movement(self) -> None:
        images, labels = (value[:1].expand(6, *value.shape[1:]) for value in batch())
        view = spatial_views(images, labels, SpatialConfig.preset("segmentation"), generator())
        assert len({one.numpy().tobytes() for one in view.images}) == 6

    def test_draws(self) -> None:
        config = SpatialConfig(0.3, 0.8, rotation=(-0.2, 0.4), scale=(0.5, 1.9), centre_distance=5.0)
        drawn = draw_spatial(config, 20_000, 16, 8, generator())
        for chosen, share in (
            (drawn.mirror, 0.3),
            (drawn.alpha > 0, 0.8),
            (drawn.angle != 0, 0.5),
            (drawn.scale != 1, 0.5),
        ):
            assert abs(float(chosen.float().mean()) - share) < 0.02
        assert drawn.alpha.max() <= 1000 and drawn.sigma.min() >= 40 and drawn.sigma.max() <= 60
        assert drawn.angle.min() >= -0.2 and drawn.angle.max() <= 0.4
        assert 0.5 <= drawn.scale.min() < 0.51 and 1.89 < drawn.scale.max() <= 1.9
        assert abs(float((drawn.scale[drawn.scale != 1] < 1).float().mean()) - 0.5) < 0.02
        assert 2.99 < drawn.shift[:, 0].abs().max() <= 3  # 16 / 2 - 5
        assert drawn.shift[:, 1].abs().max() == 0  # a side of 8 has no place 5 pixels from both borders
        assert drawn.noise.abs().max() <= 1 and drawn.noise.min() < -0.99

    def test_labels_of_any_whole_kind(self) -> None:
        images, _ = batch(2)
        for dtype, value in ((torch.uint8, 255), (torch.int64, -100), (torch.int32, 2**24), (torch.bool, True)):
            labels = torch.full((2, 12, 12), value, dtype=dtype)
            moved = spatial_views(images, labels, SpatialConfig(), generator()).labels
            assert moved is not None and torch.equal(moved, labels)


class TestPair:
    def test_views_are_independent(self) -> None:
        images, labels = batch()
        first, second = view_pair(images, labels, IntensityConfig(), None, generator(3))
        assert not torch.equal(first.images, second.images)
        assert first.labels is labels and second.labels is labels
        moved = view_pair(images, labels, IntensityConfig(), SpatialConfig(), generator(3))
        assert not torch.equal(moved[0].labels, moved[1].labels)  # type: ignore[arg-type]

    def test_identical_views_are_changed_twice(self) -> None:
        images, _ = batch()
        config = IntensityConfig(1.0, 1.0, 0.0, 0.0, noise_probability=0.0)  # adds exactly one
        first, second = view_pair(images, None, config, None, generator(), identical_views=True)
        assert torch.equal(first.images, second.images)
        torch.testing.assert_close(first.images, images + 2)
        one, two = view_pair(images, None, config, STILL, generator(), identical_views=True)
        torch.testing.assert_close(one.images, images + 1, rtol=0, atol=5e-5)
        torch.testing.assert_close(two.images, images + 2, rtol=0, atol=5e-5)


class TestContract:
    def test_repeats_processes_and_inputs(self) -> None:
        """The same bits from the same generator; an image has the same view however many processes share the batch."""
        images, labels = batch(7, 16, 10)
        before = images.clone(), labels.clone()

        def views(some: slice, **share: Any) -> list[Tensor]:
            pair = view_pair(images[some], labels[some], IntensityConfig(), SpatialConfig(), generator(5), **share)
            return [tensor for view in pair for tensor in view if tensor is not None]

        whole = views(slice(None))
        for one, again in zip(whole, views(slice(None)), strict=True):
            assert torch.equal(one, again)
        for rank in (0, 1):
            part = views(slice(rank, None, 2), rank=rank, processes=2, batch=7)
            for one, other in zip(whole, part, strict=True):
                torch.testing.assert_close(one[rank::2], other)
        assert torch.equal(images, before[0]) and torch.equal(labels, before[1])

    def test_half_precision_and_autocast_give_float32(self) -> None:
        images, _ = batch()
        expected = spatial_views(images, None, SpatialConfig(), generator()).images
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moved = spatial_views(images, None, SpatialConfig(), generator()).images
        assert moved.dtype == torch.float32 and torch.equal(moved, expected)
        assert intensity_views(images.half(), IntensityConfig(), generator()).dtype == torch.float32

    def test_one_pixel_and_no_image(self) -> None:
        for shape in ((2, 1, 1, 1), (0, 1, 5, 5)):
            images, labels = torch.rand(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
            first, _ = view_pair(images, labels, IntensityConfig(), SpatialConfig(), generator())
            assert first.images.shape == shape and torch.isfinite(first.images).all()

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            (IntensityConfig, {"gamma_probability": 1.5}),
            (IntensityConfig, {"gamma": (1.1, 2.0)}),
            (IntensityConfig, {"gamma": (0.0, 2.0)}),
            (IntensityConfig, {"noise_std": (0.2, 0.1)}),
            (IntensityConfig, {"brightness_std": -1.0}),
            (SpatialConfig, {"mirror_probability": -0.1}),
            (SpatialConfig, {"elastic_alpha": (2.0, 1.0)}),
            (SpatialConfig, {"elastic_sigma": (0.0, 1.0)}),
            (SpatialConfig, {"rotation": (1.0, 0.0)}),
            (SpatialConfig, {"scale": (0.0, 2.0)}),
            (SpatialConfig, {"centre_distance": -1.0}),
        ],
    )
    def test_configurations_are_checked(self, kind: type, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=kind.__name__):
            kind(**changes)

    def test_presets_and_shapes(self) -> None:
        assert SpatialConfig.preset("global") == SpatialConfig()
        with pytest.raises(ValueError, match='"global" or "segmentation"; got \'local\''):
            SpatialConfig.preset("local")
        images, labels = batch()
        for wrong in (images[:, 0], images.expand(4, 3, 12, 12), (images * 255).to(torch.uint8)):
            with pytest.raises(ValueError, match=r"images must be floating point of shape \[B, 1, H, W\]"):
                intensity_views(wrong, IntensityConfig(), generator())
        for wrong in (labels[:2], labels.float(), labels[:, None]):
            with pytest.raises(ValueError, match=r"labels must be whole numbers of shape \[4, 12, 12\]"):
                spatial_views(images, wrong, SpatialConfig(), generator())


def test_the_default_type_makes_no_difference() -> None:
    images, labels = torch.rand(3, 1, 16, 12), torch.randint(3, (3, 16, 12))

    def views() -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        pair = view_pair(images, labels, IntensityConfig(), SpatialConfig(centre_distance=4.0), generator)
        return [value for view in pair for value in view if value is not None]

    expected = views()
    with default_dtype(torch.float64):
        found = views()
    assert all(one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(found, expected, strict=True))
