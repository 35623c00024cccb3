# SPDX-License-Identifier: MIT
"""The CUDA kernels of affine warps, run on the CPU by the emulator and compared with the float64 reference and its autograd."""

from __future__ import annotations

import math

import pytest
import torch

from .emulator.build import SEEDS, load, missing_tools
from .warp_emulation import AffineCase, compare, same_bits

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

# images and size of the output: odd sides, a side of 1, oblong, larger and smaller than the images, volumes
CASES = [
    ((2, 2, 9, 12), (11, 7)),
    ((1, 3, 33, 31), (33, 31)),
    ((2, 1, 1, 129), (2, 129)),
    ((1, 1, 1, 1), (3, 5)),
    ((1, 1, 2, 33), (31, 1)),
    ((2, 2, 5, 6, 7), (6, 4, 9)),
    ((1, 1, 1, 9, 1), (3, 3, 3)),
    ((1, 2, 12, 9, 10), (12, 9, 10)),
]


class TestAffine:
    @pytest.mark.parametrize("padding", [0, 1, 2])
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("kind", ["f32", "f64"])
    def test_matches_the_reference(
        self, kind: str, case: tuple[tuple[int, ...], tuple[int, ...]], padding: int
    ) -> None:
        emulator = load("warp")
        for seed, scale in enumerate((1.0, 0.2, 3.0)):
            emulator.configure(seed=seed)
            affine = AffineCase(kind, *case, padding, scale=scale)
            affine.check(affine.run(emulator))

    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_singular_matrices(self, padding: int) -> None:
        """Every output reads one pixel, or one line of them: so many parts add up that a sum of floats would round each."""
        emulator = load("warp")
        for shape, size in (((3, 2, 9, 12), (40, 33)), ((2, 1, 4, 5, 6), (9, 8, 7))):
            affine = AffineCase("f32", shape, size, padding)
            affine.matrix[0, :, : len(size)] = 0
            affine.matrix[1, 1] = affine.matrix[1, 0]
            affine.check(affine.run(emulator))

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_half_precision_rounds_once(self, kind: str, padding: int) -> None:
        emulator = load("warp")
        for case in CASES[:2] + CASES[5:6]:
            affine = AffineCase(kind, *case, padding)
            affine.check(affine.run(emulator))

    @pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
    def test_all_seeds_agree_to_the_bit(self, case: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        emulator = load("warp")
        for padding in (0, 2):
            affine, results = AffineCase("f32", *case, padding, scale=0.5), []
            for seed in SEEDS:
                emulator.configure(seed=seed)
                results.append(affine.run(emulator))
            for other in results[1:]:
                same_bits(other, results[0])

    def test_one_gradient_alone(self) -> None:
        emulator = load("warp")
        affine = AffineCase("f32", (2, 2, 20, 24), (21, 18), 2)
        both = affine.run(emulator)
        same_bits(affine.run(emulator, matrix=False)[1:2], both[1:2])
        same_bits(affine.run(emulator, images=False)[2:], both[2:])

    def test_the_identity_is_exact(self) -> None:
        emulator = load("warp")
        for shape in ((2, 2, 20, 33), (1, 1, 4, 5, 6)):
            affine = AffineCase("f32", shape, shape[2:])
            affine.matrix[:] = torch.eye(len(shape) - 2, len(shape) - 1)
            output, by_images, _ = affine.run(emulator)
            assert torch.equal(output, affine.images) and torch.equal(by_images, affine.grad)

    @pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 1e38, 0.0])
    def test_gradients_of_any_magnitude(self, magnitude: float) -> None:
        """Fixed-point numbers follow the largest gradient of the sample; that of another sample does not matter."""
        emulator = load("warp")
        affine = AffineCase("f32", (2, 1, 12, 12), (12, 12))
        plain = affine.run(emulator)[1]
        affine.grad[1] *= magnitude
        by_images = affine.run(emulator)[1]
        assert torch.equal(by_images[0], plain[0])
        expected = affine.expected()[1]
        compare(by_images[1], expected[1], 1e-4 * float(affine.grad[1].abs().max()))

    @pytest.mark.parametrize("padding", [0, 1, 2])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_matrix_that_is_not_finite_spoils_its_sample_and_no_other(self, bad: float, padding: int) -> None:
        emulator = load("warp")
        for shape, size in (((3, 2, 9, 12), (11, 7)), ((3, 1, 3, 4, 5), (4, 4, 4))):
            affine = AffineCase("f32", shape, size, padding)
            good = affine.run(emulator)
            for entry in ((0, 0), (1, len(size))):
                affine = AffineCase("f32", shape, size, padding)
                affine.matrix[1, entry[0], entry[1]] = bad
                found = affine.run(emulator)
                same_bits([x[[0, 2]] for x in found], [x[[0, 2]] for x in good])
                assert all(bool(x[1].isnan().all()) for x in found)

    @pytest.mark.parametrize("padding", [0, 1, 2])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_stays_in_its_sample(self, bad: float, padding: int) -> None:
        emulator = load("warp")
        affine = AffineCase("f32", (3, 1, 9, 12), (11, 7), padding)
        good = affine.run(emulator)
        affine.grad[1, 0, 4, 4] = bad
        found = affine.run(emulator)
        same_bits([x[[0, 2]] for x in found], [x[[0, 2]] for x in good])
        assert bool(found[1][1].isnan().all())

    @pytest.mark.parametrize("padding", [0, 1, 2])
    @pytest.mark.parametrize("huge", [1e9, 1e18, 3e38])
    def test_huge_matrices_read_nothing_beyond(self, huge: float, padding: int) -> None:
        emulator = load("warp")
        for shape, size in (((2, 1, 9, 12), (11, 7)), ((2, 1, 3, 4, 5), (4, 4, 4))):
            affine = AffineCase("f32", shape, size, padding)
            affine.matrix.mul_(huge).clamp_(-3e38, 3e38)
            affine.run(emulator)
            affine.matrix[:, :, : len(size)] = 0
            output = affine.run(emulator)[0]
            assert bool(output.isfinite().all() and (output >= 0).all() and (output <= affine.images.max()).all())

    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_the_adjoint(self, padding: int) -> None:
        """<G, T X> = <T' G, X>, K13."""
        emulator = load("warp")
        for case in CASES:
            affine = AffineCase("f64", *case, padding)
            output, by_images, _ = affine.run(emulator)
            products = affine.grad * output
            compare((by_images * affine.images).sum(), products.sum(), 1e-13 * float(products.abs().sum() + 1))
