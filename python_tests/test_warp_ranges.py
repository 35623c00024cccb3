# SPDX-License-Identifier: MIT
"""The op `warp` on images of ordinary sizes, on parameters beyond [0, 1] and on all angles, against the reference in float64.

The reference in float64 is what the pixel-by-pixel oracle and finite differences have confirmed on small images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import affine_warp, backend, transform
from python_tests import warp_oracle as oracle
from python_tests.places import NATIVE_PLACES, PLACES, Place
from python_tests.prototypes_oracle import as_numpy
from python_tests.test_warp import AFFINE_PADDINGS, PADDINGS, draw_matrices, on
from python_tests.warp_oracle import STAGES, check, draw, rounding

LARGE = [
    (2, 3, 224, 224),
    (1, 1, 128, 128),
    (5, 1, 28, 28),
    (1, 1, 300, 517),
    (1, 2, 3, 1500),
    (1, 1, 1500, 3),
    (2, 7, 65, 66),
]
ORDERS: list[Sequence[Any]] = [
    STAGES,
    STAGES[::-1],
    ("rotate", "blur", "crop"),
    ("noise", "crop", "hflip", "rotate", "vflip", "blur"),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def run(images: Tensor, params: Tensor, grad: Tensor, device: str, **options: Any) -> list[Tensor]:
    """Value and both gradients."""
    x, p = (t.detach().to(device).requires_grad_() for t in (images, params))
    y = transform(x, p, **options)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, (x, p), grad.to(device)))]


@pytest.mark.parametrize("place", NATIVE_PLACES)
class TestValue:
    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @pytest.mark.parametrize("shape", LARGE)
    def test_large_images(self, place: Place, shape: tuple[int, ...], order: Sequence[Any]) -> None:
        """Float64 to eleven digits of the largest, on noise. Float32 on a smooth image: on noise the slope jumps from pixel to pixel, and a
        coordinate that rounding takes across a whole number changes the derivative by the angle at once."""
        images, params, seed = draw(shape, seed=1, dtype=torch.float64)
        params = params.float().double()
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        options: dict[str, Any] = {"order": order, "crop_size": 0.6}
        exact, expected = self._both(place, images, params, grad.double(), seed, **options)
        for now, then in zip(exact, expected, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-11 * max(1.0, then.abs().max().item()))

        phase = torch.arange(shape[0] * shape[1], dtype=torch.float64).view(*shape[:2], 1, 1)
        across, down = (torch.arange(side, dtype=torch.float64) / side for side in (shape[3], shape[2]))
        smooth = (0.5 + 0.5 * (6 * across + 4 * down[:, None] + phase).sin()).float()
        options.update(noise_std=1e-3, sharpness=0.05)
        single, _ = self._both(place, smooth, params.float(), grad, seed, **options)
        _, expected = self._both(place, smooth.double(), params, grad.double(), seed, **options)
        check(single[0], as_numpy(expected[0]), 2 * rounding(smooth, noise=1e-3))
        check(single[1], as_numpy(expected[1]), 4 * rounding(grad))
        # Sums of G dO/dl with independent errors: those of the terms, up to `side` long, and for the rotation what coordinates, rounded by
        # u side, change in the slopes that the angle multiplies by 2 pi side / 2
        side, length = max(shape[2:]), (grad.double().square().sum() ** 0.5).item()
        error = np.full((1, 7), 1e-6 * side * length)
        error[0, 6] += 2**-24 * side * math.pi * side * length
        check(single[2], as_numpy(expected[2]), error)

    @staticmethod
    def _both(
        place: Place, images: Tensor, params: Tensor, grad: Tensor, seed: Tensor, **options: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        with place.selected():
            here = run(images, params, grad, place.device, seed=seed.to(place.device), **options)
        with backend.use("reference"):
            return here, run(images, params, grad, "cpu", seed=seed, **options)

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(
        ("shape", "size"),
        [((2, 3, 224, 224), (128, 128)), ((1, 1, 100, 300), (300, 100)), ((1, 2, 24, 40, 33), (24, 40, 33)), ((2, 1, 3, 900), (5, 1100))],
    )  # fmt: skip
    def test_large_affine_maps(self, place: Place, shape: tuple[int, ...], size: tuple[int, ...], padding: Any) -> None:
        images, matrix = draw(shape, seed=3, dtype=torch.float64)[0], draw_matrices(shape, seed=4, dtype=torch.float64)
        grad = torch.randn(*shape[:2], *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        results = []
        for name, device in (("reference", "cpu"), (place.backend, place.device)):
            with backend.use(name):
                x, m = (t.to(device).requires_grad_() for t in (images, matrix))
                y = affine_warp(x, m, size=size, padding_mode=padding)
                results.append([t.detach().cpu() for t in (y, *torch.autograd.grad(y, (x, m), grad.to(device)))])
        for now, then in zip(*results, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-11 * max(1.0, then.abs().max().item()))

    @pytest.mark.parametrize(
        "order", [("noise", "crop", "hflip", "vflip"), ("vflip", "rotate", "hflip", "noise")], ids="-".join
    )
    def test_every_width(self, place: Place, order: Sequence[Any]) -> None:
        """Blocks of pixels meet their mirror images in the middle of a row: each pixel counts once, whatever is left over there."""
        for width in [*range(1, 50), 127, 600]:
            images, params, seed = draw((2, 1, 2 + width % 2, width), seed=13, dtype=torch.float64)
            grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
            results = []
            for name, device in ((place.backend, place.device), ("reference", "cpu")):
                with backend.use(name):
                    results.append(run(images, params, grad, device, seed=seed.to(device), order=order))
            for now, then in zip(*results, strict=True):
                torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-10 * max(1.0, then.abs().max().item()))
            with place.selected():
                single = run(
                    images.float(),
                    params.float(),
                    grad.float(),
                    place.device,
                    seed=seed.to(place.device),
                    order=order[:1],
                )
            with backend.use("reference"):
                exact = run(images, params, grad, "cpu", seed=seed, order=order[:1])
            for now, then in zip(single, exact, strict=True):
                torch.testing.assert_close(now.double(), then, rtol=0, atol=1e-5 * max(1.0, then.abs().max().item()))

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_narrow_blurs(self, place: Place, padding: Any) -> None:
        """Where most weights are too small to count: on a single bright pixel an error shows as what it is beside that pixel."""
        sigma = torch.tensor([1.1e-3, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.1, 2.0], dtype=torch.float64)
        images = torch.zeros(len(sigma), 1, 17, 23, dtype=torch.float64)
        images[:, :, 3, 20] = 1
        params = torch.zeros(len(sigma), 7, dtype=torch.float64)
        params[:, 0] = sigma
        grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(15), dtype=torch.float64)
        options: dict[str, Any] = {"order": ["blur"], "sigma_max": 1.0, "blur_padding": padding}
        with backend.use("reference"):
            expected = run(images, params, grad, "cpu", **options)
        with place.selected():
            single = run(images.float(), params.float(), grad.float(), place.device, **options)
            double = run(images, params, grad, place.device, **options)
        for now, then in zip(double, expected, strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-14 * 8)
        for now, then, atol in zip(single[:2], expected[:2], (3e-7, 2e-6), strict=True):
            torch.testing.assert_close(now.double(), then, rtol=0, atol=atol)
        # sigma itself is rounded to float32, which sharp exponentials feel: relative to each derivative
        torch.testing.assert_close(single[2].double(), expected[2], rtol=1e-3, atol=1e-30)

    @pytest.mark.parametrize("shape", [(1, 7, 9), (2, 8, 8), (1, 1, 12), (1, 20, 3)])
    def test_gradients_at_all_angles(self, place: Place, shape: tuple[int, ...]) -> None:
        """A pixel's contributions come from outputs near the turned-back pixel: none is missed at any angle."""
        turns = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), torch.arange(-16, 17) / 16])
        turns = torch.cat([turns, turns + 1e-9, turns - 1e-9, turns + 1e-4])
        images, params, _ = draw((len(turns), *shape), seed=6, dtype=torch.float64)
        params[:, 6] = turns
        grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        with backend.use("reference"):
            expected = run(images, params, grad, "cpu", order=["rotate"])
        with place.selected():
            actual = run(images, params, grad, place.device, order=["rotate"])
        for now, then in zip(actual[:2], expected[:2], strict=True):
            torch.testing.assert_close(now, then, rtol=0, atol=1e-12 * 20)
        # where a coordinate is whole up to rounding, the one-sided derivative is that of either side
        whole = (turns * 8).sub((turns * 8).round()).abs() < 1e-8
        torch.testing.assert_close(actual[2][~whole], expected[2][~whole], rtol=0, atol=1e-8)
        assert actual[2].isfinite().all()


class TestContract:
    @pytest.mark.parametrize("order", ORDERS[:2], ids="-".join)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_parameters_beyond_the_unit_interval(self, place: Place, order: Sequence[Any], dtype: torch.dtype) -> None:
        images, _, seed = draw((12, 2, 7, 10), seed=8, dtype=dtype)
        params = (5 * torch.rand(12, 7, generator=torch.Generator().manual_seed(9)) - 2).to(dtype)
        expected = oracle.transform(images, params, seed, order=order, crop_size=0.9)
        x, p, s = on(place, images, params, seed)
        actual = transform(x, p, seed=s, order=order, crop_size=0.9)
        # a flip by l multiplies by up to |1 - l| + |l| = 5, twice; sigma is up to 6
        check(actual, expected, 25 * 2 * rounding(images, noise=0.3))
        grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(10)).to(dtype)
        results = []
        for name, device in ((place.backend, place.device), ("reference", "cpu")):
            with backend.use(name):
                inputs = (images.double(), params.double(), grad.double())
                results.append(run(*inputs, device, seed=seed.to(device), order=order, crop_size=0.9))
        for now, then in zip(*results, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("radius", [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 31, 64])
    def test_every_radius_on_a_larger_image(self, place: Place, radius: int, padding: Any) -> None:
        images, params, _ = draw((2, 1, 37, 70), seed=11, dtype=torch.float64)
        params[:, 0] = torch.tensor([0.4, 1.0])
        grad = torch.randn(images.shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
        options: dict[str, Any] = {
            "order": ["blur"],
            "radius": radius,
            "blur_padding": padding,
            "sigma_max": radius / 2,
        }
        results = []
        for name, device in ((place.backend, place.device), ("reference", "cpu")):
            with backend.use(name):
                results.append(run(images, params, grad, device, **options))
        for now, then in zip(*results, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-11)
        kept = [oracle.blur(images[b].numpy(), radius / 2 * params[b, 0].item(), radius, padding) for b in range(2)]
        for b in range(2):
            check(results[0][0][b], kept[b], rounding(images, radius=radius))
