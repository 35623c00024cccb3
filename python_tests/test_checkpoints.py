# SPDX-License-Identifier: MIT
"""Checkpoints that are damaged, of another run or of a newer version: which one is used, what is said, what is kept."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="training needs the extra protokernels[train]")

from protokernels.training import (
    CheckpointError,
    CheckpointStore,
    Plan,
    RunFolder,
    RunFolderError,
    Session,
    make_accelerator,
)
from protokernels.training.checkpoints import FORMAT


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def positions(store: CheckpointStore) -> list[tuple[int, int]]:
    return [(file.epoch, file.step) for file in store.files()]


class TestDamage:
    def test_the_warning_names_both(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        before, newest = (store.save({"epoch": epoch}, epoch=epoch) for epoch in (1, 2))
        damage(newest)
        with pytest.warns(RuntimeWarning) as caught:
            assert store.load() == {"epoch": 1}
        (message,) = (str(each.message) for each in caught)
        assert f"{newest} is damaged" in message and f"{before}, the newest sound one, is used in its place" in message

    def test_what_was_passed_over_does_not_push_out_what_is_sound(self, tmp_path: Path) -> None:
        """The run goes on from epoch 1 and is stopped within epoch 2: of two files, neither may be the damaged one."""
        store = CheckpointStore(tmp_path)
        store.save({"epoch": 1}, epoch=1)
        damage(store.save({"epoch": 2}, epoch=2))
        with pytest.warns(RuntimeWarning):
            store.load()
        store.save({"epoch": 1, "step": 5}, epoch=1, step=5)
        assert positions(store) == [(1, 0), (1, 5)]
        assert store.load() == {"epoch": 1, "step": 5}  # and no warning any more
        damage(store.files()[-1].path)
        store.save({"epoch": 1, "step": 5, "seconds": 2}, epoch=1, step=5)  # the same place, other bytes
        assert positions(store) == [(1, 0), (1, 5)] and store.load() == {"epoch": 1, "step": 5, "seconds": 2}

    def test_all_damaged_is_one_sentence_with_every_reason(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path)
        paths = [store.save({"epoch": epoch}, epoch=epoch) for epoch in (1, 2)]
        for path in paths:
            damage(path)
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* remove the folder") as caught:
            store.load()
        assert all(str(path) in str(caught.value) for path in paths)

    @pytest.mark.parametrize(("code", "used"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)])
    def test_what_the_system_does_not_give_now_is_not_damaged(self, tmp_path: Path, code: int, used: bool) -> None:
        """A broken disk is; a missing right is no reason to train an epoch again and remove the file."""
        store = CheckpointStore(tmp_path)
        for epoch in (1, 2):
            store.save({"epoch": epoch}, epoch=epoch)
        read = Path.read_bytes

        def refused(self: Path) -> bytes:
            if "epoch-0002" in self.name:
                raise OSError(code, "refused", str(self))
            return read(self)

        with mock.patch.object(Path, "read_bytes", refused):
            if used:
                with pytest.warns(RuntimeWarning, match="epoch-0002.*refused.*epoch-0001"):
                    assert store.load() == {"epoch": 1}
            else:
                with pytest.raises(OSError, match="refused"):
                    store.load()


def session(folder: Path, *, width: int = 3, resume: bool = False, **plan: Any) -> Session:
    model = nn.Linear(width, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run, scheduler = RunFolder.create(folder, {}, resume=resume), torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plan = {"count": 4, "epochs": 2, "batch_size": 4, "seed": 0, **plan}
    return Session(run, make_accelerator("cpu"), model, optimizer, scheduler, Plan(**plan), resume, quiet=True)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run that is finished."""
    made = session(tmp_path / "run")
    for _ in made.epochs():
        for step in made.steps():
            made.optimise(made.model(torch.ones(1, 3)).sum(), step)
            made.record(step, value=1.0)
    return tmp_path / "run"


class TestOthers:
    def test_the_same_run_goes_on(self, trained: Path) -> None:
        assert session(trained, resume=True).epoch == 2

    def test_another_network(self, trained: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"does not fit this run .*size mismatch.*another configuration"
        ) as caught:
            session(trained, width=5, resume=True)
        assert "\n" not in str(caught.value) and str(trained) in str(caught.value)

    def test_other_data_or_batches(self, trained: Path) -> None:
        """The order of the images would be another one from here on."""
        with pytest.raises(CheckpointError, match="count: 4 there, 5 now"):
            session(trained, count=5, resume=True)
        with pytest.raises(CheckpointError, match="batch_size: 4 there, 2 now, seed: 0 there, 1 now"):
            session(trained, batch_size=2, seed=1, resume=True)

    def test_a_newer_version(self, trained: Path) -> None:
        store = RunFolder(trained).checkpoints
        state = store.load()
        assert state is not None
        store.save({**state, "format": FORMAT + 1}, epoch=3)
        with pytest.raises(CheckpointError, match=rf"newer version.*format {FORMAT + 1}, this version knows {FORMAT}"):
            session(trained, resume=True)

    def test_an_earlier_version_that_recorded_no_plan(self, trained: Path) -> None:
        store = RunFolder(trained).checkpoints
        state = store.load()
        assert state is not None
        store.save({key: value for key, value in state.items() if key != "plan"}, epoch=2)
        assert session(trained, resume=True).epoch == 2

    def test_something_else(self, trained: Path) -> None:
        store = RunFolder(trained).checkpoints
        store.save({"epoch": 3}, epoch=3)
        with pytest.raises(CheckpointError, match="does not fit this run"):
            session(trained, resume=True)

    def test_the_field_that_differs_is_named(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path, {"paper": "a", "config": {"epochs": 3, "data": "digits"}})
        with pytest.raises(RunFolderError, match=r"configuration \(config\.epochs: 3 there, 4 now\)"):
            RunFolder.create(tmp_path, {"paper": "a", "config": {"epochs": 4, "data": "digits"}}, resume=True)

    def test_leftovers_everywhere_in_the_run_are_removed(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path, {})
        for place in (".", "figures", "checkpoints", "weights"):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / "a.png.77.partial").write_bytes(b"half")
        RunFolder.create(tmp_path, {}, resume=True)
        assert not list(tmp_path.rglob("*.partial"))
