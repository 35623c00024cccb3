# SPDX-License-Identifier: MIT
"""`benchmarks/streaming.py`: what it measures, and the table it makes of it."""

from __future__ import annotations

import gc
import mmap
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the benchmark trains; that needs the extra protokernels[train]")

from benchmarks import streaming


def held(size: int) -> mmap.mmap:
    """Memory from the system: malloc may have pages left."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(size // 1_000_000):
        memory.write(bytes(1_000_000))
    return memory


def hold() -> None:
    with held(32_000_000):
        time.sleep(0.3)  # many looks


def test_memory_that_is_taken_is_seen() -> None:
    assert 25 < streaming.measured(hold)["memory_mb"] < 60


def test_what_is_freed_meanwhile_is_not_taken_off() -> None:
    def free_and_hold() -> None:
        gc.collect()
        hold()

    gc.collect()
    gc.disable()
    try:
        circle: list[object] = [held(100_000_000)]
        circle.append(circle)
        del circle
        assert 25 < streaming.measured(free_and_hold)["memory_mb"] < 60
    finally:
        gc.enable()


def test_search_takes_no_memory_for_its_rows(tmp_path: Path) -> None:
    found = streaming.search(200_000, tmp_path)  # 25.6 MB, mapped
    assert found["seconds"] > 0 and found["memory_mb"] < 10


def test_cells_and_slopes() -> None:
    rows = [
        {"what": what, "rows": count, "seconds": count**power / 1e5, "memory_mb": 0.5}
        for what, power in (("embed", 1.0), ("search", 2.0))
        for count in (1000, 2000, 4000)
    ]
    assert streaming.slopes(rows) == {"embed": 1.0, "search": 2.0}
    cells = streaming.cells(rows)
    assert [line[0] for line in cells[1:]] == ["1,000", "2,000", "4,000", "slope"]
    assert {len(line) for line in cells} == {5}
