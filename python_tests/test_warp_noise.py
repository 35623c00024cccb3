# SPDX-License-Identifier: MIT
"""Random numbers of the op `warp`: Philox against published vectors, the normal distribution, what a number depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from protokernels import backend, gaussian_noise, transform
from protokernels.reference import warp_noise as reference
from python_tests import warp_oracle as oracle
from python_tests.places import PLACES, Place
from python_tests.warp_oracle import check, draw, noise_rounding

# Random123 1.14, tests/kat_vectors: philox4x32 with 10 rounds; counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 2**32, -(2**63), 2**63 - 1, 0x299F31D0A4093822]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with request.param.selected() as selected:
        yield selected


def keys(place: Place, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=place.device)


class TestValue:
    @pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
    def test_philox_gives_the_published_words(
        self, counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
    ) -> None:
        assert tuple(oracle.philox(counter, key)) == words
        tensors = [torch.tensor([value]) for value in (*counter, *key)]
        drawn = reference.philox((tensors[0], tensors[1], tensors[2], tensors[3]), (tensors[4], tensors[5]))
        assert tuple(int(word) for word in drawn) == words

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(7, 1, 1, 1), (7, 1, 1, 3), (7, 2, 5, 7), (7, 1, 33, 31)])
    def test_numbers_are_those_of_the_keys(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Every length modulo 4, both halves of the key, negative keys."""
        noise = gaussian_noise(torch.zeros(shape, dtype=dtype, device=place.device), 1.0, seed=keys(place, *SEEDS))
        for b, seed in enumerate(SEEDS):
            numbers, lengths = oracle.normal(seed, noise[b].numel())
            check(noise[b].flatten(), numbers, noise_rounding(lengths, dtype))

    def test_the_distribution_is_the_standard_normal_one(self, place: Place) -> None:
        """Moments, correlations and the tails of 2^21 numbers, each within 5 standard errors of what is drawn."""
        seed = keys(place, *range(8))
        x = gaussian_noise(torch.zeros(8, 1, 512, 512, device=place.device), 1.0, seed=seed).cpu().double().numpy()
        flat, N = x.reshape(8, -1), x.size
        assert abs(flat.mean()) < 5 / math.sqrt(N)
        assert abs(flat.var() - 1) < 5 * math.sqrt(2 / N)
        assert abs((flat**3).mean()) < 5 * math.sqrt(15 / N)
        assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / N)
        for lag in (1, 2, 3, 4, 512):
            assert abs((flat[:, lag:] * flat[:, :-lag]).mean()) < 5 / math.sqrt(N)
        assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 5 / math.sqrt(N / 8)
        for limit in (0.5, 1.0, 2.0, 3.0, 4.0):
            share = math.erfc(limit / math.sqrt(2))
            assert abs((np.abs(flat) > limit).mean() - share) < 5 * math.sqrt(share / N)

    def test_far_numbers_exist(self, place: Place) -> None:
        """The largest number is sqrt(-2 ln 2^-33) = 6.76, not the 5.6 that a 24-bit uniform number would allow."""
        x = gaussian_noise(torch.zeros(16, 1, 1024, 1024, device=place.device), 1.0, seed=keys(place, *range(16)))
        assert x.isfinite().all() and 5.0 < x.abs().max() < 6.77

    def test_the_standard_deviation_is_that_of_the_sample(self, place: Place) -> None:
        images = torch.full((3, 1, 64, 64), 5.0, device=place.device)
        std = torch.tensor([0.0, 0.1, 2.0], device=place.device)
        noisy = gaussian_noise(images, std, seed=keys(place, 4, 4, 4))
        assert torch.equal(noisy[0], images[0])
        difference = (noisy - images).cpu().double()
        torch.testing.assert_close(difference[2], 20 * difference[1], rtol=1e-4, atol=2e-5)


class TestContract:
    def test_a_number_depends_on_its_key_and_place_alone(self, place: Place) -> None:
        zeros = torch.zeros(5, 2, 9, 7, device=place.device)
        seed = keys(place, 3, 1, 4, 1, 5)
        noise = gaussian_noise(zeros, 1.0, seed=seed)
        assert torch.equal(noise[1], noise[3]) and not torch.equal(noise[0], noise[1])
        for b in range(5):
            assert torch.equal(gaussian_noise(zeros[:1], 1.0, seed=seed[b : b + 1])[0], noise[b])
        other = gaussian_noise(torch.zeros(5, 1, 18, 7, device=place.device), 1.0, seed=seed)
        assert torch.equal(other.flatten(1), noise.flatten(1))
        wider = gaussian_noise(torch.zeros(5, 2, 9, 8, device=place.device), 1.0, seed=seed)
        assert torch.equal(wider.flatten(1)[:, :126], noise.flatten(1))

    def test_seeds_come_from_the_generator(self, place: Place) -> None:
        images, params, _ = (t.to(place.device) for t in draw((3, 1, 8, 8), seed=1))
        first = transform(images, params, generator=place.seeded(7))
        generator = place.seeded(7)
        assert torch.equal(transform(images, params, generator=generator), first)
        assert not torch.equal(transform(images, params, generator=generator), first)
        torch.manual_seed(8)
        from_default = transform(images, params)
        torch.manual_seed(8)
        assert torch.equal(transform(images, params), from_default)

    def test_what_needs_no_noise_draws_none(self, place: Place) -> None:
        images, params, _ = (t.to(place.device) for t in draw((3, 1, 8, 8), seed=2))
        generator = place.seeded(9)
        before = generator.get_state()
        transform(images, params, order=["blur", "rotate"], generator=generator)
        transform(images, params, enabled=["hflip"], generator=generator)
        assert torch.equal(generator.get_state(), before)
        transform(images, params, generator=generator)
        assert not torch.equal(generator.get_state(), before)

    def test_backward_meets_the_same_numbers(self, place: Place) -> None:
        """d/dstd of the sum is the sum of the noise that forward has added."""
        images = torch.zeros(2, 1, 16, 16, device=place.device, dtype=torch.float64)
        std = torch.ones(2, device=place.device, dtype=torch.float64, requires_grad=True)
        noisy = gaussian_noise(images, std, generator=place.seeded(10))
        noisy.sum().backward()
        assert std.grad is not None
        torch.testing.assert_close(std.grad, noisy.detach().flatten(1).sum(1), rtol=1e-12, atol=1e-12)


class TestDeterminism:
    def test_backends_agree(self, place: Place) -> None:
        images, params, seed = draw((3, 2, 19, 8), seed=3, dtype=torch.float64)
        here = transform(images.to(place.device), params.to(place.device), seed=seed.to(place.device))
        with backend.use("reference"):
            there = transform(images, params, seed=seed)
        torch.testing.assert_close(here.cpu(), there, rtol=0, atol=1e-13)
