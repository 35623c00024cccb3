# SPDX-License-Identifier: MIT
"""Files that are either whole or absent: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".partial"
_REMEDIES = {  # by what the system calls the failure
    **dict.fromkeys(("ENOSPC", "EDQUOT", "EFBIG"), "make room on its disk"),
    **dict.fromkeys(("EROFS", "EACCES", "EPERM"), "let its folder be written to"),
    **dict.fromkeys(("ENOENT", "ESTALE"), "its folder is gone; put it back"),
    "ENOTDIR": "a part of its path is a file",
    "EEXIST": "a file of that name is in the way",
}


class WriteError(OSError):
    """A file could not be written. Under its name is what was there before, or nothing."""

    begun = True  # false: nothing of the run had been written, so there is nothing to continue


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``; a reader, or a process killed at any moment, finds the old file or the new one,
    never a mixture."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with explained(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        _flush_folder(path.parent)


def check_target(path: Path, *, makes_folder: bool = False) -> None:
    """``ValueError`` where no file ``path`` can be made: it is a folder, or lies below a file; unless the caller makes its
    folder, also where there is none."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the name of a file")
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be made: {above} is a file; pass a name in a folder")
    if above != path.parent and not makes_folder:
        raise ValueError(f"{path} cannot be made: there is no folder {path.parent}; make it, or pass another name")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all. ``ValueError`` for NaN and infinity, which JSON does not
    have."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file; ``ValueError`` names the file when it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_object(path: Path, content: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; where there is none, a ``ValueError`` names the file, its ``content`` and the ``remedy``."""
    try:
        value = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object with {content}; got {type(value).__name__}; {remedy}")
    return value


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines file, and waits until the disk has it; a line that finds no room is taken back."""
    rest = memoryview((json.dumps(value, allow_nan=False) + "\n").encode())
    with explained(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file; a last line cut short by a kill is left out. An absent file has no lines."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not valid JSON: {error}; take the line out") from error
    return values


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Replaces a JSON-lines file, whole or not at all."""
    write_bytes(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode())


@contextmanager
def exclusive(path: Path, *, wanted: bool = True, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes out of ``exclusive`` of the same path; a process that is killed leaves it.

    Where the system (Windows) or the file system has no such locks, or with ``wanted`` false, nobody is kept out.

    Args:
        path: of a small file that is made and stays.
        wanted: false: do nothing.
        wait: until the others have left; false: yield False at once where somebody is inside.
    """
    if not wanted or os.name != "posix":
        yield True
        return
    import fcntl

    with explained(path):
        file = path.open("a")
    with file:  # whose closing, by whatever end, gives the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files that a killed process left in ``folder``."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file that nobody needs any more; where that fails it only takes up room."""
    with suppress(OSError):
        path.unlink()


def make_folder(path: Path, *, parents: bool = False) -> None:
    """Makes a folder unless it is there."""
    with explained(path):
        path.mkdir(parents=parents, exist_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says about a failed write into a :class:`WriteError` with the file's name and what to do."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(errno.errorcode.get(error.errno or 0, ""), "see to its disk")
        raise WriteError(f"{path} could not be written ({error.strerror or error}): {remedy}") from error


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder; its rename is journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
