# SPDX-License-Identifier: MIT
"""What holds for the op `warp` on any problem: invariants on sizes, values and seeds that hypothesis chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protokernels import affine_warp, backend, blend_flip, gaussian_blur, rotate, soft_crop, transform
from python_tests import warp_oracle as oracle
from python_tests.places import PLACES, Place
from python_tests.prototypes_oracle import as_numpy
from python_tests.test_warp import AFFINE_PADDINGS, PADDINGS, draw_matrices
from python_tests.warp_oracle import STAGES, check, draw, rounding

# One fixture serves all examples of a test: it only selects the backend.
COMMON = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIDES = st.sampled_from([1, 2, 3, 5, 8, 11, 16, 17, 34])
CHANNELS = st.sampled_from([1, 2, 3, 5])
SEEDS = st.integers(0, 2**31 - 1)
ORDERS = st.permutations(STAGES).flatmap(lambda order: st.integers(0, 6).map(lambda count: tuple(order[:count])))
ANGLES = st.floats(-20, 20, allow_nan=False, width=32)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def near(a: Tensor, b: Tensor, error: float) -> None:
    check(a, as_numpy(b), error)


class TestValue:
    @COMMON
    @given(
        B=st.integers(1, 3), C=CHANNELS, H=SIDES, W=SIDES, order=ORDERS, radius=st.integers(0, 9),
        padding=st.sampled_from(PADDINGS), size=st.floats(0.1, 1.5), sharpness=st.floats(0.1, 3.0), seed=SEEDS,
    )  # fmt: skip
    def test_values_agree_with_the_oracle_and_gradients_with_float64(
        self, place: Place, B: int, C: int, H: int, W: int, order: Any, radius: int, padding: Any, size: float,
        sharpness: float, seed: int,
    ) -> None:  # fmt: skip
        images, params, keys = draw((B, C, H, W), seed, torch.float64)
        enabled = torch.rand(B, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
        options: dict[str, Any] = {
            "order": order, "radius": radius, "blur_padding": padding, "crop_size": size, "sharpness": sharpness,
        }  # fmt: skip
        grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        results = []
        for name, device in ((place.backend, place.device), ("reference", "cpu")):
            with backend.use(name):
                x, p = (t.to(device).requires_grad_() for t in (images, params))
                y = transform(x, p, seed=keys.to(device), enabled=enabled.to(device), **options)
                results.append((y.detach().cpu(), *torch.autograd.grad(y, (x, p), grad.to(device))))
        expected = oracle.transform(images, params, keys, enabled=enabled, **options)
        check(results[0][0], expected, 2 * rounding(images, radius=radius, sharpness=sharpness, noise=0.1))
        for now, then in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(now.cpu(), then, rtol=1e-9, atol=1e-9)

    @COMMON
    @given(
        B=st.integers(1, 3), C=CHANNELS, size=st.lists(SIDES, min_size=2, max_size=3), padding=st.sampled_from(AFFINE_PADDINGS),
        grow=st.integers(-2, 3), scale=st.sampled_from([0.1, 1.0, 10.0]), seed=SEEDS,
    )  # fmt: skip
    def test_affine_maps_agree_with_float64(
        self, place: Place, B: int, C: int, size: list[int], padding: Any, grow: int, scale: float, seed: int
    ) -> None:
        """Any map: shrinking and enlarging tenfold, singular ones of images with a side of 1, other sizes."""
        longest = 34 if len(size) == 2 else 11
        shape = (B, C, *(min(side, longest) for side in size))
        images = draw(shape, seed, torch.float64)[0]
        matrix = draw_matrices(shape, seed, torch.float64) * scale
        sides = [max(0, side + grow) for side in shape[2:]]
        grad = torch.randn(B, C, *sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        results = []
        for name, device in ((place.backend, place.device), ("reference", "cpu")):
            with backend.use(name):
                x, m = (t.to(device).requires_grad_() for t in (images, matrix))
                y = affine_warp(x, m, size=sides, padding_mode=padding)
                results.append((y, *torch.autograd.grad(y, (x, m), grad.to(device))))
        for now, then in zip(*results, strict=True):
            torch.testing.assert_close(now.cpu(), then, rtol=1e-8, atol=1e-8)

    @COMMON
    @given(C=CHANNELS, H=SIDES, W=SIDES, order=ORDERS, seed=SEEDS)
    def test_all_but_noise_is_linear(self, place: Place, C: int, H: int, W: int, order: Any, seed: int) -> None:
        order = [stage for stage in order if stage != "noise"]
        first, params, _ = (t.to(place.device) for t in draw((2, C, H, W), seed))
        second = draw((2, C, H, W), seed + 1)[0].to(place.device)
        together = transform(2 * first - second, params, order=order)
        apart = 2 * transform(first, params, order=order) - transform(second, params, order=order)
        near(together, apart, 6 * rounding(first))

    @COMMON
    @given(C=CHANNELS, H=SIDES, W=SIDES, order=ORDERS, seed=SEEDS)
    def test_channels_are_treated_alike(self, place: Place, C: int, H: int, W: int, order: Any, seed: int) -> None:
        order = [stage for stage in order if stage != "noise"]
        images, params, _ = (t.to(place.device) for t in draw((2, C, H, W), seed))
        whole = transform(images, params, order=order)
        for c in range(C):
            assert torch.equal(transform(images[:, c : c + 1], params, order=order), whole[:, c : c + 1])

    @COMMON
    @given(side=SIDES, turns=st.integers(-9, 9), seed=SEEDS)
    def test_quarter_turns_compose(self, place: Place, side: int, turns: int, seed: int) -> None:
        images = draw((1, 2, side, side), seed)[0].to(place.device)
        assert torch.equal(rotate(images, turns * math.pi / 2), images.rot90(turns, (2, 3)))

    @COMMON
    @given(H=SIDES, W=SIDES, angle=ANGLES, seed=SEEDS)
    def test_mirrored_images_turn_the_other_way(self, place: Place, H: int, W: int, angle: float, seed: int) -> None:
        images = draw((1, 2, H, W), seed)[0].to(place.device)
        turned = rotate(images.flip(3), -angle).flip(3)
        near(turned, rotate(images, angle), 4 * rounding(images))
        near(rotate(images.flip(2, 3), angle).flip(2, 3), rotate(images, angle), 4 * rounding(images))

    @COMMON
    @given(H=SIDES, W=SIDES, weight=st.floats(-2, 3, width=32), seed=SEEDS)
    def test_flips_of_flips(self, place: Place, H: int, W: int, weight: float, seed: int) -> None:
        """Twice with w is once with 2 w (1 - w); the sum over the image stays."""
        images = draw((1, 2, H, W), seed, torch.float64)[0].to(place.device)
        twice = blend_flip(blend_flip(images, weight), weight)
        torch.testing.assert_close(twice, blend_flip(images, 2 * weight * (1 - weight)), rtol=0, atol=1e-13)

    @COMMON
    @given(
        H=SIDES, W=SIDES, sigma=st.floats(0.25, 4.0, width=32), radius=st.integers(1, 9),
        padding=st.sampled_from(PADDINGS), seed=SEEDS,
    )  # fmt: skip
    def test_blur_averages(
        self, place: Place, H: int, W: int, sigma: float, radius: int, padding: Any, seed: int
    ) -> None:
        """Within the range of the image (0 included for zeros); the same turned over; rows and columns exchanged."""
        images = draw((1, 2, H, W), seed)[0].to(place.device)
        blurred = gaussian_blur(images, sigma, radius=radius, padding=padding)
        error = rounding(images, radius=radius)
        low = 0.0 if padding == "zeros" else images.min().item()
        assert blurred.min() >= low - error and blurred.max() <= images.max() + error
        near(gaussian_blur(images.flip(2, 3), sigma, radius=radius, padding=padding).flip(2, 3), blurred, error)
        near(gaussian_blur(images.mT, sigma, radius=radius, padding=padding).mT, blurred, error)

    @COMMON
    @given(H=SIDES, W=SIDES, x=st.floats(-0.5, 1.5, width=32), y=st.floats(-0.5, 1.5, width=32), seed=SEEDS)
    def test_a_crop_only_darkens(self, place: Place, H: int, W: int, x: float, y: float, seed: int) -> None:
        images = draw((1, 2, H, W), seed)[0].to(place.device)
        window = soft_crop(images, (x, y))
        assert (window >= 0).all() and (window <= images).all()
        near(soft_crop(images.flip(3), (1 - x, y)).flip(3), window, rounding(images))
        near(soft_crop(images.mT, (y, x)).mT, window, rounding(images))

    @COMMON
    @given(H=SIDES, W=SIDES, seed=SEEDS)
    def test_maps_of_whole_pixels_compose(self, place: Place, H: int, W: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        images = draw((1, 2, H, W), seed)[0].to(place.device)
        matrix = torch.eye(2, 3, device=place.device)[None].repeat(1, 1, 1)
        shift = torch.randint(-3, 4, (2,), generator=generator).to(place.device)
        matrix[0, :, 2] = shift
        moved = affine_warp(images, matrix, padding_mode="reflection")
        across = [oracle.bounced(i + int(shift[0]), W) if W > 1 else 0 for i in range(W)]
        down = [oracle.bounced(i + int(shift[1]), H) if H > 1 else 0 for i in range(H)]
        assert torch.equal(moved, images[:, :, down][:, :, :, across])


class TestGradient:
    @COMMON
    @given(
        C=CHANNELS, H=SIDES, W=SIDES, order=ORDERS, radius=st.integers(0, 9), padding=st.sampled_from(PADDINGS), seed=SEEDS,
    )  # fmt: skip
    def test_the_one_by_the_images_is_the_adjoint(
        self, place: Place, C: int, H: int, W: int, order: Any, radius: int, padding: Any, seed: int
    ) -> None:
        """<G, T X> = <T' G, X>, of every chain without noise and every stage of it."""
        order = [stage for stage in order if stage != "noise"]
        images, params, _ = (t.to(place.device) for t in draw((2, C, H, W), seed, torch.float64))
        other = draw((2, C, H, W), seed + 1, torch.float64)[0].to(place.device)
        x = images.requires_grad_()
        y = transform(x, params, order=order, radius=radius, blur_padding=padding)
        (back,) = torch.autograd.grad(y, x, other)
        size = float(y.detach().norm() * other.norm())
        assert abs(float((other * y - back * x).detach().sum())) <= 1e-12 * (1 + size)

    @COMMON
    @given(
        size=st.lists(SIDES, min_size=2, max_size=3), padding=st.sampled_from(AFFINE_PADDINGS), grow=st.integers(0, 3), seed=SEEDS,
    )  # fmt: skip
    def test_the_one_through_an_affine_map_is_the_adjoint(
        self, place: Place, size: list[int], padding: Any, grow: int, seed: int
    ) -> None:
        shape = (2, 2, *(min(side, 34 if len(size) == 2 else 11) for side in size))
        x = draw(shape, seed, torch.float64)[0].to(place.device).requires_grad_()
        matrix = draw_matrices(shape, seed, torch.float64).to(place.device)
        y = affine_warp(x, matrix, size=[side + grow for side in shape[2:]], padding_mode=padding)
        other = draw(tuple(y.shape), seed + 1, torch.float64)[0].to(place.device)
        (back,) = torch.autograd.grad(y, x, other)
        size_of = float(y.detach().norm() * other.norm())
        assert abs(float(((other * y).sum() - (back * x).sum()).detach())) <= 1e-12 * (1 + size_of)
