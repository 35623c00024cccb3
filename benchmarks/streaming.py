# SPDX-License-Identifier: MIT
"""Data that outgrow memory: embedding mapped images and searching mapped embeddings, up to a million rows, with the slopes.

python benchmarks/streaming.py [--rows 62500 125000 250000 500000 1000000] [--folder FOLDER] [--out benchmarks/results/streaming.json]

Every measurement is a process of its own. ``embed`` writes the embeddings of N images of 28 x 28 (VAESim's network of the preset
``fair``, trained for one epoch) from file to file; ``search`` finds the 5 nearest of N rows of 32 numbers, mapped from their file, for
each of 2000 queries. Memory is private memory (RssAnon of /proc/self/status, looked at every 2 ms) at its highest, less what the process
had before: pages of mapped files are the system's, which takes them back when it needs room. Times are processor time of one thread. A
slope of 1 means that twice as many rows take twice as long; memory must not grow at all.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # run as a file, it finds the other benchmarks

import protokernels
from benchmarks.measure import describe_run
from benchmarks.results_file import target
from protokernels.embedding import embed_files
from protokernels.papers import vaesim

ROWS = (62_500, 125_000, 250_000, 500_000, 1_000_000)
SIDE, DIMENSION, QUERIES, NEIGHBOURS = 28, 32, 2000, 5
PART = 50_000
"""Rows written at a time, so that making the files does not need their memory either."""


def private_memory() -> int:
    """Bytes of this process that no file can give back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("streaming: /proc/self/status names no RssAnon; this benchmark needs Linux")


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Processor seconds of ``work``, and how far private memory rose meanwhile, in MB."""
    gc.collect()  # what is freed meanwhile would be taken off
    before, over = private_memory(), threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.thread_time()
    try:
        work()
    finally:
        seconds = time.thread_time() - start
        over.set()
        watcher.join()
    return {"seconds": round(seconds, 3), "memory_mb": round(max(0, max(seen) - before) / 1e6, 1), "looks": len(seen)}


def write_file(path: Path, shape: tuple[int, ...], dtype: Any, part: Callable[[int, int], np.ndarray]) -> None:
    """A .npy file of ``shape``, written a part at a time."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    for start in range(0, shape[0], PART):
        count = min(PART, shape[0] - start)
        file[start : start + count] = part(start, count)
    file.flush()


def train_once(folder: Path) -> Path:
    run = folder / "run"
    if not run.exists():
        config = vaesim.VAESimConfig.preset("fair", data="digits", epochs=1)
        vaesim.train(config, run, figures=False, quiet=True)
    return run


def embed(rows: int, folder: Path) -> dict[str, float]:
    images, out = folder / "images.npy", folder / "embeddings.npy"

    def part(start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)

    write_file(images, (rows, SIDE, SIDE), np.uint8, part)
    embed_files(folder / "run", _first(images, folder / "few.npy"), out, overwrite=True)  # imports, first allocations
    return measured(lambda: embed_files(folder / "run", images, out, overwrite=True))


def _first(images: Path, few: Path) -> Path:
    np.save(few, np.load(images, mmap_mode="r")[:512])
    return few


def search(rows: int, folder: Path) -> dict[str, float]:
    path = folder / "bank.npy"

    def part(start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).standard_normal((count, DIMENSION), dtype=np.float32)

    write_file(path, (rows, DIMENSION), np.float32, part)
    bank = torch.from_numpy(np.load(path, mmap_mode="c"))
    queries = torch.randn(QUERIES, DIMENSION, generator=torch.Generator().manual_seed(0))
    protokernels.nearest(queries, bank[:1000], NEIGHBOURS)
    return measured(lambda: protokernels.nearest(queries, bank, NEIGHBOURS))


WORK: dict[str, Callable[[int, Path], dict[str, float]]] = {"embed": embed, "search": search}
TITLES = {
    "embed": "embed images of 28 x 28, file to file",
    "search": "5 nearest of 2000 queries among rows of 32 numbers",
}


def child(what: str, rows: int, folder: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--worker", what, str(rows), str(folder)]
    output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def measure(rows: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of work and number of rows."""
    train_once(folder)
    made = []
    for what in WORK:
        for count in rows:
            made.append({"what": what, "rows": count, **child(what, count, folder)})
            print(made[-1], flush=True)
    return made


def slopes(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of time against rows, both logarithms, for each kind of work."""
    made = {}
    for what in WORK:
        points = [(math.log(row["rows"]), math.log(row["seconds"])) for row in rows if row["what"] == what]
        made[what] = round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)
    return made


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For the README: rows down, the two kinds of work across."""
    found = {(row["what"], row["rows"]): row for row in rows}
    made = [["rows", *(f"{TITLES[what]}: {unit}" for what in WORK for unit in ("s", "MB of memory"))]]
    for count in sorted({row["rows"] for row in rows}):
        each = [found[what, count] for what in WORK]
        values = [f"{row[key]:.3g}" for row in each for key in ("seconds", "memory_mb")]
        made.append([f"{count:,}", *values])
    made.append(["slope", *(text for value in slopes(rows).values() for text in (f"{value:.2f}", ""))])
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="for the files: 1 GB for a million rows; default: a temporary one")
    parser.add_argument("--out", type=target)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker is not None:
        what, rows, folder = given.worker
        print(json.dumps(WORK[what](int(rows), Path(folder))))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = measure(given.rows, Path(folder))
    print("\n".join(" | ".join(line) for line in cells(rows)))
    if given.out is not None:
        given.out.write_text(json.dumps({"run": describe_run(), "slopes": slopes(rows), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
