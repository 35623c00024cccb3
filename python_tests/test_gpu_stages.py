# SPDX-License-Identifier: MIT
"""`benchmarks/gpu.sh` without a GPU: its stages under a runner that only pretends, and one real start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_reports
from benchmarks.gpu import Outcome

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"gpu": "A device", "capability": "9.0", "gpus": 1, "torch": "2", "cuda": "13", "commit": "abc"}
NAMES = [stage.name for stage in gpu.STAGES]

JUNIT = """<testsuites><testsuite>
<testcase classname="a.TestValue" name="test_one"/>
<testcase classname="a.TestValue" name="test_two"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase classname="a.TestValue" name="test_three"><skipped message="torch sees fewer than two GPUs"/></testcase>
<testcase classname="a.TestValue" name="test_four"><error message="failed on setup"/></testcase>
</testsuite></testsuites>"""
PASSING = '<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>'
ROW = {
    "what": "step",
    "case": "100",
    "order": 0,
    "contender": "a peer",
    "ratio": 2.0,
    "run": "now",
    "min_ms": 1.0,
    "p25_ms": 1.0,
    "median_ms": 1.0,
    "p75_ms": 1.0,
    "ours": {"median_ms": 0.5, "min_ms": 0.5},
}
MEASURED = {"fp32": 1.0, "tf32": 2.0, "bf16": 3.0, "memory": 4.0}
DEVICE = {"name": "A device", "driver": "1", "cuda": "13", "measured": MEASURED, "data_sheet": None}
ROWS = {"runs": {"now": {"commit": "abc", "device": DEVICE, "versions": {}}}, "rows": [ROW]}


class Pretender:
    """A runner that ends as it is told and leaves the files that the real commands would leave."""

    def __init__(self, out: Path, **outcomes: Outcome) -> None:
        self.out, self.outcomes = out, outcomes
        self.ran: list[str] = []
        self.limits: dict[str, float] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.reports: dict[str, str] = {}

    def __call__(self, command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> Outcome:
        stage = log.stem
        self.ran.append(stage)
        self.limits[stage], self.environments[stage] = seconds, environment
        log.write_text(log.read_text() + self.reports.get(stage, f"{stage}: the last line\n"))
        for argument in command:
            if argument.startswith("--junitxml="):
                Path(argument.partition("=")[2]).write_text(self.reports.get("junit", PASSING))
        if stage in ("benchmarks", "compiled"):
            (self.out / gpu.ROWS).write_text(json.dumps(ROWS))
        return self.outcomes.get(stage, Outcome(0, 3.0))


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/bin/{name}")


def states(out: Path) -> dict[str, str]:
    return {record["stage"]: record["state"] for record in json.loads((out / "summary.json").read_text())["stages"]}


@pytest.mark.usefixtures("tools")
class TestStages:
    def test_all_of_them_pass(self, tmp_path: Path) -> None:
        runner = Pretender(tmp_path)
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, runner) == 0
        assert list(dict.fromkeys(runner.ran)) == NAMES
        assert states(tmp_path) == dict.fromkeys(NAMES, "passed")
        assert runner.environments["build"]["PROTOKERNELS_CUDA"] == "on"
        assert runner.environments["memcheck"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def test_the_limits_make_eight_minutes(self) -> None:
        assert sum(stage.limit for stage in gpu.STAGES) <= 480

    def test_finished_stages_are_skipped(self, tmp_path: Path) -> None:
        gpu.run(gpu.STAGES, tmp_path, FACTS, Pretender(tmp_path, tests=Outcome(1, 1.0)))
        runner = Pretender(tmp_path)
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, runner) == 0
        assert runner.ran == ["tests"]
        again = Pretender(tmp_path)
        gpu.run(gpu.chosen(["tests", "sanitizer"]), tmp_path, FACTS, again, again=True)
        assert again.ran == ["tests", "memcheck", "racecheck"]

    @pytest.mark.parametrize("commit", ["def", "abc+changes"])
    def test_another_commit_is_another_matter(self, tmp_path: Path, commit: str) -> None:
        for _ in range(2):
            runner = Pretender(tmp_path)
            gpu.run(gpu.chosen(["tests"]), tmp_path, FACTS, runner)
        assert runner.ran == []
        for _ in range(2):
            gpu.run(gpu.chosen(["tests"]), tmp_path, {**FACTS, "commit": "abc+changes"}, runner)
        assert runner.ran == ["tests", "tests"]
        gpu.run(gpu.chosen(["tests"]), tmp_path, {**FACTS, "commit": commit}, runner)
        assert runner.ran == ["tests"] * 3

    def test_a_failing_stage_does_not_stop_the_others(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        runner = Pretender(tmp_path, build=Outcome(2, 7.0))
        runner.reports["build"] = "nvcc fatal: no such file\n"
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, runner) == 1
        assert states(tmp_path) == {**dict.fromkeys(NAMES, "passed"), "build": "failed"}
        assert runner.ran.count("build") == 1  # what the stage would have done next is left out
        assert "FAILED: build" in capsys.readouterr().out
        assert "- build: nvcc fatal: no such file" in (tmp_path / "summary.md").read_text()

    def test_time_that_is_over(self, tmp_path: Path) -> None:
        late = {name: Outcome(-2, 99.0, timed_out=True) for name in ("tests", "benchmarks", "memcheck")}
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, Pretender(tmp_path, **late)) == 1
        expected = {"tests": "timed out", "benchmarks": "cut off", "memcheck": "cut off"}
        assert states(tmp_path) == {**dict.fromkeys(NAMES, "passed"), **expected}
        assert json.loads((tmp_path / "summary.json").read_text())["failed"] == ["tests"]
        runner = Pretender(tmp_path)
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, runner) == 0
        assert runner.ran == ["tests", "benchmarks", "memcheck"]  # what was cut off goes on

    def test_a_race_in_a_log_that_was_cut_off_is_a_failure(self, tmp_path: Path) -> None:
        runner = Pretender(tmp_path, racecheck=Outcome(-2, 40.0, timed_out=True))
        line = "========= Error: Race reported between Write access at 0x40 in sums.cuh:12 and Read access\n"
        runner.reports["racecheck"] = 2 * line
        assert gpu.run(gpu.STAGES, tmp_path, FACTS, runner) == 1
        assert states(tmp_path)["racecheck"] == "failed"
        assert "| 2 reports, until its time was over |" in (tmp_path / "summary.md").read_text()
        assert "- racecheck: 2 times: Error: Race reported" in (tmp_path / "summary.md").read_text()

    def test_limits_are_shared_by_the_commands_of_a_stage_and_can_be_stretched(self, tmp_path: Path) -> None:
        runner = Pretender(tmp_path, build=Outcome(0, 100.0))
        gpu.run(gpu.STAGES, tmp_path, FACTS, runner, patience=2.0)
        assert runner.limits["build"] == 140.0 and runner.limits["tests"] == 240.0

    def test_results_stand_when_a_run_is_cut_off(self, tmp_path: Path) -> None:
        class Unplugged(Pretender):
            def __call__(self, *arguments: Any) -> Outcome:
                if arguments[2].stem == "benchmarks":
                    raise KeyboardInterrupt
                return super().__call__(*arguments)

        with pytest.raises(KeyboardInterrupt):
            gpu.run(gpu.STAGES, tmp_path, FACTS, Unplugged(tmp_path))
        assert states(tmp_path) == {"build": "passed", "tests": "passed"}
        assert "| benchmarks | not run | | | |" in (tmp_path / "summary.md").read_text()

    def test_rows_of_another_commit_are_measured_again(self, tmp_path: Path) -> None:
        (tmp_path / gpu.ROWS).write_text(json.dumps(ROWS))
        gpu.run(gpu.chosen(["tests"]), tmp_path, FACTS, Pretender(tmp_path))
        assert json.loads((tmp_path / gpu.ROWS).read_text())["rows"] == [ROW]
        gpu.run(gpu.chosen(["compiled"]), tmp_path, FACTS, Pretender(tmp_path), again=True)
        assert json.loads((tmp_path / gpu.ROWS).read_text())["rows"] == [ROW]
        gpu.run(gpu.chosen(["tests"]), tmp_path, {**FACTS, "commit": "def"}, Pretender(tmp_path))
        assert json.loads((tmp_path / gpu.ROWS).read_text())["rows"] == []


class TestTools:
    def test_a_tool_that_is_not_there_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "find_tool", lambda name: None)
        runner = Pretender(tmp_path)
        assert gpu.run(gpu.chosen(["sanitizer"]), tmp_path, FACTS, runner) == 0
        assert runner.ran == []
        row = "| memcheck | not possible here | 0 | compute-sanitizer is not installed here | abc |"
        assert row in (tmp_path / "summary.md").read_text()

    def test_a_tool_may_lie_in_the_toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin/cuda-program"
        program.touch(mode=0o755)
        assert gpu.find_tool(program.name) is None
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert gpu.find_tool(program.name) == str(program)


class TestReports:
    def test_pytest(self, tmp_path: Path) -> None:
        (tmp_path / "tests.xml").write_text(JUNIT)
        details = gpu_reports.read_junit(tmp_path / "tests.xml")
        assert details.found == "1 passed, 2 failed, 1 skipped"
        assert details.problems == ["a.TestValue::test_two: assert 1 == 2", "a.TestValue::test_four: failed on setup"]
        assert details.left_out == {"torch sees fewer than two GPUs": ["a.TestValue::test_three"]}

    @pytest.mark.parametrize(("text", "found"), [(None, "pytest left no report"), ("<testsuites>", "damaged")])
    def test_no_report(self, tmp_path: Path, text: str | None, found: str) -> None:
        if text is not None:
            (tmp_path / "tests.xml").write_text(text)
        assert found in gpu_reports.read_junit(tmp_path / "tests.xml").found

    @pytest.mark.usefixtures("tools")
    def test_a_run_without_a_single_test_is_a_failure(self, tmp_path: Path) -> None:
        runner = Pretender(tmp_path)
        skipped = '<skipped message="the native library is not built"/>'
        runner.reports["junit"] = f"<testsuites><testcase classname='a' name='b'>{skipped}</testcase></testsuites>"
        assert gpu.run(gpu.chosen(["tests"]), tmp_path, FACTS, runner) == 1
        text = (tmp_path / "summary.md").read_text()
        assert "- tests: no test ran: 0 passed, 0 failed, 1 skipped" in text
        assert "- tests: the native library is not built (1: a::b)" in text

    def test_sanitizer(self, tmp_path: Path) -> None:
        log = tmp_path / "memcheck.log"
        log.write_text(
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
            "=========     at assign_kernel\n2 passed in 3.1s\n========= ERROR SUMMARY: 1 error\n"
        )
        details = gpu_reports.read_sanitizer(log)
        assert details.found == "ERROR SUMMARY: 1 error; 2 passed in 3.1s"
        assert details.problems == ["1 times: Invalid __global__ read of size 4 bytes"]
        log.write_text("========= COMPUTE-SANITIZER\n")
        details = gpu_reports.read_sanitizer(log)
        assert details.found == "0 reports" and not details.problems

    @pytest.mark.usefixtures("tools")
    def test_summary(self, tmp_path: Path) -> None:
        runner = Pretender(tmp_path, tests=Outcome(1, 12.4))
        runner.reports["junit"] = JUNIT
        gpu.run(gpu.chosen(["tests", "benchmarks"]), tmp_path, FACTS, runner)
        text = (tmp_path / "summary.md").read_text()
        assert text.startswith("# protokernels on A device\n")
        assert "| tests | failed | 12 | 1 passed, 2 failed, 1 skipped | abc |" in text
        assert "| racecheck | not run | | | |" in text
        assert "- tests: a.TestValue::test_two: assert 1 == 2" in text
        assert "- tests: torch sees fewer than two GPUs (1: a.TestValue::test_three)" in text
        assert "| 100 | a peer | 1 | 1 | 1 to 1 | 0.500 | 2 (2) |  |" in text


class TestProcesses:
    def test_output_and_code(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        program = "import os, sys; print(os.environ['GREETING']); sys.exit(3)"
        outcome = gpu.run_process([sys.executable, "-c", program], {"GREETING": "good day"}, log, 60)
        assert outcome.code == 3 and not outcome.timed_out
        assert "good day" in log.read_text()

    def test_a_program_that_is_not_there(self, tmp_path: Path) -> None:
        outcome = gpu.run_process(["no-such-program"], {}, tmp_path / "log", 60)
        assert outcome.code == 127 and "no-such-program" in (tmp_path / "log").read_text()

    def test_a_late_process_is_interrupted_and_may_write_its_report(self, tmp_path: Path) -> None:
        (tmp_path / "test_slow.py").write_text(
            "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(300)\n"
        )
        report = tmp_path / "report.xml"
        start = time.monotonic()
        command = [*gpu.pytest_command(str(tmp_path), f"--junitxml={report}"), "-c", os.devnull, "-x", "-s"]
        lean = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # loading plugins must not eat the time on a busy machine
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        try:
            outcome = gpu.run_process(command, lean, tmp_path / "log", 6)
        finally:
            signal.signal(signal.SIGINT, before)
        assert outcome.timed_out and time.monotonic() - start < 25
        assert report.exists(), (tmp_path / "log").read_text()
        assert "test_quick" in report.read_text() and "0 failed" in gpu_reports.read_junit(report).found


class TestCommand:
    def test_the_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert gpu.main(["--dry-run", "tests", "sanitizer"]) == 0
        plan = capsys.readouterr().out
        assert "tests: every test marked cuda; at most 120 s" in plan
        assert "compute-sanitizer --tool racecheck" in plan and "pip install" not in plan

    def test_an_unknown_stage(self) -> None:
        with pytest.raises(SystemExit, match=r"gpu: stages are build, tests, .*, summary; got test"):
            gpu.main(["test"])

    def test_every_benchmark_takes_part(self, tmp_path: Path) -> None:
        (command,) = gpu.benchmarks(tmp_path, "benchmarks", "x")
        files = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
        assert files and {Path(part).name for part in command if "bench_" in part} == files

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; this is about a machine without one")
    def test_without_a_gpu_it_says_so(self, tmp_path: Path) -> None:
        command = [str(ROOT / "benchmarks/gpu.sh"), "--out", str(tmp_path / "out")]
        environment = {**os.environ, "PYTHON": sys.executable}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert process.returncode == 2
        assert "gpu: expected a GPU that torch can use; torch" in process.stderr
        assert not (tmp_path / "out").exists()
