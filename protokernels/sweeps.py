# SPDX-License-Identifier: MIT
"""``protokernels sweep``: a paper over values of the fields of its configuration, one field at a time or all combinations;
one run folder each, then a table, a JSON and figures of the paper's scores."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from .ablations import new_folder, with_shared_stages
from .commands import (
    BASELINES,
    TrainOptions,
    find_paper,
    leave_processes,
    name_unknown,
    parse_options,
    with_underscores,
)
from .data.datasets import data_title
from .papers import PAPERS
from .results import Format, Job, Outcome, ResultTable, Row, Score, rendered, run_jobs
from .results.fields import as_record, changed, completed, field_name, field_value, named_values
from .results.jobs import SharedData, differing, is_main_process
from .results.scores import main_scores
from .results.tables import literal
from .tables import papers_with_a_table, table_of
from .training import RunFolderError
from .training.files import exclusive, make_folder, read_json, write_json
from .training.runs import RunSettings, load_runs, resuming

SUMMARY = "sweep.json"
BASE = "base"  # folder of the configuration that all start from, where a value is its own

Scores = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class SweepOptions(TrainOptions):
    """What is swept, besides the options of ``train``."""

    figures: bool = True
    """Draw the scores over the values; `protokernels figures RUN` draws the pictures of one of the runs."""
    over: tuple[str, ...] = ()
    """Fields and their values, as latent_dim=2,4,8 num_prototypes=10,20; default: the paper's."""
    grid: bool = False
    """All combinations of the values, instead of one field at a time."""
    format: Format = "text"
    """How the table is written."""


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep."""

    values: Mapping[str, Any]  # field -> value
    config: Any
    folder: str  # below that of the sweep; points of one configuration share it


def sweep(words: list[str]) -> int:
    """``protokernels sweep PAPER [--over FIELD=VALUE,VALUE ...] [options]``; a baseline's name sweeps the baseline."""
    words = with_underscores(words)
    if not words or words[0] not in (*PAPERS, *BASELINES):
        name_unknown("sweep", words, "paper or baseline", (*PAPERS, *BASELINES))
        print(
            "protokernels sweep PAPER [--over FIELD=VALUE,VALUE ...] [--grid] [options]\n\n"
            f"papers: {', '.join(PAPERS)}\nbaselines: {', '.join(BASELINES)}\n"
            "`protokernels sweep PAPER --help` lists the options and the fields."
        )
        return 0 if words and words[0] in ("-h", "--help") else 2
    name = words[0]
    paper = find_paper(name)
    described = table_of(name) if name in papers_with_a_table() else None
    default = described.sweep if described else {}
    listed = "; ".join(f"{field}={','.join(map(str, values))}" for field, values in default.items())
    more = f"Swept unless --over says otherwise: {listed}." if default else ""
    options, settings, config = parse_options(words, paper, "sweep", SweepOptions(), more)
    check = described.check if described else lambda config: None
    if any(word == "--over" and after[:2] in ("", "--") for word, after in zip(words, [*words[1:], ""], strict=True)):
        raise ValueError("--over takes FIELD=VALUE,VALUE ...; got nothing; leave it out for the paper's own sweep")
    try:
        if options.over:
            points = points_of(config, asked_values(config, options.over), grid=options.grid, check=check)
        elif default:
            points = default_points(config, default, grid=options.grid, check=check)
        else:
            raise ValueError(f"{name} has no sweep of its own; say what to sweep: --over FIELD=VALUE,VALUE")
        points = filled_points(paper, config, points, options)
        folder, outcome = run_sweep(paper, name, config, points, options, settings)
    finally:
        leave_processes()
    if is_main_process():
        outcome.report()
        scores = described.main_scores if described else main_scores
        show(folder, scores, figures=options.figures, how=options.format)
    return 1 if outcome.failed else 0


def asked_values(config: Any, words: Sequence[str]) -> dict[str, list[Any]]:
    """``latent_dim=2,4`` words as field -> values.

    Raises:
        ValueError: no such field, a value of another type, or one given twice.
    """
    found: dict[str, list[Any]] = {}
    for text, texts in named_values(words, "--over").items():
        name = field_name(config, text)
        values = [field_value(config, name, each) for each in texts]
        if name in found or len(set(values)) < len(values):
            raise ValueError(f"--over: {name} has a value twice; got {word_of(words, text)}")
        found[name] = values
    return found


def word_of(words: Sequence[str], name: str) -> str:
    """The word that gives ``name`` its values."""
    return next(word for word in words if word.startswith(f"{name}="))


def points_of(
    config: Any, over: Mapping[str, Sequence[Any]], *, grid: bool, check: Callable[[Any], Any] = lambda config: None
) -> list[Point]:
    """The configurations of a sweep, all of them checked.

    Args:
        config: what they start from.
        over: field -> values.
        grid: all combinations; else one field at a time.
        check: raises for a configuration that cannot be trained.

    Raises:
        ValueError: a configuration that its class or ``check`` refuses; the message names the values.
    """
    single = [{name: value} for name, values in over.items() for value in values]
    combined = [dict(zip(over, each, strict=True)) for each in product(*over.values())]
    return [point_of(config, values, check) for values in (combined if grid else single)]


def point_of(config: Any, values: Mapping[str, Any], check: Callable[[Any], Any]) -> Point:
    """One of :func:`points_of`."""
    now = changed(config, **values)
    try:
        check(now)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{', '.join(f'{name}={value}' for name, value in values.items())}: {error}") from error
    return Point(values, now, BASE if now == config else folder_of(values))


def folder_of(values: Mapping[str, Any]) -> str:
    """The folder of a point, another one for other values: a text that a folder's name cannot hold as it is adds a digest.

    >>> folder_of({"latent_dim": 2, "similarity": "dot"})
    'latent_dim-2,similarity-dot'
    """
    name = ",".join(f"{field}-{value}" for field, value in values.items()).replace("/", "_").replace(" ", "")
    parts = [part for value in values.values() for part in (value if isinstance(value, tuple) else (value,))]
    if not any(isinstance(part, str) and set(part) & set("/ ,") for part in parts):
        return name
    return f"{name}-{hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:8]}"


def default_points(
    config: Any, over: Mapping[str, Sequence[Any]], *, grid: bool, check: Callable[[Any], Any]
) -> list[Point]:
    """The points of the paper's own sweep; a value that this configuration refuses is left out, and named on stderr."""
    kept: dict[str, list[Any]] = {name: [] for name in over}
    for name, values in over.items():
        for value in values:
            try:
                point_of(config, {name: value}, check)
            except ValueError as error:
                if is_main_process():
                    print(f"left out: {error}", file=sys.stderr)
            else:
                kept[name].append(value)
    return points_of(config, {name: values for name, values in kept.items() if values}, grid=grid, check=check)


def filled_points(paper: Any, config: Any, points: Sequence[Point], options: SweepOptions) -> list[Point]:
    """The points whose batches the training images can fill: larger ones would all be one run, with all images in a batch. They are left
    out, and named on stderr.

    Raises:
        ValueError: no point is left.
    """
    if not any("batch_size" in point.values for point in points):
        return list(points)
    experiment = getattr(paper, "EXPERIMENT", paper)
    dataset = experiment.load(config, options.data_root, download=options.download)
    kept = []
    for point in points:
        count = len(experiment.training_split(dataset, point.config))
        if "batch_size" not in point.values or point.config.batch_size <= count:
            kept.append(point)
        elif is_main_process():
            values = ", ".join(f"{name}={value}" for name, value in point.values.items())
            print(f"left out: {values}: there are {count} training images", file=sys.stderr)
    if not kept:
        raise ValueError("every batch_size of the sweep is above the number of training images; give smaller ones")
    return kept


def run_sweep(
    paper: Any, name: str, config: Any, points: Sequence[Point], options: SweepOptions, settings: RunSettings
) -> tuple[Path, Outcome]:
    """Trains and scores every point that is not finished, and notes each in ``sweep.json`` as soon as it is.

    Raises:
        RunFolderError: the folder holds a sweep, and ``settings.resume`` is false or the sweep starts from another
            configuration, or has points of other seeds or of other data.
    """
    folder = new_folder(options.out, name, config, "sweep", SUMMARY, settings)
    head = {"paper": name, "data": config.data, "preset": config.preset_name, "config": as_record(config)}
    head["precision"] = settings.precision
    shared = with_shared_stages(config, folder)
    jobs: dict[str, Job] = {}
    for point in points:
        place = folder / point.folder
        own = replace(shared, **point.values)
        jobs.setdefault(point.folder, Job(point.folder, name, paper, own, place, settings))
    make_folder(folder, parents=True)
    seeds = settings.seeds
    note(folder, paper.CONFIG, head, seeds, [])  # another configuration is noticed before anything is trained
    check_earlier(folder, name, paper, jobs, options.data_root, settings)

    def after(job: Job, results: dict[str, Any]) -> None:
        kept = {key: results[key] for key in ("seeds", "complete", "splits")}
        kept |= {"protocol": results.get("protocol", {})}
        found = [
            {"values": dict(point.values), "folder": job.name, **kept} for point in points if point.folder == job.name
        ]
        note(folder, paper.CONFIG, head, seeds, found)

    outcome = run_jobs(
        list(jobs.values()),
        data_root=options.data_root,
        download=options.download,
        again=resuming(folder),
        after=after,
    )
    return folder, outcome


def check_earlier(
    folder: Path, name: str, paper: Any, jobs: Collection[str], data_root: Path | None, settings: RunSettings
) -> None:
    """``RunFolderError`` where a point in ``sweep.json`` that is not swept now, but shown beside the others, is of other data."""
    path = folder / SUMMARY
    data = SharedData(data_root)
    for point in read_json(path)["points"] if path.exists() else []:
        place = folder / point["folder"]
        if point["folder"] not in jobs and (place / "config.json").exists():
            config = load_runs(place)[0].config_as(paper.CONFIG)
            data.check(Job(point["folder"], name, paper, config, place, settings))


def note(
    folder: Path, kind: Any, head: Mapping[str, Any], seeds: list[int], points: Sequence[Mapping[str, Any]]
) -> None:
    """Adds finished points of these seeds to ``sweep.json``, in the place of those of the same values.

    Raises:
        RunFolderError: it is the file of another sweep.
    """
    if not is_main_process():
        return
    path = folder / SUMMARY
    with exclusive(folder / f"{SUMMARY}.lock"):
        before = read_json(path) if path.exists() else {**head, "points": []}
        then = {**completed(kind, before["config"]), "precision": before["precision"]}
        now = {**head["config"], "precision": head["precision"], "seeds": seeds}
        others = [point["seeds"] for point in before["points"] if point["seeds"] != seeds]
        pairs = differing({**then, "seeds": next(iter(others), seeds)}, now)
        if before["paper"] != head["paper"] or pairs:
            raise RunFolderError(
                f"{folder} holds a sweep of {before['paper']} that starts from another configuration "
                f"({', '.join(pairs)}); choose another --out, or give the options that it was started with"
            )
        kept = {
            json.dumps(point["values"], sort_keys=True, default=str): point for point in [*before["points"], *points]
        }
        write_json(path, {**head, "points": list(kept.values())})


def show(folder: Path, scores: Scores, *, figures: bool, how: Format) -> None:
    """Prints the table of all points that are finished, and draws them.

    Raises:
        ValueError: none is.
    """
    content = read_json(folder / SUMMARY)
    if not content["points"]:
        raise ValueError(f"{folder}: no point of the sweep is finished yet")
    print(rendered(sweep_tables(content, scores), how))
    paths = draw_sweep(content, scores, folder / "figures") if figures else []
    for kind, path in (("results", folder / SUMMARY), *(("figure", path) for path in paths)):
        print(f"{kind:8} {path}", file=sys.stderr if how != "text" else sys.stdout)


def sweeps_of(content: Mapping[str, Any]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Fields -> the points that differ in them, in the order of their values."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for point in content["points"]:
        found.setdefault(tuple(point["values"]), []).append(point)
    return {names: sorted(points, key=lambda point: _places(point["values"])) for names, points in found.items()}


def _places(values: Mapping[str, Any]) -> tuple[tuple[float, str], ...]:
    """Numbers by size, anything else by its name."""
    return tuple(
        (float(value), "") if isinstance(value, (int, float)) else (math.inf, str(value)) for value in values.values()
    )


def sweep_tables(content: Mapping[str, Any], scores: Scores) -> list[ResultTable]:
    """By scored set and by what was swept; what all start from is bold."""
    made = []
    for split in dict.fromkeys(split for point in content["points"] for split in point["splits"]):
        for names, points in sweeps_of(content).items():
            found = [(point, scores(point["splits"][split])) for point in points if split in point["splits"]]
            titles = list(dict.fromkeys(title for _, values in found for title in values))
            rows = []
            for point, values in found:
                name, *others = (literal(value) for value in point["values"].values())
                cells = (*others, *(Score.of(values.get(title)) for title in titles), len(point["seeds"]))
                bold = f"**{name}**" if point["folder"] == BASE else name
                rows.append(Row(bold, cells, point.get("protocol", {})))
            group = f"{content['paper']}, {literal(data_title(content['data']))}, preset `{content['preset']}`, {split}"
            made.append(ResultTable((*names, *titles, "seeds"), tuple(rows), group=group))
    return made


def draw_sweep(content: Mapping[str, Any], scores: Scores, folder: Path) -> list[Path]:
    """A figure per scored set: a panel per swept field with a line per score; of combinations, a panel per score with a line
    per value of the other fields."""
    from .figures import save_figure  # matplotlib is not needed for training
    from .figures.sweeps import Panel, sweep_figure

    paths = []
    for split in dict.fromkeys(split for point in content["points"] for split in point["splits"]):
        panels: list[Panel] = []
        for names, points in sweeps_of(content).items():
            found = [point | {"scores": scores(point["splits"][split])} for point in points if split in point["splits"]]
            titles = list(dict.fromkeys(title for point in found for title in point["scores"]))
            for point in found:
                point["values"] = {name: _placed(value) for name, value in point["values"].items()}
            x = list(dict.fromkeys(point["values"][names[0]] for point in found))
            lines: dict[str, dict[str, dict[Any, Score | None]]] = {}  # panel -> line -> value -> score
            for point in found:
                others = ", ".join(f"{name} {point['values'][name]}" for name in names[1:])
                for title in titles:
                    panel, line = (title, others) if others else ("", title)
                    at = lines.setdefault(panel, {}).setdefault(line, {})
                    at[point["values"][names[0]]] = Score.of(point["scores"].get(title))
            for panel, by_line in lines.items():
                means = {line: [_mean(at.get(value)) for value in x] for line, at in by_line.items()}
                several = {
                    line: at for line, at in by_line.items() if any(score and score.std for score in at.values())
                }
                spreads = {line: [_std(at.get(value)) for value in x] for line, at in several.items()}
                panels.append(Panel(names[0].replace("_", " "), panel or "score", x, means, spreads))
        title = f"{content['paper']}, {data_title(content['data'])}, {content['preset']}: {split}"
        paths.append(save_figure(sweep_figure(panels, title=title), folder / f"sweep_{split.replace('+', '_')}.png"))
    return paths


def _placed(value: Any) -> Any:
    """A value as its place on an axis is called; one under which scores can be kept."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else value


def _mean(score: Score | None) -> float:
    return math.nan if score is None else score.mean


def _std(score: Score | None) -> float:
    return 0.0 if score is None or score.std is None else score.std
