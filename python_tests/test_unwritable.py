# SPDX-License-Identifier: MIT
"""A folder that cannot be made: whatever wants to write into it says which one, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.data import digits
from protokernels.inference import segment_file
from protokernels.results import update_rows
from protokernels.training import WriteError
from python_tests.nifti_files import write_nifti
from python_tests.test_predict import Threshold
from python_tests.test_training_segmentation import SETTINGS, fit, model, stages

ROWS = str(Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "vaesim.json")


def refuse(self: Path, *_: Any, **__: Any) -> None:
    if not self.is_dir():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "vaesim", "--over", "latent_dim=2"],
        ["table", "vaesim", ROWS, "--out", "new/table.md"],
        ["table", "vaesim", ROWS, "--results", "new/rows.json"],
        ["table", "vaesim", "--data", "mine.npz", "--preset", "pixels", "--folder", "new"],
    ],
)
def test_commands(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {"train": digits.load().train, "test": digits.load().test}
    arrays = {f"{name}_{kind}": getattr(split, kind) for name, split in splits.items() for kind in ("images", "labels")}
    np.savez("mine.npz", **arrays)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "could not be written (Read-only file system): let its folder be written to" in said
    assert ("new" if "--over" not in words else "runs/vaesim-digits-fair-sweep") in said


def test_a_run_that_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to resume, and without --out a run before it would be taken."""
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["train", "vaesim", "--epochs", "1", "--out", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "new could not be written (Read-only file system): let its folder be written to; or pass another --out" in said
    )
    assert "--resume" not in said


@pytest.mark.parametrize("what", ["a label volume", "rows", "a stage"])
def test_functions(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = write_nifti(tmp_path / "v.nii", np.zeros((4, 4, 2), np.int16))
    new = tmp_path / "new"
    do: dict[str, Callable[[], Any]] = {
        "a label volume": lambda: segment_file(Threshold(), volume, new / "label.nii", image_size=4),
        "rows": lambda: update_rows(new / "rows.json", lambda rows: rows),
        "a stage": lambda: stages(new).before("global", {}, model(), 8, SETTINGS, fit),
    }
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WriteError, match=r"new.* could not be written .*let its folder be written to"):
        do[what]()
