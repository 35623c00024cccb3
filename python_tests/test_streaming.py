# SPDX-License-Identifier: MIT
"""`benchmarks/streaming.py`: what it measures, and the table it makes of it."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the benchmark trains; that needs the extra protokernels[train]")

from benchmarks import streaming


def test_memory_that_is_taken_is_seen() -> None:
    def hold() -> None:
        with mmap.mmap(
            -1, 32_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        ) as held:  # from the system: malloc may have pages left
            held.write(bytes(1_000_000) * 32)
            time.sleep(0.3)  # many looks

    assert 25 < streaming.measured(hold)["memory_mb"] < 60


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
