# SPDX-License-Identifier: MIT
"""Where the time of CPU kernels goes: shares of samples by part of the kernel, one thread; needs Linux's `perf`.

python benchmarks/shares.py [--seconds 8] [--out benchmarks/results/shares_cpu.json]

Every case runs forward and backward in a process of its own under `perf record`. Samples inside the library are counted by function and the
functions grouped by their names; what torch and Python do around it does not count, and neither does the kernel's zeroing of fresh pages.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

import protokernels
from benchmarks import bench_warp
from benchmarks.contrastive_cases import Embeddings, Local
from benchmarks.measure import describe_run
from benchmarks.results_file import target

CONTRASTIVE = {
    "products": r"::product<",
    "exponentials and their sums": r"apply_part<|sum_part<",
    "vectors out of maps and gradients into them": r"pack|take_roots",
    "plan": r"plan",
}
WARP = {
    "noise": r"normals<",
    "all stages forward, twice but for the last one": r"run_pass<",
    "rotation backward": r"rotate_back",
    "blur backward": r"Blur<",
    "crop and flips backward": r"Points<|backward_rows<",
}
CASES: dict[str, tuple[Any, dict[str, str]]] = {
    "contrastive, " + case.name: (case, CONTRASTIVE)
    for case in (Local(), Local(squares=True), Local(C=64, block=0, stride=4), Embeddings(2048), Embeddings(8192))
} | {"chain, " + case.name: (case, WARP) for case in bench_warp.CASES}


def run(name: str, seconds: float) -> None:
    """The child: forward and backward, again and again."""
    case, _ = CASES[name]
    if isinstance(case, bench_warp.Case):
        images, params, grad = case.tensors()
        inputs = [images.requires_grad_(), params.requires_grad_()]

        def step() -> None:
            protokernels.transform(images, params).backward(grad)
    else:
        vectors, labels = case.tensors()
        inputs = [vectors.requires_grad_()]

        def step() -> None:
            if isinstance(case, Local):
                way = {"block_size": case.block or None, "stride": case.stride if case.stride > 1 else None}
                protokernels.local_contrastive_loss(vectors, labels, temperature=case.temperature, **way).backward()
            else:
                protokernels.supcon_loss(vectors, labels, temperature=case.temperature).backward()

    threads, end = torch.get_num_threads(), time.monotonic() + seconds
    torch.set_num_threads(1)
    try:
        while time.monotonic() < end:
            for tensor in inputs:
                tensor.grad = None
            step()
    finally:
        torch.set_num_threads(threads)


def samples(report: str) -> dict[str, float]:
    """Share of all samples by function, of the library's functions only."""
    found: dict[str, float] = {}
    for share, library, function in re.findall(r"^\s*([\d.]+)%\s+(\S+)\s+\[.\]\s+(.+?)\s*$", report, flags=re.M):
        if library.startswith("_C."):
            found[function] = found.get(function, 0.0) + float(share)
    return found


def shares(functions: dict[str, float], parts: dict[str, str]) -> dict[str, float]:
    """Shares of the library's samples by part; what no part claims is "other"."""
    total = sum(functions.values())
    if total == 0:
        raise RuntimeError("shares: perf saw no function of the library")
    result = dict.fromkeys([*parts, "other"], 0.0)
    for function, share in functions.items():
        part = next((part for part, pattern in parts.items() if re.search(pattern, function)), "other")
        result[part] += share / total
    return {part: round(share, 3) for part, share in result.items()}


def measure(name: str, seconds: float, folder: Path) -> dict[str, float]:
    data = folder / "perf.data"
    child = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--seconds", str(seconds)]
    subprocess.run(["perf", "record", "-F", "1999", "-o", str(data), *child], check=True, capture_output=True)
    report = ["perf", "report", "-i", str(data), "--stdio", "--sort", "dso,symbol"]
    return shares(samples(subprocess.run(report, check=True, capture_output=True, text=True).stdout), CASES[name][1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of every case")
    parser.add_argument("--out", type=target)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        run(options.child, options.seconds)
        return 0
    if shutil.which("perf") is None:
        parser.error("perf is not installed")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            rows.append({"case": name, "shares": measure(name, options.seconds, Path(folder))})
            print(name, *(f"  {share:6.1%}  {part}" for part, share in rows[-1]["shares"].items()), sep="\n")
    if options.out is not None:
        options.out.write_text(json.dumps({"run": describe_run(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
