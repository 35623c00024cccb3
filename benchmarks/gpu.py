# SPDX-License-Identifier: MIT
"""One command for a machine with a GPU; `benchmarks/gpu.sh` starts it.

    benchmarks/gpu.sh [STAGE ...] [--out FOLDER] [--again] [--patience FACTOR] [--dry-run]

Stages run in the order of `STAGES`, each in processes of its own with its own time limit. Each writes FOLDER/<stage>.json
and FOLDER/<stage>.log when it ends, however it ends, and the summary is written anew, so a run that is cut off leaves
what it has. A stage that passed on this commit is skipped next time unless `--again`; one that was cut off goes on.
The command ends with 1 if a stage failed, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.gpu_reports import Details, read_rows, read_sanitizer, read_tests, summary_text

PASSED, FAILED, TIMED_OUT, CUT_OFF, IMPOSSIBLE = "passed", "failed", "timed out", "cut off", "not possible here"
FINE = (PASSED, CUT_OFF, IMPOSSIBLE)
ROWS = "rows.json"
CHECK_BUILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from protokernels import _native
info = _native.build_info()
print(_native.LIBRARY or _native.PROBLEM, info)
sys.exit(0 if info.get("cuda_archs") else "the installed library holds no CUDA kernels")
"""


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int
    seconds: float
    timed_out: bool = False


Runner = Callable[[Sequence[str], dict[str, str], Path, float], Outcome]
"""Runs a command with additional environment variables, adding to a log, for so many seconds at most."""


@dataclass(frozen=True)
class Stage:
    """One part of the work. `partial`: what it has when its time is over counts, and it goes on in the next run."""

    name: str
    what: str
    limit: float
    commands: Callable[[Path], list[list[str]]]
    details: Callable[[Path], Details] = lambda out: Details()
    environment: dict[str, str] = field(default_factory=dict)
    partial: bool = False
    tool: str | None = None


def pytest_command(*arguments: str) -> list[str]:
    """The `pytest` of this interpreter: unlike `python -m pytest` it does not put the checkout before what is installed."""
    beside = Path(sys.executable).with_name("pytest")
    return [str(beside) if beside.exists() else "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def in_parallel() -> list[str]:
    """Options that run tests in several processes, half as many as cores and at most eight, where pytest-xdist is installed."""
    workers = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, in CUDA_HOME or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which(name), *(shutil.which(f"{home}/bin/{name}") for home in homes if home)]
    return next((path for path in found if path), None)


def sanitized(out: Path, tool: str) -> list[list[str]]:
    """The kernels' value tests, small and of odd sizes, under one tool of compute-sanitizer."""
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    tests = pytest_command(
        "-m",
        "cuda",
        "-k",
        "TestValue and cuda-native and not properties",
        f"--junitxml={out / tool}.xml",
        *in_parallel(),
        "python_tests",
    )
    return [
        [
            find_tool("compute-sanitizer") or "compute-sanitizer",
            "--tool",
            tool,
            "--target-processes",
            "all",
            *options,
            "--error-exitcode",
            "99",
            *tests,
        ]
    ]


def benchmarks(out: Path, stage: str, selection: str) -> list[list[str]]:
    files = sorted(str(path.relative_to(measure.ROOT)) for path in (measure.ROOT / "benchmarks").glob("bench_*.py"))
    options = ["--device", "cuda", "--seconds", "0.2", "--missing", "--results", str(out / ROWS)]
    return [pytest_command(*files, *options, "-k", selection, f"--junitxml={out / stage}.xml")]


NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an access beyond a tensor is then one beyond an allocation
STAGES = (
    Stage(
        "build",
        "pip install of this checkout for the GPU found",
        120,
        lambda out: [
            [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(measure.ROOT)],
            [sys.executable, "-c", CHECK_BUILD],
        ],
        environment={"PROTOKERNELS_CUDA": "on", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    ),
    Stage(
        "tests",
        "every test marked cuda",
        120,
        lambda out: [pytest_command("-m", "cuda", f"--junitxml={out / 'tests.xml'}", *in_parallel(), "python_tests")],
        lambda out: read_tests(out / "tests.xml"),
    ),
    Stage(
        "benchmarks",
        "kernels against their peers and the roofline",
        110,
        lambda out: benchmarks(out, "benchmarks", "not compile"),
        lambda out: read_rows(out / ROWS, out / "benchmarks.xml"),
        partial=True,
    ),
    Stage(
        "memcheck",
        "compute-sanitizer memcheck over the kernels' value tests",
        40,
        lambda out: sanitized(out, "memcheck"),
        lambda out: read_sanitizer(out / "memcheck.log"),
        NO_CACHE,
        partial=True,
        tool="compute-sanitizer",
    ),
    Stage(
        "racecheck",
        "compute-sanitizer racecheck over the kernels' value tests",
        40,
        lambda out: sanitized(out, "racecheck"),
        lambda out: read_sanitizer(out / "racecheck.log"),
        NO_CACHE,
        partial=True,
        tool="compute-sanitizer",
    ),
    Stage(
        "compiled",
        "kernels against torch.compile, which takes its time",
        50,
        lambda out: benchmarks(out, "compiled", "compile"),
        lambda out: read_rows(out / ROWS, out / "compiled.xml"),
        partial=True,
    ),
)
GROUPS = {"sanitizer": ("memcheck", "racecheck"), "summary": ()}


def heed_interrupts() -> None:
    """A shell starts what runs in its background with interrupts ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_process(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> Outcome:
    """Runs a command in a session of its own. When its time is over it is interrupted, so that pytest still writes its report."""
    start = time.monotonic()
    with log.open("a") as file:
        print(f"$ {' '.join(command)}", file=file, flush=True)
        try:
            process = subprocess.Popen(
                command,
                cwd=measure.ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )
        except OSError as error:
            print(error, file=file)
            return Outcome(127, time.monotonic() - start)
        timed_out = False
        for patience, number in ((seconds, signal.SIGINT), (10, signal.SIGTERM), (5, signal.SIGKILL)):
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                timed_out = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return Outcome(process.wait(), time.monotonic() - start, timed_out)


def write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def run_stage(stage: Stage, out: Path, commit: str, runner: Runner, patience: float) -> dict[str, Any]:
    """Runs the commands of a stage and writes what came of them, also when it failed."""
    log, limit = out / f"{stage.name}.log", stage.limit * patience
    log.write_text("")
    record: dict[str, Any] = {"stage": stage.name, "what": stage.what, "commit": commit, "limit": limit, "seconds": 0.0}
    if stage.tool is not None and find_tool(stage.tool) is None:
        record |= {"state": IMPOSSIBLE, **asdict(Details(f"{stage.tool} is not installed here"))}
    else:
        state = PASSED
        for command in stage.commands(out):
            outcome = runner(command, stage.environment, log, limit - record["seconds"])
            record["seconds"] = round(record["seconds"] + outcome.seconds, 1)
            if outcome.timed_out:
                state = CUT_OFF if stage.partial else TIMED_OUT
            elif outcome.code != 0:
                state = FAILED
            if state != PASSED:
                break
        details = stage.details(out)
        if state in (TIMED_OUT, CUT_OFF):
            details.found += ", until its time was over"
        if state in (PASSED, CUT_OFF) and details.problems:
            state = FAILED
        if state == FAILED and not details.problems:
            details.problems.append("; ".join(log.read_text().strip().splitlines()[-3:]))
        record |= {"state": state, **asdict(details)}
    write(out / f"{stage.name}.json", record)
    return record


def write_summary(out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Collects what the stages wrote into summary.json and summary.md."""
    records = [record for stage in STAGES if (record := read(out / f"{stage.name}.json"))]
    missing = [stage.name for stage in STAGES if stage.name not in {record["stage"] for record in records}]
    failed = [record["stage"] for record in records if record["state"] not in FINE]
    summary = {**facts, "failed": failed, "not_run": missing, "stages": records}
    write(out / "summary.json", summary)
    (out / "summary.md").write_text(summary_text(summary, read(out / ROWS)))
    return summary


def keep_rows(rows: Path, commit: str, repeated: Sequence[str]) -> None:
    """Drops rows of other commits and of the stages that are repeated: `--missing` would take them for done."""
    results = read(rows)
    if not results:
        return
    old = {name for name, facts in results["runs"].items() if facts["commit"] != commit}
    stage_of = {True: "compiled", False: "benchmarks"}
    results["rows"] = [
        row
        for row in results["rows"]
        if row["run"] not in old and stage_of["compile" in row["contender"]] not in repeated
    ]
    write(rows, results)


def find_gpu() -> dict[str, Any]:
    """Facts of the GPU that torch sees; ends the program where there is none."""
    import torch

    if not torch.cuda.is_available():
        print(
            f"gpu: expected a GPU that torch can use; torch {torch.__version__} (CUDA {torch.version.cuda}) sees none. "
            "Run this on a machine with an NVIDIA driver and a CUDA build of torch. Nothing was run.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of these names, in the order in which they run; all of them for no name."""
    known = [stage.name for stage in STAGES]
    unknown = [name for name in names if name not in (*known, *GROUPS)]
    if unknown:
        raise SystemExit(f"gpu: stages are {', '.join((*known, *GROUPS))}; got {', '.join(unknown)}")
    wanted = {part for name in names for part in GROUPS.get(name, (name,))}
    return [stage for stage in STAGES if not names or stage.name in wanted]


def run(
    stages: Sequence[Stage],
    out: Path,
    facts: dict[str, Any],
    runner: Runner,
    again: bool = False,
    patience: float = 1.0,
) -> int:
    """Runs the stages that are not finished on this commit, one after the other; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {"date": measure.now(), "commit": measure.commit(), **facts}
    keep_rows(out / ROWS, facts["commit"], [stage.name for stage in stages] if again else [])
    for stage in stages:
        before = read(out / f"{stage.name}.json")
        same = before.get("commit") == facts["commit"] and not facts["commit"].endswith("+changes")
        if not again and before.get("state") == PASSED and same:
            print(f"== {stage.name}: passed before; --again repeats it")
            continue
        print(f"== {stage.name}: {stage.what} (at most {stage.limit * patience:.0f} s)", flush=True)
        record = run_stage(stage, out, facts["commit"], runner, patience)
        found = f": {record['found']}" if record["found"] else ""
        print(f"== {stage.name}: {record['state']} after {record['seconds']:.0f} s{found}", flush=True)
        for problem in record["problems"][:5]:
            print(f"   {problem}")
        write_summary(out, facts)
    summary = write_summary(out, facts)
    print(f"{out / 'summary.md'}" + (f"; FAILED: {', '.join(summary['failed'])}" if summary["failed"] else ""))
    return 1 if summary["failed"] else 0


def main(arguments: Sequence[str] | None = None, runner: Runner = run_process) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="Everything that needs a GPU, in stages.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join((*(s.name for s in STAGES), *GROUPS))}")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/gpu-<its name>)")
    parser.add_argument("--again", action="store_true", help="also what passed on this commit before")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies every time limit (default: 1, 8 minutes in all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    stages = chosen(options.stages)
    if options.dry_run:
        out = options.out or measure.RESULTS / "gpu-NAME"
        for stage in stages:
            print(f"{stage.name}: {stage.what}; at most {stage.limit * options.patience:.0f} s")
            for command in stage.commands(out):
                print("  " + " ".join(part if part != CHECK_BUILD else "..." for part in command))
        return 0
    facts = find_gpu()
    out = options.out or measure.RESULTS / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-"))
    return run(stages, out.resolve(), facts, runner, options.again, options.patience)


if __name__ == "__main__":
    sys.exit(main())
