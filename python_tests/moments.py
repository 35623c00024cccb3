# SPDX-License-Identifier: MIT
"""The moments at which a process changes the disk, so that a test can strike at each of them: a kill, a full disk, a folder that is gone.

A moment comes before a file is opened for writing, before each write (half of which is done by then), before a flush to the disk, a
renaming, a removal and the making of a folder.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Strike = Callable[[int, str, Path], None]  # number of the moment, from 0; its kind; the file
NEEDS_ROOM = ("open", "write", "flush", "folder")
_AUDITED = {"os.rename": "replace", "os.remove": "remove", "os.mkdir": "folder"}


@contextmanager
def watched(folder: Path, strike: Strike) -> Iterator[list[str]]:
    """Calls ``strike`` at every moment below ``folder``; gives the kinds of those so far."""
    kinds: list[str] = []
    open_path, unlink, mkdir = pathlib.Path.open, pathlib.Path.unlink, pathlib.Path.mkdir
    fsync, replace = os.fsync, os.replace

    def moment(kind: str, path: Any) -> None:
        path = Path(path)
        if path == folder or folder in path.parents:
            kinds.append(kind)
            strike(len(kinds) - 1, kind, path)

    class Watched(io.FileIO):
        def write(self, content: Any) -> int:
            path, before = Path(str(self.name)), len(kinds)
            try:
                half = super().write(memoryview(content).cast("B")[: len(content) // 2])
                moment("write", path)
            except OSError:
                assert len(kinds) == before + 1  # the strike's own
                raise
            return half + super().write(memoryview(content).cast("B")[half:])

    def watched_open(self: Path, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        if not set(mode) & set("wax+"):
            return open_path(self, mode, buffering, **more)
        assert set(mode) in ({"w", "b"}, {"a", "b"}, {"a"}), f"{self} is opened as {mode}, which moments do not know"
        moment("open", self)
        if mode == "a":  # a lock file, in which nothing is written
            return open_path(self, mode, buffering, **more)
        raw = Watched(self, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)

    def watched_unlink(self: Path, *more: Any, **options: Any) -> None:
        moment("remove", self)
        unlink(self, *more, **options)

    def watched_mkdir(self: Path, *more: Any, **options: Any) -> None:
        if not self.exists():
            moment("folder", self)
        mkdir(self, *more, **options)

    def watched_fsync(descriptor: int) -> None:
        flushed = Path(f"/proc/self/fd/{descriptor}")
        moment("flush", flushed.resolve() if flushed.exists() else folder)
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        moment("replace", target)
        replace(source, target)

    with (
        mock.patch.object(pathlib.Path, "open", watched_open),
        mock.patch.object(pathlib.Path, "unlink", watched_unlink),
        mock.patch.object(pathlib.Path, "mkdir", watched_mkdir),
        mock.patch.object(os, "fsync", watched_fsync),
        mock.patch.object(os, "replace", watched_replace),
    ):
        yield kinds


def killed_at(number: int) -> Strike:
    """SIGKILL at one moment."""

    def strike(at: int, _kind: str, _path: Path) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def full_from(number: int, code: int = errno.ENOSPC) -> Strike:
    """From one moment on, nothing that needs room can be written; files are still removed and renamed."""

    def strike(at: int, kind: str, _path: Path) -> None:
        if at >= number and (kind in NEEDS_ROOM or code != errno.ENOSPC):
            raise OSError(code, os.strerror(code))

    return strike


def child(work: Callable[[], Any]) -> Any:
    """A process that does ``work`` and ends with what it returns as its exit code."""

    def run() -> None:
        torch.set_num_threads(1)  # a forked process has no worker threads
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)

    process = multiprocessing.get_context("fork").Process(target=run)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This process .* is multi-threaded", DeprecationWarning
        )  # from Python 3.12 on
        process.start()
    return process


def in_child(work: Callable[[], Any]) -> int:
    """Does ``work`` in a process of its own and gives its exit code, minus the signal where one ended it."""
    process = child(work)
    process.join(300)
    assert process.exitcode is not None, "the process does not end"
    return process.exitcode


def audited(folder: Path, work: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """The moments of ``work``, without writes and flushes, and the same as Python itself reports them; in a process of its own."""
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        events: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            path = arguments[0] if arguments and isinstance(arguments[0], (str, os.PathLike)) else ""
            if event == "os.rename":
                path = arguments[1]
            if folder not in Path(os.fspath(path)).parents and Path(os.fspath(path)) != folder:
                return
            if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                events.append("open")
            elif event in _AUDITED and not (event == "os.mkdir" and os.path.exists(path)):
                events.append(_AUDITED[event])

        with watched(folder, lambda *_: None) as kinds:
            sys.addaudithook(hook)
            work()
        queue.put((list(kinds), events))

    assert in_child(run) == 0
    kinds, events = queue.get()
    return [kind for kind in kinds if kind not in ("write", "flush")], events
