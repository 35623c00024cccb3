# SPDX-License-Identifier: MIT
"""``protokernels table``: trains or collects what a paper's table lacks and prints it beside the paper's own numbers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .ablations import with_shared_stages
from .commands import find_paper, leave_processes, name_unknown, plain_warnings, with_repeats_joined, with_underscores
from .data.datasets import data_name, data_title
from .papers import PAPERS
from .results import (
    FinishedRun,
    Format,
    Job,
    Outcome,
    PaperTable,
    ResultRow,
    Values,
    read_rows,
    rendered,
    run_jobs,
    update_rows,
)
from .results.before import check_computed, check_seeds
from .results.fields import as_record, changed, completed, field_name, field_value, named_values
from .results.finished import find_finished
from .results.jobs import is_finished, is_main_process
from .results.tables import is_rendered
from .training import RunFolderError
from .training.files import check_target, exclusive, make_folder, read_json, write_bytes, write_json
from .training.runs import RunSettings
from .training.session import Precision

COMPUTED = "computed"  # folder of the rows that need no training


@dataclass(frozen=True)
class TableOptions:
    """What to show, and what to train for it."""

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Results files (.json) and folders with runs: their rows are shown, nothing is trained. None: what the table lacks is
    trained."""
    results: Path | None = None
    """Results file: the rows are merged into it, and all that it holds are shown."""
    add: bool = False
    """Join new seeds to the rows in --results instead of replacing them."""
    data: tuple[str, ...] = ()
    """Data sets; default: the table's."""
    preset: tuple[str, ...] = ()
    """Presets; default: the table's."""
    only: tuple[str, ...] = ()
    """Values of the table's other axes, as method=simclr,byol."""
    set: tuple[str, ...] = ()
    """Other values of the configurations that are trained, as epochs=5."""
    runs: int | None = None
    """Number of seeds; default: the table's."""
    seed: int = 0
    """The first seed."""
    precision: Precision = "fp32"
    """Of training; bf16 pays on processors with AMX or AVX512-BF16."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train."""
    quiet: bool = False
    """No progress output."""
    folder: Path | None = None
    """Where runs are kept and continued; default: runs/PAPER-table."""
    keep: bool = False
    """Take finished runs in --folder as they are, also those of another configuration or other data."""
    data_root: Path | None = None
    """Folder of the data; default: the environment variable PROTOKERNELS_DATA."""
    download: bool = False
    """Fetch data that is not there."""
    format: Format = "text"
    """How the table is written."""
    out: Path | None = None
    """File for the table, a new one or that of an earlier table; default: the screen."""
    figures: Path | None = None
    """Folder for pictures of several rows side by side; nothing is drawn without it."""


def table(words: list[str]) -> int:
    """``protokernels table PAPER [SOURCE ...] [options]``."""
    words = with_underscores(words)
    papers = papers_with_a_table()
    if not words or words[0] in ("-h", "--help") or words[0] not in papers:
        name_unknown("table", words, "paper", papers)
        print(
            f"protokernels table PAPER [SOURCE ...] [options]\n\npapers: {', '.join(papers)}\n"
            "`protokernels table PAPER --help` lists the options."
        )
        return 0 if words and words[0] in ("-h", "--help") else 2
    described = table_of(words[0])
    axes = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in described.axes.items())
    for data, others in described.axes_of_data.items():
        axes += "".join(f"; of {data}, {name}: {', '.join(map(str, values))}" for name, values in others.items())
    options = tyro.cli(
        TableOptions,
        args=with_repeats_joined(words[1:], TableOptions),
        prog=f"protokernels table {words[0]}",
        description=(
            f"Trains or collects what the table of {words[0]} lacks, {described.runs} seeds each, and prints it beside the "
            f"paper's numbers. Its axes: {axes}."
        ),
    )
    plain_warnings()
    try:
        return run_table(described, options)
    finally:
        leave_processes()


def papers_with_a_table() -> list[str]:
    """The papers beside which a table is described."""
    return [name for name in PAPERS if importlib.util.find_spec(_module_of(name)) is not None]


def table_of(paper: str) -> PaperTable:
    """What a paper says about its table."""
    described: PaperTable = importlib.import_module(_module_of(paper)).TABLE
    return described


def _module_of(paper: str) -> str:
    return f"protokernels.papers._{paper}_table"


def run_table(described: PaperTable, options: TableOptions) -> int:
    """Trains, collects, merges, draws and prints; the exit status."""
    chosen = chosen_values(described, options)
    folders = [source for source in options.sources if source.suffix != ".json"]
    check_options(described, options)
    belongs = partial(check_row, described)
    if options.results is not None and options.results.exists():
        read_rows(options.results, belongs)  # before hours of training
    rows = [row for source in options.sources if source.suffix == ".json" for row in read_rows(source, belongs)]
    outcome = Outcome()
    if not options.sources:
        folder = options.folder or Path("runs") / f"{described.paper}-table"
        outcome = train_missing(described, folder, chosen, options)
        folders = [folder]
    if not is_main_process():
        return 1 if outcome.failed else 0
    outcome.report()
    found = [
        *described.collect([folder for folder in folders if folder.exists() or options.sources], complete_config),
        *computed_rows(folders),
    ]
    before = read_rows(options.results, belongs) if options.results is not None and options.results.exists() else []
    check_found(described, [*rows, *found, *before], chosen, options.sources or folders, trained=not options.sources)
    rows = described.merge(rows, matching(described, found, chosen))
    if options.results is not None:
        now = rows
        rows = update_rows(options.results, lambda before: described.merge(before, now, add=options.add), belongs)
    rows = matching(described, rows, chosen)
    text = rendered(described.tables(rows), options.format) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        make_folder(options.out.parent, parents=True)
        write_bytes(options.out, text.encode())
    if options.figures is not None:
        for path in draw(described, folders, chosen, options.figures, options.data_root):
            print(path, file=sys.stderr)
    return 1 if outcome.failed else 0


def complete_config(run: FinishedRun) -> Values:
    """A run's configuration with the defaults of fields that are newer than it."""
    return completed(find_paper(run.results["paper"]).CONFIG, run.config)


def check_row(described: PaperTable, row: ResultRow) -> None:
    """``ValueError`` for a row of another paper.

    Older rows do not say whose they are. They have what tells the rows of this table apart, and their configuration has no
    field that this paper's lacks.
    """
    modules = described.modules or (described.paper,)
    if "paper" in row:
        if row["paper"] not in modules:
            raise ValueError(
                f"it is of {row['paper']}; the table of {described.paper} has rows of {', '.join(modules)}; pass a results "
                "file of this paper"
            )
        return
    known = {field.name for field in fields(find_paper(described.paper).CONFIG)}
    lacking = [name for name in described.row_key if name not in row and name not in described.defaults]
    if lacking or not row.get("config", {}).keys() <= known:
        what = f"it has no {', '.join(lacking)}" if lacking else "its configuration has other fields"
        raise ValueError(f"it is not of {described.paper} ({what}); pass a results file of this paper")


def check_found(
    described: PaperTable,
    rows: Sequence[ResultRow],
    chosen: Mapping[str, Sequence[Any]],
    sources: Sequence[Path],
    *,
    trained: bool,
) -> None:
    """``ValueError`` where no row is left, or a value that is asked for is none of the table's and of no row. With ``trained``
    such a value is that of a run that failed, and the others are shown."""
    where = ", ".join(map(str, sources))
    if not rows:
        raise ValueError(f"no finished run of {described.paper} was found in {where}")
    matched = matching(described, rows, chosen)
    if matched and trained:
        return
    for axis, values in chosen.items():
        there = list(dict.fromkeys(described.value(row, axis) for row in rows))
        known = described.axes[axis] if matched else ()  # one of several that is not trained yet
        if wrong := [value for value in values if value not in there and value not in known]:
            raise ValueError(
                f"no finished run of {described.paper} in {where} has {axis} {', '.join(map(str, wrong))}; there are "
                f"{', '.join(map(str, there))}"
            )
    if not matched:
        asked = " and ".join(f"{axis} {', '.join(map(str, values))}" for axis, values in chosen.items())
        raise ValueError(f"no finished run of {described.paper} in {where} has {asked} together")


def check_options(described: PaperTable, options: TableOptions) -> None:
    """``ValueError`` for what cannot be done, before anything is trained."""
    if options.runs is not None and options.runs < 1:
        raise ValueError(f"--runs must be at least 1; got {options.runs}")
    for path in (options.results, options.out):
        if path is not None:
            check_target(path, makes_folder=True)
    if options.out is not None:
        check_out(options.out, [path for path in (*options.sources, options.results) if path is not None])
    if options.set and options.sources:
        raise ValueError(
            "--set changes what is trained; with results files or folders nothing is trained, leave it out"
        )
    if options.add and options.results is None:
        raise ValueError("--add joins seeds to the rows of a file; name it with --results")
    described.merge((), (), add=options.add)  # raises where the table's rows cannot be joined
    if options.figures is not None and described.compare is None:
        raise ValueError(
            f"--figures: {described.paper} has no pictures of several rows; `protokernels figures RUN` draws a run's"
        )
    if options.figures is not None and options.sources and all(source.suffix == ".json" for source in options.sources):
        raise ValueError("--figures: name the folders that hold the runs; a results file has no weights")


def check_out(out: Path, others: Sequence[Path]) -> None:
    """``ValueError`` where ``out`` is one of the other files, or a file that holds no table of an earlier call."""
    if out.resolve() in [path.resolve() for path in others]:
        raise ValueError(f"--out {out} is also what the rows are read from or kept in; pass another name for the table")
    if not out.exists():
        return
    text = out.read_bytes().decode(errors="replace")
    if text.strip() and not is_rendered(text):
        raise ValueError(f"--out {out} holds something else than a table of `protokernels table`; pass another name")


def chosen_values(described: PaperTable, options: TableOptions) -> dict[str, list[Any]]:
    """Axis -> the values that are asked for; ``ValueError`` for an axis that the table does not have, or
    two lists of values of one."""
    chosen: dict[str, list[Any]] = {"data": [data_name(name) for name in options.data], "preset": list(options.preset)}
    for name, texts in named_values(options.only, "--only").items():
        if name not in described.axes:
            raise ValueError(
                f"--only: unknown axis {name}; the table of {described.paper} has {', '.join(described.axes)}"
            )
        kind = data_name if name == "data" else type(described.axes[name][0])
        try:
            values = [kind(text) for text in texts]
        except ValueError:
            raise ValueError(
                f"--only: {name} takes values such as {described.axes[name][0]}; got {','.join(texts)}"
            ) from None
        if chosen.get(name) and set(chosen[name]) != set(values):
            raise ValueError(
                f"--{name} asks for {', '.join(map(str, chosen[name]))} and --only for {', '.join(texts)}; give one of them"
            )
        chosen[name] = values
    return {name: values for name, values in chosen.items() if values}


def matching(described: PaperTable, rows: Sequence[ResultRow], chosen: Mapping[str, Sequence[Any]]) -> list[ResultRow]:
    """The rows that have the chosen values."""
    return [row for row in rows if all(described.value(row, axis) in values for axis, values in chosen.items())]


def train_missing(
    described: PaperTable, folder: Path, chosen: Mapping[str, Sequence[Any]], options: TableOptions
) -> Outcome:
    """Trains every run of the table that is not finished below ``folder``, and computes the rows that need none."""
    combinations = described.combinations(chosen)
    trained = [values for values in combinations if values.get("preset") not in described.computed]
    made = [
        (values, job)
        for index in range(options.runs or described.runs)
        for values in trained
        if (job := job_of(described, values, options.seed + index, folder, options)) is not None
    ]
    part = [*(values for values, _ in made), *(values for values in combinations if values not in trained)]
    asked = ((axis, value) for axis, values in chosen.items() for value in values)
    lacking = [(axis, value) for axis, value in asked if not any(values[axis] == value for values in part)]
    if lacking:  # data have names of their own, and lack a run for what else was asked
        axis, value = min(lacking, key=lambda pair: (pair[1] in described.axes[pair[0]], pair[0] == "data"))
        known = ", ".join(map(str, described.axes[axis]))
        raise ValueError(f"no run of the table has {axis} {value}; it has some of {known}, but not all combinations")
    jobs = [job for _, job in made]
    check_seeds(described, folder, jobs, complete_config, data_root=options.data_root, keep_finished=options.keep)
    made_once: dict[Path, str] = {}
    for values in (values for values in combinations if values.get("preset") in described.computed):
        path, data = computed_file(folder, values), values["data"]
        if made_once.setdefault(path, data) != data:
            raise RunFolderError(
                f"the rows of {made_once[path]} and of {data} would both be {path}; take a --folder for each"
            )
    if not options.keep:
        check_computed(made_once, options.data_root)
    if is_main_process() and jobs:
        done = 0
        for job in jobs:
            with suppress(ValueError):  # a broken file is reported when its run is reached
                done += is_finished(job)
        print(f"{len(jobs)} runs below {folder}, {done} of them finished", file=sys.stderr, flush=True)
    try:
        outcome = run_jobs(jobs, data_root=options.data_root, download=options.download, keep_finished=options.keep)
    except RunFolderError as error:
        raise RunFolderError(f"{error}; --keep takes finished runs as they are") from error
    if is_main_process():
        for values in combinations:
            compute = described.computed.get(values.get("preset", ""))
            path = computed_file(folder, values)
            if compute is not None and not path.exists():
                make_folder(path.parent, parents=True)
                with exclusive(path.with_suffix(".lock")):
                    if not path.exists():
                        write_json(path, compute(values["data"], options.data_root, options.download))
    return outcome


def job_of(described: PaperTable, values: Values, seed: int, folder: Path, options: TableOptions) -> Job | None:
    """One run of the table, if the combination is part of it; ``ValueError`` for a value that cannot be run."""
    for axis, value in values.items():
        known = described.axes[axis]
        if axis not in ("data", "preset") and isinstance(value, str) and value not in known:
            raise ValueError(f"unknown {axis} {value}; expected some of {', '.join(map(str, known))}")
    recipe = described.recipe(values, described.paper)
    if recipe is None:
        return None
    module = find_paper(recipe.module)
    config = module.CONFIG.preset(recipe.preset, data=values["data"], **recipe.changes)
    values_set: Values = {}
    for text, texts in named_values(options.set, "--set").items():
        name = field_name(config, text)
        values_set[name] = field_value(config, name, ",".join(texts))
    config = with_shared_stages(changed(config, **values_set), folder)  # all at once: one may need another
    settings = RunSettings(
        seed=seed, resume=True, precision=options.precision, device=options.device, quiet=options.quiet
    )
    place = described.folder(values, seed)
    row = described.identity(FinishedRun(place, {"paper": recipe.module, "config": as_record(config), "seed": seed}))
    for axis, value in values.items():
        if axis in values_set or row.get(axis, value) != value:
            raise ValueError(
                f"--set: {' '.join(options.set)} makes the row of {axis} {value} that of {values_set.get(axis, row.get(axis))}; leave "
                f"that out, and choose rows by --only {axis}=VALUE,VALUE"
            )
    return Job(str(place), recipe.module, module, config, folder / place, settings)


def computed_file(folder: Path, values: Values) -> Path:
    """Where the row of these values is kept, if it is one that needs no training."""
    return folder / COMPUTED / f"{data_title(values['data'])}-{values.get('preset')}.json"


def computed_rows(folders: Sequence[Path]) -> list[ResultRow]:
    """The rows that :func:`train_missing` computed below the folders."""
    files = [path for folder in folders for path in sorted(folder.glob(f"{COMPUTED}/*.json"))]
    return [read_json(path) for path in files]


def draw(
    described: PaperTable,
    folders: Sequence[Path],
    chosen: Mapping[str, Sequence[Any]],
    out: Path,
    data_root: Path | None,
) -> list[Path]:
    """Pictures of several rows side by side, from the runs below the folders: those of one data set and preset, in a folder of
    their own where there are several."""
    runs = find_finished(folders, described.modules or (described.paper,))
    runs = [run for run in runs if matching(described, [axes_of(run.config, chosen) | described.identity(run)], chosen)]
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.config["data"], run.config["preset_name"]), []).append(run)
    names = [f"{data_title(data)}-{preset}" for data, preset in groups]
    paths = []
    for index, (name, members) in enumerate(zip(names, groups.values(), strict=True)):
        number = names[:index].count(name)  # files in two folders can have one name
        place = out / (f"{name}-{number + 1}" if number else name) if len(groups) > 1 else out
        paths += described.compare(members, place, data_root) if described.compare is not None else []
    return paths


def axes_of(config: Mapping[str, Any], chosen: Mapping[str, Sequence[Any]]) -> Values:
    """Those of the chosen axes that are fields of a configuration."""
    return {axis: config[axis] for axis in chosen if axis in config}
