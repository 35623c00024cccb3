# SPDX-License-Identifier: MIT
"""The op `warp` against `torch.nn.functional.grid_sample` and kornia, where they mean the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protokernels import affine_warp, blend_flip, gaussian_blur, rotate
from python_tests.places import PLACES, Place
from python_tests.test_warp import AFFINE_PADDINGS, on
from python_tests.warp_oracle import draw

CASES = [((3, 2, 9, 14), (9, 14)), ((2, 1, 8, 8), (5, 11)), ((2, 2, 4, 5, 6), (4, 5, 6)), ((1, 2, 4, 5, 6), (6, 3, 7))]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def to_pixels(theta: Tensor, sides: tuple[int, ...], size: tuple[int, ...], align_corners: bool) -> Tensor:
    """A `theta` of `affine_grid` as the matrix of `affine_warp`, as the docstring of `affine_warp` tells it."""
    into, out = (
        torch.tensor([(side - 1 if align_corners else side) / 2 for side in reversed(lengths)], dtype=theta.dtype)
        for lengths in (sides, size)
    )
    return torch.cat([theta[:, :, :-1] * into[:, None] / out, theta[:, :, -1:] * into[:, None]], 2)


class TestValue:
    @pytest.mark.parametrize("align_corners", [True, False])
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(("shape", "size"), CASES)
    def test_grid_sample(
        self, place: Place, shape: tuple[int, ...], size: tuple[int, ...], padding: Any, align_corners: bool
    ) -> None:
        """Values and both gradients in float64. Reflection is about the outermost pixels' centres, that is align_corners=True."""
        if padding == "reflection" and not align_corners:
            pytest.skip("grid_sample then reflects about the edges of the outermost pixels")
        axes = len(size)
        images = draw(shape, seed=1, dtype=torch.float64)[0]
        generator = torch.Generator().manual_seed(2)
        theta = torch.eye(axes, axes + 1) + 0.4 * torch.randn(shape[0], axes, axes + 1, generator=generator)
        theta = theta.double()
        grad = torch.randn(*shape[:2], *size, generator=generator, dtype=torch.float64)

        x, t = images.clone().requires_grad_(), theta.clone().requires_grad_()
        grid = F.affine_grid(t, [*shape[:2], *size], align_corners=align_corners)
        expected = F.grid_sample(x, grid, padding_mode=padding, align_corners=align_corners)
        grads = torch.autograd.grad(expected, (x, t), grad)

        x, t = images.to(place.device).requires_grad_(), theta.clone().requires_grad_()
        matrix = to_pixels(t, shape[2:], size, align_corners).to(place.device)
        actual = affine_warp(x, matrix, size=size, padding_mode=padding)
        for now, then in zip(
            (actual, *torch.autograd.grad(actual, (x, t), grad.to(place.device))), (expected, *grads), strict=True
        ):
            torch.testing.assert_close(now.cpu(), then, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize("shape", [(1, 2, 5, 9), (2, 1, 3, 5, 3)])
    def test_on_whole_pixels_and_on_the_edge_the_derivative_is_that_of_grid_sample(
        self, place: Place, shape: tuple[int, ...], padding: Any
    ) -> None:
        """The identity of sides 2^n + 1, whose coordinates are exact in grid_sample too."""
        images = draw(shape, seed=9, dtype=torch.float64)[0]
        axes = len(shape) - 2
        theta = torch.eye(axes, axes + 1, dtype=torch.float64).repeat(shape[0], 1, 1).requires_grad_()
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
        sampled = F.grid_sample(
            images, F.affine_grid(theta, list(shape), align_corners=True), padding_mode=padding, align_corners=True
        )
        (expected,) = torch.autograd.grad(sampled, theta, grad)
        matrix = to_pixels(theta, shape[2:], shape[2:], True).to(place.device)
        warped = affine_warp(images.to(place.device), matrix, padding_mode=padding)
        (actual,) = torch.autograd.grad(warped, theta, grad.to(place.device))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("padding", ["border", "reflection"])
    def test_through_the_edge_no_gradient_flows(self, place: Place, padding: Any) -> None:
        """Far outside along x only: `border` clamps x, so its row of the matrix gets nothing."""
        images = draw((1, 1, 6, 7), seed=3, dtype=torch.float64)[0].to(place.device)
        matrix = torch.tensor([[[1.0, 0.1, 50.0], [0.1, 0.9, 0.05]]], dtype=torch.float64, device=place.device)
        matrix.requires_grad_()
        weight = torch.arange(42.0, device=place.device).view(1, 1, 6, 7)
        (grad,) = torch.autograd.grad((affine_warp(images, matrix, padding_mode=padding) * weight).sum(), matrix)
        assert bool(grad[0, 0].any()) == (padding == "reflection") and grad[0, 1].any()


class TestKornia:
    """kornia 0.9: the same geometry for rotations of images, the same blur; its sigma must not be 0 and its flips are hard."""

    @pytest.fixture
    def kornia(self) -> Any:
        return pytest.importorskip("kornia", reason="kornia is not installed")

    @pytest.mark.parametrize("shape", [(3, 2, 16, 16), (3, 1, 11, 11)])
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_rotation(self, kornia: Any, place: Place, shape: tuple[int, ...], padding: Any) -> None:
        images = draw(shape, seed=4, dtype=torch.float64)[0]
        angle = torch.tensor([0.3, -1.9, 3.0], dtype=torch.float64)
        expected = kornia.geometry.transform.rotate(images, torch.rad2deg(angle), padding_mode=padding)
        actual = rotate(*on(place, images, angle), padding_mode=padding)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("ours", "theirs"), [("reflect", "reflect"), ("replicate", "replicate"), ("zeros", "constant")]
    )
    def test_blur(self, kornia: Any, place: Place, ours: Any, theirs: str) -> None:
        images = draw((3, 2, 16, 19), seed=5, dtype=torch.float64)[0]
        sigma = torch.tensor([0.5, 1.1, 2.0], dtype=torch.float64)
        expected = kornia.filters.gaussian_blur2d(images, (13, 13), torch.stack([sigma, sigma], 1), theirs)
        actual = gaussian_blur(*on(place, images, sigma), radius=6, padding=ours)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-7)

    def test_affine(self, kornia: Any, place: Place) -> None:
        """`warp_affine` takes the inverse map between pixels counted from the corner."""
        images = draw((2, 1, 9, 12), seed=6, dtype=torch.float64)[0]
        matrix = torch.tensor([[[0.9, 0.2, 1.5], [-0.3, 1.1, -2.0]]], dtype=torch.float64).repeat(2, 1, 1)
        centre = torch.tensor([5.5, 4.0], dtype=torch.float64)
        forward = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
        forward[:, :2, :2], forward[:, :2, 2] = matrix[:, :, :2], matrix[:, :, 2] + centre - matrix[:, :, :2] @ centre
        expected = kornia.geometry.transform.warp_affine(images, forward.inverse()[:, :2], (9, 12))
        torch.testing.assert_close(affine_warp(*on(place, images, matrix)).cpu(), expected, rtol=0, atol=1e-6)

    def test_flips(self, kornia: Any, place: Place) -> None:
        images = draw((2, 1, 9, 12), seed=7)[0]
        x = images.to(place.device)
        assert torch.equal(blend_flip(x, 1.0).cpu(), kornia.geometry.transform.hflip(images))
        assert torch.equal(blend_flip(x, 1.0, dim="vertical").cpu(), kornia.geometry.transform.vflip(images))


class TestTorchRotation:
    @pytest.mark.parametrize("shape", [(2, 1, 13, 13), (2, 2, 9, 20)])
    def test_rotation_of_oblong_images_is_rigid(self, place: Place, shape: tuple[int, ...]) -> None:
        """In normalised coordinates a rotation needs the sides' ratio; with it grid_sample agrees."""
        images = draw(shape, seed=8, dtype=torch.float64)[0]
        H, W = shape[2:]
        angle = math.pi / 5
        cos, sin = math.cos(angle), math.sin(angle)
        theta = torch.tensor(
            [[cos, -sin * (H - 1) / (W - 1), 0], [sin * (W - 1) / (H - 1), cos, 0]], dtype=torch.float64
        )
        grid = F.affine_grid(theta.repeat(shape[0], 1, 1), list(shape), align_corners=True)
        expected = F.grid_sample(images, grid, align_corners=True)
        torch.testing.assert_close(rotate(images.to(place.device), angle).cpu(), expected, rtol=0, atol=1e-13)
