# SPDX-License-Identifier: MIT
"""``protokernels train``, killed, or on a disk that is full, not writable or gone: what is left, what is said, how it goes on.

``PROTOKERNELS_KILLS=50 pytest python_tests/test_survival_commands.py`` kills runs of three papers at so many random moments as well.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

import protokernels.commands  # here, so that a forked process need not import them
import protokernels.papers.local_contrast  # noqa: F401
from protokernels.cli import main
from protokernels.training import RunFolder
from protokernels.training.run_folder import sole_user
from python_tests import test_local_contrast_runs, test_optimized_views_runs
from python_tests.moments import Strike, child, in_child, watched
from python_tests.test_training import assert_same_bits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

KILLS = int(os.environ.get("PROTOKERNELS_KILLS", "0"))
"""Kills at random moments of each paper's runs in the long test; 50 take some minutes."""
PHANTOMS = ["local_contrast", *test_local_contrast_runs.WORDS]
"""Three stages in folders of their own, two epochs each, and weights that are kept: seven files are written in turns."""
CHOSEN = (  # the first start, then the resumptions: kind of the moment, file
    ("write", "run/config.json"),
    ("replace", "run/environment.json"),
    ("write", "global-.*/metrics.jsonl"),
    ("write", "local-.*/epoch-0001.*partial"),
    ("folder", "run/weights"),
    ("replace", "run/weights/epoch"),
    ("flush", "run/checkpoints"),
    ("replace", "run/checkpoints/epoch-0002"),
    ("replace", "run/results.json"),
)


def train(words: list[str], folder: Path, *more: str) -> int:
    return main(["train", *words, "--out", str(folder), "--no-figures", *more])


def content(folder: Path) -> dict[str, Any]:
    """What has to be the same after any disturbance: the newest state of every stage, metrics and scores; no times, no places."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("config.json")):
        run, name = RunFolder(path.parent), str(path.parent.relative_to(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # no checkpoint may be damaged
            found[f"{name} state"] = run.checkpoint()
        text = (run.path / "metrics.jsonl").read_text()
        assert text.endswith("\n") and len(run.metrics()) == len(text.splitlines())
        assert [line["epoch"] for line in run.metrics()] == list(range(1, len(run.metrics()) + 1))
        found[f"{name} metrics"] = run.metrics()
    found["scores"] = (RunFolder(folder).results() or {})["splits"]
    for path in folder.glob("*.jsonl"):
        found[path.name] = [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
    found["weights"] = sorted(path.name for path in folder.glob("weights/*"))
    assert not list(folder.rglob("*.partial"))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run, by one thread as in a child; here, so that a child finds its modules imported."""
    folder, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    assert train(PHANTOMS, folder) == 0
    torch.set_num_threads(threads)
    return content(folder)


def killed_first(kind: str, name: str) -> Strike:
    """SIGKILL at the first moment of its kind at such a file."""

    def strike(_number: int, this: str, path: Path) -> None:
        if this == kind and re.search(name, str(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def test_killed_at_chosen_moments(tmp_path: Path, whole: dict[str, Any]) -> None:
    """One run, killed nine times; every start but the first resumes."""
    folder = tmp_path / "run"

    def work() -> int:
        with watched(folder, killed_first(kind, name)):
            return train(PHANTOMS, folder, "--resume")

    for kind, name in CHOSEN:
        assert in_child(work) == -signal.SIGKILL, (kind, name)
    assert in_child(lambda: train(PHANTOMS, folder, "--resume")) == 0
    assert_same_bits(whole, content(folder))


class TestOneSentence:
    """What a real system does to a run."""

    def refused(self, work: Callable[[], int], capfd: pytest.CaptureFixture[str], advice: str) -> str:
        capfd.readouterr()
        assert in_child(work) == 1
        said = capfd.readouterr().err
        assert "Traceback" not in said and said.count("\n") == 1 and advice in said
        assert ("--resume" in said) == (advice == "--resume")
        return said

    def test_no_room(self, tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
        """A file may not be longer than 20 kB: the system refuses the rest of a checkpoint."""
        folder = tmp_path / "run"

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return train(PHANTOMS, folder)

        said = self.refused(work, capfd, "--resume")
        assert "epoch-0001" in said and "make room" in said
        assert list(folder.rglob("epoch-*")) == []
        assert in_child(lambda: train(PHANTOMS, folder, "--resume")) == 0
        assert_same_bits(whole, content(folder))

    @pytest.fixture
    def open_folder(self) -> Iterator[Path]:
        """A folder that other users reach, as those of pytest are not."""
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        yield folder
        shutil.rmtree(folder)

    @pytest.mark.usefixtures("whole")
    def test_a_folder_that_may_only_be_read(self, open_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """By a user whom the permissions bind: root becomes another one."""
        (open_folder / "run").mkdir(mode=0o555)

        def work() -> int:
            if os.geteuid() == 0:
                os.setuid(65534)
            return train(PHANTOMS, open_folder / "run")

        assert "config.json could not be written (Permission denied)" in self.refused(work, capfd, "another --out")
        assert list((open_folder / "run").iterdir()) == []

    def test_a_folder_that_vanishes(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "run"

        def strike(_number: int, kind: str, path: Path) -> None:
            if kind == "replace" and "epoch-0002" in path.name:
                shutil.rmtree(folder)

        def work() -> int:
            with watched(folder, strike):
                return train(PHANTOMS, folder)

        assert "its folder is gone; put it back" in self.refused(work, capfd, "--resume")
        assert not folder.exists()


def test_resume_without_out_goes_on_in_the_newest_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", *PHANTOMS, "--no-figures"]
    first, second = (Path("runs") / f"local_contrast-phantoms-global+local-block-fair{number}" for number in ("", "-2"))

    def killed() -> int:
        with watched(folder, killed_first("replace", "environment.json")):
            return main(words)

    for folder in (first, second):  # noqa: B007 - the child looks at it
        assert in_child(killed) == -signal.SIGKILL
    assert in_child(lambda: main([*words, "--resume"])) == 0
    assert sorted(Path("runs").iterdir()) == [first, second]
    assert (second / "results.json").exists() and not (first / "results.json").exists()


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with sole_user(folder):
        assert in_child(lambda: train(PHANTOMS, folder, "--resume")) == 1
    assert "another process is training in" in capfd.readouterr().err
    assert list(folder.iterdir()) == []


PAPERS = {
    "local_contrast": PHANTOMS,
    "optimized_views": [
        "optimized_views",
        *test_optimized_views_runs.WORDS,
    ],  # another file of lines beside metrics.jsonl
    "vaesim": ["vaesim", "--epochs", "3", "--image-size", "16", "--device", "cpu", "--quiet"],
}


@pytest.mark.skipif(not KILLS, reason="minutes; set PROTOKERNELS_KILLS=50")
@pytest.mark.parametrize("paper", PAPERS)
def test_killed_at_random_moments(tmp_path: Path, paper: str) -> None:
    """Whenever a run is killed, its folder is in order, and at most the epoch of the kill is lost."""
    words, generator = PAPERS[paper], random.Random(0)
    assert train(words, tmp_path / "first") == 0  # here, so that a child finds its modules imported
    started = time.monotonic()
    assert in_child(lambda: train(words, tmp_path / "whole")) == 0
    seconds, expected = time.monotonic() - started, content(tmp_path / "whole")
    kills, runs = 0, 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / str(runs)
        while True:
            process = child(partial(train, words, folder, "--resume"))
            process.join(generator.uniform(0, 0.7 * seconds))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
            assert_in_order(folder)
        assert_same_bits(expected, content(folder))
    print(f"{paper}: {kills} kills of {runs} runs of {seconds:.1f} s")


def assert_in_order(folder: Path) -> None:
    """After a kill: every file is whole, and a line of metrics is at most one ahead of the checkpoint."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    for path in folder.rglob("config.json"):
        run = RunFolder(path.parent)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            state = run.checkpoints.load() or {"epoch": 0}
        assert [line["epoch"] for line in run.metrics()] == list(range(1, len(run.metrics()) + 1))
        assert len(run.metrics()) - state.get("epoch", 0) in (0, 1)
