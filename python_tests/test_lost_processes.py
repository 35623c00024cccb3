# SPDX-License-Identifier: MIT
"""Two processes train together and one is killed: the other ends by itself, says which and what to do, and both resume."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from accelerate.state import PartialState

from protokernels.cli import main
from protokernels.training import Session, lost_processes
from python_tests.moments import child
from python_tests.test_survival_commands import PHANTOMS, content, train
from python_tests.test_training import assert_same_bits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

SWEEP = ["sweep", "vaesim", "--data", "digits", "--epochs", "1", "--batch-size", "1000", "--over", "latent_dim=2,3"]
SWEEP += ["--no-figures", "--device", "cpu", "--quiet"]
SECONDS = 60.0
"""Until the other process must have ended; a second by itself, more on a busy machine."""


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """A process that did not end would keep pytest from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


def two(work: Callable[[int], int]) -> list[Any]:
    """Starts ``work(rank)`` in two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> int:
        PartialState._reset_state()  # of a training in the process that was forked
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()})
        return work(rank)

    return [child(lambda rank=rank: start(rank)) for rank in (0, 1)]


def codes(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(PHANTOMS, folder.with_name("first")) == 0  # here, so that a child finds its modules imported
    assert codes(two(lambda rank: train(PHANTOMS, folder))) == [0, 0]
    return content(folder)


@pytest.mark.parametrize("victim", [1, 0])
def test_one_is_killed_the_other_says_so_and_both_resume(
    tmp_path: Path, whole: dict[str, Any], victim: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of an epoch of the second stage."""
    folder, optimise, steps = tmp_path / "run", Session.optimise, []

    def work(rank: int) -> int:
        def optimise_or_die(self: Session, *more: Any, **options: Any) -> None:
            steps.append(0)
            if rank == victim and len(steps) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            optimise(self, *more, **options)

        with mock.patch.object(Session, "optimise", optimise_or_die):
            return train(PHANTOMS, folder)

    processes = two(work)
    processes[victim].join(300)
    died = time.monotonic()
    processes[1 - victim].join(SECONDS)
    assert time.monotonic() - died < SECONDS
    assert (processes[victim].exitcode, processes[1 - victim].exitcode) == (-signal.SIGKILL, 1)
    said = capfd.readouterr().err
    name = f"process {victim} of 2 (number {processes[victim].pid} on {socket.gethostname()}) has ended"
    assert said.count("\n") == 1 and name in said, said
    assert "start all 2 again with --resume" in said and str(folder) in said
    if victim == 0:
        return  # the same again
    assert codes(two(lambda rank: train(PHANTOMS, folder, "--resume"))) == [0, 0]
    assert_same_bits(whole, content(folder))


@pytest.mark.usefixtures("whole")
def test_a_process_that_fails_says_so_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Process 1 cannot read something: its own words, and those of process 0, which is told."""

    def work(rank: int) -> int:
        def broken(self: Session, *more: Any, **options: Any) -> None:
            if rank == 1:
                raise PermissionError(13, "Permission denied", "volume.nii.gz")
            optimise(self, *more, **options)

        with mock.patch.object(Session, "optimise", broken):
            return train(PHANTOMS, tmp_path / "run")

    optimise = Session.optimise
    assert codes(two(work)) == [1, 1]
    said = capfd.readouterr().err
    assert "process 1: [Errno 13] Permission denied: 'volume.nii.gz'" in said
    assert "process 1 of 2" in said and "Traceback" not in said


def test_who_has_ended(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that nobody has collected yet has ended as well; other machines are not looked at."""
    process = child(lambda: 0)
    while process.pid and not lost_processes.has_ended(process.pid):
        time.sleep(0.01)
    assert process.exitcode == 0 and not lost_processes.has_ended(os.getpid())
    here = socket.gethostname()
    peers = [lost_processes.Peer(here, os.getpid()), lost_processes.Peer("elsewhere", process.pid)]
    with mock.patch.object(lost_processes, "PATIENCE", 0.1):
        assert lost_processes._ended(peers) == []
    assert "none has ended here; see to elsewhere" in lost_processes._message(peers, [], Path("runs/a"))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inconsistent tensor size"), lost_processes.losses_told(tmp_path):
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.usefixtures("whole")
def test_a_process_without_memory_says_so_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> int:
        def broken(self: Session, *more: Any, **options: Any) -> None:
            if rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            optimise(self, *more, **options)

        with mock.patch.object(Session, "optimise", broken):
            return train(PHANTOMS, tmp_path / "run")

    optimise = Session.optimise
    assert codes(two(work)) == [1, 1]
    said = capfd.readouterr().err
    assert "protokernels: process 1: there is not enough memory (CUDA out of memory" in said
    assert "process 1 of 2" in said and "Traceback" not in said


@pytest.mark.parametrize("loser", [0, 1])
def test_a_job_that_fails_in_one_process_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], loser: int
) -> None:
    """It must not begin the next job, in which the others do not join it: they wait in the first."""

    def work(rank: int) -> int:
        def broken(self: Session, *more: Any, **options: Any) -> None:
            if rank == loser:
                raise ValueError("no such thing")
            optimise(self, *more, **options)

        with mock.patch.object(Session, "optimise", broken):
            return main([*SWEEP, "--out", str(tmp_path / "sweep")])

    optimise = Session.optimise
    assert codes(two(work)) == [1, 1]
    said = capfd.readouterr().err
    assert f"protokernels: {'process 1: ' if loser else ''}latent_dim-2: no such thing; all processes end" in said
    assert "--resume --out" in said and "Traceback" not in said
    assert not (tmp_path / "sweep" / "latent_dim-3").exists()


def test_a_job_that_diverges_ends_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All processes know of it."""

    def work(rank: int) -> int:
        def record(self: Session, step: Any, **values: Any) -> None:
            broken = self.run.path.name == "latent_dim-2" and rank == 1
            recorded(self, step, **{name: torch.nan if broken else value for name, value in values.items()})

        with mock.patch.object(Session, "record", record):
            return main([*SWEEP, "--out", str(tmp_path / "sweep")])

    recorded = Session.record
    assert codes(two(work)) == [1, 1]
    said = capfd.readouterr().err
    assert said.count("not finished: latent_dim-2: training diverged") == 1, said
    assert (tmp_path / "sweep" / "latent_dim-3" / "results.json").exists()
