# SPDX-License-Identifier: MIT
"""What a command says to go on with, after Ctrl-C or a run that failed: followed to the letter, it works."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands need the extra protokernels[train]")

from protokernels.cli import main
from protokernels.training import Session, WriteError

VAESIM = {"epochs": 1, "image_size": 16, "batch_size": 400, "num_prototypes": 12, "networks": "small"}
PHANTOMS = {"image_size": 16, "width": 2, "depth": 2, "global_steps": 2, "local_steps": 2, "fine_tune_steps": 2}


def options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


COMMANDS = {
    "train": ["train", "vaesim", *options(VAESIM), "--no-figures"],
    "sweep": ["sweep", "vaesim", *options(VAESIM), "--over", "latent_dim=2,3", "--no-figures"],
    "ablate": ["ablate", "local-contrast", *options(PHANTOMS), "--only", "random", "--no-figures"],
    "table": [
        *["table", "vaesim", "--data", "digits", "--only", "paper=vaesim", "--preset", "fair", "--runs", "1"],
        *["--set", *(f"{name}={value}" for name, value in VAESIM.items())],
    ],
}


def stop(self: Session, *_: Any) -> None:
    self._signal = signal.SIGINT


def stop_at_once(self: Session, *_: Any) -> None:
    raise KeyboardInterrupt


def fail(self: Session, *_: Any) -> None:
    raise FloatingPointError("the loss is nan")


def full(self: Session, *_: Any) -> None:
    raise WriteError("x could not be written (No space left on device): make room on its disk")


CASES = [
    *((command, stop, False) for command in COMMANDS),
    *((command, stop_at_once, True) for command in ("train", "sweep")),
    *((command, fail, False) for command in ("train", "ablate", "table")),
    *((command, full, True) for command in ("train", "sweep")),
]


@pytest.mark.parametrize(("command", "happens", "named"), CASES)
def test_it_works(
    command: str,
    happens: Any,
    named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*COMMANDS[command], "--device", "cpu", "--quiet"]
    if named:
        words += ["--folder" if command == "table" else "--out", "a folder"]
    optimise = Session.optimise

    def once(self: Session, *arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(Session, "optimise", optimise)
        optimise(self, *arguments, **more)
        happens(self)

    monkeypatch.setattr(Session, "optimise", once)
    assert main(words) == (130 if happens in (stop, stop_at_once) else 1)
    said = capsys.readouterr().err
    assert ("--resume" in said) == (command != "table" and not (command == "train" and happens is fail))
    places = "*" if named else "runs/*"
    before = list(tmp_path.glob(places))
    again = re.search(r"run the same command again(?: with (.+))? to continue", said)
    if command == "train" and happens is not stop_at_once:
        more = ["--resume"] if "--resume" in said else ["--out", "another"]
    else:
        assert again is not None
        more = shlex.split(again[1] or "")
    assert main([*words, *more]) == 0
    assert list(tmp_path.glob(places)) == before and len(before) == 1  # no other folder was begun
