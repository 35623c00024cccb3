# SPDX-License-Identifier: MIT
"""All ablations of a paper: one run folder each below one folder, then a table and curves side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .data.datasets import data_title
from .results import Job, Outcome, run_jobs
from .results.fields import as_record, completed
from .results.jobs import differing
from .training import RunFolderError, next_free_folder
from .training.files import exclusive, read_json, write_json
from .training.runs import RunSettings, resuming, told_by_main
from .training.transfer_scoring import left_out_notes

SUMMARY = "ablations.json"


def run_ablations(
    paper: Any,
    name: str,
    config: Any,
    out: Path | None,
    *,
    only: Sequence[str] = (),
    data_root: Path | None = None,
    download: bool = False,
    figures: bool = True,
    settings: RunSettings,
) -> tuple[dict[str, Any], Path, Outcome]:
    """Trains and scores ``config`` with the changes of each of ``paper.ABLATIONS``.

    Args:
        paper: a paper's module.
        name: of the paper.
        config: what all ablations start from.
        out: folder; default: a new one of ``runs/<name>-<data>-<preset>-ablations``, ``...-2`` and so on.
        only: names of ablations; empty: all.
        data_root: where the data lies.
        download: fetch data that is not there.
        figures: draw pictures, of each and of all.
        settings: seeds and so on; with ``resume``, what is finished is left as it is.

    Returns:
        Results by ablation, the folder, and what did not finish. Results are empty on processes other than the main one.

    Raises:
        ValueError: an unknown ablation.
    """
    if unknown := [word for word in only if word not in paper.ABLATIONS]:
        raise ValueError(f"unknown ablations {', '.join(unknown)}; expected some of {', '.join(paper.ABLATIONS)}")
    folder = new_folder(out, name, config, "ablations", SUMMARY, settings)
    config = with_shared_stages(config, folder)
    check_summary(paper, config, folder, settings)
    changes = {ablation: replace(config, **paper.ABLATIONS[ablation]) for ablation in only or paper.ABLATIONS}
    if not only:  # of several names for one configuration, the first
        changes = {ablation: changed for ablation, changed in changes.items() if first_of(changes, changed) == ablation}
    results: dict[str, Any] = {}

    def after(job: Job, done: dict[str, Any]) -> None:
        results[job.name] = done
        with exclusive(folder / f"{SUMMARY}.lock"):
            before = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
            entry = {key: done[key] for key in ("splits", "seeds", "complete")}
            entry |= {"config": as_record(job.config), "precision": settings.precision}
            write_json(folder / SUMMARY, {**before, job.name: entry})

    jobs = [Job(ablation, name, paper, changed, folder / ablation, settings) for ablation, changed in changes.items()]
    outcome = run_jobs(
        jobs, data_root=data_root, download=download, figures=figures, again=resuming(folder), after=after
    )
    if figures and results:
        getattr(paper, "draw_ablations", draw_ablations)(results, folder)
    return results, folder, outcome


def check_summary(paper: Any, config: Any, folder: Path, settings: RunSettings) -> None:
    """``RunFolderError`` where ``ablations.json`` holds ablations that started from another configuration, or of other seeds: the
    table and the pictures would put them beside those of ``config``. Older entries tell their configuration by their run."""
    path = folder / SUMMARY
    for name, entry in (read_json(path) if path.exists() else {}).items():
        run = folder / name / "config.json"
        record = entry if "config" in entry else read_json(run) if run.exists() else {}
        if name not in paper.ABLATIONS or "config" not in record:
            continue
        then = {**completed(type(config), record["config"]), "precision": record["precision"], "seeds": entry["seeds"]}
        now = {**as_record(replace(config, **paper.ABLATIONS[name])), "precision": settings.precision}
        if pairs := differing(then, {**now, "seeds": settings.seeds}):
            raise RunFolderError(
                f"{path} holds {name} of another configuration ({', '.join(pairs)}); choose another --out, or give the options "
                "that it was started with"
            )


def new_folder(out: Path | None, name: str, config: Any, kind: str, summary: str, settings: RunSettings) -> Path:
    """The folder of several runs: ``out``, or a new one of ``runs/<name>-<data>-<preset>-<kind>``; to resume, the last one.

    Raises:
        RunFolderError: it holds such runs already, and is not to be resumed; it is a run's own folder, or lies in a file.
    """
    default = Path("runs") / f"{name}-{data_title(config.data)}-{config.preset_name}-{kind}"
    return told_by_main(lambda: _free_folder(out, default, summary, resume=settings.resume), settings)


def _free_folder(out: Path | None, default: Path, summary: str, *, resume: bool) -> Path:
    """What :func:`new_folder` finds in one process."""
    folder = out or next_free_folder(default, resume=resume)
    if occupied := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise RunFolderError(f"{occupied} is a file, where a folder is needed; pass another --out")
    if (folder / "config.json").exists():
        raise RunFolderError(f"{folder} is the folder of a run, which can hold no others; pass another --out")
    if not resume and ((folder / summary).exists() or any(folder.glob("*/config.json"))):
        raise RunFolderError(f"{folder} already holds runs; pass --resume to continue them or another --out")
    return folder


def with_shared_stages(config: Any, folder: Path) -> Any:
    """What several runs have in common is trained once, where a paper has such stages."""
    return replace(config, stages=str(folder / "stages")) if getattr(config, "stages", None) == "" else config


def first_of(changes: Mapping[str, Any], config: Any) -> str:
    """The first name that ``config`` has."""
    return next(name for name, changed in changes.items() if changed == config)


def draw_ablations(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Curves over label fractions, one line per ablation, for every task that was scored."""
    from .figures import save_figure
    from .figures.fractions import label_fraction_curves

    first = next(iter(results.values()))
    paths = []
    for split, tasks in first["splits"].items():
        for task in tasks:
            scores = {name: result["splits"][split][task] for name, result in results.items()}
            try:
                figure = label_fraction_curves(scores, title=f"{first['paper']}, {first['config']['data']}, {task}")
            except ValueError:  # no class could be scored
                continue
            paths.append(save_figure(figure, folder / "figures" / f"label_fractions_{task}.png"))
    return paths


def ablation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Macro AUROC over label fractions, a table per task and way, a row per ablation."""
    first = next(iter(results.values()))
    tables = []
    for split, tasks in first["splits"].items():
        for task, ways in tasks.items():
            for way, fractions in ways.items():
                if not fractions:
                    continue
                table = Table(
                    title=f"{first['paper']}, {first['config']['data']}, {split}, {task}, {way.replace('_', '-')}: "
                    f"macro AUROC, runs: {first['number_of_runs']}",
                    caption="\n".join(left_out_notes(first)),
                    box=box.SIMPLE_HEAD,
                    pad_edge=False,
                )
                table.add_column("ablation", no_wrap=True)
                for fraction in fractions:
                    table.add_column(fraction, justify="right", no_wrap=True)
                for name, result in results.items():
                    rows = result["splits"][split][task][way]
                    table.add_row(name, *(_cell(rows.get(fraction, {}).get("macro_auroc")) for fraction in fractions))
                tables.append(table)
    return tables


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ±{value['std']:.3f}")
