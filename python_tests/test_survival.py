# SPDX-License-Identifier: MIT
"""Runs that are killed, or find no room, at any moment: the folder stays usable and the resumed run ends as an undisturbed one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.training import RunFolder, Session, WriteError, seed_everything
from python_tests.moments import audited, full_from, in_child, killed_at, watched
from python_tests.test_training import assert_same_bits, train_toy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")

EPOCHS = 3


def train(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    """Two steps an epoch, a checkpoint after each."""
    seed_everything(0)
    return train_toy(folder, epochs=EPOCHS, batch_size=20, resume=resume)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, every one whole; without the time that an epoch took."""
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    found = RunFolder(folder).metrics()
    assert len(found) == len(text.splitlines())
    return [line | {"seconds": 0} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """State and metrics of an undisturbed run, and the moments it had."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with watched(folder, lambda *_: None) as kinds:
        state = train(folder)
    return state, lines(folder), kinds


def assert_resumes(folder: Path, whole: tuple[dict[str, Any], list[dict[str, Any]], list[str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no checkpoint may be damaged
        state = train(folder, resume=True)
    assert_same_bits(whole[0], state)
    assert lines(folder) == whole[1]
    names = sorted(path.name for path in folder.rglob("*"))
    assert not [name for name in names if name.endswith(".partial")]
    kept = [name.split("-")[1] for name in names if name.endswith(".pt")]
    assert kept in (["0002", "0003"], ["0001", "0002", "0003"])  # three after an end between writing and tidying


def test_every_change_of_the_disk_is_a_moment(tmp_path: Path) -> None:
    kinds, events = audited(tmp_path / "run", lambda: train(tmp_path / "run"))
    assert kinds == events and {"open", "replace", "remove", "folder"} <= set(kinds)


class TestKills:
    def test_killed_at_every_moment(self, tmp_path: Path, whole: Any) -> None:
        begun = multiprocessing.Value("i", 0)
        steps = Session.steps

        def counted(self: Session) -> Any:
            begun.value = self.epoch  # so many epochs are done
            return steps(self)

        def work() -> None:
            with mock.patch.object(Session, "steps", counted), watched(folder, killed_at(number)):
                train(folder)

        assert len(whole[2]) > 30
        for number in range(len(whole[2])):
            folder = tmp_path / str(number)
            begun.value = 0
            assert in_child(work) == -signal.SIGKILL
            if (folder / "config.json").exists():
                done = [file.epoch for file in RunFolder.open(folder).checkpoints.files()]
                assert max(done, default=0) >= begun.value, "more than the epoch of the kill is lost"
            assert_resumes(folder, whole)


class TestNoRoom:
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
    def test_from_any_moment_on(self, tmp_path: Path, whole: Any, code: int) -> None:
        """One sentence with the reason; good checkpoints stay, nothing is half there, and the run goes on once there is room."""
        reasons = {errno.ENOSPC: "No space left on device.*make room", errno.EROFS: "Read-only file system.*written to"}
        for number, kind in enumerate(whole[2]):
            if kind == "remove":
                continue  # what cannot be removed stays
            folder = tmp_path / str(number)
            with watched(folder, full_from(number, code)), pytest.raises(WriteError, match=reasons[code]) as caught:
                train(folder)
            assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
            for path in [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]:
                assert path.read_bytes()[-1:] in (b"\n", b"") or path.suffix == ".pt", f"{path} is cut short"
            sound = RunFolder(folder).checkpoints
            assert len(sound.files()) <= 3 and (sound.load() is None) == (not sound.files())
            assert_resumes(folder, whole)

    def test_a_folder_that_vanishes(self, tmp_path: Path, whole: Any) -> None:
        """At every moment the run ends, and leaves no folder without a config.json; a resumed one begins again."""
        for number, kind in enumerate(whole[2]):
            folder = tmp_path / str(number)

            def strike(at: int, _kind: str, _path: Path, folder: Path = folder, number: int = number) -> None:
                if at == number and folder.exists():
                    shutil.rmtree(folder)

            with watched(folder, strike):
                try:
                    state = train(folder)
                except (WriteError, AssertionError) as error:
                    assert isinstance(error, WriteError) or number > len(whole[2]) - 4, (number, kind, error)
                else:
                    assert number < 2 and state
            assert not folder.exists() or (folder / "config.json").exists()
