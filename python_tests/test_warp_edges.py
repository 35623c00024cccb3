# SPDX-License-Identifier: MIT
"""The op `warp` where there is nothing to transform, where numbers are not finite or huge, and where arguments are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import affine_warp, blend_flip, gaussian_blur, gaussian_noise, rotate, soft_crop, transform
from python_tests.places import PLACES, Place
from python_tests.test_warp import AFFINE_PADDINGS, draw_matrices, on
from python_tests.warp_oracle import STAGES, draw

EMPTY = [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0), (0, 0, 0, 0)]
COLUMN = {"blur": 0, "noise": 1, "crop": 2, "hflip": 4, "vflip": 5, "rotate": 6}
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


class TestValue:
    @pytest.mark.parametrize("shape", EMPTY)
    def test_empty_images(self, place: Place, shape: tuple[int, ...]) -> None:
        """Stay empty, in the graph, with gradients of zeros."""
        images = torch.zeros(shape, device=place.device, requires_grad=True)
        params = torch.rand(shape[0], 7, device=place.device, requires_grad=True)
        matrix = torch.rand(shape[0], 2, 3, device=place.device, requires_grad=True)
        for y, second in (
            (transform(images, params), params),
            (affine_warp(images, matrix), matrix),
            (affine_warp(images, matrix, size=(0, 3)), matrix),
        ):
            grads = torch.autograd.grad(y.sum(), (images, second))
            assert y.numel() == 0 and not grads[0].any() and not grads[1].any()
            assert y.dtype == images.dtype and y.shape[:2] == shape[:2]
        for alone in (
            gaussian_blur(images, 1.0), gaussian_noise(images, 1.0), soft_crop(images, (0.5, 0.5)),
            blend_flip(images, 0.5), rotate(images, 1.0), rotate(images, 1.0, padding_mode="border"),
        ):  # fmt: skip
            assert alone.shape == shape

    def test_no_output_of_an_image(self, place: Place) -> None:
        images = torch.rand(2, 1, 3, 4, device=place.device, requires_grad=True)
        matrix = draw_matrices((2, 1, 3, 4)).to(place.device).requires_grad_()
        y = affine_warp(images, matrix, size=(5, 0))
        assert y.shape == (2, 1, 5, 0)
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), (images, matrix)))

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_parameter_that_is_not_finite_spoils_its_sample(self, place: Place, stage: Any, bad: float) -> None:
        images, params, seed = on(place, *draw((3, 2, 9, 6), seed=1))
        spoilt = params.clone()
        spoilt[1, COLUMN[stage]] = bad
        for order in ((stage,), STAGES, STAGES[::-1]):
            y, grads = self._run(images, spoilt, seed, order=order)
            clean, clean_grads = self._run(images, params, seed, order=order)
            assert y[1].isnan().all()
            for now, then in zip((y, *grads), (clean, *clean_grads), strict=True):
                assert torch.equal(now[[0, 2]], then[[0, 2]])
        if stage == "crop":
            spoilt = params.clone()
            spoilt[1, 3] = bad
            assert transform(images, spoilt, order=["crop"])[1].isnan().all()

    @pytest.mark.parametrize("bad", BAD)
    def test_a_parameter_of_what_is_off_is_not_looked_at(self, place: Place, bad: float) -> None:
        images, params, seed = on(place, *draw((6, 2, 9, 6), seed=2))
        off = ~torch.eye(6, dtype=torch.bool, device=place.device)
        spoilt = params.clone()
        for b, stage in enumerate(STAGES):
            spoilt[b, COLUMN[stage]] = bad
        spoilt[2, 3] = bad
        (y, grads), (clean, clean_grads) = (self._run(images, p, seed, enabled=off) for p in (spoilt, params))
        assert torch.equal(y, clean)
        for now, then in zip(grads, clean_grads, strict=True):
            assert torch.equal(now, then)
        assert torch.equal(transform(images, spoilt, order=()), images)

    @staticmethod
    def _run(images: Tensor, params: Tensor, seed: Tensor, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, p = images.clone().requires_grad_(), params.clone().requires_grad_()
        y = transform(x, p, seed=seed, **options)
        return y.detach(), torch.autograd.grad(y, (x, p), torch.ones_like(y))

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_a_pixel_that_is_not_finite_stays_in_its_sample(self, place: Place, bad: float, dtype: torch.dtype) -> None:
        images, params, seed = on(place, *draw((3, 2, 9, 6), seed=3, dtype=dtype))
        spoilt = images.clone()
        spoilt[1, 0, 4, 3] = bad
        matrix = draw_matrices((3, 2, 9, 6), seed=4).to(place.device)
        for order in (STAGES, STAGES[::-1], *((stage,) for stage in STAGES)):
            (y, grads), (clean, clean_grads) = (self._run(x, params, seed, order=order) for x in (spoilt, images))
            for now, then in zip((y, *grads), (clean, *clean_grads), strict=True):
                assert torch.equal(now[[0, 2]], then[[0, 2]])
            assert not y[1, 0].isfinite().all()
            assert torch.equal(y[1, 1], clean[1, 1])  # nor does it reach another channel
        for padding in AFFINE_PADDINGS:
            y, clean = (affine_warp(x, matrix, padding_mode=padding) for x in (spoilt, images))  # type: ignore[arg-type]
            assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(y[1, 1], clean[1, 1])

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    def test_a_matrix_that_is_not_finite_spoils_its_sample(self, place: Place, padding: Any, bad: float) -> None:
        images, _, _ = on(place, *draw((3, 2, 9, 6), seed=5))
        matrix = draw_matrices((3, 2, 9, 6), seed=6).to(place.device)
        for i, j in ((0, 0), (1, 2), (0, 1)):
            spoilt = matrix.clone()
            spoilt[1, i, j] = bad
            results = []
            for m in (spoilt, matrix):
                x, m = images.clone().requires_grad_(), m.clone().requires_grad_()
                y = affine_warp(x, m, padding_mode=padding)
                results.append((y.detach(), *torch.autograd.grad(y, (x, m), torch.ones_like(y))))
            assert results[0][0][1].isnan().all()
            for now, then in zip(*results, strict=True):
                assert torch.equal(now[[0, 2]], then[[0, 2]])

    @pytest.mark.parametrize("huge", [10**30, -(2**63) - 1])
    def test_integers_beyond_64_bits(self, place: Place, huge: int) -> None:
        images = draw((2, 1, 9, 9), seed=7)[0].to(place.device)
        seed = torch.arange(2, device=place.device)
        for of in (
            lambda number: gaussian_blur(images, number),
            lambda number: gaussian_noise(images, number, seed=seed),
            lambda number: blend_flip(images, number),
            lambda number: soft_crop(images, (number, 0)),
            lambda number: rotate(images, number, padding_mode="border"),
        ):
            assert torch.equal(of(huge), of(float(huge)))

    @pytest.mark.parametrize("huge", [1e4, 1e9, 1e18, 1e30, 3e38])
    def test_huge_parameters_do_no_harm(self, place: Place, huge: float) -> None:
        """Rotation: whole turns. Blur: equal weights. A crop far away: zeros. An affine map: zeros, the edge, or some pixel."""
        images = draw((2, 1, 9, 9), seed=7)[0].to(place.device).requires_grad_()
        sign = torch.tensor([1.0, -1.0], device=place.device)
        params = (sign[:, None] * torch.full((2, 7), huge, device=place.device)).requires_grad_()
        y = transform(images, params, order=["rotate"])
        whole = torch.tensor(huge).remainder(1).item() == 0
        assert not whole or torch.equal(y, images)
        assert not transform(images, params, order=["crop"]).any()
        y = transform(images, params, order=["blur"], sigma_max=1.0, blur_padding="reflect")
        equal = gaussian_blur(images, 1e5)
        torch.testing.assert_close(y, equal, rtol=1e-6, atol=0)
        to_images, to_params = torch.autograd.grad(
            transform(images, params, order=["blur", "crop", "rotate"], sigma_max=1.0).sum(), (images, params)
        )
        assert to_images.isfinite().all() and to_params.isfinite().all()
        matrix = torch.eye(2, 3, device=place.device).repeat(2, 1, 1)
        matrix[:, 0, 2] = huge * sign
        assert not affine_warp(images, matrix).any()
        edge = affine_warp(images, matrix, padding_mode="border")
        assert torch.equal(edge[0], images[0, :, :, -1:].expand(1, 9, 9))
        assert torch.equal(edge[1], images[1, :, :, :1].expand(1, 9, 9))
        mirrored = affine_warp(images, matrix, padding_mode="reflection")
        assert mirrored.isfinite().all() and (mirrored >= 0).all() and (mirrored <= images.max()).all()
        wide = torch.full((2, 2, 3), huge, device=place.device).requires_grad_()
        for padding in AFFINE_PADDINGS:  # coordinates may overflow
            y = affine_warp(images, wide, padding_mode=padding)  # type: ignore[arg-type]
            torch.autograd.grad(y.nan_to_num().sum(), (images, wide))

    def test_sides_that_do_not_fill_a_vector(self, place: Place) -> None:
        """A transformation of a part is that part of the transformation, for all widths up to several vectors."""
        wide, params, _ = on(place, *draw((1, 1, 3, 70), seed=8))
        params[:] = 0.3
        for width in range(1, 70):
            images = wide[:, :, :, :width].contiguous()
            assert torch.equal(blend_flip(images, 1.0), images.flip(3))
            blurred = transform(images, params, order=["blur"], blur_padding="replicate")
            edged = torch.cat([images[..., :1].expand(1, 1, 3, 6), images, images[..., -1:].expand(1, 1, 3, 6)], 3)
            expected = transform(edged, params, order=["blur"], blur_padding="replicate")[..., 6:-6]
            torch.testing.assert_close(blurred, expected, rtol=1e-6, atol=1e-7)


IMAGES = torch.zeros(2, 1, 4, 4)
PARAMS = torch.zeros(2, 7)
VOLUMES = torch.zeros(2, 1, 3, 4, 4)
EYE = torch.eye(2, 3).repeat(2, 1, 1)

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tensor": (lambda: transform([1.0], PARAMS), TypeError, r"images must be a torch.Tensor of shape \[B, C, H, W\]; got list"),
    "integers": (lambda: gaussian_blur(IMAGES.long(), 1.0), TypeError, r"got int64 \[2, 1, 4, 4\] on cpu; convert them"),
    "no channels": (lambda: rotate(IMAGES[:, 0], 1.0), ValueError, r"pass images\[:, None\] for one channel"),
    "volumes in the chain": (lambda: transform(VOLUMES, PARAMS), ValueError, "for volumes there is each transformation alone"),
    "six parameters": (lambda: transform(IMAGES, PARAMS[:, 1:]), ValueError, r"params must have shape \[B, 7\] = \[2, 7\]"),
    "other batch": (lambda: transform(IMAGES, PARAMS[:1]), ValueError, r"got float32 \[1, 7\] on cpu"),
    "integer parameters": (lambda: transform(IMAGES, PARAMS.int()), TypeError, "params must be a floating-point tensor"),
    "unknown stage": (lambda: transform(IMAGES, PARAMS, order=["zoom"]), ValueError, "names out of 'blur', 'noise'"),
    "a name for the order": (lambda: transform(IMAGES, PARAMS, order="blur"), ValueError, "order must be a sequence"),
    "an array in the order": (lambda: transform(IMAGES, PARAMS, order=[np.zeros(2)]), ValueError, "order must be a sequence"),
    "an array enabled": (lambda: transform(IMAGES, PARAMS, enabled=[np.zeros(2)]), ValueError, "enabled must be None, a sequence"),
    "a stage twice": (lambda: transform(IMAGES, PARAMS, order=["blur", "crop", "blur"]), ValueError, "once at most"),
    "unknown enabled": (lambda: transform(IMAGES, PARAMS, enabled=["zoom"]), ValueError, "enabled must be None, a sequence"),
    "enabled of numbers": (lambda: transform(IMAGES, PARAMS, enabled=torch.ones(2, 6)), ValueError, "must be a bool tensor"),
    "enabled of 7": (lambda: transform(IMAGES, PARAMS, enabled=torch.ones(2, 7).bool()), ValueError, r"\[2, 6\]"),
    "negative strength": (lambda: transform(IMAGES, PARAMS, sigma_max=-1.0), ValueError, "sigma_max must be finite and not negative"),
    "infinite strength": (lambda: transform(IMAGES, PARAMS, noise_std=math.inf), ValueError, "noise_std must be finite"),
    "no number": (lambda: transform(IMAGES, PARAMS, crop_size="big"), TypeError, "crop_size must be a number"),
    "flat crop": (lambda: soft_crop(IMAGES, (0.5, 0.5), sharpness=0.0), ValueError, "sharpness must be finite and positive"),
    "radius": (lambda: gaussian_blur(IMAGES, 1.0, radius=65), ValueError, r"radius must lie in \[0, 64\]; got 65"),
    "radius of a half": (lambda: gaussian_blur(IMAGES, 1.0, radius=1.5), TypeError, "whole number of pixels"),
    "blur padding": (lambda: transform(IMAGES, PARAMS, blur_padding="edge"), ValueError, "'reflect', 'replicate', 'zeros'; got 'edge'"),
    "two sources": (
        lambda: transform(IMAGES, PARAMS, seed=torch.arange(2), generator=torch.Generator()), ValueError, "generator or seed, not both",
    ),
    "a number for seeds": (lambda: gaussian_noise(IMAGES, 1.0, seed=7), TypeError, "seed must be an int64 tensor"),
    "small seeds": (lambda: gaussian_noise(IMAGES, 1.0, seed=torch.arange(2).int()), TypeError, r"got int32 \[2\] on cpu"),
    "seeds of others": (lambda: gaussian_noise(IMAGES, 1.0, seed=torch.arange(3)), ValueError, r"shape \[B\] = \[2\]"),
    "no generator": (lambda: gaussian_noise(IMAGES, 1.0, generator=7), TypeError, "must be a torch.Generator; got int"),
    "sigma of others": (lambda: gaussian_blur(IMAGES, torch.ones(3)), ValueError, r"sigma must have shape \[B\] = \[2\]"),
    "sigma of names": (lambda: gaussian_blur(IMAGES, "1"), TypeError, "sigma must be a number or a floating-point tensor"),
    "centre of three": (lambda: soft_crop(IMAGES, (0.5, 0.5, 0.5)), ValueError, r"center must have shape \[2\]"),
    "centre of NumPy's": (lambda: soft_crop(IMAGES, (np.float32(1), 0)), TypeError, "each number of center must .* numpy.float32; pass"),
    "centre of two": (lambda: soft_crop(VOLUMES, torch.zeros(2, 2)), ValueError, r"center must have shape \[B, 3\] = \[2, 3\]"),
    "depth of an image": (lambda: blend_flip(IMAGES, 1.0, dim="depth"), ValueError, "dim must be one of 'horizontal', 'vertical'"),
    "axis of an image": (lambda: rotate(IMAGES, 1.0, axis="vertical"), ValueError, "axis must be one of 'depth'"),
    "matrix of volumes": (lambda: affine_warp(VOLUMES, EYE), ValueError, r"\[B, 3, 4\] = \[2, 3, 4\]"),
    "one matrix": (lambda: affine_warp(IMAGES, EYE[0]), ValueError, r"matrix must have shape \[B, 2, 3\]"),
    "one side": (lambda: affine_warp(IMAGES, EYE, size=4), ValueError, "size must be 2 whole numbers"),
    "negative side": (lambda: affine_warp(IMAGES, EYE, size=(4, -1)), ValueError, r"got \(4, -1\)"),
    "affine padding": (lambda: affine_warp(IMAGES, EYE, padding_mode="wrap"), ValueError, "'zeros', 'border', 'reflection'"),
    "too many pixels": (lambda: affine_warp(IMAGES, EYE, size=(10**6, 10**9)), ValueError, r"fewer than 2\^30 pixels"),
    "too long a side": (lambda: affine_warp(IMAGES, EYE, size=(0, 2**30)), ValueError, r"fewer than 2\^30 pixels"),
    "nothing to sample": (lambda: affine_warp(IMAGES[:, :, :0], EYE, size=(1, 1)), ValueError, "have no pixels to take"),
}  # fmt: skip


class TestContract:
    def test_images_of_nearly_the_most_pixels(self) -> None:
        """None of them is there, so no memory is."""
        wide, eye = torch.empty(0, 1, 30000, 30000), torch.empty(0, 2, 3)
        assert affine_warp(wide, eye, size=(2, 2)).shape == (0, 1, 2, 2) and rotate(wide, 0.0).shape == wide.shape
        for short in (
            torch.empty(0, 1, 2**27, 1),
            torch.empty(0, 1, 2**26, 13),
        ):  # with what is around them more than 2^31
            with pytest.raises(RuntimeError, match="fewer rows where these are short"):
                affine_warp(short, eye, size=(2, 2))
            with pytest.raises(RuntimeError, match="fewer rows where these are short"):
                rotate(short, 0.0)

    @pytest.mark.parametrize("name", WRONG)
    def test_wrong_arguments_are_refused_with_advice(self, name: str) -> None:
        call, kind, message = WRONG[name]
        with pytest.raises(kind, match=message):
            call()

    def test_the_message_begins_with_the_function(self) -> None:
        calls: dict[str, Callable[[Any], Any]] = {
            "transform": lambda x: transform(x, PARAMS), "gaussian_blur": lambda x: gaussian_blur(x, 1.0),
            "gaussian_noise": lambda x: gaussian_noise(x, 1.0), "soft_crop": lambda x: soft_crop(x, (0.5, 0.5)),
            "blend_flip": lambda x: blend_flip(x, 1.0), "rotate": lambda x: rotate(x, 1.0),
            "affine_warp": lambda x: affine_warp(x, EYE),
        }  # fmt: skip
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name}: images must have shape"):
                call(torch.zeros(3))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
    def test_another_device_is_refused(self) -> None:
        for call in (
            lambda: transform(IMAGES, PARAMS.cuda()),
            lambda: affine_warp(IMAGES.cuda(), EYE),
            lambda: gaussian_noise(IMAGES.cuda(), 1.0, generator=torch.Generator()),
            lambda: gaussian_noise(IMAGES.cuda(), 1.0, seed=torch.arange(2)),
        ):
            with pytest.raises(ValueError, match=r"is on c"):
                call()
