# SPDX-License-Identifier: MIT
"""Checkpoints that survive a kill at any moment.

A file's name holds the position in training and a digest of its content (``epoch-0003-step-00000-5f0c...pt``), so that
damage of any kind is noticed before the content is used. The newest ``keep`` files stay; a damaged newest one is passed
over with a warning.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.weights import first_line, load_untrusted
from .files import make_folder, remove, remove_leftovers, write_bytes

FORMAT = 1  # of what a session saves; a version that reads more has a higher one
_NAME = re.compile(r"epoch-(\d+)-step-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointError(RuntimeError):
    """There is no checkpoint that can be used."""


class CheckpointFile(NamedTuple):
    """One checkpoint on disk: ``epoch`` epochs and ``step`` further steps are done. Sorts by position."""

    epoch: int
    step: int
    digest: str
    path: Path


class CheckpointStore:
    """The checkpoints in one folder.

    Args:
        folder: made when the first checkpoint is saved.
        keep: how many of the newest files stay; at least 2, so that one damaged file does not end a run.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(
                f"CheckpointStore: keep must be at least 2 (the newest and one to fall back to); got {keep}"
            )
        self.folder = folder
        self.keep = keep

    def files(self) -> list[CheckpointFile]:
        """All checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(CheckpointFile(int(match[1]), int(match[2]), match[3], path) for match, path in matches if match)

    def save(self, state: dict[str, Any], *, epoch: int, step: int = 0) -> Path:
        """Writes ``state`` (tensors, numbers, strings and containers of them), then removes files beyond the newest
        ``keep``, and those of later positions: a run that goes on from an earlier checkpoint leaves them behind.

        Raises:
            WriteError: there is no room, or no folder; the files that were there stay.
        """
        make_folder(self.folder)
        remove_leftovers(self.folder)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self.folder / f"epoch-{epoch:04d}-step-{step:05d}-{_digest(content)}.pt"
        write_bytes(path, content)
        others = [file for file in self.files() if file.path != path]
        kept = [file for file in others if (file.epoch, file.step) < (epoch, step)][-(self.keep - 1) :]
        for file in others:
            if file not in kept:
                remove(file.path)
        return path

    def load(
        self,
        map_location: str | torch.device = "cpu",
        *,
        remedy: str = "remove the folder to train from the start",
    ) -> dict[str, Any] | None:
        """The newest state that is undamaged, or ``None`` where nothing was ever saved.

        Files are opened with ``weights_only=True``: a checkpoint from elsewhere cannot run code.

        Args:
            map_location: where its tensors go.
            remedy: what the user can do where every file is damaged.

        Raises:
            CheckpointError: there are files and every one is damaged, or the newest was written by a newer version.
            OSError: the system does not give a file that may be sound.
        """
        files, damaged = self.files(), []
        for file in reversed(files):
            try:
                state = _read(file, map_location)
            except ValueError as error:  # the one before it may be sound
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(
                    f"{'; '.join(damaged)}. {file.path}, the newest sound one, is used in its place",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if state.get("format", 0) > FORMAT:
                raise CheckpointError(
                    f"checkpoint {file.path} was written by a newer version of protokernels: it has format "
                    f"{state['format']}, this version knows {FORMAT}; use the version that wrote it"
                )
            return state
        if files:
            raise CheckpointError(
                f"none of the {len(files)} checkpoints in {self.folder} can be used ({'; '.join(damaged)}); {remedy}"
            )
        return None


@contextmanager
def fitting(store: CheckpointStore) -> Iterator[None]:
    """Around the use of a state of ``store``: one that does not fit is a CheckpointError instead of torch's pages."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint in {store.folder} does not fit this run ({reason[:200]}{'...' * (len(reason) > 200)}): it is of "
            "another configuration, or of another version of protokernels; train anew in another folder, or use that version"
        ) from error


def _read(file: CheckpointFile, map_location: str | torch.device) -> dict[str, Any]:
    """The state in a file; ``ValueError`` where it is damaged."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:  # not to be read here and now; it may be sound
            raise
        raise ValueError(f"checkpoint {file.path} is damaged: {first_line(error)}") from error
    if _digest(content) != file.digest:
        raise ValueError(
            f"checkpoint {file.path} is damaged: its {len(content)} bytes do not match the digest in its name"
        )
    state = load_untrusted(io.BytesIO(content), f"checkpoint {file.path}", map_location)
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {file.path} is none: it holds {type(state).__name__}")
    return state


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
