# SPDX-License-Identifier: MIT
"""The folder of one run: everything that is remembered of it, and nothing is remembered anywhere else.

config.json      the resolved configuration
environment.json versions, device, threads, where the data came from and what was odd about it
metrics.jsonl    one line per epoch
checkpoints/     see :mod:`protokernels.training.checkpoints`
results.json     the evaluation
figures/         pictures
"""

from __future__ import annotations

import glob
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import _native, backend
from .._version import __version__
from .checkpoints import CheckpointStore
from .configuration import Config
from .files import (
    append_json_line,
    make_folder,
    read_json,
    read_json_lines,
    read_object,
    remove_leftovers,
    write_json,
    write_json_lines,
)


class RunFolderError(ValueError):
    """A run folder is missing, holds another run, or cannot be continued."""


class RunFolder:
    """Access to the files of one run; see the module's docstring for what they are."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = CheckpointStore(self.path / "checkpoints")
        self.loaded_epoch: int | None = None  # of the checkpoint that was read last

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def figures(self) -> Path:
        """The folder of the pictures."""
        return self.path / "figures"

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], *, resume: bool = False) -> RunFolder:
        """Makes the folder and writes ``config``; with ``resume``, continues the run that is there, if there is one.

        Raises:
            RunFolderError: the folder holds a run and ``resume`` is false, holds a run with another configuration, or
                holds other files.
            WriteError: it cannot be made.
        """
        run = cls(path)
        if (run.path / "config.json").exists():
            if not resume:
                raise RunFolderError(
                    f"{run.path} already holds a run; pass --resume to continue it or another --out to start one"
                )
            run._check_same(config)
            for folder in (run.path, *(path for path in run.path.iterdir() if path.is_dir())):
                remove_leftovers(folder)
            return run
        if run.path.exists() and any(entry.suffix != ".partial" for entry in run.path.iterdir()):
            raise RunFolderError(f"{run.path} is not empty and holds no run (no config.json); choose another folder")
        make_folder(run.path, parents=True)
        remove_leftovers(run.path)
        write_json(run.path / "config.json", config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in ``path``; ``RunFolderError`` where there is none."""
        run = cls(path)
        if not (run.path / "config.json").is_file():
            raise RunFolderError(
                f"{run.path} holds no run: there is no config.json; expected a folder written by `protokernels train`"
            )
        return run

    def checkpoint(self) -> dict[str, Any]:
        """The newest sound checkpoint; see :meth:`newest`."""
        state = self.newest(self.checkpoints, "checkpoint")
        self.loaded_epoch = state.get("epoch")
        return state

    def newest(self, store: CheckpointStore, name: str) -> dict[str, Any]:
        """The newest sound state of a store in this folder, which a message calls ``name``.

        Raises:
            FileNotFoundError: there is none yet, or of a finished run, which --resume leaves as it is, none any more.
            CheckpointError: every one is damaged.
        """
        if not self.is_finished():
            state = store.load()
            if state is None:
                raise FileNotFoundError(f"{self.path} has no {name} yet; continue the run with --resume")
            return state
        remedy = "the run is finished and keeps its results; for a new model train anew, into another folder"
        state = store.load(remedy=remedy)
        if state is None:
            raise FileNotFoundError(f"{self.path} has no {name} any more: {store.folder} is gone or empty; {remedy}")
        return state

    def is_finished(self) -> bool:
        """Whether there are results of a whole training that can be read."""
        try:
            results = self.results()
        except ValueError:
            return False
        return isinstance(results, dict) and bool(results.get("complete"))

    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        value = read_json(self.path / "config.json")
        if not isinstance(value, dict):
            raise RunFolderError(f"{self.path / 'config.json'}: expected an object; got {type(value).__name__}")
        return value

    def config_as(self, kind: type[Config]) -> Config:
        """The configuration of the paper or baseline whose run this is; ``RunFolderError`` where ``config.json`` lacks it or
        the seed, or holds values of another type."""
        path, record = self.path / "config.json", self.config()
        if not isinstance(record.get("config"), dict) or not isinstance(record.get("seed"), int):
            raise RunFolderError(
                f"{path} is incomplete: expected an object with paper, config and seed; got {', '.join(record) or 'nothing'}"
            )
        values: dict[str, Any] = record["config"]
        try:
            return kind.from_dict(values)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise RunFolderError(f"{path}: {error}") from error

    def write_environment(self, **more: Any) -> None:
        """Writes the environment, with what the caller adds (device, data provenance)."""
        write_json(self.path / "environment.json", {**environment(), **more})

    def environment(self) -> dict[str, Any]:
        """What :meth:`write_environment` wrote, or an empty dictionary."""
        path = self.path / "environment.json"
        return read_object(path, "versions and data", "remove it") if path.exists() else {}

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``."""
        append_json_line(self.path / "metrics.jsonl", values)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; ``RunFolderError`` where one is not that of an epoch."""
        path = self.path / "metrics.jsonl"
        lines = read_json_lines(path)
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                raise RunFolderError(f"{path}, line {number}: expected an object with an epoch; take the line out")
        return lines

    def rewind_metrics(self, epochs: int) -> None:
        """Drops the lines of epochs after the first ``epochs``: they were trained after the checkpoint that is being
        continued."""
        write_json_lines(self.path / "metrics.jsonl", [line for line in self.metrics() if line["epoch"] <= epochs])

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``."""
        write_json(self.path / "results.json", results)

    def results(self) -> dict[str, Any] | None:
        """What :meth:`write_results` wrote, or ``None``."""
        path = self.path / "results.json"
        remedy = "remove it, and `protokernels evaluate` scores the run again"
        return read_object(path, "the results of a run", remedy) if path.exists() else None

    def _check_same(self, config: dict[str, Any]) -> None:
        before, now = _flat(self.config()), _flat(config)
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differing:
            pairs = ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing)
            raise RunFolderError(
                f"{self.path} holds a run with another configuration ({pairs}); "
                "a run can only be continued as it was started"
            )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"config.epochs": 3}`` for ``{"config": {"epochs": 3}}``: a message can name the one field that differs."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def next_free_folder(path: Path, *, resume: bool = False) -> Path:
    """``path`` if there is none like it, else ``path-2``, ``path-3``, ... : one more than the largest number that is there; with ``resume``
    the one of the largest number. A folder that has been deleted leaves a gap, which nothing fills."""
    numbers = [1] if path.exists() else []
    for other in path.parent.glob(f"{glob.escape(path.name)}-*"):
        end = other.name.removeprefix(f"{path.name}-")
        if end.isdecimal() and not end.startswith("0") and int(end) > 1:
            numbers.append(int(end))
    last = max(numbers, default=0)
    number = last if resume and last else last + 1
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


@contextmanager
def sole_user(folder: Path, *, wanted: bool = True) -> Iterator[None]:
    """Keeps other processes from training in ``folder`` (which is made) at the same time; a process that is killed leaves it.

    Where the file system has no such locks, or with ``wanted`` false, nobody is kept out.

    Raises:
        RunFolderError: another process is there.
    """
    if not wanted or os.name != "posix":
        yield
        return
    import fcntl

    make_folder(folder, parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process is training in {folder}; wait until it has ended, or choose another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def environment() -> dict[str, Any]:
    """Versions and hardware that a result may depend on."""
    packages = ("torch", "numpy", "accelerate", "scikit-learn", "matplotlib", "medmnist")
    return {
        "protokernels": __version__,
        "commit": source_commit(),
        "backend": backend.get(),
        "native_code": "missing: " + str(_native.PROBLEM) if _native.LIBRARY is None else "loaded",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "byte_order": sys.byteorder,
    }


def source_commit() -> str | None:
    """The git commit of the checkout that this package is imported from, with ``+changes`` where tracked files differ
    from it; ``None`` for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
