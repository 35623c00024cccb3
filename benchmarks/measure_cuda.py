# SPDX-License-Identifier: MIT
"""Times on CUDA: events, inputs that rotate through more than the second-level cache, CUDA graphs, shares of the roofline.

What touches a GPU is `Gpu`; everything else runs without one, under a `Gpu` of the tests.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, results_file

Call = Callable[[], object]
Bind = Callable[..., Call]
"""Takes the input tensors of one set and returns the call to be timed."""

EAGER, GRAPH = "launched from Python", "in a CUDA graph"
CACHE_TURNOVER = 2.5
"""Inputs rotate through at least this many times the second-level cache."""
MAX_SETS = 256
MIN_CALLS = 10
MIN_ROUNDS, MAX_ROUNDS = 7, 200
PACKAGES = (*measure.PACKAGES, "triton", "flash-kmeans", "flash-sinkhorn", "inf-cl", "cut-cross-entropy")


@dataclass(frozen=True)
class Ceilings:
    """Dense rates of a device in TFLOP/s and its memory in TB/s, by the vendor's data sheet."""

    fp32: float
    tf32: float
    bf16: float
    memory: float

    @property
    def rates(self) -> dict[str, float]:
        """`3xtf32` is float32 accuracy from tensor cores: three products for one."""
        return {"fp32": self.fp32, "tf32": self.tf32, "3xtf32": self.tf32 / 3, "bf16": self.bf16}

    def limit_ms(self, flops: float, traffic: float, rate: str) -> float:
        """The least time for `flops` operations at `rate` and `traffic` bytes if one hides behind the other."""
        return 1e3 * max(flops / (self.rates[rate] * 1e12), traffic / (self.memory * 1e12))


# The first name that stands in the device's own name as whole words counts, so longer ones come first.
DATA_SHEETS = {
    "B200": Ceilings(fp32=75.0, tf32=1100.0, bf16=2250.0, memory=8.0),
    "GH200": Ceilings(fp32=67.0, tf32=495.0, bf16=990.0, memory=4.0),
    "H200 NVL": Ceilings(fp32=60.0, tf32=418.0, bf16=835.0, memory=4.8),
    "H200": Ceilings(fp32=67.0, tf32=495.0, bf16=990.0, memory=4.8),
    "H100 NVL": Ceilings(fp32=60.0, tf32=418.0, bf16=835.0, memory=3.9),
    "H100 PCIe": Ceilings(fp32=51.0, tf32=378.0, bf16=756.0, memory=2.0),
    "H100": Ceilings(fp32=67.0, tf32=495.0, bf16=990.0, memory=3.35),
    "A100-SXM4-40GB": Ceilings(fp32=19.5, tf32=156.0, bf16=312.0, memory=1.555),
    "A100-PCIE-40GB": Ceilings(fp32=19.5, tf32=156.0, bf16=312.0, memory=1.555),
    "A100-SXM4-80GB": Ceilings(fp32=19.5, tf32=156.0, bf16=312.0, memory=2.039),
    "A100": Ceilings(fp32=19.5, tf32=156.0, bf16=312.0, memory=1.935),
    "L40S": Ceilings(fp32=91.6, tf32=183.0, bf16=362.0, memory=0.864),
}


def data_sheet(name: str) -> Ceilings | None:
    """The ceilings of the device of that name, or None for one that is not listed."""
    found = (sheet for part, sheet in DATA_SHEETS.items() if re.search(rf"\b{part}\b", name, flags=re.I))
    return next(found, None)


class Gpu:
    """The device that is measured."""

    device = "cuda"

    @property
    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Call) -> float:
        """Time between an event before and an event after; the device is idle at the start."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def graph(self, call: Call) -> Call:
        """The work of `call` as one CUDA graph; the returned call replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """Memory that a call takes beyond what is allocated before it, its results included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def facts(self) -> dict[str, Any]:
        """Name, size and software of the device, and what products and copies reach on it."""
        properties = torch.cuda.get_device_properties(0)
        sheet = data_sheet(properties.name)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cache_mb": round(self.cache_bytes / 1e6, 1),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "measured": self.measured(),
            "data_sheet": asdict(sheet) if sheet else None,
        }

    def measured(self) -> dict[str, float]:
        """TFLOP/s of torch.mm in three precisions and TB/s of a copy (bytes read plus bytes written)."""
        n, found = 8192, {}
        allowed = torch.backends.cuda.matmul.allow_tf32
        try:
            for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
                torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
                a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
                out = torch.empty_like(a)
                found[name] = 2 * n**3 / self._best(partial(torch.mm, a, b, out=out)) / 1e12
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
        source = torch.randn(2**29, device=self.device)
        target = torch.empty_like(source)
        found["memory"] = 2 * 4 * 2**29 / self._best(lambda: target.copy_(source)) / 1e12
        return {name: round(value, 3) for name, value in found.items()}

    def _best(self, call: Call) -> float:
        call()
        return min(self.seconds(call) for _ in range(5))


def driver_version() -> str:
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


def describe_run(gpu: Gpu) -> dict[str, Any]:
    """Everything about this run that its numbers depend on."""
    from protokernels import _native

    return {
        "date": measure.now(),
        "commit": measure.commit(),
        "device": gpu.facts(),
        "processor": measure.processor(),
        "threads": torch.get_num_threads(),
        "load_average": measure.load_average(),
        "versions": measure.versions(PACKAGES),
        "library": _native.build_info(),
    }


def ceilings(run: dict[str, Any]) -> Ceilings:
    """The data sheet's ceilings, or for a device that is not listed the measured ones."""
    return Ceilings(**(run["device"]["data_sheet"] or run["device"]["measured"]))


def set_count(input_bytes: int, cache_bytes: int) -> int:
    """Input sets to rotate through, so that none is still in the cache when it is used again."""
    return max(2, min(MAX_SETS, -(-int(CACHE_TURNOVER * cache_bytes) // max(1, input_bytes))))


def sweep(calls: Sequence[Call]) -> Call:
    """One call of every set in turn, at least `MIN_CALLS`, without waiting in between; results are dropped at once."""
    cycle = [call for call, _ in zip(itertools.cycle(calls), range(calls_in_sweep(len(calls))), strict=False)]

    def run() -> None:
        for call in cycle:
            call()

    return run


def calls_in_sweep(sets: int) -> int:
    return -(-max(sets, MIN_CALLS) // sets) * sets


def alternate(gpu: Gpu, ours: Call, contender: Call, seconds: float) -> tuple[list[float], list[float]]:
    """Times of ours and of the contender, in turn, until both have taken `seconds` together."""
    for call in (ours, contender):
        call()
    once = sum(gpu.seconds(call) for call in (ours, contender))
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(once, 1e-9))))
    pairs = [(gpu.seconds(ours), gpu.seconds(contender)) for _ in range(rounds)]
    return [own for own, _ in pairs], [other for _, other in pairs]


class PeerFailed(RuntimeError):
    """A contender that is not ours does not run here; that is no fault of the kernels."""


@contextmanager
def blaming(peer: bool) -> Iterator[None]:
    """Raises what goes wrong inside as `PeerFailed` if it is the work of a peer."""
    try:
        yield
    except Exception as error:
        if not peer:
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        raise PeerFailed(f"{type(error).__name__}: {first[:200]}") from error


@dataclass
class CudaContest:
    """Times contenders against ours, A B A B in one process, and adds a row to the results file for each.

    An op's benchmark calls it once for every case, contender and mode:

        cuda_contest(bind(peer), bind(ours), case.on_cuda, mode=GRAPH, limit=(flops, bytes, "3xtf32"), agree=check,
                     what="step", case=case.name, order=0, contender="torch")
    """

    gpu: Gpu
    seconds: float
    run: dict[str, Any]
    results: Path | None
    held: frozenset[tuple[str, ...]] = frozenset()

    def holds(self, mode: str, facts: dict[str, Any]) -> bool:
        return results_file.identity(self._labelled(mode, facts)) in self.held

    def __call__(
        self,
        function: Bind,
        ours: Bind,
        draw: Callable[[int, str], Sequence[Tensor]],
        /,
        *,
        mode: str,
        limit: tuple[float, float, str] | None = None,
        agree: Callable[[Any, Any], None] | None = None,
        peer: bool | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        """Measures one row.

        Args:
            function: what the row is about; may be ours itself.
            ours: what it is compared with in the same rounds and the same mode.
            draw: inputs for a seed on a device.
            mode: `EAGER`, calls one after the other from Python, or `GRAPH`, all of a sweep in one CUDA graph.
            limit: operations and bytes that cannot be avoided, and the rate in `Ceilings.rates` that counts.
            agree: takes the results of ours and of the contender; raises if they are not the same thing.
            peer: whether `function` is somebody else's, whose failures are no fault of ours; by default whether it is not `ours`.
            facts: `case`, `what`, `contender`, `order` and anything else the row should say.
        """
        if mode not in (EAGER, GRAPH):
            raise ValueError(f"mode must be {EAGER!r} or {GRAPH!r}; got {mode!r}")
        first = draw(0, self.gpu.device)
        input_bytes = sum(tensor.numel() * tensor.element_size() for tensor in first)
        sets = set_count(input_bytes, self.gpu.cache_bytes)
        inputs = [first, *(draw(seed, self.gpu.device) for seed in range(1, sets))]
        expected = ours(*first)()
        self.gpu.synchronize()
        is_peer = function is not ours if peer is None else peer
        with blaming(is_peer):
            first_call = self.gpu.seconds(
                function(*first)
            )  # with torch.compile: the compilation, on the host's side too
            result = function(*first)()
            self.gpu.synchronize()
        if agree is not None:
            agree(expected, result)
        del expected, result
        own_sweep = self._sweep(ours, inputs, mode)
        with blaming(is_peer):
            row: dict[str, Any] = {"peak_mb": round(self.gpu.peak_bytes(function(*first)) / 1e6, 3)}
            sweeps = [own_sweep, self._sweep(function, inputs, mode)]
        own, times = alternate(self.gpu, *sweeps, self.seconds)
        calls = calls_in_sweep(sets)
        row |= {**measure.quartiles(t / calls for t in times), "ours": measure.quartiles(t / calls for t in own)}
        row |= {"first_call_ms": 1e3 * first_call, "sets": sets, "input_mb": round(sets * input_bytes / 1e6, 3)}
        row["ratio"] = row["median_ms"] / row["ours"]["median_ms"]
        if limit is not None:
            flops, traffic, rate = limit
            row |= {"flops": flops, "bytes": traffic, "rate": rate}
            row["limit_ms"] = ceilings(self.run).limit_ms(flops, traffic, rate)
            row["share_of_limit"] = row["limit_ms"] / row["median_ms"]
        row = {**self._labelled(mode, facts), **row}
        if self.results is not None:
            results_file.write(self.results, self.run, row)
        return row

    def _sweep(self, function: Bind, inputs: Sequence[Sequence[Tensor]], mode: str) -> Call:
        run = sweep([function(*one) for one in inputs])
        if mode == EAGER:
            return run
        run()  # every set once, so that nothing is compiled or allocated for the first time in the capture
        self.gpu.synchronize()
        return self.gpu.graph(run)

    @staticmethod
    def _labelled(mode: str, facts: dict[str, Any]) -> dict[str, Any]:
        return {**facts, "what": f"{facts['what']}, {mode}", "mode": mode}


def bind(function: Callable[..., object], *arguments: object) -> Bind:
    """For functions of the input tensors and further arguments, without gradients."""

    def bound(*tensors: Tensor) -> Call:
        @torch.no_grad()
        def call() -> object:
            return function(*tensors, *arguments)

        return call

    return bound


def bind_gradient(function: Callable[..., Tensor], *arguments: object, of: int) -> Bind:
    """Forward and backward: gradients of the first `of` tensors, the last tensor of a set being the gradient that comes in."""

    def bound(*tensors: Tensor) -> Call:
        *given, incoming = tensors
        leaves = [tensor.detach().requires_grad_() for tensor in given[:of]]

        def call() -> object:
            return torch.autograd.grad(function(*leaves, *given[of:], *arguments), leaves, incoming)

        return call

    return bound


def gradients_agree(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """|a - b| relative to the length of the whole gradient: single elements cancel."""
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(b.norm())
