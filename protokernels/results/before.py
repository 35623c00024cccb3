# SPDX-License-Identifier: MIT
"""What a table would refuse after hours of training, looked for before: rows of two configurations or of other data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data import load_dataset
from ..data.content import content_md5
from ..training.files import read_json
from ..training.run_folder import RunFolderError
from .description import PaperTable, Values
from .fields import as_record
from .finished import FinishedRun, find_finished
from .jobs import Job, SharedData, differing, is_finished


def check_seeds(
    described: PaperTable,
    folder: Path,
    jobs: Sequence[Job],
    config_of: Callable[[FinishedRun], Values],
    *,
    data_root: Path | None,
    keep_finished: bool,
) -> None:
    """``RunFolderError`` where a finished run below ``folder`` and a job that is not finished would be seeds of one row and have
    different configurations or data.

    Runs in the jobs' own folders are :func:`run_jobs`' to look at, unless finished ones are kept.
    """
    data, waiting = SharedData(data_root), dict[tuple[Any, ...], Job]()
    for job in jobs:
        with suppress(ValueError):  # a broken file is reported when its run is reached
            if not is_finished(job):
                results = {"paper": job.paper, "config": as_record(job.config), "seed": job.settings.seed}
                waiting.setdefault(described.key(described.identity(FinishedRun(job.folder, results))), job)
    if not waiting or not folder.is_dir():
        return
    own = set() if keep_finished else {job.folder for job in jobs}
    for run in find_finished([folder], described.modules or (described.paper,), lambda run: run.path not in own):
        found = waiting.get(described.key(described.identity(run)))
        if found is None:
            continue
        if pairs := differing(config_of(run), as_record(found.config)):
            raise RunFolderError(
                f"{run.path} holds another run than {found.name} ({', '.join(pairs)}), and they would be one row; choose another "
                "--folder"
            )
        data.compare(found, run.path)


def check_computed(rows: Mapping[Path, str], data_root: Path | None) -> None:
    """``RunFolderError`` where a row that needs no training was computed of other data than those named, or than are there now.
    Older rows do not say of which.

    Args:
        rows: file of the row -> data that it is to be of.
        data_root: where the data lies.
    """
    for path, data in rows.items():
        if not path.exists():
            continue
        row = read_json(path)
        if row["data"] != data:
            raise RunFolderError(f"{path} holds the row of {row['data']}, not of {data}; choose another --folder")
        if "content_md5" not in row:
            continue
        try:
            now = content_md5(load_dataset(data, data_root))
        except (ValueError, ImportError, OSError):  # the data are not there any more
            continue
        if now != row["content_md5"]:
            raise RunFolderError(
                f"{path} was computed of other data: {data} has other values now; put the data back, choose another --folder, or "
                "take the row as it is with --keep"
            )
