# SPDX-License-Identifier: MIT
"""Gradients of the op `warp`: finite differences, explicit adjoint matrices, formulas at the kinks, what is exactly zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import affine_warp, backend, blend_flip, gaussian_blur, rotate, soft_crop, transform
from python_tests import warp_oracle as oracle
from python_tests.places import NATIVE_PLACES, PLACES, Place
from python_tests.prototypes_oracle import as_numpy, compute_dtype
from python_tests.test_warp import AFFINE_PADDINGS, PADDINGS, draw_matrices, on
from python_tests.warp_oracle import SHAPES, STAGES, check, draw, rounding

LINEAR = [stage for stage in STAGES if stage != "noise"]
COLUMNS = {"blur": [0], "noise": [1], "crop": [2, 3], "hflip": [4], "vflip": [5], "rotate": [6]}
SMALL = [(2, 2, 5, 6), (1, 1, 1, 7), (2, 1, 4, 1), (2, 1, 7, 7)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def leaves(place: Place, *tensors: Tensor) -> list[Tensor]:
    return [t.detach().to(place.device).requires_grad_() for t in tensors]


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:  # of the product with `grad`
    return torch.autograd.grad(function(*inputs), inputs, grad)


def draw_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)


class TestGradient:
    @pytest.mark.parametrize("shape", SMALL)
    @pytest.mark.parametrize("stage", STAGES)
    def test_each_stage_by_finite_differences(self, place: Place, stage: Any, shape: tuple[int, ...]) -> None:
        images, params, seed = draw(shape, seed=1, dtype=torch.float64)
        keys = seed.to(place.device)
        inputs = leaves(place, images, params)
        assert torch.autograd.gradcheck(lambda x, p: transform(x, p, order=[stage], seed=keys), inputs)
        grad = gradients(
            lambda x, p: transform(x, p, order=[stage], seed=keys), inputs, draw_like(images, 2).to(place.device)
        )
        used = COLUMNS[stage]
        assert not grad[1][:, [k for k in range(7) if k not in used]].any()
        if min(shape[2:]) > 1:
            assert grad[1][:, used].all()

    @pytest.mark.parametrize("order", [STAGES, STAGES[::-1], ("rotate", "crop", "hflip")], ids="-".join)
    @pytest.mark.parametrize("shape", SMALL)
    def test_chains_by_finite_differences(self, place: Place, order: Sequence[Any], shape: tuple[int, ...]) -> None:
        images, params, seed = draw(shape, seed=3, dtype=torch.float64)
        keys = seed.to(place.device)
        options: dict[str, Any] = {"order": order, "crop_size": 0.6, "radius": 3, "sharpness": 0.7}
        assert torch.autograd.gradcheck(
            lambda x, p: transform(x, p, seed=keys, **options), leaves(place, images, params)
        )

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("radius", [1, 6, 9])
    def test_blur_by_finite_differences(self, place: Place, padding: Any, radius: int) -> None:
        images = draw((3, 2, 4, 7), seed=4, dtype=torch.float64)[0]
        sigma = torch.tensor([0.4, -1.3, 6.0], dtype=torch.float64)
        inputs = leaves(place, images, sigma)
        assert torch.autograd.gradcheck(lambda x, s: gaussian_blur(x, s, radius=radius, padding=padding), inputs)

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(("shape", "size"), [((2, 2, 5, 6), None), ((2, 1, 4, 7), (6, 3)), ((2, 1, 1, 5), (2, 4))])
    def test_affine_maps_by_finite_differences(
        self, place: Place, padding: Any, shape: tuple[int, ...], size: Any
    ) -> None:
        images = draw(shape, seed=5, dtype=torch.float64)[0]
        inputs = leaves(place, images, draw_matrices(shape, seed=6, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda x, m: affine_warp(x, m, size=size, padding_mode=padding), inputs)

    @pytest.mark.parametrize("shape", SMALL)
    @pytest.mark.parametrize("stage", LINEAR)
    def test_of_images_is_the_transposed_matrix(self, place: Place, stage: Any, shape: tuple[int, ...]) -> None:
        """The matrix T of the oracle, column by column; then the gradient by the images is T^T G, whatever the images."""
        images, params, _ = draw(shape, seed=7, dtype=torch.float64)
        grad = draw_like(images, seed=8)
        x, p, g = on(place, images, params, grad)
        actual = gradients(lambda x: transform(x, p, order=[stage]), leaves(place, x), g)[0]
        self._compare(actual, grad, lambda unit, b: oracle.transform(unit, params[b : b + 1], order=[stage]))

    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_of_images_through_affine_maps_is_the_transposed_matrix(self, place: Place, padding: Any) -> None:
        for size in ((5, 6), (3, 8)):
            images, matrix = draw((2, 2, 5, 6), seed=9, dtype=torch.float64)[0], draw_matrices((2, 2, 5, 6), seed=10)
            matrix = matrix.double()
            grad = draw_like(images.new_empty(2, 2, *size), seed=11)
            x, m, g = on(place, images, matrix, grad)
            actual = gradients(
                lambda x, m=m, s=size: affine_warp(x, m, size=s, padding_mode=padding), leaves(place, x), g
            )[0]
            maps = matrix.numpy()
            self._compare(
                actual, grad, lambda unit, b, a=maps, s=size: oracle.affine(unit[0].numpy(), a[b], s, padding)[None]
            )

    @staticmethod
    def _compare(actual: Tensor, grad: Tensor, forward: Callable[[Tensor, int], np.ndarray]) -> None:
        B, _, H, W = actual.shape
        for b in range(B):
            units = torch.eye(H * W, dtype=torch.float64).view(H * W, H, W)
            columns = np.stack([forward(unit[None, None], b)[0, 0].ravel() for unit in units], 1)  # [outputs, H W]
            for c in range(actual.shape[1]):
                expected = columns.T @ grad[b, c].flatten().numpy()
                np.testing.assert_allclose(actual[b, c].flatten().cpu().numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape", [(3, 2, 33, 20), (2, 1, 64, 64)])
    @pytest.mark.parametrize("stage", [*LINEAR, *AFFINE_PADDINGS])
    def test_adjoint_identity(self, place: Place, stage: Any, shape: tuple[int, ...]) -> None:
        """<G, T X> = <T' G, X>."""
        images, params, _ = draw(shape, seed=12, dtype=torch.float64)
        matrix = draw_matrices(shape, seed=13, dtype=torch.float64)
        grad = draw_like(images, seed=14)
        x, p, m, g = on(place, images, params, matrix, grad)
        x.requires_grad_()
        y = transform(x, p, order=[stage]) if stage in STAGES else affine_warp(x, m, padding_mode=stage)
        (back,) = torch.autograd.grad(y, x, g)
        forward, backward = (g * y).sum().item(), (back * x).sum().item()
        assert forward == pytest.approx(backward, rel=1e-11, abs=1e-9)

    @pytest.mark.parametrize("order", [STAGES, STAGES[::-1], ("crop", "rotate", "blur", "hflip")], ids="-".join)
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 56)])
    def test_single_precision_is_float64_up_to_rounding(
        self, place: Place, order: Sequence[Any], shape: tuple[int, ...]
    ) -> None:
        self._compare_with_float64(place, shape, torch.float32, {"order": order})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gets_its_own_type(self, place: Place, dtype: torch.dtype) -> None:
        self._compare_with_float64(place, (2, 2, 12, 9), dtype, {})

    @staticmethod
    def _compare_with_float64(
        place: Place, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        """The reference in float64 is what finite differences have confirmed. A parameter's gradient is a sum over the pixels of G dO/dl:
        its error is that of the terms."""
        images, params, seed = draw(shape, seed=15, dtype=dtype)
        grad = draw_like(images, seed=16)
        keys = seed.to(place.device)
        inputs = leaves(place, images, params)
        to_images, to_params = gradients(
            lambda x, p: transform(x, p, seed=keys, **options), inputs, grad.to(place.device)
        )
        assert to_images.dtype == dtype and to_params.dtype == compute_dtype(images)
        with backend.use("reference"):
            exact = [images.double().requires_grad_(), params.double().requires_grad_()]
            expected = gradients(lambda x, p: transform(x, p, seed=seed, **options), exact, grad.double())
            terms = []
            for k in range(7):
                unit = torch.zeros_like(params, dtype=torch.float64)
                unit[:, k] = 1.0
                slope = torch.autograd.functional.jvp(
                    lambda p: transform(images.double(), p, seed=seed, **options), params.double(), unit
                )[1]
                terms.append((slope * grad.double()).abs().flatten(1).sum(1))
        check(to_images, as_numpy(expected[0]), 4 * rounding(grad))
        relative = 2 * rounding(torch.ones_like(images), noise=0.1)
        check(to_params, as_numpy(expected[1]), relative * torch.stack(terms, 1).numpy() + 1e-6)

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_affine_maps_in_single_precision(self, place: Place, padding: Any) -> None:
        shape = (3, 2, 21, 34)
        images, matrix = draw(shape, seed=17)[0], draw_matrices(shape, seed=18)
        grad = draw_like(images, seed=19)
        with place.selected():
            inputs = leaves(place, images, matrix)
            actual = gradients(lambda x, m: affine_warp(x, m, padding_mode=padding), inputs, grad.to(place.device))
        with backend.use("reference"):
            exact = [images.double().requires_grad_(), matrix.double().requires_grad_()]
            expected = gradients(lambda x, m: affine_warp(x, m, padding_mode=padding), exact, grad.double())
        check(actual[0], as_numpy(expected[0]), 8 * rounding(grad))
        scale = 2 * 34 * grad.abs().sum().item()  # |dO/ds| <= 2, |x - c| <= 34
        check(actual[1], as_numpy(expected[1]), rounding(torch.ones_like(images)) * scale)

    def test_at_rest_the_rotation_has_the_derivative_towards_the_next_pixel(self, place: Place) -> None:
        images, _, _ = draw((1, 1, 5, 6), seed=20, dtype=torch.float64)
        grad = draw_like(images, seed=21)
        q = np.pad(images[0, 0].numpy(), ((0, 1), (0, 1)))
        by_x, by_y = q[:-1, 1:] - q[:-1, :-1], q[1:, :-1] - q[:-1, :-1]
        dy, dx = np.meshgrid(np.arange(5) - 2.0, np.arange(6) - 2.5, indexing="ij")
        expected = 2 * math.pi * (grad[0, 0].numpy() * (by_x * -dy + by_y * dx)).sum()
        params = torch.zeros(1, 7, dtype=torch.float64)
        for turns in (0.0, 1.0, -3.0):
            params[0, 6] = turns
            inputs = leaves(place, params)
            x, g = on(place, images, grad)
            (actual,) = gradients(lambda p, x=x: transform(x, p, order=["rotate"]), inputs, g)
            assert actual[0, 6].item() == pytest.approx(expected, rel=1e-12)

    def test_on_a_ridge_the_crop_has_the_derivative_by_x_and_none_at_the_centre(self, place: Place) -> None:
        side, images = 9, draw((1, 1, 9, 9), seed=22, dtype=torch.float64)[0]
        grad = draw_like(images, seed=23)
        expected = np.zeros(2)
        for row in range(side):
            for column in range(side):
                dx, dy = column + 0.5 - side / 2, row + 0.5 - side / 2
                m = oracle.logistic(side * 0.25 / 2 - max(abs(dx), abs(dy)))
                term = float(grad[0, 0, row, column] * images[0, 0, row, column]) * m * (1 - m) * side
                if abs(dx) >= abs(dy):
                    expected[0] += term * np.sign(dx)
                else:
                    expected[1] += term * np.sign(dy)
        x, g = on(place, images, grad)
        (actual,) = gradients(lambda c: soft_crop(x, c), leaves(place, torch.full((1, 2), 0.5, dtype=torch.float64)), g)
        np.testing.assert_allclose(actual[0].cpu().numpy(), expected, rtol=1e-12)

    def test_of_noise(self, place: Place) -> None:
        images, params, seed = draw((2, 2, 5, 7), seed=24)
        grad = draw_like(images, seed=25)
        keys = seed.to(place.device)
        inputs = leaves(place, images, params)
        actual = gradients(lambda x, p: transform(x, p, order=["noise"], seed=keys), inputs, grad.to(place.device))
        assert torch.equal(actual[0].cpu(), grad)
        numbers = np.stack([oracle.normal(int(key), 70)[0] for key in seed])
        expected = 0.1 * (grad.flatten(1).double().numpy() * numbers).sum(1)
        np.testing.assert_allclose(actual[1][:, 1].cpu().double().numpy(), expected, rtol=1e-5, atol=1e-5)

    def test_below_the_smallest_sigma_there_is_none(self, place: Place) -> None:
        images = draw((4, 1, 6, 6), seed=26)[0].to(place.device)
        sigma = torch.tensor([0.0, 9e-4, -9e-4, 1.1e-3], device=place.device, requires_grad=True)
        images.requires_grad_()
        blurred = gaussian_blur(images, sigma)
        grad = torch.randn_like(images)
        to_images, to_sigma = torch.autograd.grad(blurred, (images, sigma), grad)
        assert torch.equal(to_images, grad) and torch.equal(blurred.detach(), images.detach())
        assert not to_sigma.any()  # at 1.1e-3 exp(-4e5) is 0 as well
        sigma = torch.tensor([1e-3, 0.01, 0.05, 30.0], device=place.device, requires_grad=True)
        assert torch.autograd.grad(gaussian_blur(images, sigma).square().sum(), sigma)[0].isfinite().all()

    def test_of_what_is_off_is_zero(self, place: Place) -> None:
        images, params, seed = draw((6, 1, 7, 7), seed=27)
        enabled = ~torch.eye(6, dtype=torch.bool)
        x, p = leaves(place, images, params)
        s, e = on(place, seed, enabled)
        (grad,) = torch.autograd.grad(transform(x, p, seed=s, enabled=e).square().sum(), p)
        for b, stage in enumerate(STAGES):
            for other in STAGES:
                assert bool(grad[b, COLUMNS[other]].any()) == (other != stage)
        for order in ((), ("blur",)):
            x, p = leaves(place, images, params)
            y = transform(x, p, order=order, radius=0)  # type: ignore[arg-type]
            to_images, to_params = torch.autograd.grad(y.sum(), (x, p))
            assert to_images.eq(1).all() and not to_params.any()

    def test_only_what_is_asked_for(self, place: Place) -> None:
        images, params, seed = draw((2, 2, 6, 7), seed=28)
        keys, grad = on(place, seed, draw_like(images, seed=29))
        matrix = draw_matrices((2, 2, 6, 7), seed=30)
        for function, second in (
            (lambda x, p: transform(x, p, seed=keys), params),
            (lambda x, m: affine_warp(x, m, padding_mode="border"), matrix),
        ):
            x, p = leaves(place, images, second)
            both = gradients(function, (x, p), grad)
            (first,) = torch.autograd.grad(function(x, p.detach()), x, grad)
            (other,) = torch.autograd.grad(function(x.detach(), p), p, grad)
            assert torch.equal(first, both[0]) and torch.equal(other, both[1])
            assert not function(x.detach(), p.detach()).requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_of_parameters_is_in_their_type(self, place: Place, dtype: torch.dtype) -> None:
        images, params, seed = draw((2, 1, 8, 8), seed=31)
        keys = seed.to(place.device)
        x, p = leaves(place, images, params.to(dtype))
        rounded = p.detach().float().requires_grad_()
        (grad,) = torch.autograd.grad(transform(x, p, seed=keys).square().sum(), p)
        (expected,) = torch.autograd.grad(transform(x, rounded, seed=keys).square().sum(), rounded)
        assert grad.dtype == dtype and torch.equal(grad, expected.to(dtype))

    def test_a_number_for_all_samples_gets_the_sum(self, place: Place) -> None:
        images = draw((3, 1, 8, 8), seed=32, dtype=torch.float64)[0].to(place.device)
        for function in (gaussian_blur, blend_flip, rotate):
            one = torch.tensor(0.4, dtype=torch.float64, device=place.device, requires_grad=True)
            many = one.detach().repeat(3).requires_grad_()
            call: Callable[..., Tensor] = function
            (grad,) = torch.autograd.grad(call(images, one).square().sum(), one)
            (parts,) = torch.autograd.grad(call(images, many).square().sum(), many)
            assert grad.item() == pytest.approx(parts.sum().item(), rel=1e-12)


class TestSecondDerivative:
    def test_the_reference_has_it(self) -> None:
        with backend.use("reference"):
            images, params, seed = draw((2, 1, 4, 5), seed=33, dtype=torch.float64)
            inputs = (images.requires_grad_(), params.requires_grad_())
            assert torch.autograd.gradgradcheck(lambda x, p: transform(x, p, seed=seed), inputs)
            matrix = draw_matrices((2, 1, 4, 5), seed=34, dtype=torch.float64).requires_grad_()
            for padding in AFFINE_PADDINGS:
                assert torch.autograd.gradgradcheck(
                    lambda x, m, p=padding: affine_warp(x, m, padding_mode=p), (images, matrix)
                )

    @pytest.mark.parametrize("place", NATIVE_PLACES)
    def test_the_kernels_refuse_it(self, place: Place) -> None:
        with place.selected():
            images, params, _ = draw((2, 1, 4, 5), seed=35)
            x, p, m = leaves(place, images, params, draw_matrices((2, 1, 4, 5)))
            for y in (transform(x, p), affine_warp(x, m)):
                (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                with pytest.raises(NotImplementedError, match="no second derivative"):
                    torch.autograd.grad(grad.square().sum(), x)
