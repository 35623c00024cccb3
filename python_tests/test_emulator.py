# SPDX-License-Identifier: MIT
"""The CUDA emulator itself: what CUDA promises, on small right kernels.

`test_emulator_mistakes.py` is the other half: small broken kernels that must be caught.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from python_tests.emulator import SEEDS, load, missing_tools, operations, poisoned

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


@pytest.fixture(params=["watched", "plain"])
def emulator(request: pytest.FixtureRequest) -> Any:
    module = load("selftest", request.param)
    module.configure()
    return module


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_an_output_of_any_shape_is_poisoned(shape: tuple[int, ...]) -> None:
    assert np.isnan(poisoned(shape)).all() and (poisoned(shape, np.int64) == -1).all()
    assert poisoned(shape).shape == shape


class TestLaunch:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_every_thread_of_a_grid_knows_its_place(self, emulator: Any, seed: int) -> None:
        grid, block = (3, 2, 4), (5, 3, 2)
        out = poisoned((4, 2, 3, 2, 3, 5), np.int32)
        emulator.configure(seed=seed)
        emulator.places(out, grid, block)
        block_z, block_y, block_x, z, y, x = np.indices(out.shape)
        np.testing.assert_array_equal(out, ((block_x * 10 + block_y) * 10 + block_z) * 1000 + (x * 10 + y) * 10 + z)

    def test_sixteen_thousand_threads_take_less_than_a_second(
        self, emulator: Any, generator: np.random.Generator
    ) -> None:
        values = generator.random(16 * 1024, dtype=np.float32)
        out = poisoned(values.shape)
        start = time.process_time()  # the processor's, so that other work beside the tests does not count
        emulator.workload(values, out, 16, 1024, 4)
        assert time.process_time() - start < 1.0
        expected = values.reshape(16, 1024).astype(np.float64)
        for _ in range(4):
            expected += expected.reshape(16, 32, 32).mean(axis=2, keepdims=True).repeat(32, axis=2).reshape(16, 1024)
            expected = 0.5 * np.roll(expected, -37, axis=1)
        np.testing.assert_allclose(out.reshape(16, 1024), expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("grid", "block", "message"),
        [
            ((1, 1), (1025, 1), r"\(1025, 1, 1\) threads; expected 1 to 1024"),
            ((1, 1), (512, 3), r"\(512, 1, 3\) threads"),
            ((1, 1), (1, 65), "at most 64 along z"),
            ((1, 1), (0, 1), r"\(0, 1, 1\) threads"),
            ((0, 1), (32, 1), r"a grid of \(0, 1, 1\) blocks"),
            ((1, 65536), (32, 1), "65535 along y and z"),
        ],
    )
    def test_impossible_shapes_are_refused(
        self, emulator: Any, grid: tuple[int, int], block: tuple[int, int], message: str
    ) -> None:
        with pytest.raises(emulator.EmulatorError, match=message):
            emulator.probe(poisoned(1, np.int32), grid, block, 0)

    @pytest.mark.parametrize(
        ("architecture", "kilobytes"), [("sm_80", 163), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227)]
    )
    def test_shared_memory_ends_where_the_architecture_says(
        self, emulator: Any, architecture: str, kilobytes: int
    ) -> None:
        out = poisoned(1, np.int32)
        emulator.configure(architecture=architecture)
        emulator.probe(out, (1, 1), (64, 1), (kilobytes - 8) * 1024)
        assert out[0] == 3
        with pytest.raises(
            emulator.EmulatorError, match=f"8192 static.*{architecture} has {kilobytes * 1024} per block"
        ):
            emulator.probe(out, (1, 1), (64, 1), (kilobytes - 8) * 1024 + 4)
        with pytest.raises(
            emulator.EmulatorError, match=f"dynamic shared memory; {architecture} has {kilobytes * 1024}"
        ):
            emulator.probe(out, (1, 1), (64, 1), kilobytes * 1024 + 4)

    def test_unknown_architecture_is_refused(self, emulator: Any) -> None:
        with pytest.raises(ValueError, match="one of sm_80, sm_89, sm_90, sm_100; got sm_12"):
            emulator.configure(architecture="sm_12")


class TestSharedMemory:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (5, 40)])
    def test_static_tile_and_constant_table(self, emulator: Any, shape: tuple[int, int], seed: int) -> None:
        source = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
        scale = [1.0, 2.0, -1.0, 0.5]
        out = poisoned(shape[::-1])
        emulator.configure(seed=seed)
        emulator.transpose(source, out, scale)
        np.testing.assert_array_equal(out, source.T * np.resize(np.array(scale, np.float32), shape[1])[:, None])

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("threads", [1, 2, 64, 1024])
    def test_dynamic_scratch(self, emulator: Any, threads: int, seed: int) -> None:
        source = np.arange(3 * threads, dtype=np.float32).reshape(3, threads)
        out = poisoned(3)
        emulator.configure(seed=seed)
        emulator.block_sums(source, out, 3, threads)
        np.testing.assert_array_equal(out, source.sum(axis=1))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_neighbouring_halves_of_a_word_are_no_race(self, emulator: Any, seed: int) -> None:
        source = np.arange(96, dtype=np.float32)
        out = poisoned(96)
        emulator.configure(seed=seed)
        emulator.half_rotate(source, out)
        np.testing.assert_array_equal(out, np.roll(source, -1))


class TestBarriers:
    @pytest.mark.parametrize("threads", [1, 31, 32, 100, 1024])
    @pytest.mark.parametrize("ones", ["none", "one", "all"])
    def test_block_votes(self, emulator: Any, threads: int, ones: str) -> None:
        source = np.full(threads, int(ones == "all"), dtype=np.int32)
        if ones == "one":
            source[threads // 2] = 5
        out = poisoned((3, threads), np.int32)
        emulator.configure(seed=2)
        emulator.block_votes(source, out)
        assert (out[0] == np.count_nonzero(source)).all()
        assert ((out[1] != 0) == source.any()).all()
        assert ((out[2] != 0) == source.all()).all()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_last_block_may_read_what_the_others_fenced(self, emulator: Any, seed: int) -> None:
        source = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)
        out, counter = poisoned(1), np.zeros(1, dtype=np.uint32)
        emulator.configure(seed=seed)
        for _ in range(2):  # the kernel leaves its counter ready for the next launch
            emulator.last_block_sum(source, poisoned(5), counter, out)
            assert out[0] == source.sum()
            assert counter[0] == 0

    @pytest.mark.parametrize("seed", SEEDS)
    def test_warp_barrier_orders_its_lanes(self, emulator: Any, seed: int) -> None:
        source = np.arange(96, dtype=np.float32)
        out = poisoned(96)
        emulator.configure(seed=seed)
        emulator.warp_exchange(source, out)
        lane = np.arange(96)
        np.testing.assert_array_equal(out, source[lane ^ 1] + (lane % 32 >= 16))


def _shuffle_source(kind: int, lane: int, argument: int, width: int) -> int:
    """The lane that CUDA's shuffle reads from, after the pseudo-code of `shfl.sync` in the PTX manual."""
    segment_mask = (~(width - 1)) & 0x1F
    last = (lane & segment_mask) | (0x1F & ~segment_mask)
    first = lane & segment_mask
    if kind == 0:
        return first | (argument & ~segment_mask & 0x1F)
    if kind == 1:
        source = lane - argument
        return source if source >= first else lane
    source = lane + argument if kind == 2 else lane ^ argument
    return source if source <= last else lane


class TestWarp:
    @pytest.mark.parametrize("seed", [0, 3])
    @pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
    @pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
    def test_shuffles(
        self, emulator: Any, argument: int, width: int, seed: int, generator: np.random.Generator
    ) -> None:
        doubles = generator.standard_normal(32)
        integers = generator.integers(-(2**31), 2**31, 32, dtype=np.int32)
        out, out_integers = poisoned((4, 32), np.float64), poisoned((4, 32), np.int32)
        emulator.configure(seed=seed)
        emulator.shuffles(doubles, out, integers, out_integers, argument, width)
        source = np.array([[_shuffle_source(kind, lane, argument, width) for lane in range(32)] for kind in range(4)])
        np.testing.assert_array_equal(out, doubles[source])
        np.testing.assert_array_equal(out_integers, integers[source])

    def test_shuffle_width_must_be_a_power_of_two(self, emulator: Any) -> None:
        with pytest.raises(emulator.EmulatorError, match="width must be a power of two up to 32; got 12"):
            emulator.shuffles(
                np.zeros(32), poisoned(128, np.float64), np.zeros(32, np.int32), poisoned(128, np.int32), 1, 12
            )

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x55555555, 0x00000010])
    def test_votes_matches_and_reductions(
        self, emulator: Any, mask: int, seed: int, generator: np.random.Generator
    ) -> None:
        values = generator.integers(-4, 5, 32).astype(np.int32)
        out = poisoned((10, 32), np.uint32)
        emulator.configure(seed=seed)
        emulator.votes(values, out, mask)
        inside = np.array([(mask >> lane) & 1 == 1 for lane in range(32)])
        chosen, bits = values[inside], values.view(np.uint32)[inside]
        powers = np.uint32(1) << np.arange(32, dtype=np.uint32)
        matches = [int(powers[inside & (values == value)].sum()) for value in chosen]
        assert (out[:, ~inside] == 0xFFFFFFFF).all()
        result = out[:, inside]
        assert (result[0] == powers[inside & (values > 0)].sum()).all()
        assert (result[1] == (chosen > 0).any()).all()
        assert (result[2] == (chosen > 0).all()).all()
        np.testing.assert_array_equal(result[3], matches)
        assert (result[4].view(np.int32) == chosen.sum()).all()
        assert (result[5].view(np.int32) == chosen.min()).all()
        assert (result[6].view(np.int32) == chosen.max()).all()
        assert (result[7] == np.bitwise_and.reduce(bits)).all()
        assert (result[8] == np.bitwise_or.reduce(bits)).all()
        assert (result[9] == np.bitwise_xor.reduce(bits)).all()


class TestAtomics:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_every_atomic_counts_every_thread(self, emulator: Any, seed: int, generator: np.random.Generator) -> None:
        values = generator.integers(0, 1000, 301, dtype=np.int32)
        counts, extremes = np.zeros(7, np.int32), np.array([2**31 - 1, -1], np.int32)
        single, double, swapped = np.zeros(1, np.float32), np.zeros(1, np.float64), np.zeros(1, np.uint32)
        tickets = poisoned(302, np.uint32)
        tickets[0] = 0
        emulator.configure(seed=seed)
        emulator.atomics(values, counts, single, double, extremes, swapped, tickets)
        np.testing.assert_array_equal(counts, np.bincount(values % 7, minlength=7))
        np.testing.assert_array_equal(extremes, [values.min(), values.max()])
        assert single[0] == double[0] == swapped[0] == values.sum()
        np.testing.assert_array_equal(np.sort(tickets[1:]), np.arange(301))

    def test_the_seed_draws_the_order(self, emulator: Any) -> None:
        values = np.arange(301, dtype=np.int32)

        def order(seed: int) -> tuple[int, ...]:
            tickets = np.zeros(302, np.uint32)
            emulator.configure(seed=seed)
            zeros = [np.zeros(1, kind) for kind in (np.float32, np.float64, np.uint32)]
            emulator.atomics(values, np.zeros(7, np.int32), *zeros[:2], np.zeros(2, np.int32), zeros[2], tickets)
            return tuple(tickets[1:])

        assert order(0) == tuple(range(301))
        assert order(3) == order(3)
        assert len({order(seed) for seed in SEEDS}) == len(SEEDS)


class TestAsynchronousCopies:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("width", [1, 2, 4])
    @pytest.mark.parametrize("shape", [(1, 4), (2, 64), (7, 100)])
    def test_three_stage_pipeline(self, emulator: Any, shape: tuple[int, int], width: int, seed: int) -> None:
        source = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
        out = poisoned(shape[1])
        emulator.configure(seed=seed)
        emulator.pipeline(source, out, width)
        np.testing.assert_array_equal(out, source.sum(axis=0))


def _round_tf32(values: np.ndarray) -> np.ndarray:
    """Rounds normal numbers to 11 significant bits, ties away from zero."""
    fraction, exponent = np.frexp(values.astype(np.float64))
    rounded = np.sign(fraction) * np.floor(np.abs(fraction) * 2048 + 0.5)
    return np.asarray(np.ldexp(rounded, exponent - 11), np.float32)


def _round_bf16(values: np.ndarray) -> np.ndarray:
    return np.asarray(torch.from_numpy(values).to(torch.bfloat16).to(torch.float32))


def _round_f16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


KINDS = {"tf32": (0, _round_tf32), "bf16": (1, _round_bf16), "f16": (2, _round_f16)}


class TestTensorCores:
    @pytest.mark.parametrize("kind", KINDS)
    def test_fragment_layout(self, emulator: Any, kind: str, generator: np.random.Generator) -> None:
        a = generator.integers(-9, 10, (16, 32)).astype(np.float32)
        b = generator.integers(-9, 10, (32, 8)).astype(np.float32)
        out = poisoned((16, 8))
        emulator.configure(seed=1)
        emulator.mma(a, b, out, KINDS[kind][0])
        np.testing.assert_array_equal(out, a @ b)

    @pytest.mark.parametrize("kind", KINDS)
    def test_inputs_are_rounded(self, emulator: Any, kind: str, generator: np.random.Generator) -> None:
        a = generator.standard_normal((16, 16)).astype(np.float32)
        b = generator.standard_normal((16, 8)).astype(np.float32)
        out = poisoned((16, 8))
        emulator.mma(a, b, out, KINDS[kind][0])
        rounded = KINDS[kind][1]
        expected = rounded(a).astype(np.float64) @ rounded(b).astype(np.float64)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert np.abs(out - a.astype(np.float64) @ b).max() > 1e-4


class TestRounding:
    def test_tf32_bf16_and_half(self, emulator: Any, generator: np.random.Generator) -> None:
        scales = np.exp2(generator.integers(-30, 20, 4000)).astype(np.float32)
        one = 2.0**-11  # half a unit in the last place of tf32 at 1
        ties = [1 + one, 1 + 3 * one, 1 + 8 * one, 1 + 24 * one, 2.0**-25, 3 * 2.0**-25, -1 - one]
        edges = [0.0, -0.0, 65504, 65519.99, 65520, 65536, 2.0**-14, 2.0**-24, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
        random = generator.standard_normal(4000).astype(np.float32) * scales
        values = np.concatenate([random, np.array(ties + edges, np.float32)])
        size = len(values)
        tf32, bf16, half = poisoned(size, np.uint32), poisoned(size, np.uint16), poisoned(size, np.float16)
        back = poisoned((2, size))
        emulator.rounding(values, tf32, bf16, half, back)
        with np.errstate(over="ignore"):
            expected_half = values.astype(np.float16)
        np.testing.assert_array_equal(half, expected_half)
        np.testing.assert_array_equal(back[1], expected_half.astype(np.float32))
        np.testing.assert_array_equal(back[0], _round_bf16(values))
        np.testing.assert_array_equal(
            bf16[:-1], torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()[:-1]
        )
        finite = np.isfinite(values) & (np.abs(values) < 3e38)
        np.testing.assert_array_equal(tf32.view(np.float32)[finite], _round_tf32(values[finite]))
        np.testing.assert_array_equal(tf32.view(np.float32)[-3:], values[-3:])


class TestPowers:
    def test_fast_powers_flush_what_is_denormal(self, emulator: Any) -> None:
        x = np.array(
            [0, -0.0, 1, -3.5, 20.25, 2.0**-130, -125.5, -126, -126.5, -149, -200, 200, -np.inf, np.inf, np.nan]
        )
        out = poisoned(x.size)
        emulator.powers(x.astype(np.float32), out)
        with np.errstate(over="ignore"):
            expected = np.where(x < -126, 0, np.exp2(x)).astype(np.float32)
        np.testing.assert_allclose(out, expected, rtol=2.0**-22)


class TestBuffers:
    def test_vector_loads_need_an_aligned_start(self, emulator: Any) -> None:
        source, out = np.arange(64, dtype=np.float32), poisoned(64)
        for offset in (0, 4):
            emulator.configure(element_offset=offset)
            emulator.vector_copy(source, out)
            np.testing.assert_array_equal(out, source)
        emulator.configure(element_offset=1)
        with pytest.raises(emulator.EmulatorError, match="misaligned load of 16 bytes"):
            emulator.vector_copy(source, out)

    @pytest.mark.parametrize(
        "wrong", [np.zeros(64), np.zeros(128, np.float32)[::2], [0.0] * 64], ids=["float64", "strided", "list"]
    )
    def test_wrong_arrays_are_refused(self, emulator: Any, wrong: Any) -> None:
        with pytest.raises(TypeError, match="in must be a C-contiguous NumPy array of float32; got"):
            emulator.vector_copy(wrong, poisoned(64))

    def test_results_need_a_writable_array(self, emulator: Any) -> None:
        frozen = poisoned(64)
        frozen.flags.writeable = False
        with pytest.raises(TypeError, match="out must be a C-contiguous, writable NumPy array"):
            emulator.vector_copy(np.zeros(64, np.float32), frozen)


def test_the_selftest_is_listed() -> None:
    assert "selftest" in operations()
