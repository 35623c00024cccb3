# SPDX-License-Identifier: MIT
"""The op `warp` on volumes [B, C, D, H, W]: voxel by voxel in float64, closed forms, gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import affine_warp, backend, blend_flip, gaussian_blur, gaussian_noise, rotate, soft_crop
from python_tests import warp_oracle as oracle
from python_tests.places import PLACES, Place
from python_tests.test_warp import AFFINE_PADDINGS, PADDINGS, draw_matrices, on
from python_tests.warp_oracle import check, draw, noise_rounding, rounding

SHAPES = [(2, 2, 3, 4, 5), (2, 1, 1, 7, 3), (1, 3, 6, 1, 1), (2, 1, 5, 5, 5)]
DIMENSIONS = {"depth": 1, "vertical": 2, "horizontal": 3}
"""Axis of [C, D, H, W]."""


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def values(shape: tuple[int, ...], *numbers: float) -> Tensor:
    return torch.tensor(numbers[: shape[0]])


class TestValue:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_blur_on_three_axes(self, place: Place, shape: tuple[int, ...], padding: Any) -> None:
        images, sigma = draw(shape, seed=1)[0], values(shape, 1.3, 0.5)
        expected = oracle.each(images, lambda x, b: oracle.blur(x, sigma[b].item(), 4, padding))
        actual = gaussian_blur(*on(place, images, sigma), radius=4, padding=padding)
        check(actual, expected, 2 * rounding(images))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_noise_runs_on_through_the_slices(self, place: Place, shape: tuple[int, ...]) -> None:
        seed = torch.arange(shape[0])
        noise = gaussian_noise(torch.zeros(shape, device=place.device), 1.0, seed=seed.to(place.device))
        for b in range(shape[0]):
            numbers, lengths = oracle.normal(b, noise[b].numel())
            check(noise[b].flatten(), numbers, noise_rounding(lengths, torch.float32))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_window_has_three_axes(self, place: Place, shape: tuple[int, ...]) -> None:
        images = draw(shape, seed=2)[0]
        center = torch.tensor([[0.4, 0.6, 0.3], [0.9, 0.2, 0.7]])[: shape[0]]
        expected = oracle.each(images, lambda x, b: oracle.crop(x, center[b].double().tolist(), 0.5, 1.5))
        actual = soft_crop(*on(place, images, center), size=0.5, sharpness=1.5)
        check(actual, expected, rounding(images, sharpness=1.5))

    @pytest.mark.parametrize("dim", DIMENSIONS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_flips_along_three_axes(self, place: Place, shape: tuple[int, ...], dim: Any) -> None:
        images, weight = draw(shape, seed=3)[0], values(shape, 0.3, 0.8)
        expected = oracle.each(images, lambda x, b: oracle.flip(x, weight[b].item(), DIMENSIONS[dim]))
        x, w = on(place, images, weight)
        check(blend_flip(x, w, dim=dim), expected, rounding(images))
        assert torch.equal(blend_flip(x, 1.0, dim=dim), x.flip(1 + DIMENSIONS[dim]))
        assert torch.equal(blend_flip(x, 0.0, dim=dim), x)

    @pytest.mark.parametrize("axis", DIMENSIONS)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_rotations_in_three_planes(self, place: Place, shape: tuple[int, ...], axis: Any, padding: Any) -> None:
        """Every slice across the axis turns like an image."""
        images, angle = draw(shape, seed=4)[0], values(shape, 0.7, -2.1)
        turned = rotate(*on(place, images, angle), axis=axis, padding_mode=padding)
        assert turned.is_contiguous()
        for i in range(shape[1 + DIMENSIONS[axis]]):
            one = images.select(1 + DIMENSIONS[axis], i)

            def plane(x: np.ndarray, b: int) -> np.ndarray:
                cos, sin = math.cos(angle[b].item()), math.sin(angle[b].item())
                return oracle.affine(x, np.array([[cos, -sin, 0], [sin, cos, 0]]), x.shape[1:], padding)

            check(turned.select(1 + DIMENSIONS[axis], i), oracle.each(one, plane), 2 * rounding(images))

    def test_quarter_turns_of_cubes_are_exact(self, place: Place) -> None:
        images = draw((2, 2, 5, 5, 5), seed=5)[0].to(place.device)
        for axis, plane in (("depth", (3, 4)), ("vertical", (2, 4)), ("horizontal", (2, 3))):
            assert torch.equal(rotate(images, math.pi / 2, axis=axis), images.rot90(1, plane))  # type: ignore[arg-type]

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(
        ("shape", "size"), [((2, 2, 3, 4, 5), None), ((2, 1, 3, 4, 5), (5, 2, 6)), ((1, 1, 1, 3, 1), (2, 2, 3))]
    )
    def test_trilinear_maps(self, place: Place, shape: tuple[int, ...], size: Any, padding: Any) -> None:
        images, matrix = draw(shape, seed=6)[0], draw_matrices(shape, seed=7)
        maps = matrix.double().numpy()
        expected = oracle.each(images, lambda x, b: oracle.affine(x, maps[b], size or shape[2:], padding))
        actual = affine_warp(*on(place, images, matrix), size=size, padding_mode=padding)
        check(actual, expected, 6 * rounding(images))

    def test_an_affine_map_within_slices_is_that_of_the_slices(self, place: Place) -> None:
        images, flat = on(place, draw((2, 2, 4, 6, 5), seed=8)[0], draw_matrices((2, 2, 6, 5), seed=9))
        matrix = torch.eye(3, 4, device=place.device).repeat(2, 1, 1)
        matrix[:, :2, :2], matrix[:, :2, 3] = flat[:, :, :2], flat[:, :, 2]
        expected = torch.stack([affine_warp(images[:, :, z], flat) for z in range(4)], 2)
        torch.testing.assert_close(affine_warp(images, matrix), expected, rtol=0, atol=1e-5)
        eye = torch.eye(3, 4, device=place.device).repeat(2, 1, 1)
        assert torch.equal(affine_warp(images, eye), images)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, place: Place, dtype: torch.dtype) -> None:
        images, matrix = draw((2, 1, 3, 4, 5), seed=10, dtype=dtype)[0], draw_matrices((2, 1, 3, 4, 5), seed=11)
        maps = matrix.double().numpy()
        expected = oracle.each(images, lambda x, b: oracle.affine(x, maps[b], (3, 4, 5), "border"))
        actual = affine_warp(*on(place, images, matrix), padding_mode="border")
        assert actual.dtype == dtype
        check(actual, expected, 6 * rounding(images))
        assert soft_crop(images.to(place.device), (0.5, 0.5, 0.5)).dtype == dtype

    def test_empty_volumes(self, place: Place) -> None:
        for shape in ((0, 1, 2, 3, 4), (2, 0, 2, 3, 4), (2, 1, 0, 3, 4), (2, 1, 2, 3, 0)):
            images = torch.zeros(shape, device=place.device)
            eye = torch.eye(3, 4, device=place.device).repeat(shape[0], 1, 1)
            for y in (
                gaussian_blur(images, 1.0), gaussian_noise(images, 1.0), soft_crop(images, (0.5, 0.5, 0.5)),
                blend_flip(images, 0.5, dim="depth"), rotate(images, 1.0, axis="horizontal"), affine_warp(images, eye),
            ):  # fmt: skip
                assert y.shape == shape


class TestGradient:
    @pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5), (1, 1, 1, 4, 2)])
    def test_each_function_by_finite_differences(self, place: Place, shape: tuple[int, ...]) -> None:
        B = shape[0]
        images = draw(shape, seed=12, dtype=torch.float64)[0].to(place.device).requires_grad_()
        number = torch.linspace(0.6, 0.9, B, dtype=torch.float64, device=place.device).requires_grad_()
        center = torch.tensor([[0.41, 0.62, 0.33]] * B, dtype=torch.float64, device=place.device).requires_grad_()
        seed = torch.arange(B, device=place.device)
        assert torch.autograd.gradcheck(lambda x, s: gaussian_blur(x, s, radius=3), (images, number))
        assert torch.autograd.gradcheck(lambda x, s: gaussian_noise(x, s, seed=seed), (images, number))
        assert torch.autograd.gradcheck(lambda x, c: soft_crop(x, c, size=0.5), (images, center))
        for dim in DIMENSIONS:
            assert torch.autograd.gradcheck(lambda x, w, d=dim: blend_flip(x, w, dim=d), (images, number))
            assert torch.autograd.gradcheck(lambda x, a, d=dim: rotate(x, a, axis=d), (images, number))

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(("shape", "size"), [((2, 2, 3, 4, 5), None), ((1, 1, 2, 3, 4), (3, 2, 5))])
    def test_trilinear_maps_by_finite_differences(
        self, place: Place, shape: tuple[int, ...], size: Any, padding: Any
    ) -> None:
        images = draw(shape, seed=13, dtype=torch.float64)[0].to(place.device).requires_grad_()
        matrix = draw_matrices(shape, seed=14, dtype=torch.float64).to(place.device).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, m: affine_warp(x, m, size=size, padding_mode=padding), (images, matrix)
        )

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_adjoint_identity(self, place: Place, padding: Any) -> None:
        """<G, T X> = <T' G, X>, and the gradients are those of the reference."""
        shape = (2, 2, 9, 12, 15)
        images, matrix = draw(shape, seed=15, dtype=torch.float64)[0], draw_matrices(shape, seed=16).double()
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        results = []
        for name, device in ((place.backend, place.device), ("reference", "cpu")):
            with backend.use(name):
                x, m = (t.to(device).requires_grad_() for t in (images, matrix))
                y = affine_warp(x, m, padding_mode=padding)
                results.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y, (x, m), grad.to(device)))])
        y, back, _ = results[0]
        assert (grad * y).sum().item() == pytest.approx((back * images).sum().item(), rel=1e-11)
        for now, then in zip(*results, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-10)


class TestDeterminism:
    def test_repeats_agree_bit_for_bit(self, place: Place) -> None:
        shape = (2, 1, 7, 11, 13)
        images, matrix = on(place, draw(shape, seed=18)[0], draw_matrices(shape, seed=19))
        runs = []
        for _ in range(4):
            x, m = images.clone().requires_grad_(), matrix.clone().requires_grad_()
            y = affine_warp(x, m)
            runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, m))])
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
