# SPDX-License-Identifier: MIT
"""Random views: each transformation against plain torch, the draws against their ranges, repeats bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protokernels.data import ViewConfig, two_views
from protokernels.data.views import ViewParameters, blur_matrix, draw_views, make_view, resize_matrix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unchanged(count: int, **changes: Tensor) -> ViewParameters:
    """Parameters of a view that is the whole image, but for ``changes``."""
    nothing = ViewParameters(
        box=torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1),
        flip=torch.zeros(count, dtype=torch.bool),
        brightness=torch.ones(count),
        contrast=torch.ones(count),
        sigma=torch.zeros(count),
        solarise=torch.zeros(count, dtype=torch.bool),
    )
    return nothing._replace(**changes)


class TestValue:
    def test_the_whole_image_stays_as_it_is(self) -> None:
        images = torch.randint(256, (3, 1, 20, 20), dtype=torch.uint8, generator=generator())
        torch.testing.assert_close(make_view(images, unchanged(3), 20), images / 255)
        torch.testing.assert_close(make_view(images / 255, unchanged(3), 20), images / 255)

    @pytest.mark.parametrize("size", [7, 16, 31])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_resizing_is_torchs_antialiased_one(self, size: int, channels: int) -> None:
        images = torch.rand(2, channels, 16, 16, generator=generator())
        expected = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(make_view(images, unchanged(2), size), expected, rtol=1e-5, atol=1e-5)

    def test_crop_by_hand(self) -> None:
        """A crop on whole pixels, enlarged by one: the pixels themselves; each image has its own."""
        images = torch.rand(2, 1, 8, 8, generator=generator())
        box = torch.tensor([[2.0, 1.0, 4.0, 4.0], [4.0, 0.0, 4.0, 4.0]]) / 8
        views = make_view(images, unchanged(2, box=box), 4)
        torch.testing.assert_close(views[0], images[0, :, 1:5, 2:6])
        torch.testing.assert_close(views[1], images[1, :, 0:4, 4:8])

    def test_crops_that_are_enlarged_see_the_pixels_around_them(self) -> None:
        images = torch.rand(1, 1, 8, 8, generator=generator())
        view = make_view(images, unchanged(1, box=torch.tensor([[0.25, 0.25, 0.5, 0.5]])), 8)
        larger = F.interpolate(images, (16, 16), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view, larger[:, :, 4:12, 4:12], rtol=1e-5, atol=1e-5)

    def test_flip_is_an_exact_mirror(self) -> None:
        images = torch.rand(2, 1, 9, 9, generator=generator())
        views = make_view(images, unchanged(2, flip=torch.tensor([True, False])), 9)
        torch.testing.assert_close(views, torch.stack([images[0].flip(2), images[1]]))

    def test_brightness_contrast_and_solarise_by_hand(self) -> None:
        images = torch.tensor([0.2, 0.4, 0.6, 0.8]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)
        parameters = unchanged(
            3,
            brightness=torch.tensor([1.5, 1.0, 1.0]),
            contrast=torch.tensor([1.0, 0.5, 1.0]),
            solarise=torch.tensor([False, False, True]),
        )
        expected = [[0.3, 0.6, 0.9, 1.0], [0.35, 0.45, 0.55, 0.65], [0.2, 0.4, 0.4, 0.2]]
        torch.testing.assert_close(make_view(images, parameters, 2).flatten(1), torch.tensor(expected))

    def test_blur_is_a_gaussian_and_only_where_it_is_asked_for(self) -> None:
        images = torch.zeros(3, 1, 21, 21)
        images[:, :, 10, 10] = 1
        views = make_view(images, unchanged(3, sigma=torch.tensor([0.0, 1.5, 0.8])), 21)
        assert torch.equal(views[0], images[0])
        for view, sigma in ((views[1], 1.5), (views[2], 0.8)):
            assert view.sum() == pytest.approx(1, abs=1e-5)
            middle = view[0, 10]
            assert middle[11] / middle[10] == pytest.approx(float(torch.exp(torch.tensor(-1 / (2 * sigma**2)))), 1e-4)
            torch.testing.assert_close(view, view.transpose(1, 2))

    def test_maps_keep_constants(self) -> None:
        for matrix in (resize_matrix(torch.tensor([0.1]), torch.tensor([0.3]), 9, 40), blur_matrix(torch.ones(1), 12)):
            torch.testing.assert_close(matrix.sum(dim=2), torch.ones(matrix.shape[:2]))
            assert matrix.min() >= 0


class TestDraws:
    def test_ranges(self) -> None:
        config = ViewConfig(size=112, crop_scale=0.3)
        first, second = (draw_views(config, 4000, generator(), view=view) for view in (0, 1))
        left, top, width, height = first.box.T
        assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1 + 1e-6
        inside = (width < 1) & (height < 1)
        ratio, area = (width / height)[inside], (width * height)[inside]
        assert ratio.min() >= 0.75 - 1e-4 and ratio.max() <= 4 / 3 + 1e-4 and area.min() >= 0.3 - 1e-4
        assert 0.6 <= first.brightness.min() < 0.7 and 1.3 < first.contrast.max() <= 1.4
        assert abs(float((first.brightness == 1).float().mean()) - 0.2) < 0.03
        assert first.sigma.min() >= 0.05 - 1e-6 and first.sigma.max() <= 1.0  # (0.1, 2) pixels at side 224
        assert abs(float((second.sigma > 0).float().mean()) - 0.1) < 0.02
        assert not first.solarise.any() and abs(float(second.solarise.float().mean()) - 0.2) < 0.03
        assert abs(float(first.flip.float().mean()) - 0.5) < 0.03

    def test_nothing_is_done_where_everything_is_off(self) -> None:
        images = torch.rand(4, 1, 12, 12, generator=generator())
        off = ViewConfig(12, 1.0, 1.0, 0.0, 0.0, 0.0, (0.0, 0.0), (0.1, 2.0), (0.0, 0.0))
        for view in two_views(images, off, generator()):
            torch.testing.assert_close(view, images)

    def test_repeats_and_processes(self) -> None:
        """The same bits from the same generator; an image has the same view however many processes share the batch."""
        images = torch.rand(7, 1, 24, 24, generator=generator())
        config = ViewConfig(size=16)
        whole = two_views(images, config, generator(3))
        for one, again in zip(whole, two_views(images, config, generator(3)), strict=True):
            assert torch.equal(one, again)
        for rank in (0, 1):
            part = two_views(images[rank::2], config, generator(3), rank=rank, processes=2, batch=7)
            for one, other in zip(whole, part, strict=True):
                torch.testing.assert_close(one[rank::2], other)
        assert not torch.equal(*whole) and not torch.equal(whole[0], two_views(images, config, generator(4))[0])

    def test_views_stay_in_range_and_leave_the_images_alone(self) -> None:
        images = torch.randint(256, (64, 3, 17, 23), dtype=torch.uint8, generator=generator())
        before = images.clone()
        for view in two_views(images, ViewConfig(size=20), generator()):
            assert view.shape == (64, 3, 20, 20) and view.dtype == torch.float32
            assert view.min() >= 0 and view.max() <= 1 and torch.isfinite(view).all()
        assert torch.equal(images, before)

    def test_one_image_and_one_pixel(self) -> None:
        first, _ = two_views(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), ViewConfig(size=5), generator())
        assert first.shape == (1, 1, 5, 5) and torch.allclose(first, first[0, 0, 0, 0])


class TestContract:
    @pytest.mark.parametrize(
        "changes",
        [
            {"size": 0},
            {"crop_scale": 0.0},
            {"crop_scale": 1.5},
            {"crop_ratio": 0.5},
            {"flip": 1.5},
            {"jitter": -1.0},
            {"blur": (2.0, 0.0)},
            {"blur_sigma": (0.0, 1.0)},
            {"blur_sigma": (2.0, 1.0)},
        ],
    )
    def test_refusals(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="ViewConfig"):
            ViewConfig(**changes)

    def test_parameters_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"got \[2, 1, 4, 4\] and 3 parameters"):
            make_view(torch.rand(2, 1, 4, 4), unchanged(3), 4)
