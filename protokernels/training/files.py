# SPDX-License-Identifier: MIT
"""Files that are either whole or absent: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".partial"


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``; a reader, or a process killed at any moment, finds the old file or the new one,
    never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all. ``ValueError`` for NaN and infinity, which JSON does not
    have."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; ``ValueError`` names the file when it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")
        file.flush()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file; a last line cut short by a kill is left out. An absent file has no lines."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not valid JSON: {error}") from error
    return values


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Replaces a JSON-lines file, whole or not at all."""
    write_bytes(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode())


@contextmanager
def exclusive(path: Path, *, wanted: bool = True, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes out of ``exclusive`` of the same path; a process that is killed leaves it.

    Where the system has no such locks (Windows), or with ``wanted`` false, nobody is kept out.

    Args:
        path: of a small file that is made and stays.
        wanted: false: do nothing.
        wait: until the others have left; false: yield False at once where somebody is inside.
    """
    if not wanted or os.name != "posix":
        yield True
        return
    import fcntl

    with path.open("a") as file:  # whose closing, by whatever end, gives the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files that a killed process left in ``folder``."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
