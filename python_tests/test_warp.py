# SPDX-License-Identifier: MIT
"""The op `warp`: images against a pixel-by-pixel oracle in float64 and closed forms, contract, determinism.

`test_warp_gradient.py` holds gradients, `test_warp_noise.py` the random numbers, `test_warp_volumes.py` volumes, `test_warp_edges.py`
what is degenerate or wrong, `test_warp_properties.py` invariants on random problems, `test_warp_peers.py` the agreement with other
libraries, `test_warp_torch.py` what torch does with the op.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protokernels import affine_warp, blend_flip, gaussian_blur, gaussian_noise, rotate, soft_crop, transform
from python_tests import warp_oracle as oracle
from python_tests.places import PLACES, Place, needs_native
from python_tests.warp_oracle import SHAPES, STAGES, check, draw, rounding

PADDINGS = ("reflect", "replicate", "zeros")
AFFINE_PADDINGS = ("zeros", "border", "reflection")
ORDERS: list[Sequence[Any]] = [
    STAGES, STAGES[::-1], ("rotate", "blur"), ("crop", "rotate", "noise"), ("hflip", "blur", "vflip"), ("rotate", "hflip", "crop"), (),
]  # fmt: skip


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def on(place: Place, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(place.device) for t in tensors)


def draw_matrices(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Maps [B, n, n + 1] that turn, scale, shear and move, also out of the image."""
    axes = len(shape) - 2
    generator = torch.Generator().manual_seed(seed)
    linear = torch.eye(axes) + 0.6 * torch.randn(shape[0], axes, axes, generator=generator)
    shift = torch.tensor(shape[:1:-1]) * 0.3 * torch.randn(shape[0], axes, generator=generator)
    return torch.cat([linear, shift[:, :, None]], 2).to(dtype)


class TestValue:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("stage", STAGES)
    def test_each_stage(self, place: Place, stage: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        images, params, seed = draw(shape, seed=1, dtype=dtype)
        x, p, s = on(place, images, params, seed)
        actual = transform(x, p, seed=s, order=[stage])
        noise = 0.1 if stage == "noise" else 0.0
        check(actual, oracle.transform(images, params, seed, order=[stage]), rounding(images, noise=noise))

    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_any_order(self, place: Place, order: Sequence[Any], shape: tuple[int, ...]) -> None:
        images, params, seed = draw(shape, seed=2)
        x, p, s = on(place, images, params, seed)
        expected = oracle.transform(images, params, seed, order=order)
        check(transform(x, p, seed=s, order=order), expected, 2 * rounding(images, noise=0.1))
        images, params, seed = draw(shape, seed=2, dtype=torch.float64)
        x, p, s = on(place, images, params, seed)
        expected = oracle.transform(images, params, seed, order=order)
        check(transform(x, p, seed=s, order=order), expected, 2 * rounding(images, noise=0.1))

    @pytest.mark.parametrize("order", [STAGES, ("rotate", "noise", "crop", "vflip", "blur", "hflip")], ids="-".join)
    def test_every_subset_of_stages_by_sample(self, place: Place, order: Sequence[Any]) -> None:
        subsets = torch.tensor(list(itertools.product([False, True], repeat=6)))
        images, params, seed = draw((64, 2, 6, 9), seed=3)
        x, p, s, e = on(place, images, params, seed, subsets)
        actual = transform(x, p, seed=s, order=order, enabled=e)
        expected = oracle.transform(images, params, seed, order=order, enabled=subsets)
        check(actual, expected, 2 * rounding(images, noise=0.1))
        assert torch.equal(actual[0], x[0])
        for names in ((), ("rotate",), ("blur", "hflip", "noise")):
            expected = oracle.transform(images[:2], params[:2], seed[:2], order=order, enabled=names)
            check(
                transform(x[:2], p[:2], seed=s[:2], order=order, enabled=names),
                expected,
                2 * rounding(images, noise=0.1),
            )

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("radius", [0, 1, 2, 5, 20, 64])
    @pytest.mark.parametrize("shape", [(3, 2, 1, 1), (3, 1, 2, 3), (3, 1, 19, 4)])
    def test_blur_of_any_radius(self, place: Place, padding: Any, radius: int, shape: tuple[int, ...]) -> None:
        images, _, _ = draw(shape, seed=4)
        sigma = torch.tensor([0.4, -1.7, 15.0])
        expected = oracle.each(images, lambda x, b: oracle.blur(x, sigma[b].item(), radius, padding))
        actual = gaussian_blur(*on(place, images, sigma), radius=radius, padding=padding)
        check(actual, expected, rounding(images, radius=radius))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("padding", AFFINE_PADDINGS)
    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            ((3, 2, 6, 9), None),
            ((3, 1, 6, 9), (11, 4)),
            ((2, 1, 1, 5), (3, 3)),
            ((2, 3, 5, 1), (1, 7)),
            ((2, 1, 1, 1), (2, 2)),
        ],
    )
    def test_affine_maps(
        self, place: Place, padding: Any, shape: tuple[int, ...], size: Any, dtype: torch.dtype
    ) -> None:
        images, matrix = draw(shape, seed=5, dtype=dtype)[0], draw_matrices(shape, seed=6, dtype=dtype)
        maps = matrix.double().numpy()
        expected = oracle.each(images, lambda x, b: oracle.affine(x, maps[b], size or shape[2:], padding))
        actual = affine_warp(*on(place, images, matrix), size=size, padding_mode=padding)
        check(actual, expected, 3 * rounding(images))

    def test_each_function_is_its_stage(self, place: Place) -> None:
        images, params, seed = on(place, *draw((3, 2, 7, 10), seed=7))
        chain = {
            "blur": gaussian_blur(images, 2.0 * params[:, 0]),
            "noise": gaussian_noise(images, 0.5 * params[:, 1], seed=seed),
            "crop": soft_crop(images, params[:, 2:4]),
            "hflip": blend_flip(images, params[:, 4]),
            "vflip": blend_flip(images, params[:, 5], dim="vertical"),
        }
        for stage, alone in chain.items():
            together = transform(images, params, seed=seed, order=[stage], noise_std=0.5)  # type: ignore[list-item]
            assert torch.equal(alone, together), stage
        turned = rotate(images, 2 * math.pi * params[:, 6])
        torch.testing.assert_close(turned, transform(images, params, order=["rotate"]), rtol=0, atol=2e-6 * 10)

    def test_options_of_the_chain(self, place: Place) -> None:
        images, params, seed = draw((2, 2, 9, 6), seed=8)
        options: dict[str, Any] = {
            "sigma_max": 1.1, "noise_std": 0.5, "crop_size": 0.8, "sharpness": 2.5, "radius": 3, "blur_padding": "zeros",
        }  # fmt: skip
        x, p, s = on(place, images, params, seed)
        for left_out in ("", *options):
            some = {name: value for name, value in options.items() if name != left_out}
            expected = oracle.transform(images, params, seed, **some)
            check(transform(x, p, seed=s, **some), expected, 2 * rounding(images, sharpness=2.5, noise=0.5))

    def test_one_number_stands_for_all_samples(self, place: Place) -> None:
        images = draw((3, 2, 8, 8), seed=9)[0].to(place.device)
        seed = torch.arange(3, device=place.device)
        for function, value, options in (
            (gaussian_blur, 1.3, {}),
            (gaussian_noise, 0.2, {"seed": seed}),
            (blend_flip, 0.3, {"dim": "vertical"}),
            (rotate, 0.7, {"padding_mode": "border"}),
        ):
            call: Callable[..., Tensor] = function
            expected = call(images, torch.full((3,), value, device=place.device), **options)
            assert torch.equal(call(images, value, **options), expected)
            assert torch.equal(call(images, torch.tensor(value, device=place.device), **options), expected)
        expected = soft_crop(images, torch.tensor([[0.3, 0.6]] * 3, device=place.device))
        assert torch.equal(soft_crop(images, (0.3, 0.6)), expected)
        assert torch.equal(soft_crop(images, torch.tensor([0.3, 0.6], device=place.device)), expected)


class TestClosedForms:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_identities_are_exact(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        images = draw(shape, seed=10, dtype=dtype)[0].to(place.device)
        B = shape[0]
        for still in (0.0, 4.99e-4, -4.99e-4):  # a sigma below 1e-3
            params = torch.zeros(B, 7, device=place.device)
            params[:, 0] = still
            order = [stage for stage in STAGES if stage != "crop"]
            assert torch.equal(transform(images, params, order=order), images)  # type: ignore[arg-type]
        for turns in (1.0, -1.0, 3.0, -1e6, 2.0**40):
            params = torch.full((B, 7), turns, device=place.device)
            assert torch.equal(transform(images, params, order=["rotate"]), images)
        assert torch.equal(gaussian_blur(images, 2.0, radius=0), images)
        assert torch.equal(transform(images, torch.rand(B, 7, device=place.device), order=()), images)
        eye = torch.eye(2, 3, device=place.device).repeat(B, 1, 1)
        for padding in AFFINE_PADDINGS:
            assert torch.equal(affine_warp(images, eye, padding_mode=padding), images)  # type: ignore[arg-type]

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_weight_one_is_the_exact_mirror_image(
        self, place: Place, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        images = draw(shape, seed=11, dtype=dtype)[0].to(place.device)
        ones = torch.ones(shape[0], 7, device=place.device)
        assert torch.equal(transform(images, ones, order=["hflip"]), images.flip(3))
        assert torch.equal(transform(images, ones, order=["vflip"]), images.flip(2))
        assert torch.equal(transform(images, ones, order=["vflip", "hflip"]), images.flip(2, 3))
        assert torch.equal(blend_flip(images, 1.0), images.flip(3))

    @pytest.mark.parametrize("side", [1, 2, 5, 8, 31])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_quarter_turns_of_squares_are_exact(self, place: Place, side: int, dtype: torch.dtype) -> None:
        images = draw((2, 2, side, side), seed=12, dtype=dtype)[0].to(place.device)
        for quarters in range(-5, 6):
            expected = images.rot90(quarters, (2, 3))
            params = torch.full((2, 7), quarters / 4, device=place.device)
            assert torch.equal(transform(images, params, order=["rotate"]), expected)
            assert torch.equal(rotate(images, quarters * math.pi / 2), expected)
            for padding in AFFINE_PADDINGS:
                turned = rotate(images, quarters * math.pi / 2, padding_mode=padding)  # type: ignore[arg-type]
                assert torch.equal(turned, expected)

    def test_half_a_turn_of_an_oblong_image_mirrors_both_axes(self, place: Place) -> None:
        images = draw((2, 2, 5, 8), seed=13)[0].to(place.device)
        assert torch.equal(rotate(images, math.pi), images.flip(2, 3))

    def test_a_small_positive_angle_turns_counter_clockwise(self, place: Place) -> None:
        """A bright spot right of the centre moves up, towards lower rows."""
        image = torch.zeros(1, 1, 21, 21, device=place.device)
        image[0, 0, 10, 18] = 1.0
        turned = rotate(image, math.pi / 6)[0, 0]
        row, column = divmod(int(turned.argmax()), 21)
        assert (row, column) == (10 - round(8 * math.sin(math.pi / 6)), 10 + round(8 * math.cos(math.pi / 6)))

    @pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 7.0])
    def test_blur_answers_a_point_with_its_weights(self, place: Place, sigma: float) -> None:
        image = torch.zeros(1, 1, 33, 35, device=place.device, dtype=torch.float64)
        image[0, 0, 15, 17] = 1.0
        k = torch.arange(-6, 7, dtype=torch.float64)
        weights = torch.exp(-k.square() / (2 * sigma * sigma))
        weights /= weights.sum()
        answer = gaussian_blur(image, sigma)[0, 0].cpu()
        torch.testing.assert_close(answer[9:22, 11:24], weights[:, None] * weights, rtol=1e-14, atol=1e-16)
        assert answer.sum().item() == pytest.approx(1.0, abs=1e-14)

    @pytest.mark.parametrize("padding", ["reflect", "replicate"])
    def test_blur_keeps_a_constant(self, place: Place, padding: Any) -> None:
        image = torch.full((2, 1, 3, 17), 0.7, device=place.device)
        blurred = gaussian_blur(image, torch.tensor([0.5, 3.0], device=place.device), padding=padding)
        torch.testing.assert_close(blurred, image, rtol=1e-6, atol=0)

    def test_many_turns_are_as_good_as_none(self, place: Place) -> None:
        """Turns are taken off before float32 would take the angle's digits for them."""
        images = torch.rand(1, 1, 9, 9, device=place.device)
        for angle in (1e4, -1e6, 2 * math.pi * 12345.25):
            expected = rotate(images, math.remainder(angle, 2 * math.pi))
            torch.testing.assert_close(rotate(images, angle), expected, rtol=0, atol=1e-5)
            wide = torch.tensor([angle], dtype=torch.float64, device=place.device)
            torch.testing.assert_close(rotate(images, wide), expected, rtol=0, atol=1e-5)

    def test_the_crop_is_a_window_of_a_quarter_of_the_sides(self, place: Place) -> None:
        """Half the height at the window's edge; at a corner no more than at an edge; the centre may lie outside."""
        ones = torch.ones(1, 1, 64, 64, device=place.device, dtype=torch.float64)
        window = soft_crop(ones, (0.5, 0.5))[0, 0].cpu()
        assert window[31, 31].item() == pytest.approx(1 / (1 + math.exp(-7.5)), rel=1e-14)
        assert window[31, 40].item() == pytest.approx(1 / (1 + math.exp(0.5)), rel=1e-14)
        assert window[40, 40].item() == window[31, 40].item() == window[40, 31].item()
        assert torch.equal(window, window.mT) and torch.equal(window, window.flip(0, 1))
        outside = soft_crop(ones, (-1.0, 3.0))
        assert outside.isfinite().all() and outside.max() < 1e-20

    def test_moves_by_whole_pixels_are_exact(self, place: Place) -> None:
        images = draw((1, 2, 7, 9), seed=14)[0].to(place.device)
        matrix = torch.tensor([[[1.0, 0, 2], [0, 1, -3]]], device=place.device)
        moved = affine_warp(images, matrix)
        assert torch.equal(moved[:, :, 3:, :7], images[:, :, :4, 2:])
        assert not moved[:, :, :3].any() and not moved[:, :, :, 7:].any()


class TestContract:
    def test_any_strides_give_the_same(self, place: Place) -> None:
        images, params, seed = on(place, *draw((2, 4, 6, 8), seed=15))
        matrix = draw_matrices((2, 4, 6, 8)).to(place.device)
        views = [
            images.to(memory_format=torch.channels_last),
            images.mT.contiguous().mT,
            torch.cat([images, images], dim=1)[:, :4],
            torch.stack([images, images], dim=-1)[..., 0],
        ]
        for view in views:
            assert torch.equal(transform(view, params, seed=seed), transform(images, params, seed=seed))
            assert torch.equal(affine_warp(view, matrix), affine_warp(images, matrix))
        spread = torch.stack([params, params], dim=-1)[..., 1]
        assert torch.equal(transform(images, spread, seed=seed), transform(images, params, seed=seed))
        keys = torch.stack([seed, seed], dim=-1)[:, 0]
        assert torch.equal(transform(images, params, seed=keys), transform(images, params, seed=seed))
        expanded = images[:1, :, :1].expand(2, 4, 6, 8)
        assert torch.equal(transform(expanded, params, seed=seed), transform(expanded.clone(), params, seed=seed))

    def test_inputs_stay_as_they_are(self, place: Place) -> None:
        images, params, seed = on(place, *draw((2, 2, 6, 8), seed=16))
        before = images.clone(), params.clone(), seed.clone()
        for order in (STAGES, (), ("hflip",)):
            result = transform(images, params, seed=seed, order=order)
            result.add_(1.0)  # also: the result is not the input
        for now, then in zip((images, params, seed), before, strict=True):
            assert torch.equal(now, then)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(self, place: Place, dtype: torch.dtype) -> None:
        images, params, seed = draw((3, 2, 9, 12), seed=17, dtype=dtype)
        x, p, s = on(place, images, params, seed)
        actual = transform(x, p, seed=s)
        assert actual.dtype == dtype
        check(actual, oracle.transform(images, params, seed), 2 * rounding(images, noise=0.1))
        assert torch.equal(transform(x, p.double(), seed=s), actual)
        matrix = draw_matrices((3, 2, 9, 12), seed=18)
        expected = oracle.each(images, lambda x, b: oracle.affine(x, matrix[b].double().numpy(), (9, 12), "border"))
        check(affine_warp(x, matrix.to(place.device), padding_mode="border"), expected, 3 * rounding(images))
        rounded = transform(x, p.to(dtype), seed=s)  # parameters of half precision are numbers like others
        check(rounded, oracle.transform(images, params.to(dtype), seed), 2 * rounding(images, noise=0.1))

    def test_samples_do_not_see_each_other(self, place: Place) -> None:
        images, params, seed = on(place, *draw((5, 2, 9, 12), seed=19))
        whole = transform(images, params, seed=seed)
        for b in (0, 3, 4):
            alone = transform(images[b : b + 1], params[b : b + 1], seed=seed[b : b + 1])
            assert torch.equal(alone[0], whole[b])


class TestDeterminism:
    @needs_native
    @pytest.mark.parametrize("shape", [(3, 2, 40, 37), (1, 1, 150, 160), (17, 1, 28, 28)])
    def test_threads_and_repeats_agree_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        images, params, seed = draw(shape, seed=20)
        matrix = draw_matrices(shape, seed=21)
        threads = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3, 2, 1):
                torch.set_num_threads(count)
                leaves = [t.clone().requires_grad_() for t in (images, params, matrix)]
                outputs = transform(leaves[0], leaves[1], seed=seed), affine_warp(leaves[0], leaves[2])
                grads = torch.autograd.grad([y.square().sum() for y in outputs], leaves)
                results.append([*(y.detach() for y in outputs), *grads])
        finally:
            torch.set_num_threads(threads)
        for run in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, results[0], strict=True))

    def test_repeats_agree_bit_for_bit(self, place: Place) -> None:
        images, params, seed = on(place, *draw((3, 2, 33, 18), seed=22))
        runs = []
        for _ in range(5):
            x, p = images.clone().requires_grad_(), params.clone().requires_grad_()
            y = transform(x, p, seed=seed)
            runs.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, p))])
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_the_oracle_bounces() -> None:
    assert [oracle.bounced(i, 4) for i in range(-7, 9)] == [1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]
    np.testing.assert_allclose(oracle.blur_matrix(3, 2.0, 9, "reflect").sum(1), 1.0)
