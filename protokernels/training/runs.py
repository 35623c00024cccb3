# SPDX-License-Identifier: MIT
"""Several runs of one configuration with different seeds, in one folder.

One seed: the folder is the run. Several: it holds one run per seed (``seed-0``, ``seed-1``, ...) and a summary in its
own ``results.json``.
"""

from __future__ import annotations

import errno
import json
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .files import WriteError
from .lost_processes import losses_told
from .run_folder import RunFolder, RunFolderError, next_free_folder, sole_user
from .session import Interrupted, Plan, Precision, Session, make_accelerator
from .summary import summarize_runs

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunSettings:
    """How to run, as against what to run."""

    seed: int = 0  # of the first run; the others count up from it
    runs: int = 1  # number of seeds
    resume: bool = False  # continue what is in the folder
    precision: Precision = "fp32"  # fp16 needs a GPU; bf16 pays on processors with AMX or AVX512-BF16
    device: Literal["auto", "cpu"] = "auto"
    quiet: bool = False  # no progress output

    def __post_init__(self) -> None:
        for name, words in (("precision", get_args(Precision)), ("device", ("auto", "cpu"))):
            if getattr(self, name) not in words:
                raise ValueError(f"RunSettings: {name} must be one of {', '.join(words)}; got {getattr(self, name)!r}")
        for name in ("seed", "runs"):
            try:
                object.__setattr__(self, name, index(getattr(self, name)))  # also of numpy's numbers
            except TypeError:
                raise ValueError(f"RunSettings: {name} must be a whole number; got {getattr(self, name)!r}") from None
        if self.runs < 1 or self.seed < 0 or self.seed + self.runs > 2**32:  # more than scikit-learn takes
            raise ValueError(
                "RunSettings: runs must be at least 1, and every seed at least 0 and below 2**32; got "
                f"runs {self.runs} from seed {self.seed}"
            )

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return list(range(self.seed, self.seed + self.runs))


@dataclass(frozen=True)
class Trial:
    """One seed of a configuration: what it needs to be trained."""

    run: RunFolder
    seed: int
    accelerator: Accelerator
    settings: RunSettings

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the results."""
        main: bool = self.accelerator.is_main_process
        return main

    def session(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, plan: Plan) -> Session:
        """The session that trains ``model``; see :class:`Session`."""
        settings = self.settings
        return Session(self.run, self.accelerator, model, optimizer, scheduler, plan, settings.resume, settings.quiet)


def train_runs(
    name: str,
    record: dict[str, Any],
    run_one: Callable[[Trial], dict[str, Any]],
    *,
    out: str | Path | None,
    settings: RunSettings,
    provenance: dict[str, Any],
    epochs: int,
) -> dict[str, Any]:
    """Calls ``run_one`` for every seed and writes what it returns, then the summary.

    Args:
        name: of the default folder, ``runs/<name>``.
        record: paper and configuration, for ``config.json``.
        run_one: trains and scores one seed; its result counts on the main process.
        out: the folder, or ``None`` for the first free default, and with ``resume`` for the last one that is there.
        settings: seeds, precision and so on.
        provenance: of the data, with its warnings; goes to ``environment.json`` and the results.
        epochs: how many a finished run has.

    Returns:
        On the main process the results, with the folder as ``"folder"``; elsewhere an empty dictionary.

    Raises:
        RunFolderError: the folder holds another run, or another process is training there.
        CheckpointError: no checkpoint can be used.
        WriteError: there is no room, or no folder any more.
        ProcessLostError: one of several processes has ended.
    """
    accelerator = make_accelerator(settings.device, settings.precision)
    default = next_free_folder(Path("runs") / name, resume=settings.resume)
    folder = Path(broadcast_object_list([str(out or default)])[0])
    record = {**record, "precision": settings.precision, "processes": accelerator.num_processes}
    try:
        with losses_told(folder), sole_user(folder, wanted=accelerator.is_main_process):
            _train_seeds(folder, record, run_one, accelerator, settings, provenance, epochs)
            return {**write_summary(folder), "folder": str(folder)} if accelerator.is_main_process else {}
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped", f"{resuming(folder)} to continue", signal.SIGINT) from stop
    except WriteError as error:
        gone = getattr(error.__cause__, "errno", None) in (errno.ENOENT, errno.ESTALE)  # with what had been begun
        error.begun = gone or (folder / "config.json").exists()
        raise


def told_by_main(find: Callable[[], Answer], settings: RunSettings) -> Answer:
    """What ``find`` returns or raises in the main process, in all processes: a later one might find what that has written since."""
    accelerator = make_accelerator(settings.device, settings.precision)
    answer: Answer | None = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer = find()
        except (ValueError, OSError) as problem:
            error = problem
    answer, error = broadcast_object_list([answer, error])
    if error is not None:
        raise error
    return cast("Answer", answer)


def resuming(folder: Path) -> str:
    """How a command that has --resume is continued in its folder."""
    return f"run the same command again with --resume --out {shlex.quote(str(folder))}"


def _train_seeds(
    folder: Path,
    record: dict[str, Any],
    run_one: Callable[[Trial], dict[str, Any]],
    accelerator: Accelerator,
    settings: RunSettings,
    provenance: dict[str, Any],
    epochs: int,
) -> None:
    """What :func:`train_runs` does in its folder."""
    seeds = settings.seeds
    if accelerator.is_main_process and len(seeds) > 1:
        RunFolder.create(folder, _as_json({**record, "seeds": seeds}), resume=settings.resume)
    for seed in seeds:
        run = RunFolder(folder if len(seeds) == 1 else folder / f"seed-{seed}")
        if accelerator.is_main_process:
            RunFolder.create(run.path, _as_json({**record, "seed": seed}), resume=settings.resume)
            check_same_data(run, provenance)
        accelerator.wait_for_everyone()
        if (run.results() or {}).get("complete"):
            continue
        if accelerator.is_main_process:
            run.write_environment(
                device=str(accelerator.device), precision=settings.precision, data=_as_json(provenance)
            )
        started = time.perf_counter()
        results = run_one(Trial(run, seed, accelerator, settings))
        if accelerator.is_main_process:
            seconds = round(time.perf_counter() - started, 1)
            update_results(run, {**results, "seconds_since_resume": seconds}, provenance, epochs=epochs)
        accelerator.wait_for_everyone()


def check_same_data(run: RunFolder, provenance: dict[str, Any]) -> None:
    """``RunFolderError`` where the files or the values that the run began with are others now. What an older version has not
    written down is not compared."""
    if changed := changed_data(run.environment().get("data") or {}, provenance):
        files = ", ".join(f"{name} has md5 {now}, then {then}" for name, (now, then) in changed.items())
        raise RunFolderError(
            f"{run.path} was begun with other data: {files}; put the data back, or train anew in another folder"
        )


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What has another md5 in the provenance ``now`` than in ``before``: its md5 now and then. Files, or where none has, the values."""
    then, new = before.get("md5s") or {}, now.get("md5s") or {}
    changed = {name: (new[name], then[name]) for name in sorted(then.keys() & new.keys())}
    for name, key in (("the folder of volumes", "md5"), ("the data set", "content_md5")):
        if before.get(key) and now.get(key):
            changed[name] = (now[key], before[key])
    changed = {name: pair for name, pair in changed.items() if len(set(pair)) == 2}
    named = [name for name in changed if name in new] or list(changed)[:1]
    return {name: changed[name] for name in named}


def update_results(
    run: RunFolder, results: dict[str, Any], provenance: dict[str, Any], *, epochs: int, trained: int | None = None
) -> None:
    """Writes ``results`` with what the run folder knows: configuration, last epoch, whether all ``epochs`` are done.

    ``trained``: the epoch that the results are of; default: the last one in the metrics.
    """
    metrics = [line for line in run.metrics() if trained is None or line["epoch"] <= trained]
    last = {key: value for key, value in metrics[-1].items() if key != "seconds"} if metrics else {}
    more = {
        "complete": last.get("epoch", 0) >= epochs,
        "last_epoch": last,
        "data_warnings": list(provenance.get("warnings", [])),
    }
    run.write_results(_as_json({**run.config(), **(run.results() or {}), **results, **more}))


def load_runs(folder: str | Path) -> list[RunFolder]:
    """The runs in ``folder``: itself, or one for each seed that has been begun."""
    top = RunFolder.open(folder)
    seeds = top.config().get("seeds")
    if seeds is None:
        return [top]
    runs = [RunFolder(top.path / f"seed-{seed}") for seed in seeds]
    begun = [run for run in runs if (run.path / "config.json").is_file()]
    if not begun:
        raise RunFolderError(f"{top.path}: none of its seeds has been begun; continue the run with --resume")
    return begun


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Mean and standard deviation over the runs in ``folder`` that have results.

    Returns:
        The first run's results with ``"splits"`` replaced by the summary (see :func:`summarize_runs`), ``"seeds"``,
        ``"number_of_runs"`` and, with several seeds, ``"unfinished_seeds"``.

    Raises:
        FileNotFoundError: none has.
        RunFolderError: those of one are incomplete.
    """
    runs = load_runs(folder)
    asked = RunFolder(folder).config().get("seeds")
    results = [(run.config()["seed"], result) for run in runs if (result := _summed_up(run)) is not None]
    if not results:
        raise FileNotFoundError(f"{folder} has no results yet; continue the run with --resume")
    first = {
        key: value for key, value in results[0][1].items() if key not in ("seed", "splits", "seconds_since_resume")
    }
    done = [seed for seed, result in results if result["complete"]]
    unfinished = [seed for seed in asked or [runs[0].config()["seed"]] if seed not in done]
    return {
        **first,
        "seeds": [seed for seed, _ in results],
        "number_of_runs": len(results),
        "complete": not unfinished,
        **({"unfinished_seeds": unfinished} if asked else {}),
        "splits": summarize_runs([result["splits"] for _, result in results]),
    }


def _summed_up(run: RunFolder) -> dict[str, Any] | None:
    """The results of a run that are to be summed up, if there are any."""
    results = run.results()
    if results is None:
        return None
    missing = [key for key in ("paper", "config", "splits", "complete") if key not in results]
    if missing or not isinstance(results["splits"], dict):
        raise RunFolderError(
            f"{run.path / 'results.json'}: expected the results of a run, with its splits; got {', '.join(results) or 'nothing'}; "
            "remove it, and `protokernels evaluate` scores the run again"
        )
    return results


def write_summary(folder: str | Path) -> dict[str, Any]:
    """:func:`read_summary`, written beside the runs where there are several."""
    summary = read_summary(folder)
    if RunFolder(folder).config().get("seeds") is not None:
        RunFolder(folder).write_results(summary)
    return summary


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` as it will be read back, so that it compares equal (tuples become lists, paths become strings)."""
    converted: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return converted
