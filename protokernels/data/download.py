# SPDX-License-Identifier: MIT
"""Finding, checking and fetching files."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError

FOLDERS = (
    "",
    "mnist",
    "medmnist",
    "MNIST/raw",
    "chest_nih",
    "chest_kermany",
    "acdc",
    "brain_tumor_4class",
)  # below the data root
BLOCK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without an answer


def find_file(root: Path, names: Sequence[str]) -> Path | None:
    """The first existing file among ``names`` in ``root`` and its known folders."""
    candidates = (root / folder / name for name in names for folder in FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def searched(root: Path) -> str:
    """The folders of :func:`find_file` as text for a message, and what names another."""
    return (
        f"{', '.join(str(root / folder) for folder in FOLDERS)} (--data-root or PROTOKERNELS_DATA name another folder)"
    )


def file_md5(*paths: Path) -> str:
    """md5 of a file, or of several one after another, as 32 hexadecimal digits; a fingerprint, not a protection."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def fetch(urls: Sequence[str], target: Path, md5: str) -> None:
    """Downloads ``target`` from the first of ``urls`` that answers with the right md5.

    The file is written under a temporary name and renamed once its md5 is right, so ``target`` is either whole or
    absent.

    Raises:
        DataError: with every address tried and why it failed, the md5, and where to put the file by hand.
    """
    failures = []
    for url in urls:
        try:
            _fetch_one(url, target, md5)
            return
        except (urllib.error.URLError, http.client.HTTPException, OSError, DataError) as error:
            failures.append(f"{url}: {error}")
    raise DataError(
        f"could not download {target.name} ({'; '.join(failures)}). Fetch it on a machine with a network and put it at "
        f"{target} (md5 {md5})"
    )


def _fetch_one(url: str, target: Path, md5: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    digest = hashlib.md5(usedforsecurity=False)
    request = urllib.request.Request(url, headers={"User-Agent": "protokernels"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, temporary.open("wb") as file:
            while block := response.read(BLOCK):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != md5:
            raise DataError(f"the answer has md5 {digest.hexdigest()}, expected {md5}")
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
