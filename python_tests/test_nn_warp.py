# SPDX-License-Identifier: MIT
"""Transformations as modules: DifferentiableTransform is its function; RandomViews against formulas, its draws, what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protokernels import affine_warp, rotate, transform
from protokernels.nn import DifferentiableTransform, RandomViews, ViewStrength
from protokernels.nn.random_views import ViewParameters, view_matrix
from python_tests.places import NATIVE_PLACES, PLACES, Place
from python_tests.warp_oracle import STAGES, draw

OPTIONS: dict[str, Any] = {
    "order": STAGES[::-1], "sigma_max": 1.1, "noise_std": 0.5, "crop_size": 0.8, "sharpness": 2.5, "radius": 3, "blur_padding": "zeros",
}  # fmt: skip
NOTHING = ViewStrength(crop=0.0, hflip=0.0, jitter=0.0, blur=0.0)
PRESETS = ["contrastive_autoencoder", "local_contrast", "optiml"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def unchanged(B: int, **changes: Tensor) -> ViewParameters:
    """Parameters that leave images as they are, but for those given."""
    zeros, ones = torch.zeros(B), torch.ones(B)
    parameters = ViewParameters(
        box=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(B, 1), mirror=torch.zeros(B, 2, dtype=torch.bool), angle=zeros,
        brightness=ones, contrast=ones, offset=zeros, gamma=ones, sigma=zeros, noise_std=zeros, seed=torch.arange(B),
        solarise=torch.zeros(B, dtype=torch.bool),
    )  # fmt: skip
    return parameters._replace(**changes)


EVERYTHING = ViewStrength(
    rotate=0.5, vflip=0.5, offset=0.5, gamma=0.5, noise=0.5, solarise=0.5, offset_normal=(0.0, 0.1)
)


class TestDifferentiableTransform:
    @pytest.mark.parametrize("name", ["", *OPTIONS])
    def test_every_option_reaches_the_function(self, name: str) -> None:
        images, params, seed = draw((2, 2, 9, 6), seed=1)
        options = {name: OPTIONS[name]} if name else {}
        module = DifferentiableTransform(**options)
        assert torch.equal(module(images, params, seed=seed), transform(images, params, seed=seed, **options))
        assert not name or getattr(module, name) == OPTIONS[name]

    def test_what_is_on_and_random_is_given_at_the_call(self) -> None:
        images, params, seed = draw((2, 2, 9, 6), seed=2)
        module = DifferentiableTransform()
        enabled = torch.rand(2, 6, generator=torch.Generator().manual_seed(3)) < 0.5
        expected = transform(images, params, seed=seed, enabled=enabled)
        assert torch.equal(module(images, params, seed=seed, enabled=enabled), expected)
        assert torch.equal(module(images, params, enabled=["hflip"]), transform(images, params, order=["hflip"]))
        first, second = (module(images, params, generator=torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        "options",
        [{"order": ["zoom"]}, {"order": ["blur", "blur"]}, {"sigma_max": -1.0}, {"noise_std": math.nan}, {"crop_size": math.inf},
         {"sharpness": 0.0}, {"radius": 100}, {"blur_padding": "edge"}],
    )  # fmt: skip
    def test_what_is_wrong_is_refused_when_it_is_made(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^DifferentiableTransform: "):
            DifferentiableTransform(**options)

    def test_copies_pickles_and_no_state(self) -> None:
        images, params, seed = draw((2, 2, 9, 6), seed=5)
        module = DifferentiableTransform(**OPTIONS)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(images, params, seed=seed), module(images, params, seed=seed))
        assert not module.state_dict() and "noise_std=0.5" in repr(module)


class TestViews:
    @pytest.mark.parametrize("shape", [(3, 2, 8, 8), (2, 1, 7, 12), (1, 3, 1, 9)])
    def test_where_nothing_happens_images_are_exact(self, place: Place, shape: tuple[int, ...]) -> None:
        images = draw(shape, seed=1)[0].to(place.device)
        for strength in (NOTHING, EVERYTHING):
            views = RandomViews((shape[2], shape[3]), strength)
            assert torch.equal(views.make(images, unchanged(shape[0])), images)
        (view,) = RandomViews((shape[2], shape[3]), NOTHING)(images)
        assert torch.equal(view, images)

    def test_flips_are_exact(self, place: Place) -> None:
        images = draw((2, 2, 7, 12), seed=2)[0].to(place.device)
        for hflip, vflip, axes in ((1.0, 0.0, [3]), (0.0, 1.0, [2]), (1.0, 1.0, [2, 3])):
            strength = ViewStrength(crop=0.0, hflip=hflip, vflip=vflip, jitter=0.0, blur=0.0)
            (view,) = RandomViews((7, 12), strength)(images)
            assert torch.equal(view, images.flip(axes))

    def test_a_whole_image_is_resized_as_interpolate_does(self, place: Place) -> None:
        images = draw((2, 2, 9, 14), seed=3)[0].to(place.device)
        for size in ((18, 28), (13, 17), (5, 9)):
            views = RandomViews(size, NOTHING, antialias=False)
            expected = F.interpolate(images, size, mode="bilinear", align_corners=False)
            torch.testing.assert_close(views.make(images, unchanged(2)), expected, rtol=0, atol=1e-5)

    def test_a_crop_is_the_resized_part(self, place: Place) -> None:
        """Inside; at its border the pixels around it take part, which a cut-out does not have."""
        images = draw((2, 1, 16, 20), seed=4)[0].to(place.device)
        box = torch.tensor([[5 / 20, 4 / 16, 10 / 20, 8 / 16]]).repeat(2, 1)
        view = RandomViews((16, 20), NOTHING, antialias=False).make(images, unchanged(2, box=box))
        expected = F.interpolate(images[:, :, 4:12, 5:15], (16, 20), mode="bilinear", align_corners=False)
        torch.testing.assert_close(view[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-5)

    def test_a_rotation_turns_counter_clockwise_about_the_crops_centre(self, place: Place) -> None:
        images = draw((1, 1, 12, 12), seed=5)[0].to(place.device)
        box, quarter = torch.tensor([[2 / 12, 3 / 12, 0.5, 0.5]]), torch.tensor([math.pi / 2])
        views = RandomViews((6, 6), NOTHING)
        view = views.make(images, unchanged(1, box=box, angle=quarter))
        torch.testing.assert_close(view, images[:, :, 3:9, 2:8].rot90(1, (2, 3)), rtol=0, atol=1e-5)

    def test_crop_flip_and_rotation_are_one_map(self, place: Place) -> None:
        """Step by step, for single points of the view, back from the last step: turned, mirrored, stretched to the crop's size, moved to
        its centre."""
        parameters = unchanged(
            2, box=torch.tensor([[0.1, 0.2, 0.5, 0.4], [0.3, 0.0, 0.7, 0.9]]), angle=torch.tensor([0.4, -2.0]),
            mirror=torch.tensor([[True, False], [True, True]]),
        )  # fmt: skip
        H, W, size = 30, 40, (8, 10)
        matrix = view_matrix(parameters, (H, W), size).double()
        for b in range(2):
            left, top, width, height = parameters.box[b].double().tolist()
            angle = parameters.angle[b].item()
            for u, v in ((0.0, 0.0), (3.0, -1.5), (-4.5, 3.5)):  # from the view's centre
                x, y = math.cos(angle) * u - math.sin(angle) * v, math.sin(angle) * u + math.cos(angle) * v
                x, y = (-x if parameters.mirror[b, 0] else x), (-y if parameters.mirror[b, 1] else y)
                x, y = x * width * W / size[1], y * height * H / size[0]
                x, y = x + (left + width / 2) * W, y + (top + height / 2) * H  # from the image's corner
                at = matrix[b] @ torch.tensor([u, v, 1.0], dtype=torch.float64)
                assert at.tolist() == pytest.approx([x - W / 2, y - H / 2], abs=1e-5)
        images = draw((2, 1, H, W), seed=6)[0].to(place.device)
        view = RandomViews(size, NOTHING, padding_mode="reflection", antialias=False).make(images, parameters)
        expected = affine_warp(images, matrix.float().to(place.device), size=size, padding_mode="reflection")
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("flips", [[], [3], [2], [2, 3]])
    def test_a_rotation_comes_after_crop_and_flips(self, place: Place, flips: list[int]) -> None:
        """Each step by its own function. Bilinear pixels of a plane lie on it, so that three passes and one agree where all see it."""
        mirror = torch.tensor([[3 in flips, 2 in flips]])
        rows, columns = torch.arange(24.0, device=place.device).view(-1, 1), torch.arange(40.0, device=place.device)
        plane = (rows / 40 + columns / 100).expand(1, 1, 24, 40)
        box = torch.tensor([[0.25, 0.25, 0.5, 0.375]])  # 9 rows from 6, 20 columns from 10
        for size, angle in (((12, 12), math.pi / 2), ((12, 12), 0.4), ((10, 16), -2.0)):
            cut = F.interpolate(plane[:, :, 6:15, 10:30], size, mode="bilinear", align_corners=False)
            expected = rotate(cut.flip(flips), angle)
            seen = rotate(F.pad(torch.ones_like(cut[..., 2:-2, 2:-2]), (2, 2, 2, 2)), angle) > 1 - 1e-6
            assert seen.sum() > 20
            parameters = unchanged(1, box=box, mirror=mirror, angle=torch.tensor([angle]))
            view = RandomViews(size, NOTHING, antialias=False).make(plane, parameters)
            torch.testing.assert_close(view[seen], expected[seen], rtol=0, atol=1e-5)

    def test_flipped_and_turned_by_a_quarter(self, place: Place) -> None:
        images = draw((2, 1, 6, 6), seed=17)[0].to(place.device)
        strength = ViewStrength(crop=0.0, hflip=1.0, jitter=0.0, blur=0.0, rotate=1.0, rotation=(math.pi / 2,) * 2)
        (view,) = RandomViews(6, strength)(images)
        torch.testing.assert_close(view, images.flip(3).rot90(1, (2, 3)), rtol=0, atol=1e-5)

    def test_shrinking_does_not_alias(self, place: Place) -> None:
        """Stripes of two pixels sampled every fourth pixel: grey with antialiasing, a pattern without."""
        stripes = (torch.arange(64, device=place.device) % 4 < 2).float().expand(1, 1, 64, 64).contiguous()
        smooth, rough = (RandomViews(15, NOTHING, antialias=a).make(stripes, unchanged(1)) for a in (True, False))
        assert smooth[..., 2:-2, 2:-2].std() < 0.12 < 0.3 < rough.std()
        flat = torch.full((1, 1, 64, 64), 0.3, device=place.device)
        torch.testing.assert_close(RandomViews(15, NOTHING).make(flat, unchanged(1)), flat[..., :15, :15])

    def test_intensities_follow_their_formulas(self, place: Place) -> None:
        images = draw((3, 2, 6, 5), seed=7, dtype=torch.float64)[0]
        x = images.to(place.device)
        value = torch.tensor([0.5, 1.0, 1.7])
        factor = value.double().view(3, 1, 1, 1)

        def make(**changes: Tensor) -> Tensor:
            return RandomViews((6, 5), EVERYTHING).make(x, unchanged(3, **changes)).cpu()

        mean = images.mean((1, 2, 3), keepdim=True)
        low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
        mirrored = (images >= 0.5) & (value != 1).view(3, 1, 1, 1)
        powered = ((images - low) / (high - low)) ** factor * (high - low) + low
        for actual, expected in (
            (make(brightness=value), (images * factor).clamp(0, 1)),
            (make(contrast=value), (mean + (images - mean) * factor).clamp(0, 1)),
            (make(offset=value - 1), (images + factor - 1).clamp(0, 1)),
            (make(gamma=value), powered),
            (make(solarise=torch.tensor([True, False, True])), torch.where(mirrored, 1 - images, images)),
        ):  # fmt: skip
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)

    def test_blur_and_noise_are_those_of_the_chain(self, place: Place) -> None:
        images = draw((3, 1, 9, 9), seed=8)[0].to(place.device)
        sigma, std, seed = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.1, 0.0, 0.3]), torch.tensor([5, 6, 7])
        view = RandomViews(9, ViewStrength(noise=1.0), limits=None)
        actual = view.make(images, unchanged(3, sigma=sigma, noise_std=std, seed=seed))
        params = torch.zeros(3, 7)
        params[:, 0], params[:, 1] = sigma, std
        expected = transform(
            images, params.to(place.device), order=["blur", "noise"], sigma_max=1.0, noise_std=1.0, seed=seed.to(place.device)
        )  # fmt: skip
        assert torch.equal(actual, expected)

    def test_the_blur_has_the_taps_that_are_asked_for(self, place: Place) -> None:
        dot, sigma = torch.zeros(2, 1, 15, 15), torch.tensor([2.0, 0.7])
        dot[..., 7, 7] = 1.0
        for radius, reach in ((2, 2), (0, 0), (None, 6)):
            strength = ViewStrength(crop=0.0, hflip=0.0, jitter=0.0, blur=1.0, blur_radius=radius)
            view = RandomViews(15, strength).make(dot.to(place.device), unchanged(2, sigma=sigma)).cpu()
            taps = (-(torch.arange(-reach, reach + 1.0).square()) / (2 * sigma[:, None] ** 2)).exp()
            taps = F.pad(taps / taps.sum(dim=1, keepdim=True), (7 - reach, 7 - reach))
            torch.testing.assert_close(view[:, 0], taps[:, :, None] * taps[:, None], rtol=1e-4, atol=1e-6)
        for strength in RandomViews.preset("contrastive_autoencoder", 8).strengths:
            assert strength.blur_radius == 2

    def test_limits_hold(self, place: Place) -> None:
        images = draw((20, 1, 8, 8), seed=9)[0].to(place.device)
        strong = ViewStrength(
            jitter=1.0, brightness=1.0, contrast=1.0, offset=1.0, gamma=1.0, noise=1.0, noise_std=(1.0, 2.0)
        )
        for view in RandomViews(8, strong, strong)(images):
            assert view.min() >= 0 and view.max() <= 1
        (view,) = RandomViews(8, strong, limits=None)(images)
        assert view.min() < 0 and view.max() > 1

    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_make_two_different_views(self, place: Place, preset: str) -> None:
        images = draw((6, 1, 40, 48), seed=10)[0].to(place.device)
        first, second = RandomViews.preset(preset, 32)(images, generator=place.seeded(0))
        assert first.shape == second.shape == (6, 1, 32, 32)
        assert first.isfinite().all() and not torch.equal(first, second)


class TestContract:
    def test_bytes_become_shares_and_other_types_stay(self, place: Place) -> None:
        images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, device=place.device)
        views = RandomViews(8, EVERYTHING)
        (view,) = views(images, generator=place.seeded(0))
        assert view.dtype == torch.float32
        assert torch.equal(view, views(images.float() / 255, generator=place.seeded(0))[0])
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            (other,) = views(images.to(dtype) / 255, generator=place.seeded(0))
            assert other.dtype == dtype
        before = images.clone()
        views(images)
        assert torch.equal(images, before)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_gradients_reach_the_images(self, place: Place, preset: str) -> None:
        images = draw((4, 1, 20, 20), seed=13)[0].to(place.device)
        images[0] = 0.5  # constant: no gamma, no contrast
        images.requires_grad_()
        first, second = RandomViews.preset(preset, 16)(images, generator=place.seeded(1))
        (grad,) = torch.autograd.grad(first.square().sum() + second.sum(), images)
        assert grad.isfinite().all() and grad.any()

    def test_compile_without_graph_breaks(self, place: Place) -> None:
        torch.compiler.reset()
        images = draw((4, 1, 12, 12), seed=14)[0].to(place.device)
        views = RandomViews(10, ViewStrength(rotate=1.0, noise=1.0))
        faster = torch.compile(views, fullgraph=True, backend="aot_eager")
        first, second = faster(images)[0], faster(images)[0]
        assert first.shape == (4, 1, 10, 10) and not torch.equal(first, second)  # drawn inside the graph
        drawn = views.draw(4)
        make = torch.compile(views.make, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(make(images, drawn), views.make(images, drawn), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_compile_for_any_number_of_images(self, place: Place, preset: str) -> None:
        """A smaller last batch makes torch compile for sizes that are no numbers."""
        torch.compiler.reset()
        with place.selected():
            faster = torch.compile(RandomViews.preset(preset, 16), fullgraph=True, backend="aot_eager")
            for count in (8, 5, 3):
                for view in faster(draw((count, 1, 24, 24), seed=16)[0].to(place.device)):
                    assert view.shape == (count, 1, 16, 16) and view.isfinite().all()

    def test_export_with_a_free_batch_size(self, place: Place) -> None:
        views = RandomViews.preset("local_contrast", 16)
        images = draw((5, 1, 24, 24), seed=17)[0].to(place.device)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(views, (images[:3],), dynamic_shapes=({0: batch},)).module()
        torch.manual_seed(0)
        expected = views(images)
        torch.manual_seed(0)
        for a, b in zip(exported(images), expected, strict=True):
            assert torch.equal(a, b)

    def test_no_images(self, place: Place) -> None:
        for view in RandomViews(8, EVERYTHING, EVERYTHING)(torch.zeros(0, 1, 12, 12, device=place.device)):
            assert view.shape == (0, 1, 8, 8)

    def test_copies_pickles_and_no_state(self) -> None:
        images = draw((2, 1, 12, 12), seed=15)[0]
        views = RandomViews((8, 9), EVERYTHING, ViewStrength(), limits=(-1.0, 1.0))
        expected = views(images, generator=torch.Generator().manual_seed(7))
        for other in (copy.deepcopy(views), pickle.loads(pickle.dumps(views))):
            for a, b in zip(other(images, generator=torch.Generator().manual_seed(7)), expected, strict=True):
                assert torch.equal(a, b)
        assert not views.state_dict()
        assert "size=(8, 9), ViewStrength(vflip=0.5" in repr(views)

    @pytest.mark.parametrize(
        "options",
        [{"crop": 1.5}, {"blur": -0.1}, {"crop_scale": (0.5, 0.2)}, {"crop_ratio": (0.0, 1.0)}, {"gamma_range": (0.0, 2.0)},
         {"blur_sigma": (-1.0, 1.0)}, {"noise_std": (0.2, 0.1)}, {"rotation": (1.0, 0.0)}, {"contrast": 1.5},
         {"offset_normal": (0.0, -1.0)}, {"blur_radius": -1}, {"blur_radius": 65}],
    )  # fmt: skip
    def test_wrong_strengths_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^ViewStrength: "):
            ViewStrength(**options)

    def test_wrong_views_are_refused(self) -> None:
        for make in (
            lambda: RandomViews(0), lambda: RandomViews((8, 8, 8)), lambda: RandomViews(8, padding_mode="wrap"),  # type: ignore[arg-type]
            lambda: RandomViews(8, limits=(1.0, 0.0)), lambda: RandomViews(8, ViewStrength(solarise=0.5), limits=None),
            lambda: RandomViews.preset("simclr", 8), lambda: RandomViews(8)(torch.zeros(1, 8, 8)),
            lambda: RandomViews(8)(torch.zeros(1, 1, 8, 8).int()),
            lambda: RandomViews(8).make(torch.zeros(2, 1, 8, 8), unchanged(3)),
            lambda: RandomViews.preset("optiml", "16"), lambda: RandomViews.preset("optiml", None),  # type: ignore[arg-type]
            lambda: RandomViews(8).draw(2, 5), lambda: RandomViews(8).draw(2, -1), lambda: RandomViews(8).draw(-1),
            lambda: RandomViews(8).make(torch.zeros(3, 1, 8, 8), unchanged(3), 2),
            lambda: RandomViews(8).draw(2, sides=(8,)), lambda: RandomViews(8).draw(2, sides=(8, -1)),
            lambda: RandomViews(8).draw(2, sides=8), lambda: RandomViews(8).draw(2, sides=(8.0, 4.0)),  # type: ignore[arg-type]
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"^RandomViews: "):
                make()
        for make in (
            lambda: RandomViews(16, "strong"), lambda: RandomViews(8).draw(2.0), lambda: RandomViews(8).draw(2, "first"),  # type: ignore[arg-type]
            lambda: RandomViews(8).make(torch.zeros(2, 1, 8, 8), None),  # type: ignore[arg-type]
        ):  # fmt: skip
            with pytest.raises(TypeError, match=r"^RandomViews: "):
                make()

    def test_presets_take_both_sides(self) -> None:
        for name in ("contrastive_autoencoder", "local_contrast", "optiml"):
            assert RandomViews.preset(name, (16, 16)).strengths == RandomViews.preset(name, 16).strengths
            assert RandomViews.preset(name, (16, 24)).size == (16, 24)
