# SPDX-License-Identifier: MIT
"""What processes send one another in a step: counted with a few, worked out for many.

python benchmarks/communication.py [--processes 1 2 4] [--out benchmarks/results/communication.json]

Bytes that come in at one process, forward and backward, with N rows on each of W processes: an all-gather of b bytes brings (W - 1) b, a
ring all-reduce 2 (W - 1) / W b, what is passed round a ring its own size W - 1 times, a broadcast b. Processes with gloo on this machine
count what they really exchange; the formulas have to give the same, or the command fails. The gradients of the network, which
DistributedDataParallel averages by an all-reduce, come on top: 8 (W - 1) / W bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

import protokernels
from benchmarks.measure import describe_run
from benchmarks.results_file import target
from protokernels.nn import Prototypes, SinkhornAssignment
from protokernels.training import synchronize_batch_norm

SHOWN = (1, 2, 4, 8, 64, 1024)
"""Numbers of processes of the table."""


@dataclass(frozen=True)
class Case:
    """An exchange, what it needs per step, and its formula in bytes."""

    name: str
    sizes: dict[str, int]
    step: Callable[..., Tensor]
    formula: Callable[..., float]

    def count(self) -> int:
        """Bytes that come in at this process in the second step; the first may compare beginnings."""
        step = self.step(**self.sizes)
        for _ in range(2):
            with counted() as bytes_in:
                step()
        return round(sum(bytes_in))

    def expected(self, processes: int) -> int:
        return round(self.formula(processes, **self.sizes)) if processes > 1 else 0


def gather(W: int, numbers: float, size: int = 4) -> float:
    return (W - 1) * numbers * size


def reduce(W: int, numbers: float, size: int = 4) -> float:
    return 2 * (W - 1) / W * numbers * size


def prototypes_step(N: int, K: int, D: int) -> Callable[[], object]:
    module = Prototypes(K, D, temperature=0.1)
    return lambda: module(torch.randn(N, D))


def contrast_step(mode: bool | str) -> Callable[..., Callable[[], object]]:
    def step(N: int, D: int) -> Callable[[], object]:
        z = torch.randn(2, N // 2, D, requires_grad=True)
        return lambda: protokernels.nt_xent_loss(*z, gather=mode).backward()  # type: ignore[arg-type]

    return step


def views_step(N: int, D: int) -> Callable[[], object]:
    first, second = torch.randn(2, N, D, requires_grad=True)
    return lambda: protokernels.cross_view_loss(first, second, symmetric=True, gather=True).backward()


def assignment_step(N: int, K: int) -> Callable[[], object]:
    module = SinkhornAssignment(epsilon=0.05, num_iters=3)
    return lambda: module(torch.randn(N, K))


def norm_step(N: int, C: int) -> Callable[[], object]:
    layer = synchronize_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(C)))
    return lambda: layer(torch.randn(N, C, 2, 2, requires_grad=True)).sum().backward()


def contrast_formula(W: int, N: int, D: int) -> float:
    """Forward: how many, embeddings, labels (int64); backward: embeddings, labels, three statistics and three coefficients of each."""
    return gather(W, 1, 8) + 2 * gather(W, N * D) + 2 * gather(W, N, 8) + gather(W, 6 * N)


def views_formula(W: int, N: int, D: int) -> float:
    """Forward: how many, both views, which pair (int64); backward: both views, pair, and for both directions as above."""
    return gather(W, 1, 8) + 4 * gather(W, N * D) + 2 * gather(W, N, 8) + gather(W, 12 * N)


CASES = [
    Case(
        "prototypes: sums and counts, float64",
        {"N": 256, "K": 40, "D": 32},
        prototypes_step,
        lambda W, N, K, D: reduce(W, K * (D + 1), 8),
    ),
    Case("contrast, gathered", {"N": 512, "D": 128}, contrast_step(True), contrast_formula),
    Case("contrast, passed round a ring", {"N": 512, "D": 128}, contrast_step("ring"), contrast_formula),
    Case("contrast of two views, both directions", {"N": 256, "D": 128}, views_step, views_formula),
    Case(
        "balanced assignment: 3 iterations, float64",
        {"N": 256, "K": 300},
        assignment_step,
        lambda W, N, K: 3 * 2 * reduce(W, K, 8),
    ),
    Case(
        "batch normalisation of one layer",
        {"N": 32, "C": 64},
        norm_step,
        lambda W, N, C: 2 * (reduce(W, C + 1) + reduce(W, C)),
    ),
]


@contextmanager
def counted() -> Iterator[list[float]]:
    """What comes in at this process inside the block, in bytes."""
    found: list[float] = []

    def bytes_of(value: Tensor) -> int:
        return value.numel() * value.element_size()

    def watched(name: str, cost: Callable[..., float]) -> Any:
        original = getattr(dist, name)

        def function(*arguments: Any, **more: Any) -> Any:
            found.append(cost(*arguments))
            return original(*arguments, **more)

        return mock.patch.object(dist, name, function)

    W = dist.get_world_size()
    with ExitStack() as stack:
        stack.enter_context(watched("all_gather", lambda parts, own: (W - 1) * bytes_of(own)))
        stack.enter_context(watched("all_reduce", lambda value: 2 * (W - 1) / W * bytes_of(value)))
        stack.enter_context(watched("broadcast", lambda value: bytes_of(value)))
        moves = watched(
            "batch_isend_irecv", lambda moves: sum(bytes_of(move.tensor) for move in moves if move.op is dist.irecv)
        )
        stack.enter_context(moves)
        yield found


def worker(rank: int, processes: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(json.dumps([case.count() for case in CASES]), flush=True)
    dist.destroy_process_group()


def count(processes: int) -> list[int]:
    """The bytes of every case, of the process that gets the most."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        words = [[sys.executable, __file__, "--worker", str(rank), str(processes), store] for rank in range(processes)]
        started = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in words]
        outputs = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError(f"communication: one of {processes} processes failed")
    return [max(each) for each in zip(*(json.loads(output.splitlines()[-1]) for output in outputs), strict=True)]


def differences(counts: dict[int, list[int]]) -> list[str]:
    """Where the formula is off by more than the rounding of a byte."""
    return [
        f"{case.name}, {processes} processes: {found} bytes counted, {case.expected(processes)} worked out"
        for processes, values in counts.items()
        for case, found in zip(CASES, values, strict=True)
        if abs(found - case.expected(processes)) > 1
    ]


def record(counts: dict[int, list[int]]) -> dict[str, Any]:
    """What the JSON holds."""
    rows = [
        {"case": case.name, "sizes": case.sizes, "bytes": {str(W): case.expected(W) for W in SHOWN}} for case in CASES
    ]
    return {"counted": sorted(counts), "rows": rows}


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Kilobytes, of the numbers of processes that were counted and of those that are worked out."""
    titles = [f"{W}" if W in found["counted"] else f"*{W}*" for W in SHOWN]
    made = [["kB in, per step and process", *titles]]
    for row in found["rows"]:
        sizes = ", ".join(f"{name} = {value}" for name, value in row["sizes"].items())
        made.append([f"{row['case']} ({sizes})", *(f"{row['bytes'][str(W)] / 1e3:,.0f}" for W in SHOWN)])
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--out", type=target)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(int(given.worker[0]), int(given.worker[1]), given.worker[2])
        return 0
    counts = {processes: count(processes) for processes in given.processes}
    found = record(counts)
    print("\n".join(" | ".join(line) for line in cells(found)))
    wrong = differences(counts)
    print("\n".join(wrong))
    if given.out is not None and not wrong:
        given.out.write_text(json.dumps({"run": describe_run(), **found}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
