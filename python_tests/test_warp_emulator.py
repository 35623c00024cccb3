# SPDX-License-Identifier: MIT
"""The CUDA kernels of `warp`, run on the CPU by the emulator and compared with the float64 reference and its autograd.

Memory is watched, and several orders of threads must give the same bits: a missing barrier, a race, a read before a write
or an access out of bounds fails here without a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch

from .emulator.build import SEEDS, load, missing_tools
from .warp_emulation import BLUR, CROP, HFLIP, KINDS, NOISE, ROTATE, STAGES, VFLIP, Chain, compare, same_bits

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

ORDERS = [
    tuple(STAGES),
    tuple(reversed(STAGES)),
    (NOISE, ROTATE, CROP, BLUR, HFLIP),  # blur and rotation in the middle: three passes
    (VFLIP, BLUR, ROTATE),
    (CROP, NOISE, VFLIP, HFLIP),
]
# one tile and several, odd and even sides, a side of 1, sides that the blur crosses twice, more rows than columns and fewer
SHAPES = [(2, 1, 28, 28), (1, 3, 33, 31), (2, 1, 1, 129), (1, 2, 129, 2), (1, 1, 1, 1), (2, 2, 8, 9), (1, 1, 35, 70)]


class TestChains:
    @pytest.mark.parametrize("order", ORDERS, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("kind", ["f32", "f64"])
    def test_matches_the_reference(self, kind: str, shape: tuple[int, int, int, int], order: tuple[int, ...]) -> None:
        emulator = load("warp")
        emulator.configure(seed=3)
        chain = Chain(kind, shape, order)
        chain.check(chain.run(emulator))

    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("shape", [(2, 2, 20, 33), (1, 1, 3, 40), (1, 1, 70, 34)], ids=str)
    def test_a_stage_alone(self, shape: tuple[int, int, int, int], stage: int) -> None:
        emulator = load("warp")
        emulator.configure(seed=2)
        chain = Chain("f32", shape, (stage,))
        chain.check(chain.run(emulator))

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    @pytest.mark.parametrize("order", [ORDERS[0], ORDERS[2], (ROTATE,), (BLUR,), (CROP,)], ids=str)
    def test_half_precision_rounds_once(self, kind: str, order: tuple[int, ...]) -> None:
        emulator = load("warp")
        emulator.configure(seed=1)
        for shape in ((2, 2, 19, 23), (1, 1, 40, 66)):
            chain = Chain(kind, shape, order)
            chain.check(chain.run(emulator))

    @pytest.mark.parametrize("shape", [(2, 3, 21, 18), (2, 2, 40, 70)], ids=str)
    @pytest.mark.parametrize("order", [ORDERS[0], ORDERS[2], (BLUR,)], ids=str)
    def test_all_seeds_agree_to_the_bit(self, shape: tuple[int, int, int, int], order: tuple[int, ...]) -> None:
        emulator = load("warp")
        chain, results = Chain("f32", shape, order), []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(chain.run(emulator))
        chain.check(results[0])
        for other in results[1:]:
            same_bits(other, results[0])

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
    def test_arrays_that_start_anywhere(self, architecture: str) -> None:
        emulator = load("warp")
        for kind in ("f32", "f64", "f16"):
            chain = Chain(kind, (1, 2, 40, 70))
            emulator.configure(seed=1, architecture=architecture, element_offset=1)
            chain.check(chain.run(emulator))
        emulator.configure()

    def test_an_order_of_nothing_copies(self) -> None:
        emulator = load("warp")
        chain = Chain("f32", (2, 2, 20, 70), ())
        output, by_images, by_params = chain.run(emulator)
        assert torch.equal(output, chain.images) and torch.equal(by_images, chain.grad) and not by_params.any()

    @pytest.mark.parametrize("order", [ORDERS[0], (BLUR,), (ROTATE, CROP)], ids=str)
    def test_one_gradient_alone(self, order: tuple[int, ...]) -> None:
        emulator = load("warp")
        emulator.configure(seed=4)
        for shape in ((2, 2, 20, 24), (1, 1, 34, 66)):
            chain = Chain("f32", shape, order)
            both = chain.run(emulator)
            same_bits(chain.run(emulator, params=False)[1:2], both[1:2])
            same_bits(chain.run(emulator, images=False)[2:], both[2:])


class TestBlur:
    @pytest.mark.parametrize("padding", [0, 1, 2])
    @pytest.mark.parametrize("radius", [(6, 6), (3, 3), (0, 6), (4, 0), (2, 5), (9, 9), (64, 64)], ids=str)
    @pytest.mark.parametrize("kind", ["f32", "f64"])
    def test_radius_and_padding(self, kind: str, radius: tuple[int, int], padding: int) -> None:
        emulator = load("warp")
        emulator.configure(seed=1)
        for shape in ((1, 1, 14, 16), (1, 1, 12, 30), (1, 2, 35, 40), (1, 1, 5, 1)):
            chain = Chain(kind, shape, (BLUR,), radius=radius, padding=padding)
            chain.check(chain.run(emulator))

    @pytest.mark.parametrize("shape", [(3, 1, 20, 20), (3, 1, 10, 9)], ids=str)
    def test_below_the_least_sigma_it_is_the_identity(self, shape: tuple[int, int, int, int]) -> None:
        emulator = load("warp")
        chain = Chain("f32", shape, (BLUR,))
        chain.params[:, 0] = torch.tensor([0.0, 4.9e-4, -4.9e-4])
        chain.images[0, 0, 3, 4] = math.inf
        output, by_images, by_params = chain.run(emulator)
        assert torch.equal(output, chain.images) and torch.equal(by_images, chain.grad) and not by_params.any()

    def test_a_negative_sigma_is_its_absolute_value(self) -> None:
        emulator = load("warp")
        chain = Chain("f64", (2, 1, 20, 20), (BLUR,))
        chain.params[:, 0] = torch.tensor([-0.3, -0.9])
        chain.check(chain.run(emulator))


class TestRotation:
    @pytest.mark.parametrize("turns", [0.0, 0.25, 0.5, 0.75, -0.25, 3.0, 1e6 + 0.25])
    @pytest.mark.parametrize("kind", ["f32", "f64"])
    def test_quarters_where_every_pixel_is_at_a_kink(self, kind: str, turns: float) -> None:
        emulator = load("warp")
        for shape in ((1, 1, 12, 12), (1, 1, 9, 12), (1, 1, 33, 33), (1, 1, 34, 70)):
            chain = Chain(kind, shape, (ROTATE,))
            chain.params[:, 6] = turns
            found = chain.run(emulator)
            chain.check(found)
            if shape[2] == shape[3]:
                assert torch.equal(found[0], torch.rot90(chain.images, round(4 * turns) % 4, (2, 3)))

    @pytest.mark.parametrize("angle", range(0, 200, 9))
    def test_the_adjoint_at_any_angle(self, angle: int) -> None:
        emulator = load("warp")
        chain = Chain("f64", (1, 1, 17, 21), (ROTATE,))
        chain.params[:, 6] = angle / 200
        chain.check(chain.run(emulator))

    def test_whole_turns_far_away(self) -> None:
        emulator = load("warp")
        chain = Chain("f32", (2, 1, 15, 15), (ROTATE,))
        chain.params[:, 6] = torch.tensor([1e30, -(2.0**40)])
        output = chain.run(emulator)[0]
        assert torch.equal(output, chain.images)


class TestSubsets:
    @pytest.mark.parametrize("shape", [(5, 1, 18, 20), (5, 1, 40, 18)], ids=str)
    @pytest.mark.parametrize("order", ORDERS[:3], ids=str)
    def test_enabled_per_sample(self, shape: tuple[int, int, int, int], order: tuple[int, ...]) -> None:
        emulator = load("warp")
        emulator.configure(seed=2)
        chain = Chain("f32", shape, order, enabled=[0, 63, 1 << BLUR | 1 << HFLIP, 1 << NOISE | 1 << ROTATE, 1 << CROP])
        found = chain.run(emulator)
        chain.check(found)
        assert torch.equal(found[0][0], chain.images[0]) and torch.equal(found[1][0], chain.grad[0])
        for b, stages in enumerate(chain.enabled.tolist()):
            for stage, columns in enumerate(((0,), (1,), (2, 3), (4,), (5,), (6,))):
                if not stages >> stage & 1:
                    assert not found[2][b, list(columns)].any()

    def test_nothing_given_means_all_stages_and_the_key_0(self) -> None:
        emulator = load("warp")
        chain = Chain("f32", (2, 1, 18, 20), ORDERS[0])
        chain.seed = torch.zeros_like(chain.seed)
        expected = chain.run(emulator)
        chain.enabled, chain.seed = chain.enabled[:0], chain.seed[:0]
        for a, b in zip(chain.run(emulator), expected, strict=True):
            assert torch.equal(a, b)

    def test_the_noise_of_a_sample_does_not_depend_on_its_batch(self) -> None:
        emulator = load("warp")
        chain = Chain("f32", (3, 2, 21, 35), (NOISE,))
        whole = chain.run(emulator)[0]
        alone = Chain("f32", (1, 2, 21, 35), (NOISE,))
        alone.images, alone.params, alone.seed, alone.grad = (
            x[2:] for x in (chain.images, chain.params, chain.seed, chain.grad)
        )
        assert torch.equal(alone.run(emulator)[0], whole[2:])


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("column", range(7))
    def test_a_parameter_makes_its_sample_nan_and_no_other(self, column: int, bad: float) -> None:
        emulator = load("warp")
        for shape in ((3, 1, 16, 20), (2, 1, 8, 8)):
            chain = Chain("f32", shape)
            good = chain.run(emulator)
            chain.params[1, column] = bad
            found = chain.run(emulator)
            stage = (BLUR, NOISE, CROP, CROP, HFLIP, VFLIP, ROTATE)[column]
            others = [b for b in range(shape[0]) if b != 1]
            same_bits([x[others] for x in found], [x[others] for x in good])
            assert bool(found[0][1].isnan().all() and found[1][1].isnan().all() and found[2][1].isnan().all())
            chain.enabled[1] = 63 & ~(1 << stage)  # then it is not looked at
            found = chain.run(emulator)
            chain.params[1, column] = 0.5
            same_bits(found, chain.run(emulator))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_pixel_stays_in_its_sample(self, bad: float) -> None:
        emulator = load("warp")
        chain = Chain("f32", (3, 2, 20, 66))
        good = chain.run(emulator)
        chain.images[1, 0, 3, 7] = chain.grad[1, 1, 5, 5] = bad
        found = chain.run(emulator)
        same_bits([x[[0, 2]] for x in found], [x[[0, 2]] for x in good])
        assert not bool(found[0][1].isfinite().all())


class TestAdjoint:
    @pytest.mark.parametrize("order", [(BLUR,), (CROP,), (HFLIP,), (VFLIP,), (ROTATE,), (ROTATE, BLUR, CROP)], ids=str)
    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_of_every_linear_stage(self, order: tuple[int, ...], padding: int) -> None:
        """<G, T X> = <T' G, X>, K13."""
        emulator = load("warp")
        for shape in ((2, 1, 24, 24), (1, 2, 45, 19), (1, 1, 7, 90)):
            chain = Chain("f64", shape, order, padding=padding)
            output, by_images, _ = chain.run(emulator)
            left, right = (chain.grad * output).sum(), (by_images * chain.images).sum()
            compare(left, right, 1e-14 * float((chain.grad * output).abs().sum()) * 10)


def test_every_kind_is_bound() -> None:
    emulator = load("warp")
    for kind in KINDS:
        for name in ("forward", "backward", "affine_forward", "affine_backward"):
            assert callable(getattr(emulator, f"{name}_{kind}"))
