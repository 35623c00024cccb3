# SPDX-License-Identifier: MIT
"""The CUDA emulator's detectors: every small broken kernel must be caught, at the line that is wrong.

The kernels are in `csrc/emulator/selftest/broken_kernels.cu`; each wrong line carries a comment "mistake: ...".
"""

from __future__ import annotations

import re
import subprocess
import time
from functools import cache
from typing import Any

import numpy as np
import pytest

from python_tests.emulator import SEEDS, Variant, load, missing_tools, poisoned, run_under_address_sanitizer
from python_tests.emulator.build import COMMON_FLAGS, COMPILER, ROOT

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

THREADS = 128
SOURCE = ROOT / "csrc/emulator/selftest/broken_kernels.cu"


@cache
def wrong_lines(name: str) -> list[str]:
    """Returns "broken_kernels.cu:<line>" for the lines marked in the branch of the mistake `name`."""
    found: list[str] = []
    branch = None
    for number, line in enumerate(SOURCE.read_text().splitlines(), start=1):
        match = re.search(r"mistake == Mistake::(\w+)", line)
        branch = match.group(1) if match else branch
        if branch == name and "// mistake:" in line:
            found.append(f"broken_kernels.cu:{number}")
    assert found, name
    return found


def run(variant: Variant, name: str, seed: int, **configuration: float) -> np.ndarray:
    emulator: Any = load("selftest", variant)
    emulator.configure(seed=seed, **configuration)
    out = poisoned(THREADS)
    emulator.broken(name, np.arange(1, THREADS + 1, dtype=np.float32), out)
    return out


def report(variant: Variant, name: str, seed: int, **configuration: float) -> str:
    emulator: Any = load("selftest", variant)
    with pytest.raises(emulator.EmulatorError) as caught:
        run(variant, name, seed, **configuration)
    text = str(caught.value)
    assert "broken_kernel<mistake>" in text
    assert f"seed {seed}" in text
    return text


class TestWatch:
    """Caught by the record of accesses, with the line."""

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing_barrier", r"shared 'values' \+ \d+ bytes"),
            ("read_before_write", r"shared 'values' \+ 252 bytes is read at .* before anything was written there"),
            (
                "global_out_of_bounds",
                r"out of bounds: read of 4 bytes at 0 bytes past the end of buffer 'in' \(512 bytes\)",
            ),
            ("global_write_out_of_bounds", r"out of bounds: write of 4 bytes at 0 bytes past the end of buffer 'out'"),
            ("shared_out_of_bounds", r"out of bounds: write of 4 bytes at 0 bytes past the end of shared 'values'"),
            (
                "copy_not_waited",
                r"is read at .* while an asynchronous copy to it, started by thread .*, has not been waited for",
            ),
            ("copy_without_barrier", r"shared 'values' \+ \d+ bytes"),
            ("write_after_read", r"race on shared 'values'.*nothing orders the two"),
            ("write_write", r"race on shared 'values' .*written at .*, written by thread"),
            ("missing_warp_barrier", r"race on shared 'values' .*read at .*, written by thread"),
            ("misaligned_vector", r"misaligned load of 16 bytes at buffer 'in' \+ \d+ bytes"),
            (
                "misaligned_copy",
                r"misaligned asynchronous copy of 16 bytes from buffer 'in' \+ 4 bytes to shared 'values'",
            ),
            ("unordered_blocks", r"race on buffer 'out' .*by a thread of another block"),
            ("unpublished_block", r"race on buffer 'out' .*by a thread of another block"),
            ("modified_input", r"write to the read-only buffer 'in'"),
        ],
    )
    def test_mistake_is_named_with_its_line(self, name: str, message: str, seed: int) -> None:
        text = report("watched", name, seed)
        assert re.search(message, text), text
        assert any(line in text for line in wrong_lines(name)), text

    def test_both_sides_of_a_race_are_named(self) -> None:
        texts = [report("watched", "write_after_read", seed) for seed in SEEDS]
        assert all(len(set(re.findall(r"broken_kernels\.cu:\d+", text))) == 2 for text in texts)


@pytest.mark.parametrize("variant", ["plain", "watched"])
@pytest.mark.parametrize("seed", SEEDS)
class TestDeadlocks:
    """Caught by the scheduler, in every variant."""

    def test_barriers_in_two_branches(self, variant: Variant, seed: int) -> None:
        text = report(variant, "divergent_barrier", seed)
        first, second = wrong_lines("divergent_barrier")
        assert re.search(rf"32 threads wait in __syncthreads at \S*{first} \(first: thread \(0, 0, 0\)\)", text)
        assert re.search(rf"32 threads wait in __syncthreads at \S*{second} \(first: thread \(32, 0, 0\)\)", text)

    def test_threads_that_returned(self, variant: Variant, seed: int) -> None:
        text = report(variant, "return_before_barrier", seed)
        assert "32 threads returned without reaching a barrier (first: thread (32, 0, 0))" in text
        assert re.search(r"32 threads wait in __syncthreads at \S*broken_kernels.cu:\d+", text)

    def test_shuffle_that_half_of_the_warp_takes(self, variant: Variant, seed: int) -> None:
        text = report(variant, "divergent_shuffle", seed)
        (line,) = wrong_lines("divergent_shuffle")
        assert re.search(rf"wait in __shfl_xor_sync at \S*{line} with mask 0xffffffff", text)
        assert "wait in __syncthreads" in text

    def test_mask_without_the_caller(self, variant: Variant, seed: int) -> None:
        text = report(variant, "foreign_mask", seed)
        assert "mask 0x0000ffff does not name the calling lane" in text
        assert wrong_lines("foreign_mask")[0] in text

    def test_trap(self, variant: Variant, seed: int) -> None:
        assert "thread (5, 0, 0): __trap" in report(variant, "trap", seed)

    def test_the_next_launch_is_healthy(self, variant: Variant, seed: int) -> None:
        report(variant, "divergent_shuffle", seed)
        emulator: Any = load("selftest", variant)
        source, out = np.arange(96, dtype=np.float32), poisoned(96)
        emulator.half_rotate(source, out)
        np.testing.assert_array_equal(out, np.roll(source, -1))


class TestWatchdog:
    """A kernel that never ends is stopped and named, in both variants; a slow one is not."""

    @pytest.mark.parametrize("variant", ["plain", "watched"])
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        "name", ["spin_on_memory", "spin_on_an_atomic", "grid_barrier", "endless_loop", "endless_barriers"]
    )
    def test_endless_kernel_is_named_with_its_line(self, variant: Variant, name: str, seed: int) -> None:
        text = report(variant, name, seed, block_seconds=0.1)
        (line,) = wrong_lines(name)
        assert re.search(
            rf"thread \(\d+, 0, 0\): does not end: the block has computed for 0.1 s .* at \S*{line}\.", text
        )
        assert "blocks run one after another" in text

    @pytest.mark.parametrize("variant", ["plain", "watched"])
    def test_the_other_threads_are_named_with_their_lines(self, variant: Variant) -> None:
        text = report(variant, "grid_barrier", 0, block_seconds=0.1)
        assert "63 threads have passed no barrier and are free to run (first: thread (1, 0, 0))" in text
        text = report(variant, "spin_on_memory", 0, block_seconds=0.1)
        assert re.search(r"40 threads returned, last seen in __syncthreads at \S*broken_kernels.cu:\d+", text)
        assert re.search(r"23 threads are free to run on after __syncthreads at \S*broken_kernels.cu:\d+", text)

    def test_many_blocks_may_take_longer_than_one(self) -> None:
        emulator: Any = load("selftest", "watched")
        emulator.configure(block_seconds=0.3)
        source, out = np.ones(64 * 256, np.float32), poisoned(64 * 256)
        start = time.process_time()
        emulator.workload(source, out, 64, 256, 200)
        assert time.process_time() - start > 0.3
        emulator.configure()

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
    def test_limit_that_is_no_time(self, seconds: float) -> None:
        emulator: Any = load("selftest")
        with pytest.raises(ValueError, match=r"configure: block_seconds must be positive; got "):
            emulator.configure(block_seconds=seconds)

    def test_the_next_launch_is_healthy(self) -> None:
        report("watched", "grid_barrier", 3, block_seconds=0.1)
        emulator: Any = load("selftest", "watched")
        emulator.configure()
        source, out = np.arange(96, dtype=np.float32), poisoned(96)
        emulator.half_rotate(source, out)
        np.testing.assert_array_equal(out, np.roll(source, -1))


class TestResults:
    """Visible in the results alone: over several seeds, or as poison."""

    @pytest.mark.parametrize(
        "name", ["missing_barrier", "write_after_read", "write_write", "unordered_blocks", "copy_without_barrier"]
    )
    def test_results_differ_over_seeds(self, name: str) -> None:
        results = {run("plain", name, seed).tobytes() for seed in SEEDS}
        assert len(results) > 1

    @pytest.mark.parametrize(("name", "poisoned_results"), [("read_before_write", 2), ("copy_not_waited", THREADS)])
    def test_unwritten_shared_memory_is_nan(self, name: str, poisoned_results: int) -> None:
        for seed in SEEDS:
            assert np.isnan(run("plain", name, seed)).sum() == poisoned_results

    @pytest.mark.parametrize("variant", ["plain", "watched"])
    def test_unwritten_output_is_nan(self, variant: Variant) -> None:
        for seed in SEEDS:
            out = run(variant, "unwritten_output", seed)
            assert np.isnan(out[-1])
            assert not np.isnan(out[:-1]).any()


class TestAddressSanitizer:
    """Caught by the compiler's sanitizers in a process of its own."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("global_out_of_bounds", "heap-buffer-overflow"),
            ("global_write_out_of_bounds", "heap-buffer-overflow"),
            ("shared_out_of_bounds", "use-after-poison"),
            ("misaligned_cast", "load of misaligned address|misaligned address .* for type"),
        ],
    )
    def test_bad_address_stops_the_process(self, name: str, message: str) -> None:
        code = f"emulator.broken({name!r}, np.ones({THREADS}, np.float32), poisoned({THREADS}))\nprint('survived')"
        process = run_under_address_sanitizer("selftest", code)
        assert process.returncode != 0
        assert "survived" not in process.stdout
        assert re.search(message, process.stderr), process.stderr[:2000]
        assert wrong_lines(name)[0] in process.stderr, process.stderr[:2000]

    def test_right_kernels_pass(self) -> None:
        code = """
source = np.arange(96, dtype=np.float32)
for seed in range(3):
    emulator.configure(seed=seed, element_offset=seed)
    out = poisoned(96)
    emulator.half_rotate(source, out)
    assert (out == np.roll(source, -1)).all()
    out = poisoned(4096)
    emulator.workload(np.ones(4096, np.float32), out, 4, 1024, 2)
    assert (out == 1).all()
    try:
        emulator.broken("divergent_barrier", np.ones(128, np.float32), poisoned(128))
        raise AssertionError
    except emulator.EmulatorError as error:
        assert "deadlock" in str(error)
print("done")
"""
        process = run_under_address_sanitizer("selftest", code)
        assert process.returncode == 0, process.stderr[:2000]
        assert process.stdout == "done\n"
        assert process.stderr == ""


def test_raw_shared_keyword_does_not_compile() -> None:
    code = '#include "common/simt.cuh"\n__global__ void kernel() { __shared__ float tile[4]; tile[0] = 0.0f; }\n'
    process = subprocess.run(
        [COMPILER, *COMMON_FLAGS.split(), "-fsyntax-only", "-x", "c++", "-"],
        input=code,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode != 0
    assert "declare_shared_memory_with_PK_SHARED_or_PK_DYNAMIC_SHARED" in process.stderr
