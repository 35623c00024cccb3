# SPDX-License-Identifier: MIT
"""Checkpoints that survive a kill at any moment.

A file's name holds the position in training and a digest of its content (``epoch-0003-step-00000-5f0c...pt``), so that
damage of any kind is noticed before the content is used. The newest ``keep`` files stay; a damaged newest one is passed
over with a warning.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import remove_leftovers, write_bytes

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
        ``keep``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        path = self.folder / f"epoch-{epoch:04d}-step-{step:05d}-{_digest(content)}.pt"
        write_bytes(path, content)
        older = [file.path for file in self.files() if file.path != path]
        for file in older[: max(0, len(older) - (self.keep - 1))]:
            file.unlink(missing_ok=True)
        return path

    def load(self, map_location: str | torch.device = "cpu") -> dict[str, Any] | None:
        """The newest state that is undamaged, or ``None`` where nothing was ever saved.

        Files are opened with ``weights_only=True``: a checkpoint from elsewhere cannot run code.

        Raises:
            CheckpointError: there are files and every one is damaged.
        """
        files = self.files()
        for file in reversed(files):
            try:
                content = file.path.read_bytes()
                if _digest(content) != file.digest:
                    raise ValueError(f"its {len(content)} bytes do not match the digest in its name")
                state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
                return state
            except Exception as error:  # whatever is wrong with this file, the one before it may be sound
                warnings.warn(
                    f"checkpoint {file.path} cannot be used ({error}); trying the one before it",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if files:
            raise CheckpointError(
                f"none of the {len(files)} checkpoints in {self.folder} can be used; "
                "remove the folder to train from the start"
            )
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
