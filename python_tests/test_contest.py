# SPDX-License-Identifier: MIT
"""How the benchmarks on the CPU time contenders, without timing any: turns, threads, rows that are kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn.cluster", reason="a library with threads of its own: pip install 'protokernels[bench]'")

import threadpoolctl  # type: ignore[import-not-found, unused-ignore]

from benchmarks.conftest import Contest
from benchmarks.results_file import read

RUN = {"date": "now", "ceilings": {"mm_gflops": 1.0, "copy_gb_per_s": 1.0}}
FACTS = {"case": "8x2", "what": "step", "contender": "torch", "order": 0}


class Benchmark:
    """What a contest uses of pytest-benchmark's fixture; every round takes a millisecond."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(
        self, function: Callable[[], object], setup: Callable[[], object], rounds: int, iterations: int
    ) -> None:
        for _ in range(rounds):
            setup()
            function()
            self.stats.stats.data.append(1e-3)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    with threadpoolctl.threadpool_limits(2):
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


def test_peers_get_the_threads_that_torch_has(tmp_path: Path, one_thread: None) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}

    assert 2 in threads()
    seen = []
    contest = Contest(0.0, RUN, None, 1e9, frozenset())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.conftest.UNSTEADY", 1e9)
        contest(Benchmark(), lambda: seen.append(threads()), lambda: None, rounds=2, **FACTS)
    assert seen and all(found == {1} for found in seen)


def test_ours_and_the_contender_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.conftest.UNSTEADY", 1e9)
    calls: list[str] = []
    results = tmp_path / "rows.json"
    contest = Contest(0.0, RUN, results, 1e9, frozenset())
    collects: list[bool] = []

    def ours() -> None:
        calls.append("ours")
        collects.append(gc.isenabled())

    contest(Benchmark(), lambda: calls.append("peer"), ours, limit=(1e6, 8.0), **FACTS)
    assert (
        calls[-14:] == ["ours", "peer"] * 7 and len(calls) > 14
    )  # seven rounds at least, after calls that do not count
    assert collects[-7:] == [False] * 7 and gc.isenabled()  # pytest-benchmark times the peer so
    (row,) = read(results)["rows"]
    assert row["rounds"] == 7 and row["median_ms"] == 1.0 and row["ratio"] == 1.0 / row["ours"]["median_ms"]
    assert row["limit_ms"] == 1.0 and row["share_of_limit"] == 1.0 and row["run"] == "now"


def test_a_disturbed_row_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.conftest.UNSTEADY", 0.5)
    contest = Contest(0.0, RUN, tmp_path / "rows.json", 1e9, frozenset())
    with pytest.raises(pytest.skip.Exception, match="the row is not kept"):
        contest(Benchmark(), lambda: None, lambda: None, **FACTS)
    assert not (tmp_path / "rows.json").exists()
