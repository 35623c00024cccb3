# SPDX-License-Identifier: MIT
"""What every op has to keep on CUDA beyond its values; an op's test gives inputs and work, and inherits the tests.

    class TestContract(CudaContract):
        def draw(self, seed: int) -> tuple[Tensor, ...]:  # on the CPU; what is floating takes part in gradients
            return draw(2048, 10, 32, seed)

        def work(self, z: Tensor, q: Tensor) -> list[Tensor]:  # the op forward and backward; results
            c = soft_assign(z, q, temperature=0.1)
            return [c, *torch.autograd.grad(c.square().sum(), (z, q))]

`nothing_waits` and `need_memory` serve tests that are an op's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

ELEMENTS_OF_INT32 = 2**31
SLEEP_CYCLES = 2_000_000_000
"""About a second of the device; the host must be done with a step long before."""


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails if what runs inside waits for the device; run it once before, so that memory is in torch's cache.

    torch reports its own waiting. What a library does behind its back shows by the clock: the device is put to sleep
    first, and it must still be asleep at the end.
    """
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    end = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        end.record()
        asleep = not end.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert asleep, "the host waited for the device, or needed more than a second for one step"


def need_memory(gigabytes: float) -> None:
    """Skips the test unless the device has that much free memory."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free device memory; {free:.0f} GB are free")


def on(device: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies on a device, those of a floating type with gradients asked for."""
    copies = (tensor.detach().to(device, copy=True) for tensor in tensors)
    return tuple(copy.requires_grad_() if copy.is_floating_point() else copy for copy in copies)


def refill(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def same_bits(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"result {index}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), f"result {index}"


class CudaContract:
    """Tests of streams, graphs, devices, waiting and repetition; a subclass in a file marked `cuda` runs them."""

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def work(self, *inputs: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _expected(self, seed: int) -> list[Tensor]:
        results = self.work(*on("cuda", self.draw(seed)))
        torch.cuda.synchronize()
        return results

    def test_another_stream(self) -> None:
        expected = self._expected(0)
        inputs = on("cuda", [torch.zeros_like(tensor) for tensor in self.draw(0)])
        sources = on("cuda", self.draw(0))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES // 10)  # work that ran on the default stream would see zeros
            refill(inputs, sources)
            results = self.work(*inputs)
            refill(inputs, [torch.zeros_like(tensor) for tensor in inputs])  # and zeros again if it came late
        stream.synchronize()
        same_bits(results, expected)

    def test_two_streams_at_once(self) -> None:
        expected = [self._expected(seed) for seed in (0, 1)]
        inputs = [on("cuda", self.draw(seed)) for seed in (0, 1)]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in inputs], []
        for stream, one in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append([self.work(*one) for _ in range(5)])
        torch.cuda.synchronize()
        for repeats, one_expected in zip(results, expected, strict=True):
            for repeat in repeats:
                same_bits(repeat, one_expected)

    def test_capture_and_replay(self) -> None:
        inputs = on("cuda", self.draw(0))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.work(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.work(*inputs)
        for seed in (1, 2):
            refill(inputs, self.draw(seed))
            for tensor in captured:
                tensor.detach().fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            same_bits(captured, self._expected(seed))

    def test_nothing_waits_for_the_device(self) -> None:
        inputs = on("cuda", self.draw(0))
        for _ in range(2):
            self.work(*inputs)
        with nothing_waits():
            self.work(*inputs)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
    def test_a_device_that_is_not_the_current_one(self) -> None:
        expected = self._expected(0)
        assert torch.cuda.current_device() == 0
        results = self.work(*on("cuda:1", self.draw(0)))
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(1)
        assert {result.device for result in results} == {torch.device("cuda", 1)}
        if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
            same_bits([result.to("cuda:0") for result in results], expected)
        else:
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a.to("cuda:0"), b)

    def test_inputs_are_not_modified(self) -> None:
        inputs, copies = on("cuda", self.draw(0)), on("cuda", self.draw(0))
        self.work(*inputs)
        torch.cuda.synchronize()
        same_bits(inputs, copies)

    def test_repeats_agree_to_the_bit(self) -> None:
        expected = self._expected(0)
        for _ in range(10):
            same_bits(self.work(*on("cuda", self.draw(0))), expected)
