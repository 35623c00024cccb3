# SPDX-License-Identifier: MIT
"""`RandomViews`: what it draws, by which generator, in which shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from protokernels.nn import RandomViews, ViewStrength
from protokernels.nn.random_views import ViewParameters, view_matrix
from python_tests.places import PLACES, Place, default_dtype
from python_tests.test_nn_warp import EVERYTHING
from python_tests.warp_oracle import draw


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestDraws:
    COUNT = 20_000

    def test_every_transformation_has_its_probability_and_range(self) -> None:
        strength = ViewStrength(
            crop=0.6, crop_scale=(0.3, 0.8), hflip=0.2, vflip=0.9, rotate=0.3, rotation=(0.1, 0.7), jitter=0.7, offset=0.4,
            offset_normal=(3.0, 0.5), gamma=0.35, blur=0.45, blur_sigma=(0.5, 1.5), noise=0.55, noise_std=(0.2, 0.3), solarise=0.15,
        )  # fmt: skip
        p = RandomViews(8, strength).draw(self.COUNT, generator=torch.Generator().manual_seed(1))
        area = p.box[:, 2] * p.box[:, 3]
        happened = {
            "crop": area < 1, "hflip": p.mirror[:, 0], "vflip": p.mirror[:, 1], "rotate": p.angle != 0, "jitter": p.brightness != 1,
            "offset": p.offset != 0, "gamma": p.gamma != 1, "blur": p.sigma > 0, "noise": p.noise_std > 0, "solarise": p.solarise,
        }  # fmt: skip
        for name, cases in happened.items():
            chance = getattr(strength, name)
            assert abs(cases.double().mean().item() - chance) < 5 * math.sqrt(chance * (1 - chance) / self.COUNT), name
        for values, (low, high) in (
            (p.angle[p.angle != 0], strength.rotation), (p.sigma[p.sigma > 0], strength.blur_sigma),
            (p.noise_std[p.noise_std > 0], strength.noise_std), (p.gamma[p.gamma != 1].log(), (math.log(0.5), math.log(2.0))),
            (p.brightness[p.brightness != 1], (0.6, 1.4)), (p.contrast[p.contrast != 1], (0.6, 1.4)),
            (area[area < 1], strength.crop_scale),
        ):  # fmt: skip
            assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5
            assert values.double().mean().item() == pytest.approx(
                (low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * len(values))
            )
        added = p.offset[p.offset != 0].double()
        assert added.mean().item() == pytest.approx(3.0, abs=5 * 0.5 / math.sqrt(len(added)))
        assert added.std().item() == pytest.approx(0.5, rel=0.05)
        pairs = torch.stack([x.double() for x in happened.values()])
        assert (torch.corrcoef(pairs) - torch.eye(len(pairs))).abs().max() < 5 / math.sqrt(self.COUNT)

    def test_crops_lie_inside_or_around_the_image(self) -> None:
        p = RandomViews(8, ViewStrength(crop_scale=(0.05, 1.0))).draw(self.COUNT)
        left, top, width, height = p.box.unbind(1)
        for start, length in ((left, width), (top, height)):
            assert (start >= -1e-6).all() and (start + length <= 1 + 1e-6).all() and (length > 0).all()
        ratio = (width / height)[(width < 1) & (height < 1)]
        assert ratio.min() >= 3 / 4 - 1e-4 and ratio.max() <= 4 / 3 + 1e-4
        p = RandomViews(8, ViewStrength(crop_scale=(1.2, 2.0), crop_ratio=(1.0, 1.0))).draw(self.COUNT)
        left, top, width, height = p.box.unbind(1)
        assert (width > 1).all() and (left <= 0).all() and (left + width >= 1).all() and torch.equal(width, height)

    @pytest.mark.parametrize("sides", [None, (32, 32), (64, 128), (90, 30)])
    def test_area_and_ratio_are_those_asked_for(self, sides: tuple[int, int] | None) -> None:
        """The ratio in pixels; of large crops too, whose sides are never cut."""
        H, W = sides or (1, 1)
        for area, ratio in ((0.2, 0.7), (0.05, 4.0), (1.44, 2.0), (1.01, 0.3)):
            strength = ViewStrength(crop_scale=(area, area), crop_ratio=(ratio, ratio))
            left, top, width, height = RandomViews(8, strength).draw(self.COUNT, sides=sides).box.unbind(1)
            cut = area <= 1 and max((area * ratio * H / W), (area / ratio * W / H)) > 1
            if not cut:
                torch.testing.assert_close(width * height, torch.full_like(width, area))
                torch.testing.assert_close(width * W / (height * H), torch.full_like(width, ratio))
            else:
                assert torch.maximum(width, height).eq(1).all()
            for start, room in ((left, 1 - width), (top, 1 - height)):  # anywhere inside, or around
                assert (start * room.sign() >= -1e-6).all() and (start.abs() <= room.abs() + 1e-6).all()

    def test_forward_knows_the_sides_of_the_images(self, place: Place) -> None:
        images = draw((5, 1, 12, 24), seed=18)[0].to(place.device)
        views = RandomViews(
            8, ViewStrength(crop_scale=(0.2, 0.4), crop_ratio=(1.0, 1.0), hflip=0.0, jitter=0.0, blur=0.0)
        )
        (seen,) = views(images, generator=torch.Generator().manual_seed(8))
        drawn = views.draw(5, sides=(12, 24), generator=torch.Generator().manual_seed(8))
        assert torch.equal(seen, views.make(images, drawn))
        matrix = view_matrix(drawn, (12, 24), (8, 8))
        torch.testing.assert_close(matrix[:, 0, 0], matrix[:, 1, 1])  # a square of pixels

    def test_the_scale_of_local_contrast_keeps_shapes(self) -> None:
        views = RandomViews.preset("local_contrast", (32, 64))
        matrix = view_matrix(views.draw(50, sides=(30, 90)), (30, 90), views.size)
        scale = matrix[:, :, :2].square().sum(2).sqrt()
        whole = torch.tensor([90 / 64, 30 / 32]).expand(
            50, 2
        )  # where nothing is scaled, all of the image is in the view
        scaled = ~torch.isclose(scale, whole).all(1)
        assert 10 < scaled.sum() < 40
        uncut = scale[scaled & (scale[:, 0] * 64 * scale[:, 1] * 32 > 30 * 90)]
        torch.testing.assert_close(uncut[:, 0], uncut[:, 1])

    def test_seeds_are_all_different(self) -> None:
        p = RandomViews(8).draw(self.COUNT)
        assert len(p.seed.unique()) == self.COUNT

    def test_views_do_not_depend_on_the_division_over_processes(self, place: Place) -> None:
        images = draw((7, 1, 12, 12), seed=11)[0].to(place.device)
        views = RandomViews(10, EVERYTHING, EVERYTHING)
        whole = views(images, generator=torch.Generator().manual_seed(2))
        generator = torch.Generator().manual_seed(2)
        for view, expected in enumerate(whole):
            drawn = views.draw(7, view, generator=generator)
            for rank in range(3):
                part = views.make(images[rank::3], drawn.part(rank, 3), view)
                assert torch.equal(part, expected[rank::3])

    def test_torchs_default_type_does_not_matter(self, place: Place) -> None:
        views = RandomViews(16, ViewStrength(rotate=0.5, offset=0.5, gamma=0.5, noise=0.5, solarise=0.5))
        images = torch.rand(6, 1, 20, 20).to(place.device)
        expected = (
            views(images, generator=place.seeded(1))[0],
            views.draw(6, generator=torch.Generator().manual_seed(1)),
        )
        with default_dtype(torch.float64):
            found = (
                views(images, generator=place.seeded(1))[0],
                views.draw(6, generator=torch.Generator().manual_seed(1)),
            )
        assert torch.equal(found[0], expected[0])
        for name, a, b in zip(ViewParameters._fields, found[1], expected[1], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name

    def test_the_generator_decides(self, place: Place) -> None:
        images = draw((4, 1, 12, 12), seed=12)[0].to(place.device)
        views = RandomViews(10, EVERYTHING)
        first, again = (views(images, generator=place.seeded(3))[0] for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(first, views(images, generator=place.seeded(4))[0])
        torch.manual_seed(5)
        default = views(images)[0]
        torch.manual_seed(5)
        assert torch.equal(views(images)[0], default)
