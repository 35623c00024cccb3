# SPDX-License-Identifier: MIT
"""Options and fixtures of the benchmarks; `README.md` says how one is run and what the numbers mean."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-not-found, unused-ignore]

from benchmarks import measure, measure_cuda, results_file

UNSTEADY = 1.5
"""A row is not kept if the median of either side is more than this many times its minimum."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("protokernels benchmarks")
    group.addoption("--seconds", type=float, default=2.0, help="time for one contender of one case (default: 2)")
    group.addoption("--threads", type=int, default=None, help="threads for everyone (default: torch's own choice)")
    group.addoption(
        "--disturbance",
        type=float,
        default=0.1,
        help="cores other processes may use before a row is not kept (default: .1)",
    )
    group.addoption("--missing", action="store_true", help="measure only what the results file does not hold yet")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="which benchmarks to run (default: cpu)")
    group.addoption("--results", type=Path, default=None, help="JSON file to add to (default: nothing is written)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the benchmarks of the device asked for; those of CUDA carry the mark `cuda`."""
    wanted = config.getoption("--device") == "cuda"
    left_out = [item for item in items if (item.get_closest_marker("cuda") is not None) != wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@dataclass
class Contest:
    """Times contenders against ours, A B A B in one process, and adds a row to the results file for each."""

    seconds: float
    run: dict[str, Any]
    results: Path | None
    disturbance: float
    held: frozenset[tuple[str, ...]]

    def __call__(
        self,
        benchmark: Any,
        function: Callable[[], object],
        ours: Callable[[], object],
        *,
        limit: tuple[float, float] | None = None,
        calls: int = 1,
        rounds: int | None = None,
        **facts: Any,
    ) -> None:
        """Every round runs ours, timed here, and then the contender, timed by pytest-benchmark.

        Args:
            benchmark: the fixture of pytest-benchmark.
            function: what the row is about; may be ours itself.
            ours: what it is compared with in the same rounds.
            limit: floating-point operations and bytes that cannot be avoided.
            calls: how many calls `function` and `ours` make; times are those of one.
            rounds: at least two, for calls of many seconds, which are warm after the first; default: as many as there is time for.
            facts: `case`, `what`, `contender`, `order` and anything else the row should say.
        """
        if results_file.identity(facts) in self.held:
            pytest.skip("the results file holds this row")
        threadpool_limits(torch.get_num_threads())  # libraries of peers have pools of their own, one for every core
        first_call = measure.seconds(function)  # with torch.compile: the compilation
        if rounds is None:
            for _ in range(2):
                function(), ours()
            rounds = measure.rounds_for(self.seconds, function, ours)
        own: list[float] = []
        gc.collect()
        start, others = time.perf_counter(), measure.others_cpu_seconds()

        def time_ours() -> None:
            gc.disable()  # as pytest-benchmark does for the contender
            try:
                own.append(measure.seconds(ours))
            finally:
                gc.enable()

        benchmark.pedantic(function, setup=time_ours, rounds=rounds, iterations=1)
        disturbance = (measure.others_cpu_seconds() - others) / (time.perf_counter() - start)
        row = {**facts, **measure.quartiles(t / calls for t in benchmark.stats.stats.data)}
        row["first_call_ms"] = 1e3 * first_call / calls
        row["cores_of_others"] = max(0.0, round(disturbance, 3))
        row["ours"] = measure.quartiles(t / calls for t in own)
        row["ratio"] = row["median_ms"] / row["ours"]["median_ms"]
        if limit is not None:
            row["flops"], row["bytes"] = limit
            row["limit_ms"] = measure.limit_ms(self.run["ceilings"], *limit)
            row["share_of_limit"] = row["limit_ms"] / row["median_ms"]
        benchmark.extra_info.update(row)
        if disturbance > self.disturbance:
            pytest.skip(f"other processes used {disturbance:.2f} cores meanwhile; the row is not kept")
        if max(times["median_ms"] / times["min_ms"] for times in (row, row["ours"])) > UNSTEADY:
            pytest.skip("a median is far from its minimum: something else interfered; the row is not kept")
        if self.results is not None:
            results_file.write(self.results, self.run, row)


@pytest.fixture(scope="session")
def contest(request: pytest.FixtureRequest) -> Contest:
    threads = request.config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
    measure.touch_memory()
    start, others = time.perf_counter(), measure.others_cpu_seconds()
    run = measure.describe_run()
    busy = (measure.others_cpu_seconds() - others) / (time.perf_counter() - start)
    print(f"\n{run['processor']['model']}, {run['threads']} threads, load {run['load_average']}, {run['ceilings']}")
    option = request.config.getoption
    if option("--results") is not None and busy > option("--disturbance"):
        pytest.exit(f"other processes use {busy:.2f} cores: measure when they are done", returncode=3)
    check_results(request.config, run)
    return Contest(option("--seconds"), run, option("--results"), option("--disturbance"), rows_held(request.config))


def check_results(config: pytest.Config, run: dict[str, Any]) -> None:
    """Ends the session where its rows cannot go into the file of results."""
    results = config.getoption("--results")
    try:
        if results is not None:
            results_file.check_target(results, run)
    except results_file.ResultsError as error:
        pytest.exit(str(error), returncode=3)


def rows_held(config: pytest.Config) -> frozenset[tuple[str, ...]]:
    """With --missing: what the results file holds already."""
    results = config.getoption("--results")
    if not config.getoption("--missing") or results is None:
        return frozenset()
    return frozenset(results_file.identity(row) for row in results_file.read(results)["rows"])


class SkippingCudaContest(measure_cuda.CudaContest):
    """A contest in which a row that the results file holds, or a peer that does not run, is a skipped test."""

    def __call__(self, *arguments: Any, **facts: Any) -> dict[str, Any]:
        if self.holds(facts["mode"], facts):
            pytest.skip("the results file holds this row")
        try:
            return super().__call__(*arguments, **facts)
        except measure_cuda.PeerFailed as error:
            pytest.skip(f"{facts['contender']} does not run here: {error}")


@pytest.fixture(scope="session")
def cuda_contest(request: pytest.FixtureRequest) -> measure_cuda.CudaContest:
    if not torch.cuda.is_available():
        pytest.exit(f"torch {torch.__version__} sees no GPU; benchmarks with --device cuda need one", returncode=3)
    gpu, option = measure_cuda.Gpu(), request.config.getoption
    run = measure_cuda.describe_run(gpu)
    print(f"\n{run['device']['name']}, driver {run['device']['driver']}, {run['device']['measured']}")
    check_results(request.config, run)
    return SkippingCudaContest(gpu, option("--seconds"), run, option("--results"), rows_held(request.config))
