# SPDX-License-Identifier: MIT
"""Several runs, each in a folder of its own: what is finished is passed over, what another process is at is left to it, what
fails does not stop the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.files import exclusive, make_folder
from ..training.lost_processes import ProcessLostError
from ..training.run_folder import RunFolder, RunFolderError
from ..training.runs import RunSettings, read_summary
from ..training.session import Interrupted
from .fields import as_record, completed
from .finished import read_finished

_STOPS_ONE = (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError)
"""A run; anything else is an error of ours."""


@dataclass(frozen=True)
class Job:
    """One configuration to train, one or several seeds."""

    name: str  # for messages
    paper: str  # as the run's config.json has it
    module: Any  # of the paper or baseline: its ``train`` is called
    config: Any
    folder: Path
    settings: RunSettings  # with ``resume``


@dataclass
class Outcome:
    """What became of the jobs that did not finish here."""

    failed: dict[str, str] = field(default_factory=dict)  # name -> what went wrong
    busy: list[str] = field(default_factory=list)  # another process is at them
    again: str = "run the same command again"

    def report(self) -> None:
        """Says it on stderr, a line per reason."""
        if not is_main_process():
            return
        for message in dict.fromkeys(self.failed.values()):
            names = [name for name, other in self.failed.items() if other == message]
            print(f"not finished: {', '.join(names)}: {message}", file=sys.stderr)
        if self.failed:
            print(f"{self.again} to continue", file=sys.stderr)
        if self.busy:
            print(f"left to another process: {', '.join(self.busy)}", file=sys.stderr)


def run_jobs(
    jobs: Sequence[Job],
    *,
    data_root: Path | None = None,
    download: bool = False,
    figures: bool = False,
    keep_finished: bool = False,
    again: str = Outcome.again,
    after: Callable[[Job, dict[str, Any]], None] = lambda job, results: None,
) -> Outcome:
    """Trains every job that is not finished, in their order. Data that several in a row have in common is loaded once.

    The same command may run several times at once, on one machine or over a shared file system with locks: every job is
    done by one of them. A job that fails is named in the outcome, and the next one begins; only an interruption stops all.
    So is one that was begun with other data and is not finished. Where several processes train together, one that fails in training
    ends all, unless it diverged: the others may be waiting for the process that failed.

    Args:
        jobs: see :class:`Job`.
        data_root: where the data lies.
        download: fetch data that is not there.
        figures: draw pictures of every run.
        keep_finished: take finished runs as they are, also those of another configuration or other data.
        again: how the command that these are the jobs of is continued.
        after: called with every job that is finished now, and what its ``train`` returns.

    Raises:
        RunFolderError: before anything is trained: a folder holds another configuration than its job's, or a finished run of other
            data, whose results would stand beside those of the data that are here now.
        ProcessLostError: a job failed in one of several processes, and is named on stderr.
    """
    check_folders(jobs, keep_finished=keep_finished)
    outcome = Outcome(again=again)
    data = SharedData(data_root)
    if not keep_finished:
        for job in jobs:
            data.check(job)
    for job in jobs:
        make_folder(job.folder.parent, parents=True)
        lock = job.folder.with_name(f"{job.folder.name}.lock")
        with exclusive(lock, wanted=not is_distributed(), wait=False) as free:
            if not free:
                outcome.busy.append(job.name)
                continue
            try:
                if is_finished(job):
                    results = {**read_summary(job.folder), "folder": str(job.folder)} if is_main_process() else {}
                else:
                    if is_main_process():
                        print(job.folder, file=sys.stderr, flush=True)
                    results = job.module.train(
                        job.config,
                        job.folder,
                        data_root=data_root,
                        download=download,
                        figures=figures,
                        settings=job.settings,
                        dataset=data.of(job, download=download),
                    )
            except ProcessLostError:  # stops all
                raise
            except Interrupted as stop:
                raise Interrupted(f"{job.name}: {stop.done}", f"{again} to continue", stop.signal_number) from stop
            except _STOPS_ONE as error:
                reason = str(error) or type(error).__name__
                if getattr(error, "others_wait", False):
                    message = f"{job.name}: {reason}; all processes end, since others may wait for this one; {again} to continue"
                    who = "" if is_main_process() else f"process {os.environ['RANK']}: "
                    print(f"protokernels: {who}{message}", file=sys.stderr, flush=True)
                    raise ProcessLostError(message) from error
                outcome.failed[job.name] = reason
                continue
            if results:  # the main process
                after(job, results)
    return outcome


class SharedData:
    """The data of one job after the other; equal data is loaded once."""

    def __init__(self, data_root: Path | None) -> None:
        self.data_root = data_root
        self.key: Hashable = None
        self.dataset: Any = None

    def of(self, job: Job, *, download: bool = False) -> Any:
        """What the job's ``train`` would load."""
        experiment = _experiment(job)
        key = (job.paper, experiment.data_key(job.config))
        if key != self.key:
            self.key = self.dataset = None  # not two at a time
            self.dataset = experiment.load(job.config, self.data_root, download=download)
            self.key = key
        return self.dataset

    def check(self, job: Job) -> None:
        """``RunFolderError`` where the job is finished and was begun with other data. Its results can be used where the data is
        not, or not any more."""
        try:
            if not is_finished(job):
                return
        except ValueError:  # broken results are reported when their run is reached
            return
        self.compare(job, job.folder)

    def compare(self, job: Job, folder: Path) -> None:
        """``RunFolderError`` where the run in ``folder`` was begun with other data than the job's, if these are there."""
        try:
            dataset = self.of(job)
        except (ValueError, ImportError, OSError):
            return
        _experiment(job).check_data(folder, job.config, dataset)


def _experiment(job: Job) -> Any:
    """The :class:`~protokernels.training.experiment.Experiment` of a paper's module; a baseline is one."""
    return getattr(job.module, "EXPERIMENT", job.module)


def check_folders(jobs: Sequence[Job], *, keep_finished: bool = False) -> None:
    """``RunFolderError`` where a folder holds a run of another paper, configuration, precision or seed than its job's, or two
    jobs share one; with ``keep_finished``, finished runs may be others."""
    folders: dict[Path, Job] = {}
    for job in jobs:
        if job.folder in folders:
            raise RunFolderError(f"{folders[job.folder].name} and {job.name} would both lie in {job.folder}")
        folders[job.folder] = job
        several = [(job.folder, job.settings.seeds)] if job.settings.runs > 1 else []
        single = [(folder, [seed]) for folder, seed in zip(seed_folders(job), job.settings.seeds, strict=True)]
        for folder, seeds in several + single:
            if not (folder / "config.json").exists() or (keep_finished and read_finished(folder) is not None):
                continue
            pairs = differences(RunFolder(folder).config(), job, seeds)
            if pairs:
                raise RunFolderError(
                    f"{folder} holds another run than {job.name} ({', '.join(pairs)}); choose another folder, or give "
                    "the options that it was started with"
                )


def differences(there: Mapping[str, Any], job: Job, seeds: Sequence[int]) -> list[str]:
    """What a run's ``config.json`` has otherwise than ``job`` with these seeds; a field that is newer than the run has its
    default there."""
    before, config = completed(type(job.config), there.get("config", {})), as_record(job.config)
    seeds_there = there.get("seeds", [there.get("seed")])
    then = {"paper": there.get("paper"), "precision": there.get("precision"), "seeds": seeds_there, **before}
    return differing(then, {"paper": job.paper, "precision": job.settings.precision, "seeds": list(seeds), **config})


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Both values of every key that has two."""
    return [
        f"{key}: {then.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys((*now, *then))
        if then.get(key) != now.get(key)
    ]


def is_finished(job: Job) -> bool:
    """Whether all seeds of a job are complete. ``ValueError`` where the results of one are broken."""
    return all(read_finished(folder) is not None for folder in seed_folders(job))


def seed_folders(job: Job) -> list[Path]:
    """The run folders of a job, one per seed (see :mod:`protokernels.training.runs`)."""
    if job.settings.runs == 1:
        return [job.folder]
    return [job.folder / f"seed-{seed}" for seed in job.settings.seeds]


def is_distributed() -> bool:
    """Whether several processes train one run together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this one speaks for all."""
    return os.environ.get("RANK", "0") == "0"
