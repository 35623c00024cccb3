# SPDX-License-Identifier: MIT
"""What every benchmark shares: facts of the machine, its ceilings and statistics."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "numpy", "scikit-learn", "faiss-cpu", "vector-quantize-pytorch", "POT", "geomloss", "ott-jax", "jax",
    "pytorch-metric-learning", "kornia", "pytest-benchmark",
)  # fmt: skip
ALLOCATOR = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_CONF")
MIN_ROUNDS, MAX_ROUNDS = 7, 200


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def best_of(function: Callable[[], object], repeats: int) -> float:
    function()
    return min(seconds(function) for _ in range(repeats))


def rounds_for(budget: float, *functions: Callable[[], object]) -> int:
    """Rounds of all functions that fit into `budget` seconds. The functions must have been called before."""
    once = sum(min(seconds(function) for _ in range(2)) for function in functions)
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(once, 1e-6))))


def quartiles(times: Iterable[float]) -> dict[str, float]:
    """Minimum, quartiles and count of the times, in milliseconds."""
    ordered = sorted(1e3 * t for t in times)
    p25, median, p75 = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"min_ms": ordered[0], "p25_ms": p25, "median_ms": median, "p75_ms": p75, "rounds": len(ordered)}


def others_cpu_seconds() -> float:
    """CPU time that all but this process and its children have used so far; only differences mean something."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    every = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return every - sum(usage.ru_utime + usage.ru_stime for usage in own)


def touch_memory(gigabytes: int = 3) -> None:
    """Uses memory once: the first touch in a virtual machine waits for the host, and would hit somebody at random."""
    torch.empty(gigabytes * 2**28).fill_(1.0)


def resident_mb(field: str) -> float:
    """VmRSS: memory of this process; VmHWM: the most it has been since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def peak_mb(function: Callable[[], object]) -> float | None:
    """What a call takes at its peak beyond what the process holds, results included; `None` where Linux does not tell."""
    function()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: a call must ask for all it needs
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident_mb("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return round(max(0.0, resident_mb("VmHWM") - before), 1)


def peak_gflops() -> float | None:
    """Multiply-adds without memory on the threads in use, by a loop compiled here; `None` without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        source = str(ROOT / "benchmarks" / "peak.c")
        try:
            subprocess.run(["cc", *flags, source, "-o", str(library)], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        multiply_add = ctypes.CDLL(str(library)).multiply_add
    multiply_add.restype = ctypes.c_double
    threads = torch.get_num_threads()

    def run(_thread: int) -> float:
        operations: float = multiply_add(10_000_000, ctypes.c_float(0.5), ctypes.byref(ctypes.c_float()))
        return operations

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(run, range(threads)))
        return done / best_of(lambda: list(pool.map(run, range(threads))), 10) / 1e9


def ceilings() -> dict[str, float]:
    """What a kernel is measured against, with the threads in use: multiply-adds (alone and in torch.mm), memory by copying."""
    mm = 0.0
    for n in (512, 1024, 2048):
        a, b, out = (torch.randn(n, n) for _ in range(3))
        mm = max(mm, 2 * n**3 / best_of(partial(torch.mm, a, b, out=out), 10))
    source, target = torch.zeros(2**25), torch.zeros(2**25)
    found = {"mm_gflops": mm / 1e9, "copy_gb_per_s": 2 * 4 * 2**25 / best_of(lambda: target.copy_(source), 10) / 1e9}
    peak = peak_gflops()
    return found if peak is None else {"peak_gflops": peak, **found}


def limit_ms(found: dict[str, float], flops: float, traffic: float) -> float:
    """The least time for `flops` operations and `traffic` bytes if one hides behind the other."""
    gflops = max(found["mm_gflops"], found.get("peak_gflops", 0.0))
    return 1e3 * max(flops / (gflops * 1e9), traffic / (found["copy_gb_per_s"] * 1e9))


def processor() -> dict[str, Any]:
    """Model, cores and vector instructions by /proc/cpuinfo, where there is one."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus_usable": len(os.sched_getaffinity(0))}
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {**facts, "model": platform.processor()}
    lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = set(fields.get("flags", "").split())
    return {
        **facts,
        "model": fields.get("model name", "unknown"),
        "family_model_stepping": "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cache": fields.get("cache size", "unknown"),
        "vector": [flag for flag in ("avx2", "fma", "avx512f", "avx512bw", "amx_tile") if flag in flags],
    }


def commit() -> str:
    """The commit, with `+changes` if files that matter to the kernels differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "csrc", "protokernels/ops", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def load_average() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]


def describe_run() -> dict[str, Any]:
    """Everything about this run that its numbers depend on."""
    from protokernels import _native

    return {
        "date": now(),
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name in ALLOCATOR},
        "load_average": load_average(),
        "versions": versions(),
        "library": _native.build_info(),
        "ceilings": {name: round(value, 2) for name, value in ceilings().items()},
    }
