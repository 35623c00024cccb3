# SPDX-License-Identifier: MIT
"""The logic of the CUDA benchmarks, without a GPU: a device of the tests that works on the CPU and has a clock of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_prototypes, measure_cuda, prototypes_peers, table
from benchmarks.measure_cuda import EAGER, GRAPH, Call, CudaContest, PeerFailed

SHEET = {"fp32": 1.0, "tf32": 3.0, "bf16": 6.0, "memory": 1.0}
RUN = {
    "date": "now",
    "commit": "abc",
    "versions": {"torch": "2"},
    "device": {"name": "A device", "driver": "1", "cuda": "13", "measured": SHEET, "data_sheet": SHEET},
}


class FakeGpu(measure_cuda.Gpu):
    """Runs on the CPU; a call takes as long as the functions in it say by `spend`."""

    device = "cpu"
    cache_bytes = 1000

    def __init__(self) -> None:
        self.clock = 0.0
        self.graphs = 0

    def spend(self, seconds: float) -> None:
        self.clock += seconds

    def synchronize(self) -> None:
        pass

    def seconds(self, call: Call) -> float:
        before = self.clock
        call()
        return self.clock - before or 1e-3

    def graph(self, call: Call) -> Call:
        self.graphs += 1
        call()
        return call

    def peak_bytes(self, call: Call) -> int:
        call()
        return 5_000_000


@pytest.fixture
def contest(tmp_path: Path) -> CudaContest:
    return CudaContest(FakeGpu(), 1.0, RUN, tmp_path / "rows.json")


def taking(contest: CudaContest, seconds: float, log: list[Any] | None = None, name: str = "") -> measure_cuda.Bind:
    def bound(x: Tensor) -> Call:
        def call() -> Tensor:
            assert isinstance(contest.gpu, FakeGpu)
            contest.gpu.spend(seconds)
            if log is not None:
                log.append((name, float(x[0])))
            return x * 2

        return call

    return bound


def draw(seed: int, device: str) -> tuple[Tensor]:
    return (torch.full((100,), float(seed), device=device),)  # 400 bytes


FACTS = {"what": "step", "case": "100", "order": 0, "contender": "a peer"}


class TestCeilings:
    @pytest.mark.parametrize(
        ("name", "memory"),
        [
            ("NVIDIA H200", 4.8),
            ("NVIDIA GH200 480GB", 4.0),
            ("NVIDIA H100 80GB HBM3", 3.35),
            ("NVIDIA H100 PCIe", 2.0),
            ("NVIDIA A100-SXM4-40GB", 1.555),
            ("NVIDIA A100-SXM4-80GB", 2.039),
            ("NVIDIA A100 80GB PCIe", 1.935),
        ],
    )
    def test_a_device_is_known_by_its_name(self, name: str, memory: float) -> None:
        sheet = measure_cuda.data_sheet(name)
        assert sheet is not None and sheet.memory == memory

    @pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA H20", "Tesla T4"])
    def test_a_device_that_is_not_listed(self, name: str) -> None:
        assert measure_cuda.data_sheet(name) is None

    def test_the_larger_of_operations_and_bytes_limits(self) -> None:
        ceilings = measure_cuda.Ceilings(**SHEET)
        assert ceilings.limit_ms(2e9, 1e9, "fp32") == pytest.approx(2.0)
        assert ceilings.limit_ms(2e9, 1e9, "bf16") == pytest.approx(1.0)
        assert ceilings.limit_ms(2e9, 0, "3xtf32") == pytest.approx(2.0)

    def test_an_unknown_device_is_measured_against_what_it_reached(self) -> None:
        run = {"device": {"data_sheet": None, "measured": {**SHEET, "memory": 0.5}}}
        assert measure_cuda.ceilings(run).memory == 0.5


class TestRotation:
    def test_inputs_exceed_the_cache(self) -> None:
        assert measure_cuda.set_count(400, 1000) == 7  # 2.5 times 1000 bytes
        assert measure_cuda.set_count(10**9, 1000) == 2
        assert measure_cuda.set_count(1, 10**9) == measure_cuda.MAX_SETS
        assert measure_cuda.set_count(0, 1000) == measure_cuda.MAX_SETS

    @pytest.mark.parametrize(("sets", "calls"), [(2, 10), (3, 12), (7, 14), (10, 10), (256, 256)])
    def test_a_sweep_takes_every_set_equally_often(self, sets: int, calls: int) -> None:
        taken: list[int] = []
        measure_cuda.sweep([lambda i=i: taken.append(i) for i in range(sets)])()
        assert len(taken) == calls == measure_cuda.calls_in_sweep(sets)
        assert taken == [i % sets for i in range(calls)]


class TestContest:
    def test_a_row(self, contest: CudaContest) -> None:
        row = contest(taking(contest, 0.003), taking(contest, 0.001), draw, mode=EAGER, limit=(1e9, 0, "fp32"), **FACTS)
        assert row["what"] == "step, launched from Python"
        assert row["median_ms"] == pytest.approx(3.0) and row["ours"]["median_ms"] == pytest.approx(1.0)
        assert row["ratio"] == pytest.approx(3.0)
        assert row["limit_ms"] == pytest.approx(1.0) and row["share_of_limit"] == pytest.approx(1 / 3)
        assert row["sets"] == 7 and row["input_mb"] == 0.003 and row["peak_mb"] == 5.0
        # a second for both: 14 calls of 4 ms a round
        assert row["rounds"] == int(1.0 / (14 * 0.004))

    def test_a_cut_in_time_leaves_enough_rounds(self, contest: CudaContest) -> None:
        slow = taking(contest, 10.0)
        assert contest(slow, slow, draw, mode=EAGER, **FACTS)["rounds"] == measure_cuda.MIN_ROUNDS

    def test_ours_and_the_contender_take_turns_over_the_same_inputs(self, contest: CudaContest) -> None:
        log: list[Any] = []
        contest(taking(contest, 1.0, log, "b"), taking(contest, 1.0, log, "a"), draw, mode=EAGER, **FACTS)
        sweeps = [log[i : i + 14] for i in range(len(log) - 14 * 14, len(log), 14)]  # the seven rounds at the end
        assert [{name for name, _ in part} for part in sweeps] == [{"a"}, {"b"}] * 7
        assert all([seed for _, seed in part] == [i % 7 for i in range(14)] for part in sweeps)

    def test_a_graph_holds_a_whole_sweep(self, contest: CudaContest) -> None:
        row = contest(taking(contest, 0.002), taking(contest, 0.001), draw, mode=GRAPH, **FACTS)
        assert isinstance(contest.gpu, FakeGpu) and contest.gpu.graphs == 2
        assert row["what"] == "step, in a CUDA graph" and row["median_ms"] == pytest.approx(2.0)

    def test_disagreement_is_a_failure(self, contest: CudaContest) -> None:
        def disagree(ours: Tensor, theirs: Tensor) -> None:
            assert torch.equal(ours, theirs + 1)

        with pytest.raises(AssertionError):
            contest(taking(contest, 1.0), taking(contest, 1.0), draw, mode=EAGER, agree=disagree, **FACTS)
        assert contest.results is not None and not contest.results.exists()

    def test_a_peer_that_does_not_run_is_told_from_ours(self, contest: CudaContest) -> None:
        def broken(x: Tensor) -> Call:
            raise RuntimeError("no kernel image\nmore")

        with pytest.raises(PeerFailed, match=r"^RuntimeError: no kernel image$"):
            contest(broken, taking(contest, 1.0), draw, mode=EAGER, **FACTS)
        with pytest.raises(RuntimeError, match="no kernel image") as caught:
            contest(taking(contest, 1.0), broken, draw, mode=EAGER, **FACTS)
        assert not isinstance(caught.value, PeerFailed)
        with pytest.raises(RuntimeError) as caught:
            contest(broken, broken, draw, mode=EAGER, **FACTS)
        assert not isinstance(caught.value, PeerFailed)

    def test_an_unknown_mode(self, contest: CudaContest) -> None:
        with pytest.raises(ValueError, match="mode must be"):
            contest(taking(contest, 1.0), taking(contest, 1.0), draw, mode="fast", **FACTS)

    def test_the_file_is_added_to_and_makes_a_table(self, contest: CudaContest) -> None:
        assert contest.results is not None
        ours = taking(contest, 0.002)
        for _ in range(2):
            contest(taking(contest, 0.006), ours, draw, mode=EAGER, **FACTS)
            facts = {**FACTS, "contender": "protokernels"}
            contest(ours, ours, draw, mode=EAGER, limit=(1e9, 0, "fp32"), **facts)
        results = json.loads(contest.results.read_text())
        assert len(results["rows"]) == 2
        text = table.table(results)
        assert "### Step, launched from Python" in text
        assert "| 100 | a peer | 6 | 6 | 6 to 6 | 2 | 3 (3) |  |" in text
        assert "A device, driver 1, CUDA 13; ceilings by data sheet" in text

    def test_rows_held_are_known_by_mode(self, contest: CudaContest) -> None:
        contest.held = frozenset({("step, in a CUDA graph", "100", "a peer")})
        assert contest.holds(GRAPH, FACTS) and not contest.holds(EAGER, FACTS)


class TestPrototypes:
    """The benchmark of `prototypes` itself, on a device that is the CPU."""

    CASE = bench_prototypes.CASES[0]

    @pytest.mark.parametrize(
        ("name", "mode"), [pair for pair in bench_prototypes.STEP_ON_CUDA if "compile" not in pair[0]]
    )
    def test_step(self, contest: CudaContest, name: str, mode: str) -> None:
        contest.seconds = 0.01
        bench_prototypes.test_step_on_cuda(contest, self.CASE, name, mode)
        self.check(contest, name, mode)

    @pytest.mark.parametrize(("name", "mode"), [("protokernels", EAGER), ("torch", GRAPH)])
    def test_gradient(self, contest: CudaContest, name: str, mode: str) -> None:
        contest.seconds = 0.01
        bench_prototypes.test_gradient_on_cuda(contest, self.CASE, name, mode)
        self.check(contest, name, mode)

    @staticmethod
    def check(contest: CudaContest, name: str, mode: str) -> None:
        assert contest.results is not None
        (row,) = json.loads(contest.results.read_text())["rows"]
        assert row["contender"] == name and row["mode"] == mode and row["case"] == TestPrototypes.CASE.name
        assert ("limit_ms" in row) == name.startswith("protokernels")

    def test_every_peer_of_the_step_is_there(self) -> None:
        named = {name for name, _ in bench_prototypes.STEP_ON_CUDA}
        assert {*prototypes_peers.TORCH_PEERS, *prototypes_peers.CUDA_LIBRARY_PEERS} <= named
